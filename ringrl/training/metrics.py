"""Where a run's numbers go: metrics.jsonl (one line per step), TensorBoard, and a live line in the terminal."""

import json
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter


class MetricsLog:
    """metrics.jsonl and TensorBoard of one run, continued after `step`.

    Lines beyond `step` come from work that a kill has undone; they are dropped, and written again when it is redone.
    """

    def __init__(self, run: Path, step: int) -> None:
        self._path = run / "metrics.jsonl"
        self._drop_after(step)
        self._file = self._path.open("a")
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def _drop_after(self, step: int) -> None:
        if not self._path.exists():
            return
        kept = []
        for line in self._path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # the line that a kill cut in half
                break
            if entry["step"] > step:
                break
            kept.append(line + "\n")
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        temporary.replace(self._path)

    def write(self, entries: list[dict[str, float]]) -> None:
        """Append one line per entry; each holds `step` and named numbers."""
        self._file.write("".join(json.dumps(entry) + "\n" for entry in entries))
        self._file.flush()
        for entry in entries:
            for name, value in entry.items():
                if name != "step":
                    self._board.add_scalar(name, value, int(entry["step"]))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
        self._board.close()


def progress_bar(console: Console, disable: bool) -> Progress:
    """Steps done, loss, tokens per second, time left."""
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}  {task.fields[rate]:,.0f} tokens/s"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=disable,
    )
