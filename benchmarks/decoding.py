"""How much faster is acting from a cache than encoding the context anew at every step, and what does the cache take?

    python benchmarks/decoding.py [--task walker_walk] [--episodes 4] [--environments 10] [--token-set at5] [--runs 3]
                                  [--json FILE]

An evaluation of `--episodes` in one context, from its steps: for each capacity that the cache goes through, the time of
a step with the cache, and of a forward pass over the context as it is in the middle of that stretch, which is what an
agent without a cache computes at every step. Medians over the runs, times the steps of the stretch, and the simulation
with its rewards on top of both. Then, from the compiler, the memory of a step by devices among which one context of
half a million tokens is divided.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from command_line import positive, told_in_one_line
from host_devices import in_process
from random_data import random_context

LONG, RINGS = 524_288, (1, 2, 4, 8)
STEPS = 10  # of a run


def median_seconds(work: Callable[[], Any], runs: int) -> float:
    """Of `runs` calls after one that does not count; of one alone where it takes more than ten seconds."""
    seconds = []
    for _ in range(1 + runs):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
        if len(seconds) == 2 and seconds[-1] > 10:
            break
    return float(np.median(seconds[1:]))


def stretches(most: int) -> list[tuple[int, int]]:
    """The cache's capacities for up to `most` tokens, and with how many tokens each begins to be used."""
    from ringrl.evaluation.actors import SMALLEST_CACHE

    found = [(min(SMALLEST_CACHE, most), 0)]
    while found[-1][0] < most:
        found.append((min(2 * found[-1][0], most), found[-1][0]))
    return found


def compare(options: argparse.Namespace) -> list[dict[str, float]]:
    """Seconds per step by stretch: from the cache and anew."""
    import jax
    from flax import nnx

    from ringrl.config import ModelConfig
    from ringrl.envs import domain_of
    from ringrl.model import make_policy

    domain = domain_of(options.task)
    sizes = domain.observation_size, domain.action_size
    policy = make_policy(ModelConfig(token_set=options.token_set), *sizes, seed=0)
    graph, state = nnx.split(policy)
    act = jax.jit(lambda state, *arguments: nnx.merge(graph, state).act(*arguments), donate_argnums=3)
    encode = jax.jit(lambda state, context: nnx.merge(graph, state).actions(context)[:, -1])
    step = random_context(options.environments, 1, *sizes)
    rows = []
    for capacity, begin in stretches(options.episodes * domain.episode_length * policy.tokens_per_step):
        memory = policy.reset(options.environments, capacity)

        def cached(begin: int = begin) -> None:
            nonlocal memory
            memory = memory._replace(length=memory.length * 0 + begin)
            for _ in range(STEPS):
                action, memory = act(state, step, step, memory)
                np.asarray(action)  # the simulation waits for it

        middle = random_context(options.environments, (begin + capacity) // 2 // policy.tokens_per_step, *sizes)
        rows.append(
            {
                "capacity": capacity,
                "steps": (capacity - begin) / policy.tokens_per_step,
                "cached": median_seconds(cached, options.runs) / STEPS,
                "anew": median_seconds(lambda middle=middle: np.asarray(encode(state, middle)), options.runs),
            }
        )
        del memory
        row = rows[-1]
        print(
            f"{row['capacity']:>9}{row['steps']:>8.0f}{1e3 * row['cached']:>12.2f}{1e3 * row['anew']:>12.1f}"
            f"{row['anew'] / row['cached']:>8.1f}",
            flush=True,
        )
    return rows


def simulation_seconds(options: argparse.Namespace) -> float:
    """Of one step of all environments."""
    from ringrl.envs import make_vec

    environments = make_vec(options.task, options.environments, seed=0)
    environments.reset()
    actions = np.random.default_rng(0).uniform(-1, 1, environments.action_space.shape).astype(np.float32)
    seconds = median_seconds(lambda: [environments.step(actions) for _ in range(50)], options.runs) / 50
    environments.close()
    return seconds


def memory_of(ring: int) -> dict[str, float]:
    """MiB on one device: its part of the cache, and the scratch of a step (in a process with that many devices)."""
    import jax
    from flax import nnx
    from jax.sharding import AxisType

    from ringrl.config import ModelConfig
    from ringrl.model import make_policy
    from ringrl.model.parallel import MESH_AXES, Parallel
    from ringrl.planning.workload import ACTION, OBSERVATION

    mesh = jax.make_mesh((1, 1, 1, ring), MESH_AXES, (AxisType.Auto,) * 4)
    policy = make_policy(ModelConfig(), OBSERVATION, ACTION, seed=0, parallel=Parallel(mesh))
    graph, state = nnx.split(policy)
    act = jax.jit(lambda state, *arguments: nnx.merge(graph, state).act(*arguments), donate_argnums=3)
    memory = policy.reset(1, LONG)
    step = random_context(1, 1)
    scratch = act.lower(state, step, step, memory).compile().memory_analysis().temp_size_in_bytes
    cache = sum(x.addressable_shards[0].data.nbytes for x in (*memory.keys, *memory.values))
    return {"cache": cache / 2**20, "scratch": scratch / 2**20}


@told_in_one_line
def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and, if asked, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="walker_walk")
    parser.add_argument("--episodes", type=positive, default=4)
    parser.add_argument("--environments", type=positive, default=10)
    parser.add_argument("--token-set", default="at5")
    parser.add_argument("--runs", type=positive, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        print(json.dumps(memory_of(options.worker)))
        return
    print(f"{options.task}, {options.episodes} episodes, {options.environments} environments, {options.token_set}")
    print(f"{'capacity':>9}{'steps':>8}{'cached ms':>12}{'anew ms':>12}{'ratio':>8}")
    rows, simulation = compare(options), simulation_seconds(options)
    steps = sum(row["steps"] for row in rows)
    total = {kind: sum(row["steps"] * (row[kind] + simulation) for row in rows) for kind in ("cached", "anew")}
    print(
        f"evaluation of {steps:.0f} steps, {steps * simulation:.1f} s of them simulation: {total['cached']:.0f} s from "
        f"the cache, {total['anew']:.0f} s anew: {total['anew'] / total['cached']:.1f} times faster"
    )
    memory = {ring: in_process([__file__, "--worker", ring], ring, f"{ring} devices") for ring in RINGS}
    print(f"\none context of {LONG} tokens\n{'devices':>9}{'cache MiB':>12}{'scratch MiB':>13}")
    for ring, found in memory.items():
        print(f"{ring:>9}{found['cache']:>12.1f}{found['scratch']:>13.1f}")
    if options.json:
        results = {"rows": rows, "simulation": simulation, "total": total, "memory": memory}
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
