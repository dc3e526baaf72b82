"""Attention with its own gradient: the only custom_vjp of the library.

JAX does not differentiate through merges of partial results, sends or kernels. The forward pass keeps the global output
and log-sum-exp, and the backward pass computes every part of the gradient from them.

The exception is the kernel "autodiff", whose operations JAX can differentiate. It also gives the derivatives of both
passes, so that the gradient of any kernel has derivatives of any order.
"""

import dataclasses
from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from ringrl.attention import kernels
from ringrl.attention.contract import (
    NO_TERMS,
    AxisName,
    Cotangents,
    Gradients,
    Inputs,
    Partial,
    Terms,
    by_head,
    by_token,
)
from ringrl.attention.mask import Options, Side


class Exchange(Protocol):
    """How the queries of a device meet the keys of all devices. Hashable, since it is static under jit."""

    def forward(self, inputs: Inputs, options: Options) -> Partial:
        """Return attention of this device's queries to the keys of all devices."""

    def backward(self, inputs: Inputs, options: Options, cotangents: Cotangents) -> Gradients:
        """Return gradients of this device's queries, and of its keys and values over the queries of all devices."""


LOCAL: Exchange = kernels  # no exchange: all keys are on this device


@dataclasses.dataclass(frozen=True)
class AllGather:
    """All-gather of keys and values inside shard_map, with O(S) memory on every device: the baseline of the ring."""

    axis_name: AxisName

    def forward(self, inputs: Inputs, options: Options) -> Partial:
        return kernels.forward(self._gathered(inputs), options)

    def backward(self, inputs: Inputs, options: Options, cotangents: Cotangents) -> Gradients:
        """Return gradients. Keys are gathered again instead of stored; dk and dv are reduce-scattered in float32."""
        dq, dkv = kernels.backward(self._gathered(inputs), options, cotangents)
        return Gradients(dq, lax.psum_scatter(dkv, self.axis_name, scatter_dimension=2, tiled=True))

    def _gathered(self, inputs: Inputs) -> Inputs:
        def gather(x: jax.Array) -> jax.Array:
            return lax.all_gather(x, self.axis_name, axis=2, tiled=True)

        return inputs._replace(kv=gather(inputs.kv), keys=Side(*gather(inputs.keys.stacked())))


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    queries: Side,
    keys: Side,
    options: Options,
    exchange: Exchange,
    terms: Terms = NO_TERMS,
) -> tuple[jax.Array, jax.Array]:
    """Return the output (B, S, H, D) in q's dtype and the log-sum-exp (B, S, H) float32, both differentiable."""
    if options.implementation != "autodiff":
        return _attend(q, k, v, queries, keys, options, exchange)
    slopes = terms.slopes
    if slopes is not None:
        slopes = by_head(jnp.broadcast_to(slopes, q.shape[:3]), k.shape[2])
    inputs = _inputs(q, k, v, queries, keys)._replace(slopes=slopes, soft_cap=terms.soft_cap)
    return _results(q, _attend_autodiff(inputs, options, exchange))


def _inputs(q: jax.Array, k: jax.Array, v: jax.Array, queries: Side, keys: Side) -> Inputs:
    kv_heads = k.shape[2]
    return Inputs(by_head(q, kv_heads), jnp.stack([by_head(x, kv_heads) for x in (k, v)], axis=1), queries, keys)


def _results(q: jax.Array, part: Partial) -> tuple[jax.Array, jax.Array]:
    """Return the results by token. They are named here, so that a remat policy saves the residuals themselves."""
    o, lse = (by_token(x, *q.shape[:2]) for x in part)
    return checkpoint_name(o.astype(q.dtype), "ring_attention"), checkpoint_name(lse, "ring_attention")


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(q, k, v, queries, keys, options, exchange):  # type: ignore[no-untyped-def]
    return _forward(q, k, v, queries, keys, options, exchange)[0]


def _forward(q, k, v, queries, keys, options, exchange):  # type: ignore[no-untyped-def]
    o, lse = _results(q, _forward_pass(_inputs(q, k, v, queries, keys), options, exchange))
    return (o, lse), (q, k, v, queries, keys, o, lse)


def _backward(options, exchange, residuals, cotangents):  # type: ignore[no-untyped-def]
    q, k, v, queries, keys, *results = residuals
    of_results, results = (Partial(*(by_head(x, k.shape[2]) for x in pair)) for pair in (cotangents, results))
    dq, dkv = _backward_pass(_inputs(q, k, v, queries, keys), of_results, results, options, exchange)
    found = ((dq, q), (dkv[:, 0], k), (dkv[:, 1], v))
    none = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), (queries, keys))
    return *(by_token(x, *like.shape[:2]).astype(like.dtype) for x, like in found), *none


_attend.defvjp(_forward, _backward)


@partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _forward_pass(inputs: Inputs, options: Options, exchange: Exchange) -> Partial:
    return exchange.forward(inputs, options)


@partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def _backward_pass(
    inputs: Inputs, cotangents: Partial, results: Partial, options: Options, exchange: Exchange
) -> Gradients:
    (do, dlse), (o, lse) = cotangents, results
    # d lse / d logits = p, so the cotangent of the log-sum-exp is subtracted from delta. Rows without
    # visible keys have p = 0 everywhere; the cotangent of their constant lse = -inf must not become nan.
    dlse = jnp.where(jnp.isneginf(lse), 0.0, dlse)
    delta = (o.astype(jnp.float32) * do.astype(jnp.float32)).sum(-1) - dlse
    return exchange.backward(inputs, options, Cotangents(do, lse, delta))


@_forward_pass.defjvp
def _derivative_of_forward_pass(options, exchange, primals, tangents):  # type: ignore[no-untyped-def]
    (inputs,), (moved,) = primals, tangents

    def plain(q: jax.Array, kv: jax.Array) -> Partial:
        return _attend_autodiff(inputs._replace(q=q, kv=kv), options, exchange)

    tangent = jax.jvp(plain, (inputs.q, inputs.kv), (moved.q, moved.kv))[1]
    return _forward_pass(inputs, options, exchange), tangent


@_backward_pass.defjvp
def _derivative_of_backward_pass(options, exchange, primals, tangents):  # type: ignore[no-untyped-def]
    # The results depend on q and kv alone, so their tangents are included already.
    (inputs, cotangents, _), (moved, moved_cotangents, _) = primals, tangents

    def gradients(q: jax.Array, kv: jax.Array, do: jax.Array, dlse: jax.Array) -> Gradients:
        q, kv, do = (x.astype(jnp.float32) for x in (q, kv, do))
        plain = lambda q, kv: _attend_autodiff(inputs._replace(q=q, kv=kv), options, exchange)  # noqa: E731
        return Gradients(*jax.vjp(plain, q, kv)[1](Partial(do, dlse)))

    at, along = (inputs.q, inputs.kv, *cotangents), (moved.q, moved.kv, *moved_cotangents)
    return _backward_pass(*primals, options, exchange), jax.jvp(gradients, at, along)[1]


def _attend_autodiff(inputs: Inputs, options: Options, exchange: Exchange) -> Partial:
    """Attend by operations that JAX differentiates, in float32 also between devices."""
    q, kv = (x.astype(jnp.float32) for x in (inputs.q, inputs.kv))
    return exchange.forward(inputs._replace(q=q, kv=kv), dataclasses.replace(options, implementation="autodiff"))
