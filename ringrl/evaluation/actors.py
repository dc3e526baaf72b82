"""Actors choose actions in a batch of environments: a trained policy with its key-value cache, or random actions.

The tokens of a timestep enter the cache in one call. A full cache doubles, so that few programs are compiled and short
contexts stay cheap.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Float32
from scipy.spatial import KDTree  # type: ignore[import-untyped]

from ringrl.config import ModelConfig
from ringrl.context import Array, Context
from ringrl.model import KVCache, Policy, grow
from ringrl.model.agents.imitation import BehaviourCloning
from ringrl.model.parallel import ONE_DEVICE, Parallel

SMALLEST_CACHE = 512  # tokens
CLONE_STEPS = 1000


class Actor:
    """Chooses actions in a batch of environments and may remember earlier steps."""

    def start(self, num_environments: int, num_steps: int, prompt: Context | None = None) -> None:
        """Clear the memory except for the prompt (1, T, ...), with which every context begins.

        At most `num_steps` steps follow. The first one has position T.
        """
        raise NotImplementedError

    def act(self, current: Context) -> Float32[Array, "environments action"]:
        """Return the action at a new timestep (B, 1, ...), whose action, reward and completion are zero.

        The result may be a jax.Array that is still being computed.
        """
        raise NotImplementedError

    def observe(self, finished: Context) -> None:
        """Remember the same timestep with its action, reward and completion. Does nothing by default."""


class RandomActor(Actor):
    """Uniform random actions. Stream i uses the seed `seed + i * stride`, whatever the number of streams."""

    def __init__(self, action_size: int, seed: int, stride: int = 1) -> None:
        self._action_size, self._seed, self._stride = action_size, seed, stride

    def start(self, num_environments: int, num_steps: int, prompt: Context | None = None) -> None:
        self._randoms = [np.random.default_rng(self._seed + index * self._stride) for index in range(num_environments)]

    def act(self, current: Context) -> Float32[np.ndarray, "environments action"]:
        return np.stack([random.uniform(-1, 1, self._action_size) for random in self._randoms]).astype(np.float32)


class CopyActor(Actor):
    """Copies the action of the prompt's step with the nearest normalised observation (Euclidean distance)."""

    def start(self, num_environments: int, num_steps: int, prompt: Context | None = None) -> None:
        assert prompt is not None
        self._observations, self._actions = KDTree(prompt.observation[0]), np.asarray(prompt.action[0])

    def act(self, current: Context) -> Float32[np.ndarray, "environments action"]:
        return self._actions[self._observations.query(current.observation[:, 0])[1]]


class CloneActor(Actor):
    """Behaviour cloning of the prompt alone: CLONE_STEPS steps of Adam with batches of 256 timesteps."""

    def start(self, num_environments: int, num_steps: int, prompt: Context | None = None) -> None:
        """Train a new network on the prompt."""
        assert prompt is not None
        config = ModelConfig(kind="behaviour_cloning", layers=2, width=256)
        policy = BehaviourCloning(config, prompt.observation.shape[-1], prompt.action.shape[-1], nnx.Rngs(params=0))
        graph, params = nnx.split(policy)
        optimiser = optax.adam(1e-3)

        def step(state: tuple[Any, Any], rows: jax.Array) -> tuple[tuple[Any, Any], None]:
            params, moments = state
            batch = jax.tree.map(lambda x: jnp.asarray(x)[:, rows], prompt)
            gradient = jax.grad(lambda params: nnx.merge(graph, params).loss(batch))(params)
            updates, moments = optimiser.update(gradient, moments)
            return (optax.apply_updates(params, updates), moments), None

        rows = np.random.default_rng(0).integers(prompt.observation.shape[1], size=(CLONE_STEPS, 256))
        (params, _), _ = jax.jit(partial(jax.lax.scan, step))((params, optimiser.init(params)), rows)
        self._actions = jax.jit(lambda context: nnx.merge(graph, params).actions(context))

    def act(self, current: Context) -> Float32[jax.Array, "environments action"]:
        return self._actions(current)[:, 0]


