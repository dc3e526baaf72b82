"""Cached decoding equals the full forward pass at every step."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from ringrl.context import Context
from ringrl.model import grow
from ringrl.model.cache import KVCache
from ringrl.model.parallel import MESH_AXES, ONE_DEVICE, Parallel

STEPS = 6
HEADS = {"MHA": (2, 2), "GQA": (4, 2), "MQA": (2, 1)}
# The settings act in different modules: each value occurs twice, but for two token sets.
VARIANTS = [
    ("at5", "mse", False, False, "MHA"),
    ("ring4", "gaussian", True, False, "GQA"),
    ("dt3", "mse", True, True, "MQA"),
    ("fused1", "gaussian", False, True, "GQA"),
    ("at5", "gaussian", True, True, "MQA"),
    ("fused1", "mse", True, False, "MHA"),
]
slow = partial(pytest.param, marks=pytest.mark.slow)
SETTINGS = ("token_set", "head", "timestep", "trajectory", "heads")


def step(context: Context, t: int) -> Context:
    return jax.tree.map(lambda x: x[:, t : t + 1], context)


def rolled_out(policy, context: Context, capacity: int, jit=lambda f: f) -> tuple[np.ndarray, list[int]]:
    """Return cached actions (B, T, A) and the capacity at each step. The cache doubles when it is full."""
    graph, state = nnx.split(policy)
    act = jit(lambda state, *arguments: nnx.merge(graph, state).act(*arguments))
    memory = policy.reset(len(context.reward), capacity)
    previous, actions, capacities = None, [], []
    for t in range(context.reward.shape[1]):
        needed = (t + 1) * policy.tokens_per_step
        while needed > memory.capacity:
            memory = grow(memory, 2 * memory.capacity)
        # The outcome of a step is unknown before acting, so its values must not matter.
        unknown = step(context, t)._replace(
            action=np.full_like(context.action[:, :1], 9.0), reward=np.full_like(context.reward[:, :1], -7.0)
        )
        action, memory = act(state, previous, unknown, memory)
        previous = step(context, t)
        actions.append(np.asarray(action))
        capacities.append(memory.capacity)
    return np.stack(actions, 1), capacities


@pytest.mark.parametrize(SETTINGS, [*VARIANTS[:3], *(slow(*one) for one in VARIANTS[3:])])
def test_cached_equals_full_forward_pass(token_set, head, timestep, trajectory, heads, policy, context, actions, quick):
    count, kv_heads = HEADS[heads]
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


def test_first_step_changes_the_last_action(policy, context, changed, quick):
    """The cache is read, not only written."""
    made, whole = policy(token_set="at5"), context(5)
    other = changed(whole, "reward", 0)
    a, b = (rolled_out(made, x, 32, quick)[0] for x in (whole, other))
    np.testing.assert_array_equal(a[:, 0], b[:, 0])
    assert np.abs(a[:, -1] - b[:, -1]).max() > 1e-4


def test_growing_keeps_the_cached_tokens(policy, context, quick):
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


def test_bfloat16_cache_approximates_the_full_pass(policy, context, actions, quick):
    made, whole = policy(dtype="bfloat16"), context(STEPS)
    memory = made.reset(2, 64)
    assert {x.dtype for x in memory.keys + memory.values} == {jnp.dtype(jnp.bfloat16)}
    found, _ = rolled_out(made, whole, 64, quick)
    np.testing.assert_allclose(found, actions(made, whole), atol=0.03)


PROMPT = 5  # steps, in trajectories of 4: the prompt ends within a trajectory


def lengthened(policy, context: Context, capacity: int, jit, parallel=ONE_DEVICE) -> tuple[np.ndarray, KVCache]:
    """Return the actions (B, T - PROMPT, A) after the prompt of the first context, and the prefix."""
    graph, state = nnx.split(policy)
    prompt = jax.tree.map(lambda x: x[:1, :PROMPT], context)
    prefix = jit(lambda state, prompt: nnx.merge(graph, state).prefill(prompt))(state, prompt)
    act = jit(lambda state, *arguments: nnx.merge(graph, state).act(*arguments))
    memory, previous, actions = policy.reset(len(context.reward), capacity), None, []
    for t in range(PROMPT, context.reward.shape[1]):
        if (t - PROMPT + 1) * policy.tokens_per_step > memory.capacity:
            memory = grow(memory, 2 * memory.capacity, parallel)
        action, memory = act(state, previous, step(context, t), memory, prefix)
        previous = step(context, t)
        actions.append(np.asarray(action))
    return np.stack(actions, 1), prefix


def alike(context: Context) -> Context:
    """Return contexts that all begin with the prompt of the first context."""
    context = jax.tree.map(np.array, context)
    for x in jax.tree.leaves(context):
        x[:, :PROMPT] = x[:1, :PROMPT]
    first = jax.tree.leaves(context.previous), (context.action, context.reward, context.completion)
    for before, x in zip(*first, strict=True):
        before[:, PROMPT] = x[:, PROMPT - 1]
    return context


@pytest.mark.parametrize(SETTINGS, [slow(*one) if number != 1 else one for number, one in enumerate(VARIANTS[:4])])
def test_prefilled_prompt_equals_full_forward_pass(
    token_set, head, timestep, trajectory, heads, policy, context, actions, quick
):
    count, kv_heads = HEADS[heads]
    made = policy(
        token_set=token_set, action_head=head, heads=count, kv_heads=kv_heads,
        timestep_embedding=timestep, trajectory_embedding=trajectory,
    )  # fmt: skip
    whole = alike(context(PROMPT + STEPS, batch=3))
    expected = actions(made, whole)[:, PROMPT:]
    found, _ = lengthened(made, whole, STEPS // 2 * made.tokens_per_step, quick)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(found[0] - found[1]).max() > 0.05, "the contexts differ after the prompt"


def test_a_chunk_equals_token_by_token(policy, quick):
    transformer = policy(layers=2).transformer
    decode = quick(transformer.decode)
    x = np.random.default_rng(0).normal(size=(2, 9, 16)).astype(np.float32)
    together, held = decode(x, transformer.empty_cache(2, 16))
    one_by_one, cache = [], transformer.empty_cache(2, 16)
    for token in range(9):
        y, cache = decode(x[:, token : token + 1], cache)
        one_by_one.append(y)
    np.testing.assert_allclose(np.concatenate(one_by_one, 1), together, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(cache.keys[1], held.keys[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("token_set", "layout", "capacity"),
    [("at5", "zigzag", 16), slow("fused1", "contiguous", 8), slow("dt3", "striped", 8)],
)
def test_sharded_cache_equals_one_device(token_set, layout, capacity, policy, context, actions, quick, eight_devices):
    """Each of eight devices holds an eighth of prompt and cache."""
    mesh = jax.make_mesh((1, 1, 1, 8), MESH_AXES, (AxisType.Auto,) * 4)
    parallel = Parallel(mesh, layout)
    one = policy(token_set=token_set, layers=1)
    whole = alike(context(PROMPT + 4, batch=2))
    sharded = policy(parallel=parallel, token_set=token_set, layers=1)
    found, prefix = lengthened(sharded, whole, capacity, quick, parallel)
    np.testing.assert_allclose(found, actions(one, whole)[:, PROMPT:], rtol=1e-5, atol=1e-5)
    memory = sharded.reset(2, 4096)
    for cache in (memory, prefix):
        for x in cache.keys + cache.values:
            assert {shard.data.nbytes * 8 for shard in x.addressable_shards} == {x.nbytes}
