"""Download of one large file over HTTP. An interrupted download resumes.

Received bytes are appended to a hidden `.{name}.partial` in the same folder. `.{name}.partial.json` records the version
of the file on the server. The next request asks for the rest if the version is the same (If-Range), and for the whole
file otherwise. Every answer is checked against its own headers and the known size.
"""

import errno
import json
import os
import re
import shutil
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import urllib3

from ringrl import __version__
from ringrl.data.exorl.archive import shown
from ringrl.data.store.writer import hidden_name
from ringrl.errors import UserError
from ringrl.files import explain_write_errors, lock, sync, write_whole

CHUNK = 2**18  # bytes of one read
PROGRESS = 2**20  # bytes after which earlier failures no longer count
LONGEST_PAUSE = 60.0  # seconds
LONGEST_TIMEOUT = 86_400.0  # seconds
BUSY = (408, 425, 429, 500, 502, 503, 504)
MISSING = (403, 404, 410)  # storage services answer 403 for a file that they do not have
REDIRECTS = urllib3.Retry(total=None, connect=0, read=0, status=0, other=0, redirect=10)


@dataclass(frozen=True)
class Patience:
    """How long to wait for a server, and how often to try again."""

    timeout: float = 30.0  # seconds that a connection or a read may wait
    retries: int = 5  # failures in a row after which the transfer fails
    pause: float = 1.0  # seconds before the first retry; each further pause is twice as long

    def __post_init__(self) -> None:
        if not 0 < self.timeout <= LONGEST_TIMEOUT:
            raise UserError(f"--timeout: {self.timeout} is not between 0 and {LONGEST_TIMEOUT:.0f} seconds")


PATIENT = Patience()


class _Interrupted(Exception):
    """A failure after which another try may succeed."""


