"""Formula of the memory of a training step: the count of 2305.19370 and 2310.01889, adapted to this implementation.

Per device, with P parameters on N = fsdp x seq x tensor devices, L layers of width h, s tokens of each of b contexts:

    parameters      4 P / N                       float32
    optimiser       8 P / N                       AdamW's two moments
    gradients       4 P / N                       and 2 P / N for XLA's bfloat16 copy of all layers
    activations     L b s (2 h itemsize + 4 H)    with remat: a layer's input, attention's output and sum
                    L b s h itemsize              with remat "full": a layer's input
    scratch         one layer's backward pass: b s (a h + k h_kv) and its gathered parameters, or its feed-forward
                    layer, whichever is larger; for vanilla also b H s^2 logits

The papers count 2 b s h for blockwise and ring (a layer's input in bfloat16), 8 b s h for a whole feed-forward layer
and 2 b H s^2 for vanilla. a and k cover XLA's other buffers and are calibrated against the compiler once per platform
(`WORKING`). The compiler's schedule changes with the size, so the factors are accurate to a few percent.
"""

import bisect
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp

from ringrl.attention.kernels.mosaic_tpu_tiles import MAX_PAIRS, TILE_BITS
from ringrl.attention.kernels.tuning import tpu_blocks
from ringrl.planning.machines import Machine, kernel_of
from ringrl.planning.workload import MOST_TOKENS, Workload


class Memory(NamedTuple):
    """Bytes per device."""

    parameters: float
    optimiser: float
    batch: float
    gradients: float
    activations: float
    scratch: float

    @property
    def total(self) -> float:
        """Total bytes."""
        return sum(self)


class Working(NamedTuple):
    """Numbers held per token in a layer's backward pass."""

    width: float  # per feature of the width
    key_value: float  # per feature of keys (or of values)
    hidden: float  # per unit of the feed-forward layer, for the tokens of one block
    logits: float = 0.0  # per pair of tokens and head


WORKING: Mapping[tuple[str, str], Working] = {
    ("tpu", "ring"): Working(7.5, 16, 2.5),
    ("tpu", "blockwise"): Working(7.5, 4.75, 2.5),
    ("tpu", "memory_efficient"): Working(7.5, 4.75, 2.5),
    ("tpu", "vanilla"): Working(7.5, 4.75, 2.5, 3),
    ("cpu", "ring"): Working(12, 20, 7),
    ("cpu", "blockwise"): Working(12, 9.5, 7),
    ("cpu", "memory_efficient"): Working(12, 9.5, 7),
    ("cpu", "vanilla"): Working(12, 4, 7, 3.84),
}
# Additional numbers that remat "none" keeps per layer: per feature of the width, and per unit of a feed-forward layer
# that is not computed in blocks.
KEPT_WIDTH, KEPT_HIDDEN = 7.1, 6.8


def memory_of(workload: Workload, platform: str) -> Memory:
    """Return the memory of one step per device. GPUs count like TPUs."""
    model, count = workload.model, workload.parameters
    summed = 1 if workload.config.optimiser.accumulation == 1 else 5 / 3  # accumulation sums into a separate buffer
    bytes_each, tensor = workload.itemsize, workload.config.mesh.tensor
    local = workload.local_contexts * workload.local_tokens
    heads = model.heads / tensor
    of_attention = model.width * bytes_each + 4 * heads
    kept_by_layer = model.width * bytes_each + (0 if model.remat == "full" else of_attention)
    if model.remat == "none":
        hidden = 0 if workload.is_in_blocks else KEPT_HIDDEN * model.feed_forward / tensor
        kept_by_layer += (KEPT_WIDTH + hidden) * model.width * bytes_each
    contexts = workload.local_contexts * workload.config.optimiser.accumulation
    return Memory(
        parameters=4 * count.device,
        optimiser=8 * count.device,
        batch=contexts * workload.local_tokens / workload.tokens_per_step * 45 * 4,
        gradients=(4 + (2 if bytes_each == 2 else 0)) * count.device * summed,
        activations=local * (model.layers * kept_by_layer + (of_attention if model.remat == "full" else 0)),
        scratch=_scratch(workload, platform, 4 if platform == "cpu" else bytes_each),  # CPUs compute in float32
    )


