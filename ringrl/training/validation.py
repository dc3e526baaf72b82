"""The loss on held-out episodes, on the same batches at every measurement."""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float32, Float64

from ringrl.config import TrainConfig
from ringrl.context import Context, Transitions
from ringrl.data.sampling.batches import BatchSource
from ringrl.model import ActorCritic
from ringrl.model.agents.imitation import ImitationPolicy
from ringrl.model.parallel import Parallel

BATCHES = 4  # of the run's batch size
PARTS = 10  # of an episode; the loss of each is reported
FIRST_BATCH = 2**80  # step of the first batch; neither training nor prompts reach this step


class Validation:
    """The loss on batches of `held_out_sources`, as a pure function of the parameters of a policy (`graph`)."""

    def __init__(
        self, config: TrainConfig, graph: Any, sources: Sequence[BatchSource], episode_length: int, parallel: Parallel
    ) -> None:
        self._config, self._sources = config, sources
        places = config.context.trajectories if config.model.family.source == "contexts" else None
        self._sums = _compiled(graph, places, episode_length, parallel)

    def __call__(self, params: Any) -> dict[str, Any]:
        """Return the losses, by name as in metrics.jsonl. On a mesh, every process must call this.

        - validation_loss: the training loss, on held-out episodes (td3_bc: the squared error of the actor's actions)
        - validation_loss_by_part: in ten equal parts of the longest episode; nan where there are no steps
        - validation_loss_by_trajectory: by place of the trajectory in the context, if the model has a context
        - validation_gap: the loss of the last trajectory after those of a wrong task, minus its loss after its own
        """
        sums, *wrong = (self._total(source, params) for source in self._sources)
        family, model = self._config.model.family, self._config.model
        found: dict[str, Any] = {"validation_loss": _mean(sums[-1] if model.loss_on == "last" else sums)}
        if family.source == "contexts":
            found["validation_loss_by_part"] = [_mean(part) for part in np.moveaxis(sums, 1, 0)]
        if family.has_context:
            found["validation_loss_by_trajectory"] = [_mean(place) for place in sums]
        for other in wrong:
            found["validation_gap"] = _mean(other[-1]) - _mean(sums[-1])
        return found

    def _total(self, source: BatchSource, params: Any) -> Float64[np.ndarray, "places parts 2"]:
        total = np.zeros(())
        for number in range(BATCHES * self._config.optimiser.accumulation):
            total = total + np.asarray(self._sums(params, source.batch(FIRST_BATCH + number)), np.float64)
        return total


@lru_cache(maxsize=8)
def _compiled(
    graph: Any, places: int | None, episode_length: int, parallel: Parallel
) -> Callable[[Any, Context | Transitions], jax.Array]:
    """Return the sums of a batch as a jitted function of parameters, one for all runs of equal policies."""
    sums: Callable[..., jax.Array] = _error_sums if places is None else partial(_loss_sums, places, episode_length)
    return jax.jit(lambda params, batch: sums(nnx.merge(graph, params), batch), out_shardings=parallel.sharding())


def _mean(sums: np.ndarray) -> float:
    """Return the mean of sums over all axes but the last: the loss and its weight."""
    loss, weight = sums.reshape(-1, 2).sum(0)
    return float(loss / weight) if weight else np.nan


def _loss_sums(
    places: int, episode_length: int, policy: ImitationPolicy, batch: Context
) -> Float32[Array, "places parts 2"]:
    """Return sums of the loss and of its weight, by place in the context and part of the episode."""
    weight = jnp.asarray(batch.weight)
    part = jnp.minimum(jnp.asarray(batch.timestep) * PARTS // episode_length, PARTS - 1)
    cells = jnp.asarray(batch.trajectory) * PARTS + part
    values = jnp.stack([policy.losses(batch) * weight, weight], axis=-1).reshape(-1, 2)
    return jax.ops.segment_sum(values, cells.reshape(-1), places * PARTS).reshape(places, PARTS, 2)


def _error_sums(policy: ActorCritic, batch: Transitions) -> Float32[Array, "1 1 2"]:
    """Return the mean error of a batch of transitions, with weight one."""
    return jnp.stack([policy.imitation_error(batch), jnp.ones(())])[None, None]
