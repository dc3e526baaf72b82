"""Which way a sharded sequence meets its keys: decided from the chunk's length, the heads and the links' speed."""

import dataclasses
from typing import NamedTuple

STRATEGIES = ("ring", "ulysses", "ulysses_ring", "all_gather", "auto")


@dataclasses.dataclass(frozen=True)
class Link:
    """What a device of some kind does in a second, dense bfloat16, and what one of its links carries one way."""

    flops: float  # floating point operations per second
    bytes: float  # bytes per second to a neighbour
    all_to_all: float  # the same to all others at once, as a share of `bytes`: 1 behind a switch, less on a torus


# Vendors' data sheets; attention is taken to reach half of the operations.
LINKS = {
    "TPU v4": Link(275e12, 50e9, 0.25),
    "TPU v5p": Link(459e12, 100e9, 0.25),
    "TPU v5": Link(459e12, 100e9, 0.25),  # so libtpu calls a v5p; of most generations there are two names
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
    """A strategy, and the sentence that says why."""

    strategy: str
    reason: str


def link_of(device_kind: str) -> Link | None:
    """The table's entry for a device kind such as "TPU v5p" or "NVIDIA H100 80GB HBM3"; None where there is none."""
    matches = [name for name in LINKS if device_kind.lower().startswith(name.lower())]
    return LINKS[max(matches, key=len)] if matches else None


def hiding_length(link: Link, heads: int, kv_heads: int, itemsize: int, *, is_causal: bool) -> float:
    """Tokens per device from which a hop of the ring hides behind the kernel.

    A hop carries 2 c Hkv D values and serves 4 c^2 H D operations (half of them under a balanced causal mask), so
    c = 2 Hkv itemsize F / (4 H W), twice that when causal, with F attained operations and W bytes per second.
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
    """The strategy that "auto" takes, and why.

    Args:
      local_length: tokens per device.
      ring_size: devices along the sequence.
      heads, kv_heads: on each device, after any sharding of heads.
      device_kind: as jax.devices()[0].device_kind.
      itemsize: bytes of one value of k.
      is_causal: whether half of the work is skipped.
    """
    if ring_size == 1:
        return Choice("ring", "the sequence is on one device: nothing travels")
    link = link_of(device_kind)
    if link is None:
        return Choice("ring", f"no link speed is known for {device_kind!r}: the ring needs the least memory")
    needed = hiding_length(link, heads, kv_heads, itemsize, is_causal=is_causal)
    if local_length >= needed:
        return Choice("ring", f"{local_length} tokens per device hide a hop (from {needed:.0f} on, {device_kind})")
    too_short = f"{local_length} tokens per device do not hide a hop (from {needed:.0f} on, {device_kind})"
    # Bytes that a device receives, each exposed: n - 1 blocks of K and V, or (n-1)/n of q, k, v and o.
    ring_time = (ring_size - 1) * 2 * kv_heads / link.bytes
    repeated = max(kv_heads, ring_size)
    ulysses_time = (ring_size - 1) / ring_size * (2 * heads + 2 * repeated) / (link.bytes * link.all_to_all)
    fits = heads % ring_size == 0 and (kv_heads % ring_size == 0 or ring_size % kv_heads == 0)
    if fits and ulysses_time < ring_time:
        return Choice("ulysses", f"{too_short} and {heads} heads divide among {ring_size} devices")
    return Choice("all_gather", f"{too_short}; gathering all keys at once waits for one latency instead of many")
