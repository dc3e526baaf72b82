"""Optimiser of all agents: AdamW with clipped gradients, linear warm-up and cosine decay of the learning rate."""

from typing import Any

import jax
import optax

from ringrl.config import OptimiserConfig

DECAYED = ("kernel", "embedding")  # by name: the stacked biases of all layers are two-dimensional too


def learning_rate(config: OptimiserConfig) -> optax.Schedule:
    """Return linear warm-up from zero to the peak, then cosine decay to the final fraction at step `config.steps`.

    Steps count from 0. With any warm-up, the rate of the first step is zero.
    """
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=min(config.warmup_steps, config.steps - 1),
        decay_steps=config.steps,
        end_value=config.learning_rate * config.final_learning_rate,
    )


def make_optimiser(config: OptimiserConfig) -> optax.GradientTransformation:
    """Return clipping by global norm, then AdamW with weight decay on matrices only (not on biases and norm scales)."""

    def decayed(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in DECAYED, params)

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(learning_rate(config), b2=config.beta2, weight_decay=config.weight_decay, mask=decayed),
    )
