"""Evaluation results on disk: one JSON line per episode stream, only ever appended to.

A results file survives being killed at any byte: at worst its last line is half-written, and that line is left out.
"""

import importlib.metadata
import itertools
import json
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Self

import numpy as np
import pydantic
from jaxtyping import Float
from pydantic import Field, FiniteFloat, NonNegativeFloat, NonNegativeInt, PositiveInt

from ringrl.errors import UserError
from ringrl.files import lock
from ringrl.training.budget import Budget

# Raised whenever what a number means changes; numbers of two protocols are never put side by side.
PROTOCOL: Literal[1] = 1
JOURNAL, VIDEOS = ".journal", ".videos"  # folders beside a results file; in each is one per evaluation
DATA = "data"  # the method whose "policy" is the dataset itself

_NAME = 12  # characters of the hash that name an evaluation's folders
_LIBRARIES = ("ringrl", "jax", "jaxlib", "flax", "optax", "numpy", "dm_control", "mujoco", "gymnasium")


class EvaluationRecord(pydantic.BaseModel):
    """One episode stream: what was rolled out, how, and the return of each of its episodes in order."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    protocol: Literal[1] = PROTOCOL
    """Version of the evaluation protocol."""
    task: str = Field(min_length=1)
    """Full task name, "walker_walk"."""
    method: str = Field(min_length=1)
    """"random", "bc", "td3+bc", "at", "dt", ..., or "data" for the episodes of the dataset itself."""
    token_set: str | None = None
    """Tokens per timestep (at5, ring4, dt3, fused1); None where the method has none."""
    train_trajectories: PositiveInt | None = None
    """Trajectories per training context; None where the method has no context."""
    test_trajectories: PositiveInt = 1
    """Episodes rolled out one after another in this stream (n)."""
    context: bool = True
    """False: the control, n episodes of the same policy whose memory is wiped before each."""
    seed: NonNegativeInt = 0
    """Seed of the training run; the unit over which intervals are drawn."""
    environment_seed: NonNegativeInt
    """Seed of the environment of this stream (index of the episode for "data")."""
    returns: tuple[FiniteFloat | None, ...]
    """Undiscounted return of episode 1..n; None from the first on that failed (a number that was not finite, or an
    unstable simulation), with which the stream ends."""
    start_seeds: tuple[NonNegativeInt, ...] = ()
    """What the start of each episode was drawn with; empty: the first with the environment's seed, and those after it
    with the numbers that followed in its stream."""
    target_return: FiniteFloat | None = None
    """Return the policy was asked for."""
    target_policy: str | None = None
    """How the target was chosen, for example "data_best"; "none" for methods that are asked for no return."""
    prompt_trajectories: NonNegativeInt = 0
    """Dataset trajectories that the policy remembered before the first episode."""
    prompt_seed: NonNegativeInt | None = None
    """Seed that they were drawn with, together with that of the training run."""
    prompt_episodes: tuple[NonNegativeInt, ...] = ()
    """Their numbers in the dataset, in order."""
    prompt_returns: tuple[FiniteFloat, ...] = ()
    """Their returns."""
    train_task: str | None = None
    """Task whose reward was trained on, where this one's was not."""
    steps_trained: NonNegativeInt | None = None
    """Optimiser steps of the checkpoint."""
    checkpoint: str | None = None
    """Where the checkpoint stood."""
    checkpoint_hash: str | None = None
    """What was in it."""
    data_fingerprint: str | None = None
    """SHA-256 of the dataset that was trained on."""
    settings: dict[str, str] | None = None
    """Those of the run that decide what is learned and are not at their defaults (see `recipe`)."""
    budget: Budget | None = None
    """What training took."""
    configuration_hash: str | None = None
    """SHA-256 of the training run's configuration."""
    evaluation: str | None = None
    """SHA-256 of all that decides the result; shared by all streams of one evaluation."""
    device: str | None = None
    """What the policy was computed on."""
    cache_devices: PositiveInt = 1
    """Among which each context was divided."""
    cache_dtype: str | None = None
    """In what keys and values were kept; None: in the dtype that the policy computes in, or there are none."""
    steps_simulated: NonNegativeInt | None = None
    """Environment steps of this stream before it failed; all, if it did not."""
    wall_seconds: NonNegativeFloat | None = None
    """Time that this stream took, together with those that were rolled out beside it."""
    command: str | None = None
    """Command line that wrote the record."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Library name to version, see `library_versions`."""
    created: pydantic.AwareDatetime = Field(default_factory=lambda: datetime.now(UTC))
    """When the record was written."""

    @pydantic.model_validator(mode="after")
    def _one_return_per_episode(self) -> Self:
        if len(self.returns) != self.test_trajectories:
            raise ValueError(f"{len(self.returns)} returns for test_trajectories={self.test_trajectories}")
        if self.start_seeds and len(self.start_seeds) != self.test_trajectories:
            raise ValueError(f"{len(self.start_seeds)} start_seeds for test_trajectories={self.test_trajectories}")
        return self

    @pydantic.model_validator(mode="after")
    def _a_failed_stream_has_ended(self) -> Self:
        if any(value is not None for value in self.returns[len(self.finished) :]):
            raise ValueError("a return after an episode that failed")
        return self

    @property
    def finished(self) -> tuple[float, ...]:
        """The returns up to the first episode that failed."""
        return tuple(
            value for value in itertools.takewhile(lambda value: value is not None, self.returns) if value is not None
        )

    @property
    def starts(self) -> tuple[tuple[int, int], ...]:
        """What names the start of each episode: a seed, and how many starts were drawn with it before."""
        if self.start_seeds:
            return tuple((seed, 0) for seed in self.start_seeds)
        return tuple((self.environment_seed, index) for index in range(self.test_trajectories))

    @property
    def failed(self) -> int:
        """Episodes that have no return."""
        return len(self.returns) - len(self.finished)


