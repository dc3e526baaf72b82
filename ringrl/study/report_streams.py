"""Streams of episodes, and beside them their control: the same run, prompt and starts, with the memory wiped."""

from collections import defaultdict
from collections.abc import Iterable

import numpy as np
from jaxtyping import Float

from ringrl.evaluation.records import EvaluationRecord
from ringrl.evaluation.scores import matched_streams

Streams = Float[np.ndarray, "streams episodes"]


def streams_of(records: Iterable[EvaluationRecord]) -> dict[int, Streams]:
    """Training seed -> returns, NaN where an episode failed; streams without any return are left out."""
    found: dict[int, list[tuple[float | None, ...]]] = defaultdict(list)
    for record in records:
        if record.finished:
            found[record.seed].append(record.returns)
    return {seed: np.array(returns, np.float64) for seed, returns in found.items()}  # None becomes NaN


def beside_control(records: Iterable[EvaluationRecord]) -> tuple[dict[int, Streams], dict[int, Streams]]:
    """The streams that were measured with memory and with it wiped: either, as by `streams_of`.

    An episode that failed in one of the two counts in neither, for its start may be an easy one or a hard one.
    """
    kept, wiped = _by_place(records)
    pairs = [matched_streams(kept[place], wiped[place]) for place in kept if place in wiped]
    return streams_of(pair[0] for pair in pairs), streams_of(pair[1] for pair in pairs)


def have_same_streams(records: Iterable[EvaluationRecord]) -> bool:
    """Whether the control was measured for just the training seeds and starts that the rollout was."""
    kept, wiped = _by_place(records)
    return kept.keys() == wiped.keys()


def _by_place(records: Iterable[EvaluationRecord]) -> list[dict[tuple[object, ...], EvaluationRecord]]:
    """By what a stream has in common with its control: those with memory, and those without."""
    found: dict[bool, dict[tuple[object, ...], EvaluationRecord]] = {True: {}, False: {}}
    for record in records:
        found[record.context][record.seed, record.prompt_seed, record.starts] = record
    return [found[True], found[False]]
