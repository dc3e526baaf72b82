"""From an ExoRL archive to an episode store in one pass: read, validate, relabel for every task, write.

Episodes are independent of each other and each has its place in the file, so any number of processes can work side by
side. A journal beside the growing file says what is done: the same command goes on after a stop of any kind.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from ringrl.cores import available_cores
from ringrl.data import part
from ringrl.data.exorl import Archive, Member
from ringrl.data.import_worker import Damaged, EpisodeTask, ImportJob, episode_importers
from ringrl.data.journal import Imported, Journal
from ringrl.data.layout import Layout
from ringrl.data.provenance import NAMED_SKIPPED, Provenance, Relabelling
from ringrl.data.recorded_task import recorded_task
from ringrl.data.store import FORMAT_VERSION, EpisodeStore
from ringrl.data.subset import Subset
from ringrl.data.writer import finish_store, move_episodes, read_starts
from ringrl.envs import Domain, domain_named
from ringrl.errors import UserError

OnDamaged = Literal["stop", "skip"]

EPISODES_PER_WORKER = 50  # fewer do not pay for the start of a process

ALL = Subset()


def import_archive(
    source: str | Path,
    destination: str | Path,
    domain: str,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    workers: int | None = None,
    relabelling: Relabelling = "control_aware",
    subset: Subset = ALL,
    on_damaged: OnDamaged = "stop",
) -> EpisodeStore:
    """Imports a zip archive or folder in ExoRL's layout into a new episode store and opens it.

    An import that is interrupted (killed, Ctrl-C, disk full) leaves a hidden file and its journal beside
    `destination`; the same call goes on from there, and the store becomes the same, byte for byte. A store that
    `overwrite` is to replace stays until the new one is whole.

    Args:
        source: zip file or folder with buffer/episode_{number}_{steps}.npz.
        destination: the store to write.
        domain: name of the domain, "walker".
        overwrite: replace an existing store.
        progress: is called with (episodes done, episodes in all).
        workers: processes that work side by side, with the same result for any number; None takes one per available
            core, or fewer if the episodes are few. With more than one, a script must call this under
            `if __name__ == "__main__":`, because the processes import it.
        relabelling: see `ringrl.data.provenance.Relabelling`.
        subset: which episodes to take.
        on_damaged: "stop" ends the import at the first file that is not a whole episode of `domain` and leaves
            nothing; "skip" leaves such files out, and the store says how many and names a few.

    Raises:
        UserError: bad input, an existing destination, a disk that is full, a worker process that died.
    """
    if workers is not None and workers < 1:
        raise UserError(f"--workers is {workers}, at least 1 is needed")
    destination, found = Path(destination), domain_named(domain)
    plan = _plan(Path(source), found, relabelling, subset, on_damaged)
    part.refuse_taken(destination, overwrite=overwrite)
    with _unfinished(destination, plan) as (descriptor, journal):
        outcomes = _import_episodes(plan, destination, journal, workers, on_damaged, progress)
        _finish(plan, destination, descriptor, journal, outcomes)
    return EpisodeStore(destination)


@dataclass(frozen=True)
class _Plan:
    """All that decides the content of the store.

    `misfits` are episodes of another length than the domain's, left out before the start; `identity` tells this import
    from others: one that stopped can be gone on with if it has the same.
    """

    source: Path
    domain: Domain
    members: tuple[Member, ...]
    misfits: tuple[Damaged, ...]
    layout: Layout
    provenance: Provenance
    relabelling: Relabelling
    identity: str


def _plan(source: Path, domain: Domain, relabelling: Relabelling, subset: Subset, on_damaged: OnDamaged) -> _Plan:
    with Archive(source, domain) as archive:
        chosen = subset.choose(len(archive), domain.episode_length)
        members, misfits = _sort_out(archive, [archive.members[index] for index in chosen], on_damaged)
        provenance = Provenance(
            source="/".join(source.resolve().parts[-2:]),
            source_bytes=archive.size(),
            source_sha256=archive.listing_sha256(),
            relabelling=relabelling,
            subset=subset.describe(len(chosen), len(archive)),
        )
        facts = [FORMAT_VERSION, domain.name, asdict(replace(provenance, created="")), members, archive.stamps()]
    return _Plan(
        source=source,
        domain=domain,
        members=tuple(members),
        misfits=tuple(misfits),
        layout=Layout(domain.name, domain.tasks, [member.length for member in members]),
        provenance=provenance,
        relabelling=relabelling,
        identity=hashlib.sha256(json.dumps(facts).encode()).hexdigest(),
    )


def _sort_out(archive: Archive, members: Sequence[Member], on_damaged: OnDamaged) -> tuple[list[Member], list[Damaged]]:
    """The episodes that have the length of the domain's by their names, and what is wrong with the others."""
    fitting, misfits = [], []
    for member in members:
        try:
            archive.check_length(member)
            fitting.append(member)
        except UserError as error:
            if on_damaged == "stop":
                raise
            misfits.append(Damaged(str(error)))
    if not fitting:
        raise UserError(misfits[0].reason)
    return fitting, misfits


