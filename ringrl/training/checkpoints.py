"""Checkpoints of everything a run needs to go on or to be evaluated: arrays and JSON, no pickles."""

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
from flax import nnx
from orbax.checkpoint import checkpoint_managers as policies

from ringrl.config import MeshConfig, TrainConfig, one_line
from ringrl.data.normalisation import Normalisation
from ringrl.envs import DOMAINS, goal_space
from ringrl.errors import UserError, brief, is_out_of_memory
from ringrl.model import Goal, Policy, make_policy
from ringrl.model.parallel import ONE_DEVICE, Parallel
from ringrl.training.agent import make_agent
from ringrl.training.distributed import check_platform
from ringrl.training.mesh import make_ring
from ringrl.training.seal import array_seals, sealed, unsealed
from ringrl.training.step import TrainState

ARRAYS = "arrays"  # among what a checkpoint says: the seals of its arrays


@dataclasses.dataclass(frozen=True)
class RunInfo:
    """What a checkpoint says beside its arrays."""

    config: TrainConfig
    normalisation: Normalisation
    observation_size: int
    action_size: int
    domain: str
    data_fingerprint: str
    best_return: float  # highest return of the task in the data: the target that a policy is asked for
    versions: Mapping[str, str]
    transitions: int | None = None  # steps of the episodes that may be drawn; None: a run from before this was told

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return fields | {
            "config": self.config.model_dump(mode="json"),
            "normalisation": self.normalisation.to_json(),
            "versions": dict(self.versions),
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "RunInfo":
        """What `to_json` wrote."""
        config = TrainConfig.model_validate(values["config"])
        return cls(**values | {"config": config, "normalisation": Normalisation.from_json(values["normalisation"])})

    def make_policy(self, parallel: Parallel = ONE_DEVICE) -> Policy:
        """The run's policy as it was before training."""
        config = self.config
        goal = self.goal(config.task) if config.model.family.has_goal else None  # no other kind needs MuJoCo here
        return make_policy(config.model, self.observation_size, self.action_size, config.seed, goal, parallel)

    def goal(self, task: str) -> Goal | None:
        """What a task of the run's domain asks to be reached, in terms of the run's observations; None: no place."""
        space, normalisation = goal_space(self.domain) if self.domain in DOMAINS else None, self.normalisation
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
    """The checkpoints of one run; each is written aside and renamed by orbax, so none is half-written.

    Kept are the newest (`keep` of them, or all) and the one of lowest loss.
    """

    def __init__(self, run: Path, keep: int | None = None) -> None:
        self.folder = run / "checkpoints"
        best = policies.BestN(get_metric_fn=_loss, reverse=True, n=1)
        kept = policies.AnyPreservationPolicy([policies.LatestN(keep), best])
        self._manager = ocp.CheckpointManager(
            self.folder.absolute(),
            options=ocp.CheckpointManagerOptions(  # without a best_fn, losses would not be written for a resumed run
                preservation_policy=kept, best_fn=_loss, best_mode="min", enable_async_checkpointing=True
            ),
        )

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, newest last."""
        return sorted(self._manager.all_steps())

    def lay_aside(self, step: int) -> Path:
        """Put a checkpoint where it is in nobody's way; returns where."""
        aside = self.folder.parent / f"damaged_checkpoint_{step}"
        if jax.process_index() == 0:
            shutil.rmtree(aside, ignore_errors=True)
            (self.folder / str(step)).rename(aside)
        self._manager.reload()
        return aside

    def save(self, state: TrainState, info: RunInfo, iterator: dict[str, Any], loss: float | None) -> None:
        """Write the state, the state of the iterator over batches and the mean loss of late, in the background."""
        arrays = ocp.args.StandardSave(state._asdict())
        values = ocp.args.JsonSave(sealed(info.to_json() | {ARRAYS: array_seals(state)}))
        items = ocp.args.Composite(state=arrays, info=values, iterator=ocp.args.JsonSave(sealed(iterator)))
        with self._naming_failures():
            self._manager.save(int(state.step), args=items, metrics=None if loss is None else {"loss": loss})

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state of a checkpoint, shaped like `like`."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like._asdict())
        state = TrainState(**self._restore(step, "state", ocp.args.StandardRestore(abstract)))
        seals = _read_values(self.folder / str(step)).get(ARRAYS)  # none in checkpoints from before there were any
        if seals is not None and seals != array_seals(state):
            raise _unreadable(self.folder / str(step), ValueError("its arrays are not those that were saved"))
        return state

    def restore_iterator(self, step: int) -> dict[str, Any]:
        """The state of the iterator over batches that was saved with a checkpoint."""
        values = self._restore(step, "iterator", ocp.args.JsonRestore())
        try:
            return unsealed(values)
        except ValueError as error:
            raise _unreadable(self.folder / str(step), error) from error

    def _restore(self, step: int, item: str, how: ocp.args.CheckpointArgs) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**{item: how}))[item]
        except Exception as error:  # orbax raises bare Exceptions where an array cannot be read
            raise _unreadable(self.folder / str(step), error) from error

    def wait(self) -> None:
        """Until all is written; UserError if it could not be."""
        with self._naming_failures():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait for what is still being written; UserError if it could not be."""
        with self._naming_failures():
            try:
                self._manager.wait_until_finished()
            finally:
                self._manager.close()

    @contextlib.contextmanager
    def _naming_failures(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # a full disk reaches us as ValueError, its cause at the end of the text
            cause = " ".join(str(error).split()).rsplit(": ", 1)[-1]
            raise UserError(
                f"{self.folder}: a checkpoint cannot be written ({cause}); free some space, then use --resume"
            ) from None


def _loss(metrics: dict[str, float]) -> float:
    return metrics["loss"]


def read_info(run: Path, step: int | None = None) -> tuple[int, RunInfo]:
    """Step and description of a run's newest (or given) checkpoint.

    Raises:
      UserError: no such run, no checkpoint yet, no such step, or a description that is damaged.
    """
    folder = run / "checkpoints"
    steps = sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit()) if folder.is_dir() else []
    if not steps:
        raise UserError(f"{run}: holds no checkpoint; give the folder of a run made by `ringrl train --run`")
    if step is not None and step not in steps:
        raise UserError(f"{run}: has no checkpoint of step {step}; it has {', '.join(map(str, steps))}")
    step = steps[-1] if step is None else step
    values = _read_values(folder / str(step))
    try:
        return step, RunInfo.from_json({name: value for name, value in values.items() if name != ARRAYS})
    except pydantic.ValidationError as error:
        raise UserError(
            f"{folder / str(step)}: its configuration does not fit this version ({one_line(error)})"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise _unreadable(folder / str(step), error) from error


def _read_values(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says; UserError where it does not say what was saved."""
    try:
        return unsealed(json.loads((checkpoint / "info" / "metadata").read_text()))
    except (OSError, ValueError, AttributeError) as error:
        raise _unreadable(checkpoint, error) from error


