"""Time of masks that hide most of the keys, and the share of tiles that they leave visible, on a CPU.

    python benchmarks/attention_masks.py [--tokens 16384] [--rounds 5] [--json FILE]

B1 H4 D64 float32, forward and backward pass on one device. Hidden tiles are skipped, so that the time should be
proportional to the visible tiles. The last column is the time for each visible tile, relative to the causal mask in the
same round. All masks run in turn, and numbers are medians over the rounds.
"""

import statistics
from collections.abc import Sequence
from functools import partial

from common import make_parser, median_seconds, positive, save_json

HEADS, HEAD_DIM = 4, 64


def masks(tokens: int) -> dict[str, dict]:
    """Return the arguments of `attention` for each mask."""
    import jax.numpy as jnp

    found: dict[str, dict] = {"causal": {}, "full": {"is_causal": False}}
    found |= {f"window {n}": {"local_window_size": (n, 0)} for n in (4096, 1024, 128) if n < tokens}
    place = jnp.arange(tokens)
    found |= {f"{n} segments": {"segment_ids": place * n // tokens} for n in (2, 8, 32)}
    start = place * 8 // tokens * (tokens // 8)
    found["window 20, 8 documents"] = {"local_window_size": (20, 0), "global_prefix": start}
    return found | {"causal, autodiff": {"implementation": "autodiff"}}


def visible_shares(tokens: int, mask: dict) -> tuple[float, float]:
    """Return the share of all pairs that are visible, and of all tiles of the XLA kernel."""
    import jax.numpy as jnp

    from ringrl.attention.kernels.tuning import xla_blocks
    from ringrl.attention.mask import PADDING_KEY, PADDING_QUERY, Rule, Side, classify_pairs, tile_side, visible

    place = jnp.arange(tokens, dtype=jnp.int32)
    keys = Side(place, mask.get("segment_ids", jnp.zeros_like(place)))
    queries = keys._replace(prefix=mask.get("global_prefix"))
    rule, blocks = Rule(mask.get("is_causal", True), mask.get("local_window_size")), xla_blocks(HEADS, tokens, tokens)
    pairs = sum(
        int(visible(rule, Side(*(None if x is None else x[i : i + 256] for x in queries)), keys).sum())
        for i in range(0, tokens, 256)
    )
    tiles = [
        tile_side(Side(*(None if x is None else x[None] for x in side)), size, padding)
        for side, size, padding in ((queries, blocks.queries, PADDING_QUERY), (keys, blocks.keys, PADDING_KEY))
    ]
    tiles = [Side(*(None if x is None else x[0] for x in side)) for side in tiles]
    return pairs / tokens**2, float(classify_pairs(rule, *tiles).any_visible.mean())


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all masks and print a table."""
    import jax
    import jax.numpy as jnp

    from ringrl.attention import attention

    parser = make_parser(__doc__)
    parser.add_argument("--tokens", type=positive, default=16_384)
    parser.add_argument("--rounds", type=positive, default=5)
    options = parser.parse_args(arguments)
    q, k, v, do = (
        jax.random.normal(key, (1, options.tokens, HEADS, HEAD_DIM)) for key in jax.random.split(jax.random.key(0), 4)
    )
    chosen = masks(options.tokens)
    shares = {name: visible_shares(options.tokens, mask) for name, mask in chosen.items()}
    runs = {
        name: jax.jit(
            jax.grad(partial(lambda mask, q, k, v: jnp.vdot(attention(q, k, v, **mask), do), mask), (0, 1, 2))
        )
        for name, mask in chosen.items()
    }
    rounds = [
        {name: median_seconds(lambda run=run: jax.block_until_ready(run(q, k, v)), 1) for name, run in runs.items()}
        for _ in range(options.rounds)
    ]
    results = {}
    print(f"{'':<24}{'pairs':>8}{'tiles':>8}{'seconds':>10}{'per tile':>10}")
    for name, (pairs, tiles) in shares.items():
        relative = [one[name] / tiles / (one["causal"] / shares["causal"][1]) for one in rounds]
        results[name] = {
            "pairs": pairs, "tiles": tiles, "seconds": [one[name] for one in rounds],
            "per_tile": statistics.median(relative),
        }  # fmt: skip
        seconds = statistics.median(results[name]["seconds"])
        print(f"{name:<24}{pairs:>8.1%}{tiles:>8.1%}{seconds:>10.3f}{results[name]['per_tile']:>10.2f}")
    save_json(results, options.json)


if __name__ == "__main__":
    main()
