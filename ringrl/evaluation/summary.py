"""Results in short: what one evaluation found, from its records."""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ringrl.errors import UserError
from ringrl.evaluation.records import PROTOCOL, EvaluationRecord
from ringrl.evaluation.scores import score_or_none
from ringrl.evaluation.statistics import METRICS
from ringrl.evaluation.streams import alike, stream_scores
from ringrl.files import write_whole

# What all records of an evaluation say alike.
_SHARED = (
    "evaluation", "task", "method", "checkpoint", "steps_trained", "seed", "target_policy", "target_return",
    "prompt_trajectories",
)  # fmt: skip


@dataclass(frozen=True)
class Summary:
    """One evaluation: one task of one checkpoint under one protocol. None: no stream came so far."""

    evaluation: str  # SHA-256, as in its records
    task: str
    method: str
    checkpoint: str | None
    steps_trained: int | None
    seed: int  # of the training run
    target_policy: str | None
    target_return: float | None
    prompt_trajectories: int
    streams: int
    episodes: int  # of each stream, n
    returns: tuple[float | None, ...]  # of each in-context episode, mean over the streams that finished it, control too
    returns_without_context: tuple[float | None, ...]  # the same of the control; empty where it was not asked for
    metrics: dict[str, float | None]  # first, last, mean, best (of n): means over streams
    metrics_without_context: dict[str, float | None]
    scores: dict[str, float | None]  # the metrics, normalised
    scores_without_context: dict[str, float | None]
    failed: int  # episodes without a return
    failed_without_context: int
    streams_left_out: int  # that have no return at all, the control's included
    steps_simulated: int
    wall_seconds: float


def summarise(records: Iterable[EvaluationRecord]) -> list[Summary]:
    """One summary per evaluation, in the order in which they were first written; of repeated ones, the newest."""
    groups: dict[str, dict[tuple[bool, int], EvaluationRecord]] = defaultdict(dict)
    for record in records:
        if record.evaluation is not None:  # older results do not say what belongs together
            groups[record.evaluation][record.context, record.environment_seed] = record
    return [_summary(list(group.values())) for group in groups.values()]


def write_summary(path: Path, records: Iterable[EvaluationRecord]) -> None:
    """Write the summaries as JSON, whole or not at all.

    Raises:
        UserError: the file cannot be written.
    """
    values = {"protocol": PROTOCOL, "evaluations": [asdict(summary) for summary in summarise(records)]}
    try:
        write_whole(path, json.dumps(values, indent=1) + "\n", alone=False)
    except OSError as error:
        raise UserError(f"{path}: the summary cannot be written ({error.strerror}); give another --output") from error


def _summary(records: Sequence[EvaluationRecord]) -> Summary:
    streams, control = ([r for r in records if r.context is context] for context in (True, False))
    shared = {name: getattr(records[0], name) for name in _SHARED}
    kept, wiped = _compared(streams, control)
    metrics, without = _metrics(kept), _metrics(wiped)
    return Summary(
        **shared,
        streams=len(streams),
        episodes=records[0].test_trajectories,
        returns=_by_episode(kept),
        returns_without_context=_by_episode(wiped),
        metrics=metrics,
        metrics_without_context=without,
        scores={name: score_or_none(shared["task"], value) for name, value in metrics.items()},
        scores_without_context={name: score_or_none(shared["task"], value) for name, value in without.items()},
        failed=sum(record.failed for record in streams),
        failed_without_context=sum(record.failed for record in control),
        streams_left_out=sum(not record.finished for record in records),
        steps_simulated=sum(record.steps_simulated or 0 for record in records),
        wall_seconds=sum(max((r.wall_seconds or 0.0 for r in part), default=0.0) for part in (streams, control)),
    )


def _compared(
    streams: Sequence[EvaluationRecord], control: Sequence[EvaluationRecord]
) -> tuple[Sequence[EvaluationRecord], Sequence[EvaluationRecord]]:
    """Of a control that is whole, the episodes that have a return in both; of one that is not yet, all there are."""
    wiped = {record.environment_seed: record for record in control}
    if wiped.keys() != {record.environment_seed for record in streams}:
        return streams, control
    pairs = [alike(record, wiped[record.environment_seed]) for record in streams]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def _metrics(records: Sequence[EvaluationRecord]) -> dict[str, float | None]:
    if not records:
        return {}
    returns = np.array([record.returns for record in records], np.float64)
    return {metric: mean(stream_scores(returns, metric).tolist()) for metric in METRICS}


def _by_episode(records: Sequence[EvaluationRecord]) -> tuple[float | None, ...]:
    return tuple(mean(column) for column in zip(*(record.returns for record in records), strict=True))


def mean(values: Iterable[float | None]) -> float | None:
    """Of those that are there and finite; None where none is."""
    found = [value for value in values if value is not None and np.isfinite(value)]
    return float(np.mean(found)) if found else None
