"""One number per stream of episodes, where some of its episodes may have failed."""

import numpy as np
from jaxtyping import Float

from ringrl.evaluation.records import EvaluationRecord
from ringrl.evaluation.statistics import Metric, stream_metric


def alike(kept: EvaluationRecord, wiped: EvaluationRecord) -> tuple[EvaluationRecord, EvaluationRecord]:
    """Two streams of the same starts, each without the episodes that failed in the other."""
    common = min(len(kept.finished), len(wiped.finished))
    rest = (None,) * (len(kept.returns) - common)
    first, second = (r.model_copy(update={"returns": r.returns[:common] + rest}) for r in (kept, wiped))
    return first, second


def stream_scores(returns: Float[np.ndarray, "streams episodes"], metric: Metric) -> Float[np.ndarray, " streams"]:
    """The metric of each stream's finite returns, which are its first ones; NaN where there is nothing to tell.

    The last episode of a stream that failed is not there: none that came before stands in for it.
    """
    scores = np.full(len(returns), np.nan)
    for index, row in enumerate(np.asarray(returns, np.float64)):
        finite = row[np.isfinite(row)]
        if len(finite) == len(row) or (len(finite) and metric != "last"):
            scores[index] = stream_metric(finite, metric)
    return scores
