"""Fetching one large file over HTTP, so that a cut line costs nothing that had already arrived.

The bytes grow in a hidden `.{name}.partial` in the same folder, and `.{name}.partial.json` says which version of the
file they belong to. The next request asks for the rest on the condition that it is still the same version; if not, the
file starts anew. A server is a stranger: what it says must agree with itself and with what is known of the file.
"""

import contextlib
import http.client
import json
import os
import re
import shutil
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

from ringrl import __version__
from ringrl.data.part import cannot_write, claim, part_of, sync_folder
from ringrl.errors import UserError

CHUNK = 2**18  # bytes asked of the line at once
PROGRESS = 2**20  # bytes that count as a success, after which failures are counted from nothing again
LONGEST_PAUSE = 60.0  # seconds
LONGEST_TIMEOUT = 86_400.0  # seconds
BUSY = (408, 425, 429, 500, 502, 503, 504)
MISSING = (403, 404, 410)  # 403 is what storage services say of a file that they do not have


@dataclass(frozen=True)
class Patience:
    """How long to wait for a server, and how often to try again."""

    timeout: float = 30.0  # seconds that connecting may take, and that a read may stand still
    retries: int = 5  # tries in a row that may fail before the transfer does
    pause: float = 1.0  # seconds before the first of them; each further pause is twice as long

    def __post_init__(self) -> None:
        if not 0 < self.timeout <= LONGEST_TIMEOUT:
            raise UserError(f"--timeout: {self.timeout} is not between 0 and {LONGEST_TIMEOUT:.0f} seconds")


PATIENT = Patience()


@dataclass(frozen=True)
class Version:
    """One version of the file at one address."""

    url: str
    size: int  # bytes
    validator: str | None  # its strong ETag or Last-Modified, None if the server gave neither: it cannot be resumed


