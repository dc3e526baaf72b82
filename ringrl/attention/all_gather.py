"""Plain all-gather of keys and values: simple, and O(S) memory on every device; the peer that a ring is measured by."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from ringrl.attention import kernels
from ringrl.attention.contract import Cotangents, Gradients, Inputs, Partial
from ringrl.attention.mask import Side
from ringrl.attention.options import Options
from ringrl.attention.ring import AxisName


@dataclasses.dataclass(frozen=True)
class AllGather:
    """The plan (attend.py) that brings all keys to every device; runs inside shard_map."""

    axis_name: AxisName

    def forward(self, inputs: Inputs, options: Options) -> Partial:
        """Attention over the gathered keys."""
        return kernels.forward(self._gathered(inputs), options)

    def backward(self, inputs: Inputs, options: Options, cotangents: Cotangents) -> Gradients:
        """Keys are gathered once more rather than kept; their gradients are summed in float32 as they are dealt out."""
        dq, dkv = kernels.backward(self._gathered(inputs), options, cotangents)
        return Gradients(dq, lax.psum_scatter(dkv, self.axis_name, scatter_dimension=2, tiled=True))

    def _gathered(self, inputs: Inputs) -> Inputs:
        def gather(x: jax.Array) -> jax.Array:
            return lax.all_gather(x, self.axis_name, axis=2, tiled=True)

        return inputs._replace(kv=gather(inputs.kv), keys=Side(*gather(jnp.stack(inputs.keys))))
