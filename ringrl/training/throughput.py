"""What a step costs, in operations of the model: how fast a run is, and how much of the machine it uses."""

from typing import Any

import jax

from ringrl.attention.strategy import link_of
from ringrl.config import ModelConfig


def forward_flops(config: ModelConfig, tokens: int) -> float:
    """Floating point operations of the transformer's blocks over one context of S = `tokens`.

    Per layer of width h with as many key heads as query heads and a feed-forward layer four times as wide, this is
    24 S h^2 for the matrices (2310.01889, appendix D) and 2 S^2 h for attention: half of the paper's 4 S^2 h, since a
    causal mask hides half of the logits and they are not computed. Token embeddings, action head, softmax and norms
    are left out; what remat computes twice counts once.
    """
    width = config.width
    key_value = width * config.kv_heads // config.heads
    matrices = 2 * width * (2 * width + 2 * key_value + 2 * config.feed_forward * width)
    return float(config.layers * tokens * (matrices + 2 * tokens * width))


def step_flops(config: ModelConfig, tokens: int, contexts: int) -> float | None:
    """Operations of one optimiser step: forward, and twice as much backward. None for models that see no context."""
    return 3 * contexts * forward_flops(config, tokens) if config.family.has_context else None


def peak_flops(devices: int) -> float | None:
    """Dense bfloat16 operations per second of the devices used, by their data sheet; None where it is not known."""
    device = jax.devices()[0]
    link = link_of(device.device_kind)
    return None if link is None or device.platform == "cpu" else devices * link.flops


def step_memory(step: Any, *arguments: Any) -> int | None:
    """Most bytes that a device holds at once in a step, as the compiler counts them; None where it does not say.

    Args:
      step: jitted, and called before with arguments of these shapes: nothing is compiled again.
      arguments: of the step; none of them is read.
    """
    found = step.lower(*arguments).compile().memory_analysis()
    if found is None:
        return None
    if jax.devices()[0].platform == "cpu":  # there the peak leaves the scratch out
        return int(found.argument_size_in_bytes + found.temp_size_in_bytes)
    return int(found.peak_memory_in_bytes + found.generated_code_size_in_bytes)
