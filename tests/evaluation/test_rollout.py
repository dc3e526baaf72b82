"""Rollouts in real environments: returns, inputs of the policy, and the cache against the full forward pass."""

import jax
import numpy as np
import pytest
from flax import nnx

from ringrl.context import Context
from ringrl.data.sampling.normalisation import Normalisation
from ringrl.envs import make_vec
from ringrl.errors import UserError
from ringrl.evaluation.actors import SMALLEST_CACHE, Actor, CompiledPolicy, PolicyActor, RandomActor
from ringrl.evaluation.rollout import EpisodeBatch, Group, rollout
from tests.evaluation.rollouts import (
    ARRAYS,
    JACO,
    LENGTH,
    NORMALISATION,
    SEED,
    SHORT,
    TASK,
    RecordingActor,
    assert_same,
    play,
    seeds,
    tiny,
)


class Scripted:
    """Acts by a table (steps, environments, action)."""

    def __init__(self, actions: np.ndarray) -> None:
        self.left = list(actions)

    def start(self, num_environments: int, num_steps: int, prompt: Context | None = None) -> None: ...

    def act(self, current: Context) -> np.ndarray:
        return self.left.pop(0)

    def observe(self, finished: Context) -> None: ...


def run(actor: Actor, environments: int = 2, episodes: int = 1, first: int = SEED, **options) -> np.ndarray:
    """Returns in jaco."""
    vector = make_vec(TASK, environments, seed=0)
    options = {"target_return": 100.0, "seeds": seeds(environments, episodes, first)} | options
    try:
        return rollout([Group(actor, vector)], NORMALISATION, **options)
    finally:
        vector.close()


@pytest.fixture(scope="module")
def two_random_episodes() -> tuple[np.ndarray, RecordingActor, list[np.ndarray]]:
    """Returns of two random episodes in each of two environments, the observed context, and the reported returns."""
    recorder, reported = RecordingActor(RandomActor(JACO.action_size, seed=5)), []
    returns = run(recorder, episodes=2, target_return=3.0, on_episode=lambda x: reported.append(x.returns))
    return returns, recorder, reported


@pytest.fixture(scope="module")
def plain_loop() -> dict[str, np.ndarray]:
    """The same two episodes without any of the code under test."""
    randoms, vector = [np.random.default_rng(5), np.random.default_rng(6)], make_vec(TASK, 2, seed=0)
    rows: dict[str, list] = {"observation": [], "action": [], "reward": []}
    for episode in range(2):
        observation, _ = vector.reset(seed=seeds(2, 2)[:, episode].tolist())
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


def test_the_inputs_of_the_policy(two_random_episodes, plain_loop):
    """Normalised observations, actions, rewards, returns-to-go and completions of each episode."""
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
    for name in ("action", "reward", "completion"):  # of the step before, also across episodes
        x, before = getattr(context, name), getattr(context.previous, name)
        assert not before[:, 0].any()
        np.testing.assert_array_equal(before[:, 1:], x[:, :-1], err_msg=name)


@pytest.mark.parametrize(
    "settings",
    [pytest.param({"token_set": "at5"}, marks=pytest.mark.slow), {"token_set": "fused1", "trajectory_embedding": True}],
)
def test_actions_equal_the_full_forward_pass_at_every_position(settings):
    """Several episodes in one context, across every growth of the cache."""
    policy = tiny(**settings)
    recorder = RecordingActor(PolicyActor(CompiledPolicy(policy)))
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
    """Return actions (B, T, A) of an actor on a given context."""
    batch, time = context.reward.shape
    actor.start(batch, time)
    actions = []
    for t in range(time):
        step = jax.tree.map(lambda x, t=t: x[:, t : t + 1], context)
        actions.append(actor.act(step))
        actor.observe(step)
    return np.stack(actions, axis=1)


@pytest.mark.parametrize("rows", [[2, 0, 1], pytest.param([1], marks=pytest.mark.slow)], ids=["permuted", "alone"])
def test_actions_do_not_depend_on_the_position_in_the_batch(rows, two_random_episodes):
    """On given states: in a simulation, contacts amplify rounding."""
    _, recorder, _ = two_random_episodes
    contexts = jax.tree.map(lambda x: np.concatenate([x[:, :300], x[:1, 200:500]]), recorder.context)
    actor = PolicyActor(CompiledPolicy(tiny(token_set="ring4")))
    whole, some = replayed(actor, contexts), replayed(actor, jax.tree.map(lambda x: x[rows], contexts))
    np.testing.assert_allclose(some, whole[rows], rtol=1e-5, atol=1e-5)
    assert all(np.abs(whole[i] - whole[j]).max() > 1e-3 for i, j in ((0, 1), (0, 2), (1, 2)))


