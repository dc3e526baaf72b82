"""Action heads: a loss on actions and a most likely action, from a feature vector.

Actions are in [-1, 1]. `mse` averages the modes of multi-modal data. `gaussian` averages them with a learned width.
`mixture` keeps the modes of the whole action apart, and `bins` those of each component.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32

from ringrl.config import ModelConfig

LOG_STD_RANGE = (-4.0, 1.0)
BINS = 21  # per component, 0.1 apart
COMPONENTS = 5  # of a mixture
_VALUES = np.linspace(-1, 1, BINS, dtype=np.float32)

Features = Float[Array, "*batch width"]
Actions = Float[Array, "*batch action"]


class MSEHead(nnx.Module):
    """Mean action tanh(linear), trained by squared error."""

    def __init__(self, width: int, action_size: int, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(width, action_size, rngs=rngs)

    def loss(self, features: Features, action: Actions) -> Float32[Array, "*batch"]:
        """Return the mean squared error over action components, (*batch,) float32."""
        return jnp.square(self.mode(features) - action).mean(-1)

    def mode(self, features: Features) -> Float32[Array, "*batch action"]:
        """Return the most likely action, (*batch, action) float32."""
        return jnp.tanh(self.linear(features).astype(jnp.float32))


class GaussianHead(nnx.Module):
    """A diagonal Gaussian, or a mixture of several. Means are tanh(linear), standard deviations depend on the state."""

    def __init__(self, width: int, action_size: int, rngs: nnx.Rngs, components: int = 1) -> None:
        self.components, self.action_size = components, action_size
        self.linear = nnx.Linear(width, components * (2 * action_size + (components > 1)), rngs=rngs)

    def _parameters(self, features: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return means and log standard deviations (..., components, action), and log weights (..., components)."""
        out, size = self.linear(features).astype(jnp.float32), self.components * self.action_size
        mean, raw = (
            x.reshape(*x.shape[:-1], -1, self.action_size) for x in (out[..., :size], out[..., size : 2 * size])
        )
        low, high = LOG_STD_RANGE
        weights = out[..., 2 * size :] if self.components > 1 else jnp.zeros((*out.shape[:-1], 1))
        return jnp.tanh(mean), low + (high - low) * jax.nn.sigmoid(raw), jax.nn.log_softmax(weights)

    def loss(self, features: Features, action: Actions) -> Float32[Array, "*batch"]:
        """Return the negative log-likelihood, averaged over action components, (*batch,) float32."""
        mean, log_std, weights = self._parameters(features)
        density = jax.scipy.stats.norm.logpdf(action[..., None, :], mean, jnp.exp(log_std)).sum(-1)
        return -jax.nn.logsumexp(weights + density, axis=-1) / self.action_size

    def mode(self, features: Features) -> Float32[Array, "*batch action"]:
        """Return the mean of the component with the largest weight, (*batch, action) float32."""
        mean, _, weights = self._parameters(features)
        return jnp.take_along_axis(mean, weights.argmax(-1)[..., None, None], axis=-2)[..., 0, :]


class BinsHead(nnx.Module):
    """Categorical distribution over evenly spaced values of each action component.

    Targets are two-hot: an action between two values is divided between both in proportion, as the categorical values
    of MuZero (1911.08265).
    """

    def __init__(self, width: int, action_size: int, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(width, action_size * BINS, rngs=rngs)

    def _logits(self, features: Features) -> Float32[Array, "*batch action bins"]:
        logits = self.linear(features).astype(jnp.float32)
        return logits.reshape(*logits.shape[:-1], -1, BINS)

    def loss(self, features: Features, action: Actions) -> Float32[Array, "*batch"]:
        """Return the cross-entropy, averaged over action components, (*batch,) float32."""
        share = jnp.maximum(0.0, 1 - jnp.abs(action[..., None] - _VALUES) * (BINS - 1) / 2)
        return -(share * jax.nn.log_softmax(self._logits(features))).sum(-1).mean(-1)

    def mode(self, features: Features) -> Float32[Array, "*batch action"]:
        """Return the mean over the likeliest value and its two neighbours, (*batch, action) float32."""
        logits = self._logits(features)
        distance = jnp.abs(jnp.arange(BINS) - logits.argmax(-1, keepdims=True))
        return jnp.sum(jax.nn.softmax(jnp.where(distance <= 1, logits, -jnp.inf)) * _VALUES, axis=-1)


Head = MSEHead | GaussianHead | BinsHead


def make_head(config: ModelConfig, action_size: int, rngs: nnx.Rngs) -> Head:
    """Return the action head that the configuration names."""
    mixture = partial(GaussianHead, components=COMPONENTS)
    kinds: dict[str, Callable[..., Head]] = {
        "mse": MSEHead, "gaussian": GaussianHead, "mixture": mixture, "bins": BinsHead,
    }  # fmt: skip
    return kinds[config.action_head](config.width, action_size, rngs)
