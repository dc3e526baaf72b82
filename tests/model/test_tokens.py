"""Tokens of a timestep and their order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ringrl.config import ModelConfig
from ringrl.model.tokens import TOKEN_SETS, TokenEmbedding

ORDERS = {
    "at5": ["return_to_go", "observation", "action", "reward", "completion"],
    "ring4": ["return_to_go", "observation", "action", "reward"],
    "dt3": ["return_to_go", "observation", "action"],
}
WIDTH = 8


def embedding(token_set: str, **settings: object) -> TokenEmbedding:
    config = ModelConfig.model_validate({"token_set": token_set, "width": WIDTH, "heads": 1} | settings)
    return TokenEmbedding(config, 3, 2, nnx.Rngs(params=0))


def project(made: TokenEmbedding, kind: str, x: np.ndarray) -> np.ndarray:
    """Return the token of one kind by hand."""
    linear = made.linear[kind]
    x = x[..., None] if x.ndim == 2 else x
    return x @ np.asarray(linear.kernel[...]) + np.asarray(linear.bias[...])


@pytest.mark.parametrize("token_set", ORDERS)
def test_order(token_set, context):
    made, whole = embedding(token_set), context(5)
    tokens = np.asarray(made(whole)).reshape(2, 5, len(ORDERS[token_set]), WIDTH)
    assert TOKEN_SETS[token_set].size == len(ORDERS[token_set])
    for i, kind in enumerate(ORDERS[token_set]):
        expected = project(made, kind, getattr(whole, kind))
        np.testing.assert_allclose(tokens[:, :, i], expected, rtol=1e-5, atol=1e-5, err_msg=kind)


def test_fused_token_contains_return_and_state_and_the_previous_outcome(context):
    made, whole = embedding("fused1"), context(5)
    before = {
        name: np.concatenate([np.zeros_like(x[:, :1]), x[:, :-1]], axis=1)
        for name, x in (("action", whole.action), ("reward", whole.reward), ("completion", whole.completion))
    }
    parts = [
        whole.return_to_go[..., None], whole.observation,
        before["action"], before["reward"][..., None], before["completion"][..., None],
    ]  # fmt: skip
    expected = project(made, "fused", np.concatenate(parts, axis=-1))
    np.testing.assert_allclose(made(whole), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("token_set", TOKEN_SETS)
def test_embeddings_of_timestep_and_trajectory_are_added_to_every_token(token_set, context):
    whole = context(6)
    both = embedding(token_set, timestep_embedding=True, trajectory_embedding=True)
    timesteps, trajectories = (np.asarray(table.embedding[...]) for table in (both.timestep, both.trajectory))
    found = np.asarray(both(whole))
    both.timestep = both.trajectory = None
    places = timesteps[whole.timestep] + trajectories[whole.trajectory]
    expected = np.asarray(both(whole)) + np.repeat(places, TOKEN_SETS[token_set].size, axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert embedding(token_set).timestep is None
    assert embedding(token_set).trajectory is None


@pytest.mark.parametrize("token_set", TOKEN_SETS)
def test_decoding_gives_the_same_tokens_in_the_same_order(token_set, context):
    """Each call adds the tokens after the previous action and before the current action."""
    made = embedding(token_set, timestep_embedding=True, trajectory_embedding=True)
    whole = context(4)
    steps = [jax.tree.map(lambda x, t=t: x[:, t : t + 1], whole) for t in range(4)]
    pieces = [made.decode(previous, current) for previous, current in zip([None, *steps], steps, strict=False)]
    found = jnp.concatenate(pieces, axis=1)
    np.testing.assert_allclose(found, made(whole)[:, : found.shape[1]], rtol=1e-5, atol=1e-5)
    unfinished = len(TOKEN_SETS[token_set].after)
    assert found.shape[1] == 4 * TOKEN_SETS[token_set].size - unfinished


def test_indices_beyond_the_last_embedding_share_it(context):
    """A context may contain more trajectories than embeddings."""
    made = embedding("fused1", timestep_embedding=True, trajectory_embedding=True)
    last = context(3)
    last = last._replace(timestep=last.timestep * 0 + 1023, trajectory=last.trajectory * 0 + 1023)
    beyond = last._replace(timestep=last.timestep + 7, trajectory=last.trajectory + 5000)
    assert np.isfinite(made(beyond)).all()
    np.testing.assert_array_equal(made(beyond), made(last))
    before = last._replace(timestep=last.timestep - 1, trajectory=last.trajectory - 1)
    assert np.abs(made(before) - made(last)).max() > 0


@pytest.mark.parametrize("kind", ["return_to_go", "reward", "completion"])
def test_norms_keep_the_size_of_a_scalar_token(kind):
    """Without a bias, normalising the token of a scalar would keep only its sign."""
    made = embedding("at5", width=64)
    tokens = project(made, kind, np.array([[0.0, 0.3, 0.9]]))[0]
    assert (np.linalg.norm(tokens, axis=1) > 1).all()  # the gradient of a norm at zero is useless
    directions = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
    alike = directions @ directions.T
    assert alike[np.triu_indices(3, 1)].max() < 0.98
