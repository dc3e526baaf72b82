"""Ring attention (2310.01889): every device keeps its queries, and keys and values travel around the ring.

    hop 0          hop 1          hop 2
    q0 k0 ->       q0 k3 ->       q0 k2 ->        Each device attends to its current block while it sends the
    q1 k1 ->       q1 k0 ->       q1 k3 ->        block to the next device. Memory per device is one block in
    q2 k2 ->       q2 k1 ->       q2 k0 ->        use and one arriving, for any ring size.
    q3 k3 ->       q3 k2 ->       q3 k1 ->

The loop is a scan without sends in the last hop. Sends are issued first, and one optimization_barrier ties the kernel's
results to the arriving block. Compiled for TPUs, only this form runs the kernel between send and receive on every
generation with memory constant in the ring size.
"""

import dataclasses
import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32

from ringrl.attention import kernels
from ringrl.attention.contract import AxisName, Cotangents, Gradients, Inputs, Partial, Tree, nothing_seen, varying_like
from ringrl.attention.mask import Options, Rule, Side


@dataclasses.dataclass(frozen=True)
class Leg:
    """Hops in fixed directions, each for an equal share of the heads."""

    hops: int
    shifts: tuple[int, ...] = (1,)  # +1 sends to the next device, -1 to the previous one


class KeyBlock(NamedTuple):
    """Data sent around the ring: keys and values in one array, positions and segment ids in another."""

    kv: Float[Array, "heads 2 keys head_dim"]
    side: Int32[Array, "2 batch keys"]


@dataclasses.dataclass(frozen=True)
class Ring:
    """The exchange (attend.py) by a ring over `axis_name` with `size` devices in total; runs inside shard_map.

    The first leg starts with the device's own block, any other leg with a neighbour's block.
    """

    axis_name: AxisName
    size: int
    legs: tuple[Leg, ...]

    def forward(self, inputs: Inputs, options: Options) -> Partial:
        """Return attention over the blocks of all devices on the legs."""
        total = nothing_seen(inputs.q)
        for number, leg in enumerate(self.legs):
            blocks, sends = self._start(leg, number, inputs)

            def attend(total: Partial, blocks: list[KeyBlock], leg=leg) -> Partial:  # type: ignore[no-untyped-def]
                starts = _split_heads(leg, total, inputs.kv_heads)
                met = zip(_kernel_inputs(leg, inputs, blocks), starts, strict=True)
                return _join_heads([kernels.forward(share, options, start) for share, start in met], inputs)

            def hop(carry, _, leg=leg, attend=attend):  # type: ignore[no-untyped-def]
                total, blocks = carry
                arriving = self._send(leg, blocks)
                return lax.optimization_barrier((attend(total, blocks), arriving)), None

            (total, blocks), _ = lax.scan(hop, (total, blocks), None, length=sends)
            total = attend(total, blocks)
        return total

    def backward(self, inputs: Inputs, options: Options, cotangents: Cotangents) -> Gradients:
        """Return gradients. dq stays on its device; the gradients of a block follow it and return to its device."""
        dq = varying_like(inputs.q, jnp.zeros(inputs.q.shape, jnp.float32))
        returned = []
        for number, leg in enumerate(self.legs):
            blocks, sends = self._start(leg, number, inputs)

            def gradients(dq: jax.Array, blocks: list[KeyBlock], leg=leg):  # type: ignore[no-untyped-def]
                known = _split_heads(leg, (cotangents, dq), inputs.kv_heads)
                met = zip(_kernel_inputs(leg, inputs, blocks), known, strict=True)
                parts = [kernels.backward(share, options, *one) for share, one in met]
                return _join_heads([part.dq for part in parts], inputs), [part.dkv for part in parts]

            def hop(carry, _, leg=leg, gradients=gradients):  # type: ignore[no-untyped-def]
                dq, dblocks, blocks = carry
                arriving = self._send(leg, blocks)
                # The gradients so far of this block are sent now, so that the kernel hides the transfer.
                dblocks = self._send(leg, dblocks)
                tied = lax.optimization_barrier((*gradients(dq, blocks), arriving, dblocks))
                dq, dblocks_part, arriving, dblocks = tied
                return (dq, jax.tree.map(jnp.add, dblocks, dblocks_part), arriving), None

            start = varying_like(inputs.q, [jnp.zeros(block.kv.shape, jnp.float32) for block in blocks])
            (dq, dblocks, blocks), _ = lax.scan(hop, (dq, start, blocks), None, length=sends)
            dblocks = self._send(leg, dblocks) if sends else dblocks
            dq, dblocks_part = gradients(dq, blocks)
            back = dataclasses.replace(leg, shifts=tuple(-leg.hops * shift for shift in leg.shifts))
            returned.append(_join_heads(self._send(back, jax.tree.map(jnp.add, dblocks, dblocks_part)), inputs))
        return Gradients(dq, sum(returned[1:], start=returned[0]))

    def _start(self, leg: Leg, number: int, inputs: Inputs) -> tuple[list[KeyBlock], int]:
        """Return the first blocks of a leg and its number of sends."""
        side = inputs.keys.stacked()
        blocks = [KeyBlock(kv, side) for kv in _split_heads(leg, inputs.kv, inputs.kv_heads)]
        return (self._send(leg, blocks), leg.hops - 1) if number else (blocks, leg.hops)

    def _send(self, leg: Leg, blocks):  # type: ignore[no-untyped-def]
        """Send each share of the heads one hop in its direction."""
        axes, index = _in_order_of_mesh(self.axis_name)

        def permute(x: jax.Array, shift: int) -> jax.Array:
            return lax.ppermute(x, axes, [(index[i], index[(i + shift) % self.size]) for i in range(self.size)])

        return [
            jax.tree.map(lambda x, shift=shift: permute(x, shift), block)
            for block, shift in zip(blocks, leg.shifts, strict=True)
        ]


