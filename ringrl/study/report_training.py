"""What the runs wrote while they trained, read from the metrics.jsonl of their folders."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, NullLocator

from ringrl.config import TrainConfig, read_yaml
from ringrl.errors import UserError
from ringrl.evaluation.records import EvaluationRecord, Results, configuration_hash, recipe
from ringrl.study.report_cells import Grid, summarise
from ringrl.study.report_draw import Chart, Panel, Point, context_axis, draw_line, dress, linestyle, styles
from ringrl.study.report_svg import colour
from ringrl.study.report_variants import Variant

POINTS = 80  # of a learning curve; steps between are averaged
MEMORY = "peak_memory_bytes"  # its name in metrics.jsonl, where the compiler tells it
_SPREAD = 20  # ratio of the largest to the smallest loss from which the axis is logarithmic


@dataclass(frozen=True)
class TrainingRun:
    """One run folder's metrics."""

    folder: Path
    record: EvaluationRecord  # one that its checkpoint was measured with
    variant: Variant
    length: int | None  # trajectories per training context; None for a method without
    steps: Float[np.ndarray, " lines"]
    losses: Float[np.ndarray, " lines"]  # NaN where a step's was not finite
    tokens_per_second: float | None  # median over the lines, so that compilation and checkpoints do not count
    peak_memory: float | None  # bytes, the largest of the lines

    def curve(self, points: int = POINTS) -> tuple[np.ndarray, np.ndarray]:
        """Steps and losses (points,), each the mean of a stretch of the run; what is not finite is left out."""
        finite = np.isfinite(self.losses)
        stretches = np.array_split(np.arange(finite.sum()), min(points, int(finite.sum())) or 1)
        steps, losses = self.steps[finite], self.losses[finite]
        means = [(steps[part].mean(), losses[part].mean()) for part in stretches if len(part)]
        return tuple(np.array(means, np.float64).reshape(-1, 2).T)  # type: ignore[return-value]


def training_runs(read: Results, grid: Grid) -> list[TrainingRun]:
    """The runs behind the results whose folders are there, each once; a folder of another run is passed over."""
    beside = sorted({source.parent for source in read.sources})
    found: dict[Path, TrainingRun] = {}
    for cell in grid.cells:
        for record in {record.checkpoint: record for record in cell.records if record.checkpoint}.values():
            folder = run_folder(record, beside)
            if folder is None or folder.resolve() in found:
                continue
            steps, losses, speeds, memory = _metrics(folder / "metrics.jsonl")
            if len(steps):
                found[folder.resolve()] = TrainingRun(
                    folder, record, cell.variant, cell.train, steps, losses,
                    tokens_per_second=float(np.median(speeds)) if len(speeds) else None,
                    peak_memory=float(np.max(memory)) if len(memory) else None,
                )  # fmt: skip
    return list(found.values())


def training_charts(runs: Sequence[TrainingRun], grid: Grid) -> list[Chart]:
    """Learning curves, and throughput and memory against the length of the context, as far as the runs tell."""
    charts = [_learning(runs, grid)] if runs else []
    with_context = [run for run in runs if run.length is not None]
    speeds = [run for run in with_context if run.tokens_per_second is not None]
    if speeds:
        caption = (
            "Tokens per second in training: the median over the steps of a run, so that compilation and checkpoints do "
            "not count; interquartile mean and 95 % interval over seeds. Compare runs on one machine only."
        )
        if all(run.peak_memory is None for run in runs):
            caption += " The runs' metrics do not tell how much memory they took, so memory is not shown."
        charts.append(_by_length("throughput", "Throughput", caption, "tokens per second", speeds, grid))
    memory = [run for run in with_context if run.peak_memory is not None]
    if memory:
        caption = (
            "The most memory that a device holds at once in a training step, as the compiler counts it: parameters, "
            "optimiser, scratch, and the run's own batch."
        )
        charts.append(_by_length("memory", "Memory", caption, "bytes per device", memory, grid))
    return charts


def run_folder(record: EvaluationRecord, beside: Sequence[Path]) -> Path | None:
    """The run's folder: beside its results, or where the record says. Its configuration must be of that run."""
    told = Path(str(record.checkpoint))
    fitting = []
    for folder in [*(place for place in beside if place.name == told.name), told]:
        try:
            if (folder / "metrics.jsonl").is_file():
                config = read_yaml(folder / "config.yaml")
                if _is_of(config, record):
                    return folder
                fitting += [folder] if _fits(config, record) else []
        except (UserError, OSError):
            continue
    return fitting[0] if fitting else None


def _is_of(config: dict[str, Any], record: EvaluationRecord) -> bool:
    """Whether it is, to the last setting, the configuration of the record's run."""
    try:
        return configuration_hash(TrainConfig.model_validate(config)) == record.configuration_hash
    except pydantic.ValidationError:
        return False


