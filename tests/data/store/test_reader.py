import hashlib
import pickle
import shutil
import subprocess
import sys
import tempfile
import zipfile
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringrl.data.store import EpisodeStore
from ringrl.data.store.format import recorded_arrays, reward_key
from ringrl.envs import DOMAINS
from ringrl.errors import UserError


@settings(max_examples=30)
@given(
    domain=st.sampled_from(sorted(DOMAINS)),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    seed=st.integers(0, 2**32),
)
def test_a_written_store_is_read_unchanged(domain, lengths, seed, write_store, random_episode):
    episodes = [random_episode(domain, length, seed + i) for i, length in enumerate(lengths)]
    with tempfile.TemporaryDirectory() as folder:
        store = write_store(Path(folder) / "store.h5", domain, episodes)
        assert (store.domain, store.tasks) == (domain, DOMAINS[domain].tasks)
        assert store.lengths.tolist() == lengths
        assert (store.num_episodes, store.num_steps) == (len(lengths), sum(lengths))
        for i, episode in enumerate(episodes):
            read = store.episode(i)
            assert sorted(read) == sorted(episode)
            for key, array in read.items():
                np.testing.assert_array_equal(array, episode[key], strict=True)
        for task in store.tasks:
            expected = [episode[reward_key(task)].astype(np.float64).sum() for episode in episodes]
            np.testing.assert_allclose(store.returns(task), expected, rtol=1e-6)
        store.verify()
        del store


def test_description(store):
    assert (store.observation_size, store.action_size) == (5, 1)
    assert store.provenance.source == "made/up.zip"
    assert store.provenance.created_by.startswith("ringrl ")
    assert store.recorded_task is None
    assert len(store.fingerprint) == 64


def test_any_hdf5_reader_finds_the_arrays(store, episodes):
    with h5py.File(store.path) as file:
        end_of_file = int.from_bytes(store.path.read_bytes()[28:36], "little")  # as in HDF5's superblock
        assert end_of_file == store.path.stat().st_size
        for name, key in [("steps/physics", "physics"), ("rewards/cartpole_balance", "reward/cartpole_balance")]:
            np.testing.assert_array_equal(file[name][:], np.concatenate([episode[key] for episode in episodes]))
        assert file.attrs["domain"] == b"cartpole"


def test_episodes_are_read_only_views_of_the_file(store):
    first, again = store.episode(0), store.episode(0)
    for key, array in first.items():
        assert not array.flags.writeable
        assert array.flags.c_contiguous
        assert array.flags.aligned
        assert array.base is not None
        assert np.shares_memory(array, again[key])
    with pytest.raises(ValueError, match="read-only"):
        first["observation"][0] = 0
    with pytest.raises(ValueError, match="read-only"):
        store.returns("cartpole_swingup")[0] = 0


@pytest.mark.parametrize("index", [-1, 3])
def test_episode_out_of_range(store, index):
    with pytest.raises(IndexError, match="of a store of 3"):
        store.episode(index)


def test_reward_of_another_domains_task(store):
    with pytest.raises(UserError, match=r"no rewards for task walker_walk .domain cartpole.. Tasks: cartpole_balance"):
        store.returns("walker_walk")


def test_fingerprint_follows_the_recorded_content_only(tmp_path, store, episodes, write_store):
    def fingerprint(changed: list[dict[str, np.ndarray]]) -> str:
        return write_store(tmp_path / "other.h5", "cartpole", changed, overwrite=True).fingerprint

    assert fingerprint(episodes) == store.fingerprint
    assert fingerprint(episodes[::-1]) != store.fingerprint
    assert fingerprint(episodes[:2]) != store.fingerprint
    for key in recorded_arrays(DOMAINS["cartpole"]):
        touched = episodes[1][key].copy()
        touched[3, 0] = np.nextafter(touched[3, 0], np.inf)
        assert fingerprint([episodes[0], episodes[1] | {key: touched}, episodes[2]]) != store.fingerprint
    relabelled = episodes[1] | {"reward/cartpole_balance": episodes[1]["reward/cartpole_balance"] * 0}
    assert fingerprint([episodes[0], relabelled, episodes[2]]) == store.fingerprint


def test_other_processes_read_the_same_store(store, episodes):
    assert len(pickle.dumps(store)) < 1_000
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        for read, episode in zip(pool.map(EpisodeStore.episode, [store] * 3, range(3)), episodes, strict=True):
            np.testing.assert_equal(read, {key: episode[key] for key in read})


def test_threads_read_the_same_store(store, episodes):
    def read(turn: int) -> None:
        np.testing.assert_equal(store.episode(turn % 3), {key: episodes[turn % 3][key] for key in store.arrays})
        store.verify()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read, range(64)))


