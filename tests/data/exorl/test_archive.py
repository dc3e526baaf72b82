import io
import os
import struct
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest

from ringrl.data.exorl import Archive, save_episode
from ringrl.envs import DOMAINS
from ringrl.errors import UserError

CARTPOLE = DOMAINS["cartpole"]
NAME = "buffer/episode_000003_1000.npz"


@pytest.fixture
def episode(cartpole_episodes) -> dict[str, np.ndarray]:
    return dict(next(iter(cartpole_episodes.values())))


def packed(arrays: dict[str, np.ndarray]) -> bytes:
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    return content.getvalue()


def zipped(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def read_all(path: Path) -> list[dict[str, np.ndarray]]:
    with Archive(path, CARTPOLE) as archive:
        return [archive.read(member) for member in archive.members]


def refusal(path: Path) -> str:
    """The one line with which the archive is rejected."""
    with pytest.raises(UserError) as caught:
        read_all(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(path))
    return message


@pytest.mark.parametrize("kind", ["folder", "buffer", "zip"])
def test_episodes_come_in_the_order_of_their_numbers(kind, cartpole_folder, cartpole_zip, cartpole_episodes):
    path = {"folder": cartpole_folder, "buffer": cartpole_folder / "buffer", "zip": cartpole_zip}[kind]
    with Archive(path, CARTPOLE) as archive:
        assert [member.number for member in archive.members] == sorted(cartpole_episodes)
        for member in archive.members:
            read = archive.read(member)
            assert list(read) == ["observation", "action", "reward", "discount", "physics"]
            for key, array in read.items():
                np.testing.assert_array_equal(array, cartpole_episodes[member.number][key], strict=True)


def test_a_single_episode_is_read_without_the_others(cartpole_zip, cartpole_episodes):
    with Archive(cartpole_zip, CARTPOLE) as archive:
        last = archive.members[-1]
        np.testing.assert_array_equal(archive.read(last)["physics"], cartpole_episodes[last.number]["physics"])


def test_files_that_are_no_episodes_are_ignored(tmp_path, episode):
    others = {"README.md": b"x", "__MACOSX/buffer/._episode_000003_1000.npz": b"x", "buffer/.DS_Store": b"x"}
    assert len(read_all(zipped(tmp_path / "a.zip", {NAME: packed(episode), **others}))) == 1


def test_skills_and_array_order_do_not_matter(tmp_path, episode):
    with_skill = {"skill": np.ones((1001, 16), np.float32)} | {k: np.asfortranarray(v) for k, v in episode.items()}
    (read,) = read_all(zipped(tmp_path / "a.zip", {NAME: packed(with_skill)}))
    assert "skill" not in read
    np.testing.assert_array_equal(read["observation"], episode["observation"])


def test_a_saved_episode_is_whole_or_absent(tmp_path, episode):
    assert save_episode(tmp_path, 3, episode).name == "episode_000003_1000.npz"
    with pytest.raises(ValueError, match="Object arrays"):
        save_episode(tmp_path, 4, episode | {"physics": np.array([None])})
    assert [path.name for path in tmp_path.iterdir()] == ["episode_000003_1000.npz"]


def test_missing_source(tmp_path):
    assert "no such file" in refusal(tmp_path / "absent.zip")


@pytest.mark.parametrize("content", [b"", b"not a zip archive", b"PK\x03\x04" + bytes(100)])
def test_not_a_zip(tmp_path, content):
    (tmp_path / "a.zip").write_bytes(content)
    assert "cut short" in refusal(tmp_path / "a.zip")


def test_a_store_is_not_called_an_archive_cut_short(tmp_path):
    h5py.File(tmp_path / "a.h5", "w").close()
    assert "is an HDF5 file, not an ExoRL archive: a store of ringrl needs no import" in refusal(tmp_path / "a.h5")


def test_zip_cut_short(tmp_path, cartpole_zip):
    content = cartpole_zip.read_bytes()
    end_of_an_episode = content.index(b"PK\x05\x06") + 22
    for length in (len(content) // 2, end_of_an_episode, len(content) - 1):
        (tmp_path / "a.zip").write_bytes(content[:length])
        assert "cut short" in refusal(tmp_path / "a.zip")


def test_zip_with_a_comment(tmp_path, cartpole_zip):
    path = tmp_path / "a.zip"
    path.write_bytes(cartpole_zip.read_bytes())
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"walker, random exploration"
    assert len(read_all(path)) == 3


def test_episode_whose_name_was_damaged(tmp_path, cartpole_zip):
    content = bytearray(cartpole_zip.read_bytes())
    content[content.rindex(b".npz")] = ord("_")  # in the list of names at the end
    (tmp_path / "a.zip").write_bytes(content)
    assert "episode_999999_1000_npz cannot be read" in refusal(tmp_path / "a.zip")


def test_empty_archive(tmp_path):
    assert "contains no episodes" in refusal(zipped(tmp_path / "a.zip", {}))
    (tmp_path / "folder").mkdir()
    assert "contains no episodes" in refusal(tmp_path / "folder")


@pytest.mark.parametrize("keep", [0, 10, 5_000, -1])
def test_npz_cut_short(tmp_path, episode, keep):
    message = refusal(zipped(tmp_path / "a.zip", {NAME: packed(episode)[:keep]}))
    assert NAME in message
    assert "damaged or cut short" in message


def test_flipped_bits_are_noticed(tmp_path, episode):
    content = bytearray(packed(episode))
    content[len(content) // 2] ^= 0x10
    assert "damaged" in refusal(zipped(tmp_path / "a.zip", {NAME: bytes(content)}))


@pytest.mark.parametrize("key", ["observation", "action", "reward", "discount", "physics"])
def test_missing_key(tmp_path, episode, key):
    del episode[key]
    message = refusal(zipped(tmp_path / "a.zip", {NAME: packed(episode)}))
    assert NAME in message
    assert f"lacks {key}" in message


def test_wrong_width(tmp_path, episode):
    episode["observation"] = np.zeros((1001, DOMAINS["walker"].observation_size), np.float32)
    message = refusal(zipped(tmp_path / "a.zip", {NAME: packed(episode)}))
    assert "observation of shape (1001, 24), expected (1001, 5): is it the right --domain?" in message


@pytest.mark.parametrize("shape", [(1001,), (1001, 4), (1, 1001), (1001, 1, 1), ()])
def test_wrong_shape(tmp_path, episode, shape):
    episode["reward"] = np.zeros(shape, np.float32)
    assert "reward" in refusal(zipped(tmp_path / "a.zip", {NAME: packed(episode)}))


@pytest.mark.parametrize(
    ("key", "dtype"), [("observation", "f8"), ("physics", "f4"), ("action", ">f4"), ("reward", "i4")]
)
def test_wrong_dtype(tmp_path, episode, key, dtype):
    episode[key] = episode[key].astype(dtype)
    assert f"has {key} as {np.dtype(dtype)}" in refusal(zipped(tmp_path / "a.zip", {NAME: packed(episode)}))


def test_pickles_are_never_loaded(tmp_path, episode):
    episode["observation"] = np.array([{"a": 1}], dtype=object)
    assert "has observation as object" in refusal(zipped(tmp_path / "a.zip", {NAME: packed(episode)}))


def test_rows_that_do_not_agree(tmp_path, episode):
    episode["action"] = episode["action"][:990]
    assert "action of shape (990, 1), expected (1001, 1)" in refusal(
        zipped(tmp_path / "a.zip", {NAME: packed(episode)})
    )


def test_length_in_the_name_that_is_not_the_domains(tmp_path, episode):
    short = "buffer/episode_000004_500.npz"
    cut = {key: array[:501] for key, array in episode.items()}
    message = refusal(zipped(tmp_path / "a.zip", {NAME: packed(episode), short: packed(cut)}))
    assert short in message
    assert "500 steps but episodes of cartpole have 1000" in message


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("key", ["observation", "action", "reward", "discount", "physics"])
def test_values_that_are_not_finite(tmp_path, episode, key, value):
    episode[key] = episode[key].copy()
    episode[key][617, -1] = value
    message = refusal(zipped(tmp_path / "a.zip", {NAME: packed(episode)}))
    assert NAME in message
    assert f"not finite in row 617 of {key}" in message


def test_discount_other_than_one(tmp_path, episode):
    episode["discount"] = episode["discount"].copy()
    episode["discount"][1000] = 0
    assert "discount other than 1 in row 1000" in refusal(zipped(tmp_path / "a.zip", {NAME: packed(episode)}))


def test_actions_that_are_not_scaled(tmp_path, episode):
    episode["action"] = episode["action"].copy()
    episode["action"][7, 0] = -1.00002
    assert "outside [-1, 1] in row 7" in refusal(zipped(tmp_path / "a.zip", {NAME: packed(episode)}))
    episode["action"][7, 0] = -1.000001  # rounding
    with Archive(zipped(tmp_path / "b.zip", {NAME: packed(episode)}), CARTPOLE) as archive:
        assert archive.read(archive.members[0])["action"][7, 0] == np.float32(-1.000001)


def test_a_file_of_a_folder_that_is_linked_and_gone(tmp_path):
    """An episode on a missing disk is an error, not an omission."""
    (tmp_path / "buffer").mkdir()
    (tmp_path / NAME).symlink_to(tmp_path / "unmounted" / NAME)
    with Archive(tmp_path, CARTPOLE) as archive:
        assert len(archive.members) == 1
        with pytest.raises(UserError, match=f"{NAME}: cannot be read"):
            archive.stamps()


@pytest.mark.parametrize("key", ["action", "reward"])
def test_rows_shifted_by_one(tmp_path, episode, key):
    episode[key] = np.roll(episode[key], -1, axis=0)
    assert f"{key} in row 0" in refusal(zipped(tmp_path / "a.zip", {NAME: packed(episode)}))


@pytest.mark.parametrize(
    "escape",
    ["../episode_000003_1000.npz", "buffer/../../x", "/etc/passwd", "..\\x.npz", "C:\\x.npz", "\\\\host\\share\\x"],
)
def test_paths_that_escape(tmp_path, episode, escape):
    message = refusal(zipped(tmp_path / "a.zip", {NAME: packed(episode), escape: b"x"}))
    assert "leads out of the archive" in message


def test_unknown_file_name(tmp_path, episode):
    assert "buffer/first.npz is not named" in refusal(zipped(tmp_path / "a.zip", {"buffer/first.npz": packed(episode)}))


def test_one_number_twice(tmp_path, episode):
    members = {NAME: packed(episode), "buffer/episode_3_1000.npz": packed(episode)}
    assert "2 files have the number 3" in refusal(zipped(tmp_path / "a.zip", members))


def test_two_buffers_in_one_archive(tmp_path, episode):
    members = {f"{folder}/episode_00000{i}_1000.npz": packed(episode) for i, folder in enumerate(["rnd", "ddpg"])}
    assert "has episodes in ddpg and in rnd" in refusal(zipped(tmp_path / "a.zip", members))


def test_zip_bomb_outside(tmp_path):
    bomb = zipped(tmp_path / "a.zip", {NAME: bytes(100_000_000)}, zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 200_000
    assert "zip bomb" in refusal(bomb)


def test_zip_bomb_inside(tmp_path, episode):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f4", "fortran_order": False, "shape": CARTPOLE_OBSERVATION}
    )
    content = io.BytesIO(packed({key: array for key, array in episode.items() if key != "observation"}))
    with zipfile.ZipFile(content, "a", zipfile.ZIP_DEFLATED) as npz:
        npz.writestr("observation.npy", header.getvalue() + bytes(100_000_000))
    message = refusal(zipped(tmp_path / "a.zip", {NAME: content.getvalue()}))
    assert "bytes of observation, far more than an episode: it is damaged or a zip bomb" in message


CARTPOLE_OBSERVATION = (1001, CARTPOLE.observation_size)


@pytest.mark.parametrize("more", [-4, 4])
def test_array_longer_or_shorter_than_its_header_says(tmp_path, episode, more):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f4", "fortran_order": False, "shape": CARTPOLE_OBSERVATION}
    )
    content = io.BytesIO(packed({key: array for key, array in episode.items() if key != "observation"}))
    with zipfile.ZipFile(content, "a", zipfile.ZIP_DEFLATED) as npz:
        npz.writestr("observation.npy", header.getvalue() + bytes(1001 * 5 * 4 + more))
    message = refusal(zipped(tmp_path / "a.zip", {NAME: content.getvalue()}))
    assert f"claims {20_020 + more:,} bytes of observation, expected 20,020" in message


def test_array_that_claims_to_be_huge(tmp_path, episode):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (1001, 2**40)})
    content = io.BytesIO(packed({key: array for key, array in episode.items() if key != "observation"}))
    with zipfile.ZipFile(content, "a") as npz:
        npz.writestr("observation.npy", header.getvalue())
    assert "observation of shape" in refusal(zipped(tmp_path / "a.zip", {NAME: content.getvalue()}))


