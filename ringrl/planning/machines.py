"""Machines as data: what a device computes, holds and sends in a second, by the vendors' data sheets."""

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from ringrl.attention.strategy import LINKS
from ringrl.errors import UserError

GIB = 2.0**30
MOST_DEVICES, MOST_HOST_DEVICES = 2**16, 64
GPU_SHARE = 0.95  # of a GPU's memory; JAX takes 0.75 unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise


@dataclasses.dataclass(frozen=True)
class Device:
    """One accelerator as JAX sees it: a TPU chip (of v2 and v3, one of its two cores), a GPU, a host device."""

    kind: str  # as jax.devices()[0].device_kind begins
    platform: str  # "tpu" | "gpu" | "cpu"
    flops: float  # dense bfloat16 operations per second
    memory: float  # bytes that a program may use
    bandwidth: float  # bytes per second from and to that memory
    link: float  # bytes per second to a neighbour, one way


class Attained(NamedTuple):
    """Share of a device's rates that a step reaches."""

    matrices: float
    attention: float
    memory: float
    links: float


@dataclasses.dataclass(frozen=True)
class Machine:
    """Devices that work on one run."""

    name: str
    device: Device
    devices: int
    topology: str | None = None  # what the TPU compiler calls it; None: no compiler here knows it
    network: float | None = None  # bytes per second and device between hosts, where that is less than a link
    per_host: int = 0  # devices behind fast links; 0: all
    measured: Attained | None = None  # where its rates were measured (probe.py); else they are a data sheet's

    def hop(self, ring: int) -> float:
        """Bytes per second over the slowest hop of rings of so many devices, neighbours in the machine's order."""
        return min(self.device.link, self.network) if self._crosses(ring) and self.network else self.device.link

    def collective(self, extent: int, stride: int = 1) -> float:
        """Bytes per second and device of a collective of those that stand `stride` apart among `extent` neighbours.

        Between hosts the network cards of all that take part on a host carry it together.
        """
        if not self._crosses(extent) or self.network is None:
            return self.device.link
        return min(self.device.link, self.network * max(1, self.per_host // stride))

    def _crosses(self, extent: int) -> bool:
        """Whether some group of so many neighbours lies on more than one host."""
        return self.devices > self.per_host > 0 and self.per_host % extent != 0


def _tpu(kind: str, gib: float, bandwidth: float) -> Device:
    link = LINKS[kind]
    return Device(kind, "tpu", link.flops, gib * GIB, bandwidth * 1e9, link.bytes)


def _gpu(kind: str, gib: float, bandwidth: float) -> Device:
    # What the driver reports, less five hundredths for CUDA, NCCL and fragments.
    link = LINKS[kind]
    return Device(kind, "gpu", link.flops, GPU_SHARE * gib * GIB, bandwidth * 1e9, link.bytes)


# A TPU's memory is what its compiler grants a program; of those that it no longer compiles for, the data sheet's.
DEVICES: Mapping[str, Device] = MappingProxyType(
    {
        "v3": Device("TPU v3", "tpu", 61.5e12, 16 * GIB, 450e9, 70e9),  # attention's kernels do not compile for it
        "v4": _tpu("TPU v4", 30.75, 1228),
        "v5e": _tpu("TPU v5 lite", 15.75, 819),
        "v5p": _tpu("TPU v5", 95.74, 2765),
        "v6e": _tpu("TPU v6 lite", 31.25, 1640),
        "a100-40": _gpu("NVIDIA A100", 40, 1555),
        "a100": _gpu("NVIDIA A100", 80, 2039),
        "h100": _gpu("NVIDIA H100", 79.6, 3350),
        "h200": _gpu("NVIDIA H200", 140.4, 4800),
    }
)
_NETWORK = MappingProxyType({"a100-40": 25e9, "a100": 25e9, "h100": 50e9, "h200": 50e9})  # a network card per GPU
_GPUS_PER_HOST = 8
# Slices by the number in their name, which counts cores (two on a chip) for v3, v4 and v5p, chips for v5e and v6e.
_CUBES = {8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4", 256: "4x4x8", 512: "4x8x8", 1024: "8x8x8"}
_SQUARES = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_V3 = {8: "2x2", 32: "4x4", 128: "8x8", 256: "8x16", 512: "16x16", 1024: "16x32"}
SLICES: Mapping[str, Mapping[int, str]] = MappingProxyType(
    {"v3": _V3, "v4": _CUBES, "v5p": _CUBES, "v5e": _SQUARES, "v6e": _SQUARES}
)
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def known_machines() -> list[str]:
    """Names that `find_machine` takes; of GPUs and host devices it takes any number."""
    tpus = [f"tpu-{generation}-{size}" for generation, slices in SLICES.items() for size in slices]
    gpus = [f"{count}x{name}" for name in _NETWORK for count in COUNTS]
    return [*tpus, *gpus, *(f"cpu-{count}" for count in COUNTS if count <= MOST_HOST_DEVICES)]


def find_machine(name: str) -> Machine:
    """The machine of a name such as tpu-v4-512, 8xa100 (80 GB; 8xa100-40 for 40 GB), 32xh200, or cpu-8: host devices.

    UserError names those that come near.
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
    if (found := re.fullmatch(r"cpu-(\d+)", lower)) and 0 < int(found[1]) <= MOST_HOST_DEVICES:
        return Machine(lower, Device("cpu", "cpu", 200e9, 16 * GIB, 20e9, 10e9), int(found[1]))
    near = difflib.get_close_matches(lower, known_machines(), n=3, cutoff=0.5) or ["tpu-v4-512", "8xa100"]
    raise UserError(
        f"--machine {name}: is not known; did you mean {' or '.join(near)}? Any other: --machine custom with its "
        "numbers (--custom.devices, --custom.memory, --custom.tflops, --custom.bandwidth, --custom.link)"
    )


def custom_machine(devices: int, memory_gib: float, tera_flops: float, bandwidth: float, link: float) -> Machine:
    """A machine by its numbers: GiB and 10^12 bfloat16 operations per second of a device, 10^9 bytes per second."""
    numbers = {
        "--custom.devices": devices,
        "--custom.memory": memory_gib,
        "--custom.tflops": tera_flops,
        "--custom.bandwidth": bandwidth,
        "--custom.link": link,
    }
    for flag, value in numbers.items():
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"{flag}: a custom machine needs a number above 0, got {value:g}")
    if devices > MOST_DEVICES:
        raise UserError(f"--custom.devices {devices}: more than {MOST_DEVICES} are not planned")
    device = Device("custom", "gpu", tera_flops * 1e12, memory_gib * GIB, bandwidth * 1e9, link * 1e9)
    return Machine("custom", device, devices)


def gib(number: float) -> str:
    """Bytes as GiB; a little as MiB."""
    return f"{number / GIB:.2f} GiB" if number >= 0.1 * GIB else f"{number / 2**20:.2f} MiB"
