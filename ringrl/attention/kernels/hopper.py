"""Common parts of the Hopper kernels: limits, lists of visits, shared memory, and the operations of one warpgroup.

Each kernel runs one program per multiprocessor with three warpgroups: two consumers, which compute, and a producer,
which only issues copies. A program processes cells of work in turn. A cell is one head and `CONSUMERS` neighbouring
tiles of the owned side, one for each consumer. It visits the tiles of the other side that the mask rule allows. The
list of visits is computed before the kernel runs, from minima and maxima of positions and segment ids.
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

from ringrl.attention.contract import LOG2_E, pad_axis
from ringrl.attention.mask import Options, Rule, Side, classify_pairs, may_see

CONSUMERS = 2
PROGRAMS = 132  # multiprocessors of an H100 or H200; other numbers are correct but less balanced
Ref = Any  # Pallas has no public type for references


def unsupported(dtype: jnp.dtype, head_dim: int, options: Options) -> str | None:
    """Return one sentence about an argument that the kernels do not support, or None."""
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"the Hopper kernel supports bfloat16 and float16, not {jnp.dtype(dtype).name}"
    if head_dim not in (64, 128):
        return f"the Hopper kernel supports a head_dim of 64 or 128, not {head_dim}"
    if not (options.scale > 0 and math.isfinite(options.scale)):
        return f"the Hopper kernel supports a positive scale, not {options.scale}"
    return None


class Visits(NamedTuple):
    """The tiles of the other side that each cell visits."""

    order: Int32[Array, "batch cells tiles"]  # full tiles first, then partial, then hidden ones
    counts: Int32[Array, "batch cells 2"]  # number of full tiles, number of visited tiles
    work: Int32[Array, " batch*cells"]  # batch * cells + cell, longest first, so that programs finish together


def tile_array(x: jax.Array, size: int, multiple: int = 1) -> jax.Array:
    """Reshape (heads, S, ...) -> (heads, tiles, size, ...), padded with zeros to a multiple of whole tiles."""
    return pad_axis(x, 1, size * multiple).reshape(x.shape[0], -1, size, *x.shape[2:])


def untile(x: jax.Array, length: int, shape: tuple[int, ...]) -> jax.Array:
    """Invert `tile_array` for `length` tokens and reshape to `shape`."""
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length].reshape(shape)


def visits(rule: Rule, queries: Side, keys: Side, *, own_queries: bool) -> Visits:
    """List the visits from minima and maxima of positions and segments, for sides (B, cells or tiles, tokens)."""
    kinds = jax.vmap(partial(classify_pairs, rule))(queries, keys)
    some, every = kinds if own_queries else (jnp.swapaxes(x, 1, 2) for x in kinds)
    tiles = some.shape[2]
    rank = jnp.where(every, 0, jnp.where(some, 1, 2))
    order = jnp.sort(rank * tiles + jnp.arange(tiles), axis=2) % tiles
    counts = jnp.stack([every.sum(2), some.sum(2)], axis=2)
    work = jnp.argsort(-counts[..., 1].ravel(), stable=True)
    return Visits(*(x.astype(jnp.int32) for x in (order, counts, work)))


class WorkCell(NamedTuple):
    """One piece of work of a running program."""

    batch: jax.Array
    number: jax.Array  # index of the cell in its sequence
    head: jax.Array  # head of the owned side, counted over the batch
    full: jax.Array  # number of visits without a mask
    total: jax.Array  # number of visits


@dataclasses.dataclass(frozen=True)
class WorkDivision:
    """The division of work over programs: `heads` of the owned side per context; a tile is visited `groups` times."""

    heads: int
    groups: int = 1

    def for_each_cell(self, visits: Visits, body: Callable[[WorkCell, Any], Any], carry: Any) -> Any:
        """Fold carry = body(cell, carry) over the cells of this program."""
        program, programs = lax.axis_index("program"), lax.axis_size("program")
        cells = visits.order.shape[1]

        def step(i: jax.Array, carry: Any) -> Any:
            rank = i * programs + program
            flat = visits.work[lax.div(rank, jnp.int32(self.heads))]
            batch, number = lax.div(flat, jnp.int32(cells)), lax.rem(flat, jnp.int32(cells))
            head = batch * self.heads + lax.rem(rank, jnp.int32(self.heads))
            full, total = (visits.counts[batch, number, i] * self.groups for i in (0, 1))
            return body(WorkCell(batch, number, head, full, total), carry)

        count = visits.work.shape[0] * self.heads
        return lax.fori_loop(0, lax.div(count - 1 - program, jnp.int32(programs)) + 1, step, carry)

    def visited(self, visits: Visits, cell: WorkCell, i: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the tile and the group of visit i."""
        groups = jnp.int32(self.groups)
        return visits.order[cell.batch, cell.number, lax.div(i, groups)], lax.rem(i, groups)

    def launch(self, body: Callable, operands: Any, visits: Visits, outputs: Any, scratch: Any, interpret: Any) -> Any:
        """Run body(operands, visits, outputs, scratch), all of references, as one kernel."""
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
    """Slots in shared memory, each with a barrier for "ready to read" and one for "free to fill"."""

    arrays: tuple[Ref, ...]
    ready: Ref
    free: Ref

    @classmethod
    def of(cls, slots: int, readers: int, *arrays: jax.ShapeDtypeStruct) -> "Buffer":
        """Return the scratch types of a buffer whose slots hold `arrays` and have `readers` reading warpgroups."""
        swizzled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
        return cls(
            tuple(
                plgpu.SMEM((slots, *x.shape), x.dtype, transforms=swizzled if len(x.shape) > 1 else ()) for x in arrays
            ),
            plgpu.Barrier(num_arrivals=len(arrays), num_barriers=slots),
            plgpu.Barrier(num_arrivals=readers, num_barriers=slots),
        )

    def slot(self, number: jax.Array) -> jax.Array:
        """Return the slot of filling `number`."""
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
        """Wait until all slots are free after `number` fillings, so that no copy is pending when a program ends."""
        for slot in range(self.arrays[0].shape[0]):

            @pl.when(slot < number)
            def _wait(slot: int = slot) -> None:
                plgpu.barrier_wait(self.free.at[slot])


