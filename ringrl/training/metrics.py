"""Metrics of a run: metrics.jsonl (one line per step), TensorBoard, Weights & Biases, and the progress bar."""

import json
import os
import secrets
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
import rich.progress
from rich.console import Console
from rich.progress import Progress, TextColumn
from rich.table import Column
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import RecordWriter

from ringrl.attention.strategy import link_of
from ringrl.config import TrainConfig
from ringrl.errors import UserError, brief
from ringrl.files import with_crc, without_crc, write_whole
from ringrl.model.optimiser import learning_rate
from ringrl.pace import Pace
from ringrl.training.budget import StepCost


class TensorBoardWriter:
    """Events in the run's folder tensorboard/, resumed after `step`. TensorBoard then drops later, undone steps.

    The calling thread writes. tensorboardX's own writer uses a second thread and blocks forever on a full disk.
    """

    def __init__(self, run: Path, step: int) -> None:
        folder = run / "tensorboard"
        folder.mkdir(parents=True, exist_ok=True)
        self._records = RecordWriter(str(folder / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}"))
        self._add(Event(file_version="brain.Event:2"))
        self._add(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))  # drops this and later steps

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Write the numbers of a step. Raise OSError on a full disk."""
        scalars = [Summary.Value(tag=name, simple_value=number) for name, number in numbers.items()]
        self._add(Event(step=step, summary=Summary(value=scalars)))

    def close(self) -> None:
        """Flush. Raise OSError on a full disk."""
        self._records.close()

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())


class WandbWriter:
    """A Weights & Biases run of project "ringrl" in the run's folder wandb/, offline unless WANDB_MODE is set.

    A resumed run keeps its id, and `wandb sync` joins its parts. Steps that a kill has undone are in both parts.
    """

    def __init__(self, config: TrainConfig) -> None:
        import wandb

        id_file = config.run / "wandb" / "id.txt"
        if not id_file.exists():
            id_file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(id_file, secrets.token_hex(8))
        try:
            self._run: Any = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "ringrl"),
                name=config.run.name,
                dir=str(config.run),
                id=id_file.read_text().strip(),
                resume="allow",
                mode=os.environ.get("WANDB_MODE", "offline"),
                config=config.model_dump(mode="json"),
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.errors.Error as error:
            raise UserError(f"--log wandb: {brief(error)}; WANDB_MODE=offline needs no account") from error

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()


class MetricsLog(ExitStack):
    """metrics.jsonl of one run, resumed after `step`, and further writers of the same numbers. Exiting closes all.

    Damaged lines, duplicates and lines after `step`, whose work a kill has undone, are dropped. `missing` is the number
    of steps up to `step` that have no line.
    """

    def __init__(self, run: Path, step: int, writers: Sequence[TensorBoardWriter | WandbWriter] = ()) -> None:
        super().__init__()
        path, kept = run / "metrics.jsonl", dict[int, bytes]()
        for line in path.read_bytes().splitlines() if path.exists() else ():
            with suppress(ValueError, KeyError, TypeError):  # damaged, or cut short by a kill
                if (at := json.loads(without_crc(line.decode()))["step"]) <= step:
                    kept[at] = line + b"\n"
        self.missing = step - len(kept)
        write_whole(path, b"".join(kept.values()))
        self._writers = writers
        for writer in writers:
            self.callback(writer.close)
        self._file = self.enter_context(path.open("a"))

    def write(self, entries: list[dict[str, Any]]) -> None:
        """Append one line per entry: a dict of `step`, numbers (null if not finite), and lists for the file only."""
        rows = [{name: _finite(value) for name, value in entry.items()} for entry in entries]
        self._file.write("".join(with_crc(json.dumps(row)) + "\n" for row in rows))
        self._file.flush()
        for entry in entries:
            numbers = {name: value for name, value in entry.items() if not (name == "step" or isinstance(value, list))}
            for writer in self._writers:
                writer.write(int(entry["step"]), numbers)


def _finite(value: Any) -> Any:
    """Return a number, or a list of numbers, with None for NaN and infinity, which JSON lacks."""
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return value if np.isfinite(value) else None


def open_log(config: TrainConfig, step: int) -> AbstractContextManager[MetricsLog | None]:
    """Open the log of a run, resumed after `step`. It is None in all processes but the first, which writes for all."""
    if jax.process_index() != 0:
        return nullcontext()
    writers = (
        TensorBoardWriter(config.run, step) if name == "tensorboard" else WandbWriter(config) for name in config.log
    )
    return MetricsLog(config.run, step, list(writers))


class _ProgressBar(Progress):
    """A bar in terminals. In a notebook, `MetricsRecorder` shows a line instead: rich's bar needs ipywidgets there."""

    def start(self) -> None:
        if not self.console.is_jupyter:
            super().start()


