"""Where metrics are looked at while a run goes on: TensorBoard, and Weights & Biases."""

import importlib.util
import os
import secrets
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import RecordWriter

from ringrl.config import TrainConfig
from ringrl.errors import UserError
from ringrl.files import write_whole


class Board(Protocol):
    """Takes what metrics.jsonl takes."""

    def write(self, entries: Sequence[Mapping[str, float]]) -> None:
        """Each entry holds `step` and named numbers."""

    def close(self) -> None:
        """There is no more."""


class TensorBoard:
    """Events in the run's folder tensorboard/, continued after `step`; what a kill undid is purged.

    They are written by the thread that brings them. tensorboardX's own writer has another thread do it, for which it
    waits for ever once that has met a full disk.
    """

    def __init__(self, run: Path, step: int) -> None:
        folder = run / "tensorboard"
        folder.mkdir(parents=True, exist_ok=True)
        self._records = RecordWriter(str(folder / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}"))
        self._add(Event(file_version="brain.Event:2"))
        self._add(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))  # later steps do not count

    def write(self, entries: Sequence[Mapping[str, float]]) -> None:
        """A scalar per name and step. Raises OSError."""
        for entry in entries:
            scalars = [Summary.Value(tag=name, simple_value=entry[name]) for name in entry if name != "step"]
            self._add(Event(step=int(entry["step"]), summary=Summary(value=scalars)))

    def close(self) -> None:
        """Flush. Raises OSError."""
        self._records.close()

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())


class WeightsAndBiases:
    """A run of project "ringrl" in the run's folder wandb/, offline unless WANDB_MODE says otherwise.

    A resumed run keeps its identity; `wandb sync` then joins its parts. Steps that a kill undid are in both parts.
    """

    def __init__(self, config: TrainConfig) -> None:
        import wandb

        try:
            self._run: Any = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "ringrl"),
                name=config.run.name,
                dir=str(config.run),
                id=_identity(config.run / "wandb"),
                resume="allow",
                mode=os.environ.get("WANDB_MODE", "offline"),
                config=config.model_dump(mode="json"),
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.errors.Error as error:
            raise UserError(
                f"--log wandb: {' '.join(str(error).split())}; WANDB_MODE=offline needs no account"
            ) from error

    def write(self, entries: Sequence[Mapping[str, float]]) -> None:
        """All names of a step together."""
        for entry in entries:
            numbers = {name: value for name, value in entry.items() if name != "step"}
            self._run.log(numbers, step=int(entry["step"]))

    def close(self) -> None:
        """Flush, and upload if it is not offline."""
        self._run.finish()


def open_boards(config: TrainConfig, step: int) -> list[Board]:
    """Those that the configuration names, continued after `step`."""
    return [TensorBoard(config.run, step) if name == "tensorboard" else WeightsAndBiases(config) for name in config.log]


def check_installed(config: TrainConfig) -> None:
    """UserError where the configuration names a board that is not installed."""
    if "wandb" in config.log and importlib.util.find_spec("wandb") is None:
        raise UserError("--log wandb: needs wandb; install it with: pip install 'ringrl[wandb]'")


def _identity(folder: Path) -> str:
    """Of the run; drawn once."""
    path = folder / "id.txt"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, secrets.token_hex(8))
    return path.read_text().strip()
