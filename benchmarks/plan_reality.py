"""Does a plan come true? Memory and time of a step as planned, and as measured, on eight host devices or one GPU.

    python benchmarks/plan_reality.py [--machine cpu-8] [--model small] [--tokens 16384] [--layers 2] [--steps 3]
                                      [--json FILE]
    python benchmarks/plan_reality.py --machine 1xh200 --model 350m --tokens 131072      (on an H200; two minutes)

What host devices do in a second is measured before and after every step, as `ringrl plan` does
(ringrl/planning/probe.py), since others may use the machine meanwhile; the plan of a step is the mean of the two.
Nothing of it is fitted to a step. Measured memory: of a GPU, the most that JAX's allocator held; of host devices, by
how much the process's peak grew, and the compiler's figure for all eight beside it.
"""

import argparse
import functools
import json
import resource
import statistics
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
from command_line import positive, told_in_one_line

from ringrl.model import make_agent, make_policy
from ringrl.planning.closed_form import memory_of
from ringrl.planning.machines import GIB, Machine, find_machine
from ringrl.planning.probe import measured
from ringrl.planning.roofline import estimate
from ringrl.planning.workload import ACTION, OBSERVATION, Workload, find_model
from ringrl.training.mesh import make_parallel


def peak_bytes() -> float:
    """Most memory held so far: by JAX on a GPU, by this process on a CPU."""
    stats = jax.devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] if stats else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def run(workload: Workload, machine: Machine, steps: int) -> dict[str, Any]:
    """Real steps on a batch of random numbers, and the plan before each of them."""
    from random_data import random_context

    is_cpu, config = jax.default_backend() == "cpu", workload.config
    if is_cpu:
        measured(machine, config.model)  # its memory counts as there before
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
        return estimate(workload, measured(machine, config.model) if is_cpu else machine).total

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


@told_in_one_line
def main(arguments: Sequence[str] | None = None) -> None:
    """Plan, run, compare and, if asked, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", default="cpu-8", help="cpu-8 or 1xh200")
    parser.add_argument("--model", default="small")
    parser.add_argument("--tokens", type=positive, default=16_384)
    parser.add_argument("--layers", type=positive, default=2, help="of host devices; a GPU has the model's own")
    parser.add_argument("--steps", type=positive, default=3)
    parser.add_argument("--json", type=Path)
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
        f"of it by the steps {real['grown_by_steps_bytes'] / GIB:.3f} GiB"
    )
    print(f"seconds of a step   planned {real['planned_seconds']:.2f}, measured {real['seconds']:.2f}")
    if options.json:
        options.json.write_text(json.dumps(real | {"formula_bytes": formula}, indent=1))


if __name__ == "__main__":
    main()
