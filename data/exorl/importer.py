"""Importing an ExoRL archive into an episode store in one pass: read, validate, relabel for every task, write.

Episodes are independent and each has its place in the file, so any number of processes can import side by side. A
journal next to the unfinished file lists the finished episodes: the same command resumes after any interruption.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float64, Int64

from ringrl.cores import available_cores
from ringrl.data.exorl.archive import Archive, Member
from ringrl.data.exorl.worker import Damaged, EpisodeTask, Imported, ImportJob, ImportJournal, episode_importers
from ringrl.data.store.format import FORMAT_VERSION, Layout
from ringrl.data.store.provenance import NAMED_SKIPPED, Provenance, Relabelling
from ringrl.data.store.reader import EpisodeStore
from ringrl.data.store.writer import (
    UnfinishedStore,
    create_file,
    finish,
    hidden_name,
    refuse_taken,
    space_needed,
)
from ringrl.envs import Domain, domain_named, make
from ringrl.errors import UserError
from ringrl.files import explain_write_errors, lock, reserve

OnDamaged = Literal["stop", "skip"]

EPISODES_PER_WORKER = 50  # fewer are not worth the start of a process


@dataclass(frozen=True)
class Subset:
    """A number of episodes of an archive, chosen by a rule. The order of the archive is kept.

    Attributes:
        rule: the first ones, the last ones, a random draw without replacement, or equal distances.
        max_episodes: limit on their number; None for no limit.
        max_transitions: limit on their steps together; None for no limit.
        seed: seed of the random draw.
    """

    rule: Literal["first", "last", "random", "spread"] = "first"
    max_episodes: int | None = None
    max_transitions: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """UserError for a limit below 1 or a negative seed."""
        for flag, number in (("--max-episodes", self.max_episodes), ("--max-transitions", self.max_transitions)):
            if number is not None and number < 1:
                raise UserError(f"{flag} is {number}, at least 1 is needed")
        if self.seed < 0:
            raise UserError(f"--seed is {self.seed}, it must not be negative")

    def choose(self, episodes: int, length: int) -> Int64[np.ndarray, " chosen"]:
        """Return the chosen indices among `episodes` episodes of `length` steps, ascending. UserError if none fits."""
        number = min(episodes, self.max_episodes or episodes)
        if self.max_transitions is not None:
            number = min(number, self.max_transitions // length)
        if number == 0:
            raise UserError(f"--max-transitions is {self.max_transitions}, less than one episode of {length} steps")
        if self.rule == "first":
            return np.arange(number)
        if self.rule == "last":
            return np.arange(episodes - number, episodes)
        if self.rule == "random":
            return np.sort(np.random.default_rng(self.seed).choice(episodes, number, replace=False))
        return np.round(np.linspace(0, episodes - 1, number)).astype(np.int64)

    def describe(self, chosen: int, episodes: int) -> str:
        """Return the rule and its result: "10 of 240 episodes, at random (seed 3)"."""
        if chosen == episodes:
            return f"all {episodes:,} episodes"
        how = {
            "first": "the first ones",
            "last": "the last ones",
            "random": f"at random (seed {self.seed})",
            "spread": "at equal distances",
        }
        return f"{chosen:,} of {episodes:,} episodes, {how[self.rule]}"


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
    """Import a zip archive or folder in ExoRL's layout into a new episode store and open it.

    An interrupted import (killed, Ctrl-C, disk full) leaves a hidden file and its journal next to `destination`. The
    same call resumes it, and the store becomes the same, byte for byte. With `overwrite`, the old store stays until the
    new one is whole.

    Args:
        source: zip file or folder with buffer/episode_{number}_{steps}.npz.
        destination: the store to write.
        domain: name of the domain, "walker".
        overwrite: replace an existing store.
        progress: is called with (episodes done, episodes in all).
        workers: number of processes; the result is the same for any number. None takes one per available core, or fewer
            for few episodes. With more than one, a script must call this under `if __name__ == "__main__":`, because
            the processes import it.
        relabelling: see `ringrl.data.store.provenance.Relabelling`.
        subset: the episodes to import.
        on_damaged: "stop" ends the import at the first file that is not a whole episode of `domain` and leaves
            nothing; "skip" leaves such files out, and the store records their number and a few reasons.

    Raises:
        UserError: bad input, an existing destination, a full disk, a worker process that died.
    """
    if workers is not None and workers < 1:
        raise UserError(f"--workers is {workers}, at least 1 is needed")
    destination, found = Path(destination), domain_named(domain)
    plan = _plan(Path(source), found, relabelling, subset, on_damaged)
    refuse_taken(destination, overwrite=overwrite)
    with (
        explain_write_errors(destination),
        lock(destination, "is writing it"),
        _resumable(destination, plan) as journal,
    ):
        outcomes = _import_episodes(plan, destination, journal, workers, on_damaged, progress)
        _finish(plan, destination, journal, outcomes)
    return EpisodeStore(destination)


@dataclass(frozen=True)
class _ImportPlan:
    """Everything that determines the content of the store.

    `misfits` are episodes of another length than the domain's, left out before the start. An interrupted import can be
    resumed by an import with the same `identity`.
    """

    source: Path
    members: tuple[Member, ...]
    misfits: tuple[Damaged, ...]
    layout: Layout
    provenance: Provenance
    relabelling: Relabelling
    identity: str


def _plan(source: Path, domain: Domain, relabelling: Relabelling, subset: Subset, on_damaged: OnDamaged) -> _ImportPlan:
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
    return _ImportPlan(
        source=source,
        members=tuple(members),
        misfits=tuple(misfits),
        layout=Layout(domain, domain.tasks, [member.length for member in members]),
        provenance=provenance,
        relabelling=relabelling,
        identity=hashlib.sha256(json.dumps(facts).encode()).hexdigest(),
    )


def _sort_out(archive: Archive, members: Sequence[Member], on_damaged: OnDamaged) -> tuple[list[Member], list[Damaged]]:
    """Split the episodes into those whose names give the domain's length, and the reasons against the others."""
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
def _resumable(destination: Path, plan: _ImportPlan) -> Iterator[ImportJournal]:
    """Prepare the hidden file and give its journal: those of an interrupted import of the same plan, else new ones.

    If the block fails, both stay as soon as the journal has an episode.
    """
    partial, path = hidden_name(destination), _journal_name(destination)
    journal = ImportJournal.resume(path, plan.identity) if _is_unfinished(partial, plan.layout) else None
    if journal is None:
        path.unlink(missing_ok=True)
        create_file(partial, plan.layout)
        journal = ImportJournal.begin(path, {"identity": plan.identity, "created": plan.provenance.created})
    try:
        _reserve(partial, destination)
        with explain_write_errors(destination):
            yield journal
    except BaseException as error:
        if not journal.episodes:
            _discard(destination)
        elif isinstance(error, UserError) and path.exists():
            raise UserError(f"{error}; finished episodes are kept: run the same command again to resume") from error
        raise
    finally:
        journal.close()


