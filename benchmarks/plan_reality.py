"""Planned against measured memory and time of a training step, on eight host devices or one GPU.

    python benchmarks/plan_reality.py [--machine cpu-8] [--model small] [--tokens 16384] [--layers 2] [--steps 3]
                                      [--json FILE]
    python benchmarks/plan_reality.py --machine 1xh200 --model 350m --tokens 131072      (on an H200; two minutes)

The rates of host devices are measured before and after every step, as `ringrl plan` does, and the plan of a step is the
mean of both; nothing is fitted to a step. Measured memory is the peak of JAX's allocator on a GPU. On host devices it
is the growth of the process's peak, printed with the compiler's total.
"""

import functools
import resource
import statistics
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import jax
from common import make_parser, one_line_errors, positive, save_json
from random_data import random_context

from ringrl.model import make_agent, make_policy
from ringrl.model.parallel import make_parallel
from ringrl.planning.machines import GIB, Machine, find_machine, measure_host
from ringrl.planning.memory import memory_of
from ringrl.planning.roofline import step_time
from ringrl.planning.workload import ACTION, OBSERVATION, Workload, find_model


def peak_bytes() -> float:
    """Return the peak memory so far: of JAX's allocator on a GPU, of this process on a CPU."""
    stats = jax.devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] if stats else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def run(workload: Workload, machine: Machine, steps: int) -> dict[str, Any]:
    """Run steps on a random batch, and plan before and after each."""
    is_cpu, config = jax.default_backend() == "cpu", workload.config
    if is_cpu:
        measure_host(machine, config.model)  # its memory must not count as growth
    before = peak_bytes() if is_cpu else 0.0
    parallel = make_parallel(config)
    make = functools.partial(make_policy, config.model, OBSERVATION, ACTION, 0, parallel=parallel)
    agent = make_agent(make, config, parallel)
    where = None if parallel.mesh is None else parallel.sharding("batch", "time")
    batch = jax.device_put(random_context(1, workload.tokens // workload.tokens_per_step), where)
    state, seconds = agent.init(), []
    compiled = agent.update.lower(state, batch).compile()  # type: ignore[attr-defined]
    memory = compiled.memory_analysis()

    def plan() -> float:
        return step_time(workload, measure_host(machine, config.model) if is_cpu else machine).total

    compiled_before = peak_bytes() if is_cpu else 0.0
    plans = [plan()]
    for _ in range(steps + 1):
        began = time.perf_counter()
        state, metrics = compiled(state, batch)
        float(metrics["loss"])
        seconds.append(time.perf_counter() - began)
        plans.append(plan())
    planned = [(one + other) / 2 for one, other in pairwise(plans)]
    return {
        "seconds": statistics.median(seconds[1:]),
        "planned_seconds": statistics.median(planned[1:]),
        "planned_of_each": planned[1:],
        "seconds_of_each": seconds[1:],
        "compiled_bytes": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
        "grown_by_bytes": peak_bytes() - before,
        "grown_by_steps_bytes": peak_bytes() - compiled_before,
    }


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Plan, run and compare."""
    parser = make_parser(__doc__)
    parser.add_argument("--machine", default="cpu-8", help="cpu-8 or 1xh200")
    parser.add_argument("--model", default="small")
    parser.add_argument("--tokens", type=positive, default=16_384)
    parser.add_argument("--layers", type=positive, default=2, help="on host devices; a GPU uses the model's layers")
    parser.add_argument("--steps", type=positive, default=3)
    options = parser.parse_args(arguments)
    machine = find_machine(options.machine)
    workload = Workload(find_model(options.model), options.tokens).with_settings("optimiser", batch_size=1)
    workload = workload.with_settings("mesh", seq=machine.devices)
    if machine.device.platform == "cpu":
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", machine.devices)
        workload = workload.with_settings("model", dtype="float32", layers=options.layers)
    workload.check()
    real = run(workload, machine, options.steps)
    formula = memory_of(workload, machine.device.platform).total
    print(f"{options.model}, {workload.tokens} tokens on {machine.name}, {jax.devices()[0].device_kind}")
    print(f"memory per device   formula {formula / GIB:.3f} GiB, compiled {real['compiled_bytes'] / GIB:.3f} GiB")
    everything = real["compiled_bytes"] * machine.devices / GIB
    print(
        f"memory of all       compiled {everything:.3f} GiB, measured {real['grown_by_bytes'] / GIB:.3f} GiB, "
        f"by the steps alone {real['grown_by_steps_bytes'] / GIB:.3f} GiB"
    )
    print(f"seconds per step    planned {real['planned_seconds']:.2f}, measured {real['seconds']:.2f}")
    save_json(real | {"formula_bytes": formula}, options.json)


if __name__ == "__main__":
    main()
