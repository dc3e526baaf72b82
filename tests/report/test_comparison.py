"""Two sets of results compared."""

import csv
import io

import pytest
from rich.console import Console

from ringrl.cli import main
from ringrl.errors import UserError
from ringrl.report.comparison import compare, headline, starts_caution, write_comparison
from ringrl.report.results import usual_settings


def settings(found) -> list[tuple[str, str, str]]:
    return list(found.settings.itertuples(index=False, name=None))


def test_a_difference_by_hand(make_study, tmp_path):
    a, b = make_study(tmp_path / "a", seeds=4), make_study(tmp_path / "b", seeds=4, level=450.0)
    found = compare([a], [b])
    assert found.pairs["method"].tolist() == [
        "Agentic Transformer, 1 trajectory", "Agentic Transformer, 2 trajectories",
    ]  # fmt: skip
    for _, pair in found.pairs.iterrows():
        assert [pair["change"], pair["low"], pair["high"]] == pytest.approx([50, 50, 50])
        assert (pair["wins"], pair["paired"], pair["verdict"]) == (1.0, True, "higher")
    assert headline(found) == "B returns more in 2 of 2 comparisons than A."
    assert headline(compare([b], [a])) == "B returns less in 2 of 2 comparisons than A."
    assert headline(compare([a], [a])) == "It is not resolved which is better."


def test_few_seeds_have_no_direction(make_study, tmp_path):
    a, b = make_study(tmp_path / "a", seeds=3), make_study(tmp_path / "b", seeds=3, level=450.0)
    found = compare([a], [b])
    assert headline(found) == "Fewer than 4 training seeds a side cannot show which is better."
    assert set(found.pairs["verdict"]) == {"not resolved"}


def test_no_direction_where_no_policy_beats_random(make_ablation, write_results):
    a, b = ([r for r in make_ablation(step=step) if r.method != "random"] for step in (50.0, 100.0))
    random = {"method": "random", "train_trajectories": None, "returns": (2000.0,)}
    better = [r.model_copy(update=random) for r in make_ablation() if r.method == "random"]
    paths = [[write_results([*side, *better], name)] for side, name in ((a, "a.jsonl"), (b, "b.jsonl"))]
    assert headline(compare(*paths)) == (
        "No policy clearly beats the random policy, so these results cannot show which is better."
    )
    assert headline(compare(*paths)._replace(like_random=[])) == "B returns more in 2 of 4 comparisons than A."


def test_the_same_runs_prompted_are_compared_run_by_run(make_rollouts, write_results):
    """Runs differ by 100. The prompt raises each return by 40."""
    levels = {"bare": (0.0, {}), "prompted": (40.0, {"prompt_trajectories": 3, "prompt_seed": 0})}
    bare, prompted = (
        write_results(
            [
                record
                for seed in range(4)
                for record in make_rollouts(2, seed, 100.0 * seed + gain, checkpoint_hash=str(seed), **known)
            ],
            f"{name}.jsonl",
        )
        for name, (gain, known) in levels.items()
    )
    found = compare([bare], [prompted])
    pair = found.pairs.iloc[0]
    assert (pair["paired"], pair["change"], pair["verdict"]) == (True, pytest.approx(40), "higher")


def test_a_prompt_is_not_compared_with_its_control(make_rollouts, write_results):
    same = {"prompt_trajectories": 3, "prompt_seed": 0, "checkpoint_hash": "c"}
    a, b = (
        write_results([r for seed in range(4) for r in make_rollouts(2, seed, 100.0, **same, **more)], f"{name}.jsonl")
        for name, more in {"a": {}, "b": {"prompt_control": "shuffled"}}.items()
    )
    with pytest.raises(UserError):
        compare([a], [b])


def test_one_seed_has_no_interval_and_no_probability(make_study, tmp_path):
    a, b = make_study(tmp_path / "a", seeds=1), make_study(tmp_path / "b", seeds=3, level=450.0)
    page, _ = write_comparison([a], [b], tmp_path / "report")
    read = list(csv.DictReader(io.StringIO((page.parent / "tables" / "comparison.csv").read_text())))
    for name in ("wins", "low", "p", "detectable"):
        assert {row[name] for row in read} == {""}
    assert "Fewer than 4 training seeds a side cannot show which is better." in page.read_text()


def test_settings_that_differ(make_rollouts, write_results):
    a = write_results(make_rollouts(2, 0, 1.0, settings={"model.layers": "5"}), "a.jsonl")
    b = write_results(make_rollouts(2, 0, 1.0, settings={"model.width": "16"}), "b.jsonl")
    found = compare([a], [b])
    defaults = usual_settings()
    assert settings(found) == [
        ("model.layers", "5", defaults["model.layers"]), ("model.width", defaults["model.width"], "16")
    ]  # fmt: skip
    assert settings(compare([a], [a])) == []


