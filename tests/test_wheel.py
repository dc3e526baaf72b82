"""The wheel contains every file of the package: presets, models, templates and scripts too."""

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
    """Build an archive of a source tree with the build backend, without network, and return its path."""
    command = [sys.executable, "-W", "error::UserWarning", "-c", BUILD, f"build_{what}", str(destination)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return max(destination.iterdir(), key=lambda path: path.stat().st_mtime_ns)


def test_the_wheel_of_the_sdist_contains_the_whole_package(tmp_path: Path) -> None:
    """Build from a checkout (ringrl/envs is a link) an sdist (a folder), and from the sdist the wheel."""
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
    files = [path for name in ("ringrl", *SOURCES[:3]) for path in (checkout / name).rglob("*") if path.is_file()]
    expected = {path.relative_to(checkout).as_posix() for path in files}
    expected = {name if name.startswith("ringrl/") else f"ringrl/{name}" for name in expected}
    assert packed == expected
