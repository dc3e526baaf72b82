"""Ahead-of-time compilation of the training step for a machine that is not present, and its schedule of transfers."""

import functools
import importlib.util
import math
import os
import re
import time
from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ringrl.context import Context, Outcome
from ringrl.errors import UserError
from ringrl.model import TrainState, make_policy
from ringrl.model.agents.imitation import abstract_state, make_train_step
from ringrl.model.optimiser import make_optimiser
from ringrl.planning.machines import Machine
from ringrl.planning.workload import ACTION, OBSERVATION, Workload
from ringrl.training.mesh import parallel_over
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
    """A training step before compilation: the jitted function with its abstract arguments."""

    function: Any  # jitted: state, batch -> state, metrics
    state: TrainState  # jax.ShapeDtypeStructs with shardings
    batch: Context


class Schedule(NamedTuple):
    """Numbers of transfers in a program. A transfer in a loop counts once. Transfers of integers are ignored."""

    around_ring: int  # transfers in a loop with an attention kernel
    around_ring_hidden: int  # of around_ring, with an attention kernel between start and end
    others: int  # other asynchronous transfers
    others_hidden: int  # of others, with a kernel, a matrix product or a loop between start and end
    waited_for: dict[str, int]  # synchronous transfers by kind

    @property
    def hides_the_ring(self) -> bool:
        """Whether all transfers between neighbours are asynchronous."""
        return "collective-permute" not in self.waited_for

    def __str__(self) -> str:
        waited = ", ".join(f"{number} {kind}" for kind, number in sorted(self.waited_for.items())) or "none"
        return (
            f"{self.around_ring_hidden} of {self.around_ring} ring transfers overlap with an attention kernel, "
            f"{self.others_hidden} of {self.others} other transfers with computation; synchronous: {waited}"
        )


class Compiled(NamedTuple):
    """The result of compiling a step, per device."""

    parameters: float  # bytes, from the shardings
    optimiser: float
    batch: float
    total: float  # peak bytes; if compilation fails, the bytes in the compiler's message or nan
    refusal: str | None  # error of the compiler or the kernel, None if compiled
    schedule: Schedule | None  # None if not compiled, or without asynchronous transfers
    seconds: float  # compilation time


def why_not(machine: Machine) -> str | None:
    """Return the reason why this process cannot compile for a machine, or None."""
    if machine.device.platform == "cpu":
        have = jax.local_device_count() if jax.default_backend() == "cpu" else 0
        flag = f"JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count={machine.devices}"
        return None if have >= machine.devices else f"this process has {have} host devices; start it with {flag}"
    if machine.topology is None:
        return f"there is no ahead-of-time compiler for {machine.name} (GPUs and custom machines use the formula)"
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
        return Compiled(*held, total, text, None, time.perf_counter() - began)
    total = peak_memory(compiled, machine.device.platform) or float("nan")
    schedule = None if is_host else read_schedule(compiled.as_text())
    return Compiled(*held, total, None, schedule, time.perf_counter() - began)


def fits(compiled: Compiled, machine: Machine) -> bool:
    """Whether the step compiled and its peak memory fits."""
    return compiled.refusal is None and compiled.total <= machine.device.memory


_COMPUTATION = re.compile(r"^(?:ENTRY )?%?[\w.\-]+ \([^\n]*\{\n(.*?)^\}", re.MULTILINE | re.DOTALL)
_START = re.compile(r"%?([\w.\-]+) = .* (collective-permute|all-gather|all-reduce|reduce-scatter|all-to-all)-start\(")
_DONE = re.compile(r" (?:collective-permute|all-gather|all-reduce|reduce-scatter|all-to-all)-done\(.*?%?([\w.\-]+)\)")
_WAITED = re.compile(r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)\(")
_INTEGERS = re.compile(r"\s*(?:ROOT )?%?[\w.\-]+ = \(?s32\[")
_KERNEL = re.compile(r'custom_call_target="(?:tpu_custom_call|mosaic_gpu[\w.]*|__gpu\$xla.gpu.triton)"')
_WORK = re.compile(r" (?:while|convolution|dot)\(| fusion\(.*kind=kOutput")


def read_schedule(text: str) -> Schedule:
    """Parse the text of a compiled program with instructions in order of execution."""
    ring, ring_hidden, others, others_hidden = 0, 0, 0, 0
    waited: Counter[str] = Counter()
    for body in _COMPUTATION.findall(text):
        lines = body.splitlines()
        has_kernel = any(_KERNEL.search(line) for line in lines)
        is_ring = has_kernel and not any(" while(" in line for line in lines)
        for behind_kernel, behind_work in _intervals(lines):
            if is_ring:
                ring, ring_hidden = ring + 1, ring_hidden + behind_kernel
            else:
                others, others_hidden = others + 1, others_hidden + (behind_kernel or behind_work)
        waited.update(found[1] for line in lines if (found := _WAITED.search(line)) and not _INTEGERS.match(line))
    return Schedule(ring, ring_hidden, others, others_hidden, dict(waited))


def _intervals(lines: list[str]) -> list[tuple[bool, bool]]:
    """Return for each transfer of a computation whether a kernel and whether other work runs between start and end."""
    open_since: dict[str, int] = {}
    found = []
    for index, line in enumerate(lines):
        if (start := _START.search(line)) and not _INTEGERS.match(line):
            open_since[start[1]] = index
        elif (done := _DONE.search(line)) and done[1] in open_since:
            between = lines[open_since.pop(done[1]) + 1 : index]
            found.append((any(_KERNEL.search(x) for x in between), any(_WORK.search(x) for x in between)))
    return found
