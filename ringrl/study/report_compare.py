"""Two sets of results side by side: what differs in the returns, and what differs in how they came about."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import rich.table
from matplotlib.axes import Axes
from rich import box
from rich.markup import escape

from ringrl.config import read_yaml
from ringrl.errors import UserError
from ringrl.evaluation.formatting import ABSENT, MINUS, decimal, number
from ringrl.evaluation.records import Results
from ringrl.evaluation.statistics import Estimate
from ringrl.study.report import FIGURES, PAGE, TABLES, place, read_grid, render, write_files
from ringrl.study.report_cells import Cell, Grid, contrast, summarise
from ringrl.study.report_draw import PANEL, Chart, Panel, chart_files, dress
from ringrl.study.report_method import provenance
from ringrl.study.report_sheet import Column, Entry, Sheet, measured, texts
from ringrl.study.report_summary import caution
from ringrl.study.report_svg import colour
from ringrl.study.report_training import run_folder
from ringrl.study.tables import describe
from ringrl.training.run_folder import flat

_SAME_FOR_ALL = ("run", "seed", "data", "context.trajectories")  # settings that name a cell or a place
_RECORDED = ("target_policy", "target_return", "data_fingerprint", "device", "steps_trained", "token_set", "train_task",
             "prompt_trajectories", "cache_dtype")  # fmt: skip
_MANY_PAIRS = 10  # from which a 95 % interval is likely to miss somewhere
_MANY = 4  # values of one setting that are written out


@dataclass(frozen=True)
class Pair:
    """One cell in both sets."""

    task: str
    name: str  # method and context
    a: Cell
    b: Cell
    change: Estimate  # of the interquartile mean, B less A
    wins: Estimate  # probability that a run of B beats a run of A
    paired: bool  # whether A and B are of the same training runs

    @property
    def clear(self) -> bool:
        """Whether the interval of the change leaves out nought."""
        return self.change.interval is not None and 0 not in self.change.interval


@dataclass(frozen=True)
class Comparison:
    """Everything that the page of a comparison is made from."""

    pairs: tuple[Pair, ...]
    only_a: tuple[str, ...]  # cells without a counterpart
    only_b: tuple[str, ...]
    settings: tuple[tuple[str, str, str], ...]  # name, value in A, value in B, where they differ
    grids: tuple[Grid, Grid]


def compare(a: Sequence[Path], b: Sequence[Path]) -> Comparison:
    """Match the cells of two sets of results, and say what differs.

    Cells are the same if task, method and context lengths are; of several alike, those that are told apart in the same
    way. What else differs between the sets is told among the settings.

    Raises:
        UserError: either set has no results, cannot be read, or they have no cell in common.
    """
    (read_a, grid_a), (read_b, grid_b) = read_grid(a), read_grid(b)
    matched = _match(grid_a.cells, grid_b.cells)
    if not matched:
        raise UserError(
            f"{_names(a)} and {_names(b)} have no task, method and context length in common; give results that do"
        )
    taken = {id(cell) for pair in matched for cell in pair}
    return Comparison(
        pairs=tuple(_pair(grid_a, one, other) for one, other in matched),
        only_a=_left(grid_a, taken),
        only_b=_left(grid_b, taken),
        settings=tuple(_differences(_settings(read_a, grid_a), _settings(read_b, grid_b))),
        grids=(grid_a, grid_b),
    )


def write_comparison(a: Sequence[Path], b: Sequence[Path], destination: Path) -> tuple[Path, rich.table.Table]:
    """Write the page of a comparison, its figure and its tables; returns the page's path and a table for the terminal.

    Raises:
        UserError: as `compare`, or the folder cannot be written.
    """
    found = compare(a, b)
    returns, settings, chart = _returns_sheet(found), _settings_sheet(found), _chart(found)
    page = render(
        "compare.html",
        headline=headline(found),
        cautions=cautions(found),
        names=(_names(a), _names(b)),
        placed=place([chart])[0],
        returns=returns,
        settings=settings,
        found=found,
        made=[provenance(grid.records) for grid in found.grids],
        date=max(record.created for grid in found.grids for record in grid.records),
    )
    sheets = {**returns.files(), **settings.files()}
    files = {f"{TABLES}/{name}": content for name, content in sheets.items()}
    files |= {f"{FIGURES}/{name}": content for name, content in chart_files(chart).items()}
    return write_files({**files, PAGE: page.encode()}, destination), _to_rich(found)


def headline(found: Comparison) -> str:
    """What the intervals say, in a sentence."""
    judged = [pair for pair in found.pairs if pair.change.interval is not None]
    if not judged:
        return "One training seed: too few to say which is better."
    better = sum(pair.clear and pair.change.value > 0 for pair in judged)
    worse = sum(pair.clear and pair.change.value < 0 for pair in judged)
    if not better and not worse:
        return "B and A make no clear difference."
    of = f"of {len(judged)} comparison{'s' if len(judged) > 1 else ''}"
    said = [f"{'more' if more else 'less'} in {count}" for more, count in ((True, better), (False, worse)) if count]
    return f"B returns {' and '.join(said)} {of} than A."


def cautions(found: Comparison) -> list[str]:
    """What the comparisons that look clear may owe to chance, and others to their starts."""
    judged = [pair for pair in found.pairs if pair.change.interval is not None]
    clear = [(pair.change.runs, pair.paired) for pair in judged if pair.clear]
    said = [caution(clear)]
    if clear and len(judged) >= _MANY_PAIRS:
        said.append(f"Of {len(judged)} comparisons, about {len(judged) / 20:.0f} would look clear if nothing differed.")
    unlike = [f"{pair.name} on {pair.task}" for pair in found.pairs if pair.a.starts != pair.b.starts]
    if unlike:
        listed = ", ".join(unlike[:_MANY]) + (f" and {len(unlike) - _MANY} more" if len(unlike) > _MANY else "")
        said.append(
            f"A and B were not rolled out from the same starts: {listed}. Some starts are harder than others, so a "
            "part of what differs may lie in them."
        )
    return [sentence for sentence in said if sentence]


def _match(a: Iterable[Cell], b: Iterable[Cell]) -> list[tuple[Cell, Cell]]:
    """First those alike in everything, then the only ones left of a task, method and context lengths."""
    left = {(cell.task, cell.variant, cell.train, cell.test): cell for cell in b}
    matched, rest = [], []
    for cell in a:
        other = left.pop((cell.task, cell.variant, cell.train, cell.test), None)
        if other is None:
            rest.append(cell)
        else:
            matched.append((cell, other))
    groups: dict[tuple[object, ...], tuple[list[Cell], list[Cell]]] = defaultdict(lambda: ([], []))
    for side, cells in enumerate((rest, left.values())):
        for cell in cells:
            groups[cell.task, cell.variant.method, cell.train, cell.test][side].append(cell)
    matched += [(ours[0], theirs[0]) for ours, theirs in groups.values() if len(ours) == len(theirs) == 1]
    return sorted(matched, key=lambda pair: (pair[0].task, pair[0].variant, pair[0].train or 0, pair[0].test))


def _pair(grid: Grid, a: Cell, b: Cell) -> Pair:
    found = contrast(b, a)
    return Pair(a.task, describe(grid, a), a, b, found.change, found.wins, found.paired)


def _left(grid: Grid, taken: set[int]) -> tuple[str, ...]:
    return tuple(f"{cell.task}: {describe(grid, cell)}" for cell in grid.cells if id(cell) not in taken)


def _settings(read: Results, grid: Grid) -> dict[str, set[str]]:
    """Setting -> its values: those of the runs' configurations, where their folders are there, and of the records."""
    found: dict[str, set[str]] = defaultdict(set)
    beside = sorted({source.parent for source in read.sources})
    folders = set()
    for record in grid.records:
        for name in _RECORDED:
            value = getattr(record, name)
            if value is not None and record.method not in ("data", "random"):
                found[name].add(_shown(value))
        for library, version in record.versions.items():
            found[f"version of {library}"].add(version)
        if record.method != "data":
            folders.add(run_folder(record, beside) if record.checkpoint else None)
    for folder in folders - {None}:
        for name, value in flat(read_yaml(Path(str(folder)) / "config.yaml")).items():
            if name not in _SAME_FOR_ALL:
                found[name].add(_shown(value))
    for cell in grid.cells:
        found["streams per training seed"] |= {str(len(streams)) for streams in cell.streams.values()}
    return found


