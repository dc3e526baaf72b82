"""TD3+BC (Fujimoto & Gu, 2106.06860): an actor that climbs a learned value and stays near the data's actions.

The networks are layer-normalised, which keeps values from running away on actions that the data lacks (ReBRAC,
2305.09836). Where the task is to reach a place, actor and critics also see which place, so that transitions can be
relabelled with other goals (hindsight, 1707.01495).
"""

from dataclasses import dataclass
from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32

from ringrl.config import ModelConfig
from ringrl.context import Context, Transitions
from ringrl.model.memoryless import Memoryless

LARGEST_INPUT = 5.0  # standard deviations; observations beyond are clipped
COARSE, FINE = 5.0, 20.0  # per metre: offsets to the goal are of order one at 20 cm, and again at 5 cm
LAST_LAYER_STD = 0.01  # actions and values start near zero


@dataclass(frozen=True)
class Goal:
    """The place to reach, and where a normalised observation holds the position that is to get there.

    Attributes:
        place: the task's goal, metres.
        columns: of the observation.
        mean: of these columns in the data, metres.
        std: of these columns in the data, metres.
    """

    place: tuple[float, ...]
    columns: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def position(self, observation: Float[Array, "*batch observation"]) -> Float[Array, "*batch goal"]:
        """The present position, metres."""
        return observation[..., jnp.array(self.columns)] * jnp.array(self.std) + jnp.array(self.mean)


class MLP(nnx.Module):
    """Layers of ReLU, layer-normalised without scale or bias, then a linear one."""

    def __init__(self, config: ModelConfig, inputs: int, outputs: int, rngs: nnx.Rngs) -> None:
        sizes = [inputs] + [config.width] * config.layers
        dtype = jnp.dtype(config.dtype)
        self.layers = nnx.List([nnx.Linear(a, b, dtype=dtype, rngs=rngs) for a, b in pairwise(sizes)])
        self.norms = nnx.List([nnx.LayerNorm(b, use_bias=False, use_scale=False, rngs=rngs) for b in sizes[1:]])
        initial = nnx.initializers.normal(LAST_LAYER_STD)
        self.last = nnx.Linear(config.width, outputs, kernel_init=initial, rngs=rngs)

    def __call__(self, x: Float[Array, "*batch inputs"]) -> Float32[Array, "*batch outputs"]:
        """The last layer's outputs."""
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = jax.nn.relu(norm(layer(x)))
        return self.last(x).astype(jnp.float32)


class ActorCritic(Memoryless, nnx.Module):
    """Actor, two critics, and their slowly following targets; it acts by the target actor, towards the task's goal."""

    def __init__(
        self, config: ModelConfig, observation_size: int, action_size: int, rngs: nnx.Rngs, goal: Goal | None = None
    ) -> None:
        self.goal = goal
        inputs = observation_size + (3 * len(goal.place) if goal else 0)
        self.actor = MLP(config, inputs, action_size, rngs)
        self.critics = nnx.List([MLP(config, inputs + action_size, 1, rngs) for _ in range(2)])
        self.target_actor = nnx.clone(self.actor)
        self.target_critics = nnx.clone(self.critics)

    def inputs(
        self, observation: Float[Array, "*batch observation"], goal: Float[Array, "*batch goal"]
    ) -> Float32[Array, "*batch inputs"]:
        """What the networks see of a state: the observation, the goal, and the offset to it, coarse and fine."""
        x = jnp.clip(observation, -LARGEST_INPUT, LARGEST_INPUT)
        if self.goal is None:
            return x
        offset = self.goal.position(observation) - goal
        return jnp.concatenate([x, COARSE * goal, COARSE * offset, jnp.tanh(FINE * offset)], -1)

    def target_value(self, batch: Transitions, noise: Float32[Array, "batch action"]) -> Float32[Array, " batch"]:
        """What the critics should say: the rewards, and then the lower target critic on the target actor.

        Noise on that action keeps the critics smooth; the action stays within [-1, 1].
        """
        x = self.inputs(jnp.asarray(batch.following), jnp.asarray(batch.goal))
        action = jnp.clip(jnp.tanh(self.target_actor(x)) + noise, -1, 1)
        return jnp.asarray(batch.reward) + batch.discount * _values(self.target_critics, x, action).min(0)

    def critic_loss(self, batch: Transitions, target: Float32[Array, " batch"]) -> Float32[Array, ""]:
        """Squared error of both critics, summed over the two."""
        x = self.inputs(jnp.asarray(batch.observation), jnp.asarray(batch.goal))
        return jnp.square(_values(self.critics, x, jnp.asarray(batch.action)) - target).sum(0).mean()

    def actor_loss(self, batch: Transitions, behaviour_cloning: float) -> Float32[Array, ""]:
        """The first critic's value of the actor's actions, scaled to one, and their distance to the data's."""
        x = self.inputs(jnp.asarray(batch.observation), jnp.asarray(batch.goal))
        action = jnp.tanh(self.actor(x))
        value = _values(self.critics[:1], x, action)[0]
        scale = jax.lax.stop_gradient(jnp.abs(value).mean()) + 1e-3
        return -value.mean() / scale + behaviour_cloning * jnp.square(action - batch.action).mean()

    def actions(self, context: Context) -> Float32[Array, "batch time action"]:
        """The action at every step, towards the task's goal."""
        observation = jnp.asarray(context.observation)
        place = self.goal.place if self.goal else ()
        goal = jnp.broadcast_to(jnp.array(place, jnp.float32), (*observation.shape[:-1], len(place)))
        return jnp.tanh(self.target_actor(self.inputs(observation, goal)))


def _values(
    critics: nnx.List, x: Float[Array, "*batch inputs"], action: Float[Array, "*batch action"]
) -> Float32[Array, " critics *batch"]:
    together = jnp.concatenate([x, action], -1)
    return jnp.stack([critic(together)[..., 0] for critic in critics])
