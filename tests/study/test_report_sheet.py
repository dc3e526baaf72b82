"""One table in its three forms."""

import csv
import io

from ringrl.evaluation.formatting import decimal
from ringrl.evaluation.statistics import Estimate, Interval
from ringrl.study.report_cells import gather
from ringrl.study.report_sheet import Column, Entry, Sheet, measured, returns_sheet, texts
from ringrl.study.tables import rows

SHEET = Sheet(
    "things",
    (Column("Task & more"), Column("Return"), Column("Seeds")),
    (
        (*texts("walker_walk"), measured(Estimate(1 / 3, Interval(-0.25, 1.0), 2), decimal), Entry("2", 2)),
        (*texts("50 % of $x^2$ {a}\\b"), measured(Estimate(2.0, None, 1), decimal), Entry("\N{EN DASH}", None)),
    ),
)


def test_csv_has_full_precision_and_the_ends_of_intervals():
    first, second = csv.DictReader(io.StringIO(SHEET.csv()))
    assert list(first) == ["Task & more", "Return", "Return, low", "Return, high", "Seeds"]
    assert (float(first["Return"]), first["Return, low"], first["Return, high"]) == (1 / 3, "-0.25", "1.0")
    assert (second["Return"], second["Return, low"], second["Seeds"]) == ("2.0", "", "")


def test_latex_by_hand():
    assert SHEET.latex().splitlines() == [
        r"% needs \usepackage{booktabs}",
        r"\begin{tabular}{lrr}",
        r"\toprule",
        r"Task \& more & Return & Seeds \\",
        r"\midrule",
        r"walker\_walk & 0.3 [$-$0.2, 1.0] & 2 \\",
        r"50 \% of \$x\textasciicircum{}2\$ \{a\}\textbackslash{}b & 2.0 & -- \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_files_are_named_after_the_table():
    assert set(SHEET.files()) == {"things.csv", "things.tex"}


def test_the_returns_of_a_grid(make_ablation):
    table = rows(gather([*make_ablation(), *make_ablation(task="walker_walk", seeds=1)]))
    lines = returns_sheet(table).latex().splitlines()
    (longest,) = (line for line in lines if line.startswith(r"cartpole\_swingup & Agentic Transformer & 4 & 4"))
    cells = longest.removesuffix(r" \\").split(" & ")
    assert cells[4] == "618.0"
    assert cells[5].startswith("[61")
    assert cells[6:] == ["60.7", "603.0", "633.0", "633.0", "393.0", "5"]
    walker = [line for line in lines if line.startswith(r"walker\_walk & Agentic")]
    assert all(" & -- & " in line for line in walker), "one seed has no interval"
    assert lines.count(r"\addlinespace") == 1, "between the tasks"
