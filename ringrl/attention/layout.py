"""Token layouts of a sequence over the ring: contiguous, striped or zigzag.

A layout is a permutation of the sequence axis. `to_layout` applies it once per batch, not per layer. For 16 tokens on
a ring of 4:

    in order     0  1  2  3  4  5  6  7  8  9 10 11 12 13 14 15

                  device 0  |  device 1  |  device 2  |  device 3
    contiguous   0  1  2  3 |  4  5  6  7|  8  9 10 11| 12 13 14 15    chunk r of n
    striped      0  4  8 12 |  1  5  9 13|  2  6 10 14|  3  7 11 15    tokens r, r + n, r + 2n, ...
    zigzag       0  1 14 15 |  2  3 12 13|  4  5 10 11|  6  7  8  9    chunks r and 2n - 1 - r of 2n

    keys that the queries of a device see under the causal mask
    contiguous       10     |     26     |     42     |     58
    striped          28     |     32     |     36     |     40
    zigzag           34     |     34     |     34     |     34

Zigzag balances causal work because each device pairs an early chunk, whose queries see few keys, with a late chunk,
whose queries see many. Off the diagonal, zigzag tiles are fully visible or fully hidden. Every striped tile is partial.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from ringrl.attention.contract import pad_axis

LAYOUTS = ("contiguous", "striped", "zigzag")


def length_multiple(layout: str, ring_size: int) -> int:
    """Return the number that must divide the length of a sequence."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout: {layout!r} is unknown; use one of {LAYOUTS}")
    if ring_size < 1:
        raise ValueError(f"ring_size: expected at least 1, got {ring_size}")
    return 2 * ring_size if layout == "zigzag" and ring_size > 1 else ring_size


def check_length(name: str, length: int, layout: str, ring_size: int) -> None:
    """Raise ValueError if `length` does not divide into the layout's chunks; the message names the nearest lengths."""
    multiple = length_multiple(layout, ring_size)
    if length % multiple:
        above = -(-length // multiple) * multiple
        nearest = f"{above}" if above == multiple else f"{above - multiple} or {above}"
        raise ValueError(
            f"{name}: a sequence of {length} tokens does not divide into {multiple} chunks (layout {layout!r}, ring of "
            f"{ring_size}); use {nearest} tokens (pad_to_layout pads)"
        )


def shard_positions(
    layout: str, ring_size: int, local_length: int, index: jax.Array | int
) -> Int32[Array, " local_length"]:
    """Return the positions of the tokens on device `index` of the ring; `index` may be traced (lax.axis_index)."""
    check_length("local_length", local_length * ring_size, layout, ring_size)
    token = jnp.arange(local_length, dtype=jnp.int32)
    if layout == "striped":
        return token * ring_size + index
    if layout == "contiguous" or ring_size == 1:
        return token + index * local_length
    chunk = local_length // 2
    start = jnp.where(token < chunk, index, 2 * ring_size - 1 - index) * chunk
    return start.astype(jnp.int32) + token % chunk


def layout_positions(layout: str, length: int, ring_size: int) -> Int32[Array, " length"]:
    """Return the position of each token of a whole sequence in layout order: to_layout(arange(length)).

    Position embeddings of arrays in layout order need these positions. Raise ValueError as `to_layout` does.
    """
    check_length("length", length, layout, ring_size)
    shards = [shard_positions(layout, ring_size, length // ring_size, index) for index in range(ring_size)]
    return jnp.concatenate(shards)


def _permute(x: Array, layout: str, ring_size: int, axis: int, *, back: bool) -> jax.Array:
    x = _checked(x, axis)
    axis %= x.ndim
    length = x.shape[axis]
    check_length("x", length, layout, ring_size)
    if layout == "contiguous" or ring_size == 1:
        return x
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    if layout == "striped":  # a transpose: cheaper than a gather
        split = (ring_size, -1) if back else (-1, ring_size)
        return jnp.swapaxes(x.reshape(*before, *split, *after), axis, axis + 1).reshape(x.shape)
    order = np.stack([np.arange(ring_size), 2 * ring_size - 1 - np.arange(ring_size)], axis=1).reshape(-1)
    chunks = x.reshape(*before, 2 * ring_size, -1, *after)
    return jnp.take(chunks, np.argsort(order) if back else order, axis=axis).reshape(x.shape)


def _checked(x: Array, axis: int) -> jax.Array:
    """Return x as a JAX array. JAX would wrap 64-bit integers silently, so values beyond 32 bits raise ValueError."""
    held = jnp.asarray(x)
    if not -held.ndim <= axis < held.ndim:
        raise ValueError(f"axis: {axis} is not an axis of an array of shape {held.shape}")
    is_narrower = isinstance(x, np.ndarray) and np.issubdtype(x.dtype, np.integer) and held.dtype != x.dtype
    if is_narrower and (x.astype(held.dtype) != x).any():
        raise ValueError(f"x: expected 32-bit integers, got {x.min()} ... {x.max()}")
    return held


def to_layout(x: Array, layout: str, ring_size: int, axis: int = 1) -> Array:
    """Permute a sequence axis of any array into layout order, ready to be sharded over a ring of `ring_size` devices.

    For a ring over several mesh axes, `ring_size` is the product of their sizes. `layout` is
    "contiguous", "striped" or "zigzag". The shape does not change. Raise ValueError for an unknown layout, a length
    that does not divide, or integers beyond 32 bits.
    """
    return _permute(x, layout, ring_size, axis, back=False)


def from_layout(x: Array, layout: str, ring_size: int, axis: int = 1) -> Array:
    """Invert `to_layout`: permute a sequence axis back into the order of the sequence."""
    return _permute(x, layout, ring_size, axis, back=True)


def pad_to_layout(x: Array, layout: str, ring_size: int, axis: int = 1, *, value: int | float = 0) -> Array:
    """Pad the end of a sequence axis to the next length that `to_layout` accepts.

    A causal mask hides the padding from earlier tokens. Without a causal mask, give the padding its own segment id:
    pad_to_layout(segment_ids, ..., value=some_unused_id).

    Raise ValueError for an unknown layout, an axis out of range, or a value that x's integer dtype cannot represent.
    """
    x = _checked(x, axis)
    if jnp.issubdtype(x.dtype, jnp.integer) and not (
        value == int(value) and jnp.iinfo(x.dtype).min <= value <= jnp.iinfo(x.dtype).max
    ):
        raise ValueError(f"value: {value} is not a value of x's dtype {x.dtype}")
    return pad_axis(x, axis, length_multiple(layout, ring_size), value)
