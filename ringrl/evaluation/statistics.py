"""Statistics over few training runs: aggregates and comparisons, with stratified bootstrap intervals.

After Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice" (rliable). A score is
one number per training run (seed) and task. Scores are given as strata, one float array (runs,) per task. The bootstrap
resamples runs within each task, and so estimates how much the result would vary with other training seeds. Episodes of
one run are averaged first and never resampled, because they are not independent evidence about training.

Intervals have 95 % confidence (percentile method) and need two runs in every stratum. With fewer, their ends are NaN.
All intervals draw RESAMPLES resamples from the same seed, so that the same runs have the same interval.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.stats  # type: ignore[import-untyped]
from jaxtyping import Float, Float64

CONFIDENCE, BOOTSTRAP_SEED, RESAMPLES = 0.95, 0, 2000
LEVEL, POWER = 0.05, 0.8
"""Significance level (two-sided) and power of comparisons."""

Runs = Float[np.ndarray, "runs"]
Aggregate = Callable[..., Any]  # a statistic of scores along an axis, with the signature of numpy.mean


@dataclass(frozen=True)
class Estimate:
    """A statistic, the ends of its interval (NaN: too few runs) and its number of runs."""

    value: float
    low: float
    high: float
    runs: int


@dataclass(frozen=True)
class MeanTest:
    """A two-sided t-test of the difference of two means."""

    difference: float
    p_value: float
    detectable: float  # smallest difference that a test of as many runs finds with a probability of POWER


def mean_test(ours: Runs, theirs: Runs, *, paired: bool) -> MeanTest | None:
    """Return a t-test of mean(ours) - mean(theirs); None with fewer than two runs on a side.

    Paired runs give the t-test of their differences. Other runs give Welch's t-test, as Colas et al. 2019 (1904.06979)
    recommend for few seeds. The smallest detectable difference is (t(1 - LEVEL / 2) + t(POWER)) standard errors, with
    quantiles of the t distribution of the test's degrees of freedom (Bloom 1995, "Minimum Detectable Effects").
    """
    # No permutation test: five pairs cannot give a p-value below 1/16, so no difference would ever be clear.
    samples = [np.subtract(ours, theirs)] if paired else [ours, theirs]
    counts = np.array([len(sample) for sample in samples])
    if counts.min() < 2:
        return None
    variances = np.array([np.var(sample, ddof=1) for sample in samples]) / counts
    variances = np.maximum(variances, 1e-18)  # equal runs: rounding is no evidence
    error, freedom = np.sqrt(variances.sum()), variances.sum() ** 2 / (variances**2 / (counts - 1)).sum()
    change = float(np.mean(ours) - np.mean(theirs))
    quantiles = scipy.stats.t.ppf([1 - LEVEL / 2, POWER], freedom)
    return MeanTest(change, float(2 * scipy.stats.t.sf(abs(change) / error, freedom)), float(quantiles.sum() * error))


def holm(p_values: Float[np.ndarray, " tests"]) -> Float64[np.ndarray, " tests"]:
    """Return p-values corrected for the number of tests (Holm 1979). NaN is no test, and remains."""
    order, count = np.argsort(p_values), int(np.isfinite(p_values).sum())
    factors = np.maximum(count - np.arange(len(p_values)), 1)
    corrected = np.empty(len(p_values))
    corrected[order] = np.minimum(np.maximum.accumulate(np.asarray(p_values, np.float64)[order] * factors), 1)
    return corrected


def interquartile_mean(scores: Float[np.ndarray, "..."], *, axis: int | None = -1) -> Any:
    """Return the mean without the lowest and highest floor(n/4) scores (axis None: of all scores together)."""
    return scipy.stats.trim_mean(scores, proportiontocut=0.25, axis=axis)


def estimate(
    strata: Sequence[Runs], aggregate: Aggregate = interquartile_mean, *, together: Sequence[Hashable] | None = None
) -> Estimate:
    """Return an aggregate of all runs of all tasks, with its stratified bootstrap interval.

    Args:
        strata: scores of the runs of each task (runs,).
        aggregate: interquartile_mean, numpy.mean, numpy.median, ...
        together: a label per task. Tasks with the same label have the same runs in the same order, which are resampled
            together. None: all tasks have different runs.
    """

    def pooled(*samples: np.ndarray, axis: int = -1) -> Any:
        return aggregate(np.concatenate(samples, axis=axis), axis=axis)

    labels = range(len(strata)) if together is None else together
    return _bootstrap(strata, pooled, labels)


def difference(ours: Runs, theirs: Runs, aggregate: Aggregate = interquartile_mean, *, paired: bool) -> Estimate:
    """Return aggregate(ours) - aggregate(theirs). Its number of runs is the smaller one of the two.

    Paired: both sides have the same runs in the same order, which are resampled together.
    """

    def contrast(ours: np.ndarray, theirs: np.ndarray, axis: int = -1) -> Any:
        return aggregate(ours, axis=axis) - aggregate(theirs, axis=axis)

    return _compare(ours, theirs, contrast, paired)


def probability_of_improvement(ours: Runs, theirs: Runs, *, paired: bool) -> Estimate:
    """Return the probability that one of our runs beats one of theirs. A tie is half a win.

    This is Mann-Whitney's U divided by the number of pairs. `paired` is as in `difference`.
    """

    def wins(ours: np.ndarray, theirs: np.ndarray, axis: int = -1) -> Any:
        step = np.sign(ours[..., :, None] - theirs[..., None, :])
        return (0.5 * (step + 1)).mean((-2, -1))

    return _compare(ours, theirs, wins, paired)


def rank_correlation(x: Runs, y: Runs) -> Estimate:
    """Return Spearman's correlation of two numbers per run and its bootstrap interval; 0 if one of them is constant."""

    def spearman(*samples: np.ndarray, axis: int = -1) -> Any:
        ranks = [scipy.stats.rankdata(sample, axis=axis) for sample in samples]
        one, other = (rank - rank.mean(axis, keepdims=True) for rank in ranks)
        return (one * other).sum(axis) / np.maximum(np.sqrt((one**2).sum(axis) * (other**2).sum(axis)), 1e-9)

    return _bootstrap([x, y], spearman, "aa")


