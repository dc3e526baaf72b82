"""Stores of domains without a simulation in RingRL."""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringrl.config import ActorCriticConfig, ContextConfig
from ringrl.data.sampling.normalisation import Normalisation
from ringrl.data.sampling.sampler import ContextSampler
from ringrl.data.store import EpisodeStore
from ringrl.data.store.format import ForeignFacts, Provenance, StoredDomain, recorded_arrays, reward_key
from ringrl.data.store.summary import describe
from ringrl.data.store.writer import create_store
from ringrl.data.transitions import TransitionSampler
from ringrl.errors import UserError

ARM = StoredDomain.of(
    ForeignFacts(
        name="lab/arm-v3",
        observation_size=4,
        physics_size=0,
        action_low=(-2.0, 0.0),
        action_high=(2.0, 5.0),
        episode_length=6,
        num_terminated=1,
    )
)
TASK = "lab_arm-v3"
LENGTHS = (6, 2, 5)


def write(path: Path, domain: StoredDomain = ARM) -> EpisodeStore:
    """Random episodes with rewards around -50. The second episode terminates."""
    random = np.random.default_rng(0)
    source = Provenance("Minari (lab/arm-v3)", relabelling="recorded")
    with create_store(path, domain, domain.tasks, LENGTHS, source=source) as writer:
        for number, length in enumerate(LENGTHS):
            columns = recorded_arrays(domain).items()
            rows = {key: random.normal(size=(length + 1, column.width)).astype(column.dtype) for key, column in columns}
            rows["discount"][:], rows["action"][0] = 1, 0
            rows["discount"][-1] = number != 1
            reward = (random.normal(size=length + 1) - 50).astype(np.float32)
            reward[0] = 0
            rows["reward"] = reward[:, None]
            writer.append(rows | {reward_key(domain.tasks[0]): reward})
        writer.recorded_task = domain.tasks[0]
    return EpisodeStore(path)


@pytest.fixture
def store(tmp_path: Path) -> EpisodeStore:
    return write(tmp_path / "arm.h5")


def test_a_store_carries_the_facts(store: EpisodeStore) -> None:
    assert store.facts == ARM
    assert (store.domain, store.tasks, store.recorded_task) == ("lab/arm-v3", (TASK,), TASK)
    assert sorted(store.episode(1)) == sorted(["observation", "action", "reward", "discount", f"reward/{TASK}"])
    assert store.lengths.tolist() == list(LENGTHS)
    store.verify()


def test_physics_is_kept_where_there_is_some(tmp_path: Path) -> None:
    store = write(tmp_path / "a.h5", dataclasses.replace(ARM, physics_size=3))
    assert store.episode(0)["physics"].shape == (7, 3)
    assert store.facts.physics_size == 3


def test_the_summary_reports_foreign_facts(store: EpisodeStore) -> None:
    line = describe(store)
    for fact in (
        "scaled to [-1, 1] from [-2, 2], [0, 5]",
        "unknown: name one to evaluate in",
        "1 terminated (discount 0 there), 2 truncated; returns are undiscounted sums",
        "no, the rewards are the recorded ones, of any size",
    ):
        assert fact in line
    assert max(map(len, line.splitlines()[1:])) <= 120


def test_large_rewards_are_scaled_to_order_one(store: EpisodeStore) -> None:
    scale = Normalisation.of(store)
    rewards = [store.episode(i)[reward_key(TASK)] for i in range(len(store))]
    batch = ContextSampler(store, TASK, ContextConfig(trajectories=2), scale, 8, 0).batch(0)
    for numbers in (batch.reward, batch.previous.reward):
        assert 0.9 < np.abs(numbers).max() <= 1
    assert np.abs(batch.return_to_go).max() <= 1 + 1e-6
    assert scale.reward_scale == max(np.abs(reward).max() for reward in rewards)
    np.testing.assert_allclose(scale.return_to_go(min(reward.sum() for reward in rewards)), -1, rtol=1e-6)
    assert Normalisation.from_json(json.loads(json.dumps(scale.to_json()))).reward(np.float32(-3)) == scale.reward(
        np.float32(-3)
    )
    # The first step of a batch's first trajectory, in the units of the data.
    episode = next(reward for reward in rewards if np.isclose(scale.reward(reward[1:2])[0], batch.reward[0, 0]))
    np.testing.assert_allclose(batch.reward[0, : len(episode) - 1] * scale.reward_scale, episode[1:], rtol=1e-6)


