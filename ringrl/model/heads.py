"""Action heads: what a feature vector says about the action, as a loss and as an action to take.

Actions lie in [-1, 1]. `mse` averages the modes of multi-modal data; `gaussian` at least says how wide they lie.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32

from ringrl.config import ModelConfig

LOG_STD_RANGE = (-4.0, 1.0)


class MSEHead(nnx.Module):
    """tanh(linear): the mean action, under squared error."""

    def __init__(self, width: int, action_size: int, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(width, action_size, rngs=rngs)

    def loss(
        self, features: Float[Array, "*batch width"], action: Float[Array, "*batch action"]
    ) -> Float32[Array, "*batch"]:
        """Mean squared error over the action's components."""
        return jnp.square(self.mode(features) - action).mean(-1)

    def mode(self, features: Float[Array, "*batch width"]) -> Float32[Array, "*batch action"]:
        """The most likely action."""
        return jnp.tanh(self.linear(features).astype(jnp.float32))


class GaussianHead(nnx.Module):
    """A diagonal gaussian around tanh(linear), with a width that depends on the state."""

    def __init__(self, width: int, action_size: int, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(width, 2 * action_size, rngs=rngs)

    def _parameters(self, features: jax.Array) -> tuple[jax.Array, jax.Array]:
        mean, raw = jnp.split(self.linear(features).astype(jnp.float32), 2, axis=-1)
        low, high = LOG_STD_RANGE
        return jnp.tanh(mean), low + (high - low) * jax.nn.sigmoid(raw)

    def loss(
        self, features: Float[Array, "*batch width"], action: Float[Array, "*batch action"]
    ) -> Float32[Array, "*batch"]:
        """Negative log-likelihood, mean over the action's components."""
        mean, log_std = self._parameters(features)
        return -jax.scipy.stats.norm.logpdf(action, mean, jnp.exp(log_std)).mean(-1)

    def mode(self, features: Float[Array, "*batch width"]) -> Float32[Array, "*batch action"]:
        """The most likely action."""
        return self._parameters(features)[0]


def make_head(config: ModelConfig, action_size: int, rngs: nnx.Rngs) -> MSEHead | GaussianHead:
    """The head that the configuration names."""
    kind = MSEHead if config.action_head == "mse" else GaussianHead
    return kind(config.width, action_size, rngs)
