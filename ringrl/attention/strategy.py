"""The names of the strategies, the device of a computation, and the speed of its links."""

import dataclasses
from typing import Protocol

import jax

STRATEGIES = ("ring", "ulysses", "ulysses_ring", "all_gather")


class DeviceKind(Protocol):
    """A jax.Device or a jax.sharding.AbstractDevice."""

    @property
    def platform(self) -> str: ...
    @property
    def device_kind(self) -> str: ...


def device_of(x: jax.Array) -> DeviceKind:
    """Return the kind of device that computes with `x`: of the surrounding mesh, of `x`, or the default device."""
    around = jax.sharding.get_abstract_mesh().abstract_device
    if around is not None:
        return around
    if not isinstance(x, jax.core.Tracer) and isinstance(x, jax.Array):
        return next(iter(x.devices()))
    return jax.local_devices()[0]


@dataclasses.dataclass(frozen=True)
class Link:
    """Compute and link rates of a kind of device."""

    flops: float  # dense bfloat16 floating point operations per second
    bytes: float  # bytes per second to a neighbour, one way


# From the vendors' data sheets. Attention is assumed to reach half of the peak.
LINKS = {
    "TPU v4": Link(275e12, 50e9),
    "TPU v5p": Link(459e12, 100e9),
    "TPU v5": Link(459e12, 100e9),  # libtpu's name for a v5p; most generations have two names
    "TPU v5 lite": Link(197e12, 50e9),
    "TPU v5e": Link(197e12, 50e9),
    "TPU v6 lite": Link(918e12, 100e9),
    "TPU v6e": Link(918e12, 100e9),
    "NVIDIA A100": Link(312e12, 300e9),
    "NVIDIA H100": Link(989e12, 450e9),
    "NVIDIA H200": Link(989e12, 450e9),
    "cpu": Link(200e9, 10e9),
}
_ATTAINED = 0.5


def link_of(device_kind: str) -> Link | None:
    """Return the entry for a device kind such as "TPU v5p" or "NVIDIA H100 80GB HBM3", or None."""
    matches = [name for name in LINKS if device_kind.lower().startswith(name.lower())]
    return LINKS[max(matches, key=len)] if matches else None


def hiding_length(link: Link, heads: int, kv_heads: int, itemsize: int, *, is_causal: bool) -> float:
    """Return the tokens per device from which a hop of the ring hides behind the kernel.

    A hop carries 2 c Hkv D values for 4 c^2 H D operations (half of that under a balanced causal mask). Therefore
    c = 2 Hkv itemsize F / (4 H W), or twice that if causal, with F attained operations and W bytes per second.
    """
    work = 2.0 if is_causal else 4.0
    return 2 * kv_heads * itemsize * link.flops * _ATTAINED / (work * heads * link.bytes)
