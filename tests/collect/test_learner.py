import functools
import io
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import ringrl
from ringrl.collect import collect
from ringrl.collect.learner import Learner, learn
from ringrl.context import Transitions
from ringrl.data import import_archive
from ringrl.data.exorl import Archive
from ringrl.envs import DOMAINS, domain_of
from ringrl.errors import UserError

TASK = "cartpole_swingup"
WIDTH = 64


@pytest.fixture(scope="module", autouse=True)
def quick():
    """A quarter of the computation, and one compilation of equal learners."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ringrl.collect.learner._TRANSITIONS_PER_UPDATE", 5)
        patch.setattr("ringrl.collect.learner._BATCH", 128)
        patch.setattr("ringrl.collect.learner.Learner", functools.cache(Learner))
        yield


def _learn(folder: Path, episodes: int, *, task: str = TASK, progress=None, **changes) -> list[dict[str, np.ndarray]]:
    (folder / "buffer").mkdir(parents=True, exist_ok=True)
    keywords = {"seed": 0, "width": WIDTH} | changes
    learn(task, folder, episodes=episodes, progress=progress or (lambda done, total: None), **keywords)
    with Archive(folder, domain_of(task)) as archive:
        return [archive.read(member) for member in archive.members]


def _assert_same(one: list[dict[str, np.ndarray]], other: list[dict[str, np.ndarray]]) -> None:
    for a, b in zip(one, other, strict=True):
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


@pytest.fixture(scope="module")
def learned(tmp_path_factory) -> tuple[Path, list[dict[str, np.ndarray]]]:
    folder = tmp_path_factory.mktemp("learned")
    return folder, _learn(folder, 12)


def test_a_learner_improves(learned):
    # Random actions return 33, and the noise of the first episodes about 110.
    returns = np.array([episode["reward"].sum() for episode in learned[1]])
    assert returns[-4:].mean() > 150
    assert returns[-4:].mean() > 1.5 * returns[:4].mean()


def test_the_archive_can_be_imported_and_relabelling_agrees(learned, tmp_path):
    folder, episodes = learned
    assert [path.name for path in folder.iterdir()] == ["buffer"]  # the saved learner is deleted
    store = import_archive(folder, tmp_path / "store.h5", "cartpole")
    assert (store.num_episodes, store.recorded_task) == (12, TASK)
    for number, episode in enumerate(episodes):
        relabelled = store.episode(number)[f"reward/{TASK}"]
        np.testing.assert_allclose(relabelled, episode["reward"][:, 0], rtol=0, atol=1e-5)


def test_the_same_seed_gives_the_same_arrays_after_an_interruption(learned, tmp_path, monkeypatch):
    def interrupt(done: int, total: int) -> None:
        if done == 6:  # in the second round: some episodes are recorded, the learner is not saved
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _learn(tmp_path, 12, progress=interrupt)
    assert len(list(tmp_path.glob("buffer/*.npz"))) == 6

    incomplete = shutil.copytree(tmp_path, tmp_path / "copy")
    (incomplete / "buffer" / "episode_000001_1000.npz").unlink()
    with pytest.raises(UserError, match="one of the first 4 episodes is missing"):
        _learn(incomplete, 12)

    calls: list[int] = []

    def stop(done: int, total: int) -> None:
        calls.append(done)
        if done == 8:  # after the round that is repeated
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _learn(tmp_path, 12, progress=stop)
    assert calls == [5, 6, 7, 8]
    with Archive(tmp_path, domain_of(TASK)) as archive:
        _assert_same([archive.read(member) for member in archive.members], learned[1][:8])
    _damage(tmp_path / "learner.npz", monkeypatch)


def _damage(saved: Path, monkeypatch) -> None:
    """Check that a damaged learner is an error, and that the collection begins again without one."""
    whole, other = saved.read_bytes(), io.BytesIO()
    np.savez(other, **{name: np.zeros(1) for name in np.load(saved)})
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for content in (b"", b"learner", whole[: len(whole) // 2], whole[:-40], flipped, other.getvalue()):
        saved.write_bytes(content)
        with pytest.raises(UserError, match=r"learner\.npz: is damaged; remove it to start the collection again"):
            _learn(saved.parent, 12)
    saved.unlink()

    def begin(*arguments) -> None:
        assert arguments[4] == 0, "from the first episode"
        raise KeyboardInterrupt

    monkeypatch.setattr("ringrl.collect.learner._run", begin)
    with pytest.raises(KeyboardInterrupt):
        _learn(saved.parent, 12)


def test_another_seed_gives_other_arrays(learned, tmp_path):
    one, other = learned[1][0], _learn(tmp_path, 1, seed=2**40)[0]
    assert not np.array_equal(one["physics"][0], other["physics"][0])
    assert not np.array_equal(one["action"][:25], other["action"][:25]), "before the first update"


def test_a_learner_records_the_rewards_of_all_tasks_of_the_maze(tmp_path):
    _learn(tmp_path, 1, task="point_mass_maze_reach_top_left", width=32)
    store = import_archive(tmp_path, tmp_path / "store.h5", "point_mass_maze")
    assert store.episode(0)["reward"].shape == (1001, 4)
    for column, task in enumerate(DOMAINS["point_mass_maze"].tasks):
        np.testing.assert_allclose(store.arrays["reward"][:, column], store.arrays[f"reward/{task}"], atol=1e-5)


def test_a_collection_contains_its_description(tmp_path):
    folder = collect(TASK, tmp_path / "new", episodes=1, seed=7, method="td3")
    assert sorted(path.name for path in folder.iterdir()) == ["buffer", "collection.json"]
    found = json.loads((folder / "collection.json").read_text())
    assert found == {"task": TASK, "method": "td3", "episodes": 1, "seed": 7, "ringrl": ringrl.__version__}


def test_a_learner_learns_from_the_reward():
    random = np.random.default_rng(0)
    shape = (6, 16)
    batches = Transitions(
        observation=random.normal(size=(*shape, 5)).astype(np.float32),
        action=random.uniform(-1, 1, (*shape, 1)).astype(np.float32),
        reward=random.random(shape).astype(np.float32),
        discount=np.full(shape, 0.99, np.float32),
        following=random.normal(size=(*shape, 5)).astype(np.float32),
    )
    learner = Learner(DOMAINS["cartpole"], 0, width=WIDTH)
    one, other = (
        learner.update(learner.init(), batch) for batch in (batches, batches._replace(reward=1 - batches.reward))
    )
    pairs = zip(jax.tree.leaves(one.params), jax.tree.leaves(other.params), strict=True)
    assert not all(np.array_equal(a, b) for a, b in pairs)
    assert int(one.step) == 6


def test_a_learner_acts_by_the_learned_actor():
    learner = Learner(DOMAINS["cartpole"], 3, width=WIDTH)
    state, observation = learner.init(), 100 * np.random.default_rng(0).normal(size=(50, 5)).astype(np.float32)
    assert np.abs(learner.act(state, observation)).max() < 0.3, "actions are near zero at first"
    changed = jax.tree.map(lambda x: x + 1, state.params["actor"])
    targets = {name: jax.tree.map(lambda x: x + 1, x) for name, x in state.params.items() if name.startswith("target")}
    before = np.asarray(learner.act(state, observation))
    np.testing.assert_array_equal(learner.act(state._replace(params=state.params | targets), observation), before)
    after = learner.act(state._replace(params=state.params | {"actor": changed}), observation)
    assert np.abs(after - before).max() > 0.1
