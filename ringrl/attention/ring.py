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
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32

from ringrl.attention import kernels
from ringrl.attention.contract import Cotangents, Gradients, Inputs, Partial
from ringrl.attention.mask import Options, Rule, Side
from ringrl.attention.merge import AxisName, Tree, nothing_seen, varying_like


@dataclasses.dataclass(frozen=True)
class Leg:
    """Hops in one direction: a shift of +1 sends to the next device, -1 to the previous one."""

    hops: int
    shift: int = 1


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

        def attend(total: Partial, block: KeyBlock) -> Partial:
            return kernels.forward(_met(inputs, block), options, total)

        for number, leg in enumerate(self.legs):
            block, sends = self._start(leg, number, inputs)

            def hop(carry, _, leg=leg):  # type: ignore[no-untyped-def]
                total, block = carry
                arriving = self._send(block, leg.shift)
                return lax.optimization_barrier((attend(total, block), arriving)), None

            (total, block), _ = lax.scan(hop, (total, block), None, length=sends)
            total = attend(total, block)
        return total

    def backward(self, inputs: Inputs, options: Options, cotangents: Cotangents) -> Gradients:
        """Return gradients. dq stays on its device; the gradients of a block follow it and return to its device."""
        dq = varying_like(inputs.q, jnp.zeros(inputs.q.shape, jnp.float32))
        returned = []

        def gradients(dq: jax.Array, block: KeyBlock) -> Gradients:
            return kernels.backward(_met(inputs, block), options, cotangents, dq)

        for number, leg in enumerate(self.legs):
            block, sends = self._start(leg, number, inputs)

            def hop(carry, _, leg=leg):  # type: ignore[no-untyped-def]
                dq, dkv, block = carry
                arriving = self._send(block, leg.shift)
                # The gradients so far of this block are sent now, so that the kernel hides the transfer.
                dkv = self._send(dkv, leg.shift)
                (dq, part), arriving, dkv = lax.optimization_barrier((gradients(dq, block), arriving, dkv))
                return (dq, dkv + part, arriving), None

            start = varying_like(inputs.q, jnp.zeros(block.kv.shape, jnp.float32))
            (dq, dkv, block), _ = lax.scan(hop, (dq, start, block), None, length=sends)
            dkv = self._send(dkv, leg.shift) if sends else dkv
            dq, part = gradients(dq, block)
            returned.append(self._send(dkv + part, -leg.hops * leg.shift))
        return Gradients(dq, sum(returned[1:], start=returned[0]))

    def _start(self, leg: Leg, number: int, inputs: Inputs) -> tuple[KeyBlock, int]:
        """Return the first block of a leg and its number of sends."""
        block = KeyBlock(inputs.kv, inputs.keys.stacked())
        return (self._send(block, leg.shift), leg.hops - 1) if number else (block, leg.hops)

    def _send(self, tree: Tree, shift: int) -> Tree:
        """Send arrays to the device `shift` places further."""
        axes, index = _in_order_of_mesh(self.axis_name)
        pairs = [(index[i], index[(i + shift) % self.size]) for i in range(self.size)]
        sent: Tree = jax.tree.map(lambda x: lax.ppermute(x, axes, pairs), tree)
        return sent


def _in_order_of_mesh(axis_name: AxisName) -> tuple[tuple[str, ...], list[int]]:
    """Return the axes in the order of the mesh, which ppermute requires, and each ring device's index in this order."""
    axes = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    listed = tuple(axis for axis in jax.sharding.get_abstract_mesh().axis_names if axis in axes)
    places = np.arange(lax.axis_size(axes)).reshape([lax.axis_size(axis) for axis in listed])
    return listed, places.transpose([listed.index(axis) for axis in axes]).ravel().tolist()


def _met(inputs: Inputs, block: KeyBlock) -> Inputs:
    """Return the inputs of the kernel: this device's queries with the current block."""
    return inputs._replace(kv=block.kv, keys=Side(*block.side))


def make_ring(axis_name: AxisName, local_length: int, layout: str, rule: Rule, *, is_plain_window: bool) -> Ring:
    """Return the ring with the hops that the mask needs: n - 1, or fewer with a window on contiguous chunks.

    With chunks of c tokens, a window (left, right) covers ceil(left / c) chunks before a device's own chunk and
    ceil(right / c) chunks after it. With other layouts, custom positions or a global prefix (not `is_plain_window`),
    any device may hold visible keys.
    """
    size = lax.axis_size(axis_name)
    around = Ring(axis_name, size, (Leg(size - 1),))
    if rule.window is None or layout != "contiguous" or not is_plain_window:
        return around
    before = math.ceil(rule.window[0] / local_length)
    after = 0 if rule.is_causal else math.ceil(rule.window[1] / local_length)
    if before + after >= size - 1:
        return around
    return Ring(axis_name, size, (Leg(before), Leg(after, -1)) if after else (Leg(before),))
