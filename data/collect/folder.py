"""A folder that appears whole or not at all, and that an interrupted process can go on filling."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ringrl.errors import UserError
from ringrl.files import lock

_DESCRIPTION = "collection.json"


@contextmanager
def new_folder(destination: Path, description: Mapping[str, str | int]) -> Iterator[Path]:
    """Gives a hidden folder beside `destination` to fill; it takes that name when the block ends well.

    The description of what is collected stays in it as collection.json. If the block fails or the process is killed,
    the episodes finished by then stay in the hidden folder's buffer/, and the next call with the same destination and
    the same description is given that folder to go on with. A folder without episodes is deleted.

    Raises:
        UserError: `destination` exists and is not an empty folder, another process is filling it, the hidden folder
            holds part of another collection, or the disk refuses.
    """
    destination = destination.resolve()
    partial = destination.with_name(f".{destination.name}.partial")
    try:
        with lock(destination, "is collecting into it"):
            if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
                raise UserError(
                    f"{destination}: already exists and is not an empty folder, remove it or choose another name"
                )
            partial.mkdir(exist_ok=True)
            _describe(partial, destination, description)
            try:
                yield partial
            except BaseException:
                if not any(partial.glob("buffer/*.npz")):
                    shutil.rmtree(partial, ignore_errors=True)
                raise
            partial.replace(destination)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{destination}: cannot be written ({reason}): free some space or choose another") from error


def _describe(partial: Path, destination: Path, description: Mapping[str, str | int]) -> None:
    """Writes the description; an episode that is there already must have been recorded under the same one."""
    path = partial / _DESCRIPTION
    text = json.dumps(description, indent=2) + "\n"
    if any(partial.glob("buffer/*.npz")) and (not path.exists() or path.read_text("utf-8", "replace") != text):
        raise UserError(
            f"{destination}: part of another collection waits in {partial} (its {_DESCRIPTION} says which): go on with "
            "that one, remove the folder or choose another name"
        )
    path.write_text(text, "utf-8")
