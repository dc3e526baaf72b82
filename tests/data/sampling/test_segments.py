"""Contexts of segments equal a slow construction step by step, and begin where the settings ask."""

from pathlib import Path

import jax
import numpy as np
import pytest

from ringrl.config import ContextConfig
from ringrl.context import Context
from ringrl.data.sampling.normalisation import Normalisation
from ringrl.data.sampling.sampler import ContextDraw, ContextSampler
from ringrl.data.store import EpisodeStore
from ringrl.errors import UserError

TASK, OTHER = "cartpole_swingup", "cartpole_balance"
LENGTHS = [9, 6, 9, 4, 7, 9]


@pytest.fixture(scope="module")
def store(tmp_path_factory, random_episode, write_store) -> EpisodeStore:
    """A store of random episodes of 4 to 9 steps."""
    path: Path = tmp_path_factory.mktemp("segments") / "mixed.h5"
    episodes = [random_episode("cartpole", n, i) for i, n in enumerate(LENGTHS)]
    for episode in episodes:
        for task in (TASK, OTHER):
            episode[f"reward/{task}"][0] = 0  # as in ExoRL, where row 0 is the reset
    return write_store(path, "cartpole", episodes)


def sampler(store: EpisodeStore, batch_size: int = 4, seed: int = 0, **config: object) -> ContextSampler:
    settings = ContextConfig(**{"trajectories": 3, "segment_steps": 4} | config)
    return ContextSampler(store, TASK, settings, Normalisation.of(store), batch_size, seed)


def slowly(made: ContextSampler, draw: ContextDraw, row: int) -> dict[str, list]:
    """Return the columns of one context, step by step in float64."""
    steps: dict[str, list] = {}
    episodes = [made.store.episode(int(number)) for number in draw.episodes[row]]
    rewards = [episode[f"reward/{draw.tasks[row]}"].astype(np.float64)[1:] for episode in episodes]
    best = max(sum(reward) for reward in rewards)
    scale = made.normalisation
    for k, (episode, reward) in enumerate(zip(episodes, rewards, strict=True)):
        first = int(draw.first_timesteps[row, k])
        target = {"best": best, "own": sum(reward), "none": None}[made.config.target]
        start = len(steps.get("position", ()))
        for t in range(first, min(len(reward), first + made.config.segment_steps)):
            is_end = t == len(reward) - 1
            step = {
                "observation": (episode["observation"][t].astype(np.float64) - scale.mean) / scale.std,
                "action": episode["action"][t + 1],
                "reward": reward[t],
                "return_to_go": 0 if target is None else (target - sum(reward[:t])) / max(LENGTHS),
                "completion": float(target is not None and is_end and abs(sum(reward) - target) < 1e-9),
                "timestep": t,
                "trajectory": k,
                "position": len(steps.get("position", ())),
                "start": start,
                "weight": made.config.first_steps_weight if t - first < made.config.first_steps else 1,
                "previous.action": np.zeros_like(episode["action"][0]) if t == first else episode["action"][t],
                "previous.reward": 0 if t == first else reward[t - 1],
                "previous.completion": 0,
            }
            for name, value in step.items():
                steps.setdefault(name, []).append(value)
    return steps


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"target": "own", "segment_start_share": 0.0},
        {"target": "none", "order": "random"},
        {"other_tasks": (OTHER,), "best_fraction": 0.7},
        {"first_steps": 3, "first_steps_weight": 50.0, "segment_start_share": 1.0},
        {"segment_steps": 1, "segment_start_share": 0.2},
        {"segment_steps": 7, "first_steps": 5, "first_steps_weight": 50.0},  # longer than some episodes
        {"segment_steps": 9, "target": "own"},
    ],
)
def test_a_context_of_segments_equals_a_slow_construction(store: EpisodeStore, config: dict) -> None:
    made = sampler(store, 30, **config)
    draw, batch = made.draw(2), made.batch(2)
    assert made.time == 3 * made.config.segment_steps
    for row in range(30):
        for name, values in slowly(made, draw, row).items():
            found = batch
            for part in name.split("."):
                found = getattr(found, part)
            np.testing.assert_allclose(found[row][: len(values)], values, rtol=1e-5, atol=1e-6, err_msg=name)
            assert name == "position" or not found[row][len(values) :].any(), "padding"
        returns = store.returns(draw.tasks[row])[draw.episodes[row]]
        assert made.config.order == "random" or list(returns) == sorted(returns)
    ends = made.config.target != "none" and made.config.segment_start_share < 1  # some segments end with their episode
    assert batch.completion.any() == ends


def test_segments_draw_the_episodes_of_whole_contexts(store: EpisodeStore) -> None:
    whole = sampler(store, segment_steps=None).draw(5)
    np.testing.assert_array_equal(sampler(store).draw(5).episodes, whole.episodes)
    assert not whole.first_timesteps.any()


def test_segments_as_long_as_their_episodes_differ_in_the_outcome_before_only(
    tmp_path: Path, random_episode, write_store
) -> None:
    equal = write_store(tmp_path / "equal.h5", "cartpole", [random_episode("cartpole", 4, i) for i in range(5)])
    segments, whole = sampler(equal).batch(3), sampler(equal, segment_steps=None).batch(3)
    assert whole.previous.action[:, 4::4].any()
    first = np.arange(12) % 4 == 0
    for a, b in zip(segments.previous, whole.previous, strict=True):
        assert not a[:, first].any()
        np.testing.assert_array_equal(a[:, ~first], b[:, ~first])
    for name in set(Context._fields) - {"previous"}:
        np.testing.assert_array_equal(getattr(segments, name), getattr(whole, name), err_msg=name)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_share_of_segments_begins_with_its_episode(store: EpisodeStore, share: float) -> None:
    draw = sampler(store, 6000, trajectories=1, segment_start_share=share).draw(0)
    for number, length in enumerate(LENGTHS):
        first = draw.first_timesteps[draw.episodes == number]
        places = length - 4 + 1
        expected = np.full(places, (1 - share) / places) + share * (np.arange(places) == 0)
        np.testing.assert_allclose(np.bincount(first, minlength=places) / len(first), expected, atol=0.06)


def test_segments_are_a_function_of_seed_and_step(store: EpisodeStore) -> None:
    draw = sampler(store, 50).draw(7)
    for a, b in zip(draw, sampler(store, 50).draw(7), strict=True):
        np.testing.assert_array_equal(a, b)
    for seed, step in ((0, 8), (1, 7)):
        assert (sampler(store, 50, seed).draw(step).first_timesteps != draw.first_timesteps).any()
    fixed = sampler(store, 50, sampling="fixed")
    for a, b in zip(jax.tree.leaves(fixed.batch(1)), jax.tree.leaves(fixed.batch(9)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_segments_longer_than_all_eligible_episodes_are_rejected(store: EpisodeStore) -> None:
    with pytest.raises(UserError, match=r"segment_steps: 10 is longer than the longest .*mixed\.h5 \(9 steps\)"):
        sampler(store, segment_steps=10)
    best = int(np.argmax(store.returns(TASK)))  # the only eligible episode
    alone = {"trajectories": 1, "best_fraction": 0.1}
    assert sampler(store, segment_steps=LENGTHS[best], **alone).draw(0).first_timesteps.tolist() == [[0]] * 4
    with pytest.raises(UserError, match="segment_steps: 10 is longer"):
        sampler(store, segment_steps=10, **alone)
