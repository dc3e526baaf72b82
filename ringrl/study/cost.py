"""What an ablation will cost, before it starts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rich import box
from rich.table import Table

from ringrl.envs import domain_of
from ringrl.evaluation.formatting import ABSENT, duration
from ringrl.study.cells import Cell
from ringrl.study.timing import Timing, shape
from ringrl.training.budget import step_cost


class Cost(NamedTuple):
    """Of one cell."""

    steps: int  # of the optimiser
    tokens: int  # that the model sees in training
    flops: float  # of the transformer's blocks in training; 0 for other models, whose are not counted
    simulated: int  # environment steps of the evaluation
    seconds: float | None  # of training and evaluation together; None: not measured


def cost(cell: Cell, timings: Mapping[str, Timing]) -> Cost:
    """What the cell takes from where it stands to its end; an evaluation that is half done counts as a whole one."""
    config, length = cell.config, domain_of(cell.config.task).episode_length
    one, steps = step_cost(config, length), max(0, config.optimiser.steps - cell.steps_done)
    timing = timings.get(shape(cell))
    return Cost(
        steps=steps,
        tokens=steps * one.tokens,
        flops=steps * (one.flops or 0.0),
        simulated=sum(length * p.environments * p.episodes * (2 if p.control else 1) for p in cell.protocols),
        seconds=None if timing is None else timing.start + steps * timing.step + timing.evaluation,
    )


def with_steps_for(seconds: float, cell: Cell, timings: Mapping[str, Timing]) -> Cell:
    """The cell with as many optimiser steps as fit into these seconds; there is a timing for it."""
    steps = max(1, int(seconds / timings[shape(cell)].step))
    return cell.of_steps(steps)


def cost_table(cells: Sequence[Cell], timings: Mapping[str, Timing], finished: int, workers: int) -> Table:
    """Per kind of cell, and in all. Finished cells are counted as such and cost nothing any more."""
    costs = [cost(cell, timings) for cell in cells]
    kinds: dict[tuple[Path, str], list[Cost]] = {}
    for cell, found in zip(cells, costs, strict=True):
        kinds.setdefault((cell.folder.parent, cell.folder.name.rpartition("_seed")[0]), []).append(found)
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("Cell", "Number", "Steps", "Tokens", "TFLOP", "Simulated", "Time each"):
        shown.add_column(name, justify="left" if name == "Cell" else "right", no_wrap=True)
    tasks: set[str] = set()
    for (folder, name), group in kinds.items():
        if folder.name not in tasks:
            tasks.add(folder.name)
            shown.add_section()
            shown.add_row(f"[bold]{folder.name}")
        shown.add_row(name, str(len(group)), *_numbers(group[0]))
    shown.add_section()
    known = [found.seconds for found in costs if found.seconds is not None]
    total = Cost(
        steps=sum(found.steps for found in costs),
        tokens=sum(found.tokens for found in costs),
        flops=sum(found.flops for found in costs),
        simulated=sum(found.simulated for found in costs),
        seconds=sum(known) if known else None,
    )
    shown.add_row("in all", str(len(cells)), *_numbers(total))
    if known:
        at_once = min(workers, len(cells))
        shown.caption = f"about {duration(sum(known) / at_once)} with {at_once} at a time"
        if any(cell.videos for cell in cells):
            shown.caption += ", and the videos"
        if finished:
            shown.caption += f"; {finished} more are finished"
    return shown


def _numbers(found: Cost) -> list[str]:
    return [
        f"{found.steps:,}",
        f"{found.tokens:,}",
        f"{found.flops / 1e12:,.3g}" if found.flops else ABSENT,
        f"{found.simulated:,}",
        duration(found.seconds),
    ]
