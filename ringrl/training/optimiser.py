"""AdamW with warm-up, cosine decay and gradient clipping."""

from typing import Any

import jax
import optax

from ringrl.config import OptimiserConfig

DECAYED = ("kernel", "embedding")  # all layers' biases lie in one array, which has as many axes as a matrix


def learning_rate(config: OptimiserConfig) -> optax.Schedule:
    """Linear warm-up from zero to the peak, then cosine decay to its final fraction at step `config.steps`.

    Steps count from 0: with any warm-up the first has a rate of zero, and none has the final one.
    """
    warmup = min(config.warmup_steps, config.steps - 1)
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=warmup,
        decay_steps=config.steps,
        end_value=config.learning_rate * config.final_learning_rate,
    )


def make_optimiser(config: OptimiserConfig) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW; weight decay on matrices only, not on biases and the scales of norms."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate(config),
            b2=config.beta2,
            weight_decay=config.weight_decay,
            mask=_decayed,
        ),
    )


def _decayed(params: Any) -> Any:
    """Which leaves of a nested dict of parameters are matrices."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in DECAYED, params)
