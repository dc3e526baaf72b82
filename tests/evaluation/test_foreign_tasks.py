"""Policies trained on episodes of other packages' environments act in them: discrete actions, early ends, errors."""

import os
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from rich.console import Console

from ringrl.cli.flags import environment_task
from ringrl.config import TrainConfig
from ringrl.data import EpisodeStore, write_episodes
from ringrl.errors import UserError
from ringrl.evaluation import (
    Protocol,
    evaluate_policy,
    load_policy,
    policy_evaluation,
    random_evaluation,
)
from ringrl.evaluation.records import folder_name, library_versions, read_records
from ringrl.evaluation.scores import random_return, score_or_none
from ringrl.report import tabulate
from ringrl.study.cells import cells
from ringrl.study.plan import AblationPlan
from ringrl.study.runner import ablate
from ringrl.training import train

POLE = "gymnasium:CartPole-v1(max_episode_steps=40)"
MODEL = {"layers": 1, "width": 16, "token_set": "fused1", "action_head": "categorical"}


def record(name: str, number: int = 6) -> list[dict[str, object]]:
    environment, episodes = gymnasium.make(name), []
    environment.action_space.seed(0)
    for seed in range(number):
        observations, actions, rewards, ended = [environment.reset(seed=seed)[0]], [], [], False
        while not ended:
            actions.append(environment.action_space.sample())
            observation, reward, terminated, truncated, _ = environment.step(actions[-1])
            observations.append(observation)
            rewards.append(reward)
            ended = terminated or truncated
        episodes.append({"observation": observations, "action": actions, "reward": rewards, "terminated": terminated})
    environment.close()
    return episodes


@pytest.fixture(scope="module")
def pole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pole")
    write_episodes(folder / "pole.h5", record("CartPole-v1"), environment=POLE)
    return folder


def configured(folder: Path, **changes: object) -> TrainConfig:
    values = {
        "data": folder / "pole.h5", "task": POLE, "run": folder / "run", "model": MODEL,
        "context": {"trajectories": 2}, "optimiser": {"steps": 2, "batch_size": 2},
    }  # fmt: skip
    return TrainConfig.model_validate(values | changes)


@pytest.fixture(scope="module")
def run(pole: Path) -> Path:
    return train(configured(pole), quiet=True)


def test_records_have_the_length_and_the_end_of_each_episode(run):
    records = evaluate_policy(load_policy(run), Protocol(environments=3, episodes=3, control=True))
    assert len(records) == 6
    for each in records:
        assert each.returns == each.lengths, "one reward per step"
        assert all(ended == (length < 40) for ended, length in zip(each.terminated, each.lengths, strict=True))
        assert each.steps_simulated == sum(each.lengths)
    assert len({each.lengths for each in records}) > 1
    alone = evaluate_policy(load_policy(run), Protocol(environments=1, episodes=3))
    assert alone[0].returns == records[0].returns, "the other streams have no effect"


@pytest.mark.parametrize(("task", "decides"), [(POLE, True), ("walker_walk", False)])
def test_the_version_of_gymnasium_decides_results_in_its_environments(task, decides, monkeypatch):
    before = random_evaluation(task, Protocol()).template.evaluation
    versions = library_versions() | {"gymnasium": "0"}
    monkeypatch.setattr("ringrl.evaluation.protocol.library_versions", lambda: versions)
    assert (random_evaluation(task, Protocol()).template.evaluation != before) == decides


def test_a_player_acts_in_the_environment(run):
    environment, player = gymnasium.make("CartPole-v1", max_episode_steps=40), load_policy(run).player()
    (expected,) = evaluate_policy(load_policy(run), Protocol(environments=1, episodes=2))
    for seed, length in zip(expected.start_seeds, expected.lengths, strict=True):
        observation, _ = environment.reset(seed=seed)
        for step in range(length):
            action = player.act(observation)
            assert sorted(action.tolist()) == [0, 1]
            observation, reward, terminated, truncated, _ = environment.step(int(action.argmax()))
            player.observe(reward, terminated, truncated)
            assert (terminated or truncated) == (step == length - 1)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("gymnasium:Hopper-v5", "have 11 and 3 numbers, those of .* have 4 and 2"),
        ("walker_walk", "was trained on gymnasium:CartPole-v1.* and cannot act in task walker_walk"),
        ("gymnasium:Nope-v0", "no installed package has this environment"),
    ],
)
def test_other_environments_are_refused(task, message, run):
    with pytest.raises(UserError, match=message):
        policy_evaluation(load_policy(run), Protocol(), task=task)