def test_zero_rewards_are_not_scaled(tmp_path: Path) -> None:
    with create_store(tmp_path / "zero.h5", ARM, ARM.tasks, [2], source=Provenance("x")) as writer:
        rows = {key: np.zeros((3, column.width), column.dtype) for key, column in recorded_arrays(ARM).items()}
        writer.append(rows | {reward_key(TASK): np.zeros(3, np.float32)})
    scale = Normalisation.of(EpisodeStore(tmp_path / "zero.h5"))
    assert (scale.reward_scale, scale.return_scale) == (1, 1)


def test_exorl_rewards_are_not_scaled(jaco_store: EpisodeStore) -> None:
    scale = Normalisation.of(jaco_store)
    assert (scale.reward_scale, scale.return_scale) == (1, None)
    rewards = jaco_store.episode(0)["reward/jaco_reach_top_left"]
    assert scale.reward(rewards) is rewards


@pytest.mark.parametrize("n", [1, 3])
def test_the_discount_is_zero_after_termination(store: EpisodeStore, n: int) -> None:
    config = ActorCriticConfig(n_step=n, discount=0.9)
    scale = Normalisation(np.zeros(4), np.ones(4), 6, reward_scale=50.0, return_scale=300.0)
    batch = TransitionSampler(store, TASK, config, scale, 300, 0).batch(0)
    ends = {store.episode(i)["observation"][-1].tobytes(): i for i in range(3)}
    found = np.array([ends.get(row.tobytes(), -1) for row in batch.following])
    assert (batch.discount[found == 1] == 0).all(), "terminated"
    assert (found == 1).any()
    assert (batch.discount[found != 1] > 0).all(), "cut"
    if n == 1:
        np.testing.assert_allclose(batch.reward, -1, atol=0.15)


GOOD = json.loads(ARM.to_json())


@pytest.mark.parametrize(
    "change",
    [
        {"name": "walker"},
        {"name": "../up-v0"},
        {"name": "/etc-v0"},
        {"name": "a" * 300},
        {"name": 3},
        {"observation_size": 0},
        {"observation_size": 4.0},
        {"observation_size": True},
        {"observation_size": 10**9},
        {"physics_size": -1},
        {"action_low": []},
        {"action_low": [-2.0]},
        {"action_low": [3.0, 0.0]},
        {"action_low": [float("nan"), 0.0]},
        {"action_high": [float("inf"), 5.0]},
        {"action_high": "25"},
        {"action_high": [None, 5.0]},
        {"num_terminated": -1},
        {"episode_length": 0},
        {"more": 1},
    ],
)
def test_impossible_facts_are_rejected(change: dict, store: EpisodeStore) -> None:
    text = json.dumps(GOOD | change)
    with pytest.raises((ValueError, TypeError, KeyError)):
        StoredDomain.from_json(text)
    with h5py.File(store.path, "r+") as file:
        file.attrs["facts"] = np.bytes_(text.encode())
    with pytest.raises(UserError, match="cannot be read"):
        EpisodeStore(store.path)


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(),
        lambda x: st.lists(x) | st.dictionaries(st.sampled_from(sorted(GOOD)), x),
    )
)
def test_facts_of_any_kind_are_read_or_rejected(values: object) -> None:
    with pytest.raises((ValueError, TypeError, KeyError)):
        StoredDomain.from_json(json.dumps(values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "lab/leg-v3"}, "cannot be read"),
        ({"observation_size": 5}, "expected float32 .16, 5."),
        ({"action_low": [0.0], "action_high": [1.0]}, "expected float32 .16, 1."),
        ({"physics_size": 2}, "lacks steps/physics"),
    ],
)
def test_facts_that_do_not_fit_the_arrays_are_rejected(change: dict, message: str, store: EpisodeStore) -> None:
    with h5py.File(store.path, "r+") as file:
        file.attrs["facts"] = np.bytes_(json.dumps(GOOD | change).encode())
    with pytest.raises(UserError, match=message):
        EpisodeStore(store.path)


def test_without_the_facts_the_domain_is_unknown(store: EpisodeStore) -> None:
    with h5py.File(store.path, "r+") as file:
        del file.attrs["facts"]
    with pytest.raises(UserError, match="unknown domain 'lab/arm-v3'"):
        EpisodeStore(store.path)


@pytest.mark.parametrize("command", ["import", "export"])
def test_without_minari_the_error_names_the_extra(
    command: str, store: EpisodeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ringrl.data.minari import export_minari, import_minari

    for name in [name for name in sys.modules if name.partition(".")[0] == "minari"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "minari", None)
    run: Callable[[], object] = (
        (lambda: import_minari("a-v0", tmp_path / "a.h5"))
        if command == "import"
        else lambda: export_minari(store, "a-v0")
    )
    with pytest.raises(UserError, match=r"pip install 'ringrl\[minari\]'"):
        run()