def _differences(a: dict[str, set[str]], b: dict[str, set[str]]) -> list[tuple[str, str, str]]:
    names = sorted({*a, *b})
    return [(name, _listed(a.get(name)), _listed(b.get(name))) for name in names if a.get(name) != b.get(name)]


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)[:12] if isinstance(value, str) and len(value) == 64 else str(value)


def _listed(values: set[str] | None) -> str:
    if not values:
        return ABSENT
    ordered = sorted(values)
    more = f" and {len(ordered) - _MANY} more" if len(ordered) > _MANY else ""
    return ", ".join(ordered[:_MANY]) + more


def _names(paths: Sequence[Path]) -> str:
    return ", ".join(map(str, paths))


def _returns_sheet(found: Comparison) -> Sheet:
    columns = (
        Column("Task"), Column("Method"), Column("A", "interquartile mean over training seeds, 95 % interval"),
        Column("B", "the same"), Column(f"B {MINUS} A", "difference of the interquartile means, 95 % interval"),
        Column("P(B > A)", "probability that a run of B beats one of A; a tie is half a win; absent for one seed"),
        Column("Seeds of A"), Column("Seeds of B"),
    )  # fmt: skip
    rows = []
    for pair in found.pairs:
        sides = [summarise(cell.runs()) for cell in (pair.a, pair.b)]
        levels = [measured(side, decimal) for side in sides]
        seeds = [Entry(str(side.runs), side.runs) for side in sides]
        rows.append((*texts(pair.task, pair.name), *levels, _change(pair), _chance(pair), *seeds))
    return Sheet("comparison", columns, tuple(rows))


