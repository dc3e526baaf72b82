"""Parameters with weight decay."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from ringrl.config import ModelConfig, OptimiserConfig
from ringrl.model import make_policy
from ringrl.training.optimiser import make_optimiser

KINDS = {
    "transformer": {"timestep_embedding": True, "trajectory_embedding": True, "width": 16},
    "behaviour_cloning": {"width": 16},
    "td3_bc": {"width": 16},
}


@pytest.mark.parametrize("kind", KINDS)
def test_weight_decay_applies_to_matrices_only(kind: str) -> None:
    """Biases and norm scales of stacked blocks are two-dimensional too, but must not decay."""
    config = ModelConfig.model_validate({"kind": kind, "layers": 2} | KINDS[kind])
    params = nnx.to_pure_dict(nnx.state(make_policy(config, 4, 3, 0), nnx.Param))
    params = jax.tree.map(jnp.ones_like, params)
    optimiser = make_optimiser(OptimiserConfig(steps=10, warmup_steps=0, learning_rate=0.1, weight_decay=0.5))
    updates, _ = optimiser.update(jax.tree.map(jnp.zeros_like, params), optimiser.init(params), params)
    after = optax.apply_updates(params, updates)
    changed = {
        jax.tree_util.keystr(path): bool((x != 1).any()) for path, x in jax.tree_util.tree_leaves_with_path(after)
    }
    assert any(changed.values())
    assert not all(changed.values())
    for name, has_changed in changed.items():
        assert has_changed == name.endswith(("['kernel']", "['embedding']")), name
