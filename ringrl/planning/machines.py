"""Machines: compute, memory and link rates per device, from data sheets or measured, and the attention kernel."""

import contextlib
import dataclasses
import math
import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pydantic
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from pydantic import Field

from ringrl.attention import attention
from ringrl.attention.kernels import kernel_named, native_to
from ringrl.attention.mask import Options, Rule
from ringrl.attention.strategy import LINKS
from ringrl.config import ModelConfig, Section
from ringrl.config_files import one_line, read_yaml
from ringrl.errors import UserError

GIB = 2.0**30
CGROUPS = Path("/sys/fs/cgroup")
MOST_DEVICES, MOST_HOST_DEVICES = 2**16, 64
GPU_SHARE = 0.95  # of a GPU's memory, the rest for CUDA and NCCL; JAX takes 0.75 unless XLA_PYTHON_CLIENT_MEM_FRACTION


@dataclasses.dataclass(frozen=True)
class Device:
    """One device in JAX's sense: a TPU chip (for v3 one of its two cores), a GPU, or a host device."""

    device_kind: str  # prefix of jax.devices()[0].device_kind
    platform: str  # "tpu" | "gpu" | "cpu"
    flops: float  # dense bfloat16 operations per second
    memory: float  # bytes available to a program
    bandwidth: float  # bytes per second from and to the memory
    link: float  # bytes per second to a neighbour, one way