@dataclass(frozen=True)
class Results:
    """What was read, and from where."""

    records: tuple[EvaluationRecord, ...]
    sources: tuple[Path, ...]  # every file read, in order
    half_written: tuple[Path, ...]  # the files whose last line was cut off, and left out


def evaluation_name(record: EvaluationRecord) -> str:
    """What the folders of an evaluation are called. A record from elsewhere may have a name that is a path."""
    return f"{record.task}.{str(record.evaluation)[:_NAME]}"


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide a result; what is not installed is left out."""
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
    """The dataset's own episode returns as records of the method "data", one per episode."""
    created = datetime.now(UTC)
    return [
        EvaluationRecord(
            task=task, method=DATA, environment_seed=index, returns=(float(value),),
            data_fingerprint=data_fingerprint, versions=versions, created=created,
        )
        for index, value in enumerate(returns)
    ]  # fmt: skip


def append_records(path: Path, records: Iterable[EvaluationRecord]) -> None:
    """Append one line per record in a single write, on disk when this returns; all of them or none.

    The folder is made when it is missing. A half-written last line left by a killed writer is dropped first.

    Raises:
        UserError: the file cannot be written; it is left as it was.
    """
    lines = "".join(f"{record.model_dump_json()}\n" for record in records).encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Several runs may share one file.
        with lock(path, "is appending results", wait=True), path.open("a+b", buffering=0) as file:
            end = _mend(file.fileno())
            try:
                if os.write(file.fileno(), lines) < len(lines):
                    raise OSError(0, "only a part could be written; is the disk full?")
                os.fsync(file.fileno())
            except OSError:
                os.ftruncate(file.fileno(), end)
                raise
    except OSError as error:
        raise UserError(f"{path}: cannot append results ({error.strerror}); give a file that can be written") from error


def check_writable(path: Path) -> None:
    """Find out before a long evaluation whether its results can be written; a file that is not there is not made.

    Raises:
        UserError: they cannot.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        missing = not path.exists()
        with path.open("ab"):
            pass
        if missing:
            path.unlink()
    except OSError as error:
        raise UserError(f"{path}: results cannot be written ({error.strerror}); give another --output") from error


def read_records(paths: Path | Sequence[Path]) -> Results:
    """Read results files, or every results file in a folder and below (see `find_results`).

    Raises:
        UserError: a path does not exist, a line is not a record, or it was written under another protocol; the message
            names file and line. Only a last line that was cut off is forgiven: it is left out and reported.
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
    """The results files among and below the paths, each once: files as given, and *.jsonl in folders.

    A metrics.jsonl found in a folder is left out: that is what training writes.

    Raises:
        UserError: a path does not exist.
    """
    found: dict[Path, Path] = {}
    for path in [paths] if isinstance(paths, Path) else paths:
        if not path.exists():
            raise UserError(f"{path}: no such file or folder; give results files (.jsonl) or folders that hold them")
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
            f"{where}: written under evaluation protocol {protocol}, this RingRL reads protocol {PROTOCOL} only; "
            "evaluate again, or leave the file out"
        )
    try:
        return EvaluationRecord.model_validate_json(line)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "record"
        raise UserError(f"{where}: {field}: {first['msg']}; remove the line or evaluate again") from error


def _is_json(line: bytes) -> bool:
    """Whether a line is whole: no proper beginning of a JSON object is itself JSON."""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _mend(descriptor: int) -> int:
    """Make the file end with a whole line; returns its size."""
    size = os.fstat(descriptor).st_size
    tail = b""
    while len(tail) < size and b"\n" not in tail:  # from the end, in growing pieces
        length = min(size, 2 * len(tail) + 4096)
        tail = os.pread(descriptor, length, size - length)
    tail = tail.rpartition(b"\n")[2]
    if not tail:
        return size
    if _is_json(tail):
        os.write(descriptor, b"\n")
        return size + 1
    os.ftruncate(descriptor, size - len(tail))
    return size - len(tail)