def test_what_the_records_hold_is_compared_too(make_rollouts, write_results):
    a = write_results(make_rollouts(2, 0, 1.0), "a.jsonl")
    b = write_results(make_rollouts(2, 0, 1.0, target_policy="0.9x", versions={"jax": "0.11"})[:1], "b.jsonl")
    found = compare([a], [b])
    assert len(found.pairs) == 1, "only the target differs, and there is one such cell on either side"
    assert ("target_policy", "data_best", "0.9x") in settings(found)
    assert ("version of jax", "0.10.2", "0.11") in settings(found)
    assert ("streams per training seed", "2", "1") in settings(found)


def test_cells_of_one_side_are_named(make_ablation, write_results):
    a = write_results(make_ablation(lengths=(1, 2)), "a.jsonl")
    b = write_results(make_ablation(lengths=(2, 4)), "b.jsonl")
    found = compare([a], [b])
    assert found.unmatched == [
        "Only in A: cartpole_swingup, Agentic Transformer, 1 trajectory.",
        "Only in B: cartpole_swingup, Agentic Transformer, 4 trajectories.",
    ]
    assert len(found.pairs) == 2, "the random policy has nothing to compare"


def test_nothing_in_common_is_an_error(make_ablation, write_results, tmp_path):
    a = write_results(make_ablation(), "a.jsonl")
    b = write_results(make_ablation(task="walker_walk"), "b.jsonl")
    with pytest.raises(UserError, match=r"a\.jsonl and .*b\.jsonl have no task, method and context length in common"):
        write_comparison([a], [b], tmp_path / "report")
    assert not (tmp_path / "report").exists()
    with pytest.raises(UserError, match=r"nowhere: no such file"):
        compare([a], [tmp_path / "nowhere"])


def test_the_page_its_files_and_the_terminal(make_study, tmp_path):
    a, b = make_study(tmp_path / "a"), make_study(tmp_path / "b", level=450.0)
    page, shown = write_comparison([a], [b], tmp_path / "report")
    next_to_page = {str(path.relative_to(page.parent)) for path in page.parent.rglob("*") if path.is_file()}
    tables = {f"tables/{name}.{kind}" for name in ("comparison", "settings") for kind in ("csv", "tex")}
    assert next_to_page == {"comparison.html", *tables}
    text = page.read_text()
    for expected in (str(a), str(b), "ringrl ablate plan.yaml", "+50.0"):
        assert expected in text, expected
    printed = io.StringIO()
    Console(file=printed, width=80).print(shown)
    assert "+50.0 [+50.0, +50.0]" in printed.getvalue()


def test_the_command_line(make_study, tmp_path, capsys):
    a, b = make_study(tmp_path / "a"), make_study(tmp_path / "b", level=450.0)
    output = tmp_path / "report"
    output.mkdir()
    (output / "index.html").write_text("the report of A")
    main(["report", "--compare", str(a), str(b), "--output", str(output)])
    message = capsys.readouterr().out
    assert "+50.0" in message
    assert message.rstrip().endswith("comparison.html")
    assert (output / "comparison.html").exists()
    assert (output / "index.html").read_text() == "the report of A"


def test_mistakes_on_the_command_line(make_study, tmp_path, capsys):
    a = make_study(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    other = tmp_path / "other.jsonl"
    other.write_text('{"protocol": 9}\n')
    for arguments, expected in (
        ([str(a), "--compare", str(a), str(a)], "cannot be combined with --compare"),
        (["--compare", str(a), str(tmp_path / "empty")], "no results in"),
        (["--compare", str(a), str(other)], "other.jsonl, line 1: has evaluation protocol 9"),
        ([str(a), str(other)], "other.jsonl, line 1: has evaluation protocol 9"),
        ([], "name files or folders, for example: ringrl report runs"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["report", *arguments, "--output", str(tmp_path / "report")])
        assert stop.value.code == 2
        message = capsys.readouterr().err
        assert expected in message
        assert message.count("\n") == 1
    assert not (tmp_path / "report").exists()


def test_comparisons_across_other_starts_are_reported(make_rollouts, write_results):
    a = write_results(make_rollouts(2, 0, 1.0), "a.jsonl")
    elsewhere = [r.model_copy(update={"environment_seed": 9 + r.environment_seed}) for r in make_rollouts(2, 0, 1.0)]
    b = write_results(elsewhere, "b.jsonl")
    assert "not rolled out from the same starts: Agentic" in str(starts_caution(compare([a], [b]).pairs))
    assert starts_caution(compare([a], [a]).pairs) is None
