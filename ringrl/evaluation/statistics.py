"""Statistics over few training runs: aggregates, comparisons and profiles, with stratified bootstrap intervals.

After Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice" (rliable). A score is
one number per training run (seed) and task. Scores are given as strata, one float array (runs,) per task. The bootstrap
resamples runs within each task, and so estimates how much the result would vary with other training seeds. Episodes of
one run are averaged first and never resampled, because they are not independent evidence about training.

Intervals have 95 % confidence (percentile method) and need two runs in every stratum. With fewer, the interval is None.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.stats  # type: ignore[import-untyped]
from jaxtyping import Float, Float64

CONFIDENCE = 0.95
LEVEL, POWER = 0.05, 0.8
"""Significance level (two-sided) and power of comparisons."""

Runs = Float[np.ndarray, "runs"]
Strata = Sequence[Runs]
Together = Sequence[Hashable] | None  # a label per task; tasks with the same label have the same runs, in order
Aggregate = Callable[..., Any]  # a statistic of scores along an axis, with the signature of numpy.mean


@dataclass(frozen=True)
class Interval:
    """A closed confidence interval."""

    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Estimate:
    """A statistic, its interval (None: too few runs) and its number of runs."""

    value: float
    interval: Interval | None
    runs: int


@dataclass(frozen=True)
class Profile:
    """The fraction of runs above each threshold, with pointwise intervals (None: too few runs)."""

    thresholds: Float64[np.ndarray, " thresholds"]  # scores, ascending
    fractions: Float64[np.ndarray, " thresholds"]  # of the runs of all tasks, in [0, 1]
    low: Float64[np.ndarray, " thresholds"] | None
    high: Float64[np.ndarray, " thresholds"] | None
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
    strata: Strata,
    aggregate: Aggregate = interquartile_mean,
    *,
    generator: np.random.Generator,
    together: Together = None,
    resamples: int = 2000,
) -> Estimate:
    """Return an aggregate of all runs of all tasks, with its stratified bootstrap interval.

    Args:
        strata: scores of the runs of each task (runs,).
        aggregate: interquartile_mean, numpy.mean, numpy.median, ...
        generator: random generator of the resampling.
        together: a label per task. Tasks with the same label have the same runs in the same order, which are resampled
            together. None: all tasks have different runs.
        resamples: number of bootstrap resamples.
    """
    return _estimate(strata, _pooled(aggregate), generator, resamples, together)


def difference(
    strata: Strata,
    baseline: Strata,
    aggregate: Aggregate = interquartile_mean,
    *,
    generator: np.random.Generator,
    together: Together = None,
    baseline_together: Together = None,
    resamples: int = 2000,
) -> Estimate:
    """Return aggregate(strata) - aggregate(baseline). Its number of runs is the smaller one of the two.

    `together` and `baseline_together` are as in `estimate`. A label in both of them makes the comparison paired: the
    same runs, in the same order, are in `strata` and in `baseline`.
    """
    pooled, count = _pooled(aggregate), len(strata)

    def contrast(*samples: np.ndarray, axis: int = -1) -> Any:
        return pooled(*samples[:count], axis=axis) - pooled(*samples[count:], axis=axis)

    return _compare(strata, baseline, contrast, generator, resamples, together, baseline_together)


def probability_of_improvement(
    strata: Strata,
    baseline: Strata,
    *,
    generator: np.random.Generator,
    together: Together = None,
    baseline_together: Together = None,
    resamples: int = 2000,
) -> Estimate:
    """Return the probability that a run beats a run of the baseline, averaged over tasks. A tie is half a win.

    Task k of `strata` is compared with task k of `baseline`. Other arguments are as in `difference`.
    """
    if len(strata) != len(baseline):
        raise ValueError(f"{len(strata)} tasks cannot be compared with {len(baseline)}")
    count = len(strata)

    def wins(*samples: np.ndarray, axis: int = -1) -> Any:
        per_task = [_wins(ours, theirs) for ours, theirs in zip(samples[:count], samples[count:], strict=True)]
        return np.mean(per_task, axis=0)

    return _compare(strata, baseline, wins, generator, resamples, together, baseline_together)


def rank_correlation(x: Runs, y: Runs, *, generator: np.random.Generator, resamples: int = 2000) -> Estimate:
    """Return Spearman's correlation of two numbers per run and its bootstrap interval; 0 if one of them is constant."""

    def spearman(*samples: np.ndarray, axis: int = -1) -> Any:
        ranks = [scipy.stats.rankdata(sample, axis=axis) for sample in samples]
        one, other = (rank - rank.mean(axis, keepdims=True) for rank in ranks)
        return (one * other).sum(axis) / np.maximum(np.sqrt((one**2).sum(axis) * (other**2).sum(axis)), 1e-9)

    return _estimate([x, y], spearman, generator, resamples, [0, 0])


