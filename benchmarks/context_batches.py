"""Measure the time to assemble a batch of contexts.

    python benchmarks/context_batches.py [--contexts 8] [--trajectories 128] [--episodes 1500] [--json FILE]

Batches are drawn from a temporary store of random walker episodes of 1000 steps. Prints the median and the least time
to plan a batch, to assemble it, and to copy its bytes once with all threads, which is a lower bound.
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
from common import one_line_errors, positive
from random_data import write_random_store

from ringrl.config import ContextConfig
from ringrl.data import EpisodeStore
from ringrl.data.sampling.normalisation import Normalisation
from ringrl.data.sampling.sampler import ContextSampler

TASK = "walker_walk"


def copied(arrays: list[np.ndarray]) -> None:
    """Copy the arrays, one row of the batch per task."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        targets = [np.empty_like(array) for array in arrays]
        rows = [(a[i], b[i]) for a, b in zip(targets, arrays, strict=True) for i in range(len(a))]
        list(pool.map(lambda pair: np.copyto(*pair), rows))


def milliseconds(run: Callable[..., object], *arguments: object) -> float:
    """Return the time of one call."""
    start = time.perf_counter()
    run(*arguments)
    return 1e3 * (time.perf_counter() - start)


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Measure. Print a table; write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=positive, default=8, help="contexts per batch")
    parser.add_argument("--trajectories", type=positive, default=128, help="trajectories per context, 1000 steps each")
    parser.add_argument("--episodes", type=positive, default=1500, help="episodes in the store")
    parser.add_argument("--batches", type=positive, default=10, help="measured batches, after one for warm-up")
    parser.add_argument("--json", type=Path, help="also write every time to this file")
    options = parser.parse_args(arguments)
    times: dict[str, list[float]] = {"measure the statistics": [], "plan": [], "assemble": [], "copy": []}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.h5"
        write_random_store(path, options.episodes)
        store = EpisodeStore(path)
        times["measure the statistics"].append(milliseconds(Normalisation.of, store))
        config = ContextConfig(trajectories=options.trajectories)
        sampler = ContextSampler(store, TASK, config, Normalisation.of(store), options.contexts, 0)
        for step in range(options.batches + 1):
            batch = sampler.batch(step)  # also brings every page of the file into memory
            if step:
                times["plan"].append(milliseconds(sampler.draw, step))
                times["assemble"].append(milliseconds(sampler.batch, step))
                times["copy"].append(milliseconds(copied, jax.tree.leaves(batch)))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(batch))
    shape = f"{options.contexts} contexts of {options.trajectories} trajectories"
    print(f"{shape}: {size / 1e6:.0f} MB, {os.cpu_count()} cores")
    for name, values in times.items():
        print(f"{name:<24}median {np.median(values):8.1f} ms   least {min(values):8.1f} ms")
    if options.json:
        options.json.write_text(json.dumps({"bytes": size, "milliseconds": times}))


if __name__ == "__main__":
    main()
