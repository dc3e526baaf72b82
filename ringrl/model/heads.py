"""Action heads: a loss on actions and the action to take, from a feature vector.

Actions are in [-1, 1], or choices for `categorical`. `mse` averages the modes of multi-modal data, and `gaussian`
averages them with a learned width. `bins` keeps the modes of each action component apart.
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


class Head(nnx.Module):
    """A linear layer with `OUTPUTS` numbers per action component."""

    OUTPUTS = 1

    def __init__(self, width: int, action_size: int, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(width, action_size * self.OUTPUTS, rngs=rngs)

    def loss(self, features: Features, action: Actions) -> Float32[Array, "*batch"]:
        """Return the imitation loss, averaged over action components, (*batch,) float32."""
        raise NotImplementedError

    def action(self, features: Features) -> Float32[Array, "*batch action"]:
        """Return the action to take, (*batch, action) float32."""
        raise NotImplementedError


class MSEHead(Head):
    """Mean action tanh(linear), trained by squared error."""

    def loss(self, features: Features, action: Actions) -> Float32[Array, "*batch"]:
        return jnp.square(self.action(features) - action).mean(-1)

    def action(self, features: Features) -> Float32[Array, "*batch action"]:
        return jnp.tanh(self.linear(features).astype(jnp.float32))


class GaussianHead(Head):
    """Diagonal Gaussian with mean tanh(linear) and a state-dependent standard deviation, trained by likelihood."""

    OUTPUTS = 2

    def _parameters(self, features: jax.Array) -> tuple[jax.Array, jax.Array]:
        mean, raw = jnp.split(self.linear(features).astype(jnp.float32), 2, axis=-1)
        low, high = LOG_STD_RANGE
        return jnp.tanh(mean), low + (high - low) * jax.nn.sigmoid(raw)

    def loss(self, features: Features, action: Actions) -> Float32[Array, "*batch"]:
        mean, log_std = self._parameters(features)
        return -jax.scipy.stats.norm.logpdf(action, mean, jnp.exp(log_std)).mean(-1)

    def action(self, features: Features) -> Float32[Array, "*batch action"]:
        return self._parameters(features)[0]


class BinsHead(Head):
    """Categorical distribution over evenly spaced values of each action component, trained by cross-entropy.

    Targets are two-hot: an action between two values is divided between both in proportion, as the categorical values
    of MuZero (1911.08265). The action is the mean over the likeliest value and its two neighbours (mode) or over all
    values (mean).
    """

    OUTPUTS = BINS

    def __init__(self, width: int, action_size: int, rngs: nnx.Rngs, choice: Literal["mode", "mean"] = "mode") -> None:
        super().__init__(width, action_size, rngs)
        self.reach = 1 if choice == "mode" else BINS

    def _logits(self, features: Features) -> Float32[Array, "*batch action bins"]:
        logits = self.linear(features).astype(jnp.float32)
        return logits.reshape(*logits.shape[:-1], -1, BINS)

    def loss(self, features: Features, action: Actions) -> Float32[Array, "*batch"]:
        share = jnp.maximum(0.0, 1 - jnp.abs(action[..., None] - _VALUES) * (BINS - 1) / 2)
        return -(share * jax.nn.log_softmax(self._logits(features))).sum(-1).mean(-1)

    def action(self, features: Features) -> Float32[Array, "*batch action"]:
        logits = self._logits(features)
        distance = jnp.abs(jnp.arange(BINS) - logits.argmax(-1, keepdims=True))
        return jnp.sum(jax.nn.softmax(jnp.where(distance <= self.reach, logits, -jnp.inf)) * _VALUES, axis=-1)


class CategoricalHead(Head):
    """Categorical distribution over choices, trained by cross-entropy. An action has 1 for the choice, 0 elsewhere."""

    def loss(self, features: Features, action: Actions) -> Float32[Array, "*batch"]:
        return -(action * jax.nn.log_softmax(self.linear(features).astype(jnp.float32))).sum(-1)

    def action(self, features: Features) -> Float32[Array, "*batch action"]:
        return jax.nn.one_hot(self.linear(features).argmax(-1), self.linear.out_features)


def make_head(config: ModelConfig, action_size: int, rngs: nnx.Rngs) -> Head:
    """Return the action head that the configuration names."""
    if config.action_head == "bins":
        return BinsHead(config.width, action_size, rngs, config.action_choice)
    kinds: dict[str, type[Head]] = {"mse": MSEHead, "gaussian": GaussianHead, "categorical": CategoricalHead}
    return kinds[config.action_head](config.width, action_size, rngs)
