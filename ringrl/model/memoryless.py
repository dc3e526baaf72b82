"""What policies have in common that act from the present observation alone."""

import jax.numpy as jnp
from jaxtyping import Array, Float32

from ringrl.context import Context


class Memoryless:
    """Step by step, such a policy does what its `actions(context)` says of that step; memory is None."""

    tokens_per_step = 1

    def actions(self, context: Context) -> Float32[Array, "batch time action"]:
        """The action at every step."""
        raise NotImplementedError

    def reset(self, batch: int, capacity: int, dtype: jnp.dtype | None = None) -> None:
        """There is nothing to remember."""

    def prefill(self, context: Context, dtype: jnp.dtype | None = None) -> None:
        """There is nothing to remember."""

    def act(
        self, previous: Context | None, current: Context, memory: None, prefix: None = None
    ) -> tuple[Float32[Array, "batch action"], None]:
        """The action of one more step."""
        return self.actions(current)[:, -1], memory