def test_an_open_store_stays_readable_after_its_replacement(store, episodes, write_store):
    before = store.episode(0)["physics"].copy()
    write_store(store.path, "cartpole", episodes[1:], overwrite=True)
    np.testing.assert_array_equal(store.episode(0)["physics"], before)
    assert EpisodeStore(store.path).num_episodes == 2


# Files that are not stores


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        EpisodeStore(path)
    message = str(caught.value)
    assert "\n" not in message
    assert path.name in message
    return message


def changed(store: EpisodeStore, change) -> Path:
    """Return a copy of a store, changed through HDF5."""
    path = store.path.with_name("changed.h5")
    shutil.copy(store.path, path)
    with h5py.File(path, "r+") as file:
        change(file)
    return path


def test_missing_file(tmp_path):
    assert "no such file" in refusal(tmp_path / "absent.h5")
    (tmp_path / "loop.h5").symlink_to("loop.h5")
    assert "no such file" in refusal(tmp_path / "loop.h5")
    line = refusal(tmp_path)
    assert f"{tmp_path}: is a folder; import one of episodes (ringrl data import), or name the store's file" in line


@pytest.mark.parametrize("content", [b"", b"not hdf5 at all", b"\x89HDF\r\n\x1a\n" + bytes(500)])
def test_not_hdf5(tmp_path, content):
    (tmp_path / "a.h5").write_bytes(content)
    assert "cannot be read" in refusal(tmp_path / "a.h5")


def test_an_archive_has_its_own_error(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("buffer/episode_0_250.npz", b"")
    assert "is an archive, not a store: import it (ringrl data import)" in refusal(tmp_path / "a.zip")


def test_foreign_hdf5(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["observations"] = np.zeros(3)
    assert "not an episode store of ringrl: give a store, or import a flat file" in refusal(tmp_path / "a.h5")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99, 0.99999])
def test_store_cut_short(tmp_path, store, share):
    content = store.path.read_bytes()
    (tmp_path / "a.h5").write_bytes(content[: int(len(content) * share)])
    assert "cut short" in refusal(tmp_path / "a.h5")


def test_newer_format(store):
    path = changed(store, lambda file: file.attrs.update({"format_version": 99, "created_by": "ringrl 9.0"}))
    assert "written in format 99 by ringrl 9.0" in refusal(path)
    assert "update ringrl" in refusal(path)


def test_older_format(store):
    path = changed(store, lambda file: file.attrs.update({"format_version": 1, "created_by": "ringrl 0.0.1"}))
    assert "written in format 1 by ringrl 0.0.1" in refusal(path)
    assert "import the archive again" in refusal(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("domain", "cheetah"),
        ("fingerprint", "0" * 64),
        ("recorded_task", "walker_walk"),
        ("provenance", "{}"),
        ("tasks", '["walker_walk"]'),
        ("tasks", '["cartpole_swingup", "cartpole_swingup"]'),
        ("tasks", "3"),
        ("tasks", 3),
    ],
)
def test_attributes_that_do_not_fit(store, name, value):
    assert "import the archive again" in refusal(changed(store, lambda file: file.attrs.update({name: value})))


def test_unknown_domain(store):
    assert "unknown domain 'dog'" in refusal(changed(store, lambda file: file.attrs.update({"domain": "dog"})))


@pytest.mark.parametrize("name", ["steps/physics", "rewards/cartpole_swingup", "returns/cartpole_balance", "episodes"])
def test_missing_dataset(store, name):
    assert "damaged" in refusal(changed(store, lambda file: file.__delitem__(name)))


def replaced(store: EpisodeStore, name: str, create) -> Path:
    """Return a copy of a store with a dataset replaced by `create(file, name, values)`. The checksum is kept."""

    def replace(file: h5py.File) -> None:
        values, checksum = file[name][:], file[name].attrs.get("sha256")
        del file[name]
        create(file, name, values)
        if checksum is not None and isinstance(file.get(name, getlink=True), h5py.HardLink):
            file[name].attrs["sha256"] = checksum

    return changed(store, replace)


OTHER_LAYOUTS = {
    "chunked": {"chunks": True},
    "compressed": {"compression": "gzip"},
    "external": {"external": "/dev/null"},
}


@pytest.mark.parametrize("name", ["steps/observation", "returns/cartpole_balance"])
@pytest.mark.parametrize("layout", OTHER_LAYOUTS)
def test_dataset_of_another_layout(store, name, layout):
    def create(file: h5py.File, name: str, values: np.ndarray) -> None:
        file.create_dataset(name, data=values, **OTHER_LAYOUTS[layout])

    message = refusal(replaced(store, name, create))
    assert ("in other files" if layout == "external" else "is chunked or compressed") in message


