"""How long does it take to put a batch of contexts together?

    python benchmarks/context_batches.py [--contexts 8] [--trajectories 128] [--episodes 1500] [--json FILE]

Writes a store of random walker episodes of 1000 steps to a temporary folder and assembles batches from it, each of
other episodes. Prints the median and the least time of planning a batch, of assembling it, and of copying its bytes
once (by as many threads as read): what no assembly can do without.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from command_line import positive, told_in_one_line
from random_data import write_random_store

from ringrl.config import ContextConfig
from ringrl.data import EpisodeStore
from ringrl.data.normalisation import Normalisation
from ringrl.data.sampler import ContextSampler

TASK = "walker_walk"


def copied(arrays: list[np.ndarray]) -> None:
    """The same bytes once more, a row of the batch at a time."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        targets = [np.empty_like(array) for array in arrays]
        rows = [(a[i], b[i]) for a, b in zip(targets, arrays, strict=True) for i in range(len(a))]
        list(pool.map(lambda pair: np.copyto(*pair), rows))


def milliseconds(run: Callable[[], object]) -> float:
    """Of one call."""
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


@told_in_one_line
def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and, if asked, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=positive, default=8, help="contexts per batch")
    parser.add_argument("--trajectories", type=positive, default=128, help="trajectories per context, 1000 steps each")
    parser.add_argument("--episodes", type=positive, default=1500, help="episodes in the store")
    parser.add_argument("--batches", type=positive, default=10, help="batches measured, after one to warm up")
    parser.add_argument("--json", type=Path, help="also write every time to this file")
    options = parser.parse_args(arguments)
    times: dict[str, list[float]] = {"measure the statistics": [], "plan": [], "assemble": [], "copy": []}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.h5"
        write_random_store(path, options.episodes)
        store = EpisodeStore(path)
        times["measure the statistics"].append(milliseconds(lambda: Normalisation.of(store)))
        config = ContextConfig(trajectories=options.trajectories)
        sampler = ContextSampler(store, TASK, config, Normalisation.of(store), options.contexts, 0)
        for step in range(options.batches + 1):
            batch = sampler.batch(step)  # once for the bytes, and so that every page of the file is in memory
            measured = {
                "plan": milliseconds(lambda step=step: sampler.plan(step)),
                "assemble": milliseconds(lambda step=step: sampler.batch(step)),
                "copy": milliseconds(lambda batch=batch: copied(jax.tree.leaves(batch))),
            }
            for name, value in measured.items() if step else ():
                times[name].append(value)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(batch))
    shape = f"{options.contexts} contexts of {options.trajectories} trajectories"
    print(f"{shape}: {size / 1e6:.0f} MB, {os.cpu_count()} cores")
    for name, values in times.items():
        print(f"{name:<24}median {np.median(values):8.1f} ms   least {min(values):8.1f} ms")
    if options.json:
        options.json.write_text(json.dumps({"bytes": size, "milliseconds": times}))


if __name__ == "__main__":
    main()
