"""Evaluation results on disk: one JSON line per stream of episodes, with a checksum except in older files."""

import errno
import gzip
import importlib.metadata
import json
import os
import platform
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pydantic
from jaxtyping import Float
from pydantic import Field, FiniteFloat, NonNegativeFloat, NonNegativeInt, PositiveInt

from ringrl.config import TrainConfig
from ringrl.errors import UserError, brief
from ringrl.files import explain_write_errors, json_digest, lock, with_crc, without_crc, write_whole
from ringrl.training.budget import Budget
from ringrl.training.run_folder import flat

# Raised whenever the meaning of a number changes. Numbers of two protocols are never compared.
PROTOCOL: Literal[1] = 1
DATA = "data"  # method of the dataset's own episodes
PROMPT_ONLY = ("copy", "clone")  # methods that are made of a prompt alone

ReferenceReturns = tuple[FiniteFloat, FiniteFloat] | None
"""Mean returns of random actions and of an expert, which score 0 and 100, if the dataset names them."""

_LIBRARIES = ("ringrl", "jax", "jaxlib", "flax", "optax", "numpy", "dm_control", "mujoco", "gymnasium")
# Settings without an effect on the learned parameters, and settings in another field of a record.
_NOT_IN_RECIPE = (
    "data", "task", "run", "seed", "checkpoint_every", "keep_checkpoints", "log_every", "log", "validate_every",
    "model.token_set", "model.attention", "model.strategy", "model.bidirectional", "model.block_tokens", "model.remat",
    "optimiser.accumulation",
)  # fmt: skip


class EvaluationRecord(pydantic.BaseModel):
    """One stream: the settings of its evaluation and the return of each of its episodes in order."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    protocol: Literal[1] = PROTOCOL
    """Version of the evaluation protocol."""
    task: str = Field(min_length=1)
    """Full task name, "walker_walk"."""
    method: str = Field(min_length=1)
    """"random", "bc", "td3+bc", "at", "dt", ..., "copy", "clone", or "data" for the episodes of the dataset itself."""
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
    lengths: tuple[NonNegativeInt, ...] = ()
    """Steps of each episode, 0 without a return. Empty: all episodes have the task's length."""
    terminated: tuple[bool, ...] = ()
    """Whether each episode terminated; others were truncated or failed. Empty: none terminated."""
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
    prompt_control: str | None = None
    """The prompt as a control: of another task, without rewards, or in random order. None: as in training."""
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
    reference_returns: ReferenceReturns = None
    """Returns that score 0 and 100, if the dataset names them. None: constants of the task."""
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
    """Always None in new records. Older versions wrote the dtype of the cache if it was not the policy's."""
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
        for name in ("start_seeds", "lengths", "terminated"):
            if len(getattr(self, name)) not in (0, self.test_trajectories):
                raise ValueError(f"{len(getattr(self, name))} {name} for test_trajectories={self.test_trajectories}")
        if None in self.returns[: len(self.finished)]:
            raise ValueError("a return after an episode that failed")
        return self

    def __repr__(self) -> str:
        """Return one line: method, context length, task, training seed and returns."""
        length = f"n={self.train_trajectories}, " if self.train_trajectories else ""
        memory = "" if self.context else ", without memory"
        mean = f"mean return {np.mean(self.finished):.4g}" if self.finished else "no return"
        about = f"{self.method}, {length}{self.task}, seed {self.seed}{memory}"
        return f"EvaluationRecord({about}, {mean} in {len(self.finished)} of {len(self.returns)} episodes)"

    __str__ = __repr__

    @property
    def finished(self) -> tuple[float, ...]:
        """Return the returns up to the first failed episode."""
        return tuple(value for value in self.returns if value is not None)

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
    notes: tuple[str, ...]  # what was left out or counted once, one sentence each


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


def _settings(config: TrainConfig) -> dict[str, str]:
    values: dict[str, Any] = flat(config.model_dump(mode="json"))
    return {
        name: f"{value:g}" if isinstance(value, float) else str(value)
        for name, value in values.items()
        if name not in _NOT_IN_RECIPE and not name.startswith("mesh.")
    }


def folder_name(task: str) -> str:
    """Return the name of a folder for a task. Names of Gymnasium environments may have a slash and long arguments."""
    name = task.replace("/", "_")
    return name if len(name) <= 100 else f"{name[:80]}_{json_digest(task)[:12]}"


def library_versions() -> dict[str, str]:
    """Return the versions of Python and of the installed libraries that may change a result."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in _LIBRARIES}


def data_records(task: str, returns: Float[np.ndarray, " episodes"], **fields: Any) -> list[EvaluationRecord]:
    """Return the dataset's own episodes as records of the method "data", one per episode, with the given fields."""
    common = fields | {"created": datetime.now(UTC)}
    return [
        EvaluationRecord(task=task, method=DATA, environment_seed=index, returns=(float(value),), **common)
        for index, value in enumerate(returns)
    ]


