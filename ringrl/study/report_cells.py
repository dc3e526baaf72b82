"""Records sorted into cells: one method on one task at one context length, with its returns per training seed."""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from ringrl.errors import UserError
from ringrl.evaluation.records import DATA, EvaluationRecord
from ringrl.evaluation.scores import Metric, stream_scores
from ringrl.evaluation.statistics import (
    Estimate,
    difference,
    estimate,
    interquartile_mean,
    probability_of_improvement,
)
from ringrl.study.report_streams import Streams, beside_control, have_same_streams, streams_of
from ringrl.study.report_variants import Variant, Variants, name_of, settings_of
from ringrl.training.budget import Budget

BOOTSTRAP_SEED = 0
RESAMPLES = 2000

_Place = tuple[str, "Variant", int | None, int]  # task, variant, trajectories trained on, episodes rolled out

Runs = Float[np.ndarray, "seeds"]


@dataclass(frozen=True)
class Cell:
    """The returns of one variant on one task, trained on `train` and rolled out for `test` trajectories per context."""

    task: str
    variant: Variant
    train: int | None
    test: int
    streams: Mapping[int, Streams]  # training seed -> returns, NaN where an episode failed here or in the control
    control: Mapping[int, Streams] = field(default_factory=dict)  # with the memory wiped, if measured for all of these
    failed: int = 0  # episodes, the control's too; those of streams that have no return and are left out included
    records: tuple[EvaluationRecord, ...] = field(default=(), repr=False)  # what all this was read off

    @property
    def seeds(self) -> tuple[int, ...]:
        """Training seeds, ascending."""
        return tuple(sorted(self.streams))

    @property
    def budgets(self) -> dict[int, Budget]:
        """Training seed -> what training took; results from before this was told have none."""
        told = {record.seed: record.budget for record in self.records}
        return {seed: budget for seed, budget in sorted(told.items()) if budget is not None}

    @property
    def starts(self) -> frozenset[frozenset[tuple[int, int]]]:
        """Where the episodes of a training seed started (see `EvaluationRecord.starts`): one set, if all the same."""
        of_seed: dict[int, set[tuple[int, int]]] = defaultdict(set)
        for record in self.records:
            if record.context:
                of_seed[record.seed].update(record.starts)
        return frozenset(map(frozenset, of_seed.values()))

    @property
    def episodes(self) -> int:
        """Episodes over all seeds, without those that failed."""
        return sum(int(np.isfinite(returns).sum()) for returns in self.streams.values())

    def runs(self, metric: Metric = "mean") -> Runs:
        """One score per training seed: the metric, averaged over the seed's streams.

        Of a stream that failed, the episodes before count, but none stands in for its last one. A seed of which no
        stream came to the last is left out of that metric.
        """
        return _runs(self.streams, metric)

    def by_training(self) -> dict[Hashable, float]:
        """Training run, by seed and checkpoint where that is told -> its score; in the order of `runs`."""
        told = {record.seed: record.checkpoint_hash for record in self.records}
        names = ((told.get(seed) or id(self), seed) for seed in self.seeds)  # untold, a run is this cell's alone
        return dict(zip(names, self.runs().tolist(), strict=True))

    def control_runs(self, metric: Metric = "mean") -> Runs:
        """The same of the control; empty when it was not measured for every seed and stream."""
        return _runs(self.control, metric)

    def beside_control(self) -> tuple[Runs, Runs]:
        """Mean return with memory, and with it wiped, of each training seed over the streams that have both."""
        kept, wiped = beside_control(self.records)
        return _runs(kept, "mean"), _runs(wiped, "mean")

    def episode_runs(self) -> list[Runs]:
        """The return of each in-context episode, per training seed, averaged over the streams that finished it."""
        return _by_episode(self.streams, self.test)

    def control_episode_runs(self) -> list[Runs]:
        """The same of the control, whose episodes have the same starts; none when it was not measured."""
        return _by_episode(self.control, self.test) if self.control else []


