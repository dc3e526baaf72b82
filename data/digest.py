"""Checksums: of episodes, of a dataset that is made of them, and of settings.

Each episode has digests of its own: they can be computed in any order, by several processes, and again after a stop.
"""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt8

from ringrl.data.schema import Episode

DIGEST_BYTES = hashlib.sha256().digest_size


def json_digest(values: Any) -> str:
    """The sha256 of values as JSON, whatever the order of its names."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def episode_digest(episode: Episode, keys: Iterable[str]) -> bytes:
    """The sha256 over the bytes of an episode's arrays, in the order of `keys`."""
    digest = hashlib.sha256()
    for key in keys:
        digest.update(np.ascontiguousarray(episode[key]).data)
    return digest.digest()


def content_fingerprint(
    domain: str, lengths: Int64[np.ndarray, " episode"], digests: UInt8[np.ndarray, "episode 32"]
) -> str:
    """The fingerprint of recorded content: sha256 over the domain, the lengths and every episode's digest.

    Relabelled rewards are left out: they follow from the content, to a precision that depends on the machine.
    """
    fingerprint = hashlib.sha256(json.dumps([domain, lengths.tolist()]).encode())
    fingerprint.update(np.ascontiguousarray(digests).data)
    return fingerprint.hexdigest()