def _in_order_of_mesh(axis_name: AxisName) -> tuple[tuple[str, ...], list[int]]:
    """Return the axes in the order of the mesh, which ppermute requires, and each ring device's index in this order."""
    axes = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    listed = tuple(axis for axis in jax.sharding.get_abstract_mesh().axis_names if axis in axes)
    places = np.arange(lax.axis_size(axes)).reshape([lax.axis_size(axis) for axis in listed])
    return listed, places.transpose([listed.index(axis) for axis in axes]).ravel().tolist()


def _kernel_inputs(leg: Leg, inputs: Inputs, blocks: list[KeyBlock]) -> list[Inputs]:
    """Return the inputs of the kernel for each share of the heads: its queries with the current block."""
    shares = zip(_split_heads(leg, (inputs.q, inputs.slopes), inputs.kv_heads), blocks, strict=True)
    return [inputs._replace(q=q, slopes=slopes, kv=block.kv, keys=Side(*block.side)) for (q, slopes), block in shares]


def _split_heads(leg: Leg, tree: Tree, kv_heads: int) -> list[Tree]:
    """Split arrays (B * Hkv, ...) by heads into one share for each direction of a leg."""
    if len(leg.shifts) == 1:
        return [tree]

    def share(x: jax.Array, way: int) -> jax.Array:
        heads = x.reshape(-1, kv_heads, *x.shape[1:])
        return jnp.split(heads, len(leg.shifts), axis=1)[way].reshape(-1, *x.shape[1:])

    return [jax.tree.map(partial(share, way=way), tree) for way in range(len(leg.shifts))]


def _join_heads(parts: list[Tree], inputs: Inputs) -> Tree:
    """Invert `_split_heads`."""
    if len(parts) == 1:
        return parts[0]
    batch = inputs.queries.positions.shape[0]

    def together(*shares: jax.Array) -> jax.Array:
        heads = [x.reshape(batch, -1, *x.shape[1:]) for x in shares]
        return jnp.concatenate(heads, axis=1).reshape(-1, *shares[0].shape[1:])

    return jax.tree.map(together, *parts)


def make_ring(
    axis_name: AxisName, local_length: int, layout: str, rule: Rule, is_plain_window: bool, *, bidirectional: bool
) -> Ring:
    """Return the ring with the hops that the mask needs: n - 1, or fewer with a window on contiguous chunks.

    With chunks of c tokens, a window (left, right) covers ceil(left / c) chunks before a device's own chunk and
    ceil(right / c) chunks after it. With other layouts, custom positions or a global prefix (not `is_plain_window`),
    any device may hold visible keys.
    """
    size = lax.axis_size(axis_name)
    around = Ring(axis_name, size, (Leg(size - 1, (1, -1) if bidirectional else (1,)),))
    if rule.window is None or layout != "contiguous" or not is_plain_window:
        return around
    before = math.ceil(rule.window[0] / local_length)
    after = 0 if rule.is_causal else math.ceil(rule.window[1] / local_length)
    if before + after >= size - 1:
        return around
    return Ring(axis_name, size, (Leg(before), Leg(after, (-1,))) if after else (Leg(before),))
