"""Pre-norm transformer with rotary positions and grouped-query attention, for contexts and cached decoding."""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int32

from ringrl.attention import Prefix, attention, ring_attention
from ringrl.config import SEQUENCE_AXIS, ModelConfig
from ringrl.model.cache import KVCache, append, as_prefix, attend, empty_cache
from ringrl.model.parallel import ONE_DEVICE, SPLIT, ULYSSES_AXIS, Parallel, split
from ringrl.model.tokens import TOKEN_SETS

Tokens = Float[Array, "batch tokens width"]
Heads = Float[Array, "batch tokens heads head_dim"]

ROTARY_BLOCK = 1024  # tokens
SAVED = "ring_attention"  # checkpoint_name of the attention outputs: remat "layers" keeps them, and repeats no ring


def rotate(x: Heads, positions: Int32[Array, "*batch tokens"], base: float = 10_000.0) -> Heads:
    """Apply rotary position embedding (RoFormer, 2104.09864): pair (i, i + D/2) turns by position * base^(-2i/D).

    Positions may be millions. Whole turns per 1,024 tokens are removed in float64 first, because the plain float32
    product is off by 0.03 at half a million.
    """
    half = x.shape[-1] // 2
    frequency = base ** (-np.arange(half) / half)
    many = np.asarray((frequency * ROTARY_BLOCK) % (2 * np.pi), np.float32)
    blocks, rest = (y[..., None, None].astype(jnp.float32) for y in jnp.divmod(positions, ROTARY_BLOCK))
    angle = blocks * many + rest * np.asarray(frequency, np.float32)  # (..., tokens, 1, half)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class Place(NamedTuple):
    """The places of tokens in their context."""

    positions: Int32[Array, "*batch tokens"]  # index of each token
    starts: Int32[Array, "*batch tokens"]  # index of the first token of its trajectory


@dataclasses.dataclass(frozen=True)
class EpisodeWindow:
    """The mask of a layer in which a token sees the last `steps` steps of its own trajectory and all earlier ones.

    A step has several tokens, and a window counts positions. With 2k - 1 positions for the k tokens of a step, one
    window covers the same whole steps for each of the k tokens:

        tokens of three steps (k = 3)     0 1 2 . . 5 6 7 . . 10 11 12
        window of two steps, 7 to the left      5 6 7 . . 10 11 12
    """

    steps: int | None
    tokens_per_step: int

    def position_of(self, token: jax.Array) -> jax.Array:
        """Return the position in the mask of a token of the context."""
        if self.steps is None:
            return token
        return token + token // self.tokens_per_step * (self.tokens_per_step - 1)

    def options(self, starts: jax.Array) -> dict[str, Any]:
        """Return the options of attention for queries whose trajectories begin at the tokens `starts`."""
        if self.steps is None:
            return {}
        left = (self.steps - 1) * (2 * self.tokens_per_step - 1) + self.tokens_per_step - 1 if self.steps else -1
        return {"local_window_size": (min(left, 2**31 - 1), 0), "global_prefix": self.position_of(starts)}