class PolicyActor(Actor):
    """A trained policy with its own key-value cache."""

    def __init__(self, compiled: "CompiledPolicy") -> None:
        self._compiled = compiled

    def start(self, num_environments: int, num_steps: int, prompt: Context | None = None) -> None:
        """Make an empty cache and compute the prompt's cache, once for all environments."""
        self._most_tokens = num_steps * self._compiled.policy.tokens_per_step
        self._tokens = 0
        self._previous: Context | None = None
        self._prefix = None if prompt is None else self._compiled.prefill(prompt)
        self._memory = self._compiled.policy.reset(num_environments, min(SMALLEST_CACHE, self._most_tokens))

    def act(self, current: Context) -> Float32[jax.Array, "environments action"]:
        """Append the tokens of this step to the cache and return the action."""
        self._tokens += self._compiled.policy.tokens_per_step
        if isinstance(self._memory, KVCache) and self._tokens > self._memory.capacity:
            self._memory = self._compiled.grow(self._memory, capacity=min(2 * self._memory.capacity, self._most_tokens))
        action, self._memory = self._compiled.act(self._previous, current, self._memory, self._prefix)
        return action

    def observe(self, finished: Context) -> None:
        """Keep the step. Its tokens enter the cache together with the tokens of the next step."""
        self._previous = finished


class SegmentActor(Actor):
    """A policy trained on segments. It sees the prompt and the last steps of the live episode, as one more segment."""

    def __init__(self, compiled: "CompiledPolicy", segment_steps: int) -> None:
        self._compiled, self._length = compiled, segment_steps

    def start(self, num_environments: int, num_steps: int, prompt: Context | None = None) -> None:
        """Forget the last episode, and compute the prompt's cache once for all environments."""
        self._prefix = None if prompt is None else self._compiled.prefill(prompt)
        self._steps: list[Context] = []
        self._place: tuple[np.ndarray, ...] = ()

    def act(self, current: Context) -> Float32[jax.Array, "environments action"]:
        """Return the action at the last step of the segment. Padding at its end is not seen."""
        if not current.timestep.any():  # a stream that has finished begins at 0 again, while others play
            self._steps = []
        if not self._place:  # later episodes have the place of the first: they do not follow it in the context
            self._place = np.asarray(current.start), np.asarray(current.trajectory)
        steps = [*self._steps, current]
        segment = jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *steps)
        first = jax.tree.map(np.array, segment.previous)
        for x in first:
            x[:, 0] = 0  # as in training segments
        start, trajectory = (np.repeat(x, len(steps), axis=1) for x in self._place)
        segment = segment._replace(previous=first, start=start, trajectory=trajectory)
        pad = lambda x: np.pad(x, [(0, 0), (0, self._length - len(steps)), *[(0, 0)] * (x.ndim - 2)])  # noqa: E731
        action: jax.Array = self._compiled.act_after(self._prefix, jax.tree.map(pad, segment), len(steps) - 1)
        return action

    def observe(self, finished: Context) -> None:
        """Keep the step, and forget the first one if the next segment would be too long."""
        self._steps = [*self._steps, finished][-(self._length - 1) :] if self._length > 1 else []


class CompiledPolicy:
    """The compiled programs of a policy with its present parameters, on the mesh that it was made for.

    All its actors share them. Each number of environments and each cache capacity has its own program.
    """

    def __init__(self, policy: Policy, parallel: Parallel = ONE_DEVICE) -> None:
        graph, params = nnx.split(policy)

        def compiled(method: str, **options: Any) -> Callable[..., Any]:
            run = jax.jit(lambda params, *arguments: getattr(nnx.merge(graph, params), method)(*arguments), **options)
            return partial(run, params)

        self.policy = policy
        self.act, self.act_after = compiled("act", donate_argnums=3), compiled("action_after")  # act donates the memory
        self.grow = jax.jit(partial(grow, parallel=parallel), static_argnames="capacity")
        self._prefill = compiled("prefill")
        self._prefilled: tuple[Context, Any] | None = None

    def prefill(self, prompt: Context) -> Any:
        """Return the memory of a prompt. The memory of the latest prompt is kept for the next rollout."""
        if self._prefilled is None or self._prefilled[0] is not prompt:
            self._prefilled = prompt, self._prefill(prompt)
        return self._prefilled[1]
