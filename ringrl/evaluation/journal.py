"""The journal of an evaluation: its finished episodes, so that an interrupted one goes on where it stopped.

A folder per evaluation, with the file about.json, which says whose it is, and a file of arrays per episode. Each is
written to a temporary name and renamed: a kill leaves whole files only.
"""

import io
import json
import shutil
import zipfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import numpy as np

from ringrl.errors import UserError
from ringrl.evaluation.episode import ARRAYS, Episode
from ringrl.files import lock, write_whole

_ABOUT = "about.json"
_TYPES = {"observation": np.float32, "action": np.float32, "reward": np.float64, "physics": np.float64}


class Journal:
    """The episodes of one evaluation, in parts ("context", "control") that are numbered from 0 each.

    One process at a time writes a journal.

    Raises UserError, naming the folder, where it is another evaluation's, in use, or cannot be written.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self.folder = folder
        self._lock = ExitStack()
        try:
            self._lock.enter_context(lock(folder, "is running the same evaluation", file=folder / "lock"))
            self._claim(dict(about))
        except OSError as error:
            raise self._unwritable(error) from error

    def episodes(self, part: str, steps: int, streams: int) -> list[Episode]:
        """The finished episodes of a part; from the first that is missing or cannot be read on, none."""
        found: list[Episode] = []
        while (episode := _read(self._file(part, len(found)))) is not None and _is_whole(episode, steps, streams):
            found.append(episode)
        return found

    def add(self, part: str, index: int, episode: Episode) -> None:
        """Write down an episode."""
        path = self._file(part, index)
        content = io.BytesIO()
        np.savez(content, **{name: getattr(episode, name) for name in ARRAYS}, seconds=np.float64(episode.seconds))
        try:
            write_whole(path, content.getvalue())
        except OSError as error:
            raise self._unwritable(error) from error

    def has(self, part: str, index: int) -> bool:
        """Whether an episode stands there."""
        return self._file(part, index).exists()

    def clear(self) -> None:
        """Forget all episodes."""
        for path in self.folder.glob("*.npz"):
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let others use it."""
        self._lock.close()

    def remove(self) -> None:
        """Close and delete it, and the folder it lies in where that holds no other."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.close()
        try:
            self.folder.parent.rmdir()
        except OSError:
            return  # others lie there

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _claim(self, about: dict[str, Any]) -> None:
        path = self.folder / _ABOUT
        about = json.loads(json.dumps(about))
        if path.exists():
            try:
                known = json.loads(path.read_bytes())
            except ValueError:
                known = None
            if known != about:
                raise UserError(f"{self.folder}: is the journal of another evaluation, or damaged; remove it")
            return
        write_whole(path, json.dumps(about, indent=1))

    def _file(self, part: str, index: int) -> Path:
        return self.folder / f"{part}_{index:05}.npz"

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"{self.folder}: the episodes cannot be written down ({error.strerror}); free some space, or give another "
            "--output"
        )


def _read(path: Path) -> Episode | None:
    """None where there is no such file, or it is no episode's."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ARRAYS}
            seconds = float(file["seconds"])
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None
    return Episode(**arrays, seconds=seconds)


def _is_whole(episode: Episode, steps: int, streams: int) -> bool:
    """Whether each array has its type and the size that such an episode has."""
    rows = {"observation": steps + 1, "action": steps, "reward": steps, "physics": steps + 1}
    arrays = {name: getattr(episode, name) for name in ARRAYS}
    return all(
        array.dtype == _TYPES[name]
        and array.shape[:2] == (rows[name], streams)
        and array.ndim == (2 if name == "reward" else 3)
        for name, array in arrays.items()
    )
