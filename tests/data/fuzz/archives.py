"""Damaged and hostile archives, made from a good archive of two cartpole episodes.

Every kind is a function `(folder, good, random) -> path` that makes one variant. `good` has the episodes by file name.
"""

import io
import os
import struct
import zipfile
from pathlib import Path

import numpy as np

Good = dict[str, dict[str, np.ndarray]]

KEYS = ("observation", "action", "reward", "discount", "physics")
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def packed(arrays: dict[str, np.ndarray], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", method) as npz:
        for key, array in arrays.items():
            file = io.BytesIO()
            np.lib.format.write_array(file, np.asarray(array), allow_pickle=True)
            npz.writestr(f"{key}.npy", file.getvalue())
    return content.getvalue()


def zipped(folder: Path, members: list[tuple[str | zipfile.ZipInfo, bytes]], method: int = zipfile.ZIP_STORED) -> Path:
    path = folder / "fuzzed.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members:
            archive.writestr(name, content, compress_type=method)
    return path


def members_of(good: Good) -> list[tuple[str | zipfile.ZipInfo, bytes]]:
    return [(name, packed(arrays)) for name, arrays in good.items()]


def with_last(folder: Path, good: Good, content: bytes) -> Path:
    """Write an archive whose last episode has the given bytes."""
    *others, (name, _) = members_of(good)
    return zipped(folder, [*others, (name, content)])


def last_changed(folder: Path, good: Good, **arrays: np.ndarray) -> Path:
    """Write an archive with other arrays in its last episode."""
    return with_last(folder, good, packed(list(good.values())[-1] | arrays))


def bit_flips(folder, good, random):
    path = zipped(folder, members_of(good), METHODS[random.integers(2)])
    content = bytearray(path.read_bytes())
    # Half of the changes are in headers and directories, which are a small part of the file.
    structure = [content.find(b"PK", start) for start in random.integers(len(content) - 4, size=20)]
    for _ in range(random.integers(1, 4)):
        near = int(random.choice(structure)) + int(random.integers(0, 80))
        place = near if random.random() < 0.5 else int(random.integers(len(content)))
        content[place % len(content)] ^= 1 << int(random.integers(8))
    path.write_bytes(content)
    return path


def cut_short(folder, good, random):
    path = zipped(folder, members_of(good))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * random.random() ** 0.3)])
    return path


def run_of_zeros(folder, good, random):
    path = zipped(folder, members_of(good))
    content = bytearray(path.read_bytes())
    start = int(random.integers(len(content)))
    content[start : start + int(random.integers(1, 2000))] = bytes(1)
    path.write_bytes(content)
    return path


def noise(folder, good, random):
    path = folder / "fuzzed.zip"
    path.write_bytes(random.bytes(int(random.integers(0, 5000))) + b"PK\x05\x06"[: int(random.integers(5))])
    return path


def wrong_keys(folder, good, random):
    arrays, key = dict(list(good.values())[-1]), str(random.choice(KEYS))
    value = arrays.pop(key)
    names = (key.upper(), f"{key}s", f"../{key}", f"/{key}", f"{key}.npy", f"sub/{key}", "")
    return with_last(folder, good, packed(arrays | {str(random.choice(names)): value}))


def wrong_shapes(folder, good, random):
    key = str(random.choice(KEYS))
    array = list(good.values())[-1][key]
    shapes = (array[:-1], array[:, :-1], array[0], array[None], array.T, array.ravel(), np.zeros((0, 5)), array[:0])
    wrong = shapes[random.integers(len(shapes))].astype(array.dtype)
    return last_changed(folder, good, **{key: wrong if wrong.shape != array.shape else array[:-1]})


def wrong_dtypes(folder, good, random):
    key = str(random.choice(KEYS))
    array = list(good.values())[-1][key]
    dtypes = [dtype for dtype in ("f2", "f4", "f8", ">f4", ">f8", "i4", "c8", "S4", "U2", "?") if dtype != array.dtype]
    return last_changed(folder, good, **{key: array.astype(str(random.choice(dtypes)))})


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def pickles(folder, good, random):
    trap = np.empty(1 if random.random() < 0.5 else (1001, 5), dtype=object)
    trap[...] = Trap(folder / "trap")
    return last_changed(folder, good, **{str(random.choice(KEYS)): trap})


def structured_dtypes(folder, good, random):
    fields = [("a", "f4"), ("b", "O")] if random.random() < 0.5 else [("a", "f4", (5,))]
    return last_changed(folder, good, observation=np.zeros(1001, dtype=fields))


