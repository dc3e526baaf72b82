"""Damaged and hostile stores, made from a good store.

Every kind is a function `(path, random) -> None` that changes a copy of the good store in place.
"""

import hashlib
import json
import os
from pathlib import Path

import h5py
import numpy as np

from ringrl.data.store.format import content_fingerprint

ROWS = ("steps/observation", "steps/action", "steps/reward", "steps/discount", "steps/physics")
REWARDS = ("rewards/cartpole_balance", "rewards/cartpole_swingup_sparse")
SMALL = (
    "episodes/offset", "episodes/recorded_sha256", "episodes/relabelled_sha256", "returns/cartpole_swingup",
)  # fmt: skip


def bit_flips(path, random):
    content = bytearray(path.read_bytes())
    for _ in range(random.integers(1, 3)):
        content[int(random.integers(len(content)))] ^= 1 << int(random.integers(8))
    path.write_bytes(content)


def flips_in_the_description(path, random):
    """Flip bytes outside the rows: in the first kilobytes of the file and at its end."""
    content = bytearray(path.read_bytes())
    with h5py.File(path) as file:
        taken = [(file[name].id.get_offset(), file[name].nbytes) for name in (*ROWS, "rewards/cartpole_swingup")]
    free = np.ones(len(content), bool)
    for start, size in taken:
        free[start : start + size] = False
    content[int(random.choice(np.flatnonzero(free)))] ^= 1 << int(random.integers(8))
    path.write_bytes(content)


def cut_short(path, random):
    os.truncate(path, int(path.stat().st_size * random.random() ** 0.3))


def longer(path, random):
    with path.open("ab") as file:
        file.write(random.bytes(int(random.integers(1, 5000))))


def run_of_zeros(path, random):
    with path.open("r+b") as file:
        file.seek(int(random.integers(path.stat().st_size - 2000)))
        file.write(bytes(int(random.integers(1, 2000))))


ATTRIBUTES = ("format", "format_version", "created_by", "domain", "tasks", "recorded_task", "provenance", "fingerprint")
VALUES = (
    "", "x", "walker", "null", "[]", "{}", '{"source": 3}', "[" * 50_000, "\n", "nan", 0, -1, 2**40, 1.5, float("nan"),
    np.zeros(3), np.zeros((0,)), b"\xff\xfe", True, "x" * 60_000,
)  # fmt: skip


def wrong_attributes(path, random):
    name = str(random.choice([name for name in ATTRIBUTES if name != "created_by"]))
    with h5py.File(path, "r+") as file:
        file.attrs[name] = VALUES[random.integers(len(VALUES))]


def missing_attributes(path, random):
    with h5py.File(path, "r+") as file:
        del file.attrs[str(random.choice([name for name in ATTRIBUTES if name != "created_by"]))]


def wrong_provenance(path, random):
    with h5py.File(path, "r+") as file:
        values = json.loads(file.attrs["provenance"])
        key = str(random.choice(list(values)))
        if random.random() < 0.3:
            del values[key]
        else:
            values[key] = [None, 3.5, [3], {"a": 1}, "exorl", -1][random.integers(6)]
            if key in ("source", "source_sha256", "subset", "created", "created_by", "source_bytes"):
                values[key] = None
        file.attrs["provenance"] = json.dumps(values)


def _replace(path, name, create):
    with h5py.File(path, "r+") as file:
        values, attributes = file[name][:], dict(file[name].attrs)
        del file[name]
        create(file, name, values)
        if isinstance(file.get(name, getlink=True), h5py.HardLink) and isinstance(file[name], h5py.Dataset):
            file[name].attrs.update(attributes)


def other_layouts(path, random):
    layouts = ({"chunks": True}, {"compression": "gzip"}, {"shuffle": True}, {"fletcher32": True}, {"maxshape": None})
    layout = layouts[random.integers(len(layouts) - 1)]
    _replace(path, _any(random), lambda file, name, values: file.create_dataset(name, data=values, **layout))


def compact_layout(path, random):
    """Datasets in HDF5's compact layout, which cannot be mapped."""

    def create(file, name, values):
        settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        settings.set_layout(h5py.h5d.COMPACT)
        file.create_dataset(name, values.shape, values.dtype, dcpl=settings)[...] = values

    _replace(path, _any(random), create)


def bombs(path, random):
    """A few bytes with a header for terabytes of numbers."""

    def create(file, name, values):
        shape = (2**38, *values.shape[1:])
        chunks = (2**20, *values.shape[1:])
        if random.random() < 0.5:
            file.create_dataset(name, shape, values.dtype, chunks=chunks, compression="gzip")
        else:
            file.create_dataset(name, shape, values.dtype)

    _replace(path, _any(random), create)