class Rates(Section):
    """A machine in a file, written by a user or by `ringrl doctor --save`."""

    device_kind: str = "custom"
    """jax.devices()[0].device_kind, such as "TPU v4" or "cpu"."""
    devices: int = Field(8, ge=1, le=MOST_DEVICES)
    """Number of devices."""
    memory: float = Field(gt=0)
    """Memory per device that a program may use, in GiB."""
    tflops: float = Field(gt=0)
    """bfloat16 speed of a device, in 10^12 operations per second."""
    bandwidth: float = Field(gt=0)
    """Memory bandwidth of a device, in 10^9 bytes per second."""
    link: float = Field(gt=0)
    """Bandwidth to a neighbouring device, one way, in 10^9 bytes per second."""
    attention: float | None = Field(None, gt=0)
    """Measured speed of attention, in 10^12 operations per second. The other numbers are then measured, too."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """The devices of one run."""

    name: str
    device: Device
    devices: int
    topology: str | None = None  # name for the TPU compiler; None: no ahead-of-time compiler
    network: float | None = None  # bytes per second and device between hosts, if slower than a link
    per_host: int = 0  # devices connected by fast links; 0: all
    measured: float | None = None  # measured speed of attention as a share of `flops`; None: rates from the data sheet

    def hop(self, ring: int) -> float:
        """Return bytes per second of the slowest hop in rings of `ring` neighbouring devices."""
        return self.collective(ring, stride=self.per_host)

    def collective(self, extent: int, stride: int = 1) -> float:
        """Return bytes per second and device of a collective over every `stride`-th of `extent` neighbouring devices.

        Between hosts the traffic uses the network cards of all participating devices of a host.
        """
        is_in_hosts = not self.devices > self.per_host > 0 or self.per_host % extent == 0
        if is_in_hosts or self.network is None:
            return self.device.link
        return min(self.device.link, self.network * max(1, self.per_host // stride))


def _device(kind: str, gib: float, bandwidth: float) -> Device:
    link, is_gpu = LINKS[kind], kind.startswith("NVIDIA")
    memory = (GPU_SHARE if is_gpu else 1.0) * gib * GIB
    return Device(kind, "gpu" if is_gpu else "tpu", link.flops, memory, bandwidth * 1e9, link.bytes)


# Memory of a TPU is the compiler's limit for a program (v3: by the data sheet), of a GPU what the driver reports.
DEVICES: Mapping[str, Device] = {
    "v3": Device("TPU v3", "tpu", 61.5e12, 16 * GIB, 450e9, 70e9),  # attention kernels do not compile for v3
    "v4": _device("TPU v4", 30.75, 1228),
    "v5e": _device("TPU v5 lite", 15.75, 819),
    "v5p": _device("TPU v5", 95.74, 2765),
    "v6e": _device("TPU v6 lite", 31.25, 1640),
    "a100-40": _device("NVIDIA A100", 40, 1555),
    "a100": _device("NVIDIA A100", 80, 2039),
    "h100": _device("NVIDIA H100", 79.6, 3350),
    "h200": _device("NVIDIA H200", 140.4, 4800),
}
_NETWORK = {"a100-40": 25e9, "a100": 25e9, "h100": 50e9, "h200": 50e9}  # a network card per GPU
_GPUS_PER_HOST = 8
# Slices by the number in their name: cores (two per chip) for v3, v4 and v5p, chips for v5e and v6e.
_CUBES = {8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4", 256: "4x4x8", 512: "4x8x8", 1024: "8x8x8"}
_SQUARES = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_V3 = {8: "2x2", 32: "4x4", 128: "8x8", 256: "8x16", 512: "16x16", 1024: "16x32"}
SLICES: Mapping[str, Mapping[int, str]] = {
    "v3": _V3, "v4": _CUBES, "v5p": _CUBES, "v5e": _SQUARES, "v6e": _SQUARES
}  # fmt: skip


def find_machine(name: str) -> Machine:
    """Return the machine of a YAML file with `Rates`, or of a name. UserError for an unknown machine.

    Names: tpu-v4-512, 8xa100 (80 GB), 8xa100-40 (40 GB), 32xh200, cpu-8 (host devices).
    """
    lower = name.lower()
    if found := re.fullmatch(r"tpu-(v\w+)-(\d+)", lower):
        generation, size = found[1], int(found[2])
        if size in SLICES.get(generation, {}):
            topology = SLICES[generation][size]
            cores = 2 if generation == "v3" else 1
            chips = math.prod(int(side) for side in topology.split("x"))
            return Machine(lower, DEVICES[generation], cores * chips, f"{generation}:{topology}")
    if (found := re.fullmatch(r"(\d+)x([\w-]+)", lower)) and found[2] in _NETWORK and 0 < int(found[1]) <= MOST_DEVICES:
        return Machine(lower, DEVICES[found[2]], int(found[1]), None, _NETWORK[found[2]], _GPUS_PER_HOST)
    if lower.endswith((".yaml", ".yml")):
        try:
            return custom_machine(Rates.model_validate(read_yaml(Path(name))), name)
        except pydantic.ValidationError as error:
            raise UserError(f"{name}: {one_line(error)}") from error
    if (found := re.fullmatch(r"cpu-(\d+)", lower)) and 0 < int(found[1]) <= MOST_HOST_DEVICES:
        return Machine(lower, Device("cpu", "cpu", 200e9, 16 * GIB, 20e9, 10e9), int(found[1]))
    sizes = "; ".join(f"tpu-{generation}-{'|'.join(map(str, slices))}" for generation, slices in SLICES.items())
    raise UserError(
        f"--machine {name}: unknown; choose {sizes}; a number of GPUs x {'|'.join(_NETWORK)}, such as 8xa100; cpu-8 "
        f"(up to {MOST_HOST_DEVICES}); or a file of ringrl doctor --save"
    )


def custom_machine(rates: Rates, name: str) -> Machine:
    """Return the machine of a user's or measured numbers."""
    tera, giga = 1e12, 1e9
    memory, flops = rates.memory * GIB, rates.tflops * tera
    platform = {"TPU": "tpu", "cpu": "cpu"}.get(rates.device_kind[:3], "gpu")
    device = Device(rates.device_kind, platform, flops, memory, rates.bandwidth * giga, rates.link * giga)
    measured = None if rates.attention is None else rates.attention * tera / flops
    return Machine(name, device, rates.devices, measured=measured)


def gib(number: float) -> str:
    """Format bytes in GiB, or in MiB below 0.1 GiB."""
    return f"{number / GIB:.2f} GiB" if number >= 0.1 * GIB else f"{number / 2**20:.2f} MiB"