def wrong_values(folder, good, random):
    key = str(random.choice(KEYS))
    array = list(good.values())[-1][key].copy()
    row = int(random.integers(1, len(array)))
    array[row, -1] = random.choice([np.nan, np.inf, -np.inf])
    if random.random() < 0.3:
        array = np.roll(list(good.values())[-1][key], -1, axis=0)
        array[0, 0] = 0.5
        key = key if key in ("action", "reward", "discount") else "action"
        array = array if array.shape[1] == 1 else array[:, :1].astype(np.float32)
    return last_changed(folder, good, **{key: array})


ESCAPES = (
    "../{}", "buffer/../../{}", "/{}", "/etc/{}", "..\\{}", "C:\\{}", "C:{}", "\\\\host\\share\\{}", "buffer/..\\{}",
)  # fmt: skip


def paths_that_escape(folder, good, random):
    name = str(random.choice(ESCAPES)).format(str(random.choice(["x", "x.npz", "episode_000009_1000.npz"])))
    return zipped(folder, [*members_of(good), (name, b"x")])


def symbolic_links(folder, good, random):
    link = zipfile.ZipInfo("buffer/episode_000009_1000.npz")
    link.external_attr = 0o120777 << 16
    return zipped(
        folder, [*members_of(good), (link, str(random.choice(["/etc/passwd", "../x", "/dev/zero"])).encode())]
    )


def bombs(folder, good, random):
    size = int(random.integers(20_000_000, 40_000_000))
    if random.random() < 0.5:
        name = list(good)[-1]
        return zipped(folder, [*members_of(good)[:-1], (name, bytes(size))], zipfile.ZIP_DEFLATED)
    key, arrays, content = str(random.choice(KEYS)), dict(list(good.values())[-1]), io.BytesIO()
    header = io.BytesIO()
    shape = arrays.pop(key).shape
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    content.write(packed(arrays))
    with zipfile.ZipFile(content, "a", zipfile.ZIP_DEFLATED) as npz:
        npz.writestr(f"{key}.npy", header.getvalue() + bytes(size))
    return with_last(folder, good, content.getvalue())


def nested_archives(folder, good, random):
    content = packed(list(good.values())[-1])
    for _ in range(random.integers(1, 4)):
        outer = io.BytesIO()
        with zipfile.ZipFile(outer, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(str(random.choice(["observation.npy", "episode_000000_1000.npz", "a.zip"])), content)
        content = outer.getvalue()
    return with_last(folder, good, content)


def overlapping_entries(folder, good, random):
    """All entries of the directory point to the same content."""
    path = zipped(folder, [*members_of(good), *((f"buffer/episode_{9 + i:06d}_1000.npz", b"") for i in range(4))])
    content = bytearray(path.read_bytes())
    entries = [i for i in range(len(content) - 4) if content[i : i + 4] == b"PK\x01\x02"][-(len(good) + 4) :]
    first = content[entries[1] + 16 : entries[1] + 28], content[entries[1] + 42 : entries[1] + 46]
    for entry in entries[len(good) :]:
        content[entry + 16 : entry + 28], content[entry + 42 : entry + 46] = first
    path.write_bytes(content)
    return path


def lying_sizes(folder, good, random):
    """The directory of the archive or of an episode gives a wrong size."""
    size = int(random.choice([0, 1, 1000, 50_000, 2**20, 2**31 - 1, 2**32 - 1]))
    field = int(random.choice([20, 24]))

    def lie(content: bytes) -> bytes:
        changed = bytearray(content)
        struct.pack_into("<I", changed, content.rindex(b"PK\x01\x02") + field, size)
        return bytes(changed)

    if random.random() < 0.5:
        return with_last(folder, good, lie(packed(list(good.values())[-1])))
    path = zipped(folder, members_of(good))
    path.write_bytes(lie(path.read_bytes()))
    return path


def names_twice(folder, good, random):
    if random.random() < 0.5:
        return zipped(folder, [*members_of(good), members_of(good)[int(random.integers(len(good)))]])
    content = io.BytesIO(packed(list(good.values())[-1]))
    key = str(random.choice(KEYS))
    file = io.BytesIO()
    np.lib.format.write_array(file, list(good.values())[-1][key] * 0)
    with zipfile.ZipFile(content, "a") as npz:
        npz.writestr(f"{key}.npy", file.getvalue())
    return with_last(folder, good, content.getvalue())


def encrypted(folder, good, random):
    def encrypt(content: bytes) -> bytes:
        changed = bytearray(content)
        struct.pack_into("<H", changed, content.rindex(b"PK\x01\x02") + 8, int(random.choice([1, 0x41, 0x2001])))
        return bytes(changed)

    if random.random() < 0.5:
        return with_last(folder, good, encrypt(packed(list(good.values())[-1])))
    path = zipped(folder, members_of(good))
    path.write_bytes(encrypt(path.read_bytes()))
    return path


def other_methods(folder, good, random):
    method = int(random.choice([zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]))
    if random.random() < 0.4:
        return with_last(folder, good, packed(list(good.values())[-1], method))
    if random.random() < 0.5:
        return zipped(folder, members_of(good), method)
    path = zipped(folder, members_of(good))
    content = bytearray(path.read_bytes())
    struct.pack_into("<H", content, content.rindex(b"PK\x01\x02") + 10, int(random.integers(9, 120)))
    path.write_bytes(content)
    return path


def npy_headers(folder, good, random):
    """Array headers that are huge, have an unknown version or are no dictionary."""
    shape = "(1001, 5)"
    texts = (
        f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}" + " " * 50_000,
        "(" * 5_000, "[" * 9_000 + "]" * 9_000, "-" * 9_000 + "1", "9" * 9_000, "", "{}", "\0" * 64, "'" * 64,
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 5)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1001, 5.0)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (10**9, 10**9)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1001, 9999999999999999999999)}",
        "{'descr': '<f4', 'fortran_order': 3, 'shape': (1001, 5)}",
        "{'descr': '|V4', 'fortran_order': False, 'shape': (1001, 5)}",
        "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1001, 5)}",
        "__import__('os').mkdir('trap')",
    )  # fmt: skip
    text = texts[random.integers(len(texts))].encode()
    version = int(random.choice([1, 2, 3, 9]))
    length = int(random.choice([len(text), len(text), 2**16 - 1, 2**32 - 1, 0]))
    packed_length = struct.pack("<H", min(length, 2**16 - 1)) if version == 1 else struct.pack("<I", length)
    content = io.BytesIO(packed({key: a for key, a in list(good.values())[-1].items() if key != "observation"}))
    with zipfile.ZipFile(content, "a", zipfile.ZIP_DEFLATED) as npz:
        npz.writestr("observation.npy", b"\x93NUMPY" + bytes([version, 0]) + packed_length + text + bytes(20_020))
    return with_last(folder, good, content.getvalue())


