"""Whether what stands side by side was rolled out from the same starts."""

from collections import defaultdict

from ringrl.study.report_cells import Cell, Grid
from ringrl.study.tables import describe

Starts = frozenset[frozenset[tuple[int, int]]]
_NAMED = 4  # cells of one kind that are named


def starts_facts(grid: Grid) -> list[str]:
    """A line per task: how many starts, where all policies had the same; else who had which."""
    lines = []
    for task in grid.tasks:
        groups = _groups(grid, task)
        if groups:
            said = f"{_count(next(iter(groups)))}, the same for all" if _alike(groups) else _listed(grid, groups)
            lines.append(f"{task}: {said}")
    return lines


def starts_warning(grid: Grid) -> str | None:
    """What has to be said above all comparisons where the starts differ; None where they do not."""
    unlike = {task: groups for task in grid.tasks if not _alike(groups := _groups(grid, task))}
    if not unlike:
        return None
    said = "; ".join(f"on {task} {_listed(grid, groups)}" for task, groups in unlike.items())
    return (
        f"Not all was rolled out from the same starts: {said}. Some starts are harder than others, so a part of what "
        "differs may lie in them."
    )


def _alike(groups: dict[Starts, list[Cell]]) -> bool:
    """Whether all policies and training seeds had the same starts."""
    return len(frozenset().union(*groups)) <= 1


def _groups(grid: Grid, task: str) -> dict[Starts, list[Cell]]:
    """The policies on a task by where they started, those of the fewest starts first."""
    groups: dict[Starts, list[Cell]] = defaultdict(list)
    for cell in grid.cells:
        if cell.task == task:
            groups[cell.starts].append(cell)
    return dict(sorted(groups.items(), key=lambda group: _numbers(group[0])))


def _listed(grid: Grid, groups: dict[Starts, list[Cell]]) -> str:
    parts = []
    for starts, cells in groups.items():
        names = [describe(grid, cell) for cell in cells[:_NAMED]]
        more = f" and {len(cells) - _NAMED} more" if len(cells) > _NAMED else ""
        parts.append(f"{_count(starts)} for {', '.join(names)}{more}")
    return ", ".join(parts)


def _count(starts: Starts) -> str:
    numbers = _numbers(starts)
    if len(starts) > 1:
        return f"{' or '.join(map(str, numbers))} starts, which differ by training seed,"
    return "1 start" if numbers == [1] else f"{numbers[0]} starts"


def _numbers(starts: Starts) -> list[int]:
    """How many there are, of each kind of training seed."""
    return sorted({len(one) for one in starts})
