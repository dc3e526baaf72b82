"""The report as files: whole, self-contained, and never half-replaced."""

import re
import subprocess
import sys
import xml.etree.ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ringrl.errors import UserError
from ringrl.study.figures import curve_chart, episode_chart
from ringrl.study.report import summary_rows, table, write_report
from ringrl.study.report_cells import gather
from ringrl.study.report_draw import chart_files, panel_svg
from ringrl.study.report_svg import PALETTE, for_page


@pytest.fixture
def results(write_results, make_ablation) -> Path:
    return write_results(make_ablation())


def drawn(chart) -> list[str]:
    """The SVG of each panel."""
    return [panel_svg(panel) for panel in chart.panels]


def test_it_writes_a_page_tables_and_figures(results, tmp_path):
    page = write_report([results], tmp_path / "report")
    assert page == tmp_path / "report" / "index.html"
    assert {path.name for path in page.parent.iterdir()} == {"index.html", "figures", "tables"}
    figures = ("return_by_context", "return_within_context", "performance_profiles", "probability_of_improvement")
    expected = {f"{name}.{kind}" for name in figures for kind in ("svg", "pdf")}
    assert {path.name for path in (page.parent / "figures").iterdir()} == expected
    for name in figures:
        xml.etree.ElementTree.parse(page.parent / "figures" / f"{name}.svg")
        assert (page.parent / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    expected = {f"{name}.{kind}" for name in ("returns", "returns_by_task") for kind in ("csv", "tex")}
    assert {path.name for path in (page.parent / "tables").iterdir()} == expected
    text = page.read_text()
    for expected in ("A longer context helps.", "618", "data_best", "869", "3f9a7c0be51d", "jax 0.10.2", "plan.yaml"):
        assert expected in text, expected
    assert (page.parent / "tables" / "returns.csv").read_text().count("\n") == 1 + len(summary_rows([results]))
    assert table([results]).row_count == 1 + len(summary_rows([results]))


def test_the_same_results_give_the_same_page(results, tmp_path):
    first, second = (write_report([results], tmp_path / name) for name in ("a", "b"))
    files = [path.relative_to(first.parent) for path in first.parent.rglob("*") if path.is_file()]
    assert len(files) == 13
    for file in files:
        assert (first.parent / file).read_bytes() == (second.parent / file).read_bytes(), file


def test_the_page_needs_nothing_but_what_lies_beside_it(make_study, film, tmp_path):
    page = write_report([make_study(tmp_path / "runs", video=film)], tmp_path / "report")
    text = page.read_text()
    beside = set()
    for attribute in re.findall(r'\s(?:src|href|poster|data)="([^"]*)"', text):
        if attribute.startswith("#"):
            assert f'id="{attribute[1:]}"' in text, attribute
        elif attribute != "data:,":
            assert (page.parent / attribute).is_file(), attribute
            beside.add(attribute)
    assert beside == {str(path.relative_to(page.parent)) for path in page.parent.glob("*/*")}
    assert not re.findall(r"https?://(?!www\.w3\.org/)", text)
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)