def _fits(config: dict[str, Any], record: EvaluationRecord) -> bool:
    """Whether it may be: a later version, or a place that data were moved to, changes the hash and none of these."""
    try:
        if record.settings not in (None, recipe(TrainConfig.model_validate(config))):
            return False
    except pydantic.ValidationError:
        pass  # what older versions wrote is judged by the rest
    context = config.get("context")
    context = context if isinstance(context, dict) else {}
    length = context.get("trajectories")
    if (record.train_task or record.task) not in (config.get("task"), *(context.get("other_tasks") or ())):
        return False
    told = length if record.train_trajectories is None else record.train_trajectories
    return (config.get("seed", 0), length) == (record.seed, told)


def _metrics(path: Path) -> tuple[np.ndarray, ...]:
    """Steps and losses (lines,), then what tokens per second and memory there are; a cut line is left out."""
    entries = list(_entries(path))
    steps = np.array([entry["step"] for entry in entries], np.float64)
    losses = np.array([entry.get("loss", np.nan) for entry in entries], np.float64)
    losses[~np.isfinite(losses)] = np.nan
    others = (
        np.array([entry[name] for entry in entries if np.isfinite(entry.get(name, np.nan))], np.float64)
        for name in ("tokens_per_second", MEMORY)
    )
    return steps, losses, *others


def _entries(path: Path) -> Iterator[dict[str, float]]:
    for line in path.read_text(errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int | float):
            yield {name: value for name, value in entry.items() if isinstance(value, int | float)}


def _learning(runs: Sequence[TrainingRun], grid: Grid) -> Chart:
    tasks = sorted({run.record.task for run in runs})
    panels = tuple(
        Panel(task, partial(_draw_learning, runs=[run for run in runs if run.record.task == task], grid=grid),
              f"Training loss on {task} by step.")
        for task in tasks
    )  # fmt: skip
    caption = (
        f"Training loss against the optimiser's step, a line per run, thinned to {POINTS} points that are each the "
        "mean of a stretch; the longer the context, the stronger the line. Losses of different methods "
        "measure different things: compare lines of one colour."
    )
    lost = sum(int(np.isnan(run.losses).sum()) for run in runs)
    if lost:
        caption += (
            f" {lost} step{'s' if lost > 1 else ''} without a finite loss {'are' if lost > 1 else 'is'} left out."
        )
    return Chart("learning_curves", "Learning curves", caption, panels, _keys(runs, grid), _records(runs))


def _draw_learning(axes: Axes, runs: Sequence[TrainingRun], grid: Grid) -> None:
    known = styles(grid)
    lengths = sorted({run.length for run in runs if run.length is not None})
    values = []
    for run in sorted(runs, key=lambda run: run.length or 0):
        steps, losses = run.curve()
        key = known[run.variant]
        strength = 0.8 if run.length is None else 0.25 + 0.6 * (lengths.index(run.length) + 1) / len(lengths)
        axes.plot(steps, losses, color=colour(key.colour), linestyle=linestyle(key.dash), linewidth=1.1, alpha=strength)
        values += losses.tolist()
    if values and min(values) > 0 and max(values) / min(values) > _SPREAD:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")  # no raised powers: text stays text
        axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    dress(axes, "optimiser step", "loss")


def _by_length(name: str, title: str, caption: str, up: str, runs: Sequence[TrainingRun], grid: Grid) -> Chart:
    panels = tuple(
        Panel(task, partial(_draw_by_length, runs=[run for run in runs if run.record.task == task], grid=grid,
                            memory=name == "memory", up=up), f"{title} on {task} by context length.")
        for task in sorted({run.record.task for run in runs})
    )  # fmt: skip
    return Chart(name, f"{title} against context length", caption, panels, _keys(runs, grid), _records(runs))


def _draw_by_length(axes: Axes, runs: Sequence[TrainingRun], grid: Grid, memory: bool, up: str) -> None:
    known, highest = styles(grid), 0.0
    for variant in dict.fromkeys(run.variant for run in runs):
        points = []
        for length in sorted({run.length for run in runs if run.variant == variant and run.length}):
            alike = [run for run in runs if (run.variant, run.length) == (variant, length)]
            values = np.array([run.peak_memory if memory else run.tokens_per_second for run in alike], np.float64)
            points.append(Point(length, summarise(values), values))
            highest = max(highest, float(values.max()))
        draw_line(axes, points, known[variant])
    context_axis(axes, {run.length for run in runs if run.length})
    axes.set_ylim(0, 1.1 * highest)
    axes.yaxis.set_major_formatter(EngFormatter("B" if memory else "", sep="\N{NO-BREAK SPACE}"))
    dress(axes, "trajectories per training context", up)


def _keys(runs: Sequence[TrainingRun], grid: Grid) -> tuple:
    present = {run.variant for run in runs}
    return tuple(key for variant, key in styles(grid).items() if variant in present)


def _records(runs: Sequence[TrainingRun]) -> tuple[EvaluationRecord, ...]:
    return tuple(run.record for run in runs)
