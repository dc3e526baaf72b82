"""What the forward and backward kernels for Hopper share: limits, lists of visits, and the work of one warpgroup.

Each kernel runs one program per multiprocessor with three warpgroups: two consumers, which compute, and a producer,
which only issues copies. A program takes cells of work in turn. A cell is one head and `CONSUMERS` neighbouring tiles
of the side it owns (one for each consumer); it visits those tiles of the other side that the mask rule lets it see.
Which those are is decided before the kernel runs, from the extremes of positions and segments: the kernel reads a list.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int32

from ringrl.attention.contract import Inputs
from ringrl.attention.kernels.tuning.mosaic_gpu import forward_blocks, key_gradient_blocks, query_gradient_blocks
from ringrl.attention.mask import Rule, Side, classify, may_see, pad_side
from ringrl.attention.options import Options

LOG2_E = math.log2(math.e)
CONSUMERS = 2
PROGRAMS = 132  # multiprocessors of an H100 or H200; any other number is as right and only less even
Ref = Any  # Pallas gives its references no public type


def unsupported(dtype: jnp.dtype, head_dim: int, options: Options) -> str | None:
    """What of this the kernels do not take, in one sentence; None if they take it all."""
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"the Hopper kernel takes bfloat16 and float16, not {jnp.dtype(dtype).name}"
    if head_dim not in (64, 128):
        return f"the Hopper kernel takes a head_dim of 64 or 128, not {head_dim}"
    if not (options.scale > 0 and math.isfinite(options.scale)):
        return f"the Hopper kernel takes a positive scale, not {options.scale}"
    for name, block in (("block_q", options.block_q), ("block_k", options.block_k)):
        if block is not None and block % 64:
            return f"the Hopper kernel takes a {name} that is a multiple of 64, not {block}"
    for blocks_of in (forward_blocks, query_gradient_blocks, key_gradient_blocks):
        blocks = blocks_of(head_dim, options)
        if blocks.stages < 2:
            return f"the Hopper kernel's shared memory has no room for tiles of {blocks.own} by {blocks.visited}"
    return None


def require_supported(inputs: Inputs, options: Options) -> None:
    """Refuse by name, with ValueError, what would otherwise fail late or be wrong."""
    reason = unsupported(inputs.q.dtype, inputs.q.shape[-1], options)
    if reason is not None:
        raise ValueError(reason)


def by_query_head(x: jax.Array, inputs: Inputs) -> jax.Array:
    """(N, groups * S, ...) -> (N * groups, S, ...): what belongs to the rows of `inputs`, a row of heads for each."""
    return x.reshape(-1, inputs.queries.positions.shape[1], *x.shape[2:])


class Visits(NamedTuple):
    """Which tiles of the other side each cell visits."""

    order: Int32[Array, "batch cells tiles"]  # full tiles first, then partial ones, then those never visited
    counts: Int32[Array, "batch cells 2"]  # how many are full, and how many are visited in all
    work: Int32[Array, " batch*cells"]  # batch * cells + cell, longest first, so that programs finish together


def tile_side(side: Side, size: int, padding: int) -> Side:
    """(B, S) -> (B, tiles, size), padded with tokens that see and are seen by nothing."""
    length = side.positions.shape[1]
    padded = pad_side(side, length + -length % size, padding)
    return Side(*(x.reshape(x.shape[0], -1, size) for x in padded))


def tile_array(x: jax.Array, size: int, multiple: int = 1) -> jax.Array:
    """(heads, S, ...) -> (heads, tiles, size, ...), with zeros up to a multiple of whole tiles."""
    amount = [(0, 0)] * x.ndim
    amount[1] = (0, -x.shape[1] % (size * multiple))
    return jnp.pad(x, amount).reshape(x.shape[0], -1, size, *x.shape[2:])


def untile(x: jax.Array, length: int, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of tile_array for so many tokens, in the shape asked for."""
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length].reshape(shape)


