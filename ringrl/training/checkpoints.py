"""Checkpoints: all state that resuming or evaluating a run needs, as arrays and JSON with checksums (no pickles)."""

import dataclasses
import functools
import json
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pydantic
from jaxtyping import UInt32

from ringrl.config import TrainConfig
from ringrl.config_files import one_line
from ringrl.data.sampling.normalisation import Normalisation
from ringrl.errors import UserError, brief, is_out_of_memory
from ringrl.files import json_digest, remove
from ringrl.methods import method_of
from ringrl.model import Policy, TrainState, make_policy
from ringrl.model.parallel import ONE_DEVICE, Parallel

CHECKSUM, ARRAY_CHECKSUMS = "seal", "arrays"  # names in a checkpoint's JSON
PARTS = ("info/metadata", "iterator/metadata", "state/_METADATA", "state/manifest.ocdbt")
DELETED = ".deleted-"
CheckpointKind = Literal["last", "best"]
PATTERN = re.compile(r"[\[\\]")  # a path with one of these: orbax would lose the arrays


@dataclasses.dataclass(frozen=True, repr=False)
class RunInfo:
    """The description of a run in its checkpoints: everything but the arrays."""

    config: TrainConfig
    normalisation: Normalisation
    observation_size: int
    action_size: int
    domain: str
    data_fingerprint: str
    best_return: float  # highest return of the task in the data, the target return of a policy
    versions: dict[str, str]
    transitions: int  # steps of all episodes that may be drawn
    actions: tuple[tuple[float, ...], tuple[float, ...], bool] | None = None  # bounds, is discrete; None in ExoRL
    reference_returns: tuple[float, float] | None = None  # scores 0 and 100, if the dataset names them

    @property
    def title(self) -> str:
        """Method, context length and task: "at, n=4, walker_walk"."""
        config = self.config
        length = f"n={config.context.trajectories}, " if config.model.family.has_context else ""
        return f"{method_of(config)}, {length}{config.task}"

    def __repr__(self) -> str:
        return f"RunInfo({self.title}, {self.transitions:,} transitions, best return {self.best_return:.4g})"

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        parts = {"config": self.config.model_dump(mode="json"), "normalisation": self.normalisation.to_json()}
        return vars(self) | parts

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "RunInfo":
        """Return the description that `to_json` wrote."""
        config = TrainConfig.from_saved(values["config"])
        own = {"config": config, "normalisation": Normalisation.from_json(values["normalisation"])}
        if actions := values.get("actions"):
            own["actions"] = (tuple(actions[0]), tuple(actions[1]), actions[2])
        if returns := values.get("reference_returns"):
            own["reference_returns"] = tuple(returns)
        return cls(**values | own)

    def make_policy(self, parallel: Parallel = ONE_DEVICE) -> Policy:
        """Return the run's policy with its initial parameters."""
        config = self.config
        return make_policy(config.model, self.observation_size, self.action_size, config.seed, parallel)


class EarlyStopping(NamedTuple):
    """How long the held-out loss has not fallen. Saved in the checkpoints of runs with `stop_after`."""

    lowest: float | None = None
    since: int = 0  # measurements in a row without a new lowest loss

    def after(self, loss: float) -> "EarlyStopping":
        """Return the state after a measurement of the held-out loss, which may not be finite."""
        is_lowest = np.isfinite(loss) and (self.lowest is None or loss < self.lowest)
        return EarlyStopping(loss) if is_lowest else self._replace(since=self.since + 1)

    def has_converged(self, config: TrainConfig) -> bool:
        """Return whether a run ends for this reason."""
        return config.patience is not None and self.since >= config.patience

    @classmethod
    def saved(cls, run: Path, step: int) -> "EarlyStopping":
        """Return the state in a checkpoint."""
        return cls(*(_saved_metrics(run / "checkpoints" / str(step)) or {}).get("early_stopping", ()))


