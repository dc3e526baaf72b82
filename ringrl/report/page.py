"""The page of a report: a self-contained HTML file, with its figures and tables next to it."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import pandas as pd
import rich.table
import vl_convert
from markupsafe import Markup
from rich import box
from rich.console import Group
from rich.markup import escape
from rich.text import Text

from ringrl.errors import printable
from ringrl.evaluation.formatting import ABSENT, MINUS, decimal, number, p_value
from ringrl.files import explain_write_errors, write_whole
from ringrl.report import conclusion, provenance
from ringrl.report.charts import all_charts
from ringrl.report.drawing import PALETTE, Chart, chart_files, page_spec, styles
from ringrl.report.results import read_results
from ringrl.report.tables import (
    RETURNS,
    loss_correlations,
    loss_points,
    loss_sentence,
    returns_table,
    tasks_like_random,
    training_table,
)

PAGE = "index.html"
FIGURES, TABLES = "figures", "tables"  # folders next to the page
_LATEX = {MINUS: "$-$", ABSENT: "--", "\N{NO-BREAK SPACE}": "~"}


class Column(NamedTuple):
    """A column of a displayed table: its name in the DataFrame, heading, hint and number format."""

    name: str
    heading: str
    hint: str = ""
    form: Callable[[Any], str] = decimal
    ends: tuple[str, str] | None = None  # columns of an interval

    def value(self, row: pd.Series) -> Any:
        """Return the value that the table is sorted by; None if it is absent."""
        return None if pd.isna(row[self.name]) else row[self.name]

    def interval(self, row: pd.Series) -> str:
        """Return the interval in brackets; empty if it is absent."""
        ends = [row[name] for name in self.ends or ()]
        return "" if pd.isna(ends).any() or not ends else f"[{self.form(ends[0])}, {self.form(ends[1])}]"

    def text(self, row: pd.Series) -> str:
        """Return the value as text; a dash if it is absent."""
        value = self.value(row)
        return ABSENT if value is None else value if isinstance(value, str) else self.form(value)

    def line(self, row: pd.Series) -> str:
        """Return the value and its interval as text."""
        return f"{self.text(row)} {self.interval(row)}".strip()


count, share = "{:.0f}".format, "{:.2f}".format  # whole numbers and probabilities as text


def amount(value: float) -> str:
    """Return a large number with an SI prefix."""
    power = next((power for power in (15, 12, 9, 6, 3) if abs(value) >= 10**power), 0)
    return f"{value / 10**power:.3g}{'kMGTP'[power // 3 - 1] if power else ''}"


RETURN_COLUMNS = [
    Column("method", "Method"),
    Column("train_trajectories", "Trained on", "trajectories per training context", count),
    Column("test_trajectories", "Rolled out", "episodes per rollout, n", count),
    Column("prompt_trajectories", "Prompt", "dataset trajectories before the first episode", count),
    Column("iqm", "IQM", "interquartile mean over training seeds of the mean return of all episodes, 95 % interval "
           "(stratified bootstrap over training seeds; absent for one seed)", ends=("low", "high")),
    Column("mean", "Mean", "mean over training seeds of the mean return of all episodes"),
    Column("control", "Control", "IQM of the same policy without memory"),
    Column("first", "First", "first episode in the context"),
    Column("last", "Last", "last episode in the context"),
    Column("last_control", "Last, control", "the same episodes without memory"),
    Column("best", "Best of n", "best episode of each context"),
    Column("best_control", "Best of n, control", "best of n episodes of the same policy without memory"),
    Column("score", "Score", "100 (IQM - random) / (highest possible return - random)"),
    Column("seeds", "Seeds", "training seeds", count),
    Column("episodes", "Episodes", "over all seeds", count),
    Column("failed", "Failed", "episodes without a return, with or without memory; no mean includes them", count),
]  # fmt: skip
COMPARISON_COLUMNS = [
    Column("task", "Task"), Column("method", "Method"), Column("compared", "Compared"), Column("before", "Before"),
    Column("after", "After"),
    Column("change", "Difference", "of the interquartile means, 95 % interval", partial(number, sign=True),
           ("low", "high")),
    Column("verdict", "Verdict", "higher or lower: four seeds a side, corrected p below 0.05, interval without zero"),
    Column("detectable", "Smallest resolvable", "difference that these seeds could have shown, in this comparison "
           "alone, with 80 % power at 5 %, two-sided", number),
    Column("p_holm", "p, corrected", "two-sided t-test of the means over training seeds, corrected for all comparisons "
           "of the table (Holm)", p_value),
    Column("wins", "P(higher)", "probability that a training run of the second beats a run of the first; a tie counts "
           "half", share, ("wins_low", "wins_high")),
    Column("seeds", "Seeds", "training seeds of the smaller side", count),
]  # fmt: skip
CORRELATION_COLUMNS = [
    Column("task", "Task"), Column("runs", "Runs", form=count),
    Column("correlation", "Correlation", "Spearman's rank correlation of held-out loss and return, 95 % interval "
           "(bootstrap over runs); negative if a lower loss goes with a higher return", share, ("low", "high")),
]  # fmt: skip
TRAINING_COLUMNS = [
    Column("task", "Task"), Column("method", "Method"), Column("train_trajectories", "Trained on", form=count),
    Column("steps", "Steps", "of the optimiser", amount),
    Column("steps_trained", "Checkpoint", "steps of the evaluated checkpoint, if it is not the last", amount),
    Column("converged", "Converged", "share of runs that ended because the held-out loss no longer fell", share),
    Column("tokens", "Tokens", "seen in training", amount),
    Column("flops", "FLOPs", "of the transformer blocks", amount), Column("seconds", "Seconds", form=amount),
    Column("tokens_per_second", "Tokens per second", "median over the steps of a run, IQM over seeds", amount),
    Column("peak_memory", "Memory (bytes)", "peak per device in a training step", amount),
]  # fmt: skip


def write_report(results: Path | Sequence[Path], destination: Path) -> Path:
    """Write the page into the folder `destination`, with figures/ and tables/; return the page's path.

    Each file is replaced as a whole, the page last, so a failed report leaves the old page. Other files in the folder
    are not touched. `results` are as for `read_results`.

    UserError as for `read_results`, or if the folder cannot be written.
    """
    read = read_results(results)
    table, runs = returns_table(read), provenance.training_runs(read)
    losses, held_out = provenance.training_losses(runs), loss_points(read, table, runs)
    correlations, training = loss_correlations(held_out), training_table(read, runs)
    charts = all_charts(read, table, losses, held_out)
    verdicts, like_random = conclusion.verdicts(read, table), tasks_like_random(read, table)
    warnings = [
        conclusion.starts_warning(read, table), conclusion.settings_warning(read, table),
        conclusion.overfitting_warning(losses),
    ]  # fmt: skip
    shown = table.assign(train_trajectories=table["train_trajectories"].replace(0, pd.NA))
    columns = _used(RETURN_COLUMNS, shown)
    sheets = {
        "comparisons": (verdicts, COMPARISON_COLUMNS),
        "held_out_loss": (correlations, CORRELATION_COLUMNS),
        "training": (training, _used(TRAINING_COLUMNS, training)),
    }
    page = _render(
        headline=conclusion.headline(verdicts, like_random),
        against_rivals=conclusion.against_rivals(verdicts, like_random),
        warnings=[sentence for sentence in warnings if sentence],
        tasks=sorted(table["task"].unique()),
        date=read["created"].max(),
        charts=charts,
        table=shown,
        columns=columns,
        sheets=sheets,
        loss_sentence=loss_sentence(correlations),
        facts=provenance.facts(read),
        styles=styles(table),
    )
    files = table_files("returns", shown[RETURNS], [Column("task", "Task"), *columns])
    for name, sheet in sheets.items():
        files |= table_files(name, *sheet) if len(sheet[0]) else {}
    return save_report(page, charts, files, destination)


def terminal_table(results: Path | Sequence[Path]) -> Group:
    """Return the table of returns for 80 columns, and lines of what was left out. UserError as for `read_results`."""
    read = read_results(results)
    lines = [Text(printable(line), no_wrap=True, overflow="ignore") for line in read.attrs["left_out"]]
    return Group(to_rich(returns_table(read)), *lines)


def to_rich(table: pd.DataFrame) -> rich.table.Table:
    """Return the table of `returns_table` for a terminal: a part per task, intervals in brackets."""
    shown = rich.table.Table(box=box.SIMPLE_HEAD, padding=0)
    shown.add_column("Method", overflow="fold")  # shrinks if the terminal is narrow
    names = ["Context", "Return\n[95 %]", "First", "Last", "Best of n\n(control)", "Seeds"]
    has_failed = bool(table["failed"].any())
    for name in names + ["Failed"] * has_failed:
        shown.add_column(name, justify="right", no_wrap=True)
    for task, rows in table.groupby("task"):
        shown.add_section()
        shown.add_row(f"[bold]{escape(printable(str(task)))}")
        for _, row in rows.replace({float("nan"): None}).iterrows():
            lengths = [row["train_trajectories"], row["test_trajectories"]] if row["train_trajectories"] else []
            context = "/".join(dict.fromkeys(map(count, lengths)))
            context += f" +{count(row['prompt_trajectories'])}" if row["prompt_trajectories"] else ""
            interval = "" if row["low"] is None else f" [{number(row['low'])}, {number(row['high'])}]"
            control = "" if row["best_control"] is None else f" ({number(row['best_control'])})"
            shown.add_row(
                escape(printable(row["method"])), context or ABSENT, escape(number(row["iqm"]) + interval),
                number(row["first"]), number(row["last"]), number(row["best"]) + control,
                count(row["seeds"]) if row["seeds"] else ABSENT, *[count(row["failed"])] * has_failed,
            )  # fmt: skip
    return shown


def table_files(name: str, table: pd.DataFrame, columns: Sequence[Column]) -> dict[str, bytes]:
    """Return a table as CSV at full precision, and its displayed columns as LaTeX (booktabs): path -> content."""
    lines = [[column.line(row) for column in columns] for _, row in table.iterrows()]
    shown = pd.DataFrame(lines, columns=[column.heading for column in columns])
    is_text = [pd.api.types.is_string_dtype(table[column.name]) for column in columns]
    alignment = "".join("l" if text else "r" for text in is_text)
    latex = shown.to_latex(index=False, escape=True, column_format=alignment)
    for sign, written in _LATEX.items():
        latex = latex.replace(sign, written)
    files = {"csv": table.to_csv(index=False, lineterminator="\n"), "tex": f"% needs \\usepackage{{booktabs}}\n{latex}"}
    return {f"{TABLES}/{name}.{suffix}": text.encode() for suffix, text in files.items()}


def _render(**values: Any) -> str:
    """Return the page made from its template."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ringrl.report"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"spec": _spec, "contents": _contents}
    shared = {"palette": PALETTE, "figures": FIGURES, "tables": TABLES, "vega": _vega()}
    return environment.get_template("report.html").render(shared | values)


