"""Environments of other packages equal Gymnasium's own, and copies do not depend on each other."""

import re
import sys
import time

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from ringrl.cli.flags import environment_task
from ringrl.collect import collect
from ringrl.envs import domain_named, domain_of, foreign_spec, foreign_task, load_simulation, make, make_vec
from ringrl.errors import UserError

HOPPER, POLE, PENDULUM = "gymnasium:Hopper-v5", "gymnasium:CartPole-v1", "gymnasium:Pendulum-v1(max_episode_steps=7)"


class Parts(gymnasium.Env):
    """Observations in parts, three choices that begin at 4, and exceptions on demand."""

    observation_space = spaces.Dict(
        {"b": spaces.Box(-1, 1, (2, 2)), "a": spaces.Tuple((spaces.Box(-1, 1, (1,)), spaces.Box(-1, 1, ())))}
    )
    action_space = spaces.Discrete(3, start=4)

    def __init__(self, fails: str = "never", render_mode: None = None) -> None:
        self.fails = fails
        if fails == "start":
            sys.exit(0)

    def close(self):
        if self.fails == "close":
            raise RuntimeError("broken")
        if self.fails == "hang at close":
            time.sleep(30)

    def _observation(self) -> dict:
        if self.fails == "one number":
            return {"b": np.zeros((0, 2), np.float32), "a": (np.zeros(1, np.float32), np.zeros(0, np.float32))}
        return {"b": np.full((2, 2), self.steps / 10, np.float32), "a": (np.zeros(1, np.float32), np.float32(0.5))}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.last = 0, self.np_random.integers(2, 6)
        if self.fails == "reset":
            raise RuntimeError("broken")
        return self._observation(), {}

    def step(self, action):
        assert action in (4, 5, 6)
        self.steps += 1
        if self.fails == "step" and self.steps == 2:
            raise RuntimeError("broken")
        if self.fails == "hang" and self.steps == 2:
            time.sleep(30)
        if self.fails == "exit" and self.steps == 2:
            sys.exit(3)
        return self._observation(), float(action), self.steps == self.last, False, {}


@pytest.fixture(autouse=True)
def registered():
    for name, entry, limit in (
        ("Parts-v0", Parts, 9),
        ("Endless-v0", Parts, None),
        ("Images-v0", lambda render_mode=None: _with(observation_space=spaces.Box(0, 255, (8, 8, 3), np.uint8)), 5),
        ("Unbounded-v0", lambda render_mode=None: _with(action_space=spaces.Box(-np.inf, 1, (2,))), 5),
        ("Many-v0", lambda render_mode=None: _with(action_space=spaces.MultiBinary(3)), 5),
    ):
        gymnasium.register(name, entry, max_episode_steps=limit, disable_env_checker=True, order_enforce=False)
    yield
    for name in ("Parts-v0", "Endless-v0", "Images-v0", "Unbounded-v0", "Many-v0"):
        del gymnasium.registry[name]


def _with(**changed: gymnasium.Space) -> Parts:
    environment = Parts()
    vars(environment).update(changed)
    return environment


def test_an_environment_equals_gymnasiums():
    own, other = make(PENDULUM, seed=3), gymnasium.make("Pendulum-v1", max_episode_steps=7)
    assert own.action_space == spaces.Box(-1, 1, (1,))
    found, (expected, _) = own.reset()[0], other.reset(seed=3)
    random = np.random.default_rng(0)
    for step in range(7):
        np.testing.assert_array_equal(found, expected, strict=True)
        action = random.uniform(-1, 1, 1).astype(np.float32)
        found, reward, terminated, truncated, _ = own.step(action)
        expected, *rest, _ = other.step(2 * action)
        assert [reward, terminated, truncated] == rest
        assert truncated == (step == 6)


def test_the_largest_number_chooses_a_discrete_action():
    domain, environment = domain_of("gymnasium:Parts-v0"), make("gymnasium:Parts-v0", seed=0)
    assert (domain.action_size, domain.is_discrete, domain.episode_length) == (3, True, 9)
    observation, _ = environment.reset()
    assert observation.tolist() == [0, 0.5, 0, 0, 0, 0], "in the order of gymnasium.spaces.flatten"
    rewards = [environment.step(np.array(action))[1] for action in ([0.1, 0, -1], [-1, -0.2, -0.1])]
    assert rewards == [4, 6]


def test_parts_of_observations_are_sorted_by_key_as_in_a_minari_dataset():
    space = spaces.Dict(b=Parts.observation_space["b"], a=Parts.observation_space["a"])
    assert [*space] == ["b", "a"], "keyword arguments are not sorted by Gymnasium"
    gymnasium.registry["Images-v0"].entry_point = lambda render_mode=None: _with(observation_space=space)
    found, expected = (make(f"gymnasium:{name}", seed=0).reset()[0] for name in ("Images-v0", "Parts-v0"))
    np.testing.assert_array_equal(found, expected)


