"""A pre-norm transformer with rotary positions and grouped-query heads, over whole contexts or token by token."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from ringrl.attention import append_to_cache, attention, decode_attention
from ringrl.config import ModelConfig
from ringrl.model.cache import KVCache, empty_cache

ROTARY_BASE = 10_000.0


def rotate(
    x: Float[Array, "batch tokens heads head_dim"], positions: Int32[Array, "*batch tokens"]
) -> Float[Array, "batch tokens heads head_dim"]:
    """Rotary position embedding (RoFormer, 2104.09864): halves of the head turn by position * base^(-2i/D)."""
    half = x.shape[-1] // 2
    frequency = ROTARY_BASE ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None, None].astype(jnp.float32) * frequency  # (..., tokens, 1, half)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class Attention(nnx.Module):
    """Causal self-attention."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.heads, self.kv_heads = config.heads, config.kv_heads
        self.head_dim = config.width // config.heads
        dtype = jnp.dtype(config.dtype)
        features = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.qkv = nnx.Linear(config.width, features, use_bias=False, dtype=dtype, rngs=rngs)
        self.out = nnx.Linear(config.width, config.width, use_bias=False, dtype=dtype, rngs=rngs)

    def _project(self, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        qkv = self.qkv(x).reshape(*x.shape[:2], -1, self.head_dim)
        q, k, v = jnp.split(qkv, (self.heads, self.heads + self.kv_heads), axis=2)
        return rotate(q, positions), rotate(k, positions), v

    def __call__(self, x: jax.Array, positions: jax.Array | None = None) -> jax.Array:
        q, k, v = self._project(x, jnp.arange(x.shape[1]) if positions is None else positions)
        return self.out(attention(q, k, v, is_causal=True, positions=positions).reshape(x.shape))

    def decode(
        self, x: jax.Array, keys: jax.Array, values: jax.Array, length: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Attend from new tokens to the cache and themselves; returns the output and the longer cache."""
        q, k, v = self._project(x, length + jnp.arange(x.shape[1]))
        keys, values = append_to_cache(keys, k, length), append_to_cache(values, v, length)
        o = decode_attention(q, keys.astype(q.dtype), values.astype(q.dtype), length=length + x.shape[1])
        return self.out(o.reshape(x.shape)), keys, values


class FeedForward(nnx.Module):
    """Two linear maps with a GELU between."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        dtype = jnp.dtype(config.dtype)
        hidden = config.feed_forward * config.width
        self.up = nnx.Linear(config.width, hidden, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(hidden, config.width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.gelu(self.up(x)))


class Block(nnx.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)); the sums stay in float32."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.attention_norm = nnx.RMSNorm(config.width, rngs=rngs)
        self.attention = Attention(config, rngs)
        self.feed_forward_norm = nnx.RMSNorm(config.width, rngs=rngs)
        self.feed_forward = FeedForward(config, rngs)

    def __call__(self, x: jax.Array, positions: jax.Array | None = None) -> jax.Array:
        x = x + self.attention(self.attention_norm(x), positions)
        return x + self.feed_forward(self.feed_forward_norm(x))

    def decode(
        self, x: jax.Array, keys: jax.Array, values: jax.Array, length: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """As __call__, for new tokens behind a cache."""
        y, keys, values = self.attention.decode(self.attention_norm(x), keys, values, length)
        x = x + y
        return x + self.feed_forward(self.feed_forward_norm(x)), keys, values


class Transformer(nnx.Module):
    """Blocks and a final norm: (B, S, W) -> (B, S, W), causal, rotary on the token's index in the context."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.blocks = nnx.List([Block(config, rngs) for _ in range(config.layers)])
        self.norm = nnx.RMSNorm(config.width, rngs=rngs)
        self.dtype = jnp.dtype(config.dtype)

    def __call__(
        self, x: Float[Array, "batch tokens width"], positions: Int32[Array, "batch tokens"] | None = None
    ) -> Float[Array, "batch tokens width"]:
        """All tokens of a context; they may lie in any order if their positions in it are given."""
        x = x.astype(jnp.float32)
        for block in self.blocks:
            x = block(x, positions)
        return self.norm(x)

    def empty_cache(self, batch: int, capacity: int) -> KVCache:
        """A cache for `batch` contexts of up to `capacity` tokens."""
        layer = self.blocks[0].attention
        return empty_cache(len(self.blocks), (batch, capacity, layer.kv_heads, layer.head_dim), self.dtype)

    def decode(
        self, x: Float[Array, "batch new_tokens width"], cache: KVCache
    ) -> tuple[Float[Array, "batch new_tokens width"], KVCache]:
        """As __call__ on the whole context, for its newest tokens only."""
        x = x.astype(jnp.float32)
        all_keys, all_values = [], []
        for block, keys, values in zip(self.blocks, cache.keys, cache.values, strict=True):
            x, keys, values = block.decode(x, keys, values, cache.length)
            all_keys.append(keys)
            all_values.append(values)
        return self.norm(x), KVCache(tuple(all_keys), tuple(all_values), cache.length + x.shape[1])
