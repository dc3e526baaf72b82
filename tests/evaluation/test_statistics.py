"""The statistics against results by hand, by brute force, and from rliable."""

import itertools
from functools import partial

import numpy as np
import pytest
import scipy.stats  # type: ignore[import-untyped]

from ringrl.evaluation import statistics
from ringrl.evaluation.statistics import (
    Estimate,
    difference,
    estimate,
    holm,
    interquartile_mean,
    mean_test,
    probability_of_improvement,
    rank_correlation,
)


def test_interquartile_mean_by_hand():
    assert interquartile_mean(np.array([1000.0, 1, 2, 3, 4, 5, 6, -1000])) == 3.5  # two are left out at either end
    assert interquartile_mean(np.array([0.0, 3, 9])) == 4  # floor(3/4) = 0: none is left out
    assert interquartile_mean(np.array([0.0, 3, 4, 90])) == 3.5
    np.testing.assert_array_equal(interquartile_mean(np.arange(8.0).reshape(2, 4)), [1.5, 5.5])
    assert interquartile_mean(np.arange(8.0).reshape(2, 4), axis=None) == 3.5


def test_one_run_has_no_interval():
    found = estimate([np.array([5.0])])
    assert (found.value, found.runs) == (5.0, 1)
    pair, one = np.array([5.0, 6.0]), np.array([1.0])
    for lone in (found, estimate([pair, one]), difference(pair, one, paired=False)):
        assert np.isnan([lone.low, lone.high]).all()


def test_no_run_raises():
    for strata in ([np.array([])], []):
        with pytest.raises(ValueError, match="at least one run"):
            estimate(strata)


def test_interval_is_the_percentile_of_every_possible_resample(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 40_000)
    scores = np.array([1.0, 2.0, 4.0, 8.0])
    means = [np.mean(draw) for draw in itertools.product(scores, repeat=4)]
    expected = np.quantile(means, [0.025, 0.975])
    found = estimate([scores], np.mean)
    assert found.value == 3.75
    np.testing.assert_allclose([found.low, found.high], expected, atol=0.26)  # one step of the means


def test_tasks_are_strata():
    """Two tasks of different level: resampling across them would give an interval hundreds wide."""
    easy, hard = np.array([900.0, 901, 902]), np.array([10.0, 11, 12])
    found = estimate([easy, hard], np.mean)
    assert found.value == 456
    assert found.runs == 6
    assert 455 <= found.low < 456 < found.high <= 457


def test_tasks_of_the_same_runs_are_drawn_together():
    """A second task with the same scores adds no evidence, so the interval does not shrink."""
    scores = np.random.default_rng(7).integers(100, size=8).astype(float)  # sums are exact
    one = estimate([scores])
    assert estimate([scores] * 3, together="aaa") == one
    apart = estimate([scores] * 3)
    assert apart.high - apart.low < 0.7 * (one.high - one.low)
    assert np.isnan(estimate([scores, scores[:1] + 5], together="ab").low), "label b has one run"
    with pytest.raises(ValueError, match="7 scores of 8 runs that are drawn together"):
        estimate([scores, scores[:7]], together="aa")


def test_paired_runs_are_resampled_together():
    """Each run gains between 1 and 2, while runs differ by far more."""
    random = np.random.default_rng(8)
    before = random.normal(0, 50, 10)
    after = before + random.uniform(1, 2, 10)
    paired, apart = (difference(after, before, np.mean, paired=paired) for paired in (True, False))
    assert paired.value == apart.value == pytest.approx((after - before).mean())
    assert 1 < paired.low < paired.high < 2
    assert apart.low < -10
    alone = estimate([after - before], np.mean)
    np.testing.assert_allclose((paired.low, paired.high), (alone.low, alone.high))
    with pytest.raises(ValueError, match="9 scores of 10 runs that are drawn together"):
        difference(after, before[:9], paired=True)


