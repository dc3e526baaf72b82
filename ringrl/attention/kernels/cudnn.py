"""cuDNN's fused attention as a kernel (contract.py): bfloat16 and float16 on NVIDIA GPUs since Ampere.

cuDNN computes a block of queries over a block of keys, full or causal. Positions and segments decide what a block is.
A block with another mask is cut into parts, and the smallest parts with another mask are left to plain XLA. Two hops
of a zigzag ring, whose devices hold an early and a late chunk each (device 1 of 4 has chunks 1 and 6):

    keys of device 0    k0    k7        keys of device 2    k2    k5
                 q1    full  hidden                  q1   hidden hidden
                 q6    full  hidden                  q6    full  full

The backward pass gets the log-sum-exp over the keys of all devices, so that parts of the gradient add up, and an
output that makes cuDNN's own rowsum(o * do) equal to the contract's `delta`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32

from ringrl.attention.contract import Cotangents, Gradients, Inputs, Partial, Tree, merge, nothing_seen, varying_like
from ringrl.attention.kernels import xla
from ringrl.attention.mask import Options, Rule, Side, classify

PARTS = (2, 8)  # of the shorter side of a block, and of a part: halves are the chunks of a zigzag ring
LEAST = 256  # tokens of a part: a smaller one costs more for its start than for its products
ROWS = 2**16  # queries of all heads at once, about four blocks of 128 for each multiprocessor
ANY_DISTANCE = 2**31 - 1


class Cudnn(NamedTuple):
    """Two private primitives of JAX and their constants."""

    forward: Any
    backward: Any
    full: Any
    causal: Any
    layout: int  # (batch, heads, tokens, head_dim)


@functools.cache
def cudnn() -> Cudnn:
    """Return JAX's calls of cuDNN. ImportError or AttributeError if this version of JAX names them differently."""
    from jax._src.cudnn import fused_attention_stablehlo as jax_cudnn

    primitives = jax_cudnn._dot_product_attention_fwd_p, jax_cudnn._dot_product_attention_bwd_p
    masks = jax_cudnn.MaskType.NO_MASK, jax_cudnn.MaskType.CAUSAL
    return Cudnn(*primitives, *masks, jax_cudnn.AttentionLayout.BNTH.value)


def unsupported(dtype: jnp.dtype, head_dim: int, options: Options) -> str | None:
    """Return one sentence about an argument that cuDNN does not support, or None."""
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN supports bfloat16 and float16, not {jnp.dtype(dtype).name}"
    if head_dim % 8 or head_dim > 128:  # Hopper and Blackwell allow 256
        return f"cuDNN supports a head_dim that is a multiple of 8 up to 128, not {head_dim}"
    if options.logits_soft_cap is not None:
        return "cuDNN supports no logits_soft_cap"
    try:
        cudnn()
    except (ImportError, AttributeError) as error:
        return f"jax {jax.__version__} calls cuDNN by other names ({error})"
    return None


class Queries(NamedTuple):
    """A block of queries for some key heads, with their contexts' sides. Only the backward pass has the last three."""

    q: Float[Array, "heads groups tokens head_dim"]
    side: Side  # (heads, 1, tokens)
    cotangents: Any = None  # Cotangents, in the shapes of a block
    o: Float[Array, "heads groups tokens head_dim"] | None = None  # see `_output_for`
    is_exact: Bool[Array, "heads groups tokens"] | None = None


class Keys(NamedTuple):
    """A block of keys."""

    k: Float[Array, "heads 1 tokens head_dim"]
    v: Float[Array, "heads 1 tokens head_dim"]
    side: Side


class Sums(NamedTuple):
    """The result so far, float32: Partial of the queries, or dq of the queries and (dk, dv) of the keys."""

    of_queries: Any
    of_keys: Any = ()


Visit = Callable[[Queries, Keys, Sums], Sums]  # adds a block to the sums


def forward(inputs: Inputs, options: Options, start: Partial | None = None) -> Partial:
    """Return normalised output and log-sum-exp over these keys, continued from `start`; 0 and -inf without keys."""

    def visit(mask: Any, queries: Queries, keys: Keys, sums: Sums) -> Sums:
        o, lse = _call(cudnn().forward, options, mask, queries, keys, is_training=True)
        return Sums(merge(sums.of_queries, Partial(o.astype(jnp.float32), lse)))

    def visit_by_xla(queries: Queries, keys: Keys, sums: Sums) -> Sums:
        found = xla.forward(_as_inputs(queries, keys), options, _by_row(sums.of_queries))
        return Sums(_by_query(found, queries.q.shape[1]))

    def run(inputs: Inputs, start: Partial) -> Partial:
        attend = functools.partial(_attend, options.rule, visit, visit_by_xla)
        sums = _for_heads(attend, *_blocks(inputs), Sums(_by_query(start, inputs.groups)))
        return _by_row(sums.of_queries)

    return _batched(run)(inputs, nothing_seen(inputs.q) if start is None else start)


