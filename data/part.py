"""The hidden file under which a store, or a download, grows: claimed by one process, and what can go wrong with it."""

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ringrl.errors import UserError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def part_of(path: Path) -> Path:
    """The hidden name under which the file at `path` grows."""
    return path.with_name(f".{path.name}.partial")


def journal_of(path: Path) -> Path:
    """The file beside it that says which episodes are in it, where it can be gone on with."""
    return path.with_name(f".{path.name}.partial.journal")


def refuse_taken(path: Path, *, overwrite: bool) -> None:
    """UserError if no store may be written at `path`."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder, name the store's file")
    if path.exists() and not overwrite:
        raise UserError(f"{path}: already exists, choose another name or overwrite it (--overwrite)")


def claim(path: Path) -> int:
    """Opens the part of the file at `path`, empty if there is none, for this process only.

    Returns its descriptor; the claim goes when the process does or closes it. UserError if another process has it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    return _claim(path, os.O_CREAT)


def claim_new(path: Path, claimed: int) -> int:
    """An empty part in place of the claimed one, whose descriptor is closed.

    Another file, not the same one emptied: workers of a process that was killed may write their last rows into that.
    """
    try:
        journal_of(path).unlink(missing_ok=True)
        part_of(path).unlink()
        return _claim(path, os.O_CREAT | os.O_EXCL)
    finally:
        os.close(claimed)


def discard(path: Path) -> None:
    """Deletes the part of the store at `path`, which must be claimed, and its journal."""
    journal_of(path).unlink(missing_ok=True)
    part_of(path).unlink(missing_ok=True)


def reserve(descriptor: int, size: int) -> None:
    """Claims `size` bytes of disk now (where the system can), so that a full disk shows before the work and not after.

    Raises OSError.
    """
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno in DISK_FULL:
                raise


def write_all(descriptor: int, content: memoryview, place: int) -> None:
    """Writes all bytes at their place, however many calls that takes. Raises OSError."""
    view = content.cast("B")
    while view:
        written = os.pwrite(descriptor, view, place)
        view, place = view[written:], place + written


@contextlib.contextmanager
def cannot_write(path: Path, size: int | None = None) -> Iterator[None]:
    """Turns failed writes, of `size` bytes where known, into one line that says what the user can do."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            free = f"{shutil.disk_usage(path.parent).free / 1e6:,.1f} MB are free in {path.parent}"
            needed = f"{size / 1e6:,.1f} MB are needed, " if size else ""
            raise UserError(
                f"{path}: the disk, a quota or a limit on file size is full ({needed}{free}): "
                "free some space or write elsewhere"
            ) from error
        reason = error.strerror or " ".join(str(error).split())
        raise UserError(f"{path}: cannot be written ({reason}): check the folder or choose another") from error


def sync_folder(folder: Path) -> None:
    """Makes a new name itself safe; file systems that cannot are left alone."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _claim(path: Path, flags: int) -> int:
    busy = UserError(f"{path}: another process is writing it, wait for it or choose another name")
    try:
        descriptor = os.open(part_of(path), os.O_RDWR | os.O_CLOEXEC | flags, 0o644)
    except FileExistsError:
        raise busy from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Between open and lock another writer may have finished and renamed the very file that is open here.
        if part_of(path).exists() and os.path.samestat(os.fstat(descriptor), part_of(path).stat()):
            return descriptor
    except BlockingIOError:
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    raise busy