def progress_bar(console: Console, disable: bool) -> Progress:
    """Return a progress bar with steps, loss, time left and speed."""
    return _ProgressBar(
        TextColumn("[bold]{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        # The minimum width keeps the time readable in a narrow terminal.
        rich.progress.TimeRemainingColumn(table_column=Column(no_wrap=True, min_width=7)),
        TextColumn("left  {task.fields[speed]}", table_column=Column(no_wrap=True)),
        rich.progress.TimeElapsedColumn(),
        console=console,
        disable=disable,
    )


class MetricsRecorder:
    """A buffer of metrics on the device, written from time to time, so that logging does not delay the steps."""

    failure: UserError | None = None  # to raise after too many consecutive skipped steps
    memory: int | None = None  # peak memory of a step in bytes per device, once known

    def __init__(self, config: TrainConfig, cost: StepCost, log: MetricsLog | None, progress: Progress) -> None:
        self._config, self._cost, self._log, self._progress = config, cost, log, progress
        self._peak_flops = peak_flops(config.mesh.devices)
        self._schedule = jax.jit(learning_rate(config.optimiser))
        self._task = progress.add_task("training", total=config.optimiser.steps, loss="", speed="")
        self._skipped_in_a_row = 0
        self._waiting: list[tuple[int, dict[str, Any]]] = []
        self._held_out: float | None = None  # last loss on held-out episodes
        self._in_place: Any = None  # line of a notebook
        self._since, self._pace = time.perf_counter(), Pace(at_once=True)

    def add(self, step: int, metrics: dict[str, Any]) -> None:
        """Buffer the metrics of one step."""
        self._waiting.append((step, metrics))

    def flush(self) -> float | None:
        """Write the buffered metrics and return the mean of their finite losses. Waits for the device."""
        values = jax.device_get(self._waiting)
        now = time.perf_counter()
        speed = self._speed((now - self._since) / len(values))
        if self.memory is not None:
            speed["peak_memory_bytes"] = self.memory
        entries: list[dict[str, Any]] = []
        for step, metrics in values:
            numbers = {name: np.asarray(value, np.float64).tolist() for name, value in metrics.items()}
            self._held_out = numbers.get("validation_loss", self._held_out)
            entries.append({"step": step, **numbers, "learning_rate": float(self._schedule(step - 1)), **speed})
        if self._log is not None:
            self._log.write(entries)
        losses = [entry["loss"] for entry in entries if np.isfinite(entry["loss"])]
        loss = float(np.mean(losses)) if losses else None
        self._show(values[-1][0], loss, speed)
        self._waiting, self._since = [], now
        self._report_skipped(entries)
        return loss

    def _speed(self, seconds: float) -> dict[str, float]:
        """Return the speed for these seconds per step, which include waiting for data, checkpoints and compilation."""
        speed = {"steps_per_second": 1 / seconds, "tokens_per_second": self._cost.tokens / seconds}
        if self._cost.flops is not None:
            speed["model_flops_per_second"] = self._cost.flops / seconds
            if self._peak_flops is not None:
                speed["mfu"] = speed["model_flops_per_second"] / self._peak_flops
        return speed

    def _show(self, step: int, loss: float | None, speed: dict[str, float]) -> None:
        losses = f"loss {np.nan if loss is None else loss:.4f}"
        losses += "" if self._held_out is None else f"  held out {self._held_out:.4f}"
        text = f"{speed['tokens_per_second']:,.0f} tokens/s"
        if "model_flops_per_second" in speed:
            text += f"  {speed['model_flops_per_second'] / 1e9:,.1f} GFLOP/s"
        if "mfu" in speed:
            text += f"  MFU {speed['mfu']:.1%}"
        self._progress.update(self._task, completed=step, loss=losses, speed=text)
        console = self._progress.console
        if self._progress.disable or console.is_terminal:
            return
        line = f"step {step} of {self._config.optimiser.steps}  {losses}  {text}"
        if console.is_jupyter:
            from IPython.display import display

            shown = {"text/plain": line}
            if self._in_place is None:
                self._in_place = display(shown, raw=True, display_id=True)
            else:
                self._in_place.update(shown, raw=True)
        elif self._pace.is_due():  # in the log of a job, for example
            console.print(line, soft_wrap=True)

    def _report_skipped(self, entries: list[dict[str, Any]]) -> None:
        allowed = self._config.optimiser.skipped_steps
        for entry in entries:
            self._skipped_in_a_row = self._skipped_in_a_row + 1 if entry.get("skipped") else 0
            if not self._skipped_in_a_row:
                continue
            where = f"step {entry['step']:.0f} (batch {entry['step'] - 1:.0f} of seed {self._config.seed})"
            self._progress.console.print(f"{where} skipped: its loss, gradients or new parameters are not finite")
            if self._skipped_in_a_row > allowed and self.failure is None:
                self.failure = UserError(
                    f"{self._config.run}: {where} gave numbers that are not finite, as did the {allowed} steps "
                    "before; none changed the parameters; start a new --run with a lower optimiser.learning_rate"
                )


def peak_flops(devices: int) -> float | None:
    """Return the dense bfloat16 operations per second of the devices by their data sheet; None if unknown."""
    device = jax.devices()[0]
    link = link_of(device.device_kind)
    return None if link is None or device.platform == "cpu" else devices * link.flops


def step_memory(step: Any, *arguments: Any) -> int | None:
    """Return the `peak_memory` of a jitted step that was called with such arguments. Nothing is compiled or read."""
    return peak_memory(step.lower(*arguments).compile(), jax.devices()[0].platform)


def peak_memory(compiled: Any, platform: str) -> int | None:
    """Return the peak memory of a compiled program in bytes per device; None if the compiler does not count it."""
    found = compiled.memory_analysis()
    if found is None:
        return None
    if platform == "cpu":  # its peak omits temporary buffers; a TPU's temp_size counts some that do not coexist
        return int(found.argument_size_in_bytes + found.temp_size_in_bytes)
    return int(found.peak_memory_in_bytes + found.generated_code_size_in_bytes)