def _is_unfinished(partial: Path, layout: Layout) -> bool:
    try:
        UnfinishedStore(partial, layout).close()
    except Exception:  # HDF5 raises nearly anything when the bytes are damaged
        return False
    return True


def _reserve(partial: Path, destination: Path) -> None:
    with explain_write_errors(destination, space_needed(partial)):
        reserve(partial, space_needed(partial))


def _import_episodes(
    plan: _ImportPlan,
    destination: Path,
    journal: ImportJournal,
    workers: int | None,
    on_damaged: OnDamaged,
    progress: Callable[[int, int], None] | None,
) -> list[Imported | Damaged]:
    """Write every episode to the hidden file and the journal."""
    total, outcomes = len(plan.members), list[Imported | Damaged]()
    job = ImportJob(plan.source, destination, plan.layout.domain.name, plan.layout.lengths, plan.relabelling)
    tasks = [EpisodeTask(index, member, journal.episodes.get(index)) for index, member in enumerate(plan.members)]
    number = min(workers, total) if workers else min(available_cores(), -(-total // EPISODES_PER_WORKER))
    with episode_importers(job, tasks, number) as results:
        for index, outcome in enumerate(results):
            if isinstance(outcome, Damaged) and on_damaged == "stop":
                _discard(destination)
                raise UserError(f"{outcome.reason} (or leave such episodes out: --on-damaged skip)")
            if isinstance(outcome, Imported) and outcome != journal.episodes.get(index):
                journal.add(index, outcome)
            outcomes.append(outcome)
            if progress is not None:
                progress(len(outcomes), total)
    return outcomes


def _finish(
    plan: _ImportPlan, destination: Path, journal: ImportJournal, outcomes: Sequence[Imported | Damaged]
) -> None:
    """Leave out the damaged episodes, and make the hidden file a store."""
    kept = [index for index, outcome in enumerate(outcomes) if isinstance(outcome, Imported)]
    imported = [outcome for outcome in outcomes if isinstance(outcome, Imported)]
    damaged = [*(outcome for outcome in outcomes if isinstance(outcome, Damaged)), *plan.misfits]
    if not kept:
        _discard(destination)
        raise UserError(f"{damaged[0].reason} (all {len(damaged)} episodes of this import are damaged)")
    partial, layout = hidden_name(destination), plan.layout
    if len(kept) < len(outcomes):
        partial, layout = _without_gaps(partial, destination, layout, kept)
    with UnfinishedStore(partial, layout) as store:
        starts = store.first_physics()
    task = recorded_task(
        layout.domain,
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
    finish(partial, destination, layout, [episode.record for episode in imported], task, provenance)
    _discard(destination)


def _without_gaps(partial: Path, destination: Path, layout: Layout, kept: Sequence[int]) -> tuple[Path, Layout]:
    """Copy the kept episodes to a second hidden file. The first one stays until the store is whole."""
    shorter = Layout(layout.domain, layout.tasks, layout.lengths[kept])
    target = _compact_name(destination)
    create_file(target, shorter)
    _reserve(target, destination)
    with UnfinishedStore(partial, layout) as old, UnfinishedStore(target, shorter) as new:
        for place, index in enumerate(kept):
            new.write(place, old.read(index))
    return target, shorter


def _journal_name(destination: Path) -> Path:
    return destination.with_name(f".{destination.name}.partial.journal")


def _compact_name(destination: Path) -> Path:
    return destination.with_name(f".{destination.name}.partial.compact")


def _discard(destination: Path) -> None:
    """Delete the hidden files of an import."""
    for path in (_journal_name(destination), hidden_name(destination), _compact_name(destination)):
        path.unlink(missing_ok=True)


def recorded_task(
    domain: Domain,
    matches: Sequence[tuple[str, ...]],
    *,
    has_reward: bool,
    starts: Float64[np.ndarray, "episodes physics"],
) -> str | None:
    """Return the one task that fits every episode; None if none fits, all are recorded, or the data cannot tell.

    Args:
        domain: the domain of the archive.
        matches: for every episode, the tasks whose rewards equal the recorded ones.
        has_reward: whether any recorded reward is not zero.
        starts: the first physics state of every episode.
    """
    candidates = [] if domain.records_all_tasks or not has_reward else list(domain.tasks)
    candidates = [task for task in candidates if all(task in match for match in matches)]
    if len(candidates) < 2:
        return candidates[0] if candidates else None
    # Cartpole's balance and swingup share their reward and differ only in the start. None is clearly nearer: no task.
    distances = {task: _distance_to_start(task, starts) for task in candidates}
    nearest, second = sorted(candidates, key=distances.__getitem__)[:2]
    return nearest if distances[nearest] < 0.5 * distances[second] else None


def _distance_to_start(task: str, starts: Float64[np.ndarray, "episodes physics"]) -> float:
    env = make(task, seed=0)
    own = np.stack([env.reset()[1]["physics"] for _ in range(8)])
    return float(np.linalg.norm(own.mean(axis=0) - starts.mean(axis=0)))
