from pathlib import Path

import numpy as np
import pytest

from ringrl.config import ActorCriticConfig, ContextConfig, TrainConfig
from ringrl.data.sampling.held_out import WrongPromptSampler, all_but, held_out, held_out_episodes
from ringrl.data.sampling.normalisation import Normalisation
from ringrl.data.sampling.sampler import ContextSampler, eligible_episodes
from ringrl.data.store import EpisodeStore
from ringrl.data.transitions import TransitionSampler
from ringrl.errors import UserError

TASKS = ("cartpole_swingup", "cartpole_balance", "cartpole_balance_sparse")
EPISODES, STEPS = 240, 3


@pytest.fixture(scope="module")
def store(tmp_path_factory, random_episode, write_store) -> EpisodeStore:
    """Episodes whose observations are their number, with independent uniform returns in three tasks."""
    random, episodes = np.random.default_rng(0), []
    for number in range(EPISODES):
        episode = random_episode("cartpole", STEPS, number)
        episode["observation"][:] = number
        for task in TASKS:
            episode[f"reward/{task}"] = np.r_[0, np.full(STEPS, random.random())].astype(np.float32)
        episodes.append(episode)
    return write_store(tmp_path_factory.mktemp("held_out") / "many.h5", "cartpole", episodes)


def config(store: EpisodeStore, **changes: object) -> TrainConfig:
    return TrainConfig.model_validate({"data": store.path, "task": TASKS[0], "run": Path("run"), **changes})


