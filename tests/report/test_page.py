"""The report as files: complete, self-contained, and never half-replaced."""

import csv
import importlib
import io
import json
import re
import subprocess
import sys
import xml.etree.ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from ringrl.errors import UserError
from ringrl.report import terminal_table, write_report
from ringrl.report.page import Column, _spec, save_report, table_files, to_rich
from ringrl.report.results import tabulate
from ringrl.report.tables import returns_table

CHARTS = ("return_by_context", "return_by_episode")


@pytest.fixture(scope="module")
def report(make_ablation, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of one ablation."""
    from ringrl.evaluation.records import append_records

    folder = tmp_path_factory.mktemp("report")
    append_records(folder / "results.jsonl", make_ablation())
    return write_report(folder / "results.jsonl", folder / "report")


@pytest.fixture(scope="module")
def full(make_study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with run folders."""
    folder = tmp_path_factory.mktemp("full")
    return write_report([make_study(folder / "runs")], folder / "report")


def test_it_writes_a_page_tables_and_figures(report):
    assert {path.name for path in report.parent.iterdir()} == {"index.html", "figures", "tables"}
    expected = {f"{name}.{kind}" for name in CHARTS for kind in ("svg", "pdf", "png")}
    assert {path.name for path in (report.parent / "figures").iterdir()} == expected
    for name in CHARTS:
        xml.etree.ElementTree.parse(report.parent / "figures" / f"{name}.svg")
        assert (report.parent / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        assert (report.parent / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    tables = {f"{name}.{kind}" for name in ("returns", "comparisons") for kind in ("csv", "tex")}
    assert {path.name for path in (report.parent / "tables").iterdir()} == tables
    text = report.read_text()
    for part in ("A longer context helps.", "618", "data_best", "869", "3f9a7c0be51d", "jax 0.10.2", "plan.yaml"):
        assert part in text, part
    rows = list(csv.DictReader((report.parent / "tables" / "returns.csv").open()))
    assert [row["method"] for row in rows][-1] == "Agentic Transformer"
    assert (float(rows[-1]["iqm"]), rows[-1]["train_trajectories"], rows[0]["train_trajectories"]) == (618.0, "4", "")


def test_the_page_needs_nothing_but_the_files_next_to_it(full):
    text = full.read_text()
    page = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    linked = set()
    for attribute in re.findall(r'\s(?:src|href|poster|data)="([^"]*)"', page):
        if attribute.startswith("#"):
            assert f'id="{attribute[1:]}"' in page, attribute
        elif attribute != "data:,":
            assert (full.parent / attribute).is_file(), attribute
            linked.add(attribute)
    assert linked == {str(path.relative_to(full.parent)) for path in full.parent.glob("*/*")}
    assert not re.findall(r"https?://(?!www\.w3\.org/)", page)
    assert not re.search(r"<script[^>]*\ssrc=|@import|url\((?!#)", page)


def test_the_contents_have_the_order_of_the_page(full):
    text = re.sub(r"<script.*?</script>", "", full.read_text(), flags=re.DOTALL)
    sections = re.findall(r'<section id="(.*?)">.*?<h2>(.*?)</h2>', text, flags=re.DOTALL)
    assert re.findall(r'<a href="#(.*?)">(.*?)</a>', text) == sections
    assert [name for name, _ in sections][:3] == ["return_by_context", "returns", "comparisons"]
    assert len(sections) == 7


def test_the_same_results_give_the_same_page(report, make_ablation, write_results, tmp_path):
    results = report.parent.parent / "results.jsonl"
    again = write_report([results], tmp_path / "again")
    for file in report.parent.rglob("*"):
        if file.is_file() and file.suffix != ".pdf":  # objects of a PDF have no fixed order
            assert file.read_bytes() == (again.parent / file.relative_to(report.parent)).read_bytes(), file


class _Checker(HTMLParser):
    """Elements are closed in order, ids are used once."""

    void = frozenset({"meta", "link", "br", "img", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.scripts: list[dict[str, str]] = []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.ids += [value for name, value in attrs if name == "id"]
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.scripts += [dict(attrs)] if tag == "script" else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_well_formed(full):
    checker = _Checker()
    checker.feed(full.read_text())
    assert checker.open == []
    assert len(checker.ids) == len(set(checker.ids))


NAMES = {
    "</script><script>alert(1)</script> & $x_1$": "&lt;script&gt;alert(1)&lt;/script&gt; &amp; $x_1$",
    "\"' onclick='alert(1)' x=\"": "&#34;&#39; onclick=&#39;alert(1)&#39; x=&#34;",
    "<img src=x onerror=alert(1)>-->": "&lt;img src=x onerror=alert(1)&gt;--&gt;",
    "a\x00b\x1b[2Jc\x85\uffff": "a\\x00b\\x1b[2Jc\\x85\\uffff",
    "{x} {{ 7 * 7 }} {% raw %} %s": "{x} {{ 7 * 7 }} {% raw %} %s",
    "x" * 300: "x" * 300,
}


def test_names_are_text_not_markup(write_results, make_rollouts, tmp_path):
    of = lambda name: dict.fromkeys(  # noqa: E731
        ("task", "method", "variant", "command", "checkpoint", "target_policy", "device"), name
    )
    records = [
        record
        for name in NAMES
        for n, seed in ((1, 0), (2, 0), (1, 1), (2, 1))
        for record in make_rollouts(n, seed, 100, **of(name), settings={name: name}, versions={name: name})
    ]
    page = write_report([write_results(records)], tmp_path / "report")
    text = page.read_text()
    checker = _Checker()
    checker.feed(text)
    assert checker.open == []
    assert [shown for shown in NAMES.values() if shown not in text] == []
    assert checker.scripts == [{"type": "application/json"}] * (len(checker.scripts) - 2) + [{"type": "module"}] * 2
    assert not {attribute for attribute in checker.attributes if attribute.startswith("on")} | checker.tags & {"img"}
    assert not re.search(
        "[\x00-\x08\x0b-\x1f\x7f-\x9f\uffff]", re.sub("<script.*?</script>", "", text, flags=re.DOTALL)
    )
    for figure in (tmp_path / "report" / "figures").glob("*.svg"):
        xml.etree.ElementTree.parse(figure)
    latex = (tmp_path / "report" / "tables" / "returns.tex").read_text()
    assert r"\& \$x\_1\$" in latex


def test_a_failed_report_leaves_the_old_one(report, tmp_path):
    folder, results = tmp_path / "report", report.parent.parent / "results.jsonl"
    save_report("old", [], {"figures/a.svg": b"old"}, folder)
    (folder / "notes.txt").write_text("mine")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"protocol": 2}\n')
    with pytest.raises(UserError, match="protocol 2"):
        write_report([results, broken], folder)
    (folder / "figures" / "a.svg").unlink()
    (folder / "figures" / "a.svg").mkdir()  # cannot be replaced by a file
    with pytest.raises(UserError, match="cannot be written"):
        save_report("new", [], {"figures/a.svg": b"new"}, folder)
    assert (folder / "index.html").read_text() == "old"
    assert (folder / "notes.txt").read_text() == "mine"
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    with pytest.raises(UserError, match=r"results\.jsonl: cannot be written"):
        save_report("page", [], {}, results)


@pytest.mark.parametrize("action", [write_report, lambda paths, _: terminal_table(paths)])
def test_no_results(tmp_path, action):
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match=r"no results in .*runs"):
        action([tmp_path / "runs"], tmp_path / "report")
    assert not (tmp_path / "report").exists()
    with pytest.raises(UserError, match="no such file or folder"):
        action([tmp_path / "nowhere"], tmp_path / "report")


def test_references_alone_make_a_page(write_results, make_ablation, tmp_path):
    records = [record for record in make_ablation() if record.method in ("random", "data")]
    text = write_report([write_results(records)], tmp_path / "report").read_text()
    assert "No rollouts show whether context helps." in text
    assert "Random policy" in text
    assert re.findall(r'<section id="(.*?)">', text) == ["returns", "measured"], "no empty section"


def test_failed_episodes_are_counted_not_averaged(make_rollouts, write_results, tmp_path):
    whole, cut = make_rollouts(4, 0, 100.0)
    cut = cut.model_copy(update={"returns": (102.0, None, None, None)})
    nothing = make_rollouts(4, 1, 100.0)[0].model_copy(update={"returns": (None,) * 4})
    table = returns_table(tabulate([whole, cut, nothing]))
    assert table[["episodes", "failed", "seeds"]].iloc[0].tolist() == [5, 7, 1]
    assert table[["mean", "first", "last"]].iloc[0].tolist() == [101.0, 101.0, 100.0]
    text = write_report([write_results([whole, cut, nothing])], tmp_path / "report").read_text()
    assert ">Failed</th>" in text
    assert "<td>7</td>" in text
    assert "1 streams without a return" in text
    never = [record.model_copy(update={"returns": (5.0, None)}) for record in make_rollouts(2, 0, 0)]
    shown = io.StringIO()
    Console(file=shown, width=100).print(to_rich(returns_table(tabulate(never))))
    assert "Failed" in shown.getvalue()
    assert "nan" not in shown.getvalue()


def test_missing_values_are_shown_as_dashes(full):
    page = re.sub(r"<script.*?</script>", "", full.read_text(), flags=re.DOTALL)
    assert not re.search(r"[>\"\s](nan|<na>|&lt;na&gt;)[<\"\s]", page.lower())


def test_specifications_hold_what_a_tooltip_shows(full):
    specs = [
        json.loads(text) for text in re.findall(r'<script type="application/json">(.*?)</script>', full.read_text())
    ]
    rows = [row for spec in specs for name in spec["datasets"] for row in spec["datasets"][name]]
    point = next(row for row in rows if row.get("trajectories") == "2" and row.get("interval"))
    assert point["method"] == "Agentic Transformer"
    assert point["seeds"] == 2


def test_the_terminal_table_fits_80_columns(make_ablation):
    text = io.StringIO()
    table = to_rich(returns_table(tabulate([*make_ablation(), *make_ablation(task="jaco_reach_bottom_right")])))
    Console(file=text, width=80).print(table)
    assert "…" not in text.getvalue()
    assert text.getvalue().count("618 [617, 620]") == 2
    assert "633 (393)" in text.getvalue()


def test_damage_and_names_that_change_a_terminal_are_shown(make_study, tmp_path):
    root = make_study(tmp_path / "runs")
    (root / "a\x1b[2Jb.jsonl").write_text('{"protocol": 1, "ta')
    text = io.StringIO()
    Console(file=text, width=200).print(terminal_table(root))
    assert r"a\x1b[2Jb.jsonl, line 1: damaged or cut short" in text.getvalue()
    assert "\x1b" not in text.getvalue()


def test_numbers_that_are_not_finite_are_null_on_the_page(monkeypatch):
    monkeypatch.setattr("ringrl.report.page.page_spec", lambda panel: {"a": float("nan"), "b": [float("inf"), "NaN"]})
    assert _spec(None) == '{"a": null, "b": [null, "NaN"]}'


def test_brackets_in_a_name_are_no_markup(make_rollouts):
    text = io.StringIO()
    Console(file=text, width=100).print(
        to_rich(returns_table(tabulate(make_rollouts(1, 0, 1, method="[red]mine[/red]"))))
    )
    assert "[red]mine[/red]" in text.getvalue()


def test_a_table_as_csv_and_latex_by_hand():
    import pandas as pd

    table = pd.DataFrame(
        {
            "task": ["walker_walk", "50 % of $x^2$ {a}\\b"],
            "iqm": [1 / 3, 2.0],
            "low": [-0.25, None],
            "high": [1.0, None],
        }
    )
    columns = [Column("task", "Task & more"), Column("iqm", "Return", ends=("low", "high"))]
    files = table_files("things", table, columns)
    first, second = csv.DictReader(io.StringIO(files["tables/things.csv"].decode()))
    assert (float(first["iqm"]), first["low"], second["low"]) == (1 / 3, "-0.25", "")
    assert files["tables/things.tex"].decode().splitlines() == [
        r"% needs \usepackage{booktabs}",
        r"\begin{tabular}{lr}",
        r"\toprule",
        r"Task \& more & Return \\",
        r"\midrule",
        r"walker\_walk & 0.3 [$-$0.2, 1.0] \\",
        r"50 \% of \$x\textasciicircum 2\$ \{a\}\textbackslash b & 2.0 \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


@pytest.mark.parametrize("module", ["pandas", "altair", "vl_convert", "jinja2"])
def test_a_missing_package_is_named(module, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("ringrl.report")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"^report: needs {module}; install it with: pip install 'ringrl\[report\]'$"):
        importlib.import_module("ringrl.report")


def test_a_missing_package_is_named_before_any_work(tmp_path):
    code = "import sys; sys.modules['altair'] = None; from ringrl.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "demo", "--output", str(tmp_path / "demo")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    line = "ringrl: report: needs altair; install it with: pip install 'ringrl[report]'"
    assert (done.returncode, done.stderr.splitlines()) == (2, [line])
    assert list(tmp_path.iterdir()) == []


def test_help_and_the_package_import_nothing_of_the_report():
    code = (
        "import ringrl, sys, contextlib\n"
        "from ringrl.cli import main\n"
        "with contextlib.suppress(SystemExit):\n    main(['--help'])\n"
        "with contextlib.suppress(SystemExit):\n    main(['report', '--help'])\n"
        "assert not {'pandas', 'altair', 'vl_convert', 'jax', 'matplotlib'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
