"""Rollouts in real environments: returns, what policies are told, and the cache against the full forward pass."""

import gymnasium
import jax
import numpy as np
import pytest
from flax import nnx
from gymnasium.vector import AutoresetMode

from ringrl.config import ModelConfig
from ringrl.context import Context
from ringrl.data.normalisation import Normalisation
from ringrl.envs import DOMAINS, make_vec
from ringrl.errors import UserError
from ringrl.evaluation.actors import SMALLEST_CACHE, Actor, PolicyActor, RandomActor
from ringrl.evaluation.rollout import Group, rollout
from ringrl.model import Policy, make_policy

TASK, JACO = "jaco_reach_top_left", DOMAINS["jaco"]
LENGTH = JACO.episode_length
NORMALISATION = Normalisation(np.linspace(-0.5, 0.5, 42), np.linspace(0.5, 2, 42), LENGTH)
SEED = 11


class Recorder:
    """Passes everything on to another actor and keeps it."""

    def __init__(self, actor: Actor) -> None:
        self.actor, self.steps, self.actions, self.started = actor, [], [], []

    def start(self, num_environments: int, num_steps: int, prompt: Context | None = None) -> None:
        self.started.append((num_environments, num_steps))
        self.actor.start(num_environments, num_steps, prompt)

    def act(self, current: Context) -> np.ndarray:
        for name in ("action", "reward", "completion"):
            assert (getattr(current, name) == 0).all(), "what is not known yet is zero"
        self.actions.append(self.actor.act(current))
        return self.actions[-1]

    def observe(self, finished: Context) -> None:
        self.steps.append(finished)
        self.actor.observe(finished)

    @property
    def context(self) -> Context:
        """All that was observed, as one context."""
        return jax.tree.map(lambda *arrays: np.concatenate(arrays, axis=1), *self.steps)


class Scripted:
    """Acts by a table (steps, environments, action)."""

    def __init__(self, actions: np.ndarray) -> None:
        self.left = list(actions)

    def start(self, num_environments: int, num_steps: int, prompt: Context | None = None) -> None: ...

    def act(self, current: Context) -> np.ndarray:
        return self.left.pop(0)

    def observe(self, finished: Context) -> None: ...


def tiny(**settings: object) -> Policy:
    config = {"layers": 1, "width": 16, "heads": 2, "token_set": "at5", "timestep_embedding": True} | settings
    return make_policy(ModelConfig.model_validate(config), JACO.observation_size, JACO.action_size, seed=0)


def run(actor: Actor, environments: int = 2, **options) -> np.ndarray:
    """Returns in jaco."""
    vector = make_vec(TASK, environments, seed=0)
    options = {"episodes": 1, "target_return": 100.0, "seed": SEED} | options
    try:
        return rollout([Group(actor, vector)], NORMALISATION, **options)
    finally:
        vector.close()


@pytest.fixture(scope="module")
def two_random_episodes() -> tuple[np.ndarray, Recorder, list[np.ndarray]]:
    """Returns of two random episodes in each of two environments, all that was seen, and the returns as reported."""
    recorder, reported = Recorder(RandomActor(JACO.action_size, seed=5)), []
    returns = run(recorder, episodes=2, target_return=3.0, on_episode=lambda x: reported.append(x.returns))
    return returns, recorder, reported


@pytest.fixture(scope="module")
def plain_loop() -> dict[str, np.ndarray]:
    """The same two episodes without any of the code under test."""
    randoms, vector = [np.random.default_rng(5), np.random.default_rng(6)], make_vec(TASK, 2, seed=0)
    rows: dict[str, list] = {"observation": [], "action": [], "reward": []}
    for episode in range(2):
        observation, _ = vector.reset(seed=SEED if episode == 0 else None)
        for _ in range(LENGTH):
            action = np.stack([random.uniform(-1, 1, 9) for random in randoms]).astype(np.float32)
            rows["observation"].append(observation)
            observation, reward, _, truncated, _ = vector.step(action)
            rows["action"].append(action)
            rows["reward"].append(reward)
        assert truncated.all()
    vector.close()
    return {name: np.stack(values, axis=1) for name, values in rows.items()}