def _scratch(workload: Workload, platform: str, bytes_each: int) -> float:
    model, mesh = workload.model, workload.config.mesh
    strategy = workload.strategy.strategy
    kind = "blockwise" if model.attention == "ring" and strategy in ("ulysses", "all_gather") else model.attention
    working = WORKING["cpu" if platform == "cpu" else "tpu", kind]
    contexts, tokens = workload.local_contexts, workload.local_tokens
    key_width = model.width * model.kv_heads / model.heads
    seen: float = workload.tokens if strategy == "all_gather" else tokens  # keys on a device
    seen *= workload.heads_held
    head_dim = model.width // model.heads
    # A TPU stores the features of a head in registers of 128.
    key_width *= (math.ceil(head_dim / 128) * 128 / head_dim if platform == "tpu" else 1.0) / mesh.tensor
    attention = contexts * (tokens * working.width * model.width + seen * working.key_value * key_width) * bytes_each
    attention += contexts * working.logits * model.heads / mesh.tensor * tokens * workload.tokens * bytes_each
    blocks = math.ceil(tokens / model.block_tokens) if workload.is_in_blocks else 1
    at_once = math.ceil(tokens / blocks) if model.remat != "none" or blocks > 1 else 0  # else counted as activations
    units = model.feed_forward * model.width / mesh.tensor
    # Half of the other buffers are keys and values. Exchanged heads take the place of those that grouping saves.
    shared = 1.0 if workload.group > 1 else (1 + model.kv_heads / model.heads) / 2
    feed_forward = (
        contexts * (tokens * working.width * model.width * shared + at_once * working.hidden * units) * bytes_each
    )
    gathered = workload.parameters.layer / mesh.tensor * bytes_each
    return max(attention, feed_forward) + gathered


def listed_tiles_fit(workload: Workload, machine: Machine) -> bool:
    """Whether the list of tile pairs of the TPU kernels is long enough; other kernels have no list."""
    model, contexts = workload.model, workload.local_contexts
    if kernel_of(model, machine.device) != "mosaic_tpu":
        return True
    queries = workload.local_tokens * workload.group
    keys = workload.tokens if workload.strategy.strategy == "all_gather" else queries
    tile = tpu_blocks(model.width // model.heads, jnp.dtype(model.dtype), machine.device.device_kind)
    query_tiles, key_tiles = math.ceil(queries / tile.rows), math.ceil(keys / tile.keys)
    return contexts * query_tiles * key_tiles <= MAX_PAIRS and max(query_tiles, key_tiles) <= 2**TILE_BITS


def fits_by_formula(workload: Workload, machine: Machine, extra: float = 0.0) -> bool:
    """Whether the formula's total and `extra` bytes fit into a device, and the tiles into the kernel's list."""
    total = memory_of(workload, machine.device.platform).total + extra
    return total <= machine.device.memory and listed_tiles_fit(workload, machine)


def longest_context(workload: Workload, machine: Machine, extra: float = 0.0) -> int:
    """Return the longest context that fits by the formula, in tokens that the mesh divides; 0 if none fits.

    `extra` bytes are added to the formula's total. The result is at most MOST_TOKENS, since positions are 32-bit.

    The memory falls where the feed-forward layer needs one more block, and rises with the tokens up to the next such
    length. So the number of blocks is found first.
    """
    multiple, seq = workload.multiple, workload.config.mesh.seq
    most = MOST_TOKENS // multiple
    of_block = workload.model.block_tokens * seq if workload.model.attention in ("blockwise", "ring") else MOST_TOKENS

    def is_too_long(number: int) -> bool:
        return not fits_by_formula(workload.with_tokens(number * multiple), machine, extra)

    def shortest(blocks: int) -> int:
        """Return the least number of multiples with more than this many full blocks."""
        return blocks * of_block // multiple + 1

    candidates = range(1, MOST_TOKENS // of_block)
    blocks = bisect.bisect_left(candidates, True, key=lambda blocks: is_too_long(shortest(blocks)))
    numbers = range(shortest(blocks), min(shortest(blocks + 1), most + 1))
    return multiple * (numbers.start - 1 + bisect.bisect_left(numbers, True, key=is_too_long))
