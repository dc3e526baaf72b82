"""Plain all-gather of keys and values: simple, and O(S) memory on every device; the peer that a ring is measured by."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from ringrl.attention.kernels import xla
from ringrl.attention.mask import Side
from ringrl.attention.merge import Partial
from ringrl.attention.options import Options
from ringrl.attention.ring import AxisName


@dataclasses.dataclass(frozen=True)
class AllGather:
    """The plan (attend.py) that brings all keys to every device; runs inside shard_map."""

    axis_name: AxisName

    def forward(self, q: jax.Array, k: jax.Array, v: jax.Array, queries: Side, keys: Side, options: Options) -> Partial:
        """Attention over the gathered keys."""
        k, v = self._gather(jnp.stack([k, v]), 3)
        return xla.forward(q, k, v, queries, self._gather_side(keys), options)

    def backward(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        queries: Side,
        keys: Side,
        options: Options,
        lse: jax.Array,
        delta: jax.Array,
        do: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Keys are gathered once more rather than kept; their gradients are summed in float32 as they are dealt out."""
        k, v = self._gather(jnp.stack([k, v]), 3)
        dq, *dkv = xla.backward(q, k, v, queries, self._gather_side(keys), options, lse, delta, do)
        dk, dv = lax.psum_scatter(jnp.stack(dkv), self.axis_name, scatter_dimension=3, tiled=True)
        return dq, dk, dv

    def _gather(self, x: jax.Array, axis: int) -> jax.Array:
        return lax.all_gather(x, self.axis_name, axis=axis, tiled=True)

    def _gather_side(self, side: Side) -> Side:
        return Side(*self._gather(jnp.stack(side), 2))