def backward(
    inputs: Inputs, options: Options, cotangents: Cotangents, dq: Float32[Array, "heads rows head_dim"] | None = None
) -> Gradients:
    """Return the gradients of these keys, and of the queries through these keys, added to `dq` if given."""

    def visit(mask: Any, queries: Queries, keys: Keys, sums: Sums) -> Sums:
        do, lse, _ = queries.cotangents
        dq, dk, dv = _call(cudnn().backward, options, mask, queries, keys, lse, queries.o, do)
        return jax.tree.map(jnp.add, sums, Sums(dq, (dk, dv)))

    def visit_by_xla(queries: Queries, keys: Keys, sums: Sums) -> Sums:
        rows = _by_row((queries.cotangents, sums.of_queries))
        dq, dkv = xla.backward(_as_inputs(queries, keys), options, *rows)
        dk, dv = sums.of_keys
        return Sums(_by_query(dq, queries.q.shape[1]), (dk + dkv[:, :1], dv + dkv[:, 1:]))

    def attend(queries: Queries, keys: Keys, sums: Sums) -> Sums:
        queries = Queries(*queries[:3], *_output_for(queries.cotangents))
        return _attend(options.rule, visit, visit_by_xla, queries, keys, sums)

    def run(inputs: Inputs, cotangents: Cotangents, dq: jax.Array) -> Gradients:
        queries, keys = _blocks(inputs)
        cotangents, dq = _by_query((cotangents, dq), inputs.groups)
        zeros = varying_like(inputs.q, jnp.zeros(keys.k.shape, jnp.float32))
        sums = _for_heads(attend, queries._replace(cotangents=cotangents), keys, Sums(dq, (zeros, zeros)))
        return Gradients(_by_row(sums.of_queries), jnp.concatenate(sums.of_keys, axis=1))

    if dq is None:
        dq = varying_like(inputs.q, jnp.zeros(inputs.q.shape, jnp.float32))
    return _batched(run)(inputs, cotangents, dq)


def _call(primitive: Any, options: Options, mask: Any, queries: Queries, keys: Keys, *more: Any, **static: Any) -> Any:
    """Call cuDNN without bias, lengths, offsets and pages."""
    nothing = [jnp.zeros(0, keys.k.dtype)] * 7
    return primitive.bind(
        queries.q, keys.k, keys.v, *nothing, *more, scale=options.scale, seed=0, dropout_rate=0.0,
        variadic_args=(False, False), mask_type=mask, layout=cudnn().layout, sliding_window_length=None, **static,
    )  # fmt: skip


def _output_for(cotangents: Cotangents) -> tuple[jax.Array, jax.Array]:
    """Return an output with rowsum(o * do) = delta in the dtype of do, and for which rows this is exact enough.

    cuDNN uses the output for this sum alone. The shortest solution is a multiple of do. It is not longer than the true
    output unless the log-sum-exp has a cotangent. In that case float16 may overflow, and rows with do = 0 have none.
    """
    do = cotangents.do.astype(jnp.float32)
    squared = (do * do).sum(-1)
    o = (do * (cotangents.delta / jnp.where(squared == 0, 1.0, squared))[..., None]).astype(cotangents.do.dtype)
    error = jnp.abs((o.astype(jnp.float32) * do).sum(-1) - cotangents.delta)
    # Rounding of bfloat16, and of the smallest float16. delta is subtracted from do * v, which is rounded more.
    return o, error <= 2**-7 * jnp.abs(cotangents.delta) + 2**-16 * jnp.sqrt(squared)


