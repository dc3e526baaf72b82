"""Data, finished runs and a small disk for the faults. All of it is made by the commands under test."""

import os
import shutil
import subprocess
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.faults.process import Ended, Moment, during, run

TASK, DOMAIN = "jaco_reach_top_left", "jaco"
RECORDED, COPIES = 12, 10  # episodes, and how often the long archive repeats them
PAGE = 4096  # bytes


@pytest.fixture(scope="session", autouse=True)
def compiled(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Programs as users run them, each compiled once for all processes."""
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path_factory.mktemp("compiled"))
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "0"


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `rnd.zip` (12 episodes), `long` (120 files, the same episodes) and the store `jaco.h5`."""
    folder = tmp_path_factory.mktemp("material")
    run(["data", "collect", TASK, f"--output={folder / 'collected'}", f"--episodes={RECORDED}"]).expect(0)
    run(["data", "import", f"{folder / 'collected'}", f"--domain={DOMAIN}", f"--output={folder / 'jaco.h5'}"]).expect(0)
    files = sorted((folder / "collected" / "buffer").iterdir())
    with zipfile.ZipFile(folder / "rnd.zip", "w") as archive:
        for file in files:
            archive.write(file, f"buffer/{file.name}")
    (folder / "long").mkdir()
    for number in range(RECORDED * COPIES):
        file = files[number % RECORDED]
        (folder / "long" / f"episode_{number:06d}_{file.stem.rpartition('_')[2]}.npz").hardlink_to(file)
    return folder


def train_command(store: Path, folder: Path, *flags: str) -> list[str]:
    """Return sixty steps of a tiny transformer, with a checkpoint every twenty."""
    return [
        "train", f"--data={store}", f"--task={TASK}", f"--run={folder}", "--model.layers=1", "--model.width=16",
        "--model.token-set=fused1", "--context.trajectories=2", "--optimiser.batch-size=2",
        "--optimiser.warmup-steps=2", "--optimiser.steps=60", "--checkpoint-every=20", "--log-every=2", *flags,
    ]  # fmt: skip


@pytest.fixture(scope="session")
def trained(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run, for reading only."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    run(train_command(material / "jaco.h5", folder)).expect(0)
    return folder


class Disk:
    """A file system of 64 MiB that can be filled."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._ballast = folder, folder / "ballast"

    def fill(self, leave: int = 0) -> None:
        """Use up all but `leave` bytes, although the command may write at the same time."""
        with self._ballast.open("wb") as file:
            while (free := os.statvfs(self.folder).f_bavail * PAGE - leave) >= PAGE:
                with suppress(OSError):
                    os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size + max(PAGE, free // 2))

    def free(self) -> None:
        """Release the used up space."""
        self._ballast.unlink(missing_ok=True)

    def fill_during(self, arguments: list[str], moment: Moment) -> Ended:
        """Run a command, fill the disk at a moment, and release the space after the command has ended."""
        ended = during(arguments, moment, lambda command: self.fill())
        self.free()
        return ended

    def fill_before(self, arguments: list[str], leave: int = 0) -> Ended:
        """Run a command on a full disk, then release the space."""
        self.fill(leave)
        ended = run(arguments)
        self.free()
        return ended


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A small tmpfs. Needs root, as in the mount namespace of `make test-slow`."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if (
        shutil.which("mount") is None
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={64 * 2**20}", "tmpfs", folder], check=False, capture_output=True
        ).returncode
    ):
        pytest.skip("no file system may be mounted here; run: make test-slow")
    yield Disk(folder)
    subprocess.run(["umount", "--lazy", folder], check=True)
