"""The arrays of an HDF5 file as views of its memory map. The file may be a stranger's: HDF5 itself reads no array.

Nothing is unpacked, filtered, assembled or fetched from other files, whatever a dataset asks for; only a plain run of
bytes inside this file is an array here.
"""

import hashlib
from itertools import pairwise
from pathlib import Path

import h5py
import numpy as np

from ringrl.errors import UserError

LONGEST_TEXT = 2**16


class MappedArrays:
    """Gives arrays of an open HDF5 file by name, as read-only views that outlive the file object.

    Raises UserError for datasets that are missing, linked, chunked, compressed, virtual or external, and for arrays
    that share bytes; other errors of h5py and numpy for damaged files.
    """

    def __init__(self, file: h5py.File, path: Path) -> None:
        self._file = file
        self._mapped = np.memmap(path, dtype=np.uint8, mode="r")
        self._taken: list[tuple[int, int, str]] = []

    def view(self, name: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """An array as it lies in the file; nothing of it is read. UserError for another shape or dtype."""
        dataset, expected = self._dataset(name), np.dtype(dtype)
        if dataset.dtype != expected or dataset.shape != shape:
            raise UserError(
                f"{name} is {dataset.dtype} {dataset.shape}, expected {expected} {shape}: the store is damaged or made "
                "for another version of the domain, import the archive again"
            )
        return self._bytes(dataset).view(expected).reshape(shape)

    def small(self, name: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """A small array, compared with its checksum at once; the large ones have those of their episodes."""
        array = self.view(name, shape, dtype)
        if hashlib.sha256(array.data).hexdigest() != read_text(self._file[name], "sha256"):
            raise UserError(f"{name} is damaged (its sha256 differs): import the archive again")
        return array

    def length(self, name: str) -> int:
        """The number of rows of an array."""
        return int(self._dataset(name).shape[0])

    def refuse_overlap(self) -> None:
        """UserError if two of the arrays given so far share bytes: one of them would hold the other's numbers."""
        for (_, end, first), (start, _, second) in pairwise(sorted(self._taken)):
            if start < end:
                raise UserError(f"{first} and {second} lie in the same place: import the archive again")

    def _dataset(self, name: str) -> h5py.Dataset:
        node: h5py.Group = self._file
        for step in name.split("/"):
            link = node.get(step, getlink=True)
            if link is None:
                raise UserError(f"lacks {name}, it is damaged: import the archive again")
            if not isinstance(link, h5py.HardLink):
                raise UserError(f"{name} is a link to elsewhere: import the archive again")
            node = node[step]
        return node

    def _bytes(self, dataset: h5py.Dataset) -> np.ndarray:
        settings = dataset.id.get_create_plist()
        offset, size = dataset.id.get_offset(), dataset.nbytes
        is_plain = settings.get_layout() == h5py.h5d.CONTIGUOUS and settings.get_external_count() == 0
        if not is_plain or offset is None:
            raise UserError(f"{dataset.name} is chunked, compressed or kept elsewhere: import the archive again")
        if offset + size > len(self._mapped):
            raise UserError(
                f"{dataset.name} goes beyond the end of the file, it is cut short: import the archive again"
            )
        self._taken.append((offset, offset + size, str(dataset.name)))
        # A plain array: slices of a memmap cost more.
        return np.ndarray(size, np.uint8, buffer=self._mapped, offset=offset)


def read_text(node: h5py.Group | h5py.Dataset, name: str) -> str:
    """A text attribute. KeyError if there is none, ValueError if it is something else or very long."""
    value = node.attrs[name]
    if isinstance(value, bytes):
        value = value.decode()
    if not isinstance(value, str) or len(value) > LONGEST_TEXT:
        raise ValueError(f"{name} is no text")
    return value