def test_other_bounds_of_actions_are_refused(tmp_path):
    write_episodes(tmp_path / "pole.h5", record("Pendulum-v1", 2), environment="gymnasium:Pendulum-v1")
    config = configured(tmp_path, task="gymnasium:Pendulum-v1", model=MODEL | {"action_head": "mse"})
    trained = load_policy(train(config, quiet=True))
    gymnasium.register("Wide-v0", "gymnasium.envs.classic_control:PendulumEnv", max_episode_steps=5)
    gymnasium.registry["Wide-v0"].entry_point = _wide
    with pytest.raises(UserError, match="its actions have other bounds than those of the data"):
        policy_evaluation(trained, Protocol(), task="gymnasium:Wide-v0")
    del gymnasium.registry["Wide-v0"]


def _wide(**arguments: object) -> gymnasium.Env:
    from gymnasium.envs.classic_control import PendulumEnv

    environment = PendulumEnv()
    environment.action_space = gymnasium.spaces.Box(-3, 3, (1,))
    return environment


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (MODEL | {"action_head": "mse"}, "are discrete; use categorical"),
        ({"kind": "td3_bc", "width": 16}, "td3_bc cannot learn its discrete actions"),
    ],
)
def test_choices_need_their_head(model, message, pole, tmp_path):
    with pytest.raises(UserError, match=message):
        train(configured(pole, run=tmp_path / "run", model=model), quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_study_has_the_datas_lengths_and_checks_actions_first(pole, tmp_path):
    values = {
        "data": str(pole / "pole.h5"), "task": POLE, "output": str(tmp_path / "study"), "methods": ["at"], "seeds": [0],
        "trajectories": [1, 2], "trajectories_per_batch": 2, "baselines": ["td3+bc"], "episodes": 2,
        "settings": {"optimiser": {"steps": 30}},
    }  # fmt: skip
    longest = int(EpisodeStore(pole / "pole.h5").lengths.max())
    assert longest != 40, "the limit of the environment"
    (td3,) = (c.config for c in cells(AblationPlan.model_validate(values)) if c.config.model.kind == "td3_bc")
    assert td3.optimiser.steps == 30 * 2 * longest // td3.optimiser.batch_size
    for plan, message in (
        (values, "td3.bc_seed0: .* td3_bc cannot learn its discrete actions"),
        (values | {"baselines": []}, "at_1_seed0: model.action_head: .* are discrete; use categorical"),
    ):
        with pytest.raises(UserError, match=message):
            ablate(AblationPlan.model_validate(plan), Console(quiet=True), dry_run=True)
    long = f"gymnasium:Maze-v0(maze_map={[[1] * 99]})"
    assert len(folder_name(long)) <= 100
    assert folder_name(long) != folder_name(long.replace("99", "98").replace("1]]", "0]]"))


def test_scores_start_no_environment(monkeypatch):
    monkeypatch.setattr(gymnasium, "make", lambda *_, **__: pytest.fail("a name in a results file was started"))
    assert score_or_none("gymnasium:CartPole-v1(max_episode_steps=41)", 1.0) is None
    assert random_return("gymnasium:CartPole-v1(max_episode_steps=41)") is None


def test_the_categorical_loss_is_the_cross_entropy():
    from flax import nnx

    from ringrl.model.heads import CategoricalHead

    head, random = CategoricalHead(5, 3, nnx.Rngs(0)), np.random.default_rng(0)
    features, choice = random.normal(size=(7, 5)).astype(np.float32), random.integers(3, size=7)
    logits = features.astype(np.float64) @ np.asarray(head.linear.kernel[...], np.float64)
    expected = np.log(np.exp(logits).sum(1)) - logits[np.arange(7), choice]
    np.testing.assert_allclose(head.loss(features, np.eye(3, dtype=np.float32)[choice]), expected, rtol=1e-5)
    np.testing.assert_array_equal(head.action(features), np.eye(3)[logits.argmax(1)])


def test_an_environment_that_hangs_or_crashes_costs_its_own_streams(tmp_path):
    (tmp_path / "myenv.py").write_text(
        "import time\n"
        "import gymnasium\n"
        "from gymnasium.envs.classic_control import CartPoleEnv\n"
        "class Sick(CartPoleEnv):\n"
        "    def reset(self, *, seed=None, options=None):\n"
        "        self.seed = seed\n"
        "        return super().reset(seed=seed)\n"
        "    def step(self, action):\n"
        "        if self.seed == 3: time.sleep(3600)\n"
        "        if self.seed == 5: raise RuntimeError('a cable\\nis loose')\n"
        "        return super().step(action)\n"
        "gymnasium.register('Sick-v0', 'myenv:Sick', max_episode_steps=20)\n"
    )
    command = [
        str(Path(sys.executable).with_name("ringrl")),
        "evaluate",
        "--environment",
        "myenv:Sick-v0",
        "--seed",
        "0",
    ]
    command += [
        "--environments",
        "4",
        "--episodes",
        "2",
        "--step-timeout",
        "1",
    ]  # stream i has the seeds 2 i and 2 i + 1
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=500
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    *_, last = done.stderr.splitlines()
    assert last.startswith(
        "ringrl: gymnasium:Sick-v0: the environment failed, so some episodes have no return; all others are"
    )
    told = " ".join((done.stdout + done.stderr).split())
    for line in (
        "environment 1 (seed 3) failed in step 1 (TimeoutError: no answer in 1 s); its episodes are left out",
        "environment 2 (seed 5) failed in step 1 (RuntimeError: a cable is loose); its episodes are left out",
    ):
        assert line in told
    records = read_records(tmp_path / "random.jsonl").records
    assert all((length > 0) == (value is not None) for one in records
               for value, length in zip(one.returns, one.lengths, strict=True))  # fmt: skip
    table = tabulate(records)
    steps = [length for one in records for length in one.lengths]
    assert table["episode_steps"].fillna(0).tolist() == steps
    assert table["episode_steps"].isna().tolist() == table["return"].isna().tolist()
    assert table["terminated"].tolist() == [ended for one in records for ended in one.terminated]
    returns = [record.returns for record in records]
    assert [[value is None for value in row] for row in returns] == [
        [False] * 2,
        [False, True],
        [False, True],
        [False] * 2,
    ]


@pytest.mark.slow
def test_a_study_imports_the_module_of_its_environment_in_every_process(tmp_path, monkeypatch):
    (tmp_path / "polesenv.py").write_text(
        "import gymnasium\n"
        "gymnasium.register('Poles-v0', 'gymnasium.envs.classic_control:CartPoleEnv', max_episode_steps=20)\n"
    )
    (tmp_path / "broken.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    task = environment_task("polesenv:Poles-v0")
    write_episodes("poles.h5", record("CartPole-v1", 3), environment=task)
    values = {
        "data": "poles.h5", "task": task, "output": "study", "methods": [], "baselines": ["bc"], "seeds": [0],
        "episodes": 2, "environment_modules": ["polesenv"],
        "settings": {"model": {"action_head": "categorical"}, "optimiser": {"steps": 2}},
    }  # fmt: skip
    for name, message in (
        ("broken", "broken cannot be imported .division by zero"),
        ("nope", "No module named 'nope'"),
    ):
        with pytest.raises(ValueError, match=message):
            AblationPlan.model_validate(values | {"environment_modules": [name]})
    found = ablate(AblationPlan.model_validate(values), Console(quiet=True))
    records = [record for path in found for record in read_records(path).records]
    assert {(record.method, record.task) for record in records} >= {("bc", task), ("random", task), ("data", task)}
    del gymnasium.registry["Poles-v0"]
