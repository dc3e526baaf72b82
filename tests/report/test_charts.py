"""What charts show."""

import json
import re

import pandas as pd
import pytest
import scipy.stats  # type: ignore[import-untyped]

from ringrl.report.charts import _episode_axis, all_charts
from ringrl.report.conclusion import overfitting_warning
from ringrl.report.drawing import PALETTE, chart_files, styles
from ringrl.report.page import write_report
from ringrl.report.provenance import training_losses, training_runs
from ringrl.report.results import read_results, tabulate
from ringrl.report.tables import loss_correlations, loss_points, loss_sentence, returns_table


def charts(records) -> dict:
    return charts_of(tabulate(records))


def charts_of(results) -> dict:
    runs, table = training_runs(results), returns_table(results)
    losses, held_out = training_losses(runs), loss_points(results, table, runs)
    return {chart.name: chart for chart in all_charts(results, table, losses, held_out)}


def points(panel) -> pd.DataFrame:
    """All rows of a panel that have a point."""
    names = {layer["data"]["name"] for layer in panel.spec["layer"] if layer["mark"]["type"] == "point"}
    return pd.DataFrame([row for name in names for row in panel.spec["datasets"][name]])


def styles_of(make_rollouts, *names: str, variants: tuple[str, ...] = ()) -> dict:
    records = [r for name in names for r in make_rollouts(1, 0, 1.0, method=name, train_trajectories=None)]
    records += [r for name in variants for r in make_rollouts(1, 0, 1.0, variant=name)]
    return styles(returns_table(tabulate(records)))


def test_every_method_has_its_own_style(make_rollouts):
    found = styles_of(make_rollouts, "bc", "td3", "random", variants=tuple(f"v{index}" for index in range(8)))
    assert len(set(found.values())) == 13
    assert len({style.colour for name, style in found.items() if name.startswith("Agentic")}) == 8
    assert [bool(style.dash) for style in found.values()] == [False] * 8 + [True] * 5


def test_a_method_has_one_colour_whatever_else_is_drawn(make_rollouts):
    names = ("bc", "td3", "random", "bc-10%", "td3+bc")
    alone = [styles_of(make_rollouts, name) for name in names] + [styles_of(make_rollouts, variants=("wide",))]
    together = styles_of(make_rollouts, *names, variants=("wide",))
    assert together == {method: style for found in alone for method, style in found.items()} | together
    assert {name: found[name] for found in alone for name in found} == together
    assert len({style.colour for style in together.values()}) == 8


@pytest.mark.parametrize(("length", "ticks"), [(2, [1, 2]), (30, [1, 4, 7, 10, 13, 16, 19, 22, 25, 28])])
def test_the_ticks_of_episodes_are_whole_numbers(length, ticks):
    assert _episode_axis(pd.Series([1, length])).to_dict()["axis"]["values"] == ticks


def test_a_panel_per_task_and_one_over_all(make_ablation):
    chart = charts([*make_ablation(seeds=2), *make_ablation(task="walker_walk", seeds=2)])["return_by_context"]
    assert [panel.title for panel in chart.panels] == [
        "All tasks, normalised score", "cartpole_swingup", "walker_walk"
    ]  # fmt: skip
    assert chart.methods == [
        "Agentic Transformer", "Behaviour cloning", "Random policy", "Dataset, all episodes", "Dataset, best episode"
    ]  # fmt: skip
    assert chart.dashed == "memory reset before each episode"
    assert "no interval" not in chart.caption
    found = points(chart.panels[1])
    kept = found[(found["memory"] == "with memory")].sort_values("x")
    assert (kept["x"].tolist(), kept["value"].tolist()) == ([1, 2, 4], pytest.approx([401.5, 506.5, 616.5]))
    assert len(found[found["seed"].notna()]) == 6, "a dot per seed"


