"""A real HTTP server on this machine that cuts, stalls and lies as it is told to."""

import contextlib
import hashlib
import http.server
import threading
from dataclasses import dataclass, field
from email.message import Message

DATE = "Mon, 02 Jan 2006 15:04:05 GMT"


@dataclass(frozen=True)
class Answer:
    """How one request is answered; as it should be, unless told otherwise."""

    status: int | None = None  # with no file
    content: bytes | None = None  # another file in its place
    cut: float = 1.0  # share of the body after which the line is cut
    stalls: bool = False  # the line is left open there, silent, until the site goes on
    excess: int = 0  # bytes by which Content-Length is a lie
    ranged: str | None = None  # Content-Range, likewise
    location: str | None = None  # of a redirect


@dataclass
class Site:
    """Uses up `answers`, one a request, and then gives `last` for ever. Close it after use."""

    content: bytes
    answers: list[Answer] = field(default_factory=list)
    last: Answer = field(default_factory=Answer)
    go_on: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        site = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                with contextlib.suppress(ConnectionError):
                    site._reply(self)

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        """Let go of whoever waits, and end."""
        self.go_on.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _reply(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        answer = self.answers.pop(0) if self.answers else self.last
        status, body, headers = self._choose(answer, handler.headers)
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        end = int(answer.cut * len(body))
        handler.wfile.write(body[:end])
        handler.wfile.flush()
        if answer.stalls and self.go_on.wait(60):
            handler.wfile.write(body[end:])

    def _choose(self, answer: Answer, asked: Message) -> tuple[int, bytes, dict[str, str]]:
        if answer.location is not None:
            return 302, b"", {"Location": answer.location, "Content-Length": "0"}
        if answer.status is not None:
            return answer.status, b"", {"Content-Length": "0"}
        content = self.content if answer.content is None else answer.content
        tag = f'"{hashlib.sha256(content).hexdigest()}"'
        wanted = asked["Range"] if asked["If-Range"] == tag else None
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        headers = {"ETag": tag, "Last-Modified": DATE}
        if start:
            headers["Content-Range"] = answer.ranged or f"bytes {start}-{len(content) - 1}/{len(content)}"
        if start >= len(content) > 0:
            return 416, b"", {"Content-Range": f"bytes */{len(content)}", "Content-Length": "0"}
        body = content[start:]
        headers["Content-Length"] = str(len(body) + answer.excess)
        return (206 if start else 200), body, headers
