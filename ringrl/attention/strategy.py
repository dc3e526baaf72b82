"""The device of a computation, the order of a ring, link speeds, and choosing ring, Ulysses or all-gather."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax

STRATEGIES = ("ring", "ulysses", "ulysses_ring", "all_gather", "auto")


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
    default = jax.config.jax_default_device  # type: ignore[attr-defined]  # a platform's name, a device or None
    return default if isinstance(default, jax.Device) else jax.local_devices(backend=default)[0]


def ring_order(devices: Sequence[Any], ring_size: int | None = None) -> list[Any]:
    """Return the devices in an order in which each group of `ring_size` (default: all) is a ring of neighbours.

    On a grid of TPU chips (v5e, v6e), a ring is a closed walk through a rectangle of chips. On v5e slices of 32 chips
    and more, XLA overlaps a transfer with a kernel only if each chip sends to a neighbour. Other devices, and rings
    without such a walk (odd, or one row), keep their order.
    """
    ring_size = ring_size or len(devices)
    chips = {tuple(device.coords[:2]): device for device in devices if hasattr(device, "coords")}
    columns, rows = (sorted({at[axis] for at in chips}) for axis in (0, 1))
    if len(chips) != len(devices) or len(chips) != len(columns) * len(rows):  # several cores or layers, or holes
        return list(devices)
    divisors = [a for a in range(2, ring_size // 2 + 1) if ring_size % a == 0]
    sides = [a for a in divisors if len(columns) % a == 0 and len(rows) % (ring_size // a) == 0]
    if ring_size % 2 or not sides:
        return list(devices)
    a = min(sides, key=lambda side: abs(side - ring_size // side))
    b = ring_size // a
    corners = [(i, j) for i in range(0, len(columns), a) for j in range(0, len(rows), b)]
    return [chips[columns[i + di], rows[j + dj]] for i, j in corners for di, dj in _closed_walk(a, b)]


def _closed_walk(a: int, b: int) -> list[tuple[int, int]]:
    """Return a closed walk through the neighbours of an a x b grid: up and down the columns, back along one row.

    a = 4, b = 3:   (0,2)-(1,2) (2,2)-(3,2)
                      |     |     |     |
                    (0,1) (1,1)-(2,1) (3,1)
                      |                 |
                    (0,0)-(1,0)-(2,0)-(3,0)
    """
    if a % 2:
        return [(i, j) for j, i in _closed_walk(b, a)]
    up = list(range(1, b))
    columns = [(i, j) for i in range(a) for j in (up if i % 2 == 0 else reversed(up))]
    return [(0, 0), *columns, *((i, 0) for i in range(a - 1, 0, -1))]


class Link(NamedTuple):
    """Compute and link rates of a kind of device."""

    flops: float  # dense bfloat16 floating point operations per second
    bytes: float  # bytes per second to a neighbour, one way
    all_to_all: float  # rate of an all-to-all as a share of `bytes`: 1 behind a switch, less on a torus


# From the vendors' data sheets. Attention is assumed to reach half of the peak.
LINKS = {
    "TPU v4": Link(275e12, 50e9, 0.25),
    "TPU v5p": Link(459e12, 100e9, 0.25),
    "TPU v5": Link(459e12, 100e9, 0.25),  # libtpu's name for a v5p; most generations have two names
    "TPU v5 lite": Link(197e12, 50e9, 0.25),
    "TPU v5e": Link(197e12, 50e9, 0.25),
    "TPU v6 lite": Link(918e12, 100e9, 0.25),
    "TPU v6e": Link(918e12, 100e9, 0.25),
    "NVIDIA A100": Link(312e12, 300e9, 1.0),
    "NVIDIA H100": Link(989e12, 450e9, 1.0),
    "NVIDIA H200": Link(989e12, 450e9, 1.0),
    "cpu": Link(200e9, 10e9, 1.0),
}
_ATTAINED = 0.5


class Choice(NamedTuple):
    """A strategy and its reason in one sentence."""

    strategy: str
    reason: str


def link_of(device_kind: str) -> Link | None:
    """Return the entry for a device kind such as "TPU v5p" or "NVIDIA H100 80GB HBM3", or None."""
    matches = [name for name in LINKS if device_kind.lower().startswith(name.lower())]
    return LINKS[max(matches, key=len)] if matches else None


def hiding_length(link: Link, heads: int, kv_heads: int, itemsize: int, *, is_causal: bool) -> float:
    """Return the smallest number of tokens per device for which the kernel hides a hop of the ring.

    A hop carries 2 c Hkv D values for 4 c^2 H D operations (half of that under a balanced causal mask). Therefore
    c = 2 Hkv itemsize F / (4 H W), or twice that if causal, with F attained operations and W bytes per second.
    """
    work = 2.0 if is_causal else 4.0
    return 2 * kv_heads * itemsize * link.flops * _ATTAINED / (work * heads * link.bytes)


def choose_strategy(
    local_length: int,
    ring_size: int,
    heads: int,
    kv_heads: int,
    *,
    device_kind: str,
    itemsize: int = 2,
    is_causal: bool = True,
) -> Choice:
    """Return the strategy of "auto" with its reason, for `local_length` tokens on each of `ring_size` devices.

    `heads` and `kv_heads` count the heads on each device. `device_kind` is that of jax.devices()[0], and `itemsize` is
    the number of bytes per value of k.
    """
    if ring_size == 1:
        return Choice("ring", "the sequence is on one device")
    link = link_of(device_kind)
    if link is None:
        return Choice("ring", f"no link speed is listed for {device_kind!r}, and the ring needs the least memory")
    needed = hiding_length(link, heads, kv_heads, itemsize, is_causal=is_causal)
    if local_length >= needed:
        return Choice("ring", f"{local_length} tokens per device hide a hop ({device_kind}: {needed:.0f} or more)")
    too_short = f"{local_length} tokens per device do not hide a hop ({device_kind}: {needed:.0f} or more)"
    # Exposed time to receive n - 1 blocks of K and V, or (n-1)/n of q, k, v and o.
    ring_time = (ring_size - 1) * 2 * kv_heads / link.bytes
    repeated = max(kv_heads, ring_size)
    ulysses_time = (ring_size - 1) / ring_size * (2 * heads + 2 * repeated) / (link.bytes * link.all_to_all)
    fits = heads % ring_size == 0 and (kv_heads % ring_size == 0 or ring_size % kv_heads == 0)
    if fits and ulysses_time < ring_time:
        return Choice("ulysses", f"{too_short} and {heads} heads divide over {ring_size} devices")
    waits = "once, too" if ring_size == 2 else f"{ring_size - 1} times"
    return Choice("all_gather", f"{too_short}; an all-gather waits once, a ring {waits}")