def _settings_sheet(found: Comparison) -> Sheet:
    columns = Column("Setting"), Column("A"), Column("B")
    return Sheet("settings", columns, tuple(texts(*row) for row in found.settings))


def _change(pair: Pair) -> Entry:
    return measured(pair.change, partial(number, sign=True))


def _chance(pair: Pair) -> Entry:
    """That B beats A; of one run each it would be sure by chance, so it is absent."""
    return measured(pair.wins, "{:.2f}".format) if pair.wins.interval else Entry(ABSENT, None)


def _to_rich(found: Comparison) -> rich.table.Table:
    shown = rich.table.Table(box=box.SIMPLE_HEAD, padding=0)
    shown.add_column("Method")
    for name in ("A", "B", f"B {MINUS} A\n[95 %]", "P(B > A)"):
        shown.add_column(escape(name), justify="right", no_wrap=True)
    for index, pair in enumerate(found.pairs):
        if index == 0 or pair.task != found.pairs[index - 1].task:
            shown.add_section()
            shown.add_row(f"[bold]{escape(pair.task)}")
        change = f"{_change(pair).text} {_change(pair).note}".strip()
        levels = (number(summarise(cell.runs()).value) for cell in (pair.a, pair.b))
        shown.add_row(escape(pair.name), *levels, escape(change), _chance(pair).text)
    return shown


def _chart(found: Comparison) -> Chart:
    panels = []
    for task in dict.fromkeys(pair.task for pair in found.pairs):
        pairs = [pair for pair in found.pairs if pair.task == task]
        words = "; ".join(f"{pair.name}: {number(pair.change.value, sign=True)}" for pair in pairs)
        panels.append(Panel(task, partial(_draw, pairs=pairs), words, (PANEL[0], 0.75 + 0.42 * len(pairs))))
    caption = (
        "How much more B returns than A: the difference of the interquartile means over training seeds, with its 95 % "
        "interval (bootstrap over the seeds of both; training runs that are in A and B alike are drawn together, and "
        "count alone). Where the interval crosses the dashed line there is no clear difference. A point without a bar "
        "has one seed on a side: no interval can be given."
    )
    records = tuple(record for grid in found.grids for record in grid.records)
    return Chart("difference", "B less A", caption, tuple(panels), (), records)


def _draw(axes: Axes, pairs: Sequence[Pair]) -> None:
    for height, pair in enumerate(reversed(pairs)):
        axes.plot([0] * 2, [height - 0.2, height + 0.2], color=colour("muted"), linewidth=1, linestyle=(0, (2, 2)))
        shade = colour("series-1" if pair.clear else "muted")
        if pair.change.interval:
            ends = [pair.change.interval.low, pair.change.interval.high]
            axes.plot(ends, [height] * 2, color=shade, linewidth=5, alpha=0.3, solid_capstyle="butt")
        axes.plot([pair.change.value], [height], "o", color=shade, markersize=5.5)
        axes.text(
            0.0, height + 0.27, pair.name, transform=axes.get_yaxis_transform(), fontsize=8.5, color=colour("ink")
        )
    axes.set_ylim(-0.5, len(pairs) - 0.2)
    axes.margins(x=0.08)
    axes.set_yticks([])
    dress(axes, "difference of the return per episode", "")