class Attention(nnx.Module):
    """Causal self-attention."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, parallel: Parallel = ONE_DEVICE) -> None:
        self.kv_heads, self.head_dim = config.kv_heads, config.width // config.heads
        self.kind, self.parallel, self.rotary_base = config.attention, parallel, config.rotary_base
        self.strategy = config.strategy if config.attention == "ring" else "all_gather"
        self.bidirectional = config.bidirectional
        linear = partial(nnx.LinearGeneral, use_bias=False, dtype=jnp.dtype(config.dtype), rngs=rngs)
        width, heads = config.width, (config.heads, self.head_dim)
        self.query = linear(width, heads, kernel_init=split("embed", "heads", None))
        key_value = (2, config.kv_heads, self.head_dim)
        self.key_value = linear(width, key_value, kernel_init=split("embed", None, "heads", None))
        self.out = linear(heads, width, axis=(-2, -1), kernel_init=split("heads", None, "embed"))

    def _project(self, x: Tokens, positions: jax.Array, time: str | None = "time") -> tuple[Heads, Heads, Heads]:
        keys, values = jnp.moveaxis(self.key_value(x), 2, 0)
        q, k = (rotate(y, positions, self.rotary_base) for y in (self.query(x), keys))
        q, k, v = (self.parallel.constrain(y, "batch", time, "heads", None) for y in (q, k, values))
        return q, k, v

    def __call__(self, x: Tokens, place: Place, window: EpisodeWindow) -> tuple[Tokens, tuple[Heads, Heads]]:
        """Return the output (B, S, W), and the keys and values."""
        q, k, v = self._project(x, place.positions)
        return self.out(self._attend(q, k, v, place, window)), (k, v)

    def _attend(self, q: jax.Array, k: jax.Array, v: jax.Array, place: Place, window: EpisodeWindow) -> jax.Array:
        if self.kind == "vanilla":
            return _vanilla(q, k, v, place, window)
        mesh, layout = self.parallel.mesh, self.parallel.layout
        positions, mask = window.position_of(place.positions), window.options(place.starts)
        if mesh is None:
            return attention(q, k, v, is_causal=True, positions=positions, **mask)
        if self.strategy == "ulysses_ring":
            mesh = self.parallel.mesh_of_groups()
        return ring_attention(
            q, k, v,
            mesh=mesh,
            axis_name=(SEQUENCE_AXIS, ULYSSES_AXIS) if self.strategy == "ulysses_ring" else SEQUENCE_AXIS,
            layout=layout,
            strategy=self.strategy,
            bidirectional=self.bidirectional,
            batch_axes=SPLIT["batch"],
            head_axes=SPLIT["heads"],
            is_causal=True,
            # The layout permutes steps, not tokens. Only "striped" then differs from the layout of tokens.
            positions=positions if layout == "striped" or mask else None,
            **mask,
        )  # fmt: skip

    def decode(
        self,
        x: jax.Array,
        keys: jax.Array,
        values: jax.Array,
        length: jax.Array,
        prefix: Prefix | None,
        starts: jax.Array,
        window: EpisodeWindow,
        *,
        only: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return the output of new tokens (or of the one at index `only`) that see all before, and the longer cache."""
        begin = length if prefix is None else prefix.length + length
        q, k, v = self._project(x, begin + jnp.arange(x.shape[1]), time=None)
        keys, values = append(keys, k, length, self.parallel), append(values, v, length, self.parallel)
        seen = length + x.shape[1]
        if only is not None:
            q, starts, seen = _token(q, only), _token(starts, only, axis=-1), length + only + 1
        mask = window.options(starts)
        o = attend(q, keys, values, seen, prefix, self.parallel, **mask, position_of=window.position_of)
        return self.out(o), keys, values


def _token(x: jax.Array, index: jax.Array, axis: int = 1) -> jax.Array:
    """Return one token of a sequence. The axis stays."""
    return jax.lax.dynamic_slice_in_dim(x, index, 1, axis)


