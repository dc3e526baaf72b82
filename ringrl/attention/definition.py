"""The definition of attention and of its gradients, in NumPy and float64, with O(S^2) memory: for checks."""

from collections.abc import Mapping, Sequence
from functools import partial

import jax.numpy as jnp
import numpy as np

from ringrl.attention.mask import Rule, Side, visible

einsum = partial(np.einsum, optimize=True)  # with matrix products: four times as fast


def definition(
    arrays: Mapping[str, np.ndarray],
    queries: Sequence[np.ndarray],
    keys: Sequence[np.ndarray],
    rule: Rule,
    *,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
) -> dict[str, np.ndarray]:
    """Return o, lse, dq, dk and dv in float64. Only the mask is shared with the kernels.

    `arrays` holds q, k, v and the cotangents do, dlse. `queries` and `keys` are (positions, segment_ids), and for
    queries the global prefix, if any; (B, S). The other shapes and arguments are those of `attention`.
    """
    q, k, v, do, dlse = (np.asarray(arrays[name], np.float64) for name in ("q", "k", "v", "do", "dlse"))
    groups, scale = q.shape[2] // k.shape[2], q.shape[-1] ** -0.5 if scale is None else scale
    of_heads = [np.repeat(x, groups, axis=2) for x in (k, v)]
    products = einsum("bqhd,bkhd->bhqk", q, of_heads[0]) * scale
    s, slope = products, scale
    if logits_soft_cap is not None:
        t = np.tanh(products / logits_soft_cap)
        s, slope = logits_soft_cap * t, scale * (1 - t**2)
    sides = (Side(*(jnp.asarray(x, jnp.int32) for x in side)) for side in (queries, keys))
    s = np.where(np.asarray(visible(rule, *sides))[:, None], s, -np.inf)
    maximum = np.nan_to_num(s.max(-1, keepdims=True), neginf=0)
    weights = np.exp(s - maximum)
    total = weights.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = np.swapaxes((maximum + np.log(total))[..., 0], 1, 2)  # -inf for queries that see nothing
    p = weights / np.where(total == 0, 1, total)
    dp = einsum("bqhd,bkhd->bhqk", do, of_heads[1])
    ds = p * (dp - (p * dp).sum(-1, keepdims=True) + np.swapaxes(dlse, 1, 2)[..., None]) * slope
    dk, dv = einsum("bhqk,bqhd->bkhd", ds, q), einsum("bhqk,bqhd->bkhd", p, do)
    dk, dv = (x.reshape(*k.shape[:3], groups, -1).sum(3) for x in (dk, dv))
    o, dq = (einsum("bhqk,bkhd->bqhd", x, y) for x, y in ((p, of_heads[1]), (ds, of_heads[0])))
    return {"o": o, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