def external_files(path, random):
    target = str(random.choice(["/dev/zero", "/etc/passwd", str(path)]))
    _replace(
        path,
        _any(random),
        lambda file, name, values: file.create_dataset(
            name, values.shape, values.dtype, external=[(target, 0, values.nbytes)]
        ),
    )


def links(path, random):
    others = (
        h5py.SoftLink("/steps/physics"), h5py.SoftLink("/nowhere"), h5py.SoftLink("."), h5py.SoftLink("/"),
        h5py.ExternalLink(str(path), "/steps/physics"), h5py.ExternalLink("/dev/zero", "/x"),
    )  # fmt: skip
    link = others[random.integers(len(others))]
    if random.random() < 0.3:
        with h5py.File(path, "r+") as file:
            file.move("steps", "moved")
            file["steps"] = h5py.SoftLink("/moved")
        return
    _replace(path, _any(random), lambda file, name, values: file.__setitem__(name, link))


def one_array_twice(path, random):
    pairs = (("rewards/cartpole_balance", "rewards/cartpole_swingup"), ("steps/action", "steps/reward"))
    first, second = pairs[random.integers(2)]
    with h5py.File(path, "r+") as file:
        del file[first]
        file[first] = file[second]


def virtual_datasets(path, random):
    def create(file, name, values):
        layout = h5py.VirtualLayout(values.shape, values.dtype)
        layout[...] = h5py.VirtualSource(str(path), str(random.choice(["moved", name])), values.shape, values.dtype)
        file.create_virtual_dataset(name, layout)

    _replace(path, _any(random), create)


def other_dtypes(path, random):
    dtypes = ("f2", "f4", "f8", ">f4", ">f8", "i4", "u8", "c16", "S8", h5py.string_dtype(), h5py.ref_dtype)
    dtypes += (np.dtype([("a", "f4")]), h5py.vlen_dtype("f4"), h5py.enum_dtype({"a": 1}))

    def create(file, name, values):
        fitting = [dtype for dtype in dtypes if dtype != values.dtype]
        file.create_dataset(name, values.shape, fitting[random.integers(len(fitting))])

    _replace(path, _any(random), create)


def other_shapes(path, random):
    def create(file, name, values):
        shapes = [(), (0,), (*values.shape, 1), values.shape[::-1], (values.shape[0] + 1, *values.shape[1:])]
        shapes = [shape for shape in shapes if shape != values.shape]
        file.create_dataset(name, shapes[random.integers(len(shapes))], values.dtype)

    _replace(path, _any(random), create)


def groups_for_arrays(path, random):
    def create(file, name, values):
        if random.random() < 0.5:
            file.create_group(name)
        else:
            file[name] = np.dtype("f4")

    _replace(path, _any(random), create)


def other_offsets(path, random):
    """Another list of episodes with its checksum and, in half of the cases, its fingerprint."""
    with h5py.File(path, "r+") as file:
        offsets = file["episodes/offset"][:]
        index = int(random.integers(len(offsets)))
        offsets[index] = random.choice(
            [-1, 0, 2**62, -(2**62), offsets[index] + 1, offsets[-1] + 10, offsets[index] - 1]
        )
        if (offsets == file["episodes/offset"][:]).all():
            offsets[index] += 1
        file["episodes/offset"][...] = offsets
        file["episodes/offset"].attrs["sha256"] = hashlib.sha256(offsets.tobytes()).hexdigest()
        if random.random() < 0.5:
            digests = file["episodes/recorded_sha256"][:]
            file.attrs["fingerprint"] = content_fingerprint("cartpole", np.diff(offsets) - 1, digests)


def other_numbers(path, random):
    """Other rows, or other small arrays, with the old checksum."""
    with h5py.File(path, "r+") as file:
        dataset = file[_any(random)]
        values = dataset[:]
        flat = values.reshape(-1)
        flat[int(random.integers(len(flat)))] += np.ones((), flat.dtype)
        dataset[...] = values


def _any(random) -> str:
    names = ROWS + REWARDS + SMALL
    return names[random.integers(len(names))]


def rewritten(path, random):
    """A copy by HDF5 in another version of its format: other offsets, the same numbers."""
    other = Path(f"{path}.other")
    with h5py.File(path) as old, h5py.File(other, "w", libver="earliest") as new:
        for name in old:
            old.copy(name, new)
        new.attrs.update(old.attrs)
    other.replace(path)


KINDS = (
    bit_flips, flips_in_the_description, cut_short, longer, run_of_zeros, wrong_attributes, missing_attributes,
    wrong_provenance, other_layouts, compact_layout, bombs, external_files, links, one_array_twice, virtual_datasets,
    other_dtypes, other_shapes, groups_for_arrays, other_offsets, other_numbers, rewritten, bit_flips, bit_flips,
    flips_in_the_description, flips_in_the_description,
)  # fmt: skip