@contextmanager
def _unfinished(destination: Path, plan: _Plan) -> Iterator[tuple[int, Journal]]:
    """The growing file and its journal: those of the same import if it stopped, else new ones.

    If the block fails, both stay as soon as an episode is in them.
    """
    with part.cannot_write(destination):
        descriptor = part.claim(destination)
        journal = Journal.resume(part.journal_of(destination), plan.identity)
        if journal is None:
            descriptor = part.claim_new(destination, descriptor)
            head = {"identity": plan.identity, "created": plan.provenance.created}
            journal = Journal.begin(part.journal_of(destination), head)
    try:
        with part.cannot_write(destination, plan.layout.size):
            part.write_all(descriptor, memoryview(bytes(512)), 0)  # no HDF5 file, if it was one but for its name
            part.reserve(descriptor, plan.layout.size)
        yield descriptor, journal
    except BaseException as error:
        if not journal.episodes:
            part.discard(destination)
        elif isinstance(error, UserError) and part.journal_of(destination).exists():
            raise UserError(f"{error}; what is done is kept: run the same command again to go on") from error
        raise
    finally:
        os.close(descriptor)


def _import_episodes(
    plan: _Plan,
    destination: Path,
    journal: Journal,
    workers: int | None,
    on_damaged: OnDamaged,
    progress: Callable[[int, int], None] | None,
) -> list[Imported | Damaged]:
    """Brings every episode into the growing file and the journal."""
    total, outcomes = len(plan.members), list[Imported | Damaged]()
    job = ImportJob(plan.source, destination, plan.layout, plan.relabelling)
    tasks = [EpisodeTask(index, member, journal.episodes.get(index)) for index, member in enumerate(plan.members)]
    number = min(workers, total) if workers else min(available_cores(), -(-total // EPISODES_PER_WORKER))
    with episode_importers(job, tasks, number) as results:
        for index, outcome in enumerate(results):
            if isinstance(outcome, Damaged) and on_damaged == "stop":
                part.discard(destination)
                raise UserError(f"{outcome.reason} (or leave such episodes out: --on-damaged skip)")
            if isinstance(outcome, Imported) and outcome != journal.episodes.get(index):
                with part.cannot_write(destination):
                    journal.add(index, outcome)
            outcomes.append(outcome)
            if progress is not None:
                progress(len(outcomes), total)
    return outcomes


def _finish(
    plan: _Plan, destination: Path, descriptor: int, journal: Journal, outcomes: Sequence[Imported | Damaged]
) -> None:
    """Closes the gaps that damaged episodes left, and makes the growing file a store."""
    kept = [index for index, outcome in enumerate(outcomes) if isinstance(outcome, Imported)]
    imported = [outcome for outcome in outcomes if isinstance(outcome, Imported)]
    damaged = [*(outcome for outcome in outcomes if isinstance(outcome, Damaged)), *plan.misfits]
    if not kept:
        part.discard(destination)
        raise UserError(f"{damaged[0].reason} (as are all {len(damaged)} episodes that were to be imported)")
    layout = plan.layout
    with part.cannot_write(destination):
        if len(kept) < len(outcomes):
            layout = Layout(plan.domain.name, plan.domain.tasks, plan.layout.lengths[kept])
            move_episodes(descriptor, plan.layout, layout, kept)
        starts = read_starts(descriptor, layout)
    task = recorded_task(
        plan.domain,
        [episode.matches for episode in imported],
        has_reward=any(episode.has_reward for episode in imported),
        starts=starts,
    )
    provenance = replace(
        plan.provenance,
        created=journal.head["created"],
        num_skipped=len(damaged),
        skipped=tuple(outcome.reason.removeprefix(f"{plan.source}: ") for outcome in damaged[:NAMED_SKIPPED]),
    )
    finish_store(destination, descriptor, layout, [episode.record for episode in imported], task, provenance)
