"""Like against like: the page says whether what it compares was rolled out from the same starts."""

from ringrl.evaluation.records import Results
from ringrl.study.figures import curve_chart
from ringrl.study.report import write_report
from ringrl.study.report_cells import gather
from ringrl.study.report_compare import cautions, compare
from ringrl.study.report_method import facts
from ringrl.study.report_starts import starts_facts, starts_warning


def seeded(records, length: int):
    """Stream i of so many episodes starts from the seeds i n to i n + n - 1."""
    return [
        record.model_copy(
            update={
                "environment_seed": index * length,
                "start_seeds": tuple(range(index * length, (index + 1) * length)),
            }
        )
        for index, record in enumerate(records)
    ]


def streams(make_rollouts, length: int, count: int, seed: int = 0, **changes):
    """One run's streams, `count` of them."""
    pairs = [make_rollouts(length, seed, 100.0 + index, **changes) for index in range(-(-count // 2))]
    return seeded([record for pair in pairs for record in pair][:count], length)


def test_as_many_episodes_from_the_same_seeds_are_the_same_starts(make_rollouts):
    records = [r for n in (1, 2, 4) for seed in range(2) for r in streams(make_rollouts, n, 8 // n, seed)]
    records += streams(make_rollouts, 1, 8, method="random", train_trajectories=None, target_return=None)
    grid = gather(records)
    assert starts_warning(grid) is None
    assert starts_facts(grid) == ["cartpole_swingup: 8 starts, the same for all"]
    assert ("Starts", starts_facts(grid)) in facts(Results((), (), ()), grid)
    assert "same starts" not in curve_chart(grid).caption


def test_as_many_streams_of_other_lengths_are_not(make_rollouts, write_results, tmp_path):
    """As it was once: a length of 1 from the starts that the streams of 4 begin with."""
    records = [r for n in (1, 4) for r in streams(make_rollouts, n, 5)]
    grid = gather(records)
    said = "5 starts for Agentic Transformer (1 trajectory), 20 starts for Agentic Transformer (4 trajectories)"
    assert starts_facts(grid) == [f"cartpole_swingup: {said}"]
    assert said in str(starts_warning(grid))
    assert "Not all points are of the same starts" in curve_chart(grid).caption
    page = write_report([write_results(records)], tmp_path / "report").read_text()
    assert f"Not all was rolled out from the same starts: on cartpole_swingup {said}." in page


def test_streams_that_drew_on_started_elsewhere_than_those_with_a_seed_each(make_rollouts):
    """Results from before episodes had seeds: the first start is that of the seed, the next is another one."""
    old = [make_rollouts(2, 0, 1.0)[0]]
    assert old[0].starts == ((0, 0), (0, 1))
    new = streams(make_rollouts, 1, 2)
    assert starts_warning(gather([*old, *new])) is not None
    assert starts_warning(gather([*old, *(r.model_copy(update={"start_seeds": ()}) for r in new[:1])])) is not None
    alone = [r.model_copy(update={"start_seeds": ()}) for r in new]
    assert starts_warning(gather([*alone, *streams(make_rollouts, 1, 2, train_trajectories=8)])) is None


def test_training_seeds_with_other_starts_are_told(make_rollouts):
    records = [*streams(make_rollouts, 1, 4), *streams(make_rollouts, 1, 2, seed=1)]
    assert "2 or 4 starts, which differ by training seed, for" in str(starts_warning(gather(records)))


def test_comparisons_across_other_starts_are_told(make_rollouts, write_results):
    a = write_results(streams(make_rollouts, 2, 2), "a.jsonl")
    b = write_results(streams(make_rollouts, 2, 4), "b.jsonl")
    assert any("not rolled out from the same starts: Agentic" in said for said in cautions(compare([a], [b])))
    assert cautions(compare([a], [a])) == []