def test_intervals_of_runs_scored_in_two_tasks_have_their_coverage(monkeypatch):
    """Two tasks of the same eight runs with correlated scores: resampled independently, intervals are too narrow."""
    monkeypatch.setattr(statistics, "RESAMPLES", 500)
    random, missed = np.random.default_rng(9), {"together": 0, "apart": 0}
    for _ in range(200):
        runs = random.normal(size=8)
        tasks = [runs + 0.3 * random.normal(size=8) for _ in range(2)]
        for name, labels in (("together", "aa"), ("apart", None)):
            found = estimate(tasks, np.mean, together=labels)
            missed[name] += not found.low <= 0 <= found.high
    assert missed["together"] < 35 < 45 < missed["apart"], "with 8 runs a percentile interval misses about 26 of 200"


def test_the_same_scores_have_the_same_interval():
    first, second = (estimate([np.array([1.0, 2.0, 4.0, 8.0])]) for _ in range(2))
    assert first == second


def test_equal_runs_have_an_interval_of_no_width():
    assert estimate([np.full(3, 4.0)]) == Estimate(4.0, 4.0, 4.0, 3)


def test_median_and_mean_aggregate():
    scores = np.array([1.0, 2, 3, 10])
    assert estimate([scores], np.median).value == 2.5
    assert estimate([scores], np.mean).value == 4


def test_difference():
    found = difference(np.array([10.0, 11, 12]), np.array([1.0, 2, 3, 2]), np.mean, paired=False)
    assert (found.value, found.runs) == (9, 3)
    assert 0 < found.low < 9 < found.high < found.low + 4


def test_probability_of_improvement_by_hand():
    ours, theirs = np.array([1.0, 3, 5]), np.array([2.0, 3])
    # 1: loses twice; 3: wins, ties; 5: wins twice -> 3.5 of 6
    found = probability_of_improvement(ours, theirs, paired=False)
    assert (found.value, found.runs) == (pytest.approx(3.5 / 6), 2)
    assert 0 <= found.low < found.value < found.high <= 1


SCORES = np.random.default_rng(0).gamma(2.0, 1.0, (10, 3)) * [1, 5, 20]  # of 10 runs of 3 tasks
OTHERS = np.random.default_rng(1).gamma(2.0, 1.2, (7, 3)) * [1, 5, 20]
AGGREGATES = {"interquartile mean": interquartile_mean, "mean": np.mean}
# Value and interval from rliable 1.2.0 (arch 7.2.0, pandas 2.3.3).
RLIABLE = {
    "interquartile mean": (8.795706624129734, 6.9954541542988435, 10.794543361643985),
    "mean": (13.134341709868012, 9.55268486527562, 18.174901236132904),
}


def assert_agrees(found: Estimate, value: float, low: float, high: float) -> None:
    """Point estimates are equal, intervals agree to the resampling."""
    assert found.value == pytest.approx(value, rel=1e-12)
    np.testing.assert_allclose([found.low, found.high], [low, high], atol=0.04 * (high - low))


@pytest.mark.parametrize("name", RLIABLE)
def test_rliables_numbers(name: str, monkeypatch) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 10_000)
    assert_agrees(estimate(list(SCORES.T), AGGREGATES[name]), *RLIABLE[name])


def test_rliables_probability_of_improvement() -> None:
    """rliable averages over tasks."""
    found = [probability_of_improvement(*sides, paired=False).value for sides in zip(SCORES.T, OTHERS.T, strict=True)]
    assert np.mean(found) == pytest.approx(0.35714285714285715, rel=1e-12)


class TestAgainstRliable:
    """The same with rliable itself, where it is installed."""

    @pytest.fixture
    def library(self):
        try:
            from rliable import library
        except Exception as error:  # rliable 1.2 imports an arch that pandas 3 breaks with a TypeError
            pytest.skip(f"rliable cannot be imported ({error}); pip install rliable 'pandas<3' to compare with it")
        return library

    def test_aggregates(self, library, monkeypatch):
        from rliable import metrics

        monkeypatch.setattr(statistics, "RESAMPLES", 10_000)
        aggregates = {"interquartile mean": metrics.aggregate_iqm, "mean": metrics.aggregate_mean}
        np.random.seed(0)  # noqa: NPY002 (rliable draws from the global generator)
        points, intervals = library.get_interval_estimates(
            {"a": SCORES}, lambda scores: np.array([of(scores) for of in aggregates.values()]), reps=10_000
        )
        for index, name in enumerate(aggregates):
            ours = estimate(list(SCORES.T), AGGREGATES[name])
            assert_agrees(ours, points["a"][index], *intervals["a"][:, index])

    def test_probability_of_improvement(self, library, monkeypatch):
        from rliable import metrics

        monkeypatch.setattr(statistics, "RESAMPLES", 10_000)
        np.random.seed(0)  # noqa: NPY002
        points, intervals = library.get_interval_estimates(
            {"a,b": (SCORES[:, :1], OTHERS[:, :1])}, metrics.probability_of_improvement, reps=5000
        )
        ours = probability_of_improvement(SCORES[:, 0], OTHERS[:, 0], paired=False)
        assert_agrees(ours, float(points["a,b"]), *intervals["a,b"].ravel())


