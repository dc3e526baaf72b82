"""Archives in the ExoRL layout: a zip file or a folder of `buffer/episode_{number}_{length}.npz`.

An archive may be hostile: pickles, paths that leave the archive, and sizes that do not fit the domain are rejected.
Episodes are read one at a time, directly from the zip file.
"""

import contextlib
import hashlib
import io
import json
import math
import re
import stat
import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PureWindowsPath
from typing import IO, NamedTuple, Self

import h5py
import numpy as np

from ringrl.data.store.format import ROUNDED, ArraySpec, Episode, episode_bytes, recorded_arrays
from ringrl.envs import Domain
from ringrl.errors import UserError, printable
from ringrl.files import explain_read_errors, write_whole

# Largest file of an episode, in multiples of the five arrays that are read. Archives of skill-based algorithms (diayn,
# aps, smm) contain a skill, too.
SIZE_ALLOWANCE = 8


class Member(NamedTuple):
    """One episode of an archive: its number and length in steps (both from the name) and its path in the archive."""

    number: int
    length: int
    path: str


class Archive:
    """The episodes of a zip file or folder in ExoRL's layout, sorted by number. Use it as a context manager.

    Raises UserError, naming archive and member, for files that are not episodes of `domain`.
    """

    def __init__(self, source: Path, domain: Domain) -> None:
        self.source = Path(source)
        self.domain = domain
        self._columns = recorded_arrays(domain)
        self._limit = SIZE_ALLOWANCE * episode_bytes(domain, domain.episode_length, relabelled=False) + 2**20
        buffer = self.source / "buffer"
        self._folder = buffer if buffer.is_dir() else self.source
        self._zip = None if self.source.is_dir() else open_zip(self.source)
        try:
            if self._zip is None:
                paths = [path.name for path in self._folder.iterdir() if not path.is_dir()]
            else:
                paths = [info.filename for info in self._zip.infolist() if not info.is_dir()]
            self.members = _episodes_among(paths, self.source)
            if self._zip is not None:
                _refuse_lost_names(self._zip, {member.path for member in self.members}, self.source)
                if sum(self._zip.getinfo(member.path).compress_size for member in self.members) > self.size():
                    raise UserError(f"{self.source}: its episodes overlap: it is damaged or a zip bomb, remove it")
        except OSError as error:
            raise UserError(f"{self._folder}: cannot be read ({error.strerror or error})") from error
        except UserError:
            self.close()
            raise

    def read(self, member: Member) -> dict[str, np.ndarray]:
        """Return one episode as read-only arrays of T+1 rows with the widths and dtypes of `recorded_arrays`."""
        self.check_length(member)
        with explain_read_errors(f"{self.source}: {shown(member.path)}", "download or record it again"):
            episode = _read_npz(self._content(member), self._columns, member.length + 1, self._limit)
            _check_values(episode)
        return episode

    def check_length(self, member: Member) -> None:
        """Raise UserError if the name of an episode gives another length than the domain's."""
        if member.length != self.domain.episode_length:
            raise UserError(
                f"{self.source}: {shown(member.path)} has {member.length} steps but episodes of {self.domain.name} "
                f"have {self.domain.episode_length}: choose the archive's own --domain or remove the file"
            )

    def stamps(self) -> list[tuple[str, int, int]]:
        """Return path, size in bytes, and CRC (in a folder: time of the last change) of each episode."""
        if self._zip is None:
            try:
                states = [(self._folder / member.path).stat() for member in self.members]
            except OSError as error:
                raise UserError(f"{error.filename}: cannot be read ({error.strerror or error})") from error
            return [(m.path, state.st_size, state.st_mtime_ns) for m, state in zip(self.members, states, strict=True)]
        infos = [self._zip.getinfo(member.path) for member in self.members]
        return [(info.filename, info.file_size, info.CRC) for info in infos]

    def size(self) -> int:
        """Return the bytes of the zip file, or of all episode files of a folder."""
        return sum(size for _, size, _ in self.stamps()) if self._zip is None else self.source.stat().st_size

    def listing_sha256(self) -> str:
        """Return the sha256 over path, size and, in a zip file, CRC of each episode."""
        stamps = [(path, size, 0 if self._zip is None else stamp) for path, size, stamp in self.stamps()]
        return hashlib.sha256(json.dumps(stamps).encode()).hexdigest()

    def close(self) -> None:
        if self._zip is not None:
            self._zip.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _content(self, member: Member) -> bytes:
        """Return the bytes of an episode's file. Its size is checked before."""
        if self._zip is None:
            path = self._folder / member.path
            state = path.stat()
            if not stat.S_ISREG(state.st_mode):
                raise UserError("is not a regular file: remove it")  # reading a pipe or device may never end
            _refuse_oversized(state.st_size, self._limit)
            return path.read_bytes()
        info = self._zip.getinfo(member.path)
        _refuse_oversized(info.file_size, self._limit)
        _refuse_strange_entry(info, "unpack the archive and import the folder")
        return self._zip.read(info)  # zipfile never reads beyond the declared size