def _vanilla(q: jax.Array, k: jax.Array, v: jax.Array, place: Place, window: EpisodeWindow) -> jax.Array:
    """Compute attention with a whole mask. A query without a visible key gives 0."""
    position, start = (x[..., None] for x in place)
    other = place.positions[..., None, :]
    seen = position >= other
    if window.steps is not None:
        step, other_step = (x // window.tokens_per_step for x in (position, other))
        seen &= (step - other_step < window.steps) | (other < start)
    seen = jnp.broadcast_to(seen, (q.shape[0], *seen.shape[-2:]))
    o = jax.nn.dot_product_attention(q, k, v, mask=seen[:, None])
    return jnp.where(seen.any(-1)[..., None, None], o, 0)


class FeedForward(nnx.Module):
    """Two linear layers with a GELU in between."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        linear = partial(nnx.Linear, dtype=jnp.dtype(config.dtype), rngs=rngs)
        hidden = config.feed_forward * config.width
        bias = partial(split, initialiser=nnx.initializers.zeros_init())
        self.up = linear(config.width, hidden, kernel_init=split("embed", "hidden"), bias_init=bias("hidden"))
        self.down = linear(hidden, config.width, kernel_init=split("hidden", "embed"), bias_init=bias("embed"))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.gelu(self.up(x)))


class TransformerBlock(nnx.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, parallel: Parallel = ONE_DEVICE) -> None:
        dtype = jnp.dtype(config.dtype)
        self.attention_norm = nnx.RMSNorm(config.width, dtype=dtype, rngs=rngs)
        self.attention = Attention(config, rngs, parallel)
        self.feed_forward_norm = nnx.RMSNorm(config.width, dtype=dtype, rngs=rngs)
        self.feed_forward = FeedForward(config, rngs)
        self.is_blockwise = config.attention in ("blockwise", "ring")
        self.block_tokens, self.parallel = config.block_tokens, parallel

    def __call__(self, x: Tokens, place: Place, window: EpisodeWindow) -> tuple[Tokens, tuple[Heads, Heads]]:
        """Return the output, and the keys and values of the attention."""
        y, keys_and_values = self.attention(self.attention_norm(x), place, window)
        x = self.parallel.constrain(x + y, "batch", "time", None)
        if self.is_blockwise:
            return _in_blocks(self._feed_forward, x, self.block_tokens, self.parallel), keys_and_values
        return self._feed_forward(x), keys_and_values

    def _feed_forward(self, x: jax.Array) -> jax.Array:
        return x + self.feed_forward(self.feed_forward_norm(x))

    def decode(
        self, x: jax.Array, *cache_and_mask: Any, only: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Apply the block to new tokens, see `Attention.decode`. Return the output and the longer cache."""
        y, keys, values = self.attention.decode(self.attention_norm(x), *cache_and_mask, only=only)
        x = x if only is None else _token(x, only)
        return self._feed_forward(x + y), keys, values


def _in_blocks(function: Callable[[jax.Array], jax.Array], x: Tokens, block: int, parallel: Parallel) -> Tokens:
    """Apply a token-wise function blockwise (Blockwise Parallel Transformer, 2305.19370).

    Intermediate arrays (for a feed-forward layer, four times the width) exist for one block only. The backward pass
    recomputes them block by block. Each device processes its own tokens, at most `block` at a time.
    """
    batch, tokens, features = x.shape
    devices = parallel.ring_size
    local = tokens // devices
    number = -(-local // block)
    if number == 1:
        return function(x)
    size = -(-local // number)
    x = jnp.pad(x.reshape(batch, devices, local, features), ((0, 0), (0, 0), (0, number * size - local), (0, 0)))
    blocks = jnp.moveaxis(x.reshape(batch, devices, number, size, features), 2, 0)
    blocks = parallel.constrain(blocks, None, "batch", "time", None, None)
    done = jax.lax.map(jax.checkpoint(function), blocks)
    done = jnp.moveaxis(done, 0, 2).reshape(batch, devices, number * size, -1)[:, :, :local]
    return parallel.constrain(done.reshape(batch, tokens, -1), "batch", "time", None)


class Transformer(nnx.Module):
    """Causal transformer blocks and a final norm, (B, S, W) -> (B, S, W), rotary on the token's index in the context.

    Each parameter of the blocks is one array with the layer as first axis, so that a scan compiles a single block.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, parallel: Parallel = ONE_DEVICE) -> None:
        self.layers, self.dtype, self.remat = config.layers, jnp.dtype(config.dtype), config.remat
        size = TOKEN_SETS[config.token_set].size
        self.windows = tuple(EpisodeWindow(steps, size) for steps in config.windows)
        self.cache_shape = (config.kv_heads, config.width // config.heads)
        make = nnx.vmap(
            lambda rngs: TransformerBlock(config, rngs, parallel), transform_metadata={nnx.PARTITION_NAME: "layers"}
        )
        self.blocks = make(rngs.split(config.layers))
        self.norm = nnx.RMSNorm(config.width, rngs=rngs)
        self.parallel = parallel

    def __call__(self, x: Tokens, place: Place | None = None) -> Tokens:
        """Return the features of all tokens (B, S, W) float32. Without `place`: one trajectory in order."""
        if place is None:
            place = Place(jnp.arange(x.shape[1], dtype=jnp.int32), jnp.zeros(x.shape[1], jnp.int32))
        x, _ = self._scan(x, place, "batch", lambda keys_and_values: None)
        return self.norm(x.astype(jnp.float32))

    def _scan(self, x: jax.Array, place: Place, batch: str | None, keep: Callable[..., Any]) -> tuple[jax.Array, Any]:
        """Apply all layers. Return the output, and `keep` of the keys and values of each layer."""
        graph, parameters = nnx.split(self.blocks)

        def layer(window: EpisodeWindow, x: jax.Array, parameters: nnx.State) -> tuple[jax.Array, Any]:
            x, keys_and_values = nnx.merge(graph, parameters)(x, place, window)
            return x, keep(keys_and_values)

        if self.remat != "none":
            policy = jax.checkpoint_policies.save_only_these_names(SAVED) if self.remat == "layers" else None
            layer = jax.checkpoint(layer, policy=policy, static_argnums=0)
        x, kept = self.parallel.constrain(x.astype(self.dtype), batch, "time", None), []
        for window, part in self._equal_windows(parameters):
            x, of_part = jax.lax.scan(partial(layer, window), x, part)
            kept.append(of_part)
        return x, kept[0] if len(kept) == 1 else jax.tree.map(lambda *parts: jnp.concatenate(parts), *kept)

    def _equal_windows(self, parameters: nnx.State) -> Iterator[tuple[EpisodeWindow, nnx.State]]:
        """Split the layers into runs with the same window, since a scan compiles one block."""
        if len(set(self.windows)) == 1:
            yield self.windows[0], parameters
            return
        for window, run in groupby(range(self.layers), key=self.windows.__getitem__):
            layers = np.array(list(run))
            yield window, jax.tree.map(lambda x, layers=layers: x[layers[0] : layers[-1] + 1], parameters)

    def empty_cache(self, batch: int, capacity: int) -> KVCache:
        """Return an empty cache for `batch` contexts of `capacity` tokens."""
        return empty_cache(self.layers, (batch, capacity, *self.cache_shape), self.dtype, self.parallel)

    def prefill(self, x: Float[Array, "1 tokens width"], place: Place, length: int) -> KVCache:
        """Return the cache of one whole context of `length` tokens, without the padding at the end: a shared prefix.

        On a mesh, `x` and `place` are in the order of its layout, which permutes whole timesteps.
        """
        in_time = jnp.argsort(place.positions.reshape(-1))
        keep = lambda held: [as_prefix(y[:, in_time], self.parallel) for y in held]  # noqa: E731
        _, held = self._scan(x, place, None, keep)
        keys, values = (tuple(y[index] for index in range(self.layers)) for y in held)
        return KVCache(keys, values, self.parallel.constrain(jnp.asarray(length, jnp.int32)))

    def decode(
        self,
        x: Tokens,
        cache: KVCache,
        prefix: KVCache | None = None,
        starts: Int32[Array, "*batch new_tokens"] | None = None,
        only: jax.Array | None = None,
    ) -> tuple[Tokens, KVCache]:
        """Return the features of the new tokens `x`, and the longer cache. `prefix` precedes the cached tokens.

        `starts` are those of `Place`, counted from the start of the prefix (default: 0). With `only`, the index of one
        new token, the features are (batch, 1, width), and the last layer has one query.
        """
        x, new = x.astype(self.dtype), x.shape[1]
        starts = jnp.zeros(new, jnp.int32) if starts is None else starts
        graph, parameters = nnx.split(self.blocks)
        held = []
        for index, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True)):
            block = nnx.merge(graph, jax.tree.map(lambda stacked, index=index: stacked[index], parameters))
            before = None if prefix is None else prefix.prefix(index)
            last = only if index == self.layers - 1 else None
            mask = before, starts, self.windows[index]
            x, *longer = block.decode(x, keys, values, cache.length, *mask, only=last)
            held.append(longer)
        all_keys, all_values = zip(*held, strict=True)
        return self.norm(x.astype(jnp.float32)), KVCache(all_keys, all_values, cache.length + new)
