"""Token sets: the tokens of a timestep.

    at5    R s a r d     return-to-go, state, action, reward, completion (Agentic Transformer, 2305.16554)
    ring4  R s a r       (experiment of Ring Attention, 2310.01889)
    dt3    R s a         (Decision Transformer, 2106.01345)
    fused1 one token     R and s of this step with a, r and d of the previous step

The action of a step is predicted at its state token, the last token known before acting. The tokens of a timestep are
therefore either known before the action or known after it. Cached decoding appends in one call the tokens after the
previous action and the tokens before the current one.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from ringrl.config import ModelConfig
from ringrl.context import Context, Outcome


@dataclasses.dataclass(frozen=True)
class TokenSet:
    """Kinds of tokens of a timestep, in order: known before the action, and known after it."""

    before: tuple[str, ...]
    after: tuple[str, ...]

    @property
    def size(self) -> int:
        """Tokens per timestep."""
        return len(self.before) + len(self.after)


TOKEN_SETS = {
    "at5": TokenSet(("return_to_go", "observation"), ("action", "reward", "completion")),
    "ring4": TokenSet(("return_to_go", "observation"), ("action", "reward")),
    "dt3": TokenSet(("return_to_go", "observation"), ("action",)),
    "fused1": TokenSet(("fused",), ()),
}


def _features(step: Context | Outcome, kind: str) -> jax.Array:
    """Return the features (B, T, features) of one kind of token."""
    x = jnp.asarray(getattr(step, kind))
    return x[..., None] if x.ndim == 2 else x


class TokenEmbedding(nnx.Module):
    """Embedding of timesteps as tokens of the model's width.

    Timesteps and trajectories beyond the last embedding share the last embedding.
    """

    MAX_TIMESTEPS, MAX_TRAJECTORIES = 1024, 1024

    def __init__(self, config: ModelConfig, observation_size: int, action_size: int, rngs: nnx.Rngs) -> None:
        self.token_set = TOKEN_SETS[config.token_set]
        hides = {"action": config.past_actions == "off", "reward": config.past_rewards == "off"}
        self.hidden = tuple(kind for kind, is_hidden in hides.items() if is_hidden)
        sizes = {"observation": observation_size, "action": action_size}
        sizes |= {"return_to_go": 1, "reward": 1, "completion": 1}
        sizes["fused"] = sum(sizes.values())
        dtype = jnp.dtype(config.dtype)
        self.linear = nnx.Dict()
        for kind in self.token_set.before + self.token_set.after:
            # Without a bias, the norm of a token made from a single number would keep only the sign of the number.
            bias = nnx.initializers.zeros if kind == "fused" else nnx.initializers.normal(sizes[kind] ** -0.5)
            self.linear[kind] = nnx.Linear(sizes[kind], config.width, dtype=dtype, bias_init=bias, rngs=rngs)
        embed = lambda number: nnx.Embed(number, config.width, dtype=dtype, rngs=rngs)  # noqa: E731
        self.timestep = embed(self.MAX_TIMESTEPS) if config.timestep_embedding else None
        self.trajectory = embed(self.MAX_TRAJECTORIES) if config.trajectory_embedding else None

    def __call__(self, context: Context) -> Float[jax.Array, "batch tokens width"]:
        """Return all tokens of a context, (B, T * size, W)."""
        tokens = jnp.concatenate([self._before(context), self._after(context)], axis=2)
        return tokens.reshape(tokens.shape[0], -1, tokens.shape[-1])

    def decode(self, previous: Context | None, current: Context) -> Float[jax.Array, "batch new_tokens width"]:
        """Return the tokens that a new step adds: those after the previous action, then those before the action.

        Both arguments hold a single timestep. `previous` is None at the first step. The action, reward and completion
        of `current` are not used.
        """
        before = self._before(current)
        if previous is None:
            return before[:, 0]
        return jnp.concatenate([self._after(previous), before], axis=2)[:, 0]

    def _before(self, step: Context) -> jax.Array:
        if self.token_set.before == ("fused",):
            parts = [_features(step, kind) for kind in ("return_to_go", "observation")]
            parts += [self._outcome(step.previous, kind) for kind in Outcome._fields]
            tokens = [self.linear["fused"](jnp.concatenate(parts, axis=-1))]
        else:
            tokens = [self.linear[kind](_features(step, kind)) for kind in self.token_set.before]
        return self._place(jnp.stack(tokens, axis=2), step)

    def _after(self, step: Context) -> jax.Array:
        tokens = [self.linear[kind](self._outcome(step, kind)) for kind in self.token_set.after]
        if not tokens:
            batch, time = step.reward.shape
            width = next(iter(self.linear.values())).out_features
            return jnp.zeros((batch, time, 0, width), jnp.float32)
        return self._place(jnp.stack(tokens, axis=2), step)

    def _outcome(self, step: Context | Outcome, kind: str) -> jax.Array:
        features = _features(step, kind)
        return jnp.zeros_like(features) if kind in self.hidden else features

    def _place(self, tokens: jax.Array, step: Context) -> jax.Array:
        """Add the embeddings of timestep and trajectory, if they are configured."""
        if self.timestep is not None:
            tokens += self.timestep(jnp.minimum(step.timestep, self.MAX_TIMESTEPS - 1))[:, :, None]
        if self.trajectory is not None:
            tokens += self.trajectory(jnp.minimum(step.trajectory, self.MAX_TRAJECTORIES - 1))[:, :, None]
        return tokens