class _Checker(HTMLParser):
    """Elements closed in order, ids used once."""

    void = frozenset({"meta", "link", "br", "img", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_well_formed(results, tmp_path):
    checker = _Checker()
    checker.feed(write_report([results], tmp_path / "report").read_text())
    assert checker.open == []
    assert len(checker.ids) == len(set(checker.ids))


def test_names_are_text_not_markup(write_results, make_rollouts, tmp_path):
    name = "<script>alert(1)</script> & $x_1$"
    records = [record for n in (1, 2) for record in make_rollouts(n, 0, 100, task=name, method=name)]
    text = write_report([write_results(records)], tmp_path / "report").read_text()
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; $x_1$" in text
    for figure in (tmp_path / "report" / "figures").glob("*.svg"):
        xml.etree.ElementTree.parse(figure)
    assert r"\& \$x\_1\$" in (tmp_path / "report" / "tables" / "returns.tex").read_text()


def test_a_failed_report_leaves_the_old_one(results, make_ablation, write_results, tmp_path):
    folder = tmp_path / "report"
    write_report([results], folder)
    (folder / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"protocol": 2}\n')
    with pytest.raises(UserError, match="protocol 2"):
        write_report([results, broken], folder)
    figure = folder / "figures" / "return_by_context.svg"
    figure.unlink()
    figure.mkdir()  # cannot be replaced by a file
    with pytest.raises(UserError, match="cannot write the report"):
        write_report([write_results(make_ablation(step=0), "other.jsonl")], folder)
    after = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert after["index.html"] == before["index.html"]
    assert after["notes.txt"] == b"mine"
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_a_file_in_the_place_of_the_folder_is_named(results):
    with pytest.raises(UserError, match=r"results\.jsonl: cannot write the report"):
        write_report([results], results)


@pytest.mark.parametrize("action", [lambda paths, folder: write_report(paths, folder), lambda paths, _: table(paths)])
def test_no_results(tmp_path, action):
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match=r"no results in .*runs"):
        action([tmp_path / "runs"], tmp_path / "report")
    assert not (tmp_path / "report").exists()
    with pytest.raises(UserError, match="no such file or folder"):
        action([tmp_path / "nowhere"], tmp_path / "report")


def test_a_cut_line_is_reported_on_the_page(results, tmp_path):
    results.write_bytes(results.read_bytes() + b'{"protocol": 1, "ta')
    assert "results.jsonl: its last line was cut off" in write_report([results], tmp_path / "report").read_text()


def test_references_alone_make_a_page(write_results, make_ablation, tmp_path):
    records = [record for record in make_ablation() if record.method in ("random", "data")]
    text = write_report([write_results(records)], tmp_path / "report").read_text()
    assert "No method with a context was measured." in text
    assert "Random policy" in text


def test_one_seed_says_that_the_interval_is_absent(write_results, make_ablation, tmp_path):
    text = write_report([write_results(make_ablation(seeds=1))], tmp_path / "report").read_text()
    assert "no interval can be given" in text


def test_a_caption_tells_only_of_what_is_there(make_ablation, make_rollouts):
    everything = curve_chart(gather(make_ablation())).caption
    assert "Grey lines need no context. With one trajectory" in everything
    alone = curve_chart(gather(make_rollouts(2, 0, 841.0))).caption
    assert "no interval can be given" in alone
    assert "Grey lines" not in alone
    assert "Decision Transformer" not in alone


def test_panels(make_ablation):
    grid = gather([*make_ablation(), *make_ablation(task="walker_walk")])
    titles = [panel.title for panel in curve_chart(grid).panels]
    assert titles == ["All tasks, normalised score", "cartpole_swingup", "walker_walk"]
    assert [panel.title for panel in episode_chart(grid).panels] == ["cartpole_swingup", "walker_walk"]
    unknown = gather([*make_ablation(), *make_ablation(task="my_own_task")])  # it has no score to average
    assert [panel.title for panel in curve_chart(unknown).panels] == ["cartpole_swingup", "my_own_task"]


def test_a_figure_names_its_levels(make_ablation):
    (svg,) = drawn(curve_chart(gather(make_ablation())))
    for label in ("random policy 30.0", "behaviour cloning 333", "data, mean 400", "data, best 800"):
        assert f">{label}</text>" in svg


def test_figures_on_the_page_take_their_colours_from_it(make_ablation):
    (svg,) = drawn(curve_chart(gather(make_ablation())))
    placed = for_page(svg, "curve0")
    xml.etree.ElementTree.fromstring(placed)
    assert "var(--series-1)" in placed
    colours = set(re.findall(r"#[0-9a-f]{6}", placed))
    assert not colours & {light for light, _ in PALETTE.values()}
    assert colours <= {"#000000", "#ffffff"}, "a colour that does not follow light and dark"
    assert all(name.startswith("curve0-") for name in re.findall(r'id="([^"]*)"', placed))


def test_the_standalone_figure_has_fixed_colours_and_a_legend(make_ablation):
    text = chart_files(curve_chart(gather(make_ablation())))["return_by_context.svg"].decode()
    xml.etree.ElementTree.fromstring(text)
    assert "var(" not in text
    assert ">Agentic Transformer</text>" in text


def test_nothing_global_changes(results, tmp_path):
    """Matplotlib's settings stay as they were, and pyplot, whose figures are global, is never imported."""
    code = (
        "import sys, matplotlib, pathlib\n"
        "settings = lambda: {key: matplotlib.rcParams[key] for key in matplotlib.rcParams if key != 'backend'}\n"
        "before = settings()\n"
        "from ringrl.study.report import write_report\n"
        f"write_report([pathlib.Path({str(results)!r})], pathlib.Path({str(tmp_path / 'report')!r}))\n"
        "assert settings() == before\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "assert 'mujoco' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_failed_episodes_are_counted_not_averaged(make_rollouts, write_results, tmp_path):
    whole, cut = make_rollouts(4, 0, 100.0)
    cut = cut.model_copy(update={"returns": (102.0, None, None, None)})
    nothing = make_rollouts(4, 1, 100.0)[0].model_copy(update={"returns": (None,) * 4})
    path = write_results([whole, cut, nothing])
    (row,) = summary_rows([path])
    assert (row.episodes, row.failed, row.seeds) == (5, 7, 1)
    assert (row.mean, row.first, row.last) == (101.0, 101.0, 100.0)
    text = write_report([path], tmp_path / "report").read_text()
    assert ">Failed</button>" in text
    assert '<td data-value="7">7</td>' in text
    assert "1 streams whose first episode failed" in text


def test_figures_say_what_they_were_made_from(make_study, tmp_path):
    text = write_report([make_study(tmp_path / "runs")], tmp_path / "report").read_text()
    made = text[text.index('id="return_by_context"') : text.index("</section>", text.index('id="return_by_context"'))]
    for expected in (
        "Commands",
        "ringrl ablate plan.yaml",
        "jax 0.10.2",
        "Dataset (SHA-256)",
        "Training seeds",
        "0 to 1",
    ):
        assert expected in made, expected
    cost = text[text.index('id="return_by_tokens"') : text.index("</section>", text.index('id="return_by_tokens"'))]
    assert 'Made from the same results as <a href="#return_by_context">' in cost


def test_what_is_not_shown_is_named_with_its_reason(write_results, make_ablation, tmp_path):
    text = write_report([write_results(make_ablation(seeds=1))], tmp_path / "report").read_text()
    for reason in (
        "two results of a task that tell it",
        "they need two training seeds",
        "no run&#39;s folder",
        "evaluate --video",
    ):
        assert reason in text, reason
