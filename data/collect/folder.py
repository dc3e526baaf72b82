"""A folder that appears whole or not at all."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ringrl.errors import UserError


@contextmanager
def new_folder(destination: Path) -> Iterator[Path]:
    """Gives a hidden folder beside `destination` to fill; it takes that name when the block ends well.

    If the block fails, the hidden folder is deleted. If the process is killed, the next one that wants the same
    destination clears it.

    Raises:
        UserError: `destination` exists and is not an empty folder, another process is filling it, or the disk refuses.
    """
    destination = destination.resolve()
    if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
        raise UserError(f"{destination}: already exists and is not an empty folder, remove it or choose another name")
    try:
        with _partial_folder(destination) as partial:
            yield partial
            partial.replace(destination)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{destination}: cannot be written ({reason}): free some space or choose another") from error


@contextmanager
def _partial_folder(destination: Path) -> Iterator[Path]:
    partial = destination.with_name(f".{destination.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        _lock(descriptor, partial, destination)
        try:
            for remains in partial.iterdir():
                shutil.rmtree(remains)
            yield partial
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    finally:
        os.close(descriptor)  # and with it the lock


def _lock(descriptor: int, partial: Path, destination: Path) -> None:
    """Claims the folder for this process. The lock goes when the process does, however it ends."""
    busy = UserError(f"{destination}: another process is collecting into it, wait for it or choose another name")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise busy from None
    # Between opening and locking, another process may have given the very folder its final name.
    if not (partial.exists() and os.path.samestat(os.fstat(descriptor), partial.stat())):
        raise busy
