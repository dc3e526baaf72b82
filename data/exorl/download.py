"""Download of the public ExoRL archives. An interrupted download resumes.

Received bytes are appended to a hidden `.{name}.partial` in the same folder. `.{name}.partial.json` records the version
of the file on the server. The next request asks for the rest if the version is the same (If-Range), and for the whole
file otherwise.
"""

import errno
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import urllib3

from ringrl import __version__
from ringrl.data.exorl.archive import open_zip, shown
from ringrl.data.store.writer import hidden_name
from ringrl.envs import domain_named
from ringrl.errors import UserError
from ringrl.files import explain_write_errors, lock, sync, write_whole
from ringrl.pace import Progress, no_progress

CHUNK = 2**18  # bytes of one read
PROGRESS = 2**20  # bytes after which earlier failures no longer count
RETRIES = 5  # failures in a row after which the download fails
LONGEST_PAUSE = 60.0  # seconds
LONGEST_TIMEOUT = 86_400.0  # seconds
BUSY = (408, 425, 429, 500, 502, 503, 504)
PUBLIC_ADDRESS = "https://dl.fbaipublicfiles.com/exorl"
ALGORITHMS = ("aps", "icm_apt", "diayn", "disagreement", "icm", "proto", "random", "rnd", "smm")


def download_archive(
    domain: str,
    algorithm: str,
    folder: str | Path = "datasets",
    *,
    url: str = PUBLIC_ADDRESS,
    timeout: float = 30.0,
    pause: float = 1.0,
    progress: Progress = no_progress,
    notice: Callable[[str], None] = lambda event: None,
) -> Path:
    """Download `{url}/{domain}/{algorithm}.zip` to `{folder}/{domain}/{algorithm}.zip` and return that path.

    An interrupted download resumes. An existing archive is kept. `algorithm` is one of ALGORITHMS. See `Transfer` for
    the other arguments.

    Raises:
        UserError: unknown names, another file in place of the archive, and the errors of `Transfer.run`.
    """
    if algorithm not in ALGORITHMS:
        raise UserError(f"unknown algorithm {algorithm!r}; algorithms: {', '.join(ALGORITHMS)}")
    path = Path(folder) / domain_named(domain).name / f"{algorithm}.zip"
    address = f"{url.rstrip('/')}/{domain}/{algorithm}.zip"
    transfer = Transfer(address, path, timeout, pause, progress, notice)
    if path.exists():
        open_zip(path).close()
        notice(f"{path}: already exists and is whole")
    else:
        transfer.run()
    return path


class _Interrupted(Exception):
    """A failure after which another try may succeed."""