def save_report(page: str, charts: Sequence[Chart], files: Mapping[str, bytes], destination: Path) -> Path:
    """Write the figures and the other files of a report, the page last. Return its path. UserError if this fails."""
    figures = {f"{FIGURES}/{name}": content for chart in charts for name, content in chart_files(chart).items()}
    with explain_write_errors(destination):
        for file, content in {**files, **figures, PAGE: page.encode()}.items():
            path = destination / file
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, content, alone=False)
    return destination / PAGE


@cache
def _vega() -> Markup:
    """Return Vega, Vega-Lite and Vega-Embed as one script."""
    script = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return Markup(script.replace("</script", "<\\/script"))


def _contents(page: str) -> list[tuple[str, str]]:
    """Return the id and the heading of each section, in the order of the page."""
    return re.findall(r'<section id="(\w+)">(?:\s|<div[^>]*>)*<h2>(.*?)</h2>', page)


def _spec(panel: Any) -> Markup:
    strict = json.loads(json.dumps(page_spec(panel)), parse_constant=lambda name: None)  # JSON has no NaN or Infinity
    return Markup(json.dumps(strict, sort_keys=True).replace("<", "\\u003c"))


def _used(columns: Sequence[Column], table: pd.DataFrame) -> list[Column]:
    """Return the columns with a value. Columns of failures, prompts and convergence need a value other than zero."""
    zero = ("failed", "prompt_trajectories", "converged")
    return [
        column for column in columns
        if table[column.name].notna().any() and not (column.name in zero and not table[column.name].any())
    ]  # fmt: skip
