"""Exact attention for long sequences. Knows arrays and meshes only; imports nothing else of RingRL."""

from ringrl.attention.api import attention
from ringrl.attention.decode import decode_attention

__all__ = ["attention", "decode_attention"]
