"""All-gather of keys and values, with O(S) memory on every device: the baseline of the ring."""

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
    """The plan (attend.py) that gathers all keys on every device; runs inside shard_map."""

    axis_name: AxisName

    def forward(self, inputs: Inputs, options: Options) -> Partial:
        """Return attention over the gathered keys."""
        return kernels.forward(self._gathered(inputs), options)

    def backward(self, inputs: Inputs, options: Options, cotangents: Cotangents) -> Gradients:
        """Return gradients. Keys are gathered again instead of stored; dk and dv are reduce-scattered in float32."""
        dq, dkv = kernels.backward(self._gathered(inputs), options, cotangents)
        return Gradients(dq, lax.psum_scatter(dkv, self.axis_name, scatter_dimension=2, tiled=True))

    def _gathered(self, inputs: Inputs) -> Inputs:
        def gather(x: jax.Array) -> jax.Array:
            return lax.all_gather(x, self.axis_name, axis=2, tiled=True)

        return inputs._replace(kv=gather(inputs.kv), keys=Side(*gather(jnp.stack(inputs.keys))))