def test_each_task_has_the_axis_of_its_curves(make_ablation, make_rollouts):
    rolled_out = [record for test in (1, 4) for n in (2, 8)
                  for record in make_rollouts(test, 0, 1.0, task="walker_run", train_trajectories=n)]  # fmt: skip
    panels = charts([*make_ablation(seeds=2), *rolled_out])["return_by_context"].panels
    titles = {panel.title: panel.spec["layer"][-1]["encoding"]["x"]["title"] for panel in panels}
    assert titles == {
        name: f"{unit} per context (logarithmic)"
        for name, unit in (("cartpole_swingup", "trajectories"), ("walker_run", "episodes"))
    }


def test_a_caption_describes_only_what_the_chart_shows(make_ablation, make_rollouts):
    everything = charts(make_ablation(seeds=2))["return_by_context"].caption
    assert "Horizontal lines need no context." in everything
    alone = charts(make_rollouts(1, 0, 841.0, train_trajectories=2))["return_by_context"].caption
    assert "has no interval" in alone
    assert "Horizontal lines" not in alone


def test_held_out_losses_are_dashed_lines_next_to_the_training_losses(make_study, tmp_path):
    root = make_study(tmp_path / "runs", seeds=1)
    results = read_results([root])
    assert charts_of(results)["learning_curves"].dashed == ""
    add_held_out(root, lambda step: 1.0 if step < 50 else 2.0)
    chart = charts_of(results)["learning_curves"]
    assert chart.dashed == "held-out episodes"
    assert "training never sees" in chart.caption
    found = points(chart.panels[0])
    held_out = found[found["memory"] == "held-out episodes"]
    assert sorted(set(zip(held_out["x"], held_out["value"], strict=True))) == [
        (20, 1.0), (40, 1.0), (60, 2.0), (80, 2.0), (100, 2.0)
    ]  # fmt: skip
    assert len(found[found["memory"] == "training"]) == 2 * 50
    (line,) = (layer for layer in chart.panels[0].spec["layer"] if layer["mark"]["type"] == "line")
    assert line["encoding"]["strokeDash"]["scale"]["domain"] == ["training", "held-out episodes"]


@pytest.mark.parametrize(
    ("loss", "rises"),
    [
        (lambda step: 0.5 + abs(step - 40) / 100, True),
        (lambda step: 0.5 + step / 100, True),
        (lambda step: 1 / step, False),
        (lambda step: 0.5 + abs(step - 40) / 10_000, False),
    ],
    ids=["falls, then rises", "rises", "falls", "noise"],
)
def test_a_held_out_loss_that_rises_is_named_in_one_sentence(make_study, tmp_path, loss, rises):
    root = make_study(tmp_path / "runs", seeds=2)
    assert overfitting_warning(training_losses(training_runs(read_results([root])))) is None
    add_held_out(root, loss, "*_at_2_seed1")
    warning = overfitting_warning(training_losses(training_runs(read_results([root]))))
    assert (warning is not None) == rises
    if rises:
        lowest = min(range(20, 101, 20), key=loss)
        assert "In 1 of 1 runs with held-out episodes, the held-out loss rises" in warning
        assert f"after step {lowest} (Agentic Transformer on cartpole_swingup)" in warning


RISES = "the held-out loss rises while the training loss falls"


def test_a_page_names_a_held_out_loss_that_rises(make_study, tmp_path):
    root = make_study(tmp_path / "runs", seeds=1)
    add_held_out(root, lambda step: 0.5 + step / 100, "*_at_2_seed0")
    assert RISES in write_report([root], tmp_path / "page").read_text()


