"""Base of policies that act on the current observation only."""

import jax.numpy as jnp
from jaxtyping import Array, Float32

from ringrl.context import Context


class Memoryless:
    """Policy without memory: `act` returns the last action of `actions(context)`."""

    tokens_per_step = 1

    def actions(self, context: Context) -> Float32[Array, "batch time action"]:
        """Return the action at every step."""
        raise NotImplementedError

    def reset(self, batch: int, capacity: int, dtype: jnp.dtype | None = None) -> None:
        """Return None, the memory of this policy."""

    def prefill(self, context: Context, dtype: jnp.dtype | None = None) -> None:
        """Return None, the memory of this policy."""

    def act(
        self, previous: Context | None, current: Context, memory: None, prefix: None = None
    ) -> tuple[Float32[Array, "batch action"], None]:
        """Return the action of the current step."""
        return self.actions(current)[:, -1], memory