def test_t_tests_agree_with_scipy():
    random = np.random.default_rng(0)
    ours, theirs = random.normal(size=(2, 6))
    for paired, scipy_test in ((True, scipy.stats.ttest_rel), (False, partial(scipy.stats.ttest_ind, equal_var=False))):
        found, expected = mean_test(ours, theirs, paired=paired), scipy_test(ours, theirs)
        assert (found.difference, found.p_value) == pytest.approx((ours.mean() - theirs.mean(), expected.pvalue))
        low, high = expected.confidence_interval(0.95)
        multiple = 1 + scipy.stats.t.ppf(0.8, expected.df) / scipy.stats.t.ppf(0.975, expected.df)
        assert found.detectable == pytest.approx(multiple * (high - low) / 2)
    assert mean_test(ours[:1], theirs, paired=False) is None
    assert mean_test(ours[:1], theirs[:1], paired=True) is None


@pytest.mark.parametrize(("paired", "runs"), [(False, 5), (True, 6)])
def test_a_detectable_difference_is_found_four_times_in_five(paired, runs):
    """The detectable difference, squared and averaged over samples, is found in 80 % of them; no difference in 5 %."""
    random = np.random.default_rng(1)
    pairs = random.normal(size=(1500, 2, runs))
    size = np.sqrt(np.mean([mean_test(*pair, paired=paired).detectable ** 2 for pair in pairs]))
    for shift, expected in ((size, 0.8), (0.0, 0.05)):
        found = [mean_test(ours + shift, theirs, paired=paired).p_value < 0.05 for ours, theirs in pairs]
        assert np.mean(found) == pytest.approx(expected, abs=0.03)


def test_equal_runs_are_no_evidence_and_equal_differences_are():
    runs = np.array([0.1, 0.2, 0.3])
    assert mean_test(runs, runs * 3 / 3 + 1e-16, paired=True).p_value > 0.9
    assert mean_test(runs + 5, runs, paired=True).p_value < 1e-6


def test_holm_by_hand():
    found = holm(np.array([0.03, 0.001, np.nan, 0.02, 0.9]))
    assert found[[0, 1, 3, 4]].tolist() == pytest.approx([0.06, 0.004, 0.06, 0.9])
    assert np.isnan(found[2])
    assert holm(np.array([0.6, 0.7])).tolist() == [1.0, 1.0]


def test_holm_rarely_finds_a_difference_in_a_table_without_any():
    """The chance of any corrected p-value below 5 % is at most 5 %, for dependent tests too."""
    random = np.random.default_rng(2)
    tables = scipy.stats.norm.sf(random.normal(size=(4000, 8)) * 0.7 + random.normal(size=(4000, 1)) * 0.7)
    assert np.mean([holm(table).min() < 0.05 for table in tables]) < 0.055


def test_rank_correlations_agree_with_scipy():
    random = np.random.default_rng(3)
    x = random.integers(0, 6, size=12).astype(np.float64)  # with ties
    y = x + random.normal(size=12)
    found = rank_correlation(x, y)
    assert found.value == pytest.approx(scipy.stats.spearmanr(x, y).statistic)
    assert found.low < found.value < found.high
    assert rank_correlation(np.exp(x), y**3) == found, "only ranks count"
    assert rank_correlation(x, np.ones(12)).value == 0