@dataclass(frozen=True)
class Transfer:
    """A file to fetch from `url` to `path`; `run` does it.

    `check` is given the whole file before it gets its name and raises UserError if it is not what it should be.
    `known_size` is its size in bytes where that is known beforehand. `spare` is the disk space that will be needed
    beside the file, in bytes per byte of it. `advice` ends the line that says that the server does not have the file.
    `progress` is called with (bytes here, bytes in all), `notice` with one line about what goes on otherwise.
    """

    url: str
    path: Path
    check: Callable[[Path], None]
    known_size: int | None = None
    spare: float = 0.0
    advice: str = "check the address"
    patience: Patience = PATIENT
    progress: Callable[[int, int], None] | None = None
    notice: Callable[[str], None] | None = None

    def run(self) -> None:
        """Fetches the file or the rest of it; it appears at `path` whole or not at all. A file that is there stays.

        Raises UserError if the address is of no use, if the server does not have the file, contradicts itself or
        cannot be reached, if another process fetches the same file, if the disk is full, and what `check` raises.
        What had arrived is kept for the next run, unless it is wrong.
        """
        _require_http(self.url)
        with cannot_write(self.path):
            descriptor = claim(self.path)
        part = _Part(self.path, part_of(self.path), descriptor)
        try:
            if self.path.exists():  # another process finished it before this one had the lock
                part.discard()
                return
            self._fetch(part)
            self._finish(part)
        finally:
            if part.size == 0:
                part.remove()
            os.close(descriptor)

    def _fetch(self, part: "_Part") -> None:
        """Tries until the part is whole; raises UserError after too many tries in a row that brought nothing."""
        longest, failures = part.size, 0
        while True:
            try:
                return self._try_once(part)
            except _Interrupted as reason:
                if part.size >= longest + PROGRESS:
                    longest, failures = part.size, 0
                failures += 1
                if failures > self.patience.retries:
                    here = f"{part.size:,} bytes are here" if part.size else "nothing has arrived"
                    raise UserError(
                        f"{self.path}: {reason} ({self.url}; {here}): run the same command again, "
                        "it goes on where it stopped"
                    ) from reason
                pause = min(self.patience.pause * 2 ** (failures - 1), LONGEST_PAUSE)
                self._say(f"{reason}: trying again in {pause:.0f} s ({failures} of {self.patience.retries})")
                time.sleep(pause)

    def _try_once(self, part: "_Part") -> None:
        """One request for what is missing. Raises _Interrupted for everything that another try may mend."""
        version = part.version
        if version and (version.url != self.url or self.known_size not in (None, version.size)):
            part.discard()
        elif version and part.size == version.size:
            return
        elif version is None or version.validator is None or part.size > version.size:
            part.discard()
        request = urllib.request.Request(self.url, headers={"User-Agent": f"ringrl/{__version__}"})
        if part.version and part.version.validator and part.size:
            request.add_header("Range", f"bytes={part.size}-")
            request.add_header("If-Range", part.version.validator)
        with contextlib.closing(self._open(request, part)) as response:
            end = self._agree(response, part)
            self._receive(response, part, end)

    def _open(self, request: urllib.request.Request, part: "_Part") -> http.client.HTTPResponse:
        """The answer to a request, with status 200 or 206."""
        opener = urllib.request.build_opener(_RedirectToHttp)
        try:
            response = opener.open(request, timeout=self.patience.timeout)
        except urllib.error.HTTPError as error:
            error.close()
            self._judge(error, part)
        except (ValueError, http.client.InvalidURL) as error:
            raise UserError(f"{self.url}: is not a usable address ({error}): check --url") from error
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)  # URLError wraps what happened while it connected
            if isinstance(reason, ssl.SSLCertVerificationError):
                raise UserError(
                    f"{self.url}: the server's certificate is not trusted ({reason.verify_message}): "
                    "check the address and this machine's clock and certificates"
                ) from error
            raise _Interrupted(f"the server cannot be reached ({_said(reason)})") from error
        if response.status not in (200, 206):
            response.close()
            self._refuse(f"answers with status {response.status} instead of the file")
        return response

    def _judge(self, error: urllib.error.HTTPError, part: "_Part") -> NoReturn:
        """What an answer that is not the file means."""
        status = _printable(f"{error.code} {error.reason}".strip())
        if error.code in BUSY:
            raise _Interrupted(f"the server answers {status}") from error
        if error.code == 416 and part.size:
            # The server holds less than has arrived: either the file has changed or its size was a lie.
            part.discard()
            raise _Interrupted("the server no longer has the rest of the file, it starts anew") from error
        if error.code in MISSING:
            raise UserError(f"{self.url}: the server does not give out this file ({status}): {self.advice}") from error
        if 300 <= error.code < 400:
            target = _printable(error.headers.get("Location", "nowhere"))
            self._refuse(f"redirects in circles or to what is neither http nor https ({target})")
        self._refuse(f"answers {status}")

    def _agree(self, response: http.client.HTTPResponse, part: "_Part") -> int:
        """Makes the part ready for the bytes of a response and gives the size that it will then have.

        It goes on if they continue it and starts anew if they are the whole file.
        """
        length = _natural(response.headers.get("Content-Length"))
        if response.status == 206:
            end = self._continuation(response, part, length)
        else:
            whole = self.known_size if length is None else length
            if whole is None:
                self._refuse("does not say how long the file is")
            end = whole
            if self.known_size not in (None, end):
                self._refuse(f"announces {end:,} bytes, but this file has {self.known_size:,}")
            if part.size:
                self._say("the file has changed on the server, or it cannot resume: starting anew")
            part.begin(Version(self.url, end, _validator(response.headers)))
        self._require_space(part)
        return end

    def _continuation(self, response: http.client.HTTPResponse, part: "_Part", length: int | None) -> int:
        """The last byte's place, plus one, of a response with a part of the file, if it continues what is here."""
        said = response.headers.get("Content-Range", "nothing")
        match = re.fullmatch(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})", said)
        version = part.version
        if version is None or version.validator is None or match is None:
            self._refuse(f"sends a part of the file that was not asked for (Content-Range: {_printable(said)})")
        name = "ETag" if version.validator.startswith('"') else "Last-Modified"
        if response.headers.get(name, version.validator) != version.validator:
            part.discard()
            raise _Interrupted("the file has changed on the server, it starts anew")
        start, end, size = int(match[1]), int(match[2]) + 1, int(match[3])
        if start != part.size or size != version.size or not start < end <= size or length not in (None, end - start):
            self._refuse(
                f"was asked for bytes {part.size:,} to {version.size:,} and sends something else "
                f"(Content-Range: {_printable(said)}, Content-Length: {length})"
            )
        return end

    def _receive(self, response: http.client.HTTPResponse, part: "_Part", end: int) -> None:
        """Appends the body to the part, which must then have `end` bytes."""
        assert part.version is not None
        size = part.version.size
        while True:
            if self.progress is not None:
                self.progress(part.size, size)
            try:
                chunk = response.read1(CHUNK)
            except (OSError, http.client.HTTPException) as error:
                raise _Interrupted(
                    f"the line was cut after {part.size:,} of {size:,} bytes ({_said(error)})"
                ) from error
            if not chunk:
                break
            if part.size + len(chunk) > end:
                part.discard()
                self._refuse(f"sends more than the {end:,} bytes that it announced")
            part.append(chunk)
        if part.size < size:
            raise _Interrupted(f"the line was cut after {part.size:,} of {size:,} bytes")

    def _finish(self, part: "_Part") -> None:
        """Gives the whole file its name."""
        with cannot_write(self.path):
            os.fsync(part.descriptor)
        try:
            self.check(part.path)
        except UserError as error:
            part.discard()
            raise UserError(f"{self.url}: what the server sent is of no use, it was removed: {error}") from error
        with cannot_write(self.path):
            part.path.replace(self.path)
            part.state.unlink(missing_ok=True)
        sync_folder(self.path.parent)

    def _require_space(self, part: "_Part") -> None:
        assert part.version is not None
        needed = int(part.version.size * (1 + self.spare)) - part.size
        free = shutil.disk_usage(self.path.parent).free
        if needed > free:
            raise UserError(
                f"{self.path}: {needed / 1e6:,.1f} MB are needed, {free / 1e6:,.1f} MB are free in "
                f"{self.path.parent}: free some space or write elsewhere"
            )

    def _refuse(self, what: str) -> NoReturn:
        raise UserError(f"{self.url}: the server {what}: try again later or another address (--url)")

    def _say(self, line: str) -> None:
        if self.notice is not None:
            self.notice(line)