def test_virtual_dataset(store):
    def create(file: h5py.File, name: str, values: np.ndarray) -> None:
        source = h5py.VirtualSource(str(store.path), name, values.shape, values.dtype)
        layout = h5py.VirtualLayout(values.shape, values.dtype)
        layout[:] = source
        file.create_virtual_dataset(name, layout)

    assert "in other files" in refusal(replaced(store, "steps/observation", create))


@pytest.mark.parametrize("link", [h5py.SoftLink("/steps/action"), h5py.ExternalLink("cartpole.h5", "/steps/reward")])
def test_links_are_not_followed(store, link):
    def create(file: h5py.File, name: str, values: np.ndarray) -> None:
        file[name] = link

    assert "has a link in place of steps" in refusal(replaced(store, "steps/reward", create))
    assert "has a link in place of steps" in refusal(
        changed(store, lambda file: (file.move("steps", "moved"), file.__setitem__("steps", h5py.SoftLink("/moved"))))
    )


@pytest.mark.parametrize("dtype", ["f8", ">f4", "i4", "O"])
def test_dataset_of_another_dtype(store, dtype):
    def create(file: h5py.File, name: str, values: np.ndarray) -> None:
        of_text = {"dtype": h5py.string_dtype()} if dtype == "O" else {"dtype": dtype}
        file.create_dataset(name, values.shape, **of_text)

    assert "expected float32 (61, 1)" in refusal(replaced(store, "steps/action", create))


@pytest.mark.parametrize("shape", [(61, 4), (60, 5), (305,), (61, 5, 1), ()])
def test_dataset_of_another_shape(store, shape):
    def create(file: h5py.File, name: str, values: np.ndarray) -> None:
        file.create_dataset(name, shape, "<f4")

    message = refusal(replaced(store, "steps/observation", create))
    assert f"observation is float32 {shape}, expected float32 (61, 5)" in message


@pytest.mark.parametrize(
    "name",
    ["episodes/offset", "episodes/recorded_sha256", "returns/cartpole_balance"],
)
def test_opening_finds_damaged_small_arrays(store, name):
    def damage(file: h5py.File) -> None:
        file[name][1] += 1

    assert f"{name} is damaged" in refusal(changed(store, damage))


@pytest.mark.parametrize("name", ["steps/physics", "rewards/cartpole_swingup"])
def test_verify_finds_damaged_steps(store, name):
    def damage(file: h5py.File) -> None:
        file[name][5] = 0.123

    damaged = EpisodeStore(changed(store, damage))
    what = "recorded" if name == "steps/physics" else "relabelled"
    with pytest.raises(
        UserError, match=rf"changed\.h5: episode 0 is damaged \(the sha256 of its {what} arrays differs"
    ):
        damaged.verify()


def rewritten(store: EpisodeStore, name: str, values: np.ndarray) -> EpisodeStore:
    """Return a copy of a store with other values in a small array and their checksum."""

    def rewrite(file: h5py.File) -> None:
        file[name][...] = values
        file[name].attrs["sha256"] = hashlib.sha256(values.tobytes()).hexdigest()

    return EpisodeStore(changed(store, rewrite))


def test_returns_that_do_not_follow_from_the_rewards(store):
    task = "cartpole_balance"
    with pytest.raises(UserError, match=r"episode 1 is damaged \(its return of cartpole_balance is not the sum"):
        rewritten(store, f"returns/{task}", store.returns(task) + np.float32([0, 1, 0])).verify()


def test_every_damaged_byte_of_the_description_is_rejected_or_harmless(tmp_path, store):
    content = store.path.read_bytes()
    random = np.random.default_rng(0)
    whole = [store.episode(i) for i in range(3)]
    for place in random.integers(0, len(content), 200):
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(random.integers(8))
        (tmp_path / "a.h5").write_bytes(damaged)
        try:
            other = EpisodeStore(tmp_path / "a.h5")
            other.verify()
        except UserError as error:
            assert "a.h5" in str(error)  # noqa: PT017
        else:
            for i, episode in enumerate(whole):
                for key, array in other.episode(i).items():
                    np.testing.assert_array_equal(array, episode[key])


def test_a_store_that_another_program_has_open_is_not_called_damaged(store):
    code = "import h5py, os, sys; file = h5py.File(sys.argv[1], 'a'); os._exit(1)"  # a notebook that was killed
    subprocess.run([sys.executable, "-c", code, store.path], check=False)
    assert "is open for writing in another program" in refusal(store.path)
