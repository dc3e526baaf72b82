"""A trained policy, loaded from the folder of its run."""

import dataclasses
import hashlib
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ringrl.config import MeshConfig
from ringrl.errors import UserError
from ringrl.evaluation.player import Player
from ringrl.model import ActorCritic, Policy, make_agent
from ringrl.model.parallel import ONE_DEVICE, Parallel
from ringrl.training.checkpoints import (
    CheckpointKind,
    Checkpoints,
    DamagedCheckpointError,
    RunInfo,
    best_step,
    read_info,
)
from ringrl.training.distributed import check_platform
from ringrl.training.mesh import make_ring


@dataclasses.dataclass(frozen=True, repr=False)
class TrainedPolicy:
    """A policy with its trained parameters."""

    policy: Policy
    run: Path  # its folder
    info: RunInfo
    step: int
    parameter_hash: str  # sha256 of the parameters
    steps_taken: int  # optimiser steps that training took, with those after the best checkpoint
    parallel: Parallel = ONE_DEVICE  # divides its contexts

    def towards(self, task: str) -> Policy:
        """Return the policy for another task of its domain, with the goal of that task if the policy has a goal."""
        if isinstance(self.policy, ActorCritic):
            return self.policy.with_goal(self.info.goal(task))
        return self.policy

    def player(self, **settings: Any) -> Player:
        """Return a `Player`, which acts step by step in your own loop. It takes the settings `target`, `prompt`, ..."""
        return Player(self, **settings)

    def __repr__(self) -> str:
        """Return one line: method, context length, task, step and size."""
        size = sum(x.size for x in jax.tree.leaves(nnx.state(self.policy, nnx.Param)))
        return f"TrainedPolicy({self.info.title}, step {self.step}, {size:,} parameters)"


def load_policy(
    run: str | Path, step: int | None = None, mesh: MeshConfig | None = None, kind: CheckpointKind = "last"
) -> TrainedPolicy:
    """Return the policy of a run's newest, best or given checkpoint, whose contexts are divided over `mesh`.

    `kind` is used if no step is given. `best_step` defines the best.

    Raise UserError as `read_info`, `make_ring` and `check_platform` do, or if the arrays are damaged, or if the
    best is requested and no checkpoint has a finite loss.
    """
    run = Path(run)
    given, (step, info) = step, read_info(run, step)
    steps_taken = step
    if given is None and kind == "best":
        if (best := best_step(run)) is None:
            raise UserError(f"{run}: no checkpoint has a finite loss, so none is the best; evaluate the last")
        step, info = read_info(run, best)
    check_platform()
    parallel = ONE_DEVICE if mesh is None else make_ring(info.config, mesh)
    agent = make_agent(partial(info.make_policy, parallel), info.config, parallel)
    with closing(Checkpoints(run)) as checkpoints:
        try:
            state = checkpoints.restore(step, agent.init())
        except DamagedCheckpointError:
            if given is None and step not in checkpoints.steps():  # training has replaced it by a newer one
                return load_policy(run, mesh=mesh, kind=kind)
            raise
    digest = hashlib.sha256()
    for path, array in jax.tree_util.tree_leaves_with_path(state.params):
        digest.update(jax.tree_util.keystr(path).encode() + jnp.asarray(array).tobytes())
    return TrainedPolicy(agent.policy(state.params), run, info, step, digest.hexdigest(), steps_taken, parallel)
