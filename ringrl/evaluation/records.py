"""Evaluation results on disk: one JSON line per stream of episodes; files are only appended to.

A kill may leave a half-written last line, which is ignored.
"""

import errno
import importlib.metadata
import io
import itertools
import json
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pydantic
from jaxtyping import Float
from pydantic import Field, FiniteFloat, NonNegativeFloat, NonNegativeInt, PositiveInt

from ringrl.config import TrainConfig
from ringrl.errors import UserError
from ringrl.files import explain_write_errors, json_digest, lock
from ringrl.training.budget import Budget
from ringrl.training.run_folder import flat

# Raised whenever the meaning of a number changes. Numbers of two protocols are never compared.
PROTOCOL: Literal[1] = 1
JOURNAL, VIDEOS = ".journal", ".videos"  # suffixes of folders next to a results file, with one folder per evaluation
DATA = "data"  # method of the dataset's own episodes

_LIBRARIES = ("ringrl", "jax", "jaxlib", "flax", "optax", "numpy", "dm_control", "mujoco", "gymnasium")
# Settings without an effect on the learned parameters, and settings in another field of a record.
_NOT_IN_RECIPE = (
    "data", "task", "run", "seed", "checkpoint_every", "keep_checkpoints", "log_every", "log",
    "model.token_set", "model.attention", "model.block_tokens", "model.remat", "optimiser.accumulation",
)  # fmt: skip


class EvaluationRecord(pydantic.BaseModel):
    """One stream: the settings of its evaluation and the return of each of its episodes in order."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    protocol: Literal[1] = PROTOCOL
    """Version of the evaluation protocol."""
    task: str = Field(min_length=1)
    """Full task name, "walker_walk"."""
    method: str = Field(min_length=1)
    """"random", "bc", "td3+bc", "at", "dt", ..., or "data" for the episodes of the dataset itself."""
    variant: str | None = None
    """Name of the settings in an ablation plan; None: those that all its cells share."""
    token_set: str | None = None
    """Tokens per timestep (at5, ring4, dt3, fused1); None for methods without tokens."""
    train_trajectories: PositiveInt | None = None
    """Trajectories per training context; None for methods without a context."""
    test_trajectories: PositiveInt = 1
    """Episodes in this stream (n)."""
    context: bool = True
    """False: a stream of the control (see `Protocol`)."""
    seed: NonNegativeInt = 0
    """Seed of the training run; intervals are computed over training seeds."""
    environment_seed: NonNegativeInt
    """Environment seed of the stream's first episode (for "data": index of the episode)."""
    returns: tuple[FiniteFloat | None, ...]
    """Undiscounted return of episodes 1..n; None from the first failed episode on (a number that is not finite, or an
    unstable simulation)."""
    start_seeds: tuple[NonNegativeInt, ...] = ()
    """Environment seed of each episode. Empty: all starts were drawn one after another from `environment_seed`."""
    target_return: FiniteFloat | None = None
    """Target return of every episode."""
    target_policy: str | None = None
    """Rule for the target return, for example "data_best"; "none" for methods without a target return."""
    prompt_trajectories: NonNegativeInt = 0
    """Dataset trajectories in the context before the first episode."""
    prompt_seed: NonNegativeInt | None = None
    """Seed with which the prompt was drawn, together with the seed of the training run."""
    prompt_episodes: tuple[NonNegativeInt, ...] = ()
    """Indices of the prompt's episodes in the dataset, in order."""
    prompt_returns: tuple[FiniteFloat, ...] = ()
    """Returns of the prompt's episodes."""
    train_task: str | None = None
    """Task of the training run, if it was not trained on this task."""
    steps_trained: NonNegativeInt | None = None
    """Optimiser steps of the checkpoint."""
    checkpoint: str | None = None
    """Path of the checkpoint's run."""
    checkpoint_hash: str | None = None
    """Hash of the checkpoint's parameters."""
    data_fingerprint: str | None = None
    """SHA-256 of the training dataset."""
    settings: dict[str, str] | None = None
    """Settings of the run that differ from the defaults and have an effect on training (see `recipe`)."""
    budget: Budget | None = None
    """Training cost."""
    configuration_hash: str | None = None
    """SHA-256 of the training run's configuration."""
    evaluation: str | None = None
    """SHA-256 of everything that decides the result; shared by all streams of one evaluation."""
    device: str | None = None
    """Device on which the policy was computed."""
    cache_devices: PositiveInt = 1
    """Number of devices over which each context was sharded."""
    cache_dtype: str | None = None
    """Dtype of cached keys and values; None: the dtype that the policy computes in, or no cache."""
    steps_simulated: NonNegativeInt | None = None
    """Environment steps of this stream before it failed, or all steps."""
    wall_seconds: NonNegativeFloat | None = None
    """Wall time of this stream and the streams that were rolled out together with it."""
    command: str | None = None
    """Command line that wrote the record."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Library name to version, see `library_versions`."""
    created: pydantic.AwareDatetime = Field(default_factory=lambda: datetime.now(UTC))
    """Time at which the record was written."""

    @pydantic.model_validator(mode="after")
    def _check_numbers_of_episodes(self) -> Self:
        if len(self.returns) != self.test_trajectories:
            raise ValueError(f"{len(self.returns)} returns for test_trajectories={self.test_trajectories}")
        if self.start_seeds and len(self.start_seeds) != self.test_trajectories:
            raise ValueError(f"{len(self.start_seeds)} start_seeds for test_trajectories={self.test_trajectories}")
        if any(value is not None for value in self.returns[len(self.finished) :]):
            raise ValueError("a return after an episode that failed")
        return self

    @property
    def finished(self) -> tuple[float, ...]:
        """Return the returns up to the first failed episode."""
        return tuple(value for value in itertools.takewhile(lambda x: x is not None, self.returns) if value is not None)

    @property
    def starts(self) -> tuple[tuple[int, int], ...]:
        """Return what identifies each start: a seed and the number of starts drawn with the seed before."""
        if self.start_seeds:
            return tuple((seed, 0) for seed in self.start_seeds)
        return tuple((self.environment_seed, index) for index in range(self.test_trajectories))

    @property
    def failed(self) -> int:
        """Return the number of episodes without a return."""
        return len(self.returns) - len(self.finished)