def test_held_out_loss_against_return(make_study, tmp_path):
    """Seed s of length n returns 100 n + s more. Its held-out loss falls with the length and rises with the seed."""
    root = make_study(tmp_path / "runs", seeds=3, tasks=("cartpole_swingup", "walker_walk"))
    for length, seed in ((length, seed) for length in (1, 2) for seed in range(3)):
        if seed < 2 or length == 2:
            level = 1 / length + 0.01 * seed
            add_held_out(root, lambda step, level=level: level + 1 / step, f"cartpole*_at_{length}_seed{seed}")
        if length == 1 or seed == 0:
            add_held_out(root, lambda step, seed=seed: 9.0 + seed, f"walker*_at_{length}_seed{seed}")
    results = read_results([root])
    found = loss_points(results, returns_table(results), training_runs(results))
    swingup = found[found["task"] == "cartpole_swingup"].sort_values(["train_trajectories", "seed"])
    assert swingup["loss"].tolist() == pytest.approx([1.01, 1.02, 0.51, 0.52, 0.53]), "the last loss of each run"
    (row,) = loss_correlations(found).to_dict("records")
    assert (row["task"], row["runs"]) == ("cartpole_swingup", 5), "four runs are too few"
    expected = scipy.stats.spearmanr(swingup["loss"], swingup["value"]).statistic
    assert (row["correlation"], row["low"] <= expected <= row["high"]) == (pytest.approx(expected), True)
    assert found["value"].max() == 608.0  # 400 + 100 n + seed, 1 for the streams and 5 for the gain of 10
    early = results.assign(steps_trained=50)
    until = loss_points(early, returns_table(early), training_runs(results)).query("task == 'cartpole_swingup'")
    assert until["loss"].min() == pytest.approx(0.5 + 1 / 40), "of the evaluated checkpoint"
    chart = charts_of(results)["return_by_loss"]
    assert [(panel.title, len(points(panel))) for panel in chart.panels] == [
        ("cartpole_swingup", 5),
        ("walker_walk", 4),
    ]
    page = write_report([root], tmp_path / "page")
    assert f"Held-out loss predicts return on {int(row['high'] < 0)} of 1 task." in page.read_text()
    assert RISES not in page.read_text()
    assert (page.parent / "tables" / "held_out_loss.csv").read_text().startswith("task,runs,correlation")


def test_correlations_by_hand():
    """Within each setting a lower loss goes with a lower return; between settings with a higher one."""
    rows = [
        ("walker_walk", f"at {k}", 1, seed, 10.0 - k + 0.1 * seed, 100.0 * k + seed)
        for k in range(4)
        for seed in range(3)
    ]
    found = pd.DataFrame(rows, columns=["task", "method", "train_trajectories", "seed", "loss", "value"])
    (row,) = loss_correlations(found).to_dict("records")
    assert -1 < row["correlation"] < -0.5
    assert row["high"] < 0
    assert loss_sentence(loss_correlations(found)) == "Held-out loss predicts return on 1 of 1 task."
    both = pd.concat([found, found.assign(task="walker_run", value=-found["value"])])
    assert loss_sentence(loss_correlations(both)) == "Held-out loss predicts return on 1 of 2 tasks."


def tiles(panel) -> dict:
    (data,) = panel.spec["datasets"].values()
    return {(row["x"], row["y"]): (row["value"], row["seeds"]) for row in data}


def grid(make_rollouts, lengths, windows=("[]", "[20]"), actions=("on", "off"), seeds=2):
    """Runs of two settings; the default of a setting is not recorded."""
    return [
        record
        for length in lengths
        for seed in range(seeds)
        for index, (window, action) in enumerate((window, action) for window in windows for action in actions)
        for record in make_rollouts(
            length, seed, 100.0 * index + 10 * length + seed, variant=f"{window} {action}",
            settings={"model.episode_window": window} | ({"model.past_actions": action} if action == "off" else {}),
        )
    ]  # fmt: skip


