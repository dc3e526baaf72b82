"""Files that appear whole or not at all, locks between processes, and checksums of settings."""

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ringrl.errors import UserError, brief

if TYPE_CHECKING:
    from filelock import BaseFileLock

NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
UNREADABLE = {
    (errno.EACCES, errno.EPERM): "ask its owner for the permission",
    (errno.EMFILE, errno.ENFILE): "close other files or raise the limit (ulimit -n)",
    (errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.ENOTCONN): "try again when the file system answers",
}
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def expanded(path: str | Path) -> Path:
    """Return a path with `~` and `$NAME` replaced, as a shell would. An existing path stays as it is.

    Raise UserError if a variable is not set, or if a home folder is not known.
    """
    if Path(path).exists():
        return Path(path)
    try:
        text = os.path.expandvars(Path(path).expanduser())
    except RuntimeError as error:
        raise UserError(f"{path}: {error}; write the path out") from error
    if missing := re.search(r"\$\w+|\$\{\w+\}", text):
        raise UserError(f"{path}: the variable {missing[0]} is not set; set it, or write the path out")
    return Path(text)


def linked(path: Path) -> Path:
    """Return the file or folder that a link leads to, also if it does not exist yet. Other paths are returned as is."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def write_whole(path: Path, content: str | bytes, *, alone: bool = True) -> None:
    """Write a file whole, text as UTF-8, or leave the old file unchanged. See `write_aside` for `alone` and errors."""
    with write_aside(path, alone=alone) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def write_aside(path: Path, *, alone: bool = True) -> Iterator[Path]:
    """Yield a hidden path next to `path` for a new file or folder, and rename it to `path` when the block succeeds.

    All content is on disk before the rename. If the block fails, the hidden file or folder is deleted. An existing file
    is replaced, and an existing folder must be empty. If `path` is a link, the file that it leads to is written.

    Raise OSError if the file system rejects a write.

    `alone`: no other process writes the same file at the same time. A kill then leaves one hidden file, which the next
    write replaces. Otherwise each process uses its own hidden name.
    """
    path = linked(path)
    temporary = path.with_name(f".{path.name}.tmp" if alone else f".{path.name}.{os.getpid()}.tmp")
    try:
        remove(temporary)  # left by a killed process
        yield temporary
        for part in [temporary, *temporary.rglob("*")]:
            sync(part)  # otherwise a crash of the machine may leave an empty file under the new name
        temporary.replace(path)
        sync(path.parent)
    except BaseException:
        with suppress(OSError):
            remove(temporary)
        raise


@contextmanager
def lock(path: Path, doing: str, *, file: Path | None = None, wait: bool = False) -> Iterator[None]:
    """Hold an advisory lock on a file or folder until the block or the process ends.

    The lock is in `file` (by default `.{name}.lock` next to `path`), whose folder is created, and which is deleted at
    the end. A file system without such locks holds a marker file instead, and standard error reports it once. The
    marker of a killed process of this machine is replaced. The marker of one of another machine must be deleted.

    Raise UserError if another process or thread holds the lock, unless `wait`. Its message has the holder's action
    (`doing`: "is writing it"). Raise OSError if the lock file cannot be created.
    """
    file = file or linked(path).with_name(f".{linked(path).name}.lock")
    file.parent.mkdir(parents=True, exist_ok=True)
    held = _acquire(path, doing, file, -1 if wait else 0)
    own = file.stat() if file.exists() else None
    try:
        yield
    finally:
        # Processes that wait for this file notice that it is gone, and create the next one.
        with suppress(OSError):
            if own and os.path.samestat(own, file.stat()):
                file.unlink()
        held.release()


def _acquire(path: Path, doing: str, file: Path, timeout: float) -> "BaseFileLock":
    from filelock import FileLock, SoftFileLock, Timeout  # slow to import

    remedy = "wait for it"
    held: BaseFileLock = FileLock(file, timeout=timeout, thread_local=False, fallback_to_soft=False)
    try:
        try:
            held.acquire()
            with suppress(OSError):
                file.write_text(f"{os.getpid()}\n{socket.gethostname()}\n")
        except OSError as error:
            if error.errno not in NO_FLOCK:
                raise
            # Otherwise the soft lock would mistake the new file for the marker of a holder.
            file.unlink(missing_ok=True)
            file = file.with_name(f"{file.name}.soft")
            _report_markers(str(error.strerror))
            remedy = f"wait for it, or delete {file} if that process was killed"
            held = SoftFileLock(file, timeout=timeout, thread_local=False)
            held.acquire()
    except Timeout:
        raise UserError(f"{path}: another process {doing}{_holder(file)}; {remedy}") from None
    return held


@cache
def _report_markers(reason: str) -> None:
    print(f"ringrl: the file system has no file locks ({reason}); files *lock.soft replace them", file=sys.stderr)


def _holder(file: Path) -> str:
    """Return the process named in a lock file, " (process 12 on host)", or "" if the file cannot be read."""
    try:
        process, host = file.read_text().splitlines()[:2]
    except (OSError, ValueError):
        return ""
    return f" (process {process} on {host})"


def remove(path: Path) -> None:
    """Delete a file or a folder with its contents, if it exists. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file or the list of files of a folder to the disk. Raises OSError for a file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some file systems cannot sync folders
            raise
    finally:
        os.close(descriptor)