def marked(path: Path, place: int, value: int) -> Path:
    """Overwrite two bytes of an entry in the list of a zip file."""
    content = bytearray(path.read_bytes())
    struct.pack_into("<H", content, content.rindex(b"PK\x01\x02") + place, value)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("method", [9, 12, 14, 93, 77])
def test_other_compression(tmp_path, episode, method):
    path = marked(zipped(tmp_path / "a.zip", {NAME: packed(episode)}), 10, method)
    assert f"is compressed with method {method}, only Deflate can be read: unpack the archive" in refusal(path)


def test_encrypted_entry(tmp_path, episode):
    path = marked(zipped(tmp_path / "a.zip", {NAME: packed(episode)}), 8, 1)
    assert "is encrypted: unpack the archive and import the folder" in refusal(path)


def test_oversized_file_in_a_folder(tmp_path):
    with (tmp_path / "episode_000003_1000.npz").open("wb") as file:
        file.truncate(100_000_000)
    assert "far more than an episode" in refusal(tmp_path)


@pytest.mark.parametrize("target", ["/dev/zero", None])
def test_pipes_and_devices_are_not_read(tmp_path, target):
    """Reading them would never end. The archive itself may be one, too."""
    path = tmp_path / "folder" / "episode_000003_1000.npz"
    path.parent.mkdir()
    path.symlink_to(target) if target else os.mkfifo(path)
    assert "episode_000003_1000.npz is not a regular file: remove it" in refusal(path.parent)
    assert "is neither a file nor a folder" in refusal(path)


