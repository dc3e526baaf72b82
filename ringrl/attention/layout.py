"""Where the tokens of a sequence lie in the ring: contiguous, striped or zigzag.

For a ring of n devices and a causal mask, device r of

- "contiguous" holds the r-th of n equal chunks: the first device sees one chunk, the last one all n;
- "striped" holds tokens r, r + n, r + 2n, ...: balanced to a token, but every tile is a partial one;
- "zigzag" holds chunks r and 2n - 1 - r of 2n: every hop is the same work on every device, and tiles stay whole.

A layout is a permutation of the sequence axis, applied once to a batch and not in every layer.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

LAYOUTS = ("contiguous", "striped", "zigzag")


def _check(layout: str, ring_size: int) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"layout: {layout!r} is unknown; use one of {LAYOUTS}")
    if ring_size < 1:
        raise ValueError(f"ring_size: expected at least 1, got {ring_size}")


def length_multiple(layout: str, ring_size: int) -> int:
    """What a sequence's length must be a multiple of."""
    _check(layout, ring_size)
    return 2 * ring_size if layout == "zigzag" and ring_size > 1 else ring_size


def check_length(name: str, length: int, layout: str, ring_size: int) -> None:
    """ValueError, naming the nearest lengths that do, where `length` does not divide into the layout's chunks."""
    multiple = length_multiple(layout, ring_size)
    if length % multiple:
        above = -(-length // multiple) * multiple
        nearest = f"{above}" if above == multiple else f"{above - multiple} or {above}"
        raise ValueError(
            f"{name}: a sequence of {length} does not divide into {multiple} chunks (layout {layout!r}, ring of "
            f"{ring_size}); the nearest that does has {nearest} (pad_to_layout pads it)"
        )


def shard_positions(
    layout: str, ring_size: int, local_length: int, index: jax.Array | int
) -> Int32[Array, " local_length"]:
    """Positions of the tokens that device `index` of the ring holds; `index` may be traced (lax.axis_index)."""
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
    """Position of each token of a whole sequence in layout order, for the mask, for rotary embeddings and so on.

    Equal to to_layout(arange(length)). With the arrays in layout order and these positions, any function of the
    position (rotary embeddings, learned ones) is right whatever the layout.

    Raises:
      ValueError: an unknown layout, or a length that does not divide.
    """
    check_length("length", length, layout, ring_size)
    shards = [shard_positions(layout, ring_size, length // ring_size, index) for index in range(ring_size)]
    return jnp.concatenate(shards)


def _permute(x: jax.Array, layout: str, ring_size: int, axis: int, *, back: bool) -> jax.Array:
    _check(layout, ring_size)
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis: {axis} is not an axis of an array of shape {x.shape}")
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


def _unchanged(x: Array) -> jax.Array:
    """As JAX holds it, which would wrap integers of more than 32 bits: two ids could become one."""
    held = jnp.asarray(x)
    is_narrower = isinstance(x, np.ndarray) and np.issubdtype(x.dtype, np.integer) and held.dtype != x.dtype
    if is_narrower and (np.asarray(held) != x).any():
        raise ValueError(f"x: expected integers of 32 bits, got {x.min()} ... {x.max()}")
    return held


def to_layout(x: Array, layout: str, ring_size: int, axis: int = 1) -> Array:
    """Put a sequence axis into layout order, so that sharding it over the ring gives every device its tokens.

    Args:
      x: any array; its `axis` is the sequence, in order.
      layout: "contiguous" | "striped" | "zigzag".
      ring_size: devices in the ring.
      axis: the sequence axis.

    Returns:
      An array of the same shape.

    Raises:
      ValueError: an unknown layout, a length that does not divide (the nearest that does is named), or integers that
        32 bits do not hold.
    """
    return _permute(_unchanged(x), layout, ring_size, axis, back=False)


def from_layout(x: Array, layout: str, ring_size: int, axis: int = 1) -> Array:
    """The inverse of `to_layout`: back to the sequence's own order."""
    return _permute(_unchanged(x), layout, ring_size, axis, back=True)


def pad_to_layout(x: Array, layout: str, ring_size: int, axis: int = 1, *, value: int | float = 0) -> Array:
    """Pad the end of a sequence axis to the next length that divides; for `to_layout`, which comes after.

    Under a causal mask the padding is seen by nothing before it. Otherwise give it a segment id of its own:
    pad_to_layout(segment_ids, ..., value=some_id_not_in_use).

    Raises:
      ValueError: an unknown layout, an axis that x has not, or a value that x's integers cannot be.
    """
    x = _unchanged(x)
    if jnp.issubdtype(x.dtype, jnp.integer) and not (
        value == int(value) and jnp.iinfo(x.dtype).min <= value <= jnp.iinfo(x.dtype).max
    ):
        raise ValueError(f"value: {value} is none of {x.dtype}, as x is")
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis: {axis} is not an axis of an array of shape {x.shape}")
    amount = [(0, 0)] * x.ndim
    amount[axis] = (0, -x.shape[axis] % length_multiple(layout, ring_size))
    return jnp.pad(x, amount, constant_values=value)
