"""Optimiser of all agents: AdamW with clipped gradients, and a schedule of the learning rate with linear warm-up."""

from functools import lru_cache
from typing import Any

import jax
import optax

from ringrl.config import OptimiserConfig

DECAYED = ("kernel", "embedding")  # by name: the stacked biases of all layers are two-dimensional too


def learning_rate(config: OptimiserConfig) -> optax.Schedule:
    """Return linear warm-up from zero to the peak, then decay to the final fraction at step `config.steps`.

    Steps count from 0. With any warm-up, the rate of the first step is zero.
    """
    peak, steps = config.learning_rate, config.steps
    final, warmup = peak * config.final_learning_rate, min(config.warmup_steps, steps - 1)
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps, final)
    start = {"constant": steps, "linear": warmup, "wsd": max(warmup, steps * 4 // 5)}[config.schedule]
    decay = optax.linear_schedule(peak, final, steps - start)
    return optax.join_schedules(
        [optax.linear_schedule(0.0, peak, warmup), optax.constant_schedule(peak), decay], [warmup, start]
    )


@lru_cache(maxsize=8)  # `make_train_step` then compiles equal runs once
def make_optimiser(config: OptimiserConfig) -> optax.GradientTransformation:
    """Return clipping by global norm, then AdamW with weight decay on matrices only (not on biases and norm scales)."""

    def decayed(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in DECAYED, params)

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(learning_rate(config), b2=config.beta2, weight_decay=config.weight_decay, mask=decayed),
    )