@dataclass(frozen=True)
class Grid:
    """Everything a report is made from."""

    cells: tuple[Cell, ...]
    data: Mapping[str, Float[np.ndarray, " episodes"]]  # task -> returns of the dataset's episodes
    records: tuple[EvaluationRecord, ...]  # those that count
    superseded: int  # older records of what was measured again
    displaced: int  # those of them that came from another checkpoint
    unmatched: int  # control records beside which no rollout stands, or one of other starts or training seeds
    left_out: int  # records without any return: their first episode failed

    @property
    def tasks(self) -> tuple[str, ...]:
        """Task names, in alphabetical order."""
        return tuple(sorted({cell.task for cell in self.cells} | set(self.data)))

    @property
    def variants(self) -> tuple[Variant, ...]:
        """The variants for which context can matter."""
        return tuple(sorted({cell.variant for cell in self.cells if not cell.variant.context_free}))

    @property
    def context_free(self) -> tuple[Variant, ...]:
        """Those without a context."""
        return tuple(sorted({cell.variant for cell in self.cells if cell.variant.context_free}))

    @property
    def tasks_with_context(self) -> tuple[str, ...]:
        """The tasks that a method with a context was measured on."""
        return tuple(task for task in self.tasks if any(self.cells_of(task, variant) for variant in self.variants))

    def records_of(self, tasks: Iterable[str]) -> tuple[EvaluationRecord, ...]:
        """The records of policies on these tasks."""
        chosen = set(tasks)
        return tuple(record for record in self.records if record.task in chosen and record.method != DATA)

    def cells_of(self, task: str, variant: Variant) -> list[Cell]:
        """The cells of a variant on a task, by context length in training, then in the rollout."""
        return [cell for cell in self.cells if (cell.task, cell.variant) == (task, variant)]

    def references(self, task: str) -> list[Cell]:
        """The cells without context on a task: random policy first, then by name."""
        cells = [cell for cell in self.cells if cell.task == task and cell.variant.context_free]
        return sorted(cells, key=lambda cell: (cell.variant.method != "random", cell.variant, cell.test))

    def levels(self, task: str) -> list[Cell]:
        """Of each variant without context on a task, the cell of the most episodes."""
        most: dict[Variant, Cell] = {}
        for cell in self.references(task):
            if cell.variant not in most or cell.episodes > most[cell.variant].episodes:
                most[cell.variant] = cell
        return list(most.values())

    def name(self, variant: Variant) -> str:
        """A variant's name, with what else tells it apart from the report's other variants of the same method."""
        return name_of(variant, {cell.variant for cell in self.cells})


@dataclass(frozen=True)
class Series:
    """The points of one curve against context length."""

    points: tuple[tuple[int, Cell], ...]  # context length, cell; ascending
    train: int | None = None  # set where one training length is rolled out at several


def series_of(cells: Sequence[Cell]) -> list[Series]:
    """Curves of one variant on one task.

    Where every training length has one rollout length, the curve is over training lengths. Otherwise there is one curve
    per training length, over rollout lengths.
    """
    by_training = defaultdict(list)
    for cell in cells:
        by_training[cell.train or 0].append(cell)
    if all(len(group) == 1 for group in by_training.values()):
        return [Series(tuple((train, group[0]) for train, group in sorted(by_training.items())))]
    return [
        Series(tuple(sorted(((cell.test, cell) for cell in group), key=lambda point: point[0])), train=train)
        for train, group in sorted(by_training.items())
    ]


def gather(records: Sequence[EvaluationRecord]) -> Grid:
    """Sort records into cells. Of what was measured twice the newer record counts; other settings are told apart.

    Raises:
        UserError: one task has results of several datasets, whose returns mean different things.
    """
    latest: dict[tuple[object, ...], EvaluationRecord] = {}
    displaced = 0
    for record in sorted(records, key=lambda record: record.created):
        older = latest.get(_identity(record))
        displaced += older is not None and older.checkpoint_hash != record.checkpoint_hash
        latest[_identity(record)] = record
    whole = len(latest)
    latest = _of_one_checkpoint(latest)
    displaced += whole - len(latest)
    _refuse_mixed_data(latest.values())
    members: dict[_Place, list[EvaluationRecord]] = defaultdict(list)
    data: dict[str, list[float]] = defaultdict(list)
    variants = Variants(latest.values())
    for record in latest.values():
        if record.method == DATA:
            data[record.task] += record.finished
            continue
        variant = variants.of(record)
        train = None if variant.context_free else record.train_trajectories
        if record.context or not variant.context_free:  # what the control of the others repeats is the same
            members[record.task, variant, train, record.test_trajectories].append(record)
    sorted_out = [_cell(place, found) for place, found in members.items()]
    cells = [cell for cell, _ in sorted_out if cell.streams]
    return Grid(
        cells=tuple(sorted(cells, key=lambda cell: (cell.task, cell.variant, cell.train or 0, cell.test))),
        data={task: np.array(returns) for task, returns in sorted(data.items())},
        records=tuple(latest.values()),
        superseded=len(records) - len(latest),
        displaced=displaced,
        unmatched=sum(unmatched for _, unmatched in sorted_out),
        left_out=sum(not record.finished for record in latest.values()),
    )


def _cell(place: _Place, records: Sequence[EvaluationRecord]) -> tuple[Cell, int]:
    """The cell of these records, and how many of a control do not stand beside it."""
    failed, streams = sum(record.failed for record in records), streams_of(r for r in records if r.context)
    if have_same_streams(records):
        kept, wiped = beside_control(records)
        if kept.keys() == streams.keys():  # of every training seed something is left to compare
            return Cell(*place, kept, wiped, failed, tuple(records)), 0
    alone = sum(bool(record.finished) for record in records if not record.context)
    return Cell(*place, streams, {}, failed, tuple(records)), alone