class Checkpoints:
    """The checkpoints of one run. Each is written under a temporary name and then renamed, so none is incomplete.

    The newest `keep` checkpoints (all, if None) and the best (see `best_step`) are kept. Reading changes no file, so a
    run may be read-only. Raise UserError for a path with a character that orbax does not write.
    """

    def __init__(self, run: Path, keep: int | None = None) -> None:
        self.folder, self._keep = run / "checkpoints", keep
        if found := PATTERN.search(str(run.absolute())):
            raise UserError(f"{run}: checkpoints cannot be stored in a path with {found[0]}; give a folder without it")
        _hide_late_errors()
        self._newest: Path | None = None  # checkpoint that this process has written
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())

    def save(
        self,
        state: TrainState,
        info: RunInfo,
        iterator: dict[str, Any],
        loss: float | None,
        validation_loss: float | None = None,
        early_stopping: EarlyStopping | None = None,
    ) -> None:
        """Write the states of training and of the batch iterator, and the recent losses, in the background.

        Raise UserError if an earlier checkpoint could not be written.
        """
        metrics: dict[str, Any] = {"loss": loss}
        if validation_loss is not None and np.isfinite(validation_loss):
            metrics["validation_loss"] = validation_loss
        if info.config.patience:
            metrics["early_stopping"] = early_stopping
        about = info.to_json() | {ARRAY_CHECKSUMS: array_checksums(state)}
        values = {"info": about, "iterator": iterator, "metrics": metrics}
        items: dict[str, Any] = {name: ocp.args.JsonSave(with_checksum(value)) for name, value in values.items()}
        self.wait()
        with self._naming_failures():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._newest = self.folder / str(int(state.step))
            state_item = ocp.args.StandardSave(state._asdict())
            self._orbax.save(self._newest.absolute(), args=ocp.args.Composite(state=state_item, **items))

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Return the state of a checkpoint, with the shapes and shardings of `like`."""
        path, abstract = self.folder / str(step), jax.tree.map(ocp.utils.to_shape_dtype_struct, like._asdict())
        checksums = _read_json(path, "info").get(ARRAY_CHECKSUMS)
        try:
            args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
            state = TrainState(**self._orbax.restore(path.absolute(), args=args)["state"])
        except Exception as error:  # orbax raises bare Exceptions for unreadable arrays
            raise _unreadable(path, error) from error
        if checksums != array_checksums(state):
            raise _unreadable(path, ValueError("its arrays differ from the saved ones"))
        return state

    def restore_iterator(self, step: int) -> dict[str, Any]:
        """Return the state of the batch iterator in a checkpoint."""
        return _read_json(self.folder / str(step), "iterator")

    def wait(self) -> None:
        """Wait until everything is written, then delete old checkpoints. Raise UserError if either fails."""
        with self._naming_failures():
            self._orbax.wait_until_finished()
            if self._newest and jax.process_index() == 0:  # network file systems may show it late to the others
                for missing in (part for part in PARTS if not (self._newest / part).exists()):
                    raise OSError(f"{self._newest / missing} is missing")
            self._prune()

    def close(self) -> None:
        """Wait as `wait` does, then release the folder."""
        try:
            self.wait()
        finally:
            with self._naming_failures():  # a failed write may be reported here again
                self._orbax.close()

    def _prune(self) -> None:
        """Delete checkpoints that are not kept, and leftovers of killed processes.

        A checkpoint is renamed before it is deleted, so a kill leaves no partial checkpoint under its name.
        """
        if self._keep is None or jax.process_index() != 0 or not self.folder.is_dir():
            return
        steps = saved_steps(self.folder.parent)
        known = {step: metrics for step in steps if (metrics := _saved_metrics(self.folder / str(step)))}
        # Checkpoints without a loss are kept, to diagnose a failed run.
        failed = {step for step, metrics in known.items() if metrics["loss"] is None}
        kept = {*steps[-self._keep :], best_step(self.folder.parent), *failed}
        for step in steps:
            if step not in kept:
                (self.folder / str(step)).rename(self.folder / f"{DELETED}{step}")
        for path in self.folder.iterdir():
            if path.name.startswith(DELETED) or ".orbax-checkpoint-tmp" in path.name:
                remove(path)

    @contextmanager
    def _naming_failures(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # a full disk is a ValueError with the cause at the end of its message
            cause = " ".join(str(error).split()).rsplit(": ", 1)[-1]
            raise UserError(
                f"{self.folder}: a checkpoint cannot be written ({cause}); free some space, then use --resume"
            ) from None


@functools.cache  # once
def _hide_late_errors() -> None:
    """Hide the errors of arrays that Orbax still reads or writes after another has failed: nobody can catch them."""
    show, late = sys.unraisablehook, ("loop is closed", "while reading array", "Error reading")
    sys.unraisablehook = lambda args: None if any(text in str(args.exc_value) for text in late) else show(args)
    logging.getLogger("asyncio").addFilter(lambda record: not any(text in record.getMessage() for text in late))


def _saved_metrics(checkpoint: Path) -> dict[str, Any] | None:
    """Return the metrics of a checkpoint; None if they cannot be read or other parts of it are missing."""
    if not all((checkpoint / part).exists() for part in PARTS):
        return None
    try:
        return _read_json(checkpoint, "metrics")
    except UserError:
        return None


def saved_steps(run: Path) -> list[int]:
    """Return the steps of the complete checkpoints in a run's folder, newest last."""
    return sorted(int(path.name) for path in (run / "checkpoints").glob("*") if path.name.isdecimal())


