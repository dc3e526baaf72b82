"""The journal returns the episodes that were written, whole or not at all."""

import json
from pathlib import Path

import numpy as np
import pytest

from ringrl.errors import UserError
from ringrl.evaluation.journal import EpisodeJournal, sweep
from ringrl.evaluation.rollout import ARRAYS, EpisodeBatch

ABOUT = {"task": "walker_walk", "seeds": (1, 2)}


def episode(seed: int = 0, steps: int = 5, streams: int = 3) -> EpisodeBatch:
    random = np.random.default_rng(seed)
    reward = random.uniform(size=(steps, streams))
    reward[2:, 1] = np.nan
    return EpisodeBatch(
        observation=random.normal(size=(steps + 1, streams, 4)).astype(np.float32),
        action=random.normal(size=(steps, streams, 2)).astype(np.float32),
        reward=reward,
        physics=random.normal(size=(steps + 1, streams, 6)),
        length=np.full(streams, steps),
        terminated=np.zeros(streams, bool),
        seconds=1.5,
    )


def assert_same(one: EpisodeBatch, other: EpisodeBatch) -> None:
    for name in ARRAYS:
        a, b = getattr(one, name), getattr(other, name)
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    assert one.seconds == other.seconds


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "results.journal" / "walker_walk.123"


def test_episodes_by_part_and_number(folder):
    with EpisodeJournal(folder, ABOUT) as journal:
        journal.add("context", 0, episode(0))
        journal.add("context", 1, episode(1))
        journal.add("control", 0, episode(2))
    with EpisodeJournal(folder, ABOUT) as journal:
        first, second = journal.episodes("context")
        assert_same(first, episode(0))
        assert_same(second, episode(1))
        assert len(journal.episodes("control")) == 1
        journal.remove()
    assert not folder.parent.exists()


def test_removing_one_leaves_its_neighbours(folder):
    with EpisodeJournal(folder.with_name("other"), {}), EpisodeJournal(folder, ABOUT) as journal:
        journal.remove()
        assert [path.name for path in folder.parent.iterdir()] == ["other"]


def test_damaged_episodes_are_ignored(folder):
    with EpisodeJournal(folder, ABOUT) as journal:
        for index in range(3):
            journal.add("context", index, episode(index))
        path = folder / "context_00001.npz"
        whole = path.read_bytes()
        for cut in (0, 10, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:cut])
            assert len(journal.episodes("context")) == 1, "episodes after a gap are ignored too"
        np.savez(path, **{name: np.array([{"a": 1}], object) for name in ARRAYS}, seconds=1.0)  # a pickle
        assert len(journal.episodes("context")) == 1
        path.write_bytes(whole)
        assert len(journal.episodes("context")) == 3


@pytest.mark.parametrize("about", ['{"task": "walker_run"}', "{", "[]"])
def test_a_journal_of_another_evaluation_raises(folder, about):
    folder.mkdir(parents=True)
    (folder / "about.json").write_text(about)
    with pytest.raises(UserError, match="another evaluation, or damaged; remove it") as caught:
        EpisodeJournal(folder, ABOUT)
    assert str(folder) in str(caught.value)
    assert (folder / "about.json").read_text() == about


def test_about_names_the_evaluation(folder):
    EpisodeJournal(folder, ABOUT).close()
    assert json.loads((folder / "about.json").read_text()) == {"task": "walker_walk", "seeds": [1, 2]}
    assert not list(folder.glob("*.tmp"))


def test_an_interrupted_removal_is_swept(folder, monkeypatch):
    """The journal is renamed first, so that no later evaluation reads the half that is left."""
    with EpisodeJournal(folder, ABOUT) as journal, monkeypatch.context() as patch:
        journal.add("context", 0, episode(0))
        patch.setattr("shutil.rmtree", lambda path: (path / "about.json").unlink())
        journal.remove()
    assert not folder.exists()
    assert len(list(folder.parent.iterdir())) == 1
    sweep(folder.parent)
    assert not folder.parent.exists()


def test_one_writer_at_a_time(folder):
    with (
        EpisodeJournal(folder, ABOUT),
        pytest.raises(UserError, match="is running the same evaluation"),
    ):
        EpisodeJournal(folder, ABOUT)
    EpisodeJournal(folder, ABOUT).close()


def test_a_file_in_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        EpisodeJournal(tmp_path / "file" / "journal", ABOUT)
