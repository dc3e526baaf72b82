"""Merges of stores of one domain, for example of several learners or of several tasks."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ringrl.data.store.format import NAMED_SKIPPED, Provenance, StoredDomain, content_fingerprint
from ringrl.data.store.reader import EpisodeStore
from ringrl.data.store.writer import create_store, finished_store
from ringrl.errors import UserError
from ringrl.pace import Progress, no_progress


def merge_stores(
    sources: Sequence[Path],
    destination: Path,
    *,
    overwrite: bool = False,
    drop_duplicates: bool = False,
    progress: Progress = no_progress,
) -> EpisodeStore:
    """Write all episodes of the stores, in the given order, to one store. The file appears when it is whole.

    An existing store that the same call would write is opened.

    Args:
      sources: the stores to merge.
      destination: the store to write.
      overwrite: replace an existing store.
      drop_duplicates: leave out episodes that an earlier store has, instead of raising an error.
      progress: called with (written episodes, total).

    Raises:
      UserError: fewer than two stores, a damaged one, the same episodes twice, several domains or one that is not
        ExoRL's, rewards that were computed in different ways, or another existing destination without `overwrite`.
    """
    stores = [EpisodeStore(source) for source in sources]
    kept = _kept_episodes(stores, drop_duplicates=drop_duplicates)
    for store in stores:
        store.verify()  # otherwise damaged episodes would get new checksums
    first, total = stores[0], sum(map(len, kept))
    provenance = Provenance(
        source=" + ".join(store.provenance.source for store in stores),
        source_bytes=sum(store.provenance.source_bytes for store in stores),
        relabelling=first.provenance.relabelling,
        subset="; ".join(dict.fromkeys(map(_subset, stores, kept))),
        num_skipped=sum(store.provenance.num_skipped for store in stores),
        skipped=tuple(reason for store in stores for reason in store.provenance.skipped)[:NAMED_SKIPPED],
    )
    lengths = np.concatenate([store.lengths[own] for store, own in zip(stores, kept, strict=True)])
    digests = np.concatenate([store.recorded_digests[own] for store, own in zip(stores, kept, strict=True)])
    merged = None if overwrite else finished_store(destination, provenance)
    if merged and merged.fingerprint == content_fingerprint(first.domain, lengths, digests):
        return merged
    with create_store(
        destination, first.domain, first.tasks, lengths, source=provenance, overwrite=overwrite
    ) as writer:
        if len({store.recorded_task for store in stores}) == 1:
            writer.recorded_task = first.recorded_task
        for store, own in zip(stores, kept, strict=True):
            for index in own:
                writer.append(store.episode(index))
                progress(len(writer.records), total)
    return EpisodeStore(destination)


def _subset(store: EpisodeStore, kept: Sequence[int]) -> str:
    dropped = store.num_episodes - len(kept)
    return store.provenance.subset + (f" less {dropped:,} of an earlier store" if dropped else "")


def _kept_episodes(stores: Sequence[EpisodeStore], *, drop_duplicates: bool) -> list[list[int]]:
    """Check that the stores match. Return the numbers of the episodes to write, for each store."""
    if len(stores) < 2:
        raise UserError("nothing to merge: name at least two stores")
    first = stores[0]
    if isinstance(first.facts, StoredDomain):
        raise UserError(f"{first.path}: {first.domain} is not an ExoRL domain; only ExoRL stores can be merged")
    seen, kept = dict[bytes, tuple[Path, int]](), list[list[int]]()
    for store in stores:
        if store.domain != first.domain:
            raise UserError(
                f"{store.path}: has domain {store.domain}, but {first.path} has {first.domain}; merge stores of one "
                "domain"
            )
        if store.provenance.relabelling != first.provenance.relabelling:
            raise UserError(
                f"{store.path}: has {store.provenance.relabelling} rewards, but {first.path} has "
                f"{first.provenance.relabelling} rewards; import one of them again with --relabel"
            )
        digests = [digest.tobytes() for digest in store.recorded_digests]
        own = {digest: (store.path, index) for index, digest in enumerate(digests)}
        kept.append([index for index, digest in enumerate(digests) if digest not in seen])
        twice = [digest for digest in own if digest in seen]
        if twice and not drop_duplicates:
            where, index = seen[twice[0]]
            raise UserError(
                f"{store.path}: {len(twice)} of its episodes are in another store, too (episode {own[twice[0]][1]} is "
                f"episode {index} of {where}); merge stores without common episodes, or leave "
                "them out (--drop-duplicates)"
            )
        seen = own | seen
    return kept
