"""The ring: every device keeps its queries, while keys and values travel from neighbour to neighbour.

    hop 0          hop 1          hop 2
    q0 k0 ->       q0 k3 ->       q0 k2 ->        Each device attends to the block it holds while that block is
    q1 k1 ->       q1 k0 ->       q1 k3 ->        already on its way to the next one. Memory per device is one
    q2 k2 ->       q2 k1 ->       q2 k0 ->        block in use and one arriving, whatever the size of the ring.
    q3 k3 ->       q3 k2 ->       q3 k1 ->

The loop is a scan whose last hop is peeled (nothing is sent that nobody reads). Sends are issued first, and one
optimization_barrier ties the kernel's results to what arrives: compiled for TPUs, only this form puts the kernel
between send and receive on every generation while memory stays constant in the ring's size.
"""

import dataclasses
import math
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32

from ringrl.attention import kernels
from ringrl.attention.contract import Cotangents, Gradients, Inputs, Partial
from ringrl.attention.mask import Rule, Side
from ringrl.attention.merge import nothing_seen
from ringrl.attention.options import Options
from ringrl.attention.varying import varying_like

AxisName = str | tuple[str, ...]
Tree = TypeVar("Tree")


@dataclasses.dataclass(frozen=True)
class Leg:
    """One way round: how many hops, and where to. The heads are dealt out evenly to `shifts`: +1 sends to the next
    device, -1 to the one before.
    """

    hops: int
    shifts: tuple[int, ...] = (1,)


class Block(NamedTuple):
    """What travels: keys and values in one array, positions and segment ids in another."""

    kv: Float[Array, "heads 2 keys head_dim"]
    side: Int32[Array, "2 batch keys"]


@dataclasses.dataclass(frozen=True)
class Ring:
    """The plan (attend.py) of a ring over `axis_name`, mesh axes of `size` devices in all; runs inside shard_map.

    The first leg begins with the device's own block, any other with a neighbour's.
    """

    axis_name: AxisName
    size: int
    legs: tuple[Leg, ...]

    def forward(self, inputs: Inputs, options: Options) -> Partial:
        """Attention over the blocks of all devices that the legs visit."""
        total = nothing_seen(inputs.q)
        for number, leg in enumerate(self.legs):
            blocks, sends = self._start(leg, number, inputs)

            def attend(total: Partial, blocks: list[Block], leg=leg) -> Partial:  # type: ignore[no-untyped-def]
                starts = _deal(leg, total, inputs.kv_heads)
                met = zip(_meet(leg, inputs, blocks), starts, strict=True)
                return _collect([kernels.forward(share, options, start) for share, start in met], inputs)

            def hop(carry, _, leg=leg, attend=attend):  # type: ignore[no-untyped-def]
                total, blocks = carry
                arriving = self._send(leg, blocks)
                return lax.optimization_barrier((attend(total, blocks), arriving)), None

            (total, blocks), _ = lax.scan(hop, (total, blocks), None, length=sends)
            total = attend(total, blocks)
        return total

    def backward(self, inputs: Inputs, options: Options, cotangents: Cotangents) -> Gradients:
        """Gradients of the queries add up where they are; those of a block travel behind it, and home at the end."""
        dq = varying_like(inputs.q, jnp.zeros(inputs.q.shape, jnp.float32))
        come_home = []
        for number, leg in enumerate(self.legs):
            blocks, sends = self._start(leg, number, inputs)

            def gradients(dq: jax.Array, blocks: list[Block], leg=leg):  # type: ignore[no-untyped-def]
                known = _deal(leg, (cotangents, dq), inputs.kv_heads)
                met = zip(_meet(leg, inputs, blocks), known, strict=True)
                parts = [kernels.backward(share, options, *one) for share, one in met]
                return _collect([part.dq for part in parts], inputs), [part.dkv for part in parts]

            def hop(carry, _, leg=leg, gradients=gradients):  # type: ignore[no-untyped-def]
                dq, dblocks, blocks = carry
                arriving = self._send(leg, blocks)
                # What the devices before made of this block leaves them now, hidden behind the kernel.
                dblocks = self._send(leg, dblocks)
                tied = lax.optimization_barrier((*gradients(dq, blocks), arriving, dblocks))
                dq, dblocks_part, arriving, dblocks = tied
                return (dq, _add(dblocks, dblocks_part), arriving), None

            start = varying_like(inputs.q, [jnp.zeros(block.kv.shape, jnp.float32) for block in blocks])
            (dq, dblocks, blocks), _ = lax.scan(hop, (dq, start, blocks), None, length=sends)
            dblocks = self._send(leg, dblocks) if sends else dblocks
            dq, dblocks_part = gradients(dq, blocks)
            home = dataclasses.replace(leg, shifts=tuple(-leg.hops * shift for shift in leg.shifts))
            come_home.append(_collect(self._send(home, _add(dblocks, dblocks_part)), inputs))
        return Gradients(dq, sum(come_home[1:], start=come_home[0]))

    def _start(self, leg: Leg, number: int, inputs: Inputs) -> tuple[list[Block], int]:
        """The blocks that a leg begins with and the sends that follow."""
        side = jnp.stack(inputs.keys)
        blocks = [Block(kv, side) for kv in _deal(leg, inputs.kv, inputs.kv_heads)]
        return (self._send(leg, blocks), leg.hops - 1) if number else (blocks, leg.hops)

    def _send(self, leg: Leg, blocks):  # type: ignore[no-untyped-def]
        """Each share of the heads one hop on, in its own direction."""
        axes, index = _in_order_of_mesh(self.axis_name)

        def permute(x: jax.Array, shift: int) -> jax.Array:
            return lax.ppermute(x, axes, [(index[i], index[(i + shift) % self.size]) for i in range(self.size)])

        return [
            jax.tree.map(lambda x, shift=shift: permute(x, shift), block)
            for block, shift in zip(blocks, leg.shifts, strict=True)
        ]


