import contextlib
import hashlib
import http.server
import io
import os
import random
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np
import pytest

from ringrl.data.exorl import save_episode
from ringrl.data.store import EpisodeStore, Provenance
from ringrl.data.store.format import recorded_arrays, reward_key
from ringrl.data.store.writer import create_store
from ringrl.envs import DOMAINS, make

# Sorted by name, the second number comes before the first.
EPISODE_NUMBERS = (999_999, 1_000_000, 1_000_002)


def _record_episode(task: str, seed: int) -> dict[str, np.ndarray]:
    """Return a simulated episode of uniformly random actions in ExoRL's rows."""
    env = make(task, seed=seed)
    random = np.random.default_rng(seed)
    observation, info = env.reset(seed=seed)
    rows = [(observation, np.zeros(env.action_space.shape, np.float32), [0.0], [1.0], info["physics"])]
    truncated = False
    while not truncated:
        action = random.uniform(-1, 1, env.action_space.shape).astype(np.float32)
        observation, reward, _, truncated, info = env.step(action)
        rows.append((observation, action, [reward], [1.0], info["physics"]))
    keys = ("observation", "action", "reward", "discount", "physics")
    arrays = {key: np.stack([np.asarray(row[i]) for row in rows]) for i, key in enumerate(keys)}
    return {key: array.astype(np.float64 if key == "physics" else np.float32) for key, array in arrays.items()}


def written_share(unfinished: Path) -> float:
    """Return the share of the rows of an unfinished store that are written, 0 while the file is created."""
    with contextlib.suppress(OSError, KeyError), h5py.File(unfinished, "r", locking=False) as file:
        return float(file["steps/observation"][:].any(axis=1).mean())
    return 0.0


@pytest.fixture(scope="session")
def cartpole_episodes() -> dict[int, dict[str, np.ndarray]]:
    """Three simulated cartpole_swingup episodes by number."""
    return {number: _record_episode("cartpole_swingup", seed) for seed, number in enumerate(EPISODE_NUMBERS)}


@pytest.fixture(scope="session")
def cartpole_folder(cartpole_episodes, tmp_path_factory) -> Path:
    """A folder in ExoRL's layout with `cartpole_episodes`."""
    folder = tmp_path_factory.mktemp("exorl") / "cartpole"
    (folder / "buffer").mkdir(parents=True)
    for number, episode in cartpole_episodes.items():
        save_episode(folder / "buffer", number, episode)
    return folder


@pytest.fixture(scope="session")
def cartpole_zip(cartpole_folder) -> Path:
    """A zip archive of `cartpole_folder`. The entries are sorted by name."""
    path = cartpole_folder.parent / "cartpole.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted((cartpole_folder / "buffer").iterdir()):
            archive.write(file, f"buffer/{file.name}")
    return path


@pytest.fixture(scope="session")
def exorl_folder() -> Path:
    """The folder of shared archives, which were recorded with the original ExoRL environments."""
    beside_the_checkout = Path(__file__).resolve().parents[2].parent / "shared" / "exorl"
    folder = Path(os.environ.get("RINGRL_EXORL", beside_the_checkout))
    if not folder.is_dir():
        pytest.skip(f"no ExoRL archives at {folder}: set RINGRL_EXORL to a folder of {{domain}}/{{algo}}.zip")
    return folder


@pytest.fixture(scope="session")
def random_episode() -> Callable[[str, int, int], dict[str, np.ndarray]]:
    """A function (domain, length, seed) -> episode of random numbers with the domain's widths, not simulated."""

    def make_episode(domain: str, length: int, seed: int) -> dict[str, np.ndarray]:
        random = np.random.default_rng(seed)
        episode = {
            key: random.normal(size=(length + 1, column.width)).astype(column.dtype)
            for key, column in recorded_arrays(DOMAINS[domain]).items()
        }
        rewards = {reward_key(task): random.random(length + 1).astype(np.float32) for task in DOMAINS[domain].tasks}
        return episode | rewards

    return make_episode