@dataclass(frozen=True)
class Results:
    """The records of results files."""

    records: tuple[EvaluationRecord, ...]
    sources: tuple[Path, ...]  # every file that was read, in order
    half_written: tuple[Path, ...]  # files whose half-written last line was ignored


def recipe(config: TrainConfig) -> dict[str, str]:
    """Return the settings ("context.order" -> value) that differ from the defaults and have an effect on training."""
    defaults, family = default_recipe(), config.model.family
    used = {name: text for name, text in _settings(config).items() if text != defaults[name] and family.uses(name)}
    if family.has_context:
        used.pop("context.trajectories", None)  # the record's field train_trajectories
    return used


def default_recipe() -> dict[str, str]:
    """Return the defaults of all settings that `recipe` may contain."""
    return _settings(TrainConfig(data=Path(), task="", run=Path()))


def configuration_hash(config: TrainConfig) -> str:
    """Return the SHA-256 of all settings."""
    return json_digest(config.model_dump(mode="json"))


def _settings(config: TrainConfig) -> dict[str, str]:
    values: dict[str, Any] = flat(config.model_dump(mode="json"))
    return {
        name: f"{value:g}" if isinstance(value, float) else str(value)
        for name, value in values.items()
        if name not in _NOT_IN_RECIPE and not name.startswith("mesh.")
    }


def evaluation_name(record: EvaluationRecord) -> str:
    """Return the name of an evaluation's folders. Do not trust the name of a record made elsewhere as a path."""
    return f"{record.task}.{str(record.evaluation)[:12]}"


def library_versions() -> dict[str, str]:
    """Return the versions of Python and of the installed libraries that may change a result."""
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def data_records(
    task: str, returns: Float[np.ndarray, " episodes"], *, data_fingerprint: str, versions: dict[str, str]
) -> list[EvaluationRecord]:
    """Return the dataset's own episodes as records of the method "data", one per episode."""
    common: dict[str, Any] = {"data_fingerprint": data_fingerprint, "versions": versions, "created": datetime.now(UTC)}
    return [
        EvaluationRecord(task=task, method=DATA, environment_seed=index, returns=(float(value),), **common)
        for index, value in enumerate(returns)
    ]


