"""Interface of policies: actions for a whole context, or step by step with a memory."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float32

from ringrl.context import Context


class Policy(nnx.Module):
    """A policy. The default methods implement a policy without memory, which acts on the current observation.

    A policy with memory overrides `tokens_per_step`, `reset`, `prefill` and `act`.
    """

    @property
    def tokens_per_step(self) -> int:
        """Tokens per timestep in the memory."""
        return 1

    def actions(self, context: Context) -> Float32[Array, "batch time action"]:
        """Return the action at every step, given the context up to that step."""
        raise NotImplementedError

    def reset(self, batch: int, capacity: int, dtype: jnp.dtype | None = None) -> Any:
        """Return an empty memory for `batch` contexts of `capacity` tokens. dtype: by default the computation's."""
        return None

    def prefill(self, context: Context, dtype: jnp.dtype | None = None) -> Any:
        """Return the memory of one context (1, T, ...) in time order, the shared prefix of a batch of contexts."""
        return None

    def act(
        self, previous: Context | None, current: Context, memory: Any, prefix: Any = None
    ) -> tuple[Float32[Array, "batch action"], Any]:
        """Return the action of the next step and the new memory.

        `actions` returns the same action for the prefix and all steps so far.

        Args:
          previous: finished previous step, or None if the memory is empty (a prefix needs no previous step).
          current: step to act in. Its action, reward and completion are not used.
          memory: result of `reset` or of the previous call.
          prefix: result of `prefill`.
        """
        return self.actions(current)[:, -1], memory