def shown(path: str) -> str:
    """Return untrusted text, such as a path of an archive, printable and shortened to 200 characters."""
    text = printable(path)
    return text if len(text) <= 200 else f"{text[:100]}...{text[-97:]}"


def save_episode(folder: Path, number: int, episode: Episode) -> Path:
    """Write one episode of T+1 rows as `folder/episode_{number}_{T}.npz`, whole or not at all. Return the path."""
    path = folder / f"episode_{number:06d}_{len(episode['observation']) - 1}.npz"
    content = io.BytesIO()
    np.savez_compressed(content, allow_pickle=False, **episode)
    write_whole(path, content.getvalue())
    return path


def open_zip(source: Path) -> zipfile.ZipFile:
    """Open a zip archive. UserError if its list of names is damaged or cut short."""
    if not source.is_file():
        what = "is neither a file nor a folder" if source.exists() else "no such file or folder"
        raise UserError(f"{source}: {what}, give an ExoRL zip archive or a folder of episodes")
    with explain_read_errors(f"{source}:", "give a whole zip archive or a folder of episodes"):
        if h5py.is_hdf5(source):
            raise UserError(
                "is an HDF5 file, not an ExoRL archive: a store of ringrl needs no import, and other flat files (D4RL) "
                "need --format hdf5"
            )
        archive = zipfile.ZipFile(source)
        # In an archive that was cut short, zipfile finds the list of its last whole episode, which is a zip file, too.
        with source.open("rb") as file:
            begins_with_entry = file.read(4) == b"PK\x03\x04"
        if begins_with_entry and min((info.header_offset for info in archive.infolist()), default=0) > 0:
            archive.close()
            raise zipfile.BadZipFile("the list of names is missing")
    return archive


def _refuse_lost_names(archive: zipfile.ZipFile, episodes: set[str], source: Path) -> None:
    """Reject an archive in which another entry has a damaged name, because the entry may be an episode."""
    for info in archive.infolist():
        if info.filename not in episodes:
            entry, advice = f"{source}: {shown(info.filename)}", "it may have been an episode, download it again"
            with explain_read_errors(entry, advice), contextlib.suppress(RuntimeError):  # encrypted, or another method
                archive.open(info).close()


def _episodes_among(paths: Sequence[str], source: Path) -> tuple[Member, ...]:
    """Check the paths of an archive and return its episodes, sorted by number."""
    members = []
    for path in paths:
        # Some programs write backslashes, which zipfile keeps. Windows paths have separators of both kinds.
        pure = PureWindowsPath(path)
        if pure.anchor or ".." in pure.parts:
            raise UserError(f"{source}: the path {shown(path)} leads out of the archive: do not use this file")
        if pure.suffix != ".npz" or pure.name.startswith(".") or "__MACOSX" in pure.parts:
            continue  # notes, listings and files of file managers
        match = re.fullmatch(r"(?:episode|[0-9]{8}T[0-9]{6})_([0-9]{1,12})_([0-9]{1,9})\.npz", pure.name)
        if match is None:
            raise UserError(f"{source}: {shown(path)} is not named episode_NUMBER_LENGTH.npz: rename or remove it")
        members.append(Member(int(match[1]), int(match[2]), path))
    if not members:
        raise UserError(
            f"{source}: contains no episodes (buffer/episode_NUMBER_LENGTH.npz): is it a whole ExoRL archive?"
        )
    folders = sorted({str(PureWindowsPath(member.path).parent) for member in members})
    if len(folders) > 1:
        raise UserError(
            f"{source}: has episodes in {shown(folders[0])} and in {shown(folders[1])}: import one folder at a time"
        )
    number, count = Counter(member.number for member in members).most_common(1)[0]
    if count > 1:
        raise UserError(f"{source}: {count} files have the number {number}: remove all but one")
    return tuple(sorted(members))


