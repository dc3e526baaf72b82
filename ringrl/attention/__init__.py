"""Exact attention for long sequences, on one device or over a mesh axis. Imports nothing else of RingRL."""

from ringrl.attention.api import as_attention_fn, attention, ring_attention, ring_attention_shard
from ringrl.attention.decode import Prefix, append_to_cache, decode_attention, grow_cache
from ringrl.attention.layout import LAYOUTS, from_layout, layout_positions, pad_to_layout, shard_positions, to_layout
from ringrl.attention.strategy import choose_strategy, ring_order

__all__ = [
    "LAYOUTS",
    "Prefix",
    "append_to_cache",
    "as_attention_fn",
    "attention",
    "choose_strategy",
    "decode_attention",
    "from_layout",
    "grow_cache",
    "layout_positions",
    "pad_to_layout",
    "ring_attention",
    "ring_attention_shard",
    "ring_order",
    "shard_positions",
    "to_layout",
]
