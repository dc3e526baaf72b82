"""A stand-in for cuDNN on CPUs: JAX's own primitives, with cuDNN's arithmetic in place of its kernels."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as fused
from jax._src.interpreters import mlir

FLOAT = jnp.float32
CALLS: list[tuple[str, str, tuple[int, ...], tuple[int, ...]]] = []  # traced calls: pass, mask, shapes of q and k


def _logits(name: str, q, k, v, unused: tuple, static: dict) -> jax.Array:
    """Assert what cuDNN demands of a call, and return the logits (B, Hkv, G, T, S), -inf under the mask."""
    assert q.dtype == k.dtype == v.dtype
    assert q.dtype in (jnp.bfloat16, jnp.float16)
    assert k.shape == v.shape
    assert (q.shape[0], q.shape[3]) == (k.shape[0], k.shape[3])
    assert q.shape[1] % k.shape[1] == q.shape[3] % 8 == 0
    assert q.shape[3] <= 128
    assert len(unused) == 7
    assert all(x.shape == (0,) for x in unused)
    given = {"dropout_rate": 0.0, "variadic_args": (False, False), "sliding_window_length": None}
    assert given.items() <= static.items()
    assert static["layout"] == fused.AttentionLayout.BNTH.value
    mask = static["mask_type"]
    assert mask in (fused.MaskType.NO_MASK, fused.MaskType.CAUSAL)
    CALLS.append((name, mask.name, q.shape, k.shape))
    s = jnp.einsum("bngtd,bnsd->bngts", _grouped(q, k), k.astype(FLOAT)) * static["scale"]
    triangle = jnp.tri(q.shape[2], k.shape[2], dtype=bool)  # query i sees the keys up to i
    return jnp.where(triangle, s, -jnp.inf) if mask == fused.MaskType.CAUSAL else s


def _grouped(x: jax.Array, k: jax.Array) -> jax.Array:
    return x.astype(FLOAT).reshape(k.shape[0], k.shape[1], -1, *x.shape[2:])


def forward(q, k, v, *unused, is_training, **static):  # type: ignore[no-untyped-def]
    """Return the output, and the log-sum-exp (B, N, T)."""
    assert is_training
    s = _logits("forward", q, k, v, unused, static)
    lse = jax.nn.logsumexp(s, axis=-1)
    p = jnp.exp(s - lse[..., None]).astype(q.dtype).astype(FLOAT)
    o = jnp.einsum("bngts,bnsd->bngtd", p, v.astype(FLOAT))
    return [o.reshape(q.shape).astype(q.dtype), lse.reshape(q.shape[:3])]


def backward(q, k, v, *more, **static):  # type: ignore[no-untyped-def]
    """Return dq, dk and dv in q's dtype, from the given log-sum-exp and rowsum(o * do) of the given output."""
    *unused, lse, o, do = more
    assert o.shape == do.shape == q.shape
    assert o.dtype == do.dtype == q.dtype
    assert (lse.shape, lse.dtype) == (q.shape[:3], FLOAT)
    s = _logits("backward", q, k, v, unused, static)
    p = jnp.exp(s - lse.reshape(s.shape[:-1])[..., None])
    do = _grouped(do, k)
    dp = jnp.einsum("bngtd,bnsd->bngts", do, v.astype(FLOAT))
    ds = p * (dp - (_grouped(o, k) * do).sum(-1, keepdims=True)) * static["scale"]
    p, ds = (x.astype(q.dtype).astype(FLOAT) for x in (p, ds))
    dq = jnp.einsum("bngts,bnsd->bngtd", ds, k.astype(FLOAT)).reshape(q.shape)
    dk, dv = (jnp.einsum("bngts,bngtd->bnsd", x, y) for x, y in ((ds, _grouped(q, k)), (p, do)))
    return [x.astype(q.dtype) for x in (dq, dk, dv)]


@contextmanager
def on_cpu() -> Iterator[list]:
    """Let CPUs run JAX's cuDNN primitives. Yields the list of calls, which grows with every traced call."""
    primitives = {fused._dot_product_attention_fwd_p: forward, fused._dot_product_attention_bwd_p: backward}
    for primitive, function in primitives.items():
        mlir.register_lowering(primitive, mlir.lower_fun(function, multiple_results=True), platform="cpu")
    CALLS.clear()
    yield CALLS
    for primitive in primitives:
        del mlir._platform_specific_lowerings["cpu"][primitive]
