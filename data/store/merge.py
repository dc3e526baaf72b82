"""Merges of stores of one domain, for example of several learners or of several tasks."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ringrl.data.store.format import Provenance, StoredDomain, content_fingerprint
from ringrl.data.store.reader import EpisodeStore
from ringrl.data.store.writer import create_store, finished_store
from ringrl.errors import UserError
from ringrl.pace import Progress, no_progress


def merge_stores(
    sources: Sequence[Path], destination: Path, *, overwrite: bool = False, progress: Progress = no_progress
) -> EpisodeStore:
    """Write all episodes of the stores, in the given order, to one store. The file appears when it is whole.

    An existing store that the same call would write is opened.

    Args:
      sources: the stores to merge.
      destination: the store to write.
      overwrite: replace an existing store.
      progress: called with (written episodes, total).

    Raises:
      UserError: fewer than two stores, a damaged one, the same episodes twice, different tasks, a domain that is not
        ExoRL's, or another existing destination without `overwrite`.
    """
    stores = [EpisodeStore(source) for source in sources]
    _check(stores)
    for store in stores:
        store.verify()  # otherwise damaged episodes would get new checksums
    first = stores[0]
    provenance = Provenance(
        source=" + ".join(store.provenance.source for store in stores),
        source_bytes=sum(store.provenance.source_bytes for store in stores),
        subset="; ".join(dict.fromkeys(store.provenance.subset for store in stores)),
    )
    lengths = np.concatenate([store.lengths for store in stores])
    digests = np.concatenate([store.recorded_digests for store in stores])
    merged = None if overwrite else finished_store(destination, provenance)
    if merged and merged.fingerprint == content_fingerprint(first.domain, lengths, digests):
        return merged
    with create_store(
        destination, first.domain, first.tasks, lengths, source=provenance, overwrite=overwrite
    ) as writer:
        if len({store.recorded_task for store in stores}) == 1:
            writer.recorded_task = first.recorded_task
        for store in stores:
            for index in range(store.num_episodes):
                writer.append(store.episode(index))
                progress(len(writer.records), len(lengths))
    return EpisodeStore(destination)


def _check(stores: Sequence[EpisodeStore]) -> None:
    """Raise UserError unless the stores can be merged."""
    if len(stores) < 2:
        raise UserError("nothing to merge: name at least two stores")
    first = stores[0]
    if isinstance(first.facts, StoredDomain):
        raise UserError(f"{first.path}: {first.domain} is not an ExoRL domain; only ExoRL stores can be merged")
    seen = dict[bytes, tuple[Path, int]]()
    for store in stores:
        if store.tasks != first.tasks:
            tasks = " and ".join(", ".join(one.tasks) for one in (store, first))
            raise UserError(f"{store.path}: has other tasks than {first.path} ({tasks}); merge stores with equal tasks")
        own = {digest.tobytes(): (store.path, index) for index, digest in enumerate(store.recorded_digests)}
        if twice := [digest for digest in own if digest in seen]:
            where, index = seen[twice[0]]
            raise UserError(
                f"{store.path}: {len(twice)} of its episodes are in another store, too (episode {own[twice[0]][1]} is "
                f"episode {index} of {where}); merge stores without common episodes"
            )
        seen = own | seen