def _in_order_of_mesh(axis_name: AxisName) -> tuple[tuple[str, ...], list[int]]:
    """The axes as the mesh lists them, and where each device of the ring stands then: ppermute wants no other order."""
    axes = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    listed = tuple(axis for axis in jax.sharding.get_abstract_mesh().axis_names if axis in axes)
    places = np.arange(lax.axis_size(axes)).reshape([lax.axis_size(axis) for axis in listed])
    return listed, places.transpose([listed.index(axis) for axis in axes]).ravel().tolist()


def _meet(leg: Leg, inputs: Inputs, blocks: list[Block]) -> list[Inputs]:
    """The queries of each share of the heads, with the block that is here for them."""
    shares = zip(_deal(leg, inputs.q, inputs.kv_heads), blocks, strict=True)
    return [inputs._replace(q=q, kv=block.kv, keys=Side(*block.side)) for q, block in shares]


def _deal(leg: Leg, tree: Tree, kv_heads: int) -> list[Tree]:
    """Arrays (B * Hkv, ...) dealt out by heads to the ways that a leg goes."""
    if len(leg.shifts) == 1:
        return [tree]

    def share(x: jax.Array, way: int) -> jax.Array:
        heads = x.reshape(-1, kv_heads, *x.shape[1:])
        return jnp.split(heads, len(leg.shifts), axis=1)[way].reshape(-1, *x.shape[1:])

    return [jax.tree.map(partial(share, way=way), tree) for way in range(len(leg.shifts))]


def _collect(parts: list[Tree], inputs: Inputs) -> Tree:
    """The inverse."""
    if len(parts) == 1:
        return parts[0]
    batch = inputs.queries.positions.shape[0]

    def together(*shares: jax.Array) -> jax.Array:
        heads = [x.reshape(batch, -1, *x.shape[1:]) for x in shares]
        return jnp.concatenate(heads, axis=1).reshape(-1, *shares[0].shape[1:])

    return jax.tree.map(together, *parts)


def _add(a: list[jax.Array], b: list[jax.Array]) -> list[jax.Array]:
    return [x + y for x, y in zip(a, b, strict=True)]


def make_ring(
    axis_name: AxisName,
    *,
    local_length: int,
    layout: str,
    rule: Rule,
    default_positions: bool = True,
    bidirectional: bool = False,
) -> Ring:
    """The ring with the hops that a mask needs: all n - 1, or fewer where window and layout say so beforehand.

    With contiguous chunks of c tokens a window that reaches `left` back and `right` ahead touches ceil(left / c)
    chunks before a device's own and ceil(right / c) after it. In the other layouts, and with positions of the caller's,
    every device may hold something that is near.
    """
    size = lax.axis_size(axis_name)
    around = Ring(axis_name, size, (Leg(size - 1, (1, -1) if bidirectional else (1,)),))
    if rule.window is None or layout != "contiguous" or not default_positions:
        return around
    before = math.ceil(rule.window[0] / local_length)
    after = 0 if rule.is_causal else math.ceil(rule.window[1] / local_length)
    if before + after >= size - 1:
        return around
    return Ring(axis_name, size, (Leg(before), Leg(after, (-1,))) if after else (Leg(before),))
