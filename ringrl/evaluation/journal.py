"""The journal of an evaluation: its finished episodes on disk, from which an interrupted evaluation resumes.

Each evaluation has a folder with one file of arrays per episode and about.json, which names the evaluation.
"""

import io
import json
import zipfile
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self

import numpy as np

from ringrl.errors import UserError
from ringrl.evaluation.rollout import ARRAYS, EpisodeBatch
from ringrl.files import explain_write_errors, lock, remove, write_whole

GONE = ".removed"  # suffix of a journal that is being deleted


class EpisodeJournal:
    """The finished episodes of one evaluation, numbered from 0 in each part. It is locked while it is open.

    Args:
        folder: folder of the journal, created if missing.
        decides: everything that decides the result of the evaluation, as plain values.

    Raises:
        UserError: the folder belongs to another evaluation, is locked, or cannot be written.
    """

    def __init__(self, folder: Path, decides: Mapping[str, Any]) -> None:
        self.folder = folder
        self._lock = ExitStack()
        with explain_write_errors(folder):
            self._lock.enter_context(lock(folder, "is running the same evaluation", file=folder / "lock"))
            self._claim(json.loads(json.dumps(dict(decides))))

    def episodes(self, part: str) -> list[EpisodeBatch]:
        """Return the episodes of a part up to the first one that is missing or unreadable."""
        found: list[EpisodeBatch] = []
        while (episode := self.episode(part, len(found))) is not None:
            found.append(episode)
        return found

    def episode(self, part: str, index: int) -> EpisodeBatch | None:
        """Return an episode; None: its file is missing or unreadable."""
        try:
            with np.load(self._file(part, index), allow_pickle=False) as file:
                return EpisodeBatch(**{name: file[name] for name in ARRAYS}, seconds=float(file["seconds"]))
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
            return None

    def add(self, part: str, index: int, episode: EpisodeBatch) -> None:
        """Write an episode. Raises UserError if the folder cannot be written."""
        content = io.BytesIO()
        np.savez(content, **{name: getattr(episode, name) for name in ARRAYS}, seconds=np.float64(episode.seconds))
        with explain_write_errors(self.folder):
            write_whole(self._file(part, index), content.getvalue())

    def remove(self) -> None:
        """Delete the journal, and its parent folder if that is empty. A kill leaves a folder for `sweep`."""
        gone = self.folder.with_name(f".{self.folder.name}{GONE}")
        with suppress(OSError):
            remove(gone)
            self.folder.rename(gone)
            remove(gone)
        self.close()
        with suppress(OSError):  # the parent contains other journals
            self.folder.parent.rmdir()

    def close(self) -> None:
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _claim(self, decides: dict[str, Any]) -> None:
        """Write about.json, or check that it names the same evaluation."""
        path = self.folder / "about.json"
        if not path.exists():
            write_whole(path, json.dumps(decides, indent=1))
            return
        try:
            known = json.loads(path.read_bytes())
        except ValueError:
            known = None
        if known != decides:
            self.close()
            raise UserError(f"{self.folder}: is the journal of another evaluation, or damaged; remove it")

    def _file(self, part: str, index: int) -> Path:
        return self.folder / f"{part}_{index:05}.npz"


def sweep(folder: Path) -> None:
    """Delete the journals in a folder whose removal was interrupted."""
    for gone in folder.glob(f".*{GONE}"):
        with suppress(OSError):  # another process deletes it
            remove(gone)
    with suppress(OSError):  # missing, or not empty
        folder.rmdir()