class Strata(NamedTuple):
    """The scores of several tasks, as statistics over all of them want them."""

    runs: list[Runs]  # per task
    together: list[int]  # labels: tasks of one label were scored by the same training runs, in the same order


def strata(cells: Sequence[Cell]) -> Strata:
    """The scores of one cell per task.

    Where the same training runs were measured in several tasks, only those that were in each of these count there. Two
    cells of one task, which are to be compared, may be of the same runs as well.
    """
    trained = [cell.by_training() for cell in cells]
    shared: dict[int, set[Hashable]] = {}  # label -> the training runs of all its tasks
    together = []
    for index, runs in enumerate(trained):
        label = next((label for label, names in shared.items() if names & set(runs)), index)
        shared[label] = shared.get(label, set(runs)) & set(runs)
        together.append(label)
    scores = [
        np.array([score for name, score in runs.items() if name in shared[label]])
        for runs, label in zip(trained, together, strict=True)
    ]
    return Strata(scores, together)


def in_sentence(name: str) -> str:
    """A method's name within a sentence: "behaviour cloning", but "TD3+BC"."""
    return name[:1].lower() + name[1:] if name[1:2].islower() else name


def summarise(*runs: Runs, together: Sequence[Hashable] | None = None) -> Estimate:
    """Interquartile mean and interval of the runs of one task or several; the same report gives the same numbers.

    `together`: see `Strata`.
    """
    return estimate(runs, generator=np.random.default_rng(BOOTSTRAP_SEED), together=together, resamples=RESAMPLES)


def middle(runs: Runs) -> float:
    """The interquartile mean alone."""
    return float(interquartile_mean(runs))


def middle_or_none(runs: Runs) -> float | None:
    """The same, and None where there are no runs."""
    return middle(runs) if len(runs) else None


@dataclass(frozen=True)
class Contrast:
    """What two cells of one task differ by; where they are of the same training runs, of these alone."""

    change: Estimate  # of the interquartile mean, the first less the second
    wins: Estimate  # probability that a run of the first beats a run of the second
    levels: tuple[float, float]  # interquartile means of these runs: the first's, the second's
    paired: bool  # whether they are of the same training runs


def contrast(ours: Cell, theirs: Cell) -> Contrast:
    """The first less the second. Runs that were trained independently are resampled so, the same runs together."""
    (one, other), together = strata([ours, theirs])
    drawing: dict[str, Any] = {"together": together[:1], "baseline_together": together[1:], "resamples": RESAMPLES}
    change, wins = (
        statistic([one], [other], generator=np.random.default_rng(BOOTSTRAP_SEED), **drawing)
        for statistic in (difference, probability_of_improvement)
    )
    return Contrast(change, wins, (middle(one), middle(other)), together[0] == together[1])


def _of_one_checkpoint(
    latest: Mapping[tuple[object, ...], EvaluationRecord],
) -> dict[tuple[object, ...], EvaluationRecord]:
    """Those of the checkpoint of each training run that was evaluated last, whatever it was asked for."""
    in_time = sorted(latest.values(), key=lambda record: record.created)
    newest = {_run(record): record.checkpoint_hash for record in in_time}
    return {key: record for key, record in latest.items() if newest[_run(record)] == record.checkpoint_hash}


def _run(record: EvaluationRecord) -> tuple[object, ...]:
    """What tells a training run."""
    return (
        record.train_task or record.task, record.method, record.token_set, record.train_trajectories, record.seed,
        record.data_fingerprint, frozenset(settings_of(record).items()),
    )  # fmt: skip


def _identity(record: EvaluationRecord) -> tuple[object, ...]:
    """What tells a stream of episodes."""
    asked = () if record.train_trajectories is None else (record.target_policy, record.target_return)
    stream = record.test_trajectories, record.prompt_seed, record.context, record.environment_seed
    return (*_run(record), record.task, record.prompt_trajectories, record.cache_dtype, asked, *stream)


def _refuse_mixed_data(records: Iterable[EvaluationRecord]) -> None:
    fingerprints = defaultdict(set)
    for record in records:
        if record.data_fingerprint:
            fingerprints[record.task].add(record.data_fingerprint)
    for task, found in sorted(fingerprints.items()):
        if len(found) > 1:
            names = " and ".join(sorted(fingerprint[:12] for fingerprint in found))
            raise UserError(f"{task}: the results come from different datasets ({names}); make one report for each")


def _runs(streams: Mapping[int, Streams], metric: Metric) -> Runs:
    return _means(stream_scores(streams[seed], metric) for seed in sorted(streams))


def _by_episode(streams: Mapping[int, Streams], episodes: int) -> list[Runs]:
    return [_means(streams[seed][:, index] for seed in sorted(streams)) for index in range(episodes)]


def _means(groups: Iterable[np.ndarray]) -> Runs:
    """The mean of each group's finite numbers; groups without any are left out."""
    finite = (group[np.isfinite(group)] for group in groups)
    return np.array([group.mean() for group in finite if len(group)])
