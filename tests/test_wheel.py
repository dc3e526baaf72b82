"""What is installed is all that is in the package: no preset, model, template or script of the page is left behind."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
SOURCES = ("envs", "data", "configs", "ringrl", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")


def build(what: str, folder: Path, destination: Path) -> Path:
    """The archive that the build backend makes of a source tree, without fetching anything."""
    command = [sys.executable, "-W", "error::UserWarning", "-c", BUILD, f"build_{what}", str(destination)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return max(destination.iterdir(), key=lambda path: path.stat().st_mtime_ns)


def test_the_wheel_of_the_sdist_holds_the_whole_package(tmp_path: Path) -> None:
    """From a checkout, where ringrl/envs is a link, to an sdist, where it is a folder, to the wheel."""
    checkout, made = tmp_path / "checkout", tmp_path / "made"
    checkout.mkdir()
    made.mkdir()
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, checkout / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy(source, checkout / name)
    with tarfile.open(build("sdist", checkout, made)) as sdist:
        sdist.extractall(tmp_path / "sdist", filter="data")
    (unpacked,) = (tmp_path / "sdist").iterdir()
    with zipfile.ZipFile(build("wheel", unpacked, made)) as wheel:
        packed = {name for name in wheel.namelist() if name.startswith("ringrl/")}
        (metadata,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        assert "License-Expression: Apache-2.0" in wheel.read(metadata).decode()
        assert any(name.endswith("/licenses/LICENSE") for name in wheel.namelist())
    there = [path for name in ("ringrl", *SOURCES[:3]) for path in (checkout / name).rglob("*") if path.is_file()]
    expected = {path.relative_to(checkout).as_posix() for path in there}
    expected = {name if name.startswith("ringrl/") else f"ringrl/{name}" for name in expected}
    assert packed == expected