def performance_profile(
    strata: Strata,
    thresholds: Float[np.ndarray, " thresholds"],
    *,
    generator: np.random.Generator,
    together: Together = None,
    resamples: int = 2000,
) -> Profile:
    """Return the distribution of scores over the runs of all tasks.

    A method whose profile is above another's at every threshold is stochastically better. The confidence of the
    intervals holds at each threshold, not at all of them at once.

    Args:
        strata: scores of the runs of each task (runs,), normalised if there are several tasks.
        thresholds: scores (T,).
        generator, together, resamples: as in `estimate`.
    """
    thresholds = np.sort(np.asarray(thresholds, np.float64))
    # One row per threshold, so that the bootstrap resamples the same runs for all thresholds.
    above = [(np.asarray(runs, np.float64) > thresholds[:, None]).astype(np.float64) for runs in strata]
    mean = _pooled(lambda scores, axis: scores.mean(axis))
    fractions, ends = _bootstrap(above, mean, generator, resamples, together)
    low, high = ends or (None, None)
    return Profile(thresholds, fractions, low, high, _count(strata, together))


def _pooled(aggregate: Aggregate) -> Callable[..., Any]:
    """Apply an aggregate to several samples together."""
    return lambda *samples, axis=-1: aggregate(np.concatenate(samples, axis=axis), axis=axis)


def _wins(
    ours: Float[np.ndarray, "*resamples runs"], theirs: Float[np.ndarray, "*resamples others"]
) -> Float[np.ndarray, "*resamples"]:
    """Return Mann-Whitney's U divided by the number of pairs."""
    step = np.sign(ours[..., :, None] - theirs[..., None, :])
    return (0.5 * (step + 1)).mean((-2, -1))


def _compare(
    strata: Strata,
    baseline: Strata,
    statistic: Callable[..., Any],
    generator: np.random.Generator,
    resamples: int,
    together: Together,
    baseline_together: Together,
) -> Estimate:
    """Return a statistic of two sets of strata. Strata without a label get one of their own."""
    ours = [(0, task) for task in range(len(strata))] if together is None else together
    theirs = [(1, task) for task in range(len(baseline))] if baseline_together is None else baseline_together
    found = _estimate([*strata, *baseline], statistic, generator, resamples, [*ours, *theirs])
    return replace(found, runs=min(_count(strata, together), _count(baseline, baseline_together)))


def _estimate(
    samples: Strata, statistic: Callable[..., Any], generator: np.random.Generator, resamples: int, together: Together
) -> Estimate:
    samples = [np.asarray(sample, np.float64) for sample in samples]
    value, ends = _bootstrap(samples, statistic, generator, resamples, together)
    return Estimate(float(value), ends and Interval(float(ends[0]), float(ends[1])), _count(samples, together))


def _bootstrap(
    samples: Sequence[Float64[np.ndarray, "*statistics runs"]],
    statistic: Callable[..., Any],
    generator: np.random.Generator,
    resamples: int,
    together: Together,
) -> tuple[Any, tuple[Any, Any] | None]:
    """Return the statistic and the ends of its interval (None: a sample has fewer than two runs)."""
    if not samples or any(sample.shape[-1] == 0 for sample in samples):
        raise ValueError("every task needs at least one run")
    value = statistic(*samples, axis=-1)
    labels, sizes = together or range(len(samples)), _sizes(samples, together)
    if min(sizes.values()) < 2:
        return value, None

    def of_indices(*drawn: np.ndarray, axis: int = -1) -> Any:
        indices = dict(zip(sizes, drawn, strict=True))
        return statistic(*(x[..., indices[label]] for x, label in zip(samples, labels, strict=True)), axis=axis)

    # scipy resamples its samples independently, as the strata of Agarwal et al. It gets the indices of runs, so that
    # strata of the same runs are resampled together.
    found = scipy.stats.bootstrap(
        [np.arange(size) for size in sizes.values()], of_indices, n_resamples=resamples, vectorized=True, axis=-1,
        confidence_level=CONFIDENCE, method="percentile", rng=generator,
    ).confidence_interval  # fmt: skip
    return value, (found.low, found.high)


def _sizes(samples: Sequence[np.ndarray], together: Together) -> dict[Hashable, int]:
    """Return the number of runs of each label."""
    found: dict[Hashable, int] = {}
    for sample, label in zip(samples, together or range(len(samples)), strict=True):
        if found.setdefault(label, sample.shape[-1]) != sample.shape[-1]:
            raise ValueError(f"{sample.shape[-1]} scores of {found[label]} runs that are drawn together")
    return found


def _count(samples: Sequence[np.ndarray], together: Together) -> int:
    return sum(_sizes(samples, together).values())
