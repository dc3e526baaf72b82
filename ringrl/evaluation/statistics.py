"""Statistics over few training runs: aggregates, comparisons and profiles, with stratified bootstrap intervals.

After Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice" (rliable). A *score*
is one number per training run (seed) and task. Scores come as *strata*, one float array (runs,) per task; tasks may
have different numbers of runs. The bootstrap draws runs with replacement within each task, so that it asks: had other
seeds been trained, how different would the number be? Episodes of one run are not independent evidence about training,
so they are averaged first and never resampled.

One run may be scored in several tasks (a policy of several, or one tried in others). Its scores rise and fall together,
so `together` names the tasks of which that is so, and the bootstrap draws their runs once for all of them.

One run says nothing about how much runs differ: where any stratum has fewer than two, the interval is absent (None),
not of width zero.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import numpy as np
import scipy.stats  # type: ignore[import-untyped]
from jaxtyping import Float, Float64

Metric = Literal["first", "last", "mean", "best"]
METRICS: tuple[Metric, ...] = get_args(Metric)

Runs = Float[np.ndarray, "runs"]
Strata = Sequence[Runs]
Together = Sequence[Hashable] | None  # per task a label: those of one label have the same runs, in the same order


class Aggregate(Protocol):
    """A statistic of scores along one axis, as numpy's and scipy's own are."""

    def __call__(self, scores: np.ndarray, *, axis: int = -1) -> Any: ...


@dataclass(frozen=True)
class Interval:
    """A confidence interval, both ends included."""

    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Estimate:
    """A statistic, its interval (None: too few runs to tell), and the number of runs it stands on."""

    value: float
    interval: Interval | None
    runs: int


def stream_metric(returns: Float[np.ndarray, "*streams episodes"], metric: Metric) -> Float[np.ndarray, "*streams"]:
    """One number per episode stream: its first, last, mean or best return ("best" is the AT paper's best-of-n)."""
    if metric == "first":
        return returns[..., 0]
    if metric == "last":
        return returns[..., -1]
    return returns.mean(-1) if metric == "mean" else returns.max(-1)


def interquartile_mean(scores: Float[np.ndarray, "..."], *, axis: int | None = -1) -> Any:
    """Mean of the middle half: floor(n/4) scores are left out at either end (axis None: of all scores together)."""
    return scipy.stats.trim_mean(scores, proportiontocut=0.25, axis=axis)


def estimate(
    strata: Strata,
    aggregate: Aggregate = interquartile_mean,
    *,
    generator: np.random.Generator,
    together: Together = None,
    confidence: float = 0.95,
    resamples: int = 2000,
) -> Estimate:
    """An aggregate of all runs of all tasks together, with its stratified bootstrap interval (percentile method).

    Args:
        strata: per task, the scores of its runs (runs,).
        aggregate: interquartile_mean, numpy.mean, numpy.median, optimality_gap, ...
        generator: where the resampling gets its randomness from.
        together: a label per task; tasks of one label are those of the same runs, score by score. None: none are.
        confidence: probability that the interval is meant to cover.
        resamples: bootstrap resamples.
    """
    return _bootstrap(strata, _pooled(aggregate), generator, confidence, resamples, together)


def difference(
    strata: Strata,
    baseline: Strata,
    aggregate: Aggregate = interquartile_mean,
    *,
    generator: np.random.Generator,
    together: Together = None,
    baseline_together: Together = None,
    confidence: float = 0.95,
    resamples: int = 2000,
) -> Estimate:
    """aggregate(strata) - aggregate(baseline); `runs` is the smaller number.

    `together` and `baseline_together` are as in `estimate`, of either side; a label of both sides is of runs that are
    on both, score by score. Without them all runs were trained independently.
    """
    count = len(strata)

    def contrast(*samples: np.ndarray, axis: int = -1) -> Any:
        pooled = _pooled(aggregate)
        return pooled(*samples[:count], axis=axis) - pooled(*samples[count:], axis=axis)

    return _compare(strata, baseline, contrast, generator, confidence, resamples, together, baseline_together)


def probability_of_improvement(
    strata: Strata,
    baseline: Strata,
    *,
    generator: np.random.Generator,
    together: Together = None,
    baseline_together: Together = None,
    confidence: float = 0.95,
    resamples: int = 2000,
) -> Estimate:
    """Probability that a run beats a run of the baseline on the same task, averaged over tasks; a tie is half a win.

    Task k of `strata` is compared with task k of `baseline`. `runs`, `together` and `baseline_together` are as in
    `difference`.
    """
    if len(strata) != len(baseline):
        raise ValueError(f"{len(strata)} tasks cannot be compared with {len(baseline)}")
    count = len(strata)

    def wins(*samples: np.ndarray, axis: int = -1) -> Any:
        per_task = [_wins(ours, theirs) for ours, theirs in zip(samples[:count], samples[count:], strict=True)]
        return np.mean(per_task, axis=0)

    return _compare(strata, baseline, wins, generator, confidence, resamples, together, baseline_together)


def median_of_tasks(
    strata: Strata, *, generator: np.random.Generator, confidence: float = 0.95, resamples: int = 2000
) -> Estimate:
    """Median over tasks of the mean over runs: as tables of many tasks show it (`estimate` pools all runs)."""

    def middle(*samples: np.ndarray, axis: int = -1) -> Any:
        return np.median(np.stack([sample.mean(axis) for sample in samples]), axis=0)

    return _bootstrap(strata, middle, generator, confidence, resamples)


def optimality_gap(scores: Float[np.ndarray, "..."], *, axis: int | None = -1, optimum: float = 100.0) -> Any:
    """How far scores fall short of an optimum on average; what exceeds it makes up for nothing. Lower is better.

    An aggregate for `estimate`. With 100, the normalised score of the highest return there can be, it is of
    normalised scores.
    """
    return optimum - np.minimum(scores, optimum).mean(axis)


@dataclass(frozen=True)
class Profile:
    """For each threshold, the fraction of runs that score higher, with its pointwise interval (None: too few runs).

    Attributes:
        thresholds: scores (T,), ascending.
        fractions: of all runs of all tasks together, (T,), in [0, 1], never rising.
        low: lower ends of the intervals (T,).
        high: upper ends (T,).
        runs: how many it stands on.
    """

    thresholds: Float64[np.ndarray, " thresholds"]
    fractions: Float64[np.ndarray, " thresholds"]
    low: Float64[np.ndarray, " thresholds"] | None
    high: Float64[np.ndarray, " thresholds"] | None
    runs: int


def performance_profile(
    strata: Strata,
    thresholds: Float[np.ndarray, " thresholds"],
    *,
    generator: np.random.Generator,
    together: Together = None,
    confidence: float = 0.95,
    resamples: int = 2000,
) -> Profile:
    """The whole distribution of scores over runs and tasks, which an aggregate makes one number of.

    Where the profile of one method lies above another's at every threshold, it is better whatever counts as good.

    Args:
        strata: per task, the scores of its runs (runs,); normalised, where there are several tasks.
        thresholds: scores to ask for (T,).
        generator: where the resampling gets its randomness from.
        together: as in `estimate`.
        confidence: probability that the interval at one threshold is meant to cover; not of all at once.
        resamples: bootstrap resamples.
    """
    thresholds = np.sort(np.asarray(thresholds, np.float64))
    # One row per threshold: the bootstrap draws the same runs for all of them.
    above = [(np.asarray(runs, np.float64) > thresholds[:, None]).astype(np.float64) for runs in strata]
    fractions, ends = _resample(
        above, _pooled(lambda scores, *, axis=-1: scores.mean(axis)), generator, confidence, resamples, together
    )
    low, high = ends or (None, None)
    return Profile(thresholds, fractions, low, high, _count(strata, together))


def _pooled(aggregate: Aggregate) -> Callable[..., Any]:
    """The aggregate of several samples together."""

    def of_all(*samples: np.ndarray, axis: int = -1) -> Any:
        return aggregate(np.concatenate(samples, axis=axis), axis=axis)

    return of_all


def _wins(
    ours: Float[np.ndarray, "*resamples runs"], theirs: Float[np.ndarray, "*resamples others"]
) -> Float[np.ndarray, "*resamples"]:
    """Mann-Whitney's U over the number of pairs."""
    step = np.sign(ours[..., :, None] - theirs[..., None, :])
    return (0.5 * (step + 1)).mean((-2, -1))


def _compare(
    strata: Strata,
    baseline: Strata,
    statistic: Callable[..., Any],
    generator: np.random.Generator,
    confidence: float,
    resamples: int,
    together: Together,
    baseline_together: Together,
) -> Estimate:
    """A statistic of two sides."""
    apart = [[(side, task) for task in range(len(of))] for side, of in enumerate((strata, baseline))]
    labels = [
        *(apart[0] if together is None else together),
        *(apart[1] if baseline_together is None else baseline_together),
    ]
    found = _bootstrap([*strata, *baseline], statistic, generator, confidence, resamples, labels)
    return Estimate(found.value, found.interval, min(_count(strata, together), _count(baseline, baseline_together)))


def _bootstrap(
    samples: Strata,
    statistic: Callable[..., Any],
    generator: np.random.Generator,
    confidence: float,
    resamples: int,
    together: Together = None,
) -> Estimate:
    samples = [np.asarray(sample, np.float64) for sample in samples]
    value, ends = _resample(samples, statistic, generator, confidence, resamples, together)
    return Estimate(float(value), ends and Interval(float(ends[0]), float(ends[1])), _count(samples, together))


def _resample(
    samples: Sequence[Float64[np.ndarray, "*statistics runs"]],
    statistic: Callable[..., Any],
    generator: np.random.Generator,
    confidence: float,
    resamples: int,
    together: Together = None,
) -> tuple[Any, tuple[Any, Any] | None]:
    """The statistic and the ends of its interval, where every sample has two runs at least."""
    if not samples or any(sample.shape[-1] == 0 for sample in samples):
        raise ValueError("every task needs at least one run")
    value = statistic(*samples, axis=-1)
    labels, sizes = _labels(samples, together), _sizes(samples, together)
    if min(sizes.values()) < 2:
        return value, None

    def of_drawn(*drawn: np.ndarray, axis: int = -1) -> Any:
        places = dict(zip(sizes, drawn, strict=True))
        return statistic(*(x[..., places[label]] for x, label in zip(samples, labels, strict=True)), axis=axis)

    # Several samples are resampled independently of one another: exactly the strata of Agarwal et al. What is drawn are
    # the places of runs, so that samples of the same runs get the same ones.
    found = scipy.stats.bootstrap(
        [np.arange(size) for size in sizes.values()],
        of_drawn,
        n_resamples=resamples,
        vectorized=True,
        axis=-1,
        confidence_level=confidence,
        method="percentile",
        rng=generator,
    ).confidence_interval
    return value, (found.low, found.high)


def _labels(samples: Sequence[np.ndarray], together: Together) -> Sequence[Hashable]:
    """What is drawn with what; without a word, every task by itself."""
    return range(len(samples)) if together is None else together


def _sizes(samples: Sequence[np.ndarray], together: Together) -> dict[Hashable, int]:
    """Runs of each label."""
    found: dict[Hashable, int] = {}
    for sample, label in zip(samples, _labels(samples, together), strict=True):
        if found.setdefault(label, sample.shape[-1]) != sample.shape[-1]:
            raise ValueError(f"{sample.shape[-1]} scores of {found[label]} runs that are drawn together")
    return found


def _count(samples: Sequence[np.ndarray], together: Together = None) -> int:
    return sum(_sizes(samples, together).values())
