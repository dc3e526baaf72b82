import hashlib
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from ringrl.cli import main
from ringrl.data import import_archive
from ringrl.data.exorl import download
from ringrl.data.exorl.download import download_archive
from ringrl.errors import UserError

FILE = "/cartpole/rnd.zip"


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(download, "PAUSES", (0,) * 5)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def fetch(site, folder: Path, **keywords) -> Path:
    return download_archive("cartpole", "rnd", folder, **{"url": site.url, "timeout": 20} | keywords)


def test_an_archive_arrives_whole_and_only_once(site, archive, tmp_path):
    calls = []
    path = fetch(site, tmp_path, progress=lambda *call: calls.append(call))
    assert path == tmp_path / "cartpole" / "rnd.zip"
    assert path.read_bytes() == archive
    assert names(tmp_path) == ["rnd.zip"]
    assert calls[0] == (0, len(archive))
    assert calls[-1] == (len(archive), len(archive))
    assert calls == sorted(calls)
    assert fetch(site, tmp_path) == path
    assert len(site.requests) == 1


def test_a_download_that_is_no_archive_is_deleted(site, tmp_path):
    site.files[FILE] = b"<html>Please log in.</html>"
    with pytest.raises(UserError, match="cut short"):
        fetch(site, tmp_path)
    assert names(tmp_path) == []
    (tmp_path / "cartpole" / "rnd.zip").write_bytes(b"mine")
    with pytest.raises(UserError, match="cut short"):
        fetch(site, tmp_path)
    assert (tmp_path / "cartpole" / "rnd.zip").read_bytes() == b"mine"


@pytest.mark.parametrize("status", [403, 404, 410])
def test_a_file_that_the_server_does_not_give_out(site, tmp_path, status):
    site.answers = [{"status": status}]
    with pytest.raises(UserError, match=rf"cartpole/rnd.zip: the server does not give out this file \({status}.*--url"):
        fetch(site, tmp_path)
    assert len(site.requests) == 1
    assert names(tmp_path) == []


def test_errors_about_unknown_names_list_known_names(tmp_path):
    with pytest.raises(UserError, match="did you mean walker"):
        download_archive("wakler", "rnd", tmp_path)
    with pytest.raises(UserError, match="algorithms: aps, icm_apt, diayn"):
        download_archive("walker", "../ddpg", tmp_path)
    with pytest.raises(UserError, match="--timeout"):
        download_archive("cartpole", "rnd", tmp_path, timeout=float("nan"))


def command(site, folder: Path, *flags: str) -> list[str]:
    arguments = ["data", "download", "cartpole", "rnd", "--url", site.url, "--output", str(folder), *flags]
    return [sys.executable, "-c", "from ringrl.cli import main; main()", *arguments]


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_stopped_download_resumes(site, archive, tmp_path, capfd, blow):
    site.answers = [{"cut": 123_456, "hangs": True}]
    with subprocess.Popen(command(site, tmp_path), text=True) as process:
        partial = tmp_path / "cartpole" / ".rnd.zip.partial"
        while process.poll() is None and not (partial.exists() and partial.stat().st_size == 123_456):
            time.sleep(0.01)
        with pytest.raises(UserError, match="another process is writing it"):
            fetch(site, tmp_path)
        process.send_signal(blow)
        assert process.wait(30) == (-blow if blow == signal.SIGKILL else 128 + blow)
    if blow == signal.SIGINT:
        assert capfd.readouterr().err == "ringrl: stopped; finished work is kept\n"
    left = [".rnd.zip.lock"] if blow == signal.SIGKILL else []
    assert names(tmp_path) == [*left, ".rnd.zip.partial", ".rnd.zip.partial.json"]
    main(command(site, tmp_path)[3:])
    message = capfd.readouterr().out
    path = tmp_path / "cartpole" / "rnd.zip"
    assert message == f"{path}; next: ringrl data import {path} --domain cartpole\n"
    assert hashlib.sha256(path.read_bytes()).digest() == hashlib.sha256(archive).digest()
    assert names(tmp_path) == ["rnd.zip"]
    assert site.ranges == [None, "bytes=123456-"]


def test_two_processes_at_once_fetch_one_archive(site, archive, tmp_path):
    running = [
        subprocess.Popen(command(site, tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    ends = [(process.communicate(timeout=60), process.returncode) for process in running]
    assert sorted(code for _, code in ends) in ([0, 0], [0, 2])
    assert all("another process is writing it" in err for (_, err), code in ends if code)
    assert len(site.requests) == 1
    assert (tmp_path / "cartpole" / "rnd.zip").read_bytes() == archive
    assert names(tmp_path) == ["rnd.zip"]


SMALL_DISK = """
    import resource, sys
    from ringrl.data.exorl.download import download_archive
    from ringrl.errors import UserError

    url, folder, limit = sys.argv[1], sys.argv[2], int(sys.argv[3])
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        download_archive("cartpole", "rnd", folder, url=url)
    except UserError as error:
        print(error)
"""


def test_received_bytes_are_kept_on_a_full_disk(site, archive, tmp_path):
    child = [sys.executable, "-c", textwrap.dedent(SMALL_DISK), site.url, str(tmp_path), "100000"]
    run = subprocess.run(child, capture_output=True, text=True, check=True)
    assert "rnd.zip: the disk, a quota or a limit on file size is full" in run.stdout
    assert run.stderr == ""
    assert len(site.requests) == 1, "another try would not help"
    assert fetch(site, tmp_path).read_bytes() == archive
    assert site.ranges == [None, "bytes=100000-"]


def test_a_file_too_large_for_the_disk_is_rejected_before_its_first_byte(site, tmp_path):
    site.answers = [{"headers": {"Content-Length": str(10**16)}, "cut": 0, "hangs": True}]
    with pytest.raises(UserError, match=r"10,000,000,000\.0 MB are needed, .* MB are free"):
        fetch(site, tmp_path)
    assert names(tmp_path) == []


def test_space_is_required_without_the_received_bytes(site, archive, tmp_path, monkeypatch):
    site.answers = [{"cut": 100_000}] + [{"status": 503}] * 5
    with pytest.raises(UserError, match="100,000 bytes are kept"):
        fetch(site, tmp_path)
    missing = len(archive) - 100_000
    usage = shutil.disk_usage(tmp_path)

    def free(size: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size))

    free(missing - 1)
    with pytest.raises(UserError, match=r"0\.2 MB are needed, 0\.2 MB are free"):
        fetch(site, tmp_path)
    free(missing)
    assert fetch(site, tmp_path).read_bytes() == archive


def test_an_archive_that_cannot_be_imported_is_kept(site, tmp_path):
    path = fetch(site, tmp_path)
    with pytest.raises(UserError, match="contains no episodes"):
        import_archive(path, path.with_suffix(".h5"), "cartpole")
    assert names(tmp_path) == ["rnd.zip"]
