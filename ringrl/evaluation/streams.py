"""One number per stream of episodes, where some of its episodes may have failed."""

import numpy as np
from jaxtyping import Float

from ringrl.evaluation.statistics import Metric, stream_metric


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