def _refuse_oversized(size: int, limit: int, part: str = "") -> None:
    if size > limit:
        raise UserError(
            f"claims {size:,} bytes{part}, far more than an episode: it is damaged or a zip bomb, remove it"
        )


def _refuse_strange_entry(info: zipfile.ZipInfo, advice: str) -> None:
    # Other methods can expand a few bytes to gigabytes inside the decompressor, before any limit applies.
    if info.flag_bits & 0x1:
        raise UserError(f"is encrypted: {advice}")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise UserError(f"is compressed with method {info.compress_type}, only Deflate can be read: {advice}")


def _read_npz(content: bytes, columns: dict[str, ArraySpec], rows: int, limit: int) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(io.BytesIO(content)) as npz:
        names = npz.namelist()
        if missing := [key for key in columns if f"{key}.npy" not in names]:
            raise UserError(
                f"lacks {', '.join(missing)}: it is not an episode with ExoRL's keys {', '.join(columns)} (URLB "
                "records no physics, from which rewards are computed: make a Minari dataset of it, --format minari)"
            )
        episode = {}
        for key, spec in columns.items():
            info = npz.getinfo(f"{key}.npy")
            if names.count(info.filename) > 1:
                raise UserError(f"has {key} more than once: it is damaged, remove it")
            _refuse_strange_entry(info, "save it again with numpy.savez")
            _refuse_oversized(info.file_size, limit, f" of {key}")
            with npz.open(info) as file:
                episode[key] = _read_npy(file, info.file_size, key, spec, rows)
        return episode


def _read_npy(file: IO[bytes], size: int, key: str, spec: ArraySpec, rows: int) -> np.ndarray:
    """Read one .npy file of `size` bytes. The header is checked before the data is read."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise UserError(f"has {key} in .npy version {version}: save it again with numpy.savez")
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, is_fortran_order, dtype = read_header(file)
    if dtype != spec.dtype:
        raise UserError(f"has {key} as {dtype}, expected {spec.dtype}: is it an ExoRL episode?")
    if shape != (rows, spec.width):
        raise UserError(f"has {key} of shape {shape}, expected {(rows, spec.width)}: is it the right --domain?")
    expected = math.prod(shape) * dtype.itemsize
    announced = size - file.tell()
    if announced != expected:
        raise UserError(f"claims {announced:,} bytes of {key}, expected {expected:,}: it is damaged, remove it")
    data = np.frombuffer(file.read(), dtype)
    return data.reshape(shape, order="F" if is_fortran_order else "C")


def _check_values(episode: Episode) -> None:
    for key, array in episode.items():
        if len(rows := np.flatnonzero(~np.isfinite(array).all(axis=1))):
            raise UserError(
                f"has a value that is not finite in row {rows[0]} of {key}: remove the file or record it again"
            )
    if len(rows := np.flatnonzero(episode["discount"][:, 0] != 1)):
        raise UserError(
            f"has a discount other than 1 in row {rows[0]}: ExoRL episodes never terminate, remove the file"
        )
    if len(rows := np.flatnonzero(np.abs(episode["action"]).max(axis=1) > 1 + ROUNDED)):
        raise UserError(f"has an action outside [-1, 1] in row {rows[0]}: scale the actions")
    for key in ("action", "reward"):
        if episode[key][0].any():
            raise UserError(
                f"has {key} in row 0 other than 0: row 0 is the reset, and row t has the action and reward that led to "
                "state t. Shift both by one row, or set them to 0 in row 0 if the other rows are right"
            )
