"""The interface of agents for every kind of model, and weight decay."""

from typing import Any

import jax
import numpy as np
import pytest

from ringrl.config import ContextConfig, TrainConfig
from ringrl.context import Context
from ringrl.data import EpisodeStore
from ringrl.data.sampling.normalisation import Normalisation
from ringrl.data.sampling.sampler import ContextSampler
from ringrl.data.transitions import TransitionSampler
from ringrl.model import Agent, AgenticTransformer, TrainState, make_agent, make_policy

TASK, STEPS = "jaco_reach_top_left", 6
KINDS = ("transformer", "behaviour_cloning", "td3_bc")
STREAMS = 2


@pytest.fixture(scope="module")
def contexts(jaco_store: EpisodeStore) -> ContextSampler:
    return ContextSampler(jaco_store, TASK, ContextConfig(trajectories=1), Normalisation.of(jaco_store), STREAMS, 0)


def config_of(kind: str) -> TrainConfig:
    model = {"kind": kind, "layers": 1, "width": 16, "token_set": "at5", "attention": "vanilla"}
    optimiser = {"steps": 4, "batch_size": STREAMS, "warmup_steps": 0}
    return TrainConfig.model_validate(
        {"data": "unused", "task": TASK, "run": "unused", "model": model, "optimiser": optimiser}
    )


@pytest.fixture(scope="module", params=KINDS)
def agent(request: pytest.FixtureRequest) -> Agent:
    config = config_of(request.param)
    return make_agent(lambda: make_policy(config.model, 42, 9, 0), config)


def batch_for(state: TrainState, contexts: ContextSampler, step: int) -> Any:
    """Return a batch of the agent's sampler from the same data."""
    if "critics" in state.params:
        config = config_of("td3_bc").actor_critic
        made = TransitionSampler(contexts.store, TASK, config, contexts.normalisation, STREAMS, 0)
        return made.batch(step)
    return jax.tree.map(lambda x: x[:, :STEPS], contexts.batch(step))


def steps_of(batch: Context, t: int) -> Context:
    return jax.tree.map(lambda x: x[:, t : t + 1], batch)


def numbers(params: Any) -> list[np.ndarray]:
    return [np.array(x) for x in jax.tree.leaves(params)]


def test_agents_are_stateless(agent: Agent, contexts: ContextSampler) -> None:
    """Two trainings with one agent are identical."""
    runs = []
    for _ in range(2):
        state = agent.init()
        start = numbers(state.params)
        for step in range(2):
            state, metrics = agent.update(state, batch_for(state, contexts, step))
        assert {"loss", "gradient_norm", "skipped"} <= set(metrics)
        assert not int(metrics["skipped"])
        assert int(state.step) == 2
        runs.append((start, numbers(state.params)))
    (first_start, first_end), (second_start, second_end) = runs
    for x, y in zip(first_start + first_end, second_start + second_end, strict=True):
        np.testing.assert_array_equal(x, y)
    assert any(not np.array_equal(x, y) for x, y in zip(first_start, first_end, strict=True))


def test_acting_step_by_step_equals_actions_of_the_context(agent: Agent, contexts: ContextSampler) -> None:
    state, batch = agent.init(), contexts.batch(0)
    state, _ = agent.update(state, batch_for(state, contexts, 0))
    short = jax.tree.map(lambda x: x[:, :STEPS], batch)
    policy, previous = agent.policy(state.params), None
    expected, memory = policy.actions(short), policy.reset(STREAMS, STEPS * policy.tokens_per_step)
    act = jax.jit(lambda params, *arguments: agent.policy(params).act(*arguments))
    for t in range(STEPS):
        current = steps_of(short, t)
        action, memory = act(state.params, previous, current, memory)
        assert action.shape == (STREAMS, 9)
        np.testing.assert_allclose(action, expected[:, t], atol=1e-5)
        previous = current


def test_tokens_per_step(agent: Agent) -> None:
    policy = agent.policy(agent.init().params)
    assert policy.tokens_per_step == (5 if isinstance(policy, AgenticTransformer) else 1)