def visits(rule: Rule, queries: Side, keys: Side, *, own_queries: bool) -> Visits:
    """From the extremes of positions and segments alone, for sides (B, cells or tiles, tokens)."""
    queries, keys = (Side(*(x[:, :, None] for x in side)) for side in (queries, keys))
    of_query = jax.vmap(partial(classify, rule), in_axes=(None, 0))
    kinds = jax.vmap(jax.vmap(of_query, in_axes=(0, None)))(queries, keys)
    some, every = kinds if own_queries else (jnp.swapaxes(x, 1, 2) for x in kinds)
    tiles = some.shape[2]
    rank = jnp.where(every, 0, jnp.where(some, 1, 2))
    order = jnp.sort(rank * tiles + jnp.arange(tiles), axis=2) % tiles
    counts = jnp.stack([every.sum(2), some.sum(2)], axis=2)
    work = jnp.argsort(-counts[..., 1].ravel(), stable=True)
    return Visits(*(x.astype(jnp.int32) for x in (order, counts, work)))


class Cell(NamedTuple):
    """One piece of work, as a running program sees it."""

    batch: jax.Array
    number: jax.Array  # of the cell in its sequence
    head: jax.Array  # of the owned side, counted over the batch
    full: jax.Array  # visits that need no mask
    total: jax.Array


