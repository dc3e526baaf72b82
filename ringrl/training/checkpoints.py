"""Checkpoints: all state that resuming or evaluating a run needs, as arrays and JSON with checksums (no pickles)."""

import contextlib
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pydantic
from jaxtyping import UInt32
from orbax.checkpoint import checkpoint_managers as policies

from ringrl.config import MeshConfig, TrainConfig, one_line
from ringrl.data.sampling.normalisation import Normalisation
from ringrl.envs import DOMAINS
from ringrl.errors import UserError, brief, is_out_of_memory
from ringrl.files import json_digest
from ringrl.model import ActorCritic, Goal, Policy, TrainState, make_agent, make_policy
from ringrl.model.parallel import ONE_DEVICE, Parallel
from ringrl.training.distributed import check_platform
from ringrl.training.mesh import make_ring

CHECKSUM, ARRAY_CHECKSUMS = "seal", "arrays"  # names in a checkpoint's JSON


@dataclasses.dataclass(frozen=True)
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

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return vars(self) | {
            "config": self.config.model_dump(mode="json"),
            "normalisation": self.normalisation.to_json(),
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "RunInfo":
        """Return the description that `to_json` wrote."""
        config = TrainConfig.model_validate(values["config"])
        return cls(**values | {"config": config, "normalisation": Normalisation.from_json(values["normalisation"])})

    def make_policy(self, parallel: Parallel = ONE_DEVICE) -> Policy:
        """Return the run's policy with its initial parameters."""
        config = self.config
        goal = self.goal(config.task) if config.model.family.has_goal else None  # goals need MuJoCo; others do not
        return make_policy(config.model, self.observation_size, self.action_size, config.seed, goal, parallel)

    def goal(self, task: str) -> Goal | None:
        """Return the goal of a task of the run's domain for normalised observations, or None if it has none."""
        space, normalisation = DOMAINS[self.domain].goals if self.domain in DOMAINS else None, self.normalisation
        if space is None:
            return None
        return Goal(
            place=space.goals[task],
            columns=tuple(range(self.observation_size)[space.observation]),
            mean=tuple(normalisation.mean[space.observation].tolist()),
            std=tuple(normalisation.std[space.observation].tolist()),
        )


class DamagedCheckpointError(UserError):
    """A checkpoint that cannot be read, now or later."""


class Checkpoints:
    """The checkpoints of one run. Orbax writes each under another name and renames it, so none is incomplete.

    The newest `keep` checkpoints (all, if None) and the one of lowest loss are kept.
    """

    def __init__(self, run: Path, keep: int | None = None) -> None:
        self.folder = run / "checkpoints"
        best = policies.BestN(get_metric_fn=_loss, reverse=True, n=1)
        kept = policies.AnyPreservationPolicy([policies.LatestN(keep), best])
        self._manager = ocp.CheckpointManager(
            self.folder.absolute(),
            options=ocp.CheckpointManagerOptions(  # without best_fn, a resumed run would not know earlier losses
                preservation_policy=kept, best_fn=_loss, best_mode="min", enable_async_checkpointing=True
            ),
        )

    def steps(self) -> list[int]:
        """Return the steps of all complete checkpoints, newest last."""
        return sorted(self._manager.all_steps())

    def set_aside(self, step: int) -> Path:
        """Move a checkpoint out of the folder and return its new path."""
        aside = self.folder.parent / f"damaged_checkpoint_{step}"
        if jax.process_index() == 0:
            shutil.rmtree(aside, ignore_errors=True)
            (self.folder / str(step)).rename(aside)
        self._manager.reload()
        return aside

    def save(self, state: TrainState, info: RunInfo, iterator: dict[str, Any], loss: float | None) -> None:
        """Write the state, the state of the batch iterator and the recent mean loss, in the background."""
        arrays = ocp.args.StandardSave(state._asdict())
        values = ocp.args.JsonSave(with_checksum(info.to_json() | {ARRAY_CHECKSUMS: array_checksums(state)}))
        items = ocp.args.Composite(state=arrays, info=values, iterator=ocp.args.JsonSave(with_checksum(iterator)))
        with self._naming_failures():
            self._manager.save(int(state.step), args=items, metrics=None if loss is None else {"loss": loss})

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Return the state of a checkpoint, with the shapes and shardings of `like`."""
        path, abstract = self.folder / str(step), jax.tree.map(ocp.utils.to_shape_dtype_struct, like._asdict())
        how = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        try:
            state = TrainState(**self._manager.restore(step, args=how)["state"])
        except Exception as error:  # orbax raises bare Exceptions for unreadable arrays
            raise _unreadable(path, error) from error
        if _read_json(path, "info").get(ARRAY_CHECKSUMS) != array_checksums(state):
            raise _unreadable(path, ValueError("its arrays are not those that were saved"))
        return state

    def restore_iterator(self, step: int) -> dict[str, Any]:
        """Return the state of the batch iterator in a checkpoint."""
        return _read_json(self.folder / str(step), "iterator")

    def wait(self) -> None:
        """Wait until everything is written. Raise UserError if that failed."""
        with self._naming_failures():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait as `wait` does, then release the folder."""
        try:
            self.wait()
        finally:
            self._manager.close()

    @contextlib.contextmanager
    def _naming_failures(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # a full disk is a ValueError with the cause at the end of its message
            cause = " ".join(str(error).split()).rsplit(": ", 1)[-1]
            raise UserError(
                f"{self.folder}: a checkpoint cannot be written ({cause}); free some space, then use --resume"
            ) from None


def _loss(metrics: dict[str, float]) -> float:
    return metrics["loss"]


def saved_steps(run: Path) -> list[int]:
    """Return the steps of the complete checkpoints in a run's folder, newest last."""
    return sorted(int(path.name) for path in (run / "checkpoints").glob("*") if path.name.isdecimal())


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
    """Return the JSON of an item of a checkpoint. Raise UserError if it is not what was saved."""
    try:
        return without_checksum(json.loads((checkpoint / item / "metadata").read_text()))
    except (OSError, ValueError, AttributeError) as error:
        raise _unreadable(checkpoint, error) from error


@dataclasses.dataclass(frozen=True)
class TrainedPolicy:
    """A policy with its trained parameters."""

    policy: Policy
    info: RunInfo
    step: int
    parameter_hash: str  # sha256 of the parameters
    parallel: Parallel = ONE_DEVICE  # divides its contexts

    def towards(self, task: str) -> Policy:
        """Return the policy for another task of its domain, with the goal of that task if the policy has a goal."""
        if isinstance(self.policy, ActorCritic):
            return self.policy.with_goal(self.info.goal(task))
        return self.policy


def load_policy(run: Path, step: int | None = None, mesh: MeshConfig | None = None) -> TrainedPolicy:
    """Return the policy of a run's newest (or given) checkpoint, whose contexts are divided over `mesh`.

    Raise UserError as `read_info`, `make_ring` and `check_platform` do, or if the arrays are damaged.
    """
    step, info = read_info(run, step)
    check_platform()
    parallel = ONE_DEVICE if mesh is None else make_ring(info.config, mesh)
    agent = make_agent(partial(info.make_policy, parallel), info.config, parallel)
    checkpoints = Checkpoints(run)
    state = checkpoints.restore(step, agent.init())
    checkpoints.close()
    digest = hashlib.sha256()
    for path, array in jax.tree_util.tree_leaves_with_path(state.params):
        digest.update(jax.tree_util.keystr(path).encode() + jnp.asarray(array).tobytes())
    return TrainedPolicy(agent.policy(state.params), info, step, digest.hexdigest(), parallel)


def _unreadable(checkpoint: Path, error: Exception) -> UserError:
    """Return the error of an unreadable checkpoint: damaged, or only unreadable at the moment."""
    is_missing = isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
    if is_out_of_memory(error) or (isinstance(error, OSError) and error.errno is not None and not is_missing):
        return UserError(f"{checkpoint}: cannot be read now and is not changed ({brief(error)})")
    return DamagedCheckpointError(f"{checkpoint}: is damaged ({brief(error)}); remove it to use an older one")


# Orbax detects most damage, but not a changed value. These checksums do.


def array_checksums(tree: Any) -> list[int]:
    """Return one checksum per array of a tree, in the order of its leaves. Any single changed value changes it.

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
