"""Random network distillation (Burda et al., 1810.12894): a reward for states unlike those seen before."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float

from ringrl.model.agents.td3 import EXORL, MLP

_SIZES = (256, 256, 64)  # hidden layers and outputs
_LEARNING_RATE = 1e-4
_LARGEST_INPUT = 5.0  # standard deviations; observations are clipped here
# Normalised layers would hide how far away a state is.
_STYLE = EXORL._replace(norm="none", last=nnx.initializers.orthogonal(1.0))


class Moments(NamedTuple):
    """Running mean and variance, and the number of values seen."""

    mean: Array
    variance: Array
    number: Array

    @classmethod
    def zero(cls, *shape: int) -> "Moments":
        """Return the moments before the first value."""
        return cls(jnp.zeros(shape), jnp.zeros(shape), jnp.zeros(()))

    def observe(self, values: Float[Array, " batch *rest"]) -> "Moments":
        """Return the moments with a batch of further values (Chan et al. 1979)."""
        number = values.shape[0]
        total = self.number + number
        difference = values.mean(0) - self.mean
        squares = self.variance * self.number + values.var(0) * number
        squares += difference**2 * self.number * number / total
        return Moments(self.mean + difference * number / total, squares / total, total)


class RndState(NamedTuple):
    """Parameters of the random target and of the predictor, and the scales of observations and errors."""

    target: Any
    predictor: Any
    optimiser: Any
    observation: Moments
    error: Moments


class RND:
    """Update rule of random network distillation. What it learns is in `RndState`."""

    def __init__(self, observation_size: int) -> None:
        self._size = observation_size
        self._graph = nnx.split(nnx.eval_shape(lambda: self._network(nnx.Rngs(params=0))), nnx.Param)[0]
        self._adam = optax.adam(_LEARNING_RATE)

    def init(self, rngs: nnx.Rngs) -> RndState:
        """Return the state before the first update."""
        target, predictor = (nnx.to_pure_dict(nnx.state(self._network(rngs), nnx.Param)) for _ in range(2))
        return RndState(target, predictor, self._adam.init(predictor), Moments.zero(self._size), Moments.zero())

    def errors(
        self, state: RndState, observation: Float[Array, "*batch observation"], predictor: Any = None
    ) -> Float[Array, "*batch"]:
        """Return the mean squared error of the prediction, which is high for novel states."""
        x = (observation - state.observation.mean) / jnp.sqrt(state.observation.variance + 1e-6)
        x = jnp.clip(x, -_LARGEST_INPUT, _LARGEST_INPUT)
        networks = (nnx.merge(self._graph, p) for p in (predictor or state.predictor, state.target))
        found, wanted = (network(x) for network in networks)
        return jnp.square(found - wanted).mean(-1)

    def update(
        self, state: RndState, observation: Float[Array, "batch observation"]
    ) -> tuple[RndState, Float[Array, " batch"]]:
        """Learn to predict these states. Also return their errors before the update, in standard deviations."""
        state = state._replace(observation=state.observation.observe(observation))

        def loss(predictor: Any) -> tuple[Array, Array]:
            found = self.errors(state, observation, predictor)
            return found.mean(), found

        gradients, found = jax.grad(loss, has_aux=True)(state.predictor)
        updates, optimiser = self._adam.update(gradients, state.optimiser)
        predictor = optax.apply_updates(state.predictor, updates)
        state = state._replace(predictor=predictor, optimiser=optimiser, error=state.error.observe(found))
        return state, found / jnp.sqrt(state.error.variance + 1e-12)

    def _network(self, rngs: nnx.Rngs) -> MLP:
        return MLP((self._size, *_SIZES), _STYLE, rngs)