class Feed(NamedTuple):
    """A buffer and its sources, a function of head and tile (and of the group for visited tiles)."""

    buffer: Buffer
    sources: Callable[..., tuple[Ref, ...]]


def produce(work: WorkDivision, visits: Visits, owned: Feed, *visited: Feed) -> None:
    """Run the producer warpgroup, which copies owned tiles once per cell and visited tiles once per visit."""

    def cell(cell: WorkCell, fills: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
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
    """Run the role of this warpgroup. The producer gives registers to the consumers."""
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
    """Loads and products of one warpgroup, on tensor cores with register layouts, or in plain arithmetic.

    JAX's interpret mode needs plain arithmetic: it supports neither layouts nor operands in registers (jax 0.10).
    """

    is_interpreted: bool

    def full(self, shape: tuple[int, ...], value: float, layout: Any) -> jax.Array:
        """Return a constant float32 array."""
        x = jnp.full(shape, value, jnp.float32)
        return x if self.is_interpreted else plgpu.layout_cast(x, layout)

    def load(self, ref: Ref, layout: Any) -> jax.Array:
        """Load from device or shared memory into registers."""
        if self.is_interpreted:
            return _read(ref)
        whole = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()  # before jax 0.12
        return plgpu.load(ref, *whole, layout=layout, optimized=False)

    def vector(self, ref: Ref, axis: int) -> jax.Array:
        """Load a vector with the layout of a tile reduced over `axis`: axis 1 gives one value per row."""
        return self.load(ref, plgpu.Layout.WGMMA.reduce(axis))

    def side(self, side: Side, batch: jax.Array, tile: jax.Array, axis: int) -> Side:
        """Load the integers of one tile, each as `vector` does."""
        loaded: Side = jax.tree.map(lambda x: self.vector(x.at[batch, tile], axis), side)
        return loaded

    def product(self, a: Ref, b: Ref, meanwhile: Callable[[], None] = lambda: None) -> jax.Array:
        """Return a (i, c) x b (j, c) -> (i, j), both in shared memory; `meanwhile` runs before the wait for it."""
        if self.is_interpreted:
            meanwhile()
            return jnp.dot(_read(a), _read(b).T, preferred_element_type=jnp.float32)

        def compute(accumulator: Ref) -> jax.Array:
            plgpu.wgmma(accumulator, a, plgpu.transpose_ref(b, (1, 0)))
            meanwhile()
            return accumulator[...]

        return pl.run_scoped(compute, plgpu.ACC((a.shape[0], b.shape[0]), jnp.float32))

    def two_products(self, a: Ref, b: Ref, c: Ref, d: Ref, work: Callable[[jax.Array], Any]) -> tuple[Any, jax.Array]:
        """Return (work(a x b), c x d), transposed as in `product`; `work` runs while c x d is computed."""
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
        """Return total + a x b, with a (i, j) in registers and b (j, c) in shared memory."""
        if self.is_interpreted:
            return total + jnp.dot(a, _read(b), preferred_element_type=jnp.float32)

        def compute(accumulator: Ref) -> None:
            plgpu.wgmma(accumulator, a, b)

        return pl.run_state(compute)(plgpu.ACC.init(total))


def _read(ref: Ref) -> jax.Array:
    """Read for the interpreter. Unlike reads by tensor cores, a plain read needs a commit to be ordered with copies."""
    x = ref[...]
    plgpu.commit_smem()
    return x


def across(x: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
    """Broadcast a vector along `axis` of a tile over the other axis."""
    return lax.broadcast_in_dim(x, shape, [axis])


def logits(options: Options, products: jax.Array) -> tuple[jax.Array, float, jax.Array | None]:
    """Return logits, their factor to units of log 2, and the derivative of the soft cap (None without a cap)."""
    cap = options.logits_soft_cap
    if cap is None:
        return products, options.scale * LOG2_E, None
    # tanh from exp2 is accurate in float32; the hardware's tanh has 11 bits.
    t = 1 - 2 / (jnp.exp2(products * (2 * LOG2_E * options.scale / cap)) + 1)
    return t, cap * LOG2_E, 1 - t * t


def tile_mask(rule: Rule, queries: Side, keys: Side, shape: tuple[int, ...], *, query_axis: int = 0) -> jax.Array:
    """Apply the mask rule to a tile, from vectors in registers."""
    rows = jax.tree.map(lambda x: across(x, shape, query_axis), queries)
    columns = jax.tree.map(lambda x: across(x, shape, 1 - query_axis), keys)
    return may_see(rule, rows, columns)