class _Interrupted(Exception):
    """What another try may mend."""


class _Part:
    """The bytes that have arrived, and the version of the file that they belong to; None if that is not known.

    What is known of them is written after the file was emptied and before their first byte, so it never belongs to
    others.
    """

    def __init__(self, target: Path, path: Path, descriptor: int) -> None:
        self.target, self.path, self.descriptor = target, path, descriptor
        self.state = path.with_name(f"{path.name}.json")
        self.size = os.fstat(descriptor).st_size
        self.version = _read_version(self.state)

    def begin(self, version: Version) -> None:
        """Starts anew, with the first byte of `version`."""
        self.discard()
        with cannot_write(self.target):
            self.state.write_text(json.dumps(asdict(version)), encoding="utf-8")
        self.version = version

    def append(self, chunk: bytes) -> None:
        """Writes the next bytes."""
        view = memoryview(chunk)
        with cannot_write(self.target):
            while view:
                written = os.pwrite(self.descriptor, view, self.size)
                view, self.size = view[written:], self.size + written

    def discard(self) -> None:
        """Forgets all bytes."""
        with cannot_write(self.target):
            os.ftruncate(self.descriptor, 0)
            self.state.unlink(missing_ok=True)
        self.size, self.version = 0, None

    def remove(self) -> None:
        """Leaves no trace in the folder."""
        self.state.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)


class _RedirectToHttp(urllib.request.HTTPRedirectHandler):
    """Follows redirects as urllib does, but to no other scheme; what is not followed becomes an HTTPError."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if urlsplit(newurl).scheme not in ("http", "https"):
            return None
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _require_http(url: str) -> None:
    with contextlib.suppress(ValueError):
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return
    raise UserError(f"{url}: is no address to download from: --url takes http://... or https://...")


def _validator(headers: http.client.HTTPMessage) -> str | None:
    """What If-Range may carry: a strong ETag (weak ones allow other bytes), else the date of the last change."""
    etag, date = headers.get("ETag", ""), headers.get("Last-Modified", "")
    if re.fullmatch(r'"[!#-~]*"', etag):
        return etag
    return date if re.fullmatch(r"[A-Za-z0-9 ,:+-]+", date) else None


def _natural(text: str | None) -> int | None:
    return int(text) if text is not None and re.fullmatch("[0-9]{1,18}", text) else None


def _read_version(state: Path) -> Version | None:
    """What was noted beside a part; None if it is missing or cut short, so that the file starts anew."""
    try:
        version = Version(**json.loads(state.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
    types = (version.url, str), (version.size, int), (version.validator, str | None)
    return version if all(isinstance(value, kind) for value, kind in types) else None


def _said(error: object) -> str:
    """A short reason out of an error of the operating system or of http.client."""
    if isinstance(error, TimeoutError):
        return "nothing came in time"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return _printable(str(error)) or type(error).__name__


def _printable(text: str) -> str:
    """What a server said, fit for a terminal."""
    return "".join(character if character.isprintable() else " " for character in text)[:200].strip()