@dataclasses.dataclass(frozen=True)
class TrainedPolicy:
    """A policy with its trained parameters, ready to act."""

    policy: Policy
    info: RunInfo
    step: int
    parameter_hash: str  # sha256 over the parameters
    parallel: Parallel = ONE_DEVICE  # over which its contexts are divided

    def towards(self, task: str) -> Policy:
        """The policy for another task of its domain; one that knows goals then heads for that task's."""
        if not self.info.config.model.family.has_goal:
            return self.policy
        policy: Any = nnx.clone(self.policy)
        policy.goal = self.info.goal(task)
        return policy  # type: ignore[no-any-return]


def load_policy(run: Path, step: int | None = None, mesh: MeshConfig | None = None) -> TrainedPolicy:
    """The policy of a run's newest (or given) checkpoint, its contexts to be divided over the mesh.

    Raises:
      UserError: there is none to use, or as `make_ring` and `check_platform`.
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
    """Whether the checkpoint is damaged, or something else stood in the way."""
    passing = is_out_of_memory(error)
    missing = isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
    if passing or (isinstance(error, OSError) and error.errno is not None and not missing):
        return UserError(f"{checkpoint}: cannot be read now, and is left as it is ({brief(error)})")
    return DamagedCheckpointError(f"{checkpoint}: is damaged ({brief(error)}); remove it to use an older one")
