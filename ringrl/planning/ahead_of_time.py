"""Ahead-of-time compilation of the training step for a machine that is not present."""

import functools
import importlib.util
import math
import os
import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ringrl.context import Context, Outcome
from ringrl.errors import UserError
from ringrl.model import TrainState, make_policy
from ringrl.model.agents.imitation import abstract_state, make_train_step
from ringrl.model.optimiser import make_optimiser
from ringrl.model.parallel import parallel_over
from ringrl.planning.machines import Machine
from ringrl.planning.workload import ACTION, OBSERVATION, Workload
from ringrl.training.metrics import peak_memory

_EXHAUSTED = re.compile(
    r"\((?P<beyond>[\d.]+)(?P<unit_beyond>[KMG])\) exceeds available|Used (?P<used>[\d.]+)(?P<unit>[KMG]) of"
)
_UNITS = {"K": 2.0**10, "M": 2.0**20, "G": 2.0**30}
# Host code is never run. Without optimisation it compiles in half the time and takes the same memory.
_UNOPTIMISED = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
# Without these variables libtpu searches for a TPU, logs errors, and locks out other processes.
_ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class Step(NamedTuple):
    """A jitted training step (state, batch -> state, metrics) with its abstract arguments."""

    function: Any
    state: TrainState  # jax.ShapeDtypeStructs with shardings
    batch: Context


class Compiled(NamedTuple):
    """The result of compiling a step, per device."""

    parameters: float  # bytes, from the shardings
    optimiser: float
    batch: float
    total: float  # peak bytes; if compilation fails, the bytes in the compiler's message or nan
    refusal: str | None  # error of the compiler or the kernel, None if compiled
    waits_for_hops: bool  # whether the ring's transfers are synchronous
    seconds: float  # compilation time


def why_not(machine: Machine) -> str | None:
    """Return the reason why this process cannot compile for a machine, or None."""
    if machine.device.platform == "cpu":
        have = jax.local_device_count() if jax.default_backend() == "cpu" else 0
        flag = f"JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count={machine.devices}"
        return None if have >= machine.devices else f"this process has {have} host devices; start it with {flag}"
    if machine.topology is None:
        return f"there is no ahead-of-time compiler for {machine.name} (GPUs and machines of a file use the formula)"
    if machine.topology.startswith("v3:"):
        return "the TPU compiler no longer compiles bfloat16 kernels for v3"
    if importlib.util.find_spec("libtpu") is None:
        return f'the TPU compiler is not installed; pip install "jax[tpu]=={jax.__version__}"'
    return None


def devices_of(machine: Machine) -> list[Any]:
    """Return the devices of a TPU topology, or host devices. Raise UserError if none can be compiled for."""
    if reason := why_not(machine):
        raise UserError(f"--machine {machine.name}: cannot compile: {reason}")
    if machine.topology is None:
        return list(jax.devices("cpu")[: machine.devices])
    from jax.experimental import topologies

    # Both cores of a v4 chip are one device, as on Cloud TPU.
    settings = {"chip_config_name": "megacore"} if machine.topology.startswith("v4") else {}
    for name, value in _ALONE.items():
        os.environ.setdefault(name, value)
    topology = topologies.get_topology_desc(platform="tpu", topology_name=machine.topology, **settings)
    return list(topology.devices)


def abstract_step(workload: Workload, devices: list[Any]) -> Step:
    """Return the step of `ringrl train` on a mesh of these devices, without allocating memory."""
    config, parallel = workload.config, parallel_over(workload.config.mesh, devices)
    make = functools.partial(make_policy, config.model, OBSERVATION, ACTION, config.seed, parallel=parallel)
    optimiser = make_optimiser(config.optimiser)
    graph, _ = nnx.split(nnx.eval_shape(make), nnx.Param)
    function = make_train_step(graph, optimiser, config.optimiser.accumulation)
    shape = config.optimiser.batch_size, workload.tokens // workload.tokens_per_step
    sharding = parallel.sharding("batch", "time")

    def array(*features: int, dtype: Any = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct((*shape, *features), dtype, sharding=sharding)

    integers = array(dtype=jnp.int32)
    batch = Context(
        observation=array(OBSERVATION), action=array(ACTION), reward=array(), return_to_go=array(), completion=array(),
        timestep=integers, trajectory=integers, position=integers, start=integers, weight=array(),
        previous=Outcome(array(ACTION), array(), array()),
    )  # fmt: skip
    return Step(function, abstract_state(make, optimiser, parallel), batch)


def bytes_per_device(tree: Any) -> float:
    """Return the bytes per device of arrays with shardings."""
    return float(
        sum(jnp.dtype(x.dtype).itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree))
    )


def compile_step(workload: Workload, machine: Machine, devices: list[Any] | None = None) -> Compiled:
    """Compile a step for a machine. `devices`: by default the result of `devices_of`."""
    step = abstract_step(workload, devices_of(machine) if devices is None else devices)
    state, is_host = step.state, machine.device.platform == "cpu"
    held = bytes_per_device(state.params), bytes_per_device(state.optimiser), bytes_per_device(step.batch)
    began = time.perf_counter()
    try:
        options = _UNOPTIMISED if is_host else None
        compiled = step.function.lower(state, step.batch).compile(compiler_options=options)
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        text = " ".join(str(error).split())
        total = float("nan")  # errors of a kernel have no number
        if found := _EXHAUSTED.search(text):
            total = float(found["used"] or found["beyond"]) * _UNITS[found["unit"] or found["unit_beyond"]]
            total += sum(held) if found["beyond"] else 0.0
        text = text if len(text) <= 240 else f"{text[:237]}..."
        return Compiled(*held, total, text, False, time.perf_counter() - began)
    total = peak_memory(compiled, machine.device.platform) or float("nan")
    waits = not is_host and waits_for_hops(compiled.as_text())
    return Compiled(*held, total, None, waits, time.perf_counter() - began)


def fits(compiled: Compiled, machine: Machine) -> bool:
    """Whether the step compiled and its peak memory fits."""
    return compiled.refusal is None and compiled.total <= machine.device.memory


_INTEGERS = re.compile(r"\s*(?:ROOT )?%?[\w.\-]+ = \(?s32\[")


def waits_for_hops(text: str) -> bool:
    """Return whether a compiled program sends keys or values synchronously. Transfers of integers do not count."""
    return any(" collective-permute(" in line and not _INTEGERS.match(line) for line in text.splitlines())
