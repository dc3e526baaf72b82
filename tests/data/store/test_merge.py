"""A merged store has every episode unchanged and in order. Stores that do not match are rejected."""

from pathlib import Path

import numpy as np
import pytest

from ringrl.cli import main
from ringrl.data.store import EpisodeStore
from ringrl.data.store.merge import merge_stores
from ringrl.errors import UserError


@pytest.fixture
def two(tmp_path: Path, random_episode, write_store) -> list[EpisodeStore]:
    """Two stores, of three and two episodes."""
    first = [random_episode("cartpole", 5, number) for number in range(3)]
    second = [random_episode("cartpole", 7, number) for number in range(3, 5)]
    return [write_store(tmp_path / f"{name}.h5", "cartpole", part) for name, part in (("a", first), ("b", second))]


def test_all_episodes_come_over_in_order(two: list[EpisodeStore], tmp_path: Path) -> None:
    known = []
    merged = merge_stores([store.path for store in two], tmp_path / "c.h5", progress=lambda *step: known.append(step))
    assert known[-1] == (5, 5)
    merged.verify()
    originals = [store.episode(index) for store in two for index in range(store.num_episodes)]
    assert merged.num_episodes == len(originals)
    for index, original in enumerate(originals):
        for key, values in merged.episode(index).items():
            np.testing.assert_array_equal(values, original[key], err_msg=key)
    for task in merged.tasks:
        np.testing.assert_array_equal(merged.returns(task), np.concatenate([store.returns(task) for store in two]))
    assert merged.source == " + ".join(store.source for store in two)


def test_the_command_keeps_its_result_and_rejects_another_store(
    two, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(store.path) for store in two]
    command = ["data", "merge", *paths, "--output", str(tmp_path / "c.h5")]
    main(command)
    assert "5 x 5 to 7 steps" in capsys.readouterr().out
    before, remains = (tmp_path / "c.h5").read_bytes(), tmp_path / ".c.h5.lock"
    remains.touch()  # left by a kill after the rename
    main(command)
    assert "5 x 5 to 7 steps" in capsys.readouterr().out
    assert (tmp_path / "c.h5").read_bytes() == before
    assert not remains.exists()
    with pytest.raises(SystemExit) as stopped:
        main(["data", "merge", *reversed(paths), "--output", str(tmp_path / "c.h5")])
    assert stopped.value.code == 2
    assert "--overwrite" in capsys.readouterr().err
    main([*command, "--overwrite"])


def test_an_episode_that_is_in_two_stores_is_named(two, tmp_path: Path, random_episode, write_store) -> None:
    """Otherwise a context of distinct trajectories could contain an episode twice."""
    overlapping = write_store(tmp_path / "d.h5", "cartpole", [random_episode("cartpole", 5, n) for n in (9, 1)])
    with pytest.raises(UserError, match=r"d.h5: 1 of its .*episode 1 is episode 1 of .*a.h5") as rejected:  # b between
        merge_stores([*(store.path for store in two), overlapping.path], tmp_path / "c.h5")
    assert "\n" not in str(rejected.value)
    assert not (tmp_path / "c.h5").exists()


def test_a_damaged_store_gets_no_new_checksums(two, tmp_path: Path) -> None:
    path = two[1].path
    whole = path.read_bytes()
    place = whole.index(two[1].episode(1)["observation"].tobytes())
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(UserError, match=r"b.h5: episode 1 is damaged"):
        merge_stores([store.path for store in two], tmp_path / "c.h5")
    assert not (tmp_path / "c.h5").exists()


def test_stores_that_do_not_fit_together_are_rejected(two, tmp_path: Path, random_episode, write_store) -> None:
    walker = write_store(tmp_path / "w.h5", "walker", [random_episode("walker", 5, 0)])
    first = two[0].path
    for sources, message in (
        ([first], "at least two"),
        ([first, first], "3 of its episodes are in another store"),
        ([first, walker.path], "walker_stand.* and cartpole_balance.*merge stores with equal tasks"),
    ):
        with pytest.raises(UserError, match=message):
            merge_stores(sources, tmp_path / "c.h5")
    assert not (tmp_path / "c.h5").exists()