@dataclass(frozen=True)
class Transfer:
    """A download from `url` (http or https) to `path`."""

    url: str
    path: Path
    check: Callable[[Path], None]  # called with the whole file before it gets its name; raises UserError
    known_size: int | None = None  # bytes
    spare: float = 0.0  # disk space needed next to the file, in bytes per byte of it
    advice: str = "check the address"  # ends the error about a missing file
    patience: Patience = PATIENT
    progress: Callable[[int, int], None] = lambda received, size: None  # bytes
    notice: Callable[[str], None] = lambda event: None  # called with one line about each other event

    def run(self) -> None:
        """Fetch the file or the rest of it. It appears at `path` whole or not at all. An existing file is kept.

        Received bytes are kept for the next run, unless they are wrong.

        Raises:
            UserError: the address is unusable, the server does not have the file, contradicts itself or cannot be
                reached, another process fetches the same file, the disk is full, or `check` fails.
        """
        try:
            address = urllib3.util.parse_url(self.url)
        except urllib3.exceptions.LocationParseError:
            address = urllib3.util.Url()
        if address.scheme not in ("http", "https") or not address.host or not re.fullmatch("[!-~]+", self.url):
            raise UserError(f"{self.url}: is not a usable address: --url takes http://... or https://...")
        with explain_write_errors(self.path), lock(self.path, "is writing it"):
            if self.path.exists():  # finished by another process before this one had the lock
                return
            try:
                self._receive_all()
                sync(self._part)
                try:
                    self.check(self._part)
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

    @property
    def _part(self) -> Path:
        return hidden_name(self.path)

    @property
    def _state(self) -> Path:
        return self._part.with_name(f"{self._part.name}.json")

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
            except _Interrupted as reason:
                received = self._received()
                if received >= best + PROGRESS:
                    best, failures = received, 0
                failures += 1
                if failures > self.patience.retries:
                    kept = f"{received:,} bytes are kept" if received else "nothing was received"
                    raise UserError(
                        f"{self.path}: {reason} ({self.url}; {kept}): run the same command again to resume"
                    ) from reason
                pause = min(self.patience.pause * 2 ** (failures - 1), LONGEST_PAUSE)
                self.notice(f"{reason}: trying again in {pause:.0f} s ({failures} of {self.patience.retries})")
                time.sleep(pause)

    def _try_once(self) -> None:
        """Request the missing bytes. Raises _Interrupted if another try may succeed."""
        size, validator = self._read_state()
        if size and self._received() == size:
            return
        if validator is None or self._received() > size:
            self._discard()
        headers, received = {"User-Agent": f"ringrl/{__version__}", "Accept-Encoding": "identity"}, self._received()
        if validator and received:
            headers |= {"Range": f"bytes={received}-", "If-Range": validator}
        with urllib3.PoolManager(timeout=self.patience.timeout) as pool, self._request(pool, headers) as response:
            length = response.headers.get("Content-Length", "")
            announced = int(length) if re.fullmatch("[0-9]{1,18}", length) else None
            if response.status == 206:
                self._check_rest(response, size, headers.get("If-Range", ""), announced)
            else:
                size = self._start_anew(response, announced)
            needed = int(size * (1 + self.spare)) - self._received()
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
        is_usable = url == self.url and type(size) is int and self.known_size in (None, size)
        return (size, validator) if is_usable and isinstance(validator, str | None) else (0, None)

    def _request(self, pool: urllib3.PoolManager, headers: dict[str, str]) -> urllib3.BaseHTTPResponse:
        """Return an answer with status 200 or 206."""
        try:
            response = pool.request("GET", self.url, headers=headers, preload_content=False, retries=REDIRECTS)
        except urllib3.exceptions.HTTPError as error:
            reason = getattr(error, "reason", None) or error
            if isinstance(reason, urllib3.exceptions.ResponseError | urllib3.exceptions.LocationValueError):
                self._reject("redirects in circles or to an address that is neither http nor https")
            if isinstance(certificate := reason.__cause__, ssl.SSLCertVerificationError):
                raise UserError(
                    f"{self.url}: the server's certificate is not trusted ({certificate.verify_message}): "
                    "check the address and this machine's clock and certificates"
                ) from error
            raise _Interrupted(f"the server cannot be reached ({_cause(reason)})") from error
        status = shown(f"{response.status} {response.reason or ''}".strip())
        if response.status in BUSY:
            raise _Interrupted(f"the server answers {status}")
        if response.status == 416 and "Range" in headers:
            # The server has fewer bytes than were received: the file has changed, or its size was wrong.
            self._discard()
            raise _Interrupted("the server no longer has the rest of the file, starting anew")
        if response.status in MISSING:
            raise UserError(f"{self.url}: the server does not give out this file ({status}): {self.advice}")
        if response.status not in (200, 206):
            self._reject(f"answers {status} instead of the file")
        return response

    def _start_anew(self, response: urllib3.BaseHTTPResponse, announced: int | None) -> int:
        """Prepare to receive the whole file. Return its size."""
        size = self.known_size if announced is None else announced
        if size is None:
            self._reject("sends no length of the file")
        if self.known_size not in (None, size):
            self._reject(f"announces {size:,} bytes, but this file has {self.known_size:,}")
        if self._received():
            self.notice("the file has changed on the server, or it cannot resume: starting anew")
        self._discard()
        write_whole(self._state, json.dumps({"url": self.url, "size": size, "validator": _validator(response)}))
        return size

    def _check_rest(self, response: urllib3.BaseHTTPResponse, size: int, validator: str, announced: int | None) -> None:
        """Check that a partial answer continues the received bytes of the version with this validator."""
        name = "ETag" if validator.startswith('"') else "Last-Modified"
        if validator and response.headers.get(name, validator) != validator:
            self._discard()
            raise _Interrupted("the file has changed on the server, starting anew")
        received, content_range = self._received(), response.headers.get("Content-Range", "nothing")
        is_rest = content_range == f"bytes {received}-{size - 1}/{size}" and announced in (None, size - received)
        if not validator or not is_rest:
            self._reject(
                f"sends other bytes than {received:,} to {size:,} "
                f"(Content-Range: {shown(content_range)}, Content-Length: {announced})"
            )

    def _append(self, response: urllib3.BaseHTTPResponse, size: int) -> None:
        """Append the body to the received bytes, after which the file must have `size` bytes."""
        why = ""
        with self._part.open("ab") as file:
            self.progress(file.tell(), size)
            try:
                while chunk := response.read1(CHUNK, decode_content=False):
                    if file.tell() + len(chunk) > size:
                        self._discard()
                        self._reject(f"sends more than the {size:,} bytes that it announced")
                    file.write(chunk)
                    self.progress(file.tell(), size)
            except urllib3.exceptions.HTTPError as error:
                why = f" ({_cause(error)})"
            if file.tell() < size:
                raise _Interrupted(f"the connection was cut after {file.tell():,} of {size:,} bytes{why}")

    def _reject(self, what: str) -> NoReturn:
        raise UserError(f"{self.url}: the server {what}: try again later or another address (--url)")


def _validator(response: urllib3.BaseHTTPResponse) -> str | None:
    """Return the value for If-Range: a strong ETag (weak ones allow other bytes), else the date of the last change."""
    etag, date = response.headers.get("ETag", ""), response.headers.get("Last-Modified", "")
    if re.fullmatch(r'"[!#-~]*"', etag):
        return etag
    return date if re.fullmatch(r"[A-Za-z0-9 ,:+-]+", date) else None


def _cause(error: BaseException) -> str:
    """Return the reason of a failed connection as a short printable text."""
    cause: BaseException | None = error
    while cause is not None:
        is_refused = isinstance(cause, urllib3.exceptions.NewConnectionError)  # a TimeoutError in urllib3
        if isinstance(cause, TimeoutError | urllib3.exceptions.TimeoutError) and not is_refused:
            return "no answer in time"
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return shown(str(error) or type(error).__name__)