def test_each_block_of_returns_gives_one_episode(store: EpisodeStore) -> None:
    ranks = np.empty(EPISODES, int)
    ranks[np.argsort(store.returns(TASKS[0]))] = np.arange(EPISODES)
    drawn = set()
    for seed in range(30):
        found = held_out_episodes(store, TASKS[:1], seed, 0.1)
        assert (np.diff(found) > 0).all()
        assert sorted(ranks[found] // 10) == list(range(24)), "one of every ten consecutive returns"
        np.testing.assert_array_equal(found, held_out_episodes(store, TASKS[:1], seed, 0.1))
        drawn |= set(found)
    assert len(drawn) > 0.9 * EPISODES, "the seed draws any of them"


def test_the_returns_of_every_task_are_balanced(store: EpisodeStore) -> None:
    """Counts above the median and in the best fifth vary far less than those of a draw without strata."""
    deviations: dict[str, list[float]] = {"strata": [], "plain": []}
    for seed in range(40):
        plain = np.random.default_rng(seed).choice(EPISODES, EPISODES // 5, replace=False)
        for name, found in (("strata", held_out_episodes(store, TASKS, seed, 0.2)), ("plain", plain)):
            assert len(found) == EPISODES // 5
            for task in TASKS:
                returns = store.returns(task)
                deviations[name].append((returns[found] > np.median(returns)).mean() - 0.5)
    assert np.std(deviations["strata"]) < 0.5 * np.std(deviations["plain"])
    assert abs(np.mean(deviations["strata"])) < 0.01


@pytest.mark.parametrize("others", [(), TASKS[1:]], ids=["one task", "three"])
def test_training_contexts_never_hold_held_out_episodes(store: EpisodeStore, others: tuple[str, ...]) -> None:
    run = config(store, validation_fraction=0.2, context={"trajectories": 3, "other_tasks": others})
    excluded, scale = held_out(store, run), Normalisation(np.zeros(5), np.ones(5), STEPS)
    samplers = [
        ContextSampler(store, run.task, run.context, scale, 16, 0, excluded=part)
        for part in (excluded, all_but(store, excluded))
    ]
    training, validation = (
        {int(x) for step in range(60) for x in np.unique(np.asarray(sampler.batch(step).observation))}
        for sampler in samplers
    )
    assert validation == set(excluded.tolist()), "all of them, in all tasks"
    assert training == set(range(EPISODES)) - validation


def test_transitions_never_hold_held_out_episodes(store: EpisodeStore) -> None:
    excluded = held_out(store, config(store, validation_fraction=0.2))
    scale = Normalisation(np.zeros(5), np.ones(5), STEPS)
    sampler = TransitionSampler(store, TASKS[0], ActorCriticConfig(n_step=2), scale, 500, 0, excluded=excluded)
    batches = [sampler.batch(step) for step in range(10)]
    seen = np.unique([part for batch in batches for part in (batch.observation, batch.following)])
    np.testing.assert_array_equal(seen, all_but(store, excluded))


def test_cap_and_best_fraction_apply_to_the_other_episodes(store: EpisodeStore) -> None:
    whole = held_out(store, config(store, validation_fraction=0.25))
    small = config(store, validation_fraction=0.25, context={"max_transitions": 60, "best_fraction": 0.5})
    np.testing.assert_array_equal(held_out(store, small), whole)
    found = eligible_episodes(store, TASKS[0], 0, 60, 1.0, whole)
    assert len(found) == 60 // STEPS
    assert not np.isin(found, whole).any()
    more = eligible_episodes(store, TASKS[0], 0, 120, 1.0, whole)
    assert set(found) < set(more)
    best = eligible_episodes(store, TASKS[0], 0, None, 0.1, whole)
    rest = all_but(store, whole)
    np.testing.assert_array_equal(best, np.sort(rest[np.argsort(store.returns(TASKS[0])[rest])[-18:]]))


def test_without_a_fraction_nothing_is_held_out(store: EpisodeStore) -> None:
    assert held_out(store, config(store)).size == 0
    np.testing.assert_array_equal(eligible_episodes(store, TASKS[0], 0), np.arange(EPISODES))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"validation_fraction": 0.01}, r"validation_fraction: 0\.01 holds out 2 eligible .*many\.h5.* 4; raise it"),
        ({"validation_fraction": 0.001}, "holds out 0 eligible"),
        ({"validation_fraction": 0.999}, "leaves 0 eligible episodes .* lower it"),
        ({"validation_fraction": 0.1, "context": {"best_fraction": 0.1}}, "holds out 2 eligible"),
        ({"validation_fraction": 0.9, "context": {"max_transitions": 9}}, "leaves 3 eligible"),
        ({"validation_fraction": 0.001, "model": {"kind": "td3_bc"}}, "holds out 0 .* needs 1; raise it"),
    ],
    ids=str,
)
def test_too_few_episodes_are_an_error(store: EpisodeStore, changes: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        held_out(store, config(store, **changes))


def test_impossible_settings_are_errors(store: EpisodeStore) -> None:
    history = ContextConfig(sampling="history_window", order="history")
    for changes, words in (
        ({"validation_fraction": 1.0}, "validation_fraction"),
        ({"validation_fraction": -0.1}, "validation_fraction"),
        ({"validate_every": 0}, "validate_every"),
        ({"validation_fraction": 0.1, "context": history.model_dump()}, "history_window needs consecutive episodes"),
    ):
        with pytest.raises(ValueError, match=words):
            config(store, **changes)


def test_wrong_prompts_are_of_the_next_task_and_end_with_the_right_trajectory(store: EpisodeStore) -> None:
    scale = Normalisation(np.zeros(5), np.ones(5), STEPS)
    config = ContextConfig(trajectories=3, other_tasks=TASKS[1:])
    excluded = np.arange(5, EPISODES)  # five episodes, so that prompts often draw the episode of the last trajectory
    right, wrong = (
        kind(store, TASKS[0], config, scale, 200, 0, excluded=excluded) for kind in (ContextSampler, WrongPromptSampler)
    )
    draw, own, other = right.draw(7), right.batch(7), wrong.batch(7)
    assert set(draw.tasks) == set(TASKS)
    last, repeated = slice(2 * STEPS, None), 0
    for name in ("observation", "action", "reward", "return_to_go", "completion", "timestep", "trajectory", "position"):
        np.testing.assert_array_equal(getattr(other, name)[:, last], getattr(own, name)[:, last], err_msg=name)
    for row, task in enumerate(draw.tasks):
        following = TASKS[(TASKS.index(task) + 1) % 3]
        numbers = other.observation[row, ::STEPS, 0].astype(int)
        assert len(set(numbers)) == 3
        repeated += set(numbers[:2]) <= set(draw.episodes[row])
        first, second = (store.returns(following)[i] for i in numbers[:2])
        assert first < second, "ascending in the wrong task"
        for place, number in enumerate(numbers[:2]):
            rewards = store.episode(number)[f"reward/{following}"][1:]
            np.testing.assert_array_equal(other.reward[row, place * STEPS : (place + 1) * STEPS], rewards)
        np.testing.assert_array_equal(other.previous.reward[row, 2 * STEPS], rewards[-1])
    assert repeated < 200, "the episodes are drawn for the wrong task"


def test_wrong_prompts_of_segments_end_with_the_right_segment(store: EpisodeStore) -> None:
    scale = Normalisation(np.zeros(5), np.ones(5), STEPS)
    config = ContextConfig(trajectories=3, other_tasks=TASKS[1:], segment_steps=2, segment_start_share=0)
    right, wrong = (
        kind(store, TASKS[0], config, scale, 40, 0).batch(1) for kind in (ContextSampler, WrongPromptSampler)
    )
    for name in ("observation", "reward", "return_to_go", "timestep", "start", "weight"):
        np.testing.assert_array_equal(getattr(wrong, name)[:, 4:], getattr(right, name)[:, 4:], err_msg=name)
    assert set(wrong.timestep[:, ::2].ravel()) == {0, 1}, "segments begin anywhere"
    assert (wrong.observation[:, :4] != right.observation[:, :4]).any((1, 2)).all()
