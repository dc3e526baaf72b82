"""Tables that stand on the page, in CSV and in LaTeX alike."""

import csv
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ringrl.evaluation.formatting import ABSENT, MINUS, decimal
from ringrl.evaluation.statistics import Estimate, Interval
from ringrl.study.tables import Row

Value = float | str | None

_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", MINUS: "$-$", ABSENT: "--", "<": r"\textless{}",
    ">": r"\textgreater{}", "\N{NO-BREAK SPACE}": "~",
}  # fmt: skip


@dataclass(frozen=True)
class Column:
    """A heading, and what it means."""

    name: str
    hint: str = ""


@dataclass(frozen=True)
class Entry:
    """What a cell shows, and what it is sorted by and written to CSV as (None: absent)."""

    text: str
    value: Value
    note: str = ""  # its interval: smaller, below; in LaTeX beside
    interval: Interval | None = None  # the same as numbers, two more columns in CSV


@dataclass(frozen=True)
class Sheet:
    """A table; its first column names the rows."""

    name: str  # of its files, without suffix
    columns: tuple[Column, ...]
    rows: tuple[tuple[Entry, ...], ...]

    def files(self) -> dict[str, bytes]:
        """The table as CSV and LaTeX: file name -> content."""
        return {f"{self.name}.csv": self.csv().encode(), f"{self.name}.tex": self.latex().encode()}

    def csv(self) -> str:
        """Values with a header line, at full precision; empty where one is absent."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        wide = [any(row[index].interval for row in self.rows) for index in range(len(self.columns))]
        names = [[name, f"{name}, low", f"{name}, high"] for name in (column.name for column in self.columns)]
        writer.writerow(name for three, is_wide in zip(names, wide, strict=True) for name in three[: 1 + 2 * is_wide])
        for row in self.rows:
            threes = [(entry.value, *_ends(entry)) for entry in row]
            writer.writerow(
                value for three, is_wide in zip(threes, wide, strict=True) for value in three[: 1 + 2 * is_wide]
            )
        return text.getvalue()

    def latex(self) -> str:
        """A tabular for a paper, to be \\input; needs the package booktabs."""
        numeric = [
            all(not isinstance(row[index].value, str) for row in self.rows) for index in range(len(self.columns))
        ]
        lines = [
            "% needs \\usepackage{booktabs}",
            f"\\begin{{tabular}}{{{''.join('r' if right else 'l' for right in numeric)}}}",
            "\\toprule",
            _latex_row([column.name for column in self.columns]),
            "\\midrule",
        ]
        for index, row in enumerate(self.rows):
            if index and row[0].value != self.rows[index - 1][0].value and self._repeats():
                lines.append("\\addlinespace")
            lines.append(_latex_row([f"{entry.text} {entry.note}".strip() for entry in row]))
        return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", ""])

    def _repeats(self) -> bool:
        names = [row[0].value for row in self.rows]
        return len(set(names)) < len(names)


def returns_sheet(table: Sequence[Row]) -> Sheet:
    """The table of returns as a paper would print it; `to_csv` has all columns."""
    names = ["Task", "Method", "Trained on", "Rolled out", "IQM", "95 % interval", "Score", "First", "Last"]
    columns = tuple(Column(name) for name in [*names, "Best of n", "Control", "Seeds"])
    return Sheet("returns", columns, tuple(_returns(row) for row in table))


def _returns(row: Row) -> tuple[Entry, ...]:
    interval = Entry(ABSENT, None) if row.low is None else Entry(f"[{decimal(row.low)}, {decimal(row.high)}]", row.low)

    def shown(value: float | None) -> Entry:
        return Entry(decimal(value), value)

    def counted(value: int | None) -> Entry:
        return Entry(ABSENT if value is None else str(value), value)

    return (
        *texts(row.task, row.method), counted(row.train_trajectories), counted(row.test_trajectories),
        shown(row.iqm), interval,
        *map(shown, (row.score, row.first, row.last, row.best, row.best_control)), counted(row.seeds),
    )  # fmt: skip


def measured(found: Estimate, shown: Callable[[float], str]) -> Entry:
    """An estimate; its interval below, and none where there is none."""
    ends = found.interval
    return Entry(shown(found.value), found.value, f"[{shown(ends.low)}, {shown(ends.high)}]" if ends else "", ends)


def _ends(entry: Entry) -> tuple[float | None, float | None]:
    return (entry.interval.low, entry.interval.high) if entry.interval else (None, None)


def texts(*values: str) -> tuple[Entry, ...]:
    """Cells that hold words."""
    return tuple(Entry(value, value) for value in values)


def _latex_row(cells: Sequence[str]) -> str:
    escaped = (re.sub("|".join(map(re.escape, _LATEX)), lambda found: _LATEX[found[0]], cell) for cell in cells)
    return " & ".join(escaped) + " \\\\"
