"""Arrays of HDF5 files from other sources, which may be hostile: links and arrays in other files are not followed."""

import h5py
import numpy as np

from ringrl.errors import UserError

MOST_COMPRESSED, SMALL = 100, 2**20  # a compressed array may be this many times, or bytes, larger than it looks


def plain_dataset(file: h5py.File, name: str) -> h5py.Dataset:
    """Return an array that is stored in the file itself. UserError, which does not name the file, for any other."""
    node = file
    for key in name.split("/"):
        link = node.get(key, getlink=True) if isinstance(node, h5py.Group) else None
        if link is None:
            raise UserError(f"lacks {name}")
        if not isinstance(link, h5py.HardLink):
            raise UserError(f"has a link in place of {name}")
        node = node[key]
    if not isinstance(node, h5py.Dataset):
        raise UserError(f"has no array {name}")
    settings = node.id.get_create_plist()
    if settings.get_layout() == h5py.h5d.VIRTUAL or settings.get_external_count():
        raise UserError(f"stores {name} in other files")
    return node


def read_plain(file: h5py.File, name: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """Read an array of numbers. UserError as `plain_dataset`, and for another shape or unlikely compression."""
    dataset = plain_dataset(file, name)
    if dataset.dtype.kind not in "fiub":
        raise UserError(f"has {name} that are not numbers")
    if shape not in (None, dataset.shape):
        raise UserError(f"has {name} of shape {dataset.shape}, expected {shape}")
    if dataset.nbytes > SMALL + MOST_COMPRESSED * dataset.id.get_storage_size():
        raise UserError(f"claims {dataset.nbytes:,} bytes of {name}, far more than it stores")
    return np.asarray(dataset[()])
