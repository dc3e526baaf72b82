"""Two sets of results side by side."""

import csv
import io

import pytest
import yaml
from rich.console import Console

from ringrl.cli import main
from ringrl.errors import UserError
from ringrl.study.report_compare import cautions, compare, headline, write_comparison


def test_a_difference_by_hand(make_study, tmp_path):
    a, b = make_study(tmp_path / "a", seeds=3), make_study(tmp_path / "b", seeds=3, level=450.0)
    found = compare([a], [b])
    assert [pair.name for pair in found.pairs] == [
        "Agentic Transformer (1 trajectory)", "Agentic Transformer (2 trajectories)",
    ]  # fmt: skip
    for pair in found.pairs:
        assert pair.change.value == pytest.approx(50)
        assert pair.wins.value == 1.0
        assert 48 <= pair.change.interval.low <= 50 <= pair.change.interval.high <= 52
    assert headline(found) == "B returns more in 2 of 2 comparisons than A."
    assert headline(compare([b], [a])) == "B returns less in 2 of 2 comparisons than A."
    assert headline(compare([a], [a])) == "B and A make no clear difference."


def test_chance_is_spoken_of(make_study, make_ablation, write_results, tmp_path):
    a, b = make_study(tmp_path / "a", seeds=3), make_study(tmp_path / "b", seeds=3, level=450.0)
    (few,) = cautions(compare([a], [b]))
    assert "With 3 training seeds" in few
    assert cautions(compare([a], [a])) == []
    lengths = tuple(range(1, 21))
    many = [write_results(make_ablation(step=step, lengths=lengths), f"{step}.jsonl") for step in (0.0, 9.0)]
    assert cautions(compare(many[:1], many[1:])) == ["Of 22 comparisons, about 1 would look clear if nothing differed."]


def test_the_same_runs_prompted_are_compared_run_by_run(make_rollouts, write_results):
    """Runs lie 100 apart; the prompt gains each of them 40."""
    levels = {"bare": (0.0, {}), "prompted": (40.0, {"prompt_trajectories": 3, "prompt_seed": 0})}
    bare, prompted = (
        write_results(
            [
                record
                for seed in range(4)
                for record in make_rollouts(2, seed, 100.0 * seed + gain, checkpoint_hash=str(seed), **told)
            ],
            f"{name}.jsonl",
        )
        for name, (gain, told) in levels.items()
    )
    found = compare([bare], [prompted])
    (pair,) = found.pairs
    assert (pair.paired, pair.clear, pair.change.value) == (True, True, pytest.approx(40))
    (said,) = cautions(found)
    assert "all 4 runs would still change alike once in 8 times" in said


def test_one_seed_has_no_interval_and_no_probability(make_study, tmp_path):
    a, b = make_study(tmp_path / "a", seeds=1), make_study(tmp_path / "b", seeds=3, level=450.0)
    page, _ = write_comparison([a], [b], tmp_path / "report")
    read = list(csv.DictReader(io.StringIO((page.parent / "tables" / "comparison.csv").read_text())))
    assert {row["P(B > A)"] for row in read} == {""}
    assert all(row["B, low"] for row in read)
    assert "A, low" not in read[0]
    assert "One training seed: too few to say which is better." in page.read_text()


def test_settings_that_differ(make_study, tmp_path):
    a, b = make_study(tmp_path / "a"), make_study(tmp_path / "b", layers=3)
    config = next(b.glob("*_at_1_seed0")) / "config.yaml"
    config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | {"only": {"here": [1, 2]}}))
    assert compare([a], [b]).settings == (("model.layers", "1", "3"), ("only.here", "\N{EN DASH}", "[1, 2]"))
    assert compare([a], [a]).settings == ()


def test_what_the_results_say_of_themselves(make_rollouts, write_results):
    a = write_results(make_rollouts(2, 0, 1.0), "a.jsonl")
    b = write_results(make_rollouts(2, 0, 1.0, target_policy="0.9x", versions={"jax": "0.11"})[:1], "b.jsonl")
    found = compare([a], [b])
    assert len(found.pairs) == 1, "told apart by its target alone, and the only one of its kind"
    assert ("target_policy", "data_best", "0.9x") in found.settings
    assert ("version of jax", "0.10.2", "0.11") in found.settings
    assert ("streams per training seed", "2", "1") in found.settings


def test_cells_of_one_side_are_named(make_ablation, write_results):
    a = write_results(make_ablation(lengths=(1, 2)), "a.jsonl")
    b = write_results(make_ablation(lengths=(2, 4)), "b.jsonl")
    found = compare([a], [b])
    assert found.only_a == ("cartpole_swingup: Agentic Transformer (1 trajectory)",)
    assert found.only_b == ("cartpole_swingup: Agentic Transformer (4 trajectories)",)
    assert len(found.pairs) == 3


def test_nothing_in_common_is_an_error(make_ablation, write_results, tmp_path):
    a = write_results(make_ablation(), "a.jsonl")
    b = write_results(make_ablation(task="walker_walk"), "b.jsonl")
    with pytest.raises(UserError, match=r"a\.jsonl and .*b\.jsonl have no task, method and context length in common"):
        write_comparison([a], [b], tmp_path / "report")
    assert not (tmp_path / "report").exists()
    with pytest.raises(UserError, match=r"nowhere: no such file"):
        compare([a], [tmp_path / "nowhere"])


def test_the_page_its_files_and_the_terminal(make_study, tmp_path):
    a, b = make_study(tmp_path / "a"), make_study(tmp_path / "b", level=450.0, layers=2)
    page, shown = write_comparison([a], [b], tmp_path / "report")
    beside = {str(path.relative_to(page.parent)) for path in page.parent.rglob("*") if path.is_file()}
    tables = {f"tables/{name}.{kind}" for name in ("comparison", "settings") for kind in ("csv", "tex")}
    assert beside == {"index.html", "figures/difference.svg", "figures/difference.pdf", *tables}
    text = page.read_text()
    for expected in ("model.layers", str(a), str(b), "ringrl ablate plan.yaml", "+50.0"):
        assert expected in text, expected
    printed = io.StringIO()
    Console(file=printed, width=80).print(shown)
    assert "+50.0 [+49.0, +51.0]" in printed.getvalue()


def test_the_command_line(make_study, tmp_path, capsys):
    a, b = make_study(tmp_path / "a"), make_study(tmp_path / "b", level=450.0)
    output = tmp_path / "report"
    main(["report", "--compare", str(a), str(b), "--output", str(output)])
    said = capsys.readouterr().out
    assert "P(B > A)" in said
    assert said.rstrip().endswith("index.html")
    assert (output / "index.html").exists()


def test_mistakes_on_the_command_line(make_study, tmp_path, capsys):
    a = make_study(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    other = tmp_path / "other.jsonl"
    other.write_text('{"protocol": 9}\n')
    for arguments, expected in (
        ([str(a), "--compare", str(a), str(a)], "is given besides --compare"),
        (["--compare", str(a), str(tmp_path / "empty")], "no results in"),
        (["--compare", str(a), str(other)], "other.jsonl, line 1: written under evaluation protocol 9"),
        ([str(a), str(other)], "other.jsonl, line 1: written under evaluation protocol 9"),
        ([], "say where they are, for example: ringrl report runs"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["report", *arguments, "--output", str(tmp_path / "report")])
        assert stop.value.code == 2
        said = capsys.readouterr().err
        assert expected in said
        assert said.count("\n") == 1
    assert not (tmp_path / "report").exists()