NAMES = (
    "buffer/episode_\uff10\uff1009_1000.npz", "buffer/épisode.npz", "buffer/\u202eepisode_9.npz", "buffer/a\nb.npz",
    "buffer/\x1b[2Jx.npz", "buffer/" + "n" * 5_000 + ".npz", "buffer/episode_-00009_1000.npz",
    "buffer/episode_000009_99999999999999999999.npz", "buffer/episode_000009_0.npz", "buffer/episode_9_1e3.npz",
    "buffer/episode_000009_999999999.npz", "buffer/\ud7ff😀.npz", "other/episode_000009_1000.npz",
)  # fmt: skip


def strange_names(folder, good, random):
    return zipped(folder, [*members_of(good), (NAMES[random.integers(len(NAMES))], packed(list(good.values())[-1]))])


def folders(folder, good, random):
    """A folder in place of a zip file, with an entry that is no episode."""
    path = folder / "fuzzed.zip"
    path.mkdir()
    for name, content in members_of(good):
        (path / Path(str(name)).name).write_bytes(content)
    extra = path / "episode_000009_1000.npz"
    kind = int(random.integers(6))
    if kind == 0:
        os.mkfifo(extra)
    elif kind == 1:
        extra.mkdir()
    elif kind == 2:
        extra.symlink_to(extra.name)
    elif kind == 3:
        extra.symlink_to("/dev/zero")
    elif kind == 4:
        extra.write_bytes(b"")
    else:
        os.truncate(os.open(extra, os.O_RDWR | os.O_CREAT), 2**40)
    return path


def harmless(folder, good, random):
    """Good archives: more keys, another order of arrays, notes, another compression, bytes before the archive."""
    extra = {"skill": random.random((1001, 16)).astype(np.float32), "meta": np.array(["a"])}
    members = [(name, packed(extra | {k: np.asfortranarray(v) for k, v in a.items()})) for name, a in good.items()]
    path = zipped(folder, [("README.md", b"x"), *members, ("buffer/.DS_Store", b"x")], METHODS[random.integers(2)])
    path.write_bytes(random.bytes(int(random.integers(100))) + path.read_bytes())
    return path


KINDS = (
    bit_flips, cut_short, run_of_zeros, noise, wrong_keys, wrong_shapes, wrong_dtypes, pickles, structured_dtypes,
    wrong_values, paths_that_escape, symbolic_links, bombs, nested_archives, overlapping_entries, lying_sizes,
    names_twice, encrypted, other_methods, npy_headers, strange_names, folders, harmless, bit_flips, bit_flips,
)  # fmt: skip