def append_records(path: Path, records: Iterable[EvaluationRecord]) -> None:
    """Append one line per record, all of them or none, and wait until they are on disk.

    A half-written last line is ended, and stays damaged. UserError if the file cannot be written; it is then unchanged.
    """
    lines = "".join(f"{with_crc(record.model_dump_json())}\n" for record in records).encode()
    path = path.resolve()  # one lock for all links to a file
    # Several runs may share one file.
    with (
        explain_write_errors(path),
        lock(path, "is appending results", wait=True),
        path.open("a+b", buffering=0) as file,
    ):
        end = file.seek(0, os.SEEK_END)
        if end and os.pread(file.fileno(), 1, end - 1) != b"\n":
            lines = b"\n" + lines
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


def read_records(paths: str | Path | Sequence[str | Path]) -> Results:
    """Read results files, and all results files in folders (see `find_results`).

    A record that several files contain, for example the files of a run and of its copy, is returned once. A damaged or
    half-written line is left out and noted. UserError if a path does not exist, or for a whole line that is no record.
    """
    notes: list[str] = []
    sources = find_results(paths)
    records: list[EvaluationRecord] = []
    origin: dict[bytes, Path] = {}  # line -> first file
    copies = 0
    for path in sources:
        try:
            content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path}: cannot be read ({brief(error)}); give a results file (.jsonl)") from error
        if content.strip() and b'"protocol"' not in content and not content.startswith(b"{"):
            raise UserError(f"{path}: is not a results file; give results of `ringrl evaluate` (.jsonl)")
        damaged = []
        for number, line in enumerate(content.split(b"\n"), start=1):
            if not line.strip():
                continue
            if (record := _parse(line, f"{path}, line {number}")) is None:
                damaged.append(str(number))
            elif origin.setdefault(line, path) != path:
                copies += 1
            else:
                records.append(record)
        if damaged:
            more = f" and {len(damaged) - 10} more" if len(damaged) > 10 else ""
            notes.append(f"{path}, line {', '.join(damaged[:10])}{more}: damaged or cut short, left out")
    if copies:
        notes.append(f"{copies} results are also in another file: counted once")
    return Results(tuple(records), tuple(sources), tuple(notes))


def remove_damaged_lines(path: Path) -> None:
    """Remove what `read_records` reports as damaged, so that it is measured again. UserError if this fails."""
    path = path.resolve()
    with explain_write_errors(path), lock(path, "is appending results", wait=True):
        lines = [line for line in path.read_bytes().split(b"\n") if line.strip()]
        kept = [line for line in lines if _parse(line, str(path))]
        if len(kept) < len(lines):
            write_whole(path, b"".join(line + b"\n" for line in kept))


def find_results(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    """Return each results file once: files as given, and *.jsonl and *.jsonl.gz in folders and below.

    Training's metrics.jsonl and hidden files and folders (".name") are left out. Links are followed.

    UserError if a path does not exist, is neither a file nor a folder, or if a folder cannot be read.
    """
    found: dict[Path, Path] = {}
    for path in map(Path, [paths] if isinstance(paths, str | Path) else paths):
        if not path.is_dir() and not path.is_file():
            what = "is not a regular file" if path.exists() else "no such file or folder"
            raise UserError(f"{path}: {what}; give results files (.jsonl) or folders that contain them")
        for file in sorted(_results_below(path)) if path.is_dir() else [path]:
            found.setdefault(file.resolve(), file)
    return list(found.values())


def _results_below(folder: Path) -> Iterator[Path]:
    seen: set[str] = set()

    def stop(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}); give files or other folders")

    for place, folders, files in os.walk(folder, followlinks=True, onerror=stop):
        real = os.path.realpath(place)
        folders[:] = [] if real in seen else [name for name in folders if not name.startswith(".")]
        seen.add(real)
        for name in files:
            is_result = name.endswith((".jsonl", ".jsonl.gz")) and name != "metrics.jsonl"
            if is_result and not name.startswith(".") and Path(place, name).is_file():
                yield Path(place, name)


def _parse(line: bytes, where: str) -> EvaluationRecord | None:
    """Return the record of a line; None if it is damaged. Invalid values without a checksum may be damaged."""
    try:
        text = without_crc(line.decode())
        values = json.loads(text)  # a proper prefix of a JSON object is never JSON
    except (ValueError, RecursionError):
        return None
    protocol = values.get("protocol") if isinstance(values, dict) else None
    if protocol is None:
        raise UserError(f"{where}: is not an evaluation record (it has no protocol); give results of `ringrl evaluate`")
    if protocol != PROTOCOL:
        raise UserError(
            f"{where}: has evaluation protocol {protocol}, this RingRL reads protocol {PROTOCOL} only; evaluate again, "
            "or leave the file out"
        )
    try:
        return EvaluationRecord.model_validate_json(text)
    except pydantic.ValidationError as error:
        if len(text) == len(line.decode()):
            return None
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "record"
        raise UserError(f"{where}: {field}: {first['msg']}; remove the line or evaluate again") from error