def best_step(run: Path) -> int | None:
    """Return the step of a run's best checkpoint; None if no checkpoint has a loss.

    The best has the lowest held-out loss. Without held-out episodes, it has the lowest training loss.
    """
    known = {step: _saved_metrics(run / "checkpoints" / str(step)) or {} for step in saved_steps(run)}
    for name in ("validation_loss", "loss"):
        losses = {step: loss for step, metrics in known.items() if (loss := metrics.get(name)) is not None}
        if losses:
            return min(losses, key=losses.__getitem__)
    return None


def read_info(run: Path, step: int | None = None) -> tuple[int, RunInfo]:
    """Return the step and the description of a run's newest (or given) checkpoint. Raise UserError if it has none."""
    folder, steps = run / "checkpoints", saved_steps(run)
    if not steps:
        raise UserError(f"{run}: holds no checkpoint; give the folder of a run made by `ringrl train --run`")
    if step is not None and step not in steps:
        raise UserError(f"{run}: has no checkpoint of step {step}; it has {', '.join(map(str, steps))}")
    step = steps[-1] if step is None else step
    values = _read_json(folder / str(step), "info")
    try:
        return step, RunInfo.from_json({name: value for name, value in values.items() if name != ARRAY_CHECKSUMS})
    except pydantic.ValidationError as error:
        raise UserError(
            f"{folder / str(step)}: its configuration does not fit this version ({one_line(error)})"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise _unreadable(folder / str(step), error) from error


def _read_json(checkpoint: Path, item: str) -> dict[str, Any]:
    """Return the JSON of an item of a checkpoint. Raise UserError if it cannot be read or has changed."""
    try:
        return without_checksum(json.loads((checkpoint / item / "metadata").read_text()))
    except (OSError, ValueError, AttributeError) as error:
        raise _unreadable(checkpoint, error) from error


def _unreadable(checkpoint: Path, error: Exception) -> UserError:
    """Return the error of an unreadable checkpoint: damaged, removed, or only unreadable at the moment."""
    is_missing = isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
    if is_out_of_memory(error) or (isinstance(error, OSError) and error.errno is not None and not is_missing):
        return UserError(f"{checkpoint}: cannot be read now and is not changed ({brief(error)}); try again later")
    if not checkpoint.exists():
        return UserError(f"{checkpoint}: was removed while it was read, by training perhaps; try again")
    return UserError(f"{checkpoint}: is damaged ({brief(error)}); remove it to use an older one")


# Orbax detects most damage, but not a changed value. These checksums do.


def array_checksums(tree: Any) -> list[int]:
    """Return one checksum per array of a tree, in the order of its leaves. Changing one value changes a checksum.

    A checksum is the sum of the array's 32-bit (or shorter) words modulo 2^32. It does not depend on the sharding and
    is computed on the devices that hold the array.
    """
    return [int(checksum) for checksum in jax.device_get(_sums(jax.tree.leaves(tree)))]


@jax.jit
def _sums(arrays: list[jax.Array]) -> list[UInt32[jax.Array, ""]]:
    words = [jnp.dtype(f"uint{min(8 * array.dtype.itemsize, 32)}") for array in arrays]
    bits = map(jax.lax.bitcast_convert_type, arrays, words)
    return [array.astype(jnp.uint32).sum(dtype=jnp.uint32) for array in bits]


def with_checksum(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return JSON values with a checksum of them all."""
    return dict(values) | {CHECKSUM: json_digest(values)}


def without_checksum(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that `with_checksum` was given. Raise ValueError if they have changed."""
    rest = {name: value for name, value in values.items() if name != CHECKSUM}
    if values.get(CHECKSUM) != json_digest(rest):
        raise ValueError("its checksum differs")
    return rest