def append_records(path: Path, records: Iterable[EvaluationRecord]) -> None:
    """Append one line per record, all of them or none, and wait until they are on disk.

    A half-written last line is removed first. Raises UserError if the file cannot be written; it is then unchanged.
    """
    lines = "".join(f"{record.model_dump_json()}\n" for record in records).encode()
    # Several runs may share one file.
    with (
        explain_write_errors(path),
        lock(path, "is appending results", wait=True),
        path.open("a+b", buffering=0) as file,
    ):
        end = _remove_half_line(file)
        try:
            if os.write(file.fileno(), lines) < len(lines):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())
        except OSError:
            os.ftruncate(file.fileno(), end)
            raise


def check_writable(path: Path) -> None:
    """Raise UserError if a results file cannot be written. The file is not created."""
    with explain_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        path.open("ab").close()
        if is_new:
            path.unlink()


def read_records(paths: Path | Sequence[Path]) -> Results:
    """Read results files, and all results files in folders (see `find_results`).

    Raises:
        UserError: a path does not exist, or a line is not a record of this protocol. The message names file and line.
    """
    sources = find_results(paths)
    records: list[EvaluationRecord] = []
    half_written = []
    for path in sources:
        try:
            *lines, tail = path.read_bytes().split(b"\n")
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); give a results file (.jsonl)") from error
        if _is_json(tail):
            lines.append(tail)
        elif tail.strip():
            half_written.append(path)
        records += [_parse(line, path, number) for number, line in enumerate(lines, start=1) if line.strip()]
    return Results(tuple(records), tuple(sources), tuple(half_written))


def find_results(paths: Path | Sequence[Path]) -> list[Path]:
    """Return each results file once: files as given, and *.jsonl in folders and below, except training's metrics.jsonl.

    Raises:
        UserError: a path does not exist.
    """
    found: dict[Path, Path] = {}
    for path in [paths] if isinstance(paths, Path) else paths:
        if not path.exists():
            raise UserError(f"{path}: no such file or folder; give results files (.jsonl) or folders that contain them")
        inside = path.rglob("*.jsonl") if path.is_dir() else [path]
        for file in sorted(inside):
            if not path.is_dir() or (file.is_file() and file.name != "metrics.jsonl"):
                found.setdefault(file.resolve(), file)
    return list(found.values())


def _parse(line: bytes, path: Path, number: int) -> EvaluationRecord:
    where = f"{path}, line {number}"
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        if number == 1 and not line.startswith(b"{"):
            raise UserError(f"{path}: is not a results file; give results of `ringrl evaluate` (.jsonl)") from error
        raise UserError(f"{where}: is not JSON; remove the line or the file") from error
    protocol = values.get("protocol") if isinstance(values, dict) else None
    if protocol is None:
        raise UserError(f"{where}: is not an evaluation record (it has no protocol); give results of `ringrl evaluate`")
    if protocol != PROTOCOL:
        raise UserError(
            f"{where}: has evaluation protocol {protocol}, this RingRL reads protocol {PROTOCOL} only; evaluate again, "
            "or leave the file out"
        )
    try:
        return EvaluationRecord.model_validate_json(line)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "record"
        raise UserError(f"{where}: {field}: {first['msg']}; remove the line or evaluate again") from error


def _is_json(line: bytes) -> bool:
    """Return whether a line is whole. A proper prefix of a JSON object is never JSON."""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _remove_half_line(file: io.FileIO) -> int:
    """Make the file end with a whole line and return its size."""
    file.seek(0)
    content = file.read()
    tail = content.rpartition(b"\n")[2]
    if tail and _is_json(tail):  # only the newline is missing
        file.write(b"\n")
        return len(content) + 1
    os.ftruncate(file.fileno(), len(content) - len(tail))
    return len(content) - len(tail)
