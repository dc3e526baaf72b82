import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from ringrl.data.store import EpisodeStore, Provenance
from ringrl.data.store.writer import create_store
from ringrl.envs import DOMAINS
from ringrl.errors import UserError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_existing_store_is_kept_unless_overwritten(store, episodes, write_store):
    with pytest.raises(UserError, match="already exists"):
        write_store(store.path, "cartpole", episodes[:1])
    assert EpisodeStore(store.path).num_episodes == 3
    assert write_store(store.path, "cartpole", episodes[:1], overwrite=True).num_episodes == 1
    assert names(store.path.parent) == ["cartpole.h5"]


@pytest.mark.parametrize("failure", [RuntimeError("x"), KeyboardInterrupt()])
def test_failure_leaves_nothing_behind(tmp_path, episodes, failure):
    def fail() -> None:
        with create_store(tmp_path / "a.h5", DOMAINS["cartpole"], [], [50, 7], source=Provenance("")) as writer:
            writer.append(episodes[0])
            raise failure

    with pytest.raises(type(failure)):
        fail()
    assert names(tmp_path) == []


def test_announced_lengths_are_kept(tmp_path, episodes):
    with (
        pytest.raises(ValueError, match="1 of 2 announced"),
        create_store(tmp_path / "a.h5", DOMAINS["cartpole"], [], [50, 7], source=Provenance("")) as writer,
    ):
        writer.append(episodes[0])
    with (
        pytest.raises(ValueError, match=r"observation is float32 \(51, 5\), the store expects float32 \(50, 5\)"),
        create_store(tmp_path / "a.h5", DOMAINS["cartpole"], [], [49], source=Provenance("")) as writer,
    ):
        writer.append(episodes[0])
    assert names(tmp_path) == []


def test_an_unreadable_store_does_not_replace_another(store, episodes):
    """The reader rejects texts of more than 64 KB."""
    with (
        pytest.raises(UserError, match=r"cartpole\.h5: its provenance is longer than 65,536 characters"),
        create_store(
            store.path, DOMAINS["cartpole"], [], [50], source=Provenance("x" * 70_000), overwrite=True
        ) as writer,
    ):
        writer.append(episodes[0])
    assert EpisodeStore(store.path).num_episodes == 3
    assert names(store.path.parent) == ["cartpole.h5"]


def test_two_writers_of_one_store(tmp_path, episodes, write_store):
    path, tasks = tmp_path / "a.h5", DOMAINS["cartpole"].tasks
    with create_store(path, DOMAINS["cartpole"], tasks, [50], source=Provenance("first")) as writer:
        with pytest.raises(UserError, match="another process is writing it"):
            write_store(path, "cartpole", episodes)
        writer.append(episodes[0])
    assert EpisodeStore(path).provenance.source == "first"


def test_files_of_a_killed_writer_are_replaced(tmp_path, episodes, write_store):
    (tmp_path / ".a.h5.tmp").write_bytes(b"remains" * 100_000)
    write_store(tmp_path / "a.h5", "cartpole", episodes).verify()
    assert names(tmp_path) == ["a.h5"]


def test_folder_that_cannot_be_written(tmp_path, episodes, write_store):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"a\.h5: cannot be written \((File exists|Not a directory)\)"):
        write_store(tmp_path / "file" / "a.h5", "cartpole", episodes)
    with pytest.raises(UserError, match="is a folder"):
        write_store(tmp_path, "cartpole", episodes, overwrite=True)


SMALL_DISK = """
    import resource, sys
    from pathlib import Path
    import numpy as np
    from ringrl.data.store.format import Provenance, recorded_arrays
    from ringrl.data.store.writer import create_store
    from ringrl.envs import DOMAINS
    from ringrl.errors import UserError

    folder, limit_before, limit_between = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    columns = recorded_arrays(DOMAINS["walker"])
    episode = {key: np.zeros((1001, column.width), column.dtype) for key, column in columns.items()}
    if limit_before:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_before, resource.RLIM_INFINITY))
    try:
        with create_store(folder / "a.h5", DOMAINS["walker"], [], [1000] * 20, source=Provenance("")) as writer:
            for i in range(20):
                writer.append(episode)
                if i == 9 and limit_between:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_between, resource.RLIM_INFINITY))
    except UserError as error:
        print(error)
    print([path.name for path in folder.iterdir()])
"""


@pytest.mark.parametrize(("limit_before", "limit_between"), [(1_000_000, 0), (0, 100_000)])
def test_limit_on_file_size(tmp_path, limit_before, limit_between):
    arguments = [sys.executable, "-c", textwrap.dedent(SMALL_DISK), tmp_path, str(limit_before), str(limit_between)]
    run = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert "a.h5: the disk, a quota or a limit on file size is full" in run.stdout
    assert run.stdout.endswith("[]\n")
    assert run.stderr == ""


def test_full_disk(tmp_path):
    """The file system has 2 MB and is mounted for the child process only."""
    unshare = ["unshare", "--mount", "--map-root-user"]
    mount = f"mount -t tmpfs -o size=2m none '{tmp_path}'"
    try:
        subprocess.run([*unshare, "sh", "-c", mount], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    (tmp_path.parent / "child.py").write_text(textwrap.dedent(SMALL_DISK))
    child = f"{mount} && '{sys.executable}' '{tmp_path.parent}/child.py' '{tmp_path}' 0 0"
    run = subprocess.run([*unshare, "sh", "-c", child], capture_output=True, text=True, check=True)
    assert "a.h5: the disk, a quota or a limit on file size is full (6.0 MB are needed, 2.1 MB are free" in run.stdout
    assert run.stdout.endswith("[]\n")
    assert run.stderr == ""
