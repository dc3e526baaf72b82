"""Folders that the demo accepts, and folders that it rejects."""

from pathlib import Path

import pytest
from rich.console import Console

from ringrl.errors import UserError
from ringrl.study import demo


class _Stopped(Exception):
    pass


def _begin(output: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Run a demo of four episodes, and stop its collection after some of them."""
    collect = demo.collect

    def stop(done: int, total: int) -> None:
        if done == after:
            raise _Stopped

    with monkeypatch.context() as patch:
        patch.setattr(demo, "EPISODES", 4)
        patch.setattr(demo, "collect", lambda *words, **named: collect(*words, **named, workers=1, progress=stop))
        with pytest.raises(_Stopped):
            demo.run_demo(output, Console(quiet=True))


def test_an_interrupted_collection_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _begin(tmp_path / "demo", monkeypatch, after=2)
    before = sorted(tmp_path.glob("demo/collected/.*/buffer/*.npz"))
    assert len(before) == 2
    _begin(tmp_path / "demo", monkeypatch, after=3)
    assert sorted(tmp_path.glob("demo/collected/.*/buffer/*.npz"))[:2] == before


def test_folders_with_other_files_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match="contains other files; give another --output"):
        demo.run_demo(tmp_path, Console(quiet=True))
    with pytest.raises(UserError, match=r"notes\.txt.*: cannot be written \((Not a directory|File exists)\)"):
        demo.run_demo(tmp_path / "notes.txt", Console(quiet=True))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