def test_environments_of_a_batch_are_independent():
    actions = np.random.default_rng(0).uniform(-1, 1, (LENGTH, 3, JACO.action_size)).astype(np.float32)
    together = run(Scripted(actions), environments=3)
    for i in range(3):
        alone = run(Scripted(actions[:, i : i + 1]), environments=1, first=SEED + i)
        np.testing.assert_array_equal(alone[0], together[i])
    assert len(set(together[:, 0])) == 3


def test_every_rollout_clears_the_memory():
    actor = PolicyActor(CompiledPolicy(tiny(token_set="fused1")))
    np.testing.assert_array_equal(run(actor), run(actor))


def test_behaviour_cloning_rolls_out():
    policy = tiny(kind="behaviour_cloning")
    recorder = RecordingActor(PolicyActor(CompiledPolicy(policy)))
    run(recorder)
    expected = policy.actions(recorder.context)
    np.testing.assert_allclose(recorder.context.action, expected, rtol=1e-5, atol=1e-5)


def test_the_trajectory_index_is_clipped():
    recorder = RecordingActor(RandomActor(JACO.action_size, seed=0))
    run(recorder, environments=1, episodes=3, trajectories=2)
    assert recorder.context.trajectory[0, ::LENGTH].tolist() == [0, 1, 1]


@pytest.mark.parametrize("broken", [(np.nan, 0.5), (0.0, np.nan), (np.inf, 0.5), (0.0, -np.inf)])
@pytest.mark.parametrize("at", [0, 2, 3])
def test_a_number_that_is_not_finite_ends_its_stream_only(broken, at, drift):
    whole, _, expected = play([drift(None, None, None)])
    returns, played, observed = play([drift(None, {"breaks": broken, "episode": 1, "at": at}, None)])
    np.testing.assert_array_equal(returns[[0, 2]], whole[[0, 2]])
    assert returns[1, 0] == whole[1, 0]
    assert np.isnan(returns[1, 1:]).all()
    assert [episode.steps.tolist() for episode in played] == [[4, 4, 4], [4, at, 4], [4, 0, 4]]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(observed)), "the policy receives finite numbers only"
    assert_same(jax.tree.map(lambda x: x[[0, 2]], observed), jax.tree.map(lambda x: x[[0, 2]], expected))
    assert not observed.observation[1, 4 + at + 1 :].any()
    assert not observed.reward[1, 4 + at :].any()
    assert observed.observation[1, 4 + at].any()


def test_an_unstable_simulation_has_no_return():
    class Kicked(RandomActor):
        def observe(self, finished):
            if finished.timestep[0, 0] == 10:
                vector._datas[0].qpos[:] = 1e12

    vector = make_vec(TASK, 2, seed=0)
    found: list[EpisodeBatch] = []
    groups = [Group(Kicked(9, 0), vector)]
    returns = rollout(groups, NORMALISATION, seeds=seeds(2), target_return=1.0, on_episode=found.append)
    assert np.isnan(returns[0, 0])
    assert np.isfinite(returns[1, 0])
    assert found[0].steps.tolist() == [11, LENGTH]
    assert np.isfinite(found[0].physics[:12]).all()
    assert np.isnan(found[0].physics[12:, 0]).all()


@pytest.mark.parametrize("sizes", [(2, 2), (1, 3), (1, 1, 2)])
def test_groups_in_turn_play_the_same_episodes(sizes, drift):
    breaks = [None, {"breaks": (np.nan, 0.0), "episode": 1}, None, None]
    whole, episodes, expected = play([drift(*breaks)])
    cuts = np.split(np.array(breaks, object), np.cumsum(sizes)[:-1])
    returns, in_groups, observed = play([drift(*cut) for cut in cuts])
    np.testing.assert_array_equal(returns, whole)
    assert_same(observed, expected)
    for one, other in zip(in_groups, episodes, strict=True):
        assert_same([getattr(one, name) for name in ARRAYS], [getattr(other, name) for name in ARRAYS])


