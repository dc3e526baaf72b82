"""Whether what stands on one curve was trained alike, but for the length of the context."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from ringrl.study.report_cells import Cell, Grid
from ringrl.study.report_variants import settings_of_any_length, usual_settings
from ringrl.training.budget import Budget

_KINDS = ("steps", "timesteps", "tokens", "flops", "seconds")
_ALIKE = 1.25  # times; steps are whole, and seconds differ


def settings_warning(grid: Grid) -> str | None:
    """What has to be said above all comparisons where settings differ along a curve; None where they do not."""
    said = [
        f"{grid.name(variant)} on {task}: {'; '.join(unlike)}"
        for task in grid.tasks
        for variant in grid.variants
        if (unlike := _unlike(cells := grid.cells_of(task, variant)) + _unlike_budgets(cells))
    ]
    if not said:
        return None
    return (
        f"Not only the length of the context differs along a curve ({'. '.join(said)}), so a part of what differs may "
        "lie in that."
    )


def _unlike(cells: Iterable[Cell]) -> list[str]:
    """Settings that are not the same at all lengths, with their values."""
    of_length: dict[int, Mapping[str, str]] = {}
    for cell in cells:
        for record in cell.records:
            of_length[cell.train or 0] = dict(settings_of_any_length(record))  # one cell's records have the same
    usual = usual_settings()
    found: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for name in sorted({name for settings in of_length.values() for name in settings}):
        for length, settings in sorted(of_length.items()):
            found[name][settings.get(name, usual.get(name, ""))].append(length)
    return [
        f"{name} {', '.join(f'{value} with {_listed(lengths)}' for value, lengths in values.items())}"
        for name, values in found.items()
        if len(values) > 1
    ]


def _unlike_budgets(cells: Iterable[Cell]) -> list[str]:
    """The steps of each length, where lengths have no budget in common: neither steps nor data, work nor time."""
    of_length: dict[int, list[Budget]] = defaultdict(list)
    for cell in cells:
        of_length[cell.train or 0] += cell.budgets.values()
    everyone = [budget for budgets in of_length.values() for budget in budgets]
    if any(_is_shared([getattr(budget, kind) for budget in everyone]) for kind in _KINDS):
        return []
    return [
        "training of "
        + ", ".join(
            f"{' or '.join(sorted({f'{budget.steps:,}' for budget in budgets}))} steps with {length}"
            for length, budgets in sorted(of_length.items())
            if budgets
        )
    ]


def _is_shared(amounts: Sequence[float | None]) -> bool:
    told = [amount for amount in amounts if amount is not None]
    return len(told) == len(amounts) and max(told, default=0) <= _ALIKE * min(told, default=0)


def _listed(lengths: Iterable[int]) -> str:
    return " and ".join(map(str, lengths))
