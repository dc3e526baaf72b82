"""Download of the public ExoRL archives. An interrupted download resumes.

Received bytes are appended to a hidden `.{name}.partial`. `.{name}.partial.json` records the version of the file on the
server. The next request asks for the rest if the version is the same (If-Range), and for the whole file otherwise.
"""

import errno
import json
import os
import re
import shutil
import time
from contextlib import suppress
from pathlib import Path

import urllib3

from ringrl import __version__
from ringrl.data.exorl.archive import open_zip, shown
from ringrl.envs import domain_named
from ringrl.errors import UserError
from ringrl.files import explain_write_errors, lock, remove, sync, write_whole
from ringrl.pace import Progress, no_progress

CHUNK = 2**18  # bytes of one read
PAUSES = (1, 2, 4, 8, 16)  # seconds before each further try
LONGEST_TIMEOUT = 86_400.0  # seconds
BUSY = (408, 425, 429, 500, 502, 503, 504)
PUBLIC_ADDRESS = "https://dl.fbaipublicfiles.com/exorl"
ALGORITHMS = ("aps", "icm_apt", "diayn", "disagreement", "icm", "proto", "random", "rnd", "smm")


def hidden_name(path: Path) -> Path:
    """Return the path of the bytes received so far."""
    return path.with_name(f".{path.name}.partial")


def download_archive(
    domain: str,
    algorithm: str,
    folder: str | Path = "datasets",
    *,
    url: str = PUBLIC_ADDRESS,
    timeout: float = 30.0,
    progress: Progress = no_progress,
) -> Path:
    """Download `{url}/{domain}/{algorithm}.zip` to `{folder}/{domain}/{algorithm}.zip` and return that path.

    The archive appears when it is complete. An existing archive is kept. The next call after a failure resumes. A
    connection or a read may wait for `timeout` seconds. `progress` is called with (received bytes, total).

    UserError for unknown names, no connection, no such file on the server or one that is no zip archive, a full disk,
    or another process that fetches the same file.
    """
    if algorithm not in ALGORITHMS:
        raise UserError(f"unknown algorithm {algorithm!r}; algorithms: {', '.join(ALGORITHMS)}")
    path = Path(folder) / domain_named(domain).name / f"{algorithm}.zip"
    address = f"{url.rstrip('/')}/{domain}/{algorithm}.zip"
    if not re.fullmatch(r"https?://[^/:?#\s][!-~]*", address):
        raise UserError(f"{address}: is not a usable address: --url takes http://... or https://...")
    if not 0 < timeout <= LONGEST_TIMEOUT:
        raise UserError(f"--timeout: {timeout} is not between 0 and {LONGEST_TIMEOUT:.0f} seconds")
    if path.exists():
        open_zip(path).close()
        return path
    partial = hidden_name(path)
    record = partial.with_name(f"{partial.name}.json")
    with explain_write_errors(path), lock(path, "is writing it"):
        try:
            if not path.exists():  # not finished by another process before this one had the lock
                _receive_all(address, path, record, timeout, progress)
                sync(partial)
                try:
                    open_zip(partial).close()  # the import compares all bytes with their checksums
                except UserError as error:
                    remove(partial)
                    raise UserError(
                        f"{address}: the file of the server is unusable and was removed: {error}"
                    ) from error
                partial.replace(path)
                sync(path.parent)
        finally:
            if not _size(partial):
                remove(partial)
                remove(record)
    return path


class _Interrupted(Exception):
    """A failure after which another try may succeed."""


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _receive_all(address: str, path: Path, record: Path, timeout: float, progress: Progress) -> None:
    """Try until the file is whole. UserError after the last try."""
    for pause in (*PAUSES, None):
        try:
            _receive(address, path, record, timeout, progress)
            return
        except (_Interrupted, urllib3.exceptions.HTTPError) as reason:
            if pause is None:
                why = shown(str(getattr(reason, "reason", None) or reason))
                raise UserError(
                    f"{path}: {why} ({address}; {_size(hidden_name(path)):,} bytes are kept): "
                    "run the same command again to resume"
                ) from reason
            time.sleep(pause)


def _receive(address: str, path: Path, record: Path, timeout: float, progress: Progress) -> None:
    """Request the missing bytes. Raises _Interrupted or HTTPError if another try may succeed."""
    partial, received = hidden_name(path), _size(hidden_name(path))
    try:
        known, size, validator = json.loads(record.read_bytes())
    except (OSError, ValueError):
        known, size, validator = "", 0, None
    if known != address or received > size or not (validator or received == size):
        received = size = 0
    if size and received == size:  # killed before the rename
        return
    headers = {"User-Agent": f"ringrl/{__version__}", "Accept-Encoding": "identity"}
    if received:
        headers |= {"Range": f"bytes={received}-", "If-Range": validator}
    redirects = urllib3.Retry(total=None, connect=0, read=0, status=0, other=0, redirect=10)
    with (
        urllib3.PoolManager(timeout=timeout) as pool,
        pool.request("GET", address, headers=headers, preload_content=False, retries=redirects) as response,
    ):
        if response.status in BUSY:
            raise _Interrupted(f"the server answers {_status(response)}")
        is_rest = (
            response.status == 206
            and received > 0
            and validator in (response.headers.get("ETag"), response.headers.get("Last-Modified"))
            and response.headers.get("Content-Range") == f"bytes {received}-{size - 1}/{size}"
        )
        if response.status in (206, 416) and not is_rest:
            remove(partial)
            raise _Interrupted("the file on the server has changed")
        if not is_rest:
            received, size = 0, _announced(response, address)
            remove(partial)
            write_whole(record, json.dumps([address, size, _validator(response)]))
        with explain_write_errors(path, size - received):
            if size - received > shutil.disk_usage(path.parent).free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with partial.open("ab") as file:
            progress(received, size)
            with suppress(urllib3.exceptions.ProtocolError):  # cut short
                while chunk := response.read1(CHUNK, decode_content=False):
                    file.write(chunk[: size - file.tell()])
                    progress(file.tell(), size)
            if file.tell() < size:
                raise _Interrupted(f"the connection was cut after {file.tell():,} of {size:,} bytes")


def _status(response: urllib3.BaseHTTPResponse) -> str:
    return shown(f"{response.status} {response.reason or ''}".strip())


def _announced(response: urllib3.BaseHTTPResponse, address: str) -> int:
    """Return the size of the whole file. UserError if the server does not send the file."""
    if response.status != 200:
        raise UserError(
            f"{address}: the server does not give out this file ({_status(response)}): check the domain, the algorithm "
            "and --url (not every pair has an archive)"
        )
    length = response.headers.get("Content-Length", "")
    if not re.fullmatch("[1-9][0-9]{0,17}", length):
        raise UserError(f"{address}: the server does not announce the size of the file: check --url")
    return int(length)


def _validator(response: urllib3.BaseHTTPResponse) -> str | None:
    """Return the value for If-Range: a strong ETag (weak ones allow other bytes), else the date of the last change."""
    etag, date = response.headers.get("ETag", ""), response.headers.get("Last-Modified", "")
    if re.fullmatch(r'"[!#-~]*"', etag):
        return etag
    return date if re.fullmatch(r"[A-Za-z0-9 ,:+-]+", date) else None