def test_names_with_backslashes(tmp_path, episode):
    (read,) = read_all(zipped(tmp_path / "a.zip", {NAME.replace("/", "\\"): packed(episode)}))
    np.testing.assert_array_equal(read["physics"], episode["physics"])


@pytest.mark.parametrize("more", [b"\r\n", bytes(1000)])
def test_bytes_after_the_end(tmp_path, episode, more):
    path = zipped(tmp_path / "a.zip", {NAME: packed(episode)})
    path.write_bytes(path.read_bytes() + more)
    assert len(read_all(path)) == 1


def test_names_of_urlb(tmp_path, episode):
    name = "buffer/20210801T123456_3_1000.npz"
    (read,) = read_all(zipped(tmp_path / "a.zip", {name: packed(episode)}))
    np.testing.assert_array_equal(read["physics"], episode["physics"])
    del episode["physics"]
    message = refusal(zipped(tmp_path / "b.zip", {name: packed(episode)}))
    assert "lacks physics: " in message
    assert "URLB records no physics, from which rewards are computed" in message


def test_the_number_of_entries_without_zip64_records(tmp_path, episode):
    """macOS writes the number of entries modulo 65,536."""
    others = {f"__MACOSX/{number}": b"" for number in range(2**16)}
    path = zipped(tmp_path / "a.zip", {NAME: packed(episode)} | others)
    content = path.read_bytes()
    end = content.rindex(b"PK\x06\x06")
    size, start = struct.unpack_from("<QQ", content, end + 40)
    record = struct.pack("<4sHHHHLLH", b"PK\x05\x06", 0, 0, 1, 1, size, start, 0)
    path.write_bytes(content[:end] + record)
    assert len(read_all(path)) == 1


def test_entries_that_share_bytes(tmp_path, episode):
    """A small archive could claim a store of any size."""
    path = zipped(tmp_path / "a.zip", {NAME: packed(episode)})
    content = path.read_bytes()
    start = content.rindex(b"PK\x01\x02")
    entry, end = content[start : content.rindex(b"PK\x05\x06")], bytearray(content[-22:])
    struct.pack_into("<HHL", end, 8, 2, 2, 2 * len(entry))
    path.write_bytes(content[:start] + entry + entry.replace(b"_000003_", b"_000004_") + end)
    assert "its episodes overlap" in refusal(path)
