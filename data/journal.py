"""The journal of an import: which episodes have been written, so that an interrupted one can go on.

One JSON object per line: first what is being imported, then one line per episode. A line is no promise that the rows
have reached the disk: whoever goes on compares them with the digests in it.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Self

from ringrl.data.writer import Record


class Imported(NamedTuple):
    """An episode that has been written.

    Attributes:
        record: its digests and returns.
        matches: the tasks whose rewards are the recorded ones.
        has_reward: whether any recorded reward is not zero.
    """

    record: Record
    matches: tuple[str, ...]
    has_reward: bool


class Journal:
    """An open journal, to which episodes are added.

    Attributes:
        head: what was given when the journal was begun.
        episodes: those that are in it, by their numbers in the store.

    Raises OSError if it cannot be written.
    """

    def __init__(self, path: Path, head: Mapping[str, str], episodes: dict[int, Imported]) -> None:
        self.head, self.episodes = head, episodes
        self._file = path.open("a", encoding="ascii")

    @classmethod
    def begin(cls, path: Path, head: Mapping[str, str]) -> Self:
        """A new journal in place of any other."""
        path.write_text(f"{json.dumps(head)}\n", encoding="ascii")
        return cls(path, head, {})

    @classmethod
    def resume(cls, path: Path, identity: str) -> Self | None:
        """The journal at `path`, if its head has this identity; None otherwise."""
        try:
            content = path.read_bytes()
            end = content.rfind(b"\n") + 1  # the last line may have been cut off
            first, *lines = content[:end].decode("ascii").splitlines()
            head = json.loads(first)
            if head["identity"] != identity:
                return None
            os.truncate(path, end)
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        return cls(path, head, dict(filter(None, map(_parse, lines))))

    def add(self, index: int, imported: Imported) -> None:
        """Notes that an episode has been written."""
        self.episodes[index] = imported
        self._file.write(f"{_line(index, imported)}\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _line(index: int, imported: Imported) -> str:
    record = imported.record
    return json.dumps({
        "episode": index,
        "recorded": record.recorded.hex(),
        "relabelled": record.relabelled.hex(),
        "returns": record.returns,
        "matches": imported.matches,
        "has_reward": imported.has_reward,
    })  # fmt: skip


def _parse(line: str) -> tuple[int, Imported] | None:
    try:
        values = json.loads(line)
        record = Record(
            bytes.fromhex(values["recorded"]), bytes.fromhex(values["relabelled"]), tuple(map(float, values["returns"]))
        )
        return int(values["episode"]), Imported(record, tuple(values["matches"]), bool(values["has_reward"]))
    except (ValueError, KeyError, TypeError):
        return None  # cut off, or damaged: that episode is imported again