def test_returns_equal_a_plain_loop(two_random_episodes, plain_loop):
    returns, recorder, reported = two_random_episodes
    expected = plain_loop["reward"].reshape(2, 2, LENGTH).sum(-1)
    assert (expected > 0).any()
    np.testing.assert_allclose(returns, expected, rtol=1e-12)
    np.testing.assert_array_equal(np.stack(reported, axis=1), returns)
    assert recorder.started == [(2, 2 * LENGTH)]


def test_what_the_policy_is_told(two_random_episodes, plain_loop):
    """Normalised observations, actions and rewards as they were, and the return still asked for, in each episode."""
    _, recorder, _ = two_random_episodes
    context = recorder.context
    np.testing.assert_array_equal(context.observation, NORMALISATION.observation(plain_loop["observation"]))
    np.testing.assert_array_equal(context.action, plain_loop["action"])
    reward = plain_loop["reward"].reshape(2, 2, LENGTH)
    np.testing.assert_array_equal(context.reward, reward.reshape(2, -1).astype(np.float32))
    earned_before = np.cumsum(reward, axis=-1) - reward
    np.testing.assert_allclose(context.return_to_go, ((3.0 - earned_before) / LENGTH).reshape(2, -1), rtol=1e-5)
    np.testing.assert_array_equal(context.timestep, np.tile(np.arange(LENGTH), (2, 2)))
    np.testing.assert_array_equal(context.trajectory, np.tile(np.repeat([0, 1], LENGTH), (2, 1)))
    last = np.arange(2 * LENGTH) % LENGTH == LENGTH - 1
    completed = np.repeat(reward.sum(-1) >= 3.0, LENGTH, axis=1)
    assert 0 < completed.mean() < 1, "some episodes reach the target, some do not"
    np.testing.assert_array_equal(context.completion, completed & last)
    np.testing.assert_array_equal(context.position, np.tile(np.arange(2 * LENGTH), (2, 1)))
    assert (context.weight == 1).all()
    for name in ("action", "reward", "completion"):  # of the step before, over the end of an episode too
        x, before = getattr(context, name), getattr(context.previous, name)
        assert not before[:, 0].any()
        np.testing.assert_array_equal(before[:, 1:], x[:, :-1], err_msg=name)


@pytest.mark.parametrize("settings", [{"token_set": "at5"}, {"token_set": "fused1", "trajectory_embedding": True}])
def test_actions_equal_the_full_forward_pass_at_every_position(settings):
    """Two episodes in one context, over every growth of the cache."""
    policy = tiny(**settings)
    recorder = Recorder(PolicyActor(policy))
    run(recorder, episodes=2 if policy.tokens_per_step == 5 else 3)
    context = recorder.context
    tokens = context.reward.shape[1] * policy.tokens_per_step
    assert tokens > (4 if policy.tokens_per_step == 5 else 1) * SMALLEST_CACHE, "the cache grew"
    graph, state = nnx.split(policy)
    expected = jax.jit(lambda state, context: nnx.merge(graph, state).actions(context))(state, context)
    found = np.stack(recorder.actions, axis=1)
    np.testing.assert_array_equal(found, context.action)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(found[:, 0] - found[:, -1]).max() > 1e-3


def replayed(actor: Actor, context: Context) -> np.ndarray:
    """Actions (B, T, A) of an actor to which the same happens again."""
    batch, time = context.reward.shape
    actor.start(batch, time)
    actions = []
    for t in range(time):
        step = jax.tree.map(lambda x, t=t: x[:, t : t + 1], context)
        actions.append(actor.act(step))
        actor.observe(step)
    return np.stack(actions, axis=1)


