"""Actors: few compiled programs, growing caches, and prompts."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from ringrl.config import ModelConfig
from ringrl.context import Context, Outcome
from ringrl.evaluation import actors
from ringrl.evaluation.actors import Actor, CloneActor, CompiledPolicy, CopyActor, PolicyActor, SegmentActor
from ringrl.model import Policy, make_policy
from ringrl.model.parallel import MESH_AXES, ONE_DEVICE, Parallel

OBSERVATION, ACTION = 3, 2
slow = partial(pytest.param, marks=pytest.mark.slow)


def policy(**settings: Any) -> Policy:
    layers = max(1, len(settings.get("episode_window", ())))
    config = {"layers": layers, "width": 16, "heads": 2, "token_set": "at5"} | settings
    return make_policy(ModelConfig.model_validate(config), OBSERVATION, ACTION, seed=0)


def full_pass(made: Policy) -> Callable[[Context], jax.Array]:
    """Return the compiled function from a context to the actions (B, T, A) of a policy."""
    graph, state = nnx.split(made)
    run = jax.jit(lambda state, context: nnx.merge(graph, state).actions(context))
    return lambda context: run(state, context)


def contexts(batch: int, time: int) -> Context:
    random = np.random.default_rng(0)
    normal = lambda *shape: random.normal(size=(batch, time, *shape)).astype(np.float32)  # noqa: E731
    outcome = Outcome(np.tanh(normal(ACTION)), normal(), normal())
    previous = jax.tree.map(lambda x: np.concatenate([np.zeros_like(x[:, :1]), x[:, :-1]], axis=1), outcome)
    index = np.tile(np.arange(time, dtype=np.int32), (batch, 1))
    weight = np.ones((batch, time), np.float32)
    return Context(
        normal(OBSERVATION),
        *outcome[:2],
        normal(),
        outcome.completion,
        index,
        index // 4,
        index,
        index - index % 4,
        weight,
        previous,
    )


def replayed(actor: Actor, context: Context, prompt: Context | None = None) -> np.ndarray:
    """Return actions (B, T, A) on a given context."""
    batch, time = context.reward.shape
    actor.start(batch, time, prompt)
    actions = []
    for t in range(time):
        step = jax.tree.map(lambda x, t=t: x[:, t : t + 1], context)
        actions.append(np.asarray(actor.act(step)))
        actor.observe(step)
    return np.stack(actions, axis=1)


def test_the_nearest_step_of_the_prompt_is_copied() -> None:
    prompt, live = contexts(1, 12), contexts(5, 3)
    expected = [
        [prompt.action[0, np.square(prompt.observation[0] - now).sum(-1).argmin()] for now in row]
        for row in live.observation
    ]
    np.testing.assert_array_equal(replayed(CopyActor(), live, prompt), expected)


def test_the_prompt_is_cloned(monkeypatch) -> None:
    """Actions of the prompt that depend on the observation are learned, and other observations are interpolated."""
    monkeypatch.setattr(actors, "CLONE_STEPS", 700)
    prompt, live = contexts(1, 350), contexts(5, 3)
    rule = lambda x: np.tanh(x[..., :1] - 0.5 * x[..., 1:2]).repeat(prompt.action.shape[-1], -1)  # noqa: E731
    prompt.action[:] = rule(prompt.observation)
    prompt.observation[:, 300:] += 4  # the last steps are elsewhere, and act otherwise
    prompt.action[:, 300:] = -0.8
    actor = CloneActor()
    learned = replayed(actor, live, prompt)
    assert np.sqrt(np.square(learned - rule(live.observation)).mean()) < 0.03 < rule(live.observation).std()
    moved = actor.act(live._replace(observation=live.observation + 4))
    np.testing.assert_allclose(moved, -0.8, atol=0.3)


@pytest.fixture
def small_cache(monkeypatch) -> None:
    """Initial capacity of ten tokens, two steps."""
    monkeypatch.setattr(actors, "SMALLEST_CACHE", 10)


@pytest.mark.parametrize("windows", [slow([]), [3, 1], slow([0, None])])
def test_actions_on_either_side_of_every_capacity(windows, small_cache):
    made, whole = policy(episode_window=windows), contexts(2, 17)
    compiled, expected = CompiledPolicy(made), full_pass(made)(whole)
    for steps in (2, 3, 4, 5, 16, 17):
        found = replayed(PolicyActor(compiled), jax.tree.map(lambda x, steps=steps: x[:, :steps], whole))
        np.testing.assert_allclose(found, expected[:, :steps], rtol=1e-5, atol=1e-5)


def test_one_program_per_capacity_and_one_for_the_first_step(small_cache):
    compiled = CompiledPolicy(policy())
    actor = PolicyActor(compiled)
    context = contexts(2, 30)  # 150 tokens: capacities 10, 20, 40, 80, 150
    first = replayed(actor, context)
    assert compiled.act.func._cache_size() == 6
    np.testing.assert_array_equal(replayed(actor, context), first)
    np.testing.assert_array_equal(replayed(PolicyActor(compiled), context), first)
    assert compiled.act.func._cache_size() == 6, "a second rollout and a second actor compile nothing"


def test_capacities_that_are_not_reached_are_not_compiled(small_cache):
    compiled = CompiledPolicy(policy())
    actor = PolicyActor(compiled)
    actor.start(2, 1000)
    step = jax.tree.map(lambda x: x[:, :1], contexts(2, 1))
    for _ in range(3):
        actor.act(step)
        actor.observe(step)
    assert compiled.act.func._cache_size() == 3, "first step, 10 tokens, and 20 tokens"


@pytest.mark.parametrize(("token_set", "windows"), [slow("at5", []), slow("fused1", []), ("ring4", [3, 1])])
def test_a_prompt_is_shared_by_all_environments(token_set, windows, small_cache):
    """Three contexts share six steps, the prompt, whose cache has one row; five steps follow."""
    made, whole = policy(token_set=token_set, episode_window=windows), contexts(3, 11)
    for x in jax.tree.leaves(whole):
        x[:, :6] = x[:1, :6]
    for before, x in zip(whole.previous, (whole.action, whole.reward, whole.completion), strict=True):
        before[:, 6] = x[:, 5]
    prompt, live = (jax.tree.map(lambda x, part=part: x[part], whole) for part in (np.s_[:1, :6], np.s_[:, 6:]))
    actor = PolicyActor(CompiledPolicy(made))
    found = replayed(actor, live, prompt)
    np.testing.assert_allclose(found, full_pass(made)(whole)[:, 6:], rtol=1e-5, atol=1e-5)
    assert actor._prefix.keys[0].shape[0] == 1
    assert np.abs(found - replayed(actor, live)).max() > 1e-3, "the prompt changes the actions"
    np.testing.assert_array_equal(replayed(actor, live, prompt), found)


def test_behaviour_cloning_ignores_a_prompt():
    made, context = policy(kind="behaviour_cloning"), contexts(2, 4)
    found = replayed(PolicyActor(CompiledPolicy(made)), context, contexts(1, 3))
    np.testing.assert_allclose(found, made.actions(context), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_growing_over_a_mesh(small_cache, eight_devices):
    """Three devices; capacities are rounded up: 12, 21, 42, ... tokens."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:3]).reshape(1, 1, 1, 3), MESH_AXES)
    parallel = Parallel(mesh)
    context = contexts(2, 14)
    for x in jax.tree.leaves(context):
        x[:, :6] = x[:1, :6]
    for before, x in zip(context.previous, (context.action, context.reward, context.completion), strict=True):
        before[:, 6] = x[:, 5]
    config = ModelConfig(layers=1, width=24, heads=2, token_set="at5")
    one, divided = (make_policy(config, OBSERVATION, ACTION, 0, parallel=where) for where in (ONE_DEVICE, parallel))
    live = jax.tree.map(lambda x: x[:, 6:], context)
    prompt = jax.tree.map(lambda x: x[:1, :6], context)
    found = replayed(PolicyActor(CompiledPolicy(divided, parallel=parallel)), live, prompt)
    np.testing.assert_allclose(found, full_pass(one)(context)[:, 6:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("token_set", [slow("ring4"), "fused1"])
def test_a_policy_of_segments_sees_the_prompt_and_the_last_steps(token_set):
    """Every action equals the one of a whole context that ends with the segment."""
    made, whole, length = policy(token_set=token_set, layers=2), contexts(2, 12), 3
    prompt, live = (jax.tree.map(lambda x, part=part: x[part], whole) for part in (np.s_[:1, :6], np.s_[:, 6:]))
    live = live._replace(timestep=live.position - 6, start=0 * live.start + 6)
    compiled, expected = CompiledPolicy(made), full_pass(made)
    actor = SegmentActor(compiled, length)
    found = replayed(actor, live, prompt)
    for t in range(6):
        segment = jax.tree.map(lambda x, t=t: np.array(x[:, max(0, t - length + 1) : t + 1]), live)
        for x in segment.previous:
            x[:, 0] = 0
        both = jax.tree.map(lambda a, b: np.concatenate([np.repeat(a, 2, axis=0), b], axis=1), prompt, segment)
        both = both._replace(position=np.tile(np.arange(both.reward.shape[1], dtype=np.int32), (2, 1)))
        np.testing.assert_allclose(found[:, t], expected(both)[:, -1], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(replayed(actor, live, prompt), found)