@dataclasses.dataclass(frozen=True)
class Work:
    """How programs share the work: `heads` of the owned side in a context; each tile is visited `groups` times."""

    heads: int
    groups: int = 1

    def for_each_cell(self, visits: Visits, body: Callable[[Cell, Any], Any], carry: Any) -> Any:
        """carry = body(cell, carry) over the cells of this program."""
        program, programs = lax.axis_index("program"), lax.axis_size("program")
        cells = visits.order.shape[1]

        def step(i: jax.Array, carry: Any) -> Any:
            rank = i * programs + program
            flat = visits.work[lax.div(rank, jnp.int32(self.heads))]
            batch, number = lax.div(flat, jnp.int32(cells)), lax.rem(flat, jnp.int32(cells))
            head = batch * self.heads + lax.rem(rank, jnp.int32(self.heads))
            full, total = (visits.counts[batch, number, i] * self.groups for i in (0, 1))
            return body(Cell(batch, number, head, full, total), carry)

        count = visits.work.shape[0] * self.heads
        return lax.fori_loop(0, lax.div(count - 1 - program, jnp.int32(programs)) + 1, step, carry)

    def visited(self, visits: Visits, cell: Cell, i: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The tile and the group of visit i."""
        groups = jnp.int32(self.groups)
        return visits.order[cell.batch, cell.number, lax.div(i, groups)], lax.rem(i, groups)

    def launch(self, body: Callable, operands: Any, visits: Visits, outputs: Any, scratch: Any, interpret: Any) -> Any:
        """body(operands, visits, outputs, scratch), all of references, as one kernel."""
        inputs, tree = jax.tree.flatten((operands, visits))

        def kernel(*refs: Ref) -> None:
            body(*jax.tree.unflatten(tree, refs[: len(inputs)]), refs[len(inputs) : -1], refs[-1])

        programs = min(PROGRAMS if interpret is None else 1, visits.work.size * self.heads)
        run = plgpu.kernel(
            kernel,
            out_type=outputs,
            scratch_types=[scratch],
            grid=(programs,),
            grid_names=("program",),
            num_threads=CONSUMERS + 1,
            thread_name="warpgroup",
            compiler_params=plgpu.CompilerParams(approx_math=True),
            interpret=interpret,
        )
        return run(*inputs)


class Buffer(NamedTuple):
    """Slots in shared memory, each with a barrier for "filled" and one for "may be filled again"."""

    arrays: tuple[Ref, ...]
    ready: Ref
    free: Ref

    @classmethod
    def of(cls, slots: int, readers: int, *arrays: jax.ShapeDtypeStruct) -> "Buffer":
        """The scratch types of one whose slots hold such arrays and are read by so many warpgroups."""
        swizzled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
        return cls(
            tuple(
                plgpu.SMEM((slots, *x.shape), x.dtype, transforms=swizzled if len(x.shape) > 1 else ()) for x in arrays
            ),
            plgpu.Barrier(num_arrivals=len(arrays), num_barriers=slots),
            plgpu.Barrier(num_arrivals=readers, num_barriers=slots),
        )

    def slot(self, number: jax.Array) -> jax.Array:
        """The slot of the so-manieth filling."""
        return lax.rem(number, jnp.int32(self.arrays[0].shape[0]))

    def fill(self, number: jax.Array, *sources: Ref) -> None:
        """Wait until the slot is free, then start the copies."""
        slot = self.slot(number)

        @pl.when(number >= self.arrays[0].shape[0])
        def _wait() -> None:
            plgpu.barrier_wait(self.free.at[slot])

        for source, array in zip(sources, self.arrays, strict=True):
            plgpu.copy_gmem_to_smem(source, array.at[slot], self.ready.at[slot])

    def drain(self, number: jax.Array) -> None:
        """Wait until all slots are free, after so many fillings: no program ends with copies or signals under way."""
        for slot in range(self.arrays[0].shape[0]):

            @pl.when(slot < number)
            def _wait(slot: int = slot) -> None:
                plgpu.barrier_wait(self.free.at[slot])


class Feed(NamedTuple):
    """A buffer and what it is filled from, given the head and the tile (and, if it is visited, the group)."""

    buffer: Buffer
    sources: Callable[..., tuple[Ref, ...]]


def produce(work: Work, visits: Visits, owned: Feed, *visited: Feed) -> None:
    """The producer warpgroup: copies owned tiles once per cell, visited ones once per visit."""

    def cell(cell: Cell, fills: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        owned_fills, visited_fills = fills
        for i in range(CONSUMERS):
            owned.buffer.fill(owned_fills + i, *owned.sources(cell.head, CONSUMERS * cell.number + i))

        def visit(i: jax.Array, fills: jax.Array) -> jax.Array:
            tile, group = work.visited(visits, cell, i)
            for feed in visited:
                feed.buffer.fill(fills, *feed.sources(cell.head, tile, group))
            return fills + 1

        return owned_fills + CONSUMERS, lax.fori_loop(0, cell.total, visit, visited_fills)

    owned_fills, visited_fills = work.for_each_cell(visits, cell, (jnp.int32(0), jnp.int32(0)))
    owned.buffer.drain(owned_fills)
    for feed in visited:
        feed.buffer.drain(visited_fills)


def by_warpgroup(produce: Callable[[], None], consume: Callable[[], None]) -> None:
    """The two roles; the producer gives up registers that the consumers take."""
    me = lax.axis_index("warpgroup")

    @pl.when(me < CONSUMERS)
    def _consume() -> None:
        plgpu.set_max_registers(240, action="increase")
        consume()

    @pl.when(me == CONSUMERS)
    def _produce() -> None:
        plgpu.set_max_registers(24, action="decrease")
        produce()


@dataclasses.dataclass(frozen=True)
class Warpgroup:
    """Loads and products of one warpgroup: in the registers' layouts and on tensor cores, or, in interpret mode, in
    plain arithmetic (it knows neither layouts nor operands and running accumulators in registers, as of jax 0.10).
    """

    is_interpreted: bool

    def full(self, shape: tuple[int, ...], value: float, layout: Any) -> jax.Array:
        """A constant float32 array."""
        x = jnp.full(shape, value, jnp.float32)
        return x if self.is_interpreted else plgpu.layout_cast(x, layout)

    def load(self, ref: Ref, layout: Any) -> jax.Array:
        """From device or shared memory into registers."""
        if self.is_interpreted:
            return _read(ref)
        whole = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()  # before jax 0.12
        return plgpu.load(ref, *whole, layout=layout, optimized=False)

    def vector(self, ref: Ref, axis: int) -> jax.Array:
        """A vector laid out as what a reduction over `axis` of a tile leaves: 1 gives one value for each row."""
        return self.load(ref, plgpu.Layout.WGMMA.reduce(axis))

    def side(self, side: Side, batch: jax.Array, tile: jax.Array, axis: int) -> Side:
        """Positions and segments of one tile, likewise."""
        return Side(*(self.vector(x.at[batch, tile], axis) for x in side))

    def product(self, a: Ref, b: Ref, meanwhile: Callable[[], None] = lambda: None) -> jax.Array:
        """a (i, c) x b (j, c) -> (i, j), both in shared memory; `meanwhile` is called before waiting for it."""
        if self.is_interpreted:
            meanwhile()
            return jnp.dot(_read(a), _read(b).T, preferred_element_type=jnp.float32)

        def compute(accumulator: Ref) -> jax.Array:
            plgpu.wgmma(accumulator, a, plgpu.transpose_ref(b, (1, 0)))
            meanwhile()
            return accumulator[...]

        return pl.run_scoped(compute, plgpu.ACC((a.shape[0], b.shape[0]), jnp.float32))

    def two_products(self, a: Ref, b: Ref, c: Ref, d: Ref, work: Callable[[jax.Array], Any]) -> tuple[Any, jax.Array]:
        """(work(a x b), c x d), transposed as in `product`; `work` is done while c x d is under way."""
        if self.is_interpreted:
            return work(self.product(a, b)), self.product(c, d)

        def compute(first: Ref, second: Ref) -> tuple[Any, jax.Array]:
            plgpu.wgmma(first, a, plgpu.transpose_ref(b, (1, 0)))
            plgpu.wgmma(second, c, plgpu.transpose_ref(d, (1, 0)))
            done = work(plgpu.wgmma_accumulator_load(first, wait_n=1))
            return done, second[...]

        accumulator = plgpu.ACC((a.shape[0], b.shape[0]), jnp.float32)
        return pl.run_scoped(compute, accumulator, accumulator)

    def accumulate(self, total: jax.Array, a: jax.Array, b: Ref) -> jax.Array:
        """total + a x b, with a (i, j) in registers and b (j, c) in shared memory."""
        if self.is_interpreted:
            return total + jnp.dot(a, _read(b), preferred_element_type=jnp.float32)

        def compute(accumulator: Ref) -> None:
            plgpu.wgmma(accumulator, a, b)

        return pl.run_state(compute)(plgpu.ACC.init(total))


def _read(ref: Ref) -> jax.Array:
    """For the interpreter. Tensor cores read as copies write; a plain read must be committed to be ordered alike."""
    x = ref[...]
    plgpu.commit_smem()
    return x


def across(x: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
    """A vector along `axis` of a tile, repeated along the other."""
    return lax.broadcast_in_dim(x, shape, [axis])


def logits(options: Options, products: jax.Array) -> tuple[jax.Array, float, jax.Array | None]:
    """Logits, the factor that takes them to units of log 2, and the derivative of the cap (None without one)."""
    cap = options.logits_soft_cap
    if cap is None:
        return products, options.scale * LOG2_E, None
    # tanh by way of exp2, which is exact to float32; the machine's own tanh keeps 11 bits.
    t = 1 - 2 / (jnp.exp2(products * (2 * LOG2_E * options.scale / cap)) + 1)
    return t, cap * LOG2_E, 1 - t * t


def tile_mask(rule: Rule, queries: Side, keys: Side, shape: tuple[int, ...], *, query_axis: int = 0) -> jax.Array:
    """The rule for a tile, from vectors in registers."""
    sides = (
        Side(*(across(x, shape, axis) for x in side)) for side, axis in ((queries, query_axis), (keys, 1 - query_axis))
    )
    return may_see(rule, *sides)