@pytest.fixture(scope="session")
def write_store() -> Callable[..., EpisodeStore]:
    """A function (path, domain, episodes, **keywords of create_store) -> store with rewards for all tasks."""

    def write(path: Path, domain: str, episodes: list[dict[str, np.ndarray]], **keywords) -> EpisodeStore:
        lengths = [len(episode["observation"]) - 1 for episode in episodes]
        tasks = DOMAINS[domain].tasks
        with create_store(
            path, DOMAINS[domain], tasks, lengths, source=Provenance("made/up.zip"), **keywords
        ) as writer:
            for episode in episodes:
                writer.append(episode)
        return EpisodeStore(path)

    return write


@pytest.fixture
def episodes(random_episode) -> list[dict[str, np.ndarray]]:
    """Three random cartpole episodes of 50, 7 and 1 steps."""
    return [random_episode("cartpole", length, seed) for seed, length in enumerate([50, 7, 1])]


@pytest.fixture
def store(tmp_path, episodes, write_store) -> EpisodeStore:
    """A store with `episodes`."""
    return write_store(tmp_path / "cartpole.h5", "cartpole", episodes)


CARTPOLE_RND = "/cartpole/rnd.zip"


@dataclass
class Answer:
    """How the server behaves for one request; as it should, unless a test sets something else."""

    status: int | None = None  # answer with this status and without the file
    cut: int | None = None  # bytes of the body after which the connection is closed
    hangs: bool = False  # send nothing more instead of closing the connection
    ignores_range: bool = False
    ignores_condition: bool = False
    headers: dict[str, str | None] = field(default_factory=dict)  # None removes a header


@dataclass
class Site:
    """An HTTP server. Each request takes one of `answers` (fields of `Answer`). Later requests have no faults."""

    files: dict[str, bytes] = field(default_factory=dict)
    etags: bool = True
    date: str = "Mon, 02 Jan 2006 15:04:05 GMT"
    answers: list[dict] = field(default_factory=list)
    requests: list[tuple[str, str | None]] = field(default_factory=list)  # path and Range header
    closing: threading.Event = field(default_factory=threading.Event)
    url: str = ""

    @property
    def ranges(self) -> list[str | None]:
        return [asked for _, asked in self.requests]

    def reply(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        answer = Answer(**(self.answers.pop(0) if self.answers else {}))
        asked = handler.headers["Range"]
        self.requests.append((handler.path, asked))
        content = self.files.get(handler.path)
        if content is None or answer.status:
            status, body, headers = answer.status or 404, b"", {"Content-Length": "0"}
        else:
            validator = {"Last-Modified": self.date}
            if self.etags:
                validator["ETag"] = f'"{hashlib.sha256(content).hexdigest()}"'
            holds = answer.ignores_condition or handler.headers["If-Range"] in validator.values()
            start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and not answer.ignores_range else 0
            if start >= len(content):
                status, body, headers = 416, b"", {"Content-Range": f"bytes */{len(content)}", "Content-Length": "0"}
            elif start and holds:
                status, body = 206, content[start:]
                headers = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
            else:
                status, body, headers = 200, content, {}
            headers = {"Content-Length": str(len(body))} | headers | validator
        handler.send_response(status)
        for name, value in (headers | answer.headers).items():
            if value is not None:
                handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body[: answer.cut])
        handler.wfile.flush()
        if answer.hangs:
            self.closing.wait(60)


@contextlib.contextmanager
def serve(**settings) -> Iterator[Site]:
    site = Site(**settings)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with contextlib.suppress(ConnectionError):
                site.reply(self)

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        site.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield site
        finally:
            site.closing.set()
            server.shutdown()
            thread.join()


@pytest.fixture(scope="session")
def serving() -> Callable[..., contextlib.AbstractContextManager[Site]]:
    """A function (**fields of Site) -> context manager that runs the server."""
    return serve


@pytest.fixture(scope="session")
def make_zip() -> Callable[..., bytes]:
    """A function (size, seed) -> zip archive with `size` random bytes."""

    def make(size: int, seed: int = 0) -> bytes:
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            archive.writestr("noise", random.Random(seed).randbytes(size))
        return packed.getvalue()

    return make


@pytest.fixture(scope="session")
def archive(make_zip) -> bytes:
    """A zip archive of 300 kB."""
    return make_zip(300_000)


@pytest.fixture
def site(archive) -> Iterator[Site]:
    """A server with `archive` at the address of a public archive."""
    with serve(files={CARTPOLE_RND: archive}) as site:
        yield site
