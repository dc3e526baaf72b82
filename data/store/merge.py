"""Merges of stores of one domain, for example of several learners or of several tasks."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ringrl.data.store.format import NAMED_SKIPPED, ForeignDomain, Provenance
from ringrl.data.store.reader import EpisodeStore
from ringrl.data.store.writer import create_store
from ringrl.errors import UserError


def merge_stores(
    sources: Sequence[Path],
    destination: Path,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> EpisodeStore:
    """Write all episodes of the stores, in the given order, to one store. The file appears when it is whole.

    `progress` is called with (written episodes, total).

    Raises:
      UserError: fewer than two stores, a damaged one, the same episodes twice, several domains or one that is not
        ExoRL's, rewards that were computed in different ways, or an existing destination without `overwrite`.
    """
    stores = [EpisodeStore(source) for source in sources]
    _check_alike(stores)
    for store in stores:
        store.verify()  # otherwise damaged episodes would get new checksums
    first, total = stores[0], sum(store.num_episodes for store in stores)
    provenance = Provenance(
        source=" + ".join(store.provenance.source for store in stores),
        source_bytes=sum(store.provenance.source_bytes for store in stores),
        relabelling=first.provenance.relabelling,
        subset="; ".join(store.provenance.subset for store in stores),
        num_skipped=sum(store.provenance.num_skipped for store in stores),
        skipped=tuple(reason for store in stores for reason in store.provenance.skipped)[:NAMED_SKIPPED],
    )
    lengths = np.concatenate([store.lengths for store in stores])
    with create_store(
        destination, first.domain, first.tasks, lengths, source=provenance, overwrite=overwrite
    ) as writer:
        if len({store.recorded_task for store in stores}) == 1:
            writer.recorded_task = first.recorded_task
        for store in stores:
            for index in range(store.num_episodes):
                writer.append(store.episode(index))
                if progress is not None:
                    progress(len(writer.records), total)
    return EpisodeStore(destination)


def _check_alike(stores: Sequence[EpisodeStore]) -> None:
    if len(stores) < 2:
        raise UserError("nothing to merge: name at least two stores")
    first = stores[0]
    if isinstance(first.facts, ForeignDomain):
        raise UserError(f"{first.path}: {first.domain} is not an ExoRL domain; only ExoRL stores can be merged")
    seen = dict[bytes, tuple[Path, int]]()
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
        own = {digest.tobytes(): (store.path, index) for index, digest in enumerate(store.recorded_digests)}
        if twice := [digest for digest in own if digest in seen]:
            where, index = seen[twice[0]]
            raise UserError(
                f"{store.path}: {len(twice)} of its episodes are in another store, too (episode {own[twice[0]][1]} is "
                f"episode {index} of {where}); merge stores without common episodes"
            )
        seen |= own