def test_whole_numbers_survive_the_scaling_of_actions():
    taken = []
    space = spaces.Box(0, 10, (1,), np.int64)
    gymnasium.registry["Many-v0"].entry_point = lambda render_mode=None: _with(
        action_space=space, step=lambda action: (taken.append(int(action[0])), make_parts()[0])[1]
    )
    make_parts = lambda: (({"b": np.zeros((2, 2)), "a": (np.zeros(1), 0.0)}, 0.0, False, False, {}),)  # noqa: E731
    environment = make("gymnasium:Many-v0", seed=0)
    environment.reset()
    for choice in range(11):
        environment.step(np.array([(choice - 5) / 5], np.float32))
    assert taken == [*range(11)]


@pytest.mark.parametrize("threads", [1, 3])
def test_copies_equal_single_environments_to_their_ends(threads):
    seeds, actions = [5, 3, 8], np.random.default_rng(1).uniform(-1, 1, (60, 3, 3))
    vector, singles = make_vec(HOPPER, 3, seeds, threads), [make(HOPPER, seed) for seed in seeds]
    observations, _ = vector.reset()
    np.testing.assert_array_equal(observations, [single.reset()[0] for single in singles])
    playing, lengths = [True] * 3, [0] * 3
    for step in range(60):
        observations, rewards, terminated, truncated, _ = vector.step(actions[step])
        for index in np.flatnonzero(playing):
            observation, reward, ends, late, _ = singles[index].step(actions[step, index])
            np.testing.assert_array_equal(observations[index], observation)
            assert (rewards[index], terminated[index], truncated[index]) == (reward, ends, late)
            playing[index], lengths[index] = not ends, step + 1
        if not any(playing):
            break
    assert len(set(lengths)) > 1, "episodes end at different steps"
    assert np.isnan(rewards[np.argmin(lengths)]), "an episode that has ended gives no reward"
    vector.reset(seed=[None, 7, None], options={"reset_mask": np.array([False, True, False])})
    observations, rewards, _, truncated, _ = vector.step(actions[0])
    np.testing.assert_array_equal(truncated, [True, False, True])
    again = make(HOPPER)
    again.reset(seed=7)
    np.testing.assert_array_equal(observations[1], again.step(actions[0, 1])[0])
    vector.close()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("fails", ["step", "reset", "exit", "hang", "one number"])
def test_a_failure_ends_only_its_own_episode(fails, threads):
    vector = make_vec("gymnasium:Parts-v0", 3, [0, 1, 2], threads, timeout=0.3)
    vector._environments[1]._environment.unwrapped.fails = fails
    began = time.monotonic()
    observations, _ = vector.reset()
    at_once = fails in ("reset", "one number")
    assert np.isnan(observations[1]).all() == at_once
    for _ in range(2):
        observations, rewards, _, truncated, _ = vector.step(np.zeros((3, 3)))
    assert np.isnan(observations[1]).all()
    assert np.isnan(rewards).tolist() == [False, True, False]
    assert truncated.tolist() == [False, True, False]
    reasons = {
        "hang": "TimeoutError: no answer in 0.3 s", "exit": "SystemExit: 3",
        "one number": "ValueError: the observation has 1 numbers, its space has 6",
    }  # fmt: skip
    reason = f"step {0 if at_once else 2} .{reasons.get(fails, 'RuntimeError: broken')}"
    (line,) = vector.failures
    assert re.match(rf"gymnasium:Parts-v0: environment 1 failed in {reason}", line)
    vector._environments[1 - (fails == "hang")]._environment.unwrapped.fails = "never"
    observations, _ = vector.reset(seed=[5, 6, 7])
    observations, rewards, _, truncated, _ = vector.step(np.zeros((3, 3)))
    assert np.isnan(rewards).tolist() == [False, fails == "hang", False], "what hangs is not used again"
    assert len(vector.failures) == 1
    vector.close()
    assert time.monotonic() - began < 15, "nothing waits for what hangs"


@pytest.mark.parametrize("fails", ["close", "hang at close"])
def test_an_environment_that_does_not_close_costs_nothing(fails):
    vector = make_vec("gymnasium:Parts-v0", 3, [0, 1, 2], threads=1, timeout=0.3)
    for environment in vector._environments[1:]:
        environment._environment.unwrapped.fails = fails
    began = time.monotonic()
    vector.close()
    assert time.monotonic() - began < 15, "nothing waits for what hangs"


