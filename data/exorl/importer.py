"""Import of an ExoRL archive into an episode store in one pass: read, validate, relabel for every task, write.

Episodes are independent and their offsets in the file are fixed, so several processes can import in parallel. The
unfinished file has the digest of each finished episode. The same command resumes an interrupted import.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Int64

from ringrl.cores import available_cores
from ringrl.data.exorl.archive import Archive
from ringrl.data.exorl.worker import Imported, ImportPlan, episode_importers
from ringrl.data.store.format import FORMAT_VERSION, NAMED_SKIPPED, Layout, Provenance, Relabelling
from ringrl.data.store.reader import EpisodeStore
from ringrl.data.store.writer import (
    UnfinishedStore,
    create_file,
    finish,
    finished_store,
    hidden_files,
    hidden_name,
    refuse_taken,
    reserve_space,
)
from ringrl.envs import Domain, domain_named, make
from ringrl.errors import UserError
from ringrl.files import explain_write_errors, linked, lock, raise_unreadable
from ringrl.pace import Progress, no_progress

OnDamaged = Literal["stop", "skip"]

EPISODES_PER_WORKER = 50  # fewer are not worth the start of a process


@dataclass(frozen=True)
class Subset:
    """A rule that selects episodes of an archive. UserError for a limit below 1 or a negative seed."""

    rule: Literal["first", "last", "random", "spread"] = "first"  # random: without replacement; spread: equal distances
    max_episodes: int | None = None  # None: no limit
    max_transitions: int | None = None  # limit on the sum of steps
    seed: int = 0  # of the random draw

    def __post_init__(self) -> None:
        for flag, number in (("--max-episodes", self.max_episodes), ("--max-transitions", self.max_transitions)):
            if number is not None and number < 1:
                raise UserError(f"{flag}: {number} is too small; give at least 1")
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
        how = {"first": "the first ones", "last": "the last ones", "spread": "at equal distances"}
        return f"{chosen:,} of {episodes:,} episodes, {how.get(self.rule, f'at random (seed {self.seed})')}"


ALL = Subset()


def import_archive(
    source: str | Path,
    destination: str | Path,
    domain: str,
    *,
    overwrite: bool = False,
    progress: Progress = no_progress,
    workers: int | None = None,
    relabelling: Relabelling = "control_aware",
    subset: Subset = ALL,
    on_damaged: OnDamaged = "stop",
    tasks: Sequence[str] | None = None,
) -> EpisodeStore:
    """Import a zip archive or folder in ExoRL's layout into a new episode store and open it.

    An interrupted import (killed, Ctrl-C, disk full) leaves a hidden file next to `destination`. The same call resumes
    it and writes the same bytes. With `overwrite`, the old store stays until the new one is whole. Without, an existing
    store is opened if the same call would write it.

    Args:
        source: zip file or folder with buffer/episode_{number}_{steps}.npz.
        destination: the store to write. A link stays, and the file that it leads to is written.
        domain: name of the domain, "walker".
        overwrite: replace an existing store.
        progress: called with (finished episodes, total).
        workers: number of processes; the result does not depend on it. None: one per available core. With more than
            one, a script must call this under `if __name__ == "__main__":`, because the processes import the script.
        relabelling: see `ringrl.data.store.format.Relabelling`.
        subset: the episodes to import.
        on_damaged: "stop" at the first file that is not a whole episode of `domain`, or "skip" such files and record
            their number and the first reasons.
        tasks: full names of the tasks to compute rewards for. None: all tasks of the domain.

    Raises:
        UserError: bad input, another existing destination, a full disk, a worker process that died.
    """
    if workers is not None and workers < 1:
        raise UserError(f"--workers: {workers} is too small; give at least 1")
    destination = linked(Path(destination))
    facts = domain_named(domain)
    tasks = tuple(dict.fromkeys(tasks or facts.tasks))
    if unknown := [task for task in tasks if not facts.has_task(task)]:
        raise UserError(f"--tasks: {unknown[0]} is not a task of {domain}; choose from {', '.join(facts.tasks)}")
    plan = _plan(Path(source), destination, facts, tasks, relabelling, subset, on_damaged)
    if not overwrite and (store := _finished_before(plan, on_damaged)):
        return store
    refuse_taken(destination, overwrite=overwrite)
    with explain_write_errors(destination), lock(destination, "is writing it"), _resumable(plan):
        _finish(plan, _import_episodes(plan, workers, on_damaged, progress))
    return EpisodeStore(destination)


def _plan(
    source: Path,
    destination: Path,
    domain: Domain,
    tasks: tuple[str, ...],
    relabelling: Relabelling,
    subset: Subset,
    on_damaged: OnDamaged,
) -> ImportPlan:
    with Archive(source, domain) as archive:
        chosen = subset.choose(len(archive.members), domain.episode_length)
        members = tuple(archive.members[index] for index in chosen)
        for member in members if on_damaged == "stop" else ():
            archive.check_length(member)
        provenance = Provenance(
            source="/".join(source.resolve().parts[-2:]),
            source_bytes=archive.size(),
            source_sha256=archive.listing_sha256(),
            relabelling=relabelling,
            subset=subset.describe(len(chosen), len(archive.members)),
        )
        stamps = archive.stamps()
        facts = [FORMAT_VERSION, domain.name, asdict(replace(provenance, created="")), members, stamps, tasks]
    return ImportPlan(
        source=source,
        destination=destination,
        members=members,
        layout=Layout(domain, tasks, [domain.episode_length] * len(members)),
        provenance=provenance,
        relabelling=relabelling,
        changed=max(stamp for _, _, stamp in stamps) if source.is_dir() else 0,
        identity=hashlib.sha256(json.dumps(facts).encode()).hexdigest(),
    )


def _finished_before(plan: ImportPlan, on_damaged: OnDamaged) -> EpisodeStore | None:
    """Return the existing store if it is the result of this plan."""
    store = finished_store(plan.destination, plan.provenance)
    if store is None or (store.domain, store.tasks) != (plan.layout.domain.name, plan.layout.tasks):
        return None
    is_older = store.path.stat().st_mtime_ns < plan.changed
    return None if is_older or (store.provenance.num_skipped and on_damaged == "stop") else store


@contextmanager
def _resumable(plan: ImportPlan) -> Iterator[None]:
    """Create the hidden file, or reuse the file of an interrupted import of the same plan.

    If the block fails, the file is deleted unless it has a finished episode.
    """
    if not _has_episodes(plan):
        create_file(hidden_name(plan.destination), plan.layout, plan.identity)
    try:
        with explain_write_errors(plan.destination):
            yield
    except BaseException as error:
        if not _has_episodes(plan):
            _discard(plan.destination)
        elif isinstance(error, UserError):
            raise UserError(f"{error}; finished episodes are kept: run the same command again to resume") from error
        raise


def _has_episodes(plan: ImportPlan) -> bool:
    """Return whether the hidden file is of this plan and has a finished episode."""
    partial = hidden_name(plan.destination)
    try:
        with UnfinishedStore(partial, plan.layout, plan.identity) as store:
            return any(map(store.finished, range(len(plan.members))))
    except Exception as error:  # HDF5 raises nearly anything when the bytes are damaged
        raise_unreadable(partial, error)
        return False


def _discard(destination: Path) -> None:
    for path in hidden_files(destination):
        path.unlink(missing_ok=True)


def _import_episodes(
    plan: ImportPlan, workers: int | None, on_damaged: OnDamaged, progress: Progress
) -> list[Imported | str]:
    """Write every episode to the hidden file. Damaged episodes yield a line with the reason."""
    total, outcomes, is_reserved = len(plan.members), list[Imported | str](), False
    number = min(workers, total) if workers else min(available_cores(), -(-total // EPISODES_PER_WORKER))
    with episode_importers(plan, number) as results:
        for outcome in results:
            if isinstance(outcome, Imported):
                if not is_reserved:  # not earlier: an archive of false names would reserve any amount
                    reserve_space(hidden_name(plan.destination), plan.destination)
                    is_reserved = True
            elif on_damaged == "stop":
                _discard(plan.destination)
                raise UserError(f"{outcome} (or leave such episodes out: --on-damaged skip)")
            outcomes.append(outcome)
            progress(len(outcomes), total)
    return outcomes


def _finish(plan: ImportPlan, outcomes: Sequence[Imported | str]) -> None:
    """Leave out the damaged episodes, and make the hidden file a store."""
    kept = [index for index, outcome in enumerate(outcomes) if isinstance(outcome, Imported)]
    imported = [outcome for outcome in outcomes if isinstance(outcome, Imported)]
    damaged = [outcome for outcome in outcomes if isinstance(outcome, str)]
    if not kept:
        _discard(plan.destination)
        raise UserError(f"{damaged[0]} (all {len(damaged)} episodes of this import are damaged)")
    partial, layout = hidden_name(plan.destination), plan.layout
    if len(kept) < len(outcomes):
        partial, layout = _without_gaps(plan, kept)
    with UnfinishedStore(partial, layout, plan.identity) as store:
        task = _recorded_task(store, imported)
    provenance = replace(
        plan.provenance,
        num_skipped=len(damaged),
        skipped=tuple(reason.removeprefix(f"{plan.source}: ") for reason in damaged[:NAMED_SKIPPED]),
    )
    finish(partial, plan.destination, layout, [episode.record for episode in imported], task, provenance)
    _discard(plan.destination)


def _without_gaps(plan: ImportPlan, kept: Sequence[int]) -> tuple[Path, Layout]:
    """Copy the kept episodes to a second hidden file. The first one stays until the store is whole."""
    shorter = Layout(plan.layout.domain, plan.layout.tasks, plan.layout.lengths[kept])
    partial, target = hidden_files(plan.destination)
    create_file(target, shorter, plan.identity)
    reserve_space(target, plan.destination)
    with (
        UnfinishedStore(partial, plan.layout, plan.identity) as old,
        UnfinishedStore(target, shorter, plan.identity) as new,
    ):
        for place, index in enumerate(kept):
            new.write(place, old.read(index))
    return target, shorter


def _recorded_task(store: UnfinishedStore, imported: Sequence[Imported]) -> str | None:
    """Return the task whose rewards were recorded. None: no task or several fit, or rewards of all were recorded."""
    domain = store.layout.domain
    if domain.records_all_tasks or not any(episode.has_reward for episode in imported):
        return None
    candidates = [task for task in domain.tasks if all(task in episode.matches for episode in imported)]
    if len(candidates) < 2:
        return candidates[0] if candidates else None
    # Cartpole's balance and swingup have the same reward and differ only in the start. The nearer start decides.
    start = np.mean([store.read(index)["physics"][0] for index in range(len(imported))], axis=0)
    distances = {}
    for task in candidates:
        env = make(task, seed=0)
        own = np.stack([env.reset()[1]["physics"] for _ in range(8)])
        distances[task] = float(np.linalg.norm(own.mean(axis=0) - start))
    nearest, second = sorted(candidates, key=distances.__getitem__)[:2]
    return nearest if distances[nearest] < 0.5 * distances[second] else None
