"""Scores: normalised returns, one number per stream, and the summary of an evaluation."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
import pydantic_core
from jaxtyping import Float

from ringrl.envs import d4rl_returns, domain_of, is_foreign
from ringrl.errors import UserError
from ringrl.evaluation.records import PROTOCOL, EvaluationRecord, ReferenceReturns
from ringrl.files import explain_write_errors, write_whole


def normalised_score(
    task: str, returns: Float[np.ndarray, "..."] | float, recorded: ReferenceReturns = None
) -> Float[np.ndarray, "..."]:
    """Return 100 * (G - G_random) / (G_reference - G_random) elementwise; see `ringrl.envs` for the constants.

    G_random and G_reference of the dataset replace the constants if they are `recorded`. UserError if the task is
    unknown, or if its random return has not been measured.
    """
    random, reference = recorded or _constants(task)
    if random is None or reference is None:
        raise UserError(f"{task}: has no random return; measure it with benchmarks/random_returns.py")
    return 100 * (np.asarray(returns) - random) / (reference - random)


def score_or_none(task: str, value: float | None, recorded: ReferenceReturns = None) -> float | None:
    """Return the normalised score of one return; None without a return or without constants for the task."""
    try:
        return None if value is None else float(normalised_score(task, value, recorded))
    except UserError:
        return None


def random_return(task: str, recorded: ReferenceReturns = None) -> float | None:
    """Return the mean return of random actions in a task, of the dataset or the domain; None if it is unknown."""
    try:
        return (recorded or _constants(task))[0]
    except UserError:
        return None


def _constants(task: str) -> tuple[float | None, float | None]:
    if is_foreign(task):  # a name in a results file must not start an environment
        return d4rl_returns(task)
    domain = domain_of(task)
    return domain.random_returns.get(task), domain.reference_return


@dataclass(frozen=True)
class EvaluationSummary:
    """The results of one evaluation. None: no stream finished the episode."""

    evaluation: str  # SHA-256, as in its records
    task: str
    method: str
    train_trajectories: int | None  # per training context
    checkpoint: str | None
    steps_trained: int | None
    seed: int  # of the training run
    target_policy: str | None
    target_return: float | None
    prompt_trajectories: int
    prompt_control: str | None
    streams: int
    episodes: int  # of each stream, n
    returns: tuple[float | None, ...]  # of each episode: mean over the streams that finished it, and whose control did
    returns_without_context: tuple[float | None, ...]  # of the control; empty without a control
    metrics: dict[str, float | None]  # first, last, mean, best (of n): means over streams
    metrics_without_context: dict[str, float | None]
    scores: dict[str, float | None]  # the metrics, normalised
    scores_without_context: dict[str, float | None]
    failed: int  # number of episodes without a return
    failed_without_context: int
    reference_returns: ReferenceReturns  # scores 0 and 100; None: constants of the task


def summarise(records: Iterable[EvaluationRecord]) -> list[EvaluationSummary]:
    """Return one summary per evaluation, in the order of their first records. The newest record of a stream counts."""
    groups: dict[str, dict[tuple[bool, int], EvaluationRecord]] = defaultdict(dict)
    for record in records:
        if record.evaluation is not None:  # older records do not name their evaluation
            groups[record.evaluation][record.context, record.environment_seed] = record
    return [_summary(list(group.values())) for group in groups.values()]


def write_summary(path: Path, records: Iterable[EvaluationRecord]) -> None:
    """Write the summaries as JSON; a number that is not finite is null. UserError if the file cannot be written."""
    values = {"protocol": PROTOCOL, "evaluations": [asdict(summary) for summary in summarise(records)]}
    with explain_write_errors(path):
        write_whole(path, pydantic_core.to_json(values, indent=1, inf_nan_mode="null") + b"\n", alone=False)


def _summary(records: Sequence[EvaluationRecord]) -> EvaluationSummary:
    parts = [[record for record in records if record.context is context] for context in (True, False)]
    streams, control = _matched(*parts)
    metrics, without = _metrics(streams), _metrics(control)
    score = partial(score_or_none, records[0].task, recorded=records[0].reference_returns)
    names = {field.name for field in fields(EvaluationSummary)} & set(EvaluationRecord.model_fields) - {"returns"}
    return EvaluationSummary(
        **{name: getattr(records[0], name) for name in names},
        streams=len(streams),
        episodes=records[0].test_trajectories,
        returns=_by_episode(streams),
        returns_without_context=_by_episode(control),
        metrics=metrics,
        metrics_without_context=without,
        scores={name: score(value) for name, value in metrics.items()},
        scores_without_context={name: score(value) for name, value in without.items()},
        failed=sum(record.failed for record in parts[0]),
        failed_without_context=sum(record.failed for record in parts[1]),
    )


def _matched(
    streams: Sequence[EvaluationRecord], control: Sequence[EvaluationRecord]
) -> tuple[Sequence[EvaluationRecord], Sequence[EvaluationRecord]]:
    """Leave out episodes that failed in a stream or in its control. An incomplete control changes nothing."""
    controls = {record.environment_seed: record for record in control}
    if controls.keys() != {record.environment_seed for record in streams}:
        return streams, control
    matched: tuple[list[EvaluationRecord], list[EvaluationRecord]] = [], []
    for pair in ((record, controls[record.environment_seed]) for record in streams):
        common = min(len(record.finished) for record in pair)
        for found, record in zip(matched, pair, strict=True):
            returns = record.returns[:common] + (None,) * (len(record.returns) - common)
            found.append(record.model_copy(update={"returns": returns}))
    return matched


def _metrics(records: Sequence[EvaluationRecord]) -> dict[str, float | None]:
    """Return the means over streams of the first, last, mean and best return. A stream that failed has no last one."""
    if not records:
        return {}
    returns = np.array([record.returns for record in records], np.float64)
    returns = returns[np.isfinite(returns[:, 0])]
    of_streams = returns[:, 0], returns[:, -1], np.nanmean(returns, 1), np.nanmax(returns, 1)
    return dict(zip(("first", "last", "mean", "best"), map(finite_mean, of_streams), strict=True))


def _by_episode(records: Sequence[EvaluationRecord]) -> tuple[float | None, ...]:
    return tuple(finite_mean(column) for column in zip(*(record.returns for record in records), strict=True))


def finite_mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the finite values; None if there are none."""
    found = np.array([*values], np.float64)
    found = found[np.isfinite(found)]
    return float(found.mean()) if len(found) else None