def test_arguments_are_a_part_of_the_name():
    task = foreign_task("Hopper-v5", {"max_episode_steps": 50, "healthy_reward": 0.5})
    assert task == "gymnasium:Hopper-v5(healthy_reward=0.5,max_episode_steps=50)"
    assert domain_of(task).episode_length == 50
    assert make(task)._environment.unwrapped._healthy_reward == 0.5
    spec = foreign_spec(task)
    assert (spec.id, spec.max_episode_steps, spec.kwargs) == ("Hopper-v5", 50, {"healthy_reward": 0.5})
    assert gymnasium.spec("Hopper-v5").max_episode_steps == 1000


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Nope-v0", "no installed package has this environment .*Did you mean"),
        ("Hopper-v99", "no installed package has this environment"),
        ("ALE/Pong-v5", "no installed package has this environment"),
        ("os:Hopper-v5", "is not the name of a Gymnasium environment"),
        ("../Hopper-v5", "is not the name of a Gymnasium environment"),
        ("Hopper-v5(open('a'))", "its arguments are not plain values"),
        ("Hopper-v5(x=open('a'))", "its arguments are not plain values"),
        ("Hopper-v5(**{'x': 1})", "its arguments are not plain values"),
        ("Hopper-v5(x=1)(y=2)", "its arguments are not plain values"),
        ("Hopper-v5(render_mode='human')", "render_mode is not a part of a task"),
        ("Hopper-v5(unknown=1)", "cannot be made .*unexpected keyword"),
        ("FrozenLake-v1", "Discrete observations; only Boxes of numbers"),
        ("Hopper-v5(max_episode_steps=-1)", "max_episode_steps is -1; give a whole number of at least 1"),
        ("Hopper-v5(max_episode_steps=2.5)", "max_episode_steps is 2.5"),
        ("Endless-v0", r"has no step limit; add one: Endless-v0\(max_episode_steps=1000\)"),
        ("Images-v0", "observes images"),
        ("Unbounded-v0", "its actions have no bounds"),
        ("Many-v0", "its actions are a MultiBinary"),
        ("Parts-v0(fails='start')", "cannot be made .0."),
    ],
)
def test_what_cannot_be_an_environment_is_refused_in_one_line(name, message):
    for build in (make, domain_of, lambda task: make_vec(task, 2)):
        with pytest.raises(UserError, match=message) as error:
            build(f"gymnasium:{name}")
        assert "\n" not in str(error.value)


def test_wrong_actions_are_refused():
    environment = make(POLE, seed=0)
    environment.reset()
    for action in (np.zeros(3), np.array([np.nan, 0]), 1):
        with pytest.raises(UserError, match=r"must be \(2,\) finite numbers"):
            environment.step(action)
    with pytest.raises(UserError, match="at least 1 is needed"):
        make_vec(POLE, 0)


def test_scores_of_known_environments_are_d4rls():
    from ringrl.evaluation.scores import normalised_score, score_or_none

    np.testing.assert_allclose(normalised_score("gymnasium:Hopper-v5", [-20.272305, 3234.3]), [0, 100], atol=1e-12)
    np.testing.assert_allclose(normalised_score("gymnasium:HalfCheetah-v4", 4770.335), 40.6802, atol=1e-4)
    assert score_or_none("gymnasium:Hopper-v5(max_episode_steps=50)", 1.0) is None, "another task"
    assert score_or_none(POLE, 1.0) is None


def test_what_needs_a_simulation_of_ringrl_says_so(tmp_path):
    with pytest.raises(UserError, match="record it with Minari's DataCollector"):
        load_simulation(HOPPER)
    with pytest.raises(UserError, match="has no script; give --method td3, or record it with Minari's DataCollector"):
        collect(HOPPER, tmp_path / "hops", episodes=1, seed=0)
    with pytest.raises(UserError, match="td3 cannot learn its discrete actions"):
        collect(POLE, tmp_path / "poles", episodes=1, seed=0, method="td3")
    with pytest.raises(UserError, match="unknown domain"):
        domain_named(HOPPER)
    assert not list(tmp_path.iterdir())


def test_a_user_may_name_the_module_that_registers_an_environment(tmp_path, monkeypatch):
    (tmp_path / "myenv.py").write_text(
        "import gymnasium\n"
        "gymnasium.register('Mine-v0', 'gymnasium.envs.classic_control:PendulumEnv', max_episode_steps=5)\n"
    )
    (tmp_path / "broken.py").write_text("1 / 0")
    (tmp_path / "ends.py").write_text("raise SystemExit(0)")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    assert environment_task("myenv:Mine-v0") == environment_task("gymnasium:myenv:Mine-v0") == "gymnasium:Mine-v0"
    assert domain_of("gymnasium:Mine-v0").episode_length == 5
    for name, message in (("broken", "division by zero"), ("ends", "0"), ("absent", "No module named 'absent'")):
        with pytest.raises(UserError, match=f"--environment: {name} cannot be imported .*{message}"):
            environment_task(f"{name}:Mine-v0")
    assert sys.path == before
    assert environment_task("Hopper-v5(max_episode_steps=5)") == "gymnasium:Hopper-v5(max_episode_steps=5)"
    del gymnasium.registry["Mine-v0"]


def test_an_environment_need_not_know_render_modes():
    gymnasium.register("Bare-v0", lambda: Parts(), max_episode_steps=3, disable_env_checker=True)
    assert make("gymnasium:Bare-v0").domain.episode_length == 3
    del gymnasium.registry["Bare-v0"]