def _for_heads(attend: Visit, queries: Queries, keys: Keys, sums: Sums) -> Sums:
    """Return the sums of all heads. Few heads at a time need little memory, and long contexts still fill a GPU."""
    heads, groups, tokens, _ = queries.q.shape
    loops = max(n for n in range(1, heads + 1) if heads % n == 0 and (n == 1 or heads // n * groups * tokens >= ROWS))

    def some(i: jax.Array, sums: Sums) -> Sums:
        block, before = _part((queries, keys), i, loops, axis=0), _part(sums, i, loops, axis=0)
        return _put(sums, attend(*block, before), i, axis=0)

    return attend(queries, keys, sums) if loops == 1 else lax.fori_loop(0, loops, some, sums)


def _attend(
    rule: Rule,
    visit: Callable[..., Sums],
    visit_by_xla: Visit,
    queries: Queries,
    keys: Keys,
    sums: Sums,
    parts: tuple[int, ...] = PARTS,
) -> Sums:
    """Return the sums after a block."""
    rows, columns = _cuts(queries.q.shape[2], keys.k.shape[2], parts[0]) if parts else (1, 1)

    def visit_parts(queries: Queries, keys: Keys, sums: Sums) -> Sums:
        def one(i: jax.Array, sums: Sums) -> Sums:
            row, column = lax.div(i, jnp.int32(columns)), lax.rem(i, jnp.int32(columns))
            block = _part(queries, row, rows), _part(keys, column, columns)
            before = Sums(_part(sums.of_queries, row, rows), _part(sums.of_keys, column, columns))
            after = _attend(rule, visit, visit_by_xla, *block, before, parts[1:])
            return Sums(_put(sums.of_queries, after.of_queries, row), _put(sums.of_keys, after.of_keys, column))

        return lax.fori_loop(0, rows * columns, one, sums)

    full, causal = (functools.partial(visit, mask) for mask in (cudnn().full, cudnn().causal))
    branches = lambda *block: block[-1], full, causal, visit_by_xla if rows == columns == 1 else visit_parts
    return lax.switch(_kind(rule, queries, keys), branches, queries, keys, sums)


def _cuts(queries: int, keys: int, most: int) -> tuple[int, int]:
    """Return the numbers of equal parts of both sides, at most `most` of the shorter one."""
    for parts in range(most, 0, -1):
        size = min(queries, keys) // parts
        if size >= LEAST and queries % size == keys % size == 0:
            return queries // size, keys // size
    return 1, 1


def _kind(rule: Rule, queries: Queries, keys: Keys) -> Int32[Array, ""]:
    """Return 0 for a hidden block, 1 for a full one, 2 if query i sees the keys up to i, 3 for any other."""
    some, every = classify(rule, queries.side, keys.side)
    at, of_keys = queries.side.positions, keys.side.positions
    kind = jnp.where(every, 1, 3)
    if rule.is_causal and at.shape == of_keys.shape:
        in_step = (of_keys <= at).all() & (at[..., :-1] < of_keys[..., 1:]).all()
        rest = Rule(False, rule.window and (rule.window[0], ANY_DISTANCE))  # window and segments
        kind = jnp.where(in_step & classify(rest, queries.side, keys.side).all_visible, 2, kind)
    if queries.is_exact is not None:
        kind = jnp.where(queries.is_exact.all(), kind, 3)
    return jnp.where(some, kind, 0)


def _part(tree: Tree, index: jax.Array, parts: int, axis: int = 2) -> Tree:
    """Return a part of the tokens (or heads) of the arrays of a block."""

    def cut(x: jax.Array) -> jax.Array:
        size = x.shape[axis] // parts
        return lax.dynamic_slice_in_dim(x, index * size, size, axis)

    return jax.tree.map(cut, tree)


def _put(tree: Tree, part: Tree, index: jax.Array, axis: int = 2) -> Tree:
    """Replace a part."""
    return jax.tree.map(lambda x, y: lax.dynamic_update_slice_in_dim(x, y, index * y.shape[axis], axis), tree, part)


def _by_query(tree: Tree, groups: int) -> Tree:
    """Reshape (heads, groups * tokens, ...) -> (heads, groups, tokens, ...)."""
    return jax.tree.map(lambda x: x.reshape(len(x), groups, -1, *x.shape[2:]), tree)


def _by_row(tree: Tree) -> Tree:
    """Invert `_by_query`."""
    return jax.tree.map(lambda x: x.reshape(len(x), -1, *x.shape[3:]), tree)


def _blocks(inputs: Inputs) -> tuple[Queries, Keys]:
    queries, keys = jax.tree.map(
        lambda x: jnp.repeat(x, inputs.kv_heads, axis=0)[:, None], (inputs.queries, inputs.keys)
    )
    return Queries(_by_query(inputs.q, inputs.groups), queries), Keys(inputs.kv[:, :1], inputs.kv[:, 1:], keys)


def _as_inputs(queries: Queries, keys: Keys) -> Inputs:
    """Invert `_blocks`, with each key head as a context."""
    sides = jax.tree.map(lambda x: x[:, 0], (queries.side, keys.side))
    return Inputs(_by_row(queries.q), jnp.concatenate([keys.k, keys.v], axis=1), *sides)


def _batched(function: Callable[..., Tree]) -> Callable[..., Tree]:
    """Let vmap extend the batch: cuDNN has one axis for it, and all contexts of a batch share the kind of a block."""
    run = jax.custom_batching.custom_vmap(function)

    @run.def_vmap
    def extended(size: int, is_batched: Any, *arguments: Any) -> tuple[Tree, Tree]:
        def join(x: jax.Array, has_axis: bool) -> jax.Array:
            x = x if has_axis else jnp.broadcast_to(x, (size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        found = run(*jax.tree.map(join, tuple(arguments), tuple(is_batched)))
        found = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), found)
        return found, jax.tree.map(lambda _: True, found)

    return run