def test_two_settings_that_vary_make_a_map(make_rollouts):
    (panel,) = charts(grid(make_rollouts, [2]))["return_by_settings"].panels
    assert tiles(panel) == {
        ("none", "on"): (21.5, "0: 21.0, 1: 22.0"), ("none", "off"): (121.5, "0: 121, 1: 122"),
        ("20", "on"): (221.5, "0: 221, 1: 222"), ("20", "off"): (321.5, "0: 321, 1: 322"),
    }  # fmt: skip
    x, y = (panel.spec["layer"][0]["encoding"][axis] for axis in "xy")
    assert [x["title"], y["title"], x["sort"]] == ["model.episode_window", "model.past_actions", ["20", "none"]]


def test_the_context_length_is_a_setting_of_a_map(make_rollouts):
    (panel,) = charts(grid(make_rollouts, [1, 4], actions=["on"]))["return_by_settings"].panels
    assert set(tiles(panel)) == {(length, window) for window in ("none", "20") for length in "14"}
    both = charts(grid(make_rollouts, [1, 4]))["return_by_settings"].panels
    assert [panel.title for panel in both] == [f"cartpole_swingup, contexts of {length}" for length in (1, 4)]
    assert tiles(both[1])["20", "off"][0] == 341.5


def test_other_numbers_of_settings_make_no_map(make_rollouts, make_ablation):
    assert "return_by_settings" not in charts(make_ablation(seeds=2)), "only the length varies"
    assert "return_by_settings" not in charts(grid(make_rollouts, [2], actions=["on"]))
    third = [r.model_copy(update={"settings": {**r.settings, "model.width": "8"}}) for r in grid(make_rollouts, [2])]
    assert "return_by_settings" not in charts([*grid(make_rollouts, [2]), *third])


def add_held_out(root, loss, runs="*_at_*"):
    """Add a held-out loss to every 20th line of the logs."""
    for log in root.glob(f"{runs}/metrics.jsonl"):
        *lines, cut = log.read_text().splitlines()
        entries = [json.loads(line) for line in lines]
        entries = [one | ({"validation_loss": loss(one["step"])} if one["step"] % 20 == 0 else {}) for one in entries]
        log.write_text("".join(json.dumps(one) + "\n" for one in entries) + cut)


def test_prompts_of_a_task_without_references_are_drawn_beside_a_task_with_them(make_ablation, make_rollouts):
    prompted = [
        record
        for task in ("walker_walk", "walker_run")
        for seed in (0, 1)
        for length in (0, 1)
        for record in make_rollouts(1, seed, 500.0, train_trajectories=4, prompt_trajectories=length, task=task)
    ]
    assert len(charts([*make_ablation(seeds=2), *prompted])["return_by_prompt"].panels) == 2


def test_prompts_of_shorter_contexts_are_faint_and_single_seeds_have_no_dots(make_rollouts):
    prompted = [
        record
        for trained, seeds in ((2, 1), (4, 2))
        for seed in range(seeds)
        for length in (0, 1)
        for record in make_rollouts(1, seed, 500.0, train_trajectories=trained, prompt_trajectories=length)
    ]
    found = points(charts(prompted)["return_by_prompt"].panels[0])
    lines, dots = found[found["seed"].isna()], found[found["seed"].notna()]
    assert dict(zip(lines["curve"], lines["strength"], strict=True)) == {"2/1": 0.5, "4/1": 1.0}
    assert sorted(zip(dots["x"], dots["seed"], strict=True)) == [(0, 0), (0, 1), (1, 0), (1, 1)]


@pytest.mark.parametrize("name", [pytest.param("return_by_episode", marks=pytest.mark.slow), "return_by_prompt"])
def test_context_is_shown_beside_methods_without_context(make_ablation, make_rollouts, name):
    prompted = [
        record
        for seed in (0, 1)
        for length in (0, 1, 3)
        for record in make_rollouts(1, seed, 500.0 + length, train_trajectories=4, prompt_trajectories=length)
    ]
    chart = charts([*make_ablation(seeds=2), *(prompted if name == "return_by_prompt" else [])])[name]
    spec = chart.panels[0].spec
    names = {layer["data"]["name"] for layer in spec["layer"] if layer["mark"]["type"] == "rule"}
    lines = {row["method"] for name in names for row in spec["datasets"][name] if "x" not in row}
    assert lines == {"Behaviour cloning", "Random policy", "Dataset, all episodes", "Dataset, best episode"}
    assert {*chart.methods} == {"Agentic Transformer", *lines}