def kernel_of(model: ModelConfig, device: Device) -> str:
    """Return the kernel name (ringrl/attention/kernels); "xla" for vanilla and unsupported devices, dtypes or heads."""
    if model.attention == "vanilla":
        return "xla"
    native, head_dim = native_to(device), model.width // model.heads
    options = Options(Rule(is_causal=True), head_dim**-0.5)
    reason = kernel_named(native).unsupported(jnp.dtype(model.dtype), head_dim, options)
    return native if reason is None else "xla"


# Sizes of the measurement. No training step is run, so the estimate of a step is not fitted to a step.
ROWS, TOKENS, NUMBERS = 2048, 2048, 2**22
PRODUCTS = 7  # matrix products of attention: two forward, five backward
ROUNDS = 6


def measure_host(machine: Machine, model: ModelConfig) -> Machine:
    """Return a machine of host devices with this host's memory, and its rates measured in about two seconds.

    As in a step, each measurement runs on all host devices at once. A single device would use the cores worse.
    """
    devices, heads = jax.local_devices(backend="cpu"), (model.heads, model.kv_heads, model.width // model.heads)
    sizes = (ROWS, model.width, model.feed_forward * model.width), (TOKENS, *heads), NUMBERS
    matrices, attended, moved = (rate / machine.devices for rate in rates_of(devices, jnp.dtype(model.dtype), *sizes))
    # A hop reads and writes.
    device = Device("cpu", "cpu", matrices, host_memory() / machine.devices, moved, moved / 2)
    return dataclasses.replace(machine, device=device, measured=attended / matrices)


def host_memory() -> float:
    """Return the bytes of this host's memory, or of the limit of its container or job (cgroup 2)."""
    most = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    path = Path("/proc/self/cgroup")
    group = CGROUPS / (path.read_text() if path.exists() else "").rpartition("::/")[2].strip()
    for folder in (group, *group.parents):
        with contextlib.suppress(OSError, ValueError):  # ValueError: "max"
            most = min(most, float(int((folder / "memory.max").read_text())))
    return most


def rates_of(
    devices: list[Any],
    dtype: jnp.dtype,
    product: tuple[int, int, int],
    attended: tuple[int, int, int, int],
    numbers: int,
) -> tuple[float, float, float]:
    """Return operations per second of a matrix product and of attention, and bytes per second, over all devices.

    `product`: rows, width and columns. `attended`: tokens, heads, key heads and head_dim. `numbers`: float32 numbers
    that a device reads and writes.
    """
    (rows, width, columns), (tokens, heads, kv_heads, head_dim) = product, attended
    count = len(devices)

    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(jax.random.key(0), (count, *shape), dtype)

    def gradients(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        return jax.grad(lambda *x: attention(*x, is_causal=True).astype(jnp.float32).sum(), (0, 1, 2))(q, k, v)

    kv = normal(tokens, kv_heads, head_dim)
    one_product = tokens**2 * heads * head_dim  # half of it due to the causal mask
    multiplied = seconds_on(devices, jnp.matmul, normal(rows, width), normal(width, columns))
    return (
        count * 2 * rows * width * columns / multiplied,
        count * PRODUCTS * one_product / seconds_on(devices, gradients, normal(tokens, heads, head_dim), kv, kv),
        count * 8 * numbers / seconds_on(devices, lambda x: x + 1, jnp.zeros((count, numbers))),
    )


def seconds_on(devices: list[Any], function: Callable[..., Any], *arguments: jax.Array) -> float:
    """Return the shortest time of a function on all devices at once, sharded along the arguments' first axis."""
    mesh, axis = Mesh(np.array(devices), ("device",)), PartitionSpec("device")
    arguments = tuple(jax.device_put(x, NamedSharding(mesh, axis)) for x in arguments)
    shared = jax.shard_map(function, mesh=mesh, in_specs=axis, out_specs=axis, check_vma=False)
    compiled = jax.jit(shared).lower(*arguments).compile()
    jax.block_until_ready(compiled(*arguments))
    calls = 1 if devices[0].platform == "cpu" else 10  # an accelerator's first call hides the start of the others
    seconds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for _ in range(calls):
            found = compiled(*arguments)
        jax.block_until_ready(found)
        seconds.append((time.perf_counter() - began) / calls)
    return min(seconds)  # other programs may be busy
