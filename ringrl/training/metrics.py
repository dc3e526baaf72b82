"""Where a run's numbers go: metrics.jsonl (one line per step), boards to look at, and a live line in the terminal."""

import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import jax
import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from ringrl.config import TrainConfig
from ringrl.errors import UserError
from ringrl.files import write_whole
from ringrl.training.boards import Board, open_boards
from ringrl.training.optimiser import learning_rate


class MetricsLog:
    """metrics.jsonl of one run, continued after `step`, and the boards that show the same.

    Lines beyond `step` come from work that a kill has undone; they are dropped, and written again when it is redone.
    Damaged ones are dropped, too. `missing` counts the steps up to `step` that have no line any more.
    """

    missing = 0

    def __init__(self, run: Path, step: int, boards: Sequence[Board] = ()) -> None:
        self._path = run / "metrics.jsonl"
        self._drop_after(step)
        self._file = self._path.open("a")
        self._boards = boards

    def _drop_after(self, step: int) -> None:
        kept = []
        for line in self._path.read_bytes().splitlines() if self._path.exists() else ():
            try:
                if json.loads(line)["step"] > step:
                    break
            except (ValueError, KeyError, TypeError):
                continue  # damaged, or cut in half by a kill
            kept.append(line + b"\n")
        self.missing = step - len(kept)
        write_whole(self._path, b"".join(kept))

    def write(self, entries: list[dict[str, float]]) -> None:
        """Append one line per entry; each holds `step` and named numbers."""
        self._file.write("".join(json.dumps(entry) + "\n" for entry in entries))
        self._file.flush()
        for board in self._boards:
            board.write(entries)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with ExitStack() as all_of_them:  # even where one meets a full disk
            for board in self._boards:
                all_of_them.callback(board.close)
            all_of_them.callback(self._file.close)


class SilentLog(MetricsLog):
    """Of a process whose numbers another one writes: it writes nothing."""

    def __init__(self) -> None:
        pass

    def write(self, entries: list[dict[str, float]]) -> None:
        """Nothing."""

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass


def open_log(config: TrainConfig, step: int) -> MetricsLog:
    """The log of a run, continued after `step`; of several processes, the first writes it."""
    if jax.process_index() != 0:
        return SilentLog()
    return MetricsLog(config.run, step, open_boards(config, step))


def progress_bar(console: Console, disable: bool) -> Progress:
    """Steps done, loss, speed, time left."""
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeRemainingColumn(table_column=Column(no_wrap=True, min_width=7)),  # in a narrow terminal, this is what stays
        TextColumn("left  {task.fields[speed]}", table_column=Column(no_wrap=True)),
        TimeElapsedColumn(),
        console=console,
        disable=disable,
    )


class Cost(NamedTuple):
    """What a step takes."""

    tokens: int
    flops: float | None  # operations of the model, where they are counted (training/throughput.py)
    peak_flops: float | None  # operations per second of all devices, where a data sheet says so


class Recorder:
    """Holds metrics on the device until it is time to write them, so that logging never stalls the step."""

    failure: UserError | None = None  # once more steps in a row were skipped than the configuration allows
    memory: int | None = None  # bytes that a step takes on each device, once that is known

    def __init__(self, config: TrainConfig, cost: Cost, log: MetricsLog, progress: Progress) -> None:
        self._config, self._cost, self._log, self._progress = config, cost, log, progress
        self._schedule = jax.jit(learning_rate(config.optimiser))
        self._task: TaskID | None = None
        self._skipped_in_a_row = 0
        self._waiting: list[tuple[int, dict[str, jax.Array]]] = []
        self._since = time.perf_counter()

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Take the metrics of one step."""
        self._waiting.append((step, metrics))

    def flush(self) -> float | None:
        """Write what waits, and return the mean of its finite losses; this is where the host meets the device."""
        values = jax.device_get(self._waiting)
        now = time.perf_counter()
        speed = self._speed((now - self._since) / len(values))
        if self.memory is not None:
            speed["peak_memory_bytes"] = self.memory
        entries = []
        for step, metrics in values:
            entry = {"step": step} | {name: float(value) for name, value in metrics.items()}
            entries.append(entry | {"learning_rate": float(self._schedule(step - 1))} | speed)
        self._log.write(entries)
        losses = [entry["loss"] for entry in entries if np.isfinite(entry["loss"])]
        loss = float(np.mean(losses)) if losses else None
        self._show(values[-1][0], loss, speed)
        self._waiting, self._since = [], now
        self._report_skipped(entries)
        return loss

    def _speed(self, seconds: float) -> dict[str, float]:
        """Of a step that took so long: with the wait for its batch, for checkpoints, and for the first compilation."""
        speed = {"steps_per_second": 1 / seconds, "tokens_per_second": self._cost.tokens / seconds}
        if self._cost.flops is not None:
            speed["model_flops_per_second"] = self._cost.flops / seconds
            if self._cost.peak_flops is not None:
                speed["mfu"] = speed["model_flops_per_second"] / self._cost.peak_flops
        return speed

    def _show(self, step: int, loss: float | None, speed: dict[str, float]) -> None:
        loss = np.nan if loss is None else loss
        said = f"{speed['tokens_per_second']:,.0f} tokens/s"
        if "model_flops_per_second" in speed:
            said += f"  {speed['model_flops_per_second'] / 1e9:,.1f} GFLOP/s"
        if "mfu" in speed:
            said += f"  MFU {speed['mfu']:.1%}"
        if self._task is None:
            self._task = self._progress.add_task("training", total=self._config.optimiser.steps, loss=loss, speed=said)
        self._progress.update(self._task, completed=step, loss=loss, speed=said)

    def _report_skipped(self, entries: list[dict[str, float]]) -> None:
        allowed = self._config.optimiser.skipped_steps
        for entry in entries:
            self._skipped_in_a_row = self._skipped_in_a_row + 1 if entry.get("skipped") else 0
            if not self._skipped_in_a_row:
                continue
            what = f"step {entry['step']:.0f} (batch {entry['step'] - 1:.0f} of seed {self._config.seed})"
            self._progress.console.print(f"{what} skipped: its loss or gradients are not finite")
            if self._skipped_in_a_row > allowed and self.failure is None:
                self.failure = UserError(
                    f"{self._config.run}: loss or gradients of {what} are not finite, as in the {allowed} steps "
                    "before; none changed the parameters; start a new --run with a lower optimiser.learning_rate"
                )
