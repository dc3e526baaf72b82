"""Acting step by step from the key-value cache equals the full forward pass, at every position."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ringrl.context import Context
from ringrl.model import TOKEN_SETS, grow

STEPS = 6
HEADS = {"MHA": (2, 2), "GQA": (4, 2), "MQA": (2, 1)}
EMBEDDINGS = [(False, False), (True, True), (True, False), (False, True)]
# Every pair of (token set, head, embeddings, heads) occurs.
VARIANTS = [
    (token_set, ("mse", "gaussian")[(i + j) % 2], embeddings, list(HEADS)[(i + j) % 3])
    for (i, token_set), (j, embeddings) in itertools.product(enumerate(TOKEN_SETS), enumerate(EMBEDDINGS))
]


def step(context: Context, t: int) -> Context:
    return jax.tree.map(lambda x: x[:, t : t + 1], context)


def rolled_out(policy, context: Context, capacity: int, jit=lambda f: f) -> tuple[np.ndarray, list[int]]:
    """Actions (B, T, A) from the cache, which starts with `capacity` and doubles when full; and its capacities."""
    graph, state = nnx.split(policy)
    act = jit(lambda state, *arguments: nnx.merge(graph, state).act(*arguments))
    memory, previous, actions, capacities = policy.reset(len(context.reward), capacity), None, [], []
    for t in range(context.reward.shape[1]):
        needed = (t + 1) * policy.tokens_per_step
        while needed > memory.capacity:
            memory = grow(memory, 2 * memory.capacity)
        # What a step leads to is not known before acting; whatever stands there must not matter.
        unknown = step(context, t)._replace(
            action=np.full_like(context.action[:, :1], 9.0), reward=np.full_like(context.reward[:, :1], -7.0)
        )
        action, memory = act(state, previous, unknown, memory)
        previous = step(context, t)
        actions.append(np.asarray(action))
        capacities.append(memory.capacity)
    return np.stack(actions, 1), capacities


@pytest.mark.parametrize(("token_set", "head", "embeddings", "heads"), VARIANTS)
def test_cached_equals_full_forward_pass(token_set, head, embeddings, heads, policy, context, actions, quick):
    count, kv_heads = HEADS[heads]
    timestep, trajectory = embeddings
    made = policy(
        token_set=token_set, action_head=head, heads=count, kv_heads=kv_heads,
        timestep_embedding=timestep, trajectory_embedding=trajectory,
    )  # fmt: skip
    whole = context(STEPS)
    expected = actions(made, whole)
    found, capacities = rolled_out(made, whole, STEPS // 2 * made.tokens_per_step, quick)
    assert len(set(capacities)) == 2, "the cache grew on the way"
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(np.diff(expected, axis=1)).max() > 0.05, "actions do differ from step to step"


def test_the_memory_remembers(policy, context, changed, quick):
    """Another first step leads to other actions at the last: the cache is read, not only written."""
    made, whole = policy(token_set="at5"), context(5)
    other = changed(whole, "reward", 0)
    a, b = (rolled_out(made, x, 32, quick)[0] for x in (whole, other))
    np.testing.assert_array_equal(a[:, 0], b[:, 0])
    assert np.abs(a[:, -1] - b[:, -1]).max() > 1e-4


def test_growing_keeps_what_is_held(policy, context, quick):
    made, whole = policy(token_set="ring4"), context(3)
    memory, previous = made.reset(2, 12), None
    for t in range(3):
        _, memory = quick(made.act)(previous, step(whole, t), memory)
        previous = step(whole, t)
    wider = grow(memory, 40)
    assert (memory.capacity, wider.capacity) == (12, 40)
    assert int(wider.length) == int(memory.length) == 10  # the last step's action and reward are still to come
    for before, after in zip(memory.keys + memory.values, wider.keys + wider.values, strict=True):
        np.testing.assert_array_equal(before, after[:, :12])


def test_bfloat16_cache_holds_bfloat16_and_follows_the_full_pass(policy, context, actions, quick):
    made, whole = policy(dtype="bfloat16"), context(STEPS)
    memory = made.reset(2, 64)
    assert {x.dtype for x in memory.keys + memory.values} == {jnp.dtype(jnp.bfloat16)}
    found, _ = rolled_out(made, whole, 64, quick)
    np.testing.assert_allclose(found, actions(made, whole), atol=0.03)
