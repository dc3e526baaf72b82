"""Action heads: a loss on actions and the action to take, from a feature vector.

Actions are in [-1, 1], or choices for `categorical`. `mse` averages the modes of multi-modal data. `gaussian` averages
them with a learned width.
`bins` keeps the modes of each action component apart, and takes the highest one or the mean.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32

from ringrl.config import ModelConfig

LOG_STD_RANGE = (-4.0, 1.0)
BINS = 21  # per component, 0.1 apart
_VALUES = np.linspace(-1, 1, BINS, dtype=np.float32)

Features = Float[Array, "*batch width"]
Actions = Float[Array, "*batch action"]


class MSEHead(nnx.Module):
    """Mean action tanh(linear), trained by squared error."""

    def __init__(self, width: int, action_size: int, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(width, action_size, rngs=rngs)

    def loss(self, features: Features, action: Actions) -> Float32[Array, "*batch"]:
        """Return the mean squared error over action components, (*batch,) float32."""
        return jnp.square(self.action(features) - action).mean(-1)

    def action(self, features: Features) -> Float32[Array, "*batch action"]:
        """Return the mean action, (*batch, action) float32."""
        return jnp.tanh(self.linear(features).astype(jnp.float32))


class GaussianHead(nnx.Module):
    """Diagonal Gaussian with mean tanh(linear) and a state-dependent standard deviation."""

    def __init__(self, width: int, action_size: int, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(width, 2 * action_size, rngs=rngs)

    def _parameters(self, features: jax.Array) -> tuple[jax.Array, jax.Array]:
        mean, raw = jnp.split(self.linear(features).astype(jnp.float32), 2, axis=-1)
        low, high = LOG_STD_RANGE
        return jnp.tanh(mean), low + (high - low) * jax.nn.sigmoid(raw)

    def loss(self, features: Features, action: Actions) -> Float32[Array, "*batch"]:
        """Return the negative log-likelihood, averaged over action components, (*batch,) float32."""
        mean, log_std = self._parameters(features)
        return -jax.scipy.stats.norm.logpdf(action, mean, jnp.exp(log_std)).mean(-1)

    def action(self, features: Features) -> Float32[Array, "*batch action"]:
        """Return the mean action, (*batch, action) float32."""
        return self._parameters(features)[0]


class BinsHead(nnx.Module):
    """Categorical distribution over evenly spaced values of each action component.

    Targets are two-hot: an action between two values is divided between both in proportion, as the categorical values
    of MuZero (1911.08265).
    """

    def __init__(self, width: int, action_size: int, rngs: nnx.Rngs, choice: Literal["mode", "mean"] = "mode") -> None:
        self.linear = nnx.Linear(width, action_size * BINS, rngs=rngs)
        self.reach = 1 if choice == "mode" else BINS

    def _logits(self, features: Features) -> Float32[Array, "*batch action bins"]:
        logits = self.linear(features).astype(jnp.float32)
        return logits.reshape(*logits.shape[:-1], -1, BINS)

    def loss(self, features: Features, action: Actions) -> Float32[Array, "*batch"]:
        """Return the cross-entropy, averaged over action components, (*batch,) float32."""
        share = jnp.maximum(0.0, 1 - jnp.abs(action[..., None] - _VALUES) * (BINS - 1) / 2)
        return -(share * jax.nn.log_softmax(self._logits(features))).sum(-1).mean(-1)

    def action(self, features: Features) -> Float32[Array, "*batch action"]:
        """Return the mean over the likeliest value and its two neighbours (mode) or all values (mean).

        (*batch, action) float32.
        """
        logits = self._logits(features)
        distance = jnp.abs(jnp.arange(BINS) - logits.argmax(-1, keepdims=True))
        return jnp.sum(jax.nn.softmax(jnp.where(distance <= self.reach, logits, -jnp.inf)) * _VALUES, axis=-1)


class CategoricalHead(nnx.Module):
    """Categorical distribution over the choices of a discrete action, which has 1 for the choice and 0 elsewhere."""

    def __init__(self, width: int, action_size: int, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(width, action_size, rngs=rngs)

    def loss(self, features: Features, action: Actions) -> Float32[Array, "*batch"]:
        """Return the cross-entropy, (*batch,) float32."""
        return -(action * jax.nn.log_softmax(self.linear(features).astype(jnp.float32))).sum(-1)

    def action(self, features: Features) -> Float32[Array, "*batch action"]:
        """Return the likeliest choice, (*batch, action) float32: 1 for the choice, 0 elsewhere."""
        return jax.nn.one_hot(self.linear(features).argmax(-1), self.linear.out_features)


Head = MSEHead | GaussianHead | BinsHead | CategoricalHead


def make_head(config: ModelConfig, action_size: int, rngs: nnx.Rngs) -> Head:
    """Return the action head that the configuration names."""
    if config.action_head == "mse":
        return MSEHead(config.width, action_size, rngs)
    if config.action_head == "gaussian":
        return GaussianHead(config.width, action_size, rngs)
    if config.action_head == "categorical":
        return CategoricalHead(config.width, action_size, rngs)
    return BinsHead(config.width, action_size, rngs, config.action_choice)
