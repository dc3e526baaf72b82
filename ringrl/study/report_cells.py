"""Records sorted into cells: one method on one task at one context length, with its returns per training seed."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from ringrl.errors import UserError
from ringrl.evaluation.records import DATA, EvaluationRecord
from ringrl.evaluation.statistics import Estimate, Metric, difference, estimate, interquartile_mean
from ringrl.evaluation.streams import stream_scores
from ringrl.methods import METHODS

BOOTSTRAP_SEED = 0
RESAMPLES = 2000

_NAMES = {name: method.title for name, method in METHODS.items()} | {
    "td3+her": "TD3 with hindsight goals",
    "td3+bc+her": "TD3+BC with hindsight goals",
    DATA: "Dataset",
}

_CONTEXT_FREE = ("random", "bc")

Streams = Float[np.ndarray, "streams episodes"]
Runs = Float[np.ndarray, "seeds"]


@dataclass(frozen=True, order=True)
class Variant:
    """A method as it is told apart in the report."""

    method: str
    token_set: str = ""
    target_policy: str = ""
    prompt: int = 0  # dataset trajectories before the first episode
    train_task: str = ""  # where it is another one
    context_free: bool = False  # its returns are levels to compare with, not points of a curve


@dataclass(frozen=True)
class Cell:
    """The returns of one variant on one task, trained on `train` and rolled out for `test` trajectories per context."""

    task: str
    variant: Variant
    train: int | None
    test: int
    streams: Mapping[int, Streams]  # training seed -> returns, NaN where an episode failed, but for a first one
    control: Mapping[int, Streams] = field(default_factory=dict)  # the same with the memory wiped before each episode
    failed: int = 0  # episodes, the control's too; those of streams that have no return and are left out included

    @property
    def seeds(self) -> tuple[int, ...]:
        """Training seeds, ascending."""
        return tuple(sorted(self.streams))

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

    def control_runs(self, metric: Metric = "mean") -> Runs:
        """The same of the control; empty when it was not measured."""
        return _runs(self.control, metric)

    def memory_gains(self) -> tuple[Runs, Runs]:
        """Of each training seed that has a control: mean return with memory less that without, and that without."""
        seeds = [seed for seed in self.seeds if seed in self.control]
        kept, wiped = (_runs({seed: part[seed] for seed in seeds}, "mean") for part in (self.streams, self.control))
        return kept - wiped, wiped

    def episode_runs(self) -> list[Runs]:
        """The return of each in-context episode, per training seed, averaged over the streams that finished it."""
        return [_means(self.streams[seed][:, index] for seed in self.seeds) for index in range(self.test)]


@dataclass(frozen=True)
class Grid:
    """Everything a report is made from."""

    cells: tuple[Cell, ...]
    data: Mapping[str, Float[np.ndarray, " episodes"]]  # task -> returns of the dataset's episodes
    records: tuple[EvaluationRecord, ...]  # those that count
    superseded: int  # older records of what was measured again
    displaced: int  # those of them that came from another checkpoint
    unmatched: int  # control records without a rollout to compare with
    left_out: int  # records without any return: their first episode failed

    @property
    def tasks(self) -> tuple[str, ...]:
        """Task names, in alphabetical order."""
        return tuple(sorted({cell.task for cell in self.cells} | set(self.data)))

    @property
    def variants(self) -> tuple[Variant, ...]:
        """The variants for which context can matter."""
        return tuple(sorted({cell.variant for cell in self.cells if not cell.variant.context_free}))

    def cells_of(self, task: str, variant: Variant) -> list[Cell]:
        """The cells of a variant on a task, by context length in training, then in the rollout."""
        return [cell for cell in self.cells if (cell.task, cell.variant) == (task, variant)]

    def references(self, task: str) -> list[Cell]:
        """The cells without context on a task: random policy first, then by name."""
        cells = [cell for cell in self.cells if cell.task == task and cell.variant.context_free]
        return sorted(cells, key=lambda cell: (cell.variant.method != "random", cell.variant, cell.test))

    def name(self, variant: Variant) -> str:
        """A variant's name, with what else tells it apart from the report's other variants of the same method."""
        others = [cell.variant for cell in self.cells if cell.variant.method == variant.method]
        parts = [_NAMES.get(variant.method, variant.method)]
        if variant.method.startswith("bc-"):
            parts = [_NAMES["bc"], f"best {variant.method.removeprefix('bc-')}"]
        if len({other.token_set for other in others}) > 1:
            parts.append(variant.token_set or "no token set")
        if len({other.target_policy for other in others}) > 1:
            parts.append(f"target {variant.target_policy or 'unknown'}")
        if variant.prompt:
            parts.append(f"prompted with {variant.prompt}")
        if variant.train_task:
            parts.append(f"trained on {variant.train_task}")
        return ", ".join(parts)


@dataclass(frozen=True)
class Series:
    """The points of one curve against context length."""

    points: tuple[tuple[int, Cell], ...]  # context length, cell; ascending
    trained_on: int | None = None  # set where one training length is rolled out at several


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
        Series(tuple(sorted(((cell.test, cell) for cell in group), key=lambda point: point[0])), trained_on=train)
        for train, group in sorted(by_training.items())
    ]


def gather(records: Sequence[EvaluationRecord]) -> Grid:
    """Sort records into cells. Of what was measured twice the newer record counts.

    A Decision Transformer is an Agentic Transformer of one trajectory per context: where everything else is the same,
    it is the first point of that curve and no method of its own.

    Raises:
        UserError: one task has results of several datasets, whose returns mean different things.
    """
    latest: dict[tuple[object, ...], EvaluationRecord] = {}
    displaced = 0
    for record in sorted(records, key=lambda record: record.created):
        older = latest.get(_identity(record))
        displaced += older is not None and older.checkpoint != record.checkpoint
        latest[_identity(record)] = record
    _refuse_mixed_data(latest.values())
    streams: dict[tuple[str, Variant, int | None, int], dict[bool, dict[int, list]]] = defaultdict(
        lambda: {True: defaultdict(list), False: defaultdict(list)}
    )
    failed: dict[tuple[str, Variant, int | None, int], int] = defaultdict(int)
    data: dict[str, list[float]] = defaultdict(list)
    curves = {(record.task, _variant(record)) for record in latest.values()}
    for record in latest.values():
        if record.method == DATA:
            data[record.task] += record.finished
            continue
        variant = _variant(record)
        agentic = dataclasses.replace(variant, method="at")
        if variant.method == "dt" and record.train_trajectories == 1 and (record.task, agentic) in curves:
            variant = agentic
        train = None if variant.context_free else record.train_trajectories
        cell = streams[record.task, variant, train, record.test_trajectories]
        failed[record.task, variant, train, record.test_trajectories] += record.failed
        if record.finished:
            cell[record.context or variant.context_free][record.seed].append(record.returns)
    cells = [
        Cell(*key, _stack(cell[True]), _stack(cell[False]), failed[key]) for key, cell in streams.items() if cell[True]
    ]
    alone = [run for cell in streams.values() if not cell[True] for run in cell[False].values()]
    return Grid(
        cells=tuple(sorted(cells, key=lambda cell: (cell.task, cell.variant, cell.train or 0, cell.test))),
        data={task: np.array(returns) for task, returns in sorted(data.items())},
        records=tuple(latest.values()),
        superseded=len(records) - len(latest),
        displaced=displaced,
        unmatched=sum(len(run) for run in alone),
        left_out=sum(not record.finished for record in latest.values()),
    )


def summarise(*strata: Runs) -> Estimate:
    """Interquartile mean and interval of the runs of one task or several; the same report gives the same numbers."""
    return estimate(strata, generator=np.random.default_rng(BOOTSTRAP_SEED), resamples=RESAMPLES)


def middle(runs: Runs) -> float:
    """The interquartile mean alone."""
    return float(interquartile_mean(runs))


def middle_or_none(runs: Runs) -> float | None:
    """The same, and None where there are no runs."""
    return middle(runs) if len(runs) else None


def contrast(ours: Runs, theirs: Runs) -> Estimate:
    """Difference of the interquartile means of independent runs on one task."""
    return difference([ours], [theirs], generator=np.random.default_rng(BOOTSTRAP_SEED), resamples=RESAMPLES)


def _identity(record: EvaluationRecord) -> tuple[object, ...]:
    return (
        record.task, record.method, record.token_set, record.train_trajectories, record.test_trajectories,
        record.context, record.seed, record.environment_seed, record.target_policy, record.target_return,
        record.data_fingerprint, record.prompt_trajectories, record.prompt_seed, record.train_task,
    )  # fmt: skip


def _refuse_mixed_data(records: Iterable[EvaluationRecord]) -> None:
    fingerprints = defaultdict(set)
    for record in records:
        if record.data_fingerprint:
            fingerprints[record.task].add(record.data_fingerprint)
    for task, found in sorted(fingerprints.items()):
        if len(found) > 1:
            names = " and ".join(sorted(fingerprint[:12] for fingerprint in found))
            raise UserError(f"{task}: the results come from different datasets ({names}); make one report for each")


def _variant(record: EvaluationRecord) -> Variant:
    train_task = record.train_task or ""
    if record.method in _CONTEXT_FREE or record.train_trajectories is None:
        return Variant(record.method, train_task=train_task, context_free=True)
    target = record.target_policy or ""
    if record.target_return is not None and target in ("", "given"):
        target = f"given {record.target_return:g}"
    return Variant(record.method, record.token_set or "", target, record.prompt_trajectories, train_task)


def _stack(streams: Mapping[int, list[tuple[float | None, ...]]]) -> dict[int, Streams]:
    return {seed: np.array(returns, np.float64) for seed, returns in streams.items()}  # None becomes NaN


def _runs(streams: Mapping[int, Streams], metric: Metric) -> Runs:
    return _means(stream_scores(streams[seed], metric) for seed in sorted(streams))


def _means(groups: Iterable[np.ndarray]) -> Runs:
    """The mean of each group's finite numbers; groups without any are left out."""
    finite = (group[np.isfinite(group)] for group in groups)
    return np.array([group.mean() for group in finite if len(group)])
