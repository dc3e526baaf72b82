"""`ringrl data download` and `import`: stopped, starved and damaged. The result must have the same bytes.

Servers that cut, stall and send wrong answers are tested in tests/data.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import damage
from tests.data.conftest import Site, serve, written_share
from tests.faults.conftest import COPIES, DOMAIN, RECORDED, Disk
from tests.faults.process import CTRL_C, KILL, TERM, during, names, run, stop

pytestmark = pytest.mark.slow
EPISODES = RECORDED * COPIES


@pytest.fixture
def site(material: Path) -> Iterator[Site]:
    """A server whose first answer stops at half."""
    content = (material / "rnd.zip").read_bytes()
    half = {"cut": len(content) // 2, "hangs": True}
    with serve(files={"/jaco/rnd.zip": content}, answers=[half]) as site:
        yield site


def download_command(site: Site, folder: Path) -> list[str]:
    return ["data", "download", "jaco", "rnd", f"--output={folder}", f"--url={site.url}", "--timeout=3"]


def part(folder: Path) -> Path:
    return folder / "jaco" / ".rnd.zip.partial"


def at_half(site: Site, folder: Path) -> Callable[[], bool]:
    half = len(site.files["/jaco/rnd.zip"]) // 2
    return lambda: part(folder).exists() and part(folder).stat().st_size >= half


def assert_downloads(command: list[str], site: Site, folder: Path) -> None:
    run(command).expect(0)
    assert names(folder) == ["jaco/rnd.zip"]
    assert (folder / "jaco" / "rnd.zip").read_bytes() == site.files["/jaco/rnd.zip"]


@pytest.mark.parametrize("number", [KILL, CTRL_C, TERM])
def test_download_signal(site: Site, tmp_path: Path, number) -> None:
    command = download_command(site, tmp_path)
    stop(command, at_half(site, tmp_path), number).expect(128 + number)
    assert_downloads(command, site, tmp_path)


def test_download_to_a_full_disk(site: Site, disk: Disk) -> None:
    command = download_command(site, disk.folder)
    disk.fill_during(command, at_half(site, disk.folder)).expect(2, "free some space|elsewhere")
    disk.fill_before(command, leave=100_000).expect(2, "free some space|elsewhere")
    assert_downloads(command, site, disk.folder)


def test_download_needs_no_more_memory_after_half(site: Site, tmp_path: Path) -> None:
    command = download_command(site, tmp_path)
    during(command, at_half(site, tmp_path), lambda process: process.starve(0)).expect(0)
    assert (tmp_path / "jaco" / "rnd.zip").read_bytes() == site.files["/jaco/rnd.zip"]


@pytest.mark.parametrize("kind", damage.DOWNLOAD)
def test_download_with_a_damaged_part(site: Site, tmp_path: Path, kind: str) -> None:
    command = download_command(site, tmp_path)
    stop(command, at_half(site, tmp_path))
    damage.DOWNLOAD[kind](part(tmp_path))
    assert_downloads(command, site, tmp_path)


class Import:
    """An import of 120 episodes into a folder of its own."""

    def __init__(self, material: Path, folder: Path) -> None:
        self.archive, self.stores = folder / "archive" / DOMAIN, folder / "stores"
        self.archive.mkdir(parents=True)
        for file in (material / "long").iterdir():
            (self.archive / file.name).symlink_to(file)
        self.store, self.part = self.stores / "jaco.h5", self.stores / ".jaco.h5.tmp"
        self.episode = self.archive / "episode_000060_250.npz"
        paths = [str(self.archive), f"--domain={DOMAIN}", f"--output={self.store}"]
        self.command = ["data", "import", *paths]

    def after(self, episodes: int) -> Callable[[], bool]:
        return lambda: self.part.exists() and written_share(self.part) >= episodes / EPISODES

    def assert_completes(self, expected: "Import", *flags: str) -> None:
        run([*self.command, *flags]).expect(0)
        assert names(self.stores) == ["jaco.h5"]
        assert self.store.read_bytes() == expected.store.read_bytes()


@pytest.fixture(scope="session")
def expected(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Import:
    job = Import(material, tmp_path_factory.mktemp("imported"))
    run(job.command).expect(0)
    return job


@pytest.fixture
def job(material: Path, tmp_path: Path) -> Import:
    return Import(material, tmp_path)


@pytest.mark.parametrize(
    ("episodes", "number"), [(0, KILL), (30, KILL), (EPISODES - 20, KILL), (30, CTRL_C), (30, TERM)]
)
def test_import_signal(job: Import, expected: Import, episodes: int, number) -> None:
    stop(job.command, job.after(episodes), number).expect(128 + number)
    job.assert_completes(expected)


def test_import_to_a_full_disk(material: Path, expected: Import, disk: Disk) -> None:
    job = Import(material, disk.folder)
    for leave in (0, 2**20):
        disk.fill_before(job.command, leave).expect(2, "free some space|elsewhere")
    disk.fill_during(job.command, job.after(30)).expect(0)  # the first episode reserved the space of all
    job.assert_completes(expected)


@pytest.mark.parametrize("kind", damage.FILE)
def test_import_of_a_damaged_episode(job: Import, expected: Import, kind: str) -> None:
    whole = job.episode.resolve()
    damage.FILE[kind](job.episode)
    run(job.command).expect(2, f"{job.episode.name}.*again")
    job.episode.unlink()
    job.episode.symlink_to(whole)
    job.assert_completes(expected)


@pytest.mark.parametrize("kind", damage.STORE)
def test_verify_notices_a_damaged_store(job: Import, expected: Import, kind: str) -> None:
    job.stores.mkdir()
    job.store.write_bytes(expected.store.read_bytes())
    damage.STORE[kind](job.store)
    run(["data", "info", str(job.store), "--verify"]).expect(2, "again")
    job.assert_completes(expected, "--overwrite")