@dataclass
class Transfer:
    """A download of a zip archive from `url` (http or https) to `path`."""

    url: str
    path: Path
    timeout: float = 30.0  # seconds that a connection or a read may wait
    pause: float = 1.0  # seconds before the first retry; each further pause is twice as long
    progress: Progress = no_progress  # in bytes
    notice: Callable[[str], None] = lambda event: None  # called with one line about each other event

    def __post_init__(self) -> None:
        self._part = hidden_name(self.path)
        self._state = self._part.with_name(f"{self._part.name}.json")
        if not re.fullmatch(r"https?://[^/:?#\s][!-~]*", self.url):
            raise UserError(f"{self.url}: is not a usable address: --url takes http://... or https://...")
        if not 0 < self.timeout <= LONGEST_TIMEOUT:
            raise UserError(f"--timeout: {self.timeout} is not between 0 and {LONGEST_TIMEOUT:.0f} seconds")

    def run(self) -> None:
        """Fetch the file or the rest of it. It appears at `path` whole or not at all. An existing file is kept.

        Received bytes are kept for the next run, unless they are wrong.

        Raises:
            UserError: the server does not have the file, contradicts itself or cannot be reached, another process
                fetches the same file, the disk is full, or the file is not a whole zip archive.
        """
        with explain_write_errors(self.path), lock(self.path, "is writing it"):
            if self.path.exists():  # finished by another process before this one had the lock
                return
            try:
                self._receive_all()
                sync(self._part)
                try:
                    open_zip(self._part).close()  # the import compares all bytes with their checksums
                except UserError as error:
                    self._discard()
                    raise UserError(
                        f"{self.url}: the file of the server is unusable and was removed: {error}"
                    ) from error
                self._part.replace(self.path)
                sync(self.path.parent)
            finally:
                if not self._received():
                    self._discard()

    def _received(self) -> int:
        return self._part.stat().st_size if self._part.exists() else 0

    def _discard(self) -> None:
        self._part.unlink(missing_ok=True)
        self._state.unlink(missing_ok=True)

    def _receive_all(self) -> None:
        """Try until the file is whole. UserError after too many failures in a row without progress."""
        best, failures = self._received(), 0
        while True:
            try:
                return self._try_once()
            except (_Interrupted, urllib3.exceptions.HTTPError) as reason:
                received = self._received()
                if received >= best + PROGRESS:
                    best, failures = received, 0
                failures += 1
                why = shown(str(getattr(reason, "reason", None) or reason))
                if failures > RETRIES:
                    raise UserError(
                        f"{self.path}: {why} ({self.url}; {received:,} bytes are kept): "
                        "run the same command again to resume"
                    ) from reason
                pause = min(self.pause * 2 ** (failures - 1), LONGEST_PAUSE)
                self.notice(f"{why}: trying again in {pause:.0f} s ({failures} of {RETRIES})")
                time.sleep(pause)

    def _try_once(self) -> None:
        """Request the missing bytes. Raises _Interrupted or HTTPError if another try may succeed."""
        size, validator = self._read_state()
        if size and self._received() == size:
            return
        if validator is None or self._received() > size:
            self._discard()
        headers, received = {"User-Agent": f"ringrl/{__version__}", "Accept-Encoding": "identity"}, self._received()
        if received:
            headers |= {"Range": f"bytes={received}-", "If-Range": str(validator)}
        redirects = urllib3.Retry(total=None, connect=0, read=0, status=0, other=0, redirect=10)
        with (
            urllib3.PoolManager(timeout=self.timeout) as pool,
            pool.request("GET", self.url, headers=headers, preload_content=False, retries=redirects) as response,
        ):
            size = self._check_answer(response, size, validator)
            needed = size - self._received()
            with explain_write_errors(self.path, needed):
                if needed > shutil.disk_usage(self.path.parent).free:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._append(response, size)

    def _read_state(self) -> tuple[int, str | None]:
        """Return the recorded size and validator of the file on the server; (0, None) if it must start anew."""
        try:
            state = json.loads(self._state.read_bytes())
            url, size, validator = state["url"], state["size"], state["validator"]
        except (OSError, ValueError, KeyError, TypeError):
            return 0, None
        is_usable = url == self.url and type(size) is int and isinstance(validator, str | None)
        return (size, validator) if is_usable else (0, None)

    def _check_answer(self, response: urllib3.BaseHTTPResponse, size: int, validator: str | None) -> int:
        """Return the size of the whole file, and prepare to append the answer's body to the received bytes."""
        headers, received = response.headers, self._received()
        status = shown(f"{response.status} {response.reason or ''}".strip())
        if response.status in BUSY:
            raise _Interrupted(f"the server answers {status}")
        if response.status == 206 and received:
            is_same = validator in (headers.get("ETag"), headers.get("Last-Modified"))
            if is_same and headers.get("Content-Range") == f"bytes {received}-{size - 1}/{size}":
                return size
        if response.status in (206, 416):  # the server has another file by now
            self._discard()
            raise _Interrupted("the server cannot send the rest of the file, starting anew")
        if response.status != 200:
            raise UserError(
                f"{self.url}: the server does not give out this file ({status}): check the domain, the algorithm and "
                "--url (not every pair has an archive)"
            )
        length = headers.get("Content-Length", "")
        if not re.fullmatch("[1-9][0-9]{0,17}", length):
            raise UserError(f"{self.url}: the server does not announce the size of the file: check --url")
        size = int(length)
        if received:
            self.notice("the file has changed on the server, or it cannot resume: starting anew")
        self._discard()
        write_whole(self._state, json.dumps({"url": self.url, "size": size, "validator": _validator(response)}))
        return size

    def _append(self, response: urllib3.BaseHTTPResponse, size: int) -> None:
        """Append the body to the received bytes, after which the file must have `size` bytes."""
        with self._part.open("ab") as file:
            self.progress(file.tell(), size)
            with suppress(urllib3.exceptions.ProtocolError):  # cut short
                while chunk := response.read1(CHUNK, decode_content=False):
                    file.write(chunk[: size - file.tell()])
                    self.progress(file.tell(), size)
            if file.tell() < size:
                raise _Interrupted(f"the connection was cut after {file.tell():,} of {size:,} bytes")


def _validator(response: urllib3.BaseHTTPResponse) -> str | None:
    """Return the value for If-Range: a strong ETag (weak ones allow other bytes), else the date of the last change."""
    etag, date = response.headers.get("ETag", ""), response.headers.get("Last-Modified", "")
    if re.fullmatch(r'"[!#-~]*"', etag):
        return etag
    return date if re.fullmatch(r"[A-Za-z0-9 ,:+-]+", date) else None
