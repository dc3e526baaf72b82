"""Speed and memory of acting with a key-value cache, against encoding the whole context at every step.

    python benchmarks/decoding.py [--task walker_walk] [--episodes 4] [--environments 10] [--token-set at5] [--runs 3]
                                  [--json FILE]

For each capacity of the cache during an evaluation of `--episodes`: the time of a step with the cache, and the time of
a forward pass over half of the added tokens, as an agent without a cache needs at every step. The total adds the time
of simulation and rewards. Then the memory of a step per device, for one context of 524,288 tokens over several devices.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
from common import in_process, make_parser, median_seconds, one_line_errors, positive, save_json
from random_data import random_context

LONG, RINGS = 524_288, (1, 2, 4, 8)
STEPS = 10  # per run


def stretches(most: int) -> list[tuple[int, int]]:
    """Return (capacity, first number of tokens) of each cache up to `most` tokens."""
    from ringrl.evaluation.actors import SMALLEST_CACHE

    found = [(min(SMALLEST_CACHE, most), 0)]
    while found[-1][0] < most:
        found.append((min(2 * found[-1][0], most), found[-1][0]))
    return found


def jitted_act(policy: Any) -> tuple[Any, Any, Any]:
    """Return the policy's jitted `act`, which donates the cache, with its graph and state."""
    import jax
    from flax import nnx

    graph, state = nnx.split(policy)
    act = jax.jit(lambda state, *arguments: nnx.merge(graph, state).act(*arguments), donate_argnums=3)
    return act, graph, state


def compare(options: argparse.Namespace) -> list[dict[str, float]]:
    """Measure seconds per step with and without the cache, by capacity."""
    import jax
    from flax import nnx

    from ringrl.config import ModelConfig
    from ringrl.envs import domain_of
    from ringrl.model import make_policy

    domain = domain_of(options.task)
    sizes = domain.observation_size, domain.action_size
    policy = make_policy(ModelConfig(token_set=options.token_set), *sizes, seed=0)
    act, graph, state = jitted_act(policy)
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
                np.asarray(action)  # the simulation waits for the action

        middle = random_context(options.environments, (begin + capacity) // 2 // policy.tokens_per_step, *sizes)
        row = {
            "capacity": capacity,
            "steps": (capacity - begin) / policy.tokens_per_step,
            "cached": median_seconds(cached, options.runs) / STEPS,
            "anew": median_seconds(lambda middle=middle: np.asarray(encode(state, middle)), options.runs),
        }
        rows.append(row)
        del memory
        print(
            f"{row['capacity']:>9}{row['steps']:>8.0f}{1e3 * row['cached']:>12.2f}{1e3 * row['anew']:>12.1f}"
            f"{row['anew'] / row['cached']:>8.1f}",
            flush=True,
        )
    return rows


def simulation_seconds(options: argparse.Namespace) -> float:
    """Return the seconds of one step of all environments."""
    from ringrl.envs import make_vec

    environments = make_vec(options.task, options.environments, seed=0)
    environments.reset()
    actions = np.random.default_rng(0).uniform(-1, 1, environments.action_space.shape).astype(np.float32)
    seconds = median_seconds(lambda: [environments.step(actions) for _ in range(50)], options.runs) / 50
    environments.close()
    return seconds


def memory_of(ring: int) -> dict[str, float]:
    """Return the MiB per device of the cache and of the scratch memory of a step, on a ring of all devices."""
    import jax
    from jax.sharding import AxisType

    from ringrl.config import ModelConfig
    from ringrl.model import make_policy
    from ringrl.model.parallel import MESH_AXES, Parallel
    from ringrl.planning.workload import ACTION, OBSERVATION

    mesh = jax.make_mesh((1, 1, 1, ring), MESH_AXES, (AxisType.Auto,) * 4)
    policy = make_policy(ModelConfig(), OBSERVATION, ACTION, seed=0, parallel=Parallel(mesh))
    act, _, state = jitted_act(policy)
    memory, step = policy.reset(1, LONG), random_context(1, 1)
    scratch = act.lower(state, step, step, memory).compile().memory_analysis().temp_size_in_bytes
    cache = sum(x.addressable_shards[0].data.nbytes for x in (*memory.keys, *memory.values))
    return {"cache": cache / 2**20, "scratch": scratch / 2**20}


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = make_parser(__doc__)
    parser.add_argument("--task", default="walker_walk")
    parser.add_argument("--episodes", type=positive, default=4)
    parser.add_argument("--environments", type=positive, default=10)
    parser.add_argument("--token-set", default="at5")
    parser.add_argument("--runs", type=positive, default=3)
    options = parser.parse_args(arguments)
    print(f"{options.task}, {options.episodes} episodes, {options.environments} environments, {options.token_set}")
    print(f"{'capacity':>9}{'steps':>8}{'cached ms':>12}{'anew ms':>12}{'ratio':>8}")
    rows, simulation = compare(options), simulation_seconds(options)
    steps = sum(row["steps"] for row in rows)
    total = {kind: sum(row["steps"] * (row[kind] + simulation) for row in rows) for kind in ("cached", "anew")}
    print(
        f"evaluation of {steps:.0f} steps with {steps * simulation:.1f} s of simulation: {total['cached']:.0f} s with "
        f"the cache, {total['anew']:.0f} s without: {total['anew'] / total['cached']:.1f} times faster"
    )
    print(f"\none context of {LONG} tokens\n{'devices':>9}{'cache MiB':>12}{'scratch MiB':>13}")
    memory = {ring: in_process(memory_of, ring, devices=ring) for ring in RINGS}
    for ring, found in memory.items():
        print(f"{ring:>9}{found['cache']:>12.1f}{found['scratch']:>13.1f}")
    save_json({"rows": rows, "simulation": simulation, "total": total, "memory": memory}, options.json)


if __name__ == "__main__":
    main()