@pytest.mark.parametrize("rows", [[2, 0, 1], [1]], ids=["permuted", "alone"])
def test_a_policy_acts_alike_at_any_place_of_a_batch(rows, two_random_episodes):
    """Replayed and not rolled out again: contacts would blow up what float32 rounds differently."""
    _, recorder, _ = two_random_episodes
    contexts = jax.tree.map(lambda x: np.concatenate([x[:, :300], x[:1, 200:500]]), recorder.context)
    actor = PolicyActor(tiny(token_set="ring4"))
    whole, some = replayed(actor, contexts), replayed(actor, jax.tree.map(lambda x: x[rows], contexts))
    np.testing.assert_allclose(some, whole[rows], rtol=1e-5, atol=1e-5)
    assert all(np.abs(whole[i] - whole[j]).max() > 1e-3 for i, j in ((0, 1), (0, 2), (1, 2)))


def test_environments_of_a_batch_do_not_know_each_other():
    actions = np.random.default_rng(0).uniform(-1, 1, (LENGTH, 3, JACO.action_size)).astype(np.float32)
    together = run(Scripted(actions), environments=3)
    for i in range(3):
        alone = run(Scripted(actions[:, i : i + 1]), environments=1, seed=SEED + i)
        np.testing.assert_array_equal(alone[0], together[i])
    assert len(set(together[:, 0])) == 3


def test_an_actor_starts_anew_with_every_rollout():
    actor = PolicyActor(tiny(token_set="fused1"))
    np.testing.assert_array_equal(run(actor), run(actor))


def test_behaviour_cloning_rolls_out():
    policy = tiny(kind="behaviour_cloning")
    recorder = Recorder(PolicyActor(policy))
    run(recorder)
    expected = policy.actions(recorder.context)
    np.testing.assert_allclose(recorder.context.action, expected, rtol=1e-5, atol=1e-5)


def test_trajectory_index_stays_below_what_was_trained():
    recorder = Recorder(RandomActor(JACO.action_size, seed=0))
    run(recorder, environments=1, episodes=3, trajectories=2)
    assert recorder.context.trajectory[0, ::LENGTH].tolist() == [0, 1, 1]


def test_without_a_seed_the_environments_go_on():
    actions = np.zeros((2 * LENGTH, 1, JACO.action_size), np.float32)
    vector = make_vec(TASK, 1, seed=3)
    recorder = Recorder(Scripted(actions))
    for _ in range(2):
        rollout([Group(recorder, vector)], NORMALISATION, episodes=1, target_return=1.0)
    first, second = recorder.context.observation[0, 0], recorder.context.observation[0, LENGTH]
    np.testing.assert_allclose(first, NORMALISATION.observation(make_vec(TASK, 1, seed=3).reset()[0][0]))
    assert (first != second).any()


class Breaking(gymnasium.Env):
    """Three steps; the third one's observation or reward is not a number."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (42,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (9,), np.float32)

    def __init__(self, observation: float, reward: float) -> None:
        self.last, self.steps = (observation, reward), 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(42, np.float32), {}

    def step(self, action):
        self.steps += 1
        observation, reward = self.last if self.steps == 3 else (0.0, 0.0)
        return np.full(42, observation, np.float32), reward, False, self.steps == 3, {}


@pytest.mark.parametrize(("observation", "reward"), [(np.nan, 0.0), (0.0, np.nan), (np.inf, 0.0)])
def test_numbers_that_are_not_finite_are_refused(observation, reward):
    fine, breaking = (lambda: Breaking(0, 0)), (lambda: Breaking(observation, reward))
    vector = gymnasium.vector.SyncVectorEnv([fine, breaking], autoreset_mode=AutoresetMode.DISABLED)
    normalisation = Normalisation(NORMALISATION.mean, NORMALISATION.std, 3)
    with pytest.raises(UserError, match=r"not finite \(episode 0, step 2\)"):
        rollout([Group(RandomActor(9, 0), vector)], normalisation, episodes=1, target_return=1.0)


@pytest.mark.parametrize("length", [LENGTH - 1, LENGTH + 1])
def test_episodes_of_another_length_than_the_datas_are_refused(length):
    vector = make_vec(TASK, 1, seed=0)
    normalisation = Normalisation(NORMALISATION.mean, NORMALISATION.std, length)
    with pytest.raises(UserError, match="episodes end after"):
        rollout([Group(RandomActor(9, 0), vector)], normalisation, episodes=1, target_return=1.0)
