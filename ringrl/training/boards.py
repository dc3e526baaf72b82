"""Where metrics are looked at while a run goes on: TensorBoard, and Weights & Biases."""

import importlib.util
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tensorboardX import SummaryWriter

from ringrl.config import TrainConfig
from ringrl.errors import UserError


class Board(Protocol):
    """Takes what metrics.jsonl takes."""

    def write(self, entries: Sequence[Mapping[str, float]]) -> None:
        """Each entry holds `step` and named numbers."""

    def close(self) -> None:
        """There is no more."""


class TensorBoard:
    """Events in the run's folder tensorboard/, continued after `step`; what a kill undid is purged."""

    def __init__(self, run: Path, step: int) -> None:
        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def write(self, entries: Sequence[Mapping[str, float]]) -> None:
        """A scalar per name and step."""
        for entry in entries:
            for name, value in entry.items():
                if name != "step":
                    self._writer.add_scalar(name, value, int(entry["step"]))

    def close(self) -> None:
        """Flush."""
        self._writer.close()


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
        temporary = path.with_suffix(".tmp")
        temporary.write_text(secrets.token_hex(8))
        temporary.replace(path)
    return path.read_text().strip()
