"""Returns task by task, with the columns that the Ring Attention paper printed beside ours."""

from collections.abc import Mapping
from types import MappingProxyType

from ringrl.evaluation.formatting import ABSENT, decimal
from ringrl.evaluation.scores import score_or_none
from ringrl.study.report_cells import Cell, Grid, summarise
from ringrl.study.report_sheet import Column, Entry, Sheet, measured

PUBLISHED_METHODS = ("BC-10%", "DT", "AT+BPT 32", "AT+RA 128")

# Ring Attention (2310.01889), the table of ExoRL; 32 and 128 are trajectories per context.
PUBLISHED: Mapping[str, tuple[float, float, float, float]] = MappingProxyType(
    {
        "walker_stand": (52.91, 34.54, 95.45, 98.23),
        "walker_run": (34.81, 49.82, 105.88, 110.45),
        "walker_walk": (13.53, 34.94, 78.56, 78.95),
        "cheetah_run": (34.66, 67.53, 178.75, 181.34),
        "jaco_reach": (23.95, 18.64, 87.56, 89.51),
        "cartpole_swingup": (56.82, 67.56, 120.56, 123.45),
    }
)

UNIT = (
    "The last four columns are copied from the Ring Attention paper (2310.01889), which does not say what they count. "
    "They cannot be returns as ours: it prints 98.23 for the best method on walker_stand, where doing nothing returns "
    "125. Nor are they scores in percent of the best return there is, which none could exceed. So they may be compared "
    "with one another, and not with the columns to their left."
)
_ARM = "The paper has one line for reaching with the arm of jaco and does not say for which of the four goals."


def published(task: str) -> tuple[float, float, float, float] | None:
    """What the paper printed for a task, in the order of PUBLISHED_METHODS; None where it has no such task."""
    return PUBLISHED.get("jaco_reach" if task.startswith("jaco_reach_") else task)


def words(grid: Grid) -> list[str]:
    """What has to be said beside the table."""
    known = [task for task in grid.tasks if published(task)]
    return [UNIT, *[_ARM] * any(task.startswith("jaco") for task in known)] if known else []


def by_task(grid: Grid) -> Sheet:
    """A row per task: each method's return and score at its longest context, then the published numbers."""
    variants = [*grid.variants, *(variant for variant in grid.context_free if variant.method != "random")]
    columns = [Column("Task")]
    for variant in variants:
        hint = "at the longest context measured; " if not variant.context_free else ""
        columns += [
            Column(grid.name(variant), f"{hint}interquartile mean over training seeds, and its 95 % interval"),
            Column(f"{grid.name(variant)}, score", "0: random policy, 100: the highest return the task allows"),
        ]
    with_published = any(published(task) for task in grid.tasks)
    if with_published:
        columns += [Column(f"{name}, published", "Ring Attention paper; unit unknown") for name in PUBLISHED_METHODS]
    rows = []
    for task in grid.tasks:
        row = [Entry(task, task)]
        for variant in variants:
            cells = grid.cells_of(task, variant)
            row += _entries(max(cells, key=lambda cell: (cell.train or 0, cell.test)) if cells else None)
        if with_published:
            printed = published(task) or (None,) * len(PUBLISHED_METHODS)
            row += [Entry(ABSENT if value is None else f"{value:.2f}", value) for value in printed]
        rows.append(tuple(row))
    return Sheet("returns_by_task", tuple(columns), tuple(rows))


def _entries(cell: Cell | None) -> list[Entry]:
    if cell is None:
        return [Entry(ABSENT, None)] * 2
    found = summarise(cell.runs())
    score = score_or_none(cell.task, found.value)
    return [measured(found, decimal), Entry(decimal(score), score)]