def test_legends_of_files_name_only_what_is_drawn(make_ablation):
    chart = charts(make_ablation(seeds=2))["return_by_episode"]._replace(methods=["TD3", "Random policy"])
    svg = chart_files(chart)["return_by_episode.svg"].decode()
    assert "Random policy</text>" in svg
    assert "Behaviour cloning</text>" not in svg


def test_files_have_the_dark_colours_too(make_ablation):
    """An image follows the reader's colour scheme, so each colour of the file needs a dark one."""
    chart = charts(make_ablation(seeds=2))["return_by_episode"]
    svg = chart_files(chart)["return_by_episode.svg"].decode()
    style, drawing = svg.split("</style>")
    assert "prefers-color-scheme:dark" in style
    drawn = set(re.findall(r'(fill|stroke)="(#\w+|white|black)"', drawing))
    light = {colour for colour, _ in PALETTE.values()}
    assert {colour for _, colour in drawn} - light == set()
    for kind, colour in drawn:
        dark = next(dark for one, dark in PALETTE.values() if one == colour)
        assert f'[{kind}="{colour}"]{{{kind}:{dark}}}' in style


def test_axes_start_at_zero_or_say_that_they_do_not(make_ablation, make_rollouts):
    prompted = [r for n in (0, 1) for r in make_rollouts(1, 9, 1.0, train_trajectories=4, prompt_trajectories=n)]
    found = charts([*make_ablation(seeds=2), *prompted])
    assert len(found) == 3
    for chart in found.values():
        for panel in chart.panels:
            for layer in panel.spec["layer"]:
                for axis in {"x", "y"} & layer["encoding"].keys():
                    one = layer["encoding"][axis]
                    scale = one["scale"]
                    starts_at_zero = scale.get("zero") or scale.get("domain", [1])[0] == 0
                    is_marked = "(logarithmic)" in one["title"] or "(zoomed" in one["title"]
                    is_counted = (
                        one["title"] == "episode in the context" or len(one.get("axis", {}).get("values", [])) == 1
                    )
                    assert starts_at_zero or is_marked or is_counted, (chart.name, one)


def test_charts_that_show_nothing_are_left_out(make_ablation):
    one_length = [r for r in make_ablation(seeds=2) if r.train_trajectories in (None, 4)]
    assert "return_by_context" not in charts(one_length), "the episodes show more than one point"
    assert next(iter(charts(one_length))) == "return_by_episode"
    assert next(iter(charts(make_ablation(seeds=2)))) == "return_by_context"


def test_every_line_has_a_tooltip_near_it(make_ablation):
    panel = charts(make_ablation(seeds=2))["return_by_episode"].panels[0]
    rules = [
        layer for layer in panel.spec["layer"] if layer["mark"]["type"] == "rule" and "y2" not in layer["encoding"]
    ]
    wide = [layer for layer in rules if layer["mark"].get("opacity") == 0]
    assert {layer["mark"]["strokeWidth"] for layer in wide} == {9}
    assert {layer["data"]["name"] for layer in wide} == {layer["data"]["name"] for layer in rules}
    assert all(layer["encoding"]["tooltip"] for layer in wide)


def test_episodes_are_shown_with_and_without_memory(make_ablation):
    found = points(charts(make_ablation(seeds=2, lengths=(1, 4)))["return_by_episode"].panels[0]).sort_values("x")
    kept, reset = (found[found["memory"].str.startswith(name)]["value"].tolist() for name in ("with", "memory reset"))
    assert kept == pytest.approx([601.5 - 100, 511.5, 521.5, 531.5])
    assert reset == pytest.approx([391.5] * 4)