def _compare(ours: Runs, theirs: Runs, statistic: Callable[..., Any], paired: bool) -> Estimate:
    found = _bootstrap([ours, theirs], statistic, "aa" if paired else "ab")
    return replace(found, runs=min(len(ours), len(theirs)))


def _bootstrap(samples: Sequence[Runs], statistic: Callable[..., Any], labels: Sequence[Hashable]) -> Estimate:
    """Return a statistic of samples. Samples of one label have the same runs, which are resampled together."""
    samples = [np.asarray(sample, np.float64) for sample in samples]
    sizes: dict[Hashable, int] = {}
    for sample, label in zip(samples, labels, strict=True):
        if sizes.setdefault(label, len(sample)) != len(sample):
            raise ValueError(f"{len(sample)} scores of {sizes[label]} runs that are drawn together")
    if not samples or min(sizes.values()) == 0:
        raise ValueError("every task needs at least one run")
    low = high = np.nan
    if min(sizes.values()) > 1:

        def of_indices(*drawn: np.ndarray, axis: int = -1) -> Any:
            indices = dict(zip(sizes, drawn, strict=True))
            return statistic(*(x[indices[label]] for x, label in zip(samples, labels, strict=True)), axis=axis)

        # scipy resamples its samples independently, as the strata of Agarwal et al. It gets the indices of runs, so
        # that samples of the same runs are resampled together.
        low, high = scipy.stats.bootstrap(
            [np.arange(size) for size in sizes.values()], of_indices, n_resamples=RESAMPLES, vectorized=True, axis=-1,
            confidence_level=CONFIDENCE, method="percentile", rng=np.random.default_rng(BOOTSTRAP_SEED),
        ).confidence_interval  # fmt: skip
    return Estimate(float(statistic(*samples, axis=-1)), float(low), float(high), sum(sizes.values()))