def reserve(path: Path, size: int) -> None:
    """Allocate `size` bytes of disk for a file if the system can. Raises OSError if the disk is full."""
    if not hasattr(os, "posix_fallocate"):
        return
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
    finally:
        os.close(descriptor)


@contextmanager
def explain_write_errors(path: Path, size: int | None = None) -> Iterator[None]:
    """Turn an OSError while `path` is written into a UserError with advice. `size` is the number of bytes needed."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            folder = next(folder for folder in path.absolute().parents if folder.exists())
            free = f"{shutil.disk_usage(folder).free / 1e6:,.1f} MB are free in {folder}"
            needed = f"{size / 1e6:,.1f} MB are needed, " if size else ""
            raise UserError(
                f"{path}: the disk, a quota or a limit on file size is full ({needed}{free}): "
                "free some space or write elsewhere"
            ) from error
        reason = error.strerror or " ".join(str(error).split())
        raise UserError(f"{path}: cannot be written ({reason}): check the folder or choose another") from error


@contextmanager
def explain_read_errors(where: str, advice: str) -> Iterator[None]:
    """Turn every error while a file from others is read into a UserError that begins with `where`."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where} {error}") from error
    except Exception as error:  # libraries raise nearly anything for damaged bytes
        raise_unreadable(where.removesuffix(":"), error)
        reason = brief(error) or type(error).__name__
        raise UserError(f"{where} cannot be read, it is missing, damaged or cut short ({reason}): {advice}") from error


def raise_unreadable(path: Path | str, error: Exception) -> None:
    """Raise UserError, or MemoryError, unless an error of reading a file may come from a damaged file."""
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, MemoryError) or number == errno.ENOMEM or "memory allocation failed" in str(error):
        raise MemoryError(*error.args) from error
    if "file is already open for" in str(error):  # HDF5 marks a file while a program may write to it
        raise UserError(
            f"{path}: is open for writing in another program, or was when that program was killed: close the file "
            "there, or run h5clear -s on it (HDF5's tools)"
        ) from error
    for numbers, advice in UNREADABLE.items():
        if number is not None and number in numbers:
            raise UserError(f"{path}: cannot be read ({os.strerror(number)}): {advice}") from error


CRC = ', "crc32": "'


def with_crc(line: str) -> str:
    """Return the text of a JSON object with a checksum of the text as its last member."""
    return f'{line[:-1]}{CRC}{zlib.crc32(line.encode()):08x}"}}'


def without_crc(line: str) -> str:
    """Return a line without its checksum, if it has one. Raises ValueError if the text has changed."""
    head, found, _ = line.rpartition(CRC)
    if not found:
        return line
    if with_crc(head + "}") != line:
        raise ValueError("its checksum differs")
    return head + "}"


def json_digest(values: Any) -> str:
    """Return the sha256 of values as JSON, independent of the order of names."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