def test_groups_request_actions_before_they_wait(drift):
    """The actions of one group are computed while the other group is simulated."""
    order: list[str] = []

    class Pending:
        def __init__(self, name: str) -> None:
            self.name = name

        def __array__(self, dtype=None, copy=None):
            order.append(f"await {self.name}")
            return np.zeros((1, 9), np.float32)

    class Asked(RandomActor):
        def __init__(self, name: str) -> None:
            self.name = name

        def start(self, num_environments, num_steps, prompt=None): ...

        def act(self, current):
            order.append(f"ask {self.name}")
            return Pending(self.name)

    groups = [Group(Asked(name), drift(None)) for name in "ab"]
    rollout(groups, SHORT, seeds=seeds(2), target_return=1.0)
    assert order[:8] == ["ask a", "ask b", "await a", "ask a", "await b", "ask b", "await a", "ask a"]
    assert order[-2:] == ["await a", "await b"]


def test_without_a_target_return_to_go_is_zero(drift):
    _, _, observed = play([drift(None)], target_return=None)
    assert not observed.return_to_go.any()
    assert not observed.completion.any()
    _, _, observed = play([drift(None)], target_return=0.0)
    assert observed.return_to_go.any()
    assert observed.completion.any()


def prompt_of(context: Context) -> Context:
    return jax.tree.map(lambda x: x[1:2, : 2 * LENGTH], context)


def test_positions_continue_after_a_prompt(two_random_episodes, drift):
    prompt = prompt_of(two_random_episodes[1].context)
    _, _, observed = play([drift(None, None)], episodes=2, prompt=prompt, trajectories=4)
    np.testing.assert_array_equal(observed.position, np.tile(2 * LENGTH + np.arange(8), (2, 1)))
    np.testing.assert_array_equal(observed.trajectory, np.tile(np.repeat([2, 3], 4), (2, 1)))
    np.testing.assert_array_equal(observed.timestep, np.tile(np.arange(4), (2, 2)))
    for name in ("action", "reward", "completion"):
        last = np.repeat(getattr(prompt, name)[:, -1:], 2, axis=0)
        np.testing.assert_array_equal(getattr(observed.previous, name)[:, :1], last, err_msg=name)
    recorder = RecordingActor(RandomActor(9, 0))
    rollout([Group(recorder, drift(None))], SHORT, seeds=seeds(1), target_return=1.0, prompt=prompt, trajectories=2)
    assert recorder.started == [(1, 4)], "without the steps of the prompt"
    assert (recorder.context.trajectory == 1).all()


@pytest.mark.parametrize("token_set", ["at5", pytest.param("fused1", marks=pytest.mark.slow)])
def test_actions_after_a_prompt_equal_the_full_forward_pass(token_set, two_random_episodes, drift):
    policy = tiny(token_set=token_set, trajectory_embedding=True)
    prompt = jax.tree.map(lambda x: x[:, LENGTH - 150 :], prompt_of(two_random_episodes[1].context))
    prompt = prompt._replace(position=prompt.position - prompt.position[0, 0])
    prompt = prompt._replace(
        previous=jax.tree.map(lambda x: np.concatenate([0 * x[:, :1], x[:, 1:]], 1), prompt.previous)
    )
    recorder = RecordingActor(PolicyActor(CompiledPolicy(policy)))
    rollout([Group(recorder, drift(None, None))], SHORT, seeds=seeds(2, 2), target_return=2.0, prompt=prompt)
    both = jax.tree.map(lambda x, y: np.concatenate([np.repeat(x, 2, axis=0), y], axis=1), prompt, recorder.context)
    expected = policy.actions(both)[:, prompt.reward.shape[1] :]
    np.testing.assert_allclose(recorder.context.action, expected, rtol=1e-5, atol=1e-5)
    unprompted = policy.actions(recorder.context)
    assert np.abs(unprompted - expected).max() > 1e-3


@pytest.mark.parametrize("length", [LENGTH - 1, LENGTH + 1])
def test_episodes_of_another_length_raise(length):
    vector = make_vec(TASK, 1, seed=0)
    normalisation = Normalisation(NORMALISATION.mean, NORMALISATION.std, length)
    with pytest.raises(UserError, match=r"episodes (end|do not end) after"):
        rollout([Group(RandomActor(9, 0), vector)], normalisation, seeds=seeds(1), target_return=1.0)
