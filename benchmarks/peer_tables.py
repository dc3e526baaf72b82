"""Cases of the attention tests of other libraries, as parameters: facts for peer_cases.py.

A case is a dict with these keys; DEFAULTS has the others. b, q, k: contexts, queries, keys. h, kv: heads of queries and
of keys. d, dv: widths of keys and of values. segments, places: see `segments_of` and `integers_of` in peer_cases.py.
ring: (devices, layout, strategy). axes: devices that share the contexts and the heads. rejected: the reason.

Left out are cases that only check shapes, errors, dropout, compiled text or mask arrays, cases that the tests skip, and
tests that draw all parameters, except splash attention's: DRAWS for each of its combinations, from the same ranges.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

Case = dict[str, Any]
Cases = Iterator[tuple[Case, int]]  # with the number of cases that are this call

DRAWS = 4
ENDLESS = 2**20  # width of a window
DEFAULTS: Case = {
    "b": 1, "k": None, "kv": None, "dv": None, "dtype": "float32", "causal": False, "window": None, "places": None,
    "segments": None, "q_lengths": None, "k_lengths": None, "scale": None, "cap": None, "sinks": None, "vmap": None,
    "decode": False, "ring": None, "axes": (1, 1), "explicit": False,
}  # fmt: skip
HALF, BOTH, EITHER = ["float16", "bfloat16"], ["float32", "bfloat16"], [True, False]
CAUSAL: Case = {"causal": True}
FIRST: Case = {"places": ("offset", 0)}  # queries at the first positions, if they are fewer than the keys


def grid(times: int = 1, **axes: Any) -> Cases:
    """Yield each combination of the axes that are lists. A value that is a dict sets several parameters."""
    lists = [[{name: x} if not isinstance(x, dict) else x for x in _as_list(axis)] for name, axis in axes.items()]
    for combination in itertools.product(*lists):
        yield {name: x for part in combination for name, x in part.items()}, times


def _as_list(axis: Any) -> list[Any]:
    return axis if isinstance(axis, list) else [axis]


def packed(*lengths: int, used: tuple[int, ...] | None = None) -> Case:
    """Return segments of these lengths, of which the queries see only the first keys."""
    return {"segments": ("packed", lengths, lengths, lengths, used or lengths)}


def flash_attn_jax() -> Cases:
    """nshepperd/flash_attn_jax: tests/test_flash.py, test_varlen.py, test_sharding.py, test_ring.py."""
    heads = [{"h": h * m, "kv": h} for h in (1, 4, 8) for m in (1, 2)]
    masks = {"causal": EITHER, "window": [(3, 3), None], "dtype": HALF}
    yield from grid(q=[97, 128], d=[59, 32], **masks, heads=heads[:4])
    yield from grid(q=[97, 128], d=[59, 32, 40], **masks, heads=heads)  # gradients
    yield from grid(2, b=4, q=[97, 128], d=[59, 32], **masks, h=[1, 4], vmap=["all", "queries"])
    for lengths in ((1, 2, 6, 10), (1, 2, 4, 6, 8, 10)):
        shape = {"q": sum(lengths), "d": [59, 32], "heads": heads[:4]}
        yield from grid(**shape, **masks, mask=packed(*lengths))
        yield from grid(**shape, dtype=HALF, mask=packed(*lengths, used=tuple(min(n, 4) for n in lengths)))
    ring = {"q": 128, "d": 32, "ring": (4, "contiguous", "ring")}
    yield from grid(2, b=4, **ring, **masks, heads=heads[2:])
    yield from grid(2, **ring, causal=EITHER, heads=heads[2:4])


def jax_nn() -> Cases:
    """jax-ml/jax: tests/nn_test.py."""
    yield from grid(2, **_dot_product_attention(32))  # two kernels
    yield from _dot_product_masks(128, 32)


def _dot_product_attention(d: int) -> Case:
    return {"b": 2, "q": 128, "h": 4, "kv": [4, 2, 1], "d": d, "dtype": HALF, "vmap": [None, "all"]}


def _dot_product_masks(q: int, d: int) -> Cases:
    padding = {"q_lengths": (q // 2, q // 4), "k_lengths": (q // 4, q // 2)}
    shape = {"b": 2, "q": q, "h": 4, "d": d, "dtype": "bfloat16"}
    yield from grid(**shape, mask=[CAUSAL, padding, CAUSAL | padding, CAUSAL | {"window": (3, 2)}])
    yield from grid(**shape, rejected=["bias", "bias", "mask", "mask"])  # alone, with causal and padding masks
    yield from grid(4, **shape, rejected="bias")  # gradient of the bias


def splash() -> Cases:
    """jax-ml/jax: tests/pallas/tpu_splash_attention_kernel_test.py, tpu_splash_attention_kernel_sharded_test.py."""
    random = np.random.default_rng(0)
    for number in range(50 * DRAWS):  # 24 combinations with one key head and 24 without, 2 of the reference
        yield _drawn_splash(random, heads=1 if number < 2 * DRAWS else 0, is_segmented=number % 2 == 1), 1
    yield {"q": 256, "h": 1, "d": 128, "window": (0, 0), "scale": 1.0}, 1
    yield {"rejected": "mask by head"}, 2 * (10 + 12 + 6)  # 2, 4 and 16 heads, over several meshes


def _drawn_splash(random: np.random.Generator, heads: int, *, is_segmented: bool) -> Case:
    """Return a drawn case. Each head has a mask of its own."""
    if (heads or random.choice([1, 2, 4, 8, 6])) > 1:
        return {"rejected": "mask by head"}
    q, k = (int(n) for n in random.choice([1024, 2048, 4096], 2))
    k = q if is_segmented else k
    kind = random.choice(["causal", "full", "any", *(["local"] if q == k else [])])
    case: Case = {
        "q": q,
        "k": k,
        "h": 1,
        "d": int(random.choice([128, 256])),
        "scale": 1.0,
        "causal": kind == "causal",
    } | FIRST
    case["dtype"] = "float32" if q == k == 4096 else str(random.choice(BOTH))
    case["cap"] = float(random.uniform(1, 50)) if random.integers(2) else None
    if is_segmented:
        cuts = np.sort(random.choice(np.arange(2, q - 1), random.integers(1, 5), replace=False))
        case |= packed(*np.diff([0, *cuts, q]).tolist())
    if kind == "local":  # together with the diagonal
        left, right = (ENDLESS if random.integers(2) else int(random.integers(q + 1)) for _ in range(2))
        offset = int(random.integers(-q, q))
        case |= {"window": (left, right), "places": ("offset", offset)}
        kind = "any" if not -right <= offset <= left else kind
    return {"rejected": "mask"} if kind == "any" else case


def ragged() -> Cases:
    """jax-ml/jax: tests/pallas/tpu_ragged_paged_attention_test.py. The pages of a context are gathered first."""
    keys = (18, 129, 597, 122, 64, 322, 463, 181, 1107, 123, 31, 18, 1229, 229, 87, 1328)
    prefill = (5, 15, 120, 100, 21, 32, 251, 40, 64, 99, 10, 5, 3, 120, 9, 2)
    mixed = (5, 1, 120, 1, 1, 32, 251, 1, 1, 99, 1, 5, 3, 117, 1, 1)
    basic, one = _ends((192, 128, 64), (328, 180, 255)), _ends((1,) * 16, keys) | {"decode": True}
    contexts = [basic, one, _ends(prefill, keys), _ends(mixed, keys)]
    yield from grid(d=128, scale=1.0, h=32, kv=8, dtype=BOTH, contexts=contexts)
    yield {"rejected": "float8_e5m2"}, 4
    drawn = {}
    for n in (1, 2, 5, 16):
        random = np.random.default_rng(1234)
        queries = random.integers(1, 100, n)
        drawn[n] = _ends(tuple(queries.tolist()), tuple((queries + random.integers(0, 50, n)).tolist()))
    heads = [{"h": h, "kv": kv} for h, kv in ((32, 8), (32, 16), (16, 2), (4, 4), (8, 1))]
    # Each with four sizes of blocks.
    yield from grid(4, d=128, scale=1.0, heads=heads, dtype=BOTH, contexts=[drawn[1], drawn[5], drawn[16]])
    yield from grid(4, d=128, scale=1.0, h=4, contexts=drawn[5], window=[None, (4, 0), (127, 0)])
    yield from grid(4, d=128, scale=1.0, h=16, kv=2, contexts=drawn[2], cap=[None, 50.0])


def _ends(queries: tuple[int, ...], keys: tuple[int, ...]) -> Case:
    """Return contexts of these lengths, of which the queries are the last tokens."""
    sizes = {"b": len(keys), "q": max(queries), "k": max(keys), "q_lengths": queries, "k_lengths": keys}
    return sizes | CAUSAL | {"places": ("end",)}


def flax() -> Cases:
    """google/flax: tests/nnx/nn/attention_test.py, tests/nnx/nn/gqa_test.py, tests/linen/linen_attention_test.py."""
    # With and without biases, two dtypes of parameters, three precisions, normalised queries and keys or not.
    decode = [{}, _ends((1,), (1,)) | {"decode": True}]
    yield from grid(2 * 2 * 3 * 2, q=1, h=2, d=3, dtype=["float32", "float16"], kind=decode)
    yield {"b": 2, "q": 8, "h": 4, "kv": 2, "d": 16}, 1
    yield from grid(h=3, d=4, decode=True, contexts=[_ends((1,) * b, (5,) * b) for b in (2, 12)])
    yield {"q": 10, "h": 1, "d": 1, "causal": True}, 1
    yield {"q": 3, "k": 9, "h": 8, "d": 2}, 3
    yield {"b": 8, "q": 3, "h": 8, "d": 2}, 1


def tokamax() -> Cases:
    """openxla/tokamax: tokamax/_src/ops/attention/api_test.py and test_base.py, once for all kernels.

    Without the case of NaN in hidden values, which must be finite here.
    """
    yield from grid(**_dot_product_attention(64))
    yield from _dot_product_masks(256, 64)
    yield {"rejected": "mask"}, 1  # with the causal mask
    base: Case = {"b": 2, "q": 1024, "h": 4, "d": 64}
    yield from grid(**base, dtype=["float32", *HALF, *HALF])  # logits of half precision, too
    yield from grid(**base | {"d": [24, 128]}, dv=[64, 112])
    others = [{"k": 1536}, {"kv": 1}, {"h": 16, "kv": 4}, {"b": 1}, {"b": 24}, {"d": 48}, CAUSAL, {"cap": 10.0}]
    others += [{"k": 512}, *(CAUSAL | FIRST | {"k": k} for k in (512, 539))]  # a part that the test merges; others
    others += [CAUSAL | {"window": (127, 0)}, {"q_lengths": (456, 987), "k_lengths": (123, 999)}]
    yield from grid(**base, other=others)
    yield from grid(**base | {"q": 512}, causal=True, places=[("permuted", "q"), ("permuted", "k")])
    yield base | {"q": 512, "places": ("permuted", "q"), "segments": ("between", 42, 298, 0, 512)}, 1
    yield from grid(**base, mask=_tokamax_masks())
    reasons = ["bias", "bias", "bias", "bias", "mask", "dropout", "unnormalised output", "int8", "int8", "int4", "int4"]
    yield from grid(rejected=reasons)
    yield CAUSAL | {"b": 32, "q": 4096, "h": 32, "kv": 8, "d": 128, "dtype": "bfloat16"}, 1
    yield CAUSAL | {"b": 512, "q": 1024, "h": 16, "d": 192, "dv": 128, "dtype": "bfloat16"}, 1
    yield from _tokamax_partitioned()


def _tokamax_masks() -> list[Case]:
    """Return masks that are given by the first and last keys of each query, or queries of each key."""
    later: Case = {"window": (0, ENDLESS)}
    back, centre = {"places": ("reversed keys",)}, {"places": ("from the centre",)}
    ranges = [(0, 1024, 512, 1024), (0, 1024, 0, 513), (0, 1024, 256, 769), (128, 1024, 0, 1024), (0, 896, 0, 1024)]
    found = [CAUSAL, CAUSAL, later, CAUSAL, CAUSAL | back, later, later | back, CAUSAL | centre, later | centre]
    found += [CAUSAL | {"segments": ("between", *x)} for x in ranges]
    found += [later | {"segments": ("between", *x, 0, 1024)} for x in ((17, 1024), (0, 1007))]
    return [*found, {"segments": ("between", 0, 1024, 576, 1024)}, {"rejected": "mask by head"}]


def _tokamax_partitioned() -> Cases:
    shape: Case = {"b": 16, "q": 256, "h": 16, "d": 32}
    alone, gathered = (1, "contiguous", "ring"), [(n, "contiguous", "all_gather") for n in (2, 4, 8)]
    batch, heads = ({"ring": alone, "axes": axes} for axes in ((8, 1), (1, 8)))
    tokens = {"ring": gathered[2]}
    yield from grid(2, **shape, split=[batch, tokens, heads])  # two ways to write the sharding
    yield from grid(**shape, split=[batch, tokens, heads], causal=True)
    yield from grid(**shape, split=[{"axes": (2, 1), "ring": gathered[1]}, {"axes": (1, 4), "ring": gathered[0]}])
    local = {"window": (63, 0), "places": ("offset", 32), "segments": ("between", 0, 256, 32, 256)}
    yield from grid(**shape, split=[batch, heads, {"ring": alone, "axes": (2, 4)}], mask=local)
    yield from grid(**shape, kv=1, split=[batch, tokens, {"rejected": "key heads < devices"}])
    yield from (({"rejected": reason}, times) for reason, times in (("bias", 4 + 9), ("mask", 4), ("int8", 18)))


def maxtext() -> Cases:
    """AI-Hypercomputer/maxtext, tests/unit: attention_test.py, attention_load_balance_test, cp_halo_attention_test."""
    shape: Case = {"b": 4, "q": 512, "h": 16, "d": 128, "dtype": "bfloat16", "causal": True}
    yield shape | _ends((1, 1), (67, 67)) | {"k": 512, "decode": True}, 1 + 4 + 2  # and orders of the axes
    random = shape | {"segments": ("random", 4, 4)}
    yield from ((random | {"kv": kv}, times) for kv, times in ((16, 3), (8, 2), (1, 1)))  # also with values = keys
    yield from grid(**shape, window=[(7, 0), (511, 0)])
    layouts = ["contiguous", "zigzag"]
    rings = [{"ring": (n, x, "all_gather"), "axes": (4 // n, 1)} for n in (4, 2) for x in layouts]
    yield from grid(**random, ring=rings, explicit=EITHER, widths=[{}, {"d": 192, "dv": 128}])
    yield from grid(**shape, segments=packed(128, 128, 128, 128), ring=rings[:2])
    yield {"q": 32, "h": 16, "d": 24, "dv": 32, "causal": True}, 2
    yield {"rejected": "mask"}, 2 + 1  # of an indexer; of another kernel
    for q in (2048, 1024):
        two = {"b": 2, "q": q, "h": 4, "kv": 2, "d": 128, "segments": packed(q * 11 // 16, q * 5 // 16), "axes": (2, 1)}
        yield from grid(**two, causal=True, ring=[(4, x, "ring") for x in layouts])
    halo = {"b": 4, "q": 1024, "h": 4, "kv": 2, "d": 64, "causal": True, "window": (127, 0), "scale": 0.04}
    rings = [{"ring": (n, x, "ring"), "axes": (8 // n, 1)} for n in (2, 4) for x in layouts]
    yield from grid(**halo, ring=rings, mask=[{}, packed(300, 400, 324)])


def transformer_engine() -> Cases:
    """NVIDIA/TransformerEngine, tests/jax: test_fused_attn.py, test_fused_attn_score_mod, test_distributed_fused_attn.

    Distributed tests on 2 x 2 devices for contexts and heads, and on 4 for tokens. Other meshes are left out.
    """
    for b, q, k, h, kv, d, dv, dtype in (
        (2, 2048, 2048, 12, 12, 64, 64, "bfloat16"), (2, 2048, 1024, 12, 12, 64, 64, "bfloat16"),
        (2, 2048, 2048, 12, 6, 64, 64, "bfloat16"), (4, 128, 128, 16, 16, 64, 64, "float16"),
        (4, 128, 128, 16, 16, 64, 32, "float16"), (2, 2048, 1024, 12, 12, 64, 32, "bfloat16"),
        (2, 2048, 2048, 12, 6, 128, 64, "float16"),
    ):  # fmt: skip
        packings = 1 + (d == dv) + (d == dv and q == k and h == kv)
        shape = {"b": b, "q": q, "k": k, "h": h, "kv": kv, "d": d, "dv": dv, "dtype": dtype, "causal": EITHER}
        shape["window"] = [None, (k // 10, 0)] if q <= k else None
        dense, padded = (
            shape | {"places": ("offset", 0), "lengths": [{}, _used(b, q, k)]},
            shape | {"mask": _padded(2, q, k)},
        )
        # Three ways to describe lengths, two for packed sequences.
        for masks, times in ((dense, 3 * packings), (padded, 2 * packings)):
            yield from grid(times, **masks, kind=[{}, {"rejected": "bias"}])
    cap: Case = {"q": 16, "h": 2, "d": 64, "cap": 0.8, "dtype": "float16"}
    split: Case = {"ring": (1, "contiguous", "ring"), "axes": (2, 2), "dtype": "bfloat16"}
    yield from ((case, 1) for case in (cap, cap | split | {"b": 4, "h": 4}))
    yield {"q": 64, "h": 2, "d": 128, "dtype": "float16", "causal": True}, 1
    yield {"rejected": "bias"}, 1 + 2 * 12  # of two kinds, in the self-attention of the next lines
    for q, h, d in ((1024, 16, 128), (512, 12, 64), (512, 16, 64), (128, 12, 64)):
        sinks = [None, "zero", "learned"]
        yield from grid(**split, b=2, q=q, h=h, d=d, sinks=sinks, mask=[_used(2, q, q), CAUSAL])
    yield from _transformer_engine_rings()


def _used(b: int, q: int, k: int) -> Case:
    """Return lengths without the last 30 % of the tokens."""
    return {f"{name}_lengths": (n - int(n * 0.3),) * b for name, n in (("q", q), ("k", k))}


def _padded(segments: int, q: int, k: int | None = None) -> Case:
    """Return segments of random lengths, with padding in each. Keys of another length have their own."""
    random, drawn = np.random.default_rng(42), []
    for tokens in (q, k or q) if (k or q) != q else (q,):
        lengths = random.integers(1, tokens // segments + 1, segments)
        drawn += [tuple(lengths.tolist()), tuple(random.integers(1, lengths + 1).tolist())]
    return {"segments": ("packed", *drawn[:2], *drawn[-2:])}


def _transformer_engine_rings() -> Cases:
    """Contexts of 8 times 128 or 256 tokens, over four devices."""
    sizes = [{"b": 2, "q": q, "h": h, "d": d, "dtype": "bfloat16"} for q, h, d in ((1024, 8, 128), (2048, 16, 64))]
    shapes = [size | {"kv": size["h"] // groups} for size in sizes for groups in (1, 8)]
    for strategy, times in (("all_gather", 2), ("ring", 2 * 2)):  # two packings; and two kinds of loops
        rings = [(4, layout, strategy) for layout in ("zigzag", "contiguous")]
        yield from grid(times, shape=shapes, causal=EITHER, ring=rings)
    ring, gathered = ((4, "striped", strategy) for strategy in ("ring", "all_gather"))
    for shape in shapes:
        two = shape | CAUSAL | _padded(2, shape["q"])
        yield from ((two | {"ring": ring, "window": window}, times) for window, times in ((None, 2), ((20, 0), 1)))
    five, window = CAUSAL | _padded(5, 1024), [None, (20, 0)]
    yield from grid(2, shape=shapes[:2], mask=five, window=[None, (5, 0)], ring=[gathered])  # two widths of stripes
    wide: Case = {"b": 2, "q": 1024, "h": 16, "d": 256}
    yield from grid(
        2,
        **wide,
        causal=True,
        kind=[{"dtype": x} for x in HALF],
        ring=[(4, "zigzag", x) for x in ("ring", "all_gather")],
    )
    yield from grid(2, **wide, mask=CAUSAL | _padded(2, 1024), window=window, ring=[ring], dtype=HALF)
    yield from grid(2, **wide, mask=five, window=window, ring=[gathered], dtype=HALF)
    small: Case = {"b": 2, "q": 512, "h": 8, "d": 64, "dtype": "bfloat16", "causal": True, "explicit": True}
    yield from grid(**small, kv=4, ring=[(2, "zigzag", x) for x in ("ring", "all_gather")])
    striped = [{"ring": (2, "striped", "all_gather"), "window": (20, 0)}, {"ring": (2, "striped", "ring")}]
    yield from grid(**small, mask=_padded(5, 512), ring=striped)
    yield {"rejected": "largest logit"}, 4 * 2 * 3 + 4 + 2 + 1 + 1


def pytorch() -> Cases:
    """pytorch/pytorch: test/distributed/tensor/test_attention.py, on four and on two devices."""
    shape: Case = {"b": 8, "q": 4096, "h": 8, "d": 32}
    # Compiled or not, with or without gradients, two interfaces; and two kernels in half precision.
    for dtype, times in (("float32", 8), ("bfloat16", 16)):
        for causal, layout in ((True, "zigzag"), (True, "contiguous"), (False, "contiguous")):
            yield from grid(
                times, **shape, dtype=dtype, causal=causal, ring=[(4, layout, x) for x in ("ring", "all_gather")]
            )
    even, zigzag = ({"ring": (2, layout, "all_gather")} for layout in ("contiguous", "zigzag"))
    blocks = even | {"places": ("blocks",)}
    for q in (512, 2048):
        yield from grid(**shape | CAUSAL | {"q": q}, ring=[even, zigzag, blocks])
        cuts = np.sort(np.random.default_rng(10).choice(np.arange(1, q), 27, replace=False))
        documents = packed(*np.diff([0, *cuts, q]).tolist())
        yield from grid(
            3, **shape | CAUSAL | {"q": q}, mask=documents, ring=[even, zigzag, blocks, blocks]
        )  # 2, 4, 8 contexts


def ring_flash_attention() -> Cases:
    """zhuzilin/ring-flash-attention: test/test_*_func.py, on eight devices."""
    shape: Case = {"h": 5, "d": 128, "dtype": "bfloat16", "causal": True}
    odd, even = (120, 1128, 2984), (128, 1120, 2992)
    for q, lengths, layout in ((3816, odd, "contiguous"), (3824, even, "zigzag"), (3824, odd, "striped")):
        yield shape | {"q": q, "ring": (8, layout, "ring")}, 1
        yield shape | {"q": sum(lengths), "ring": (8, layout, "ring")} | packed(*lengths), 1
    yield shape | {"q": 4232, "d": 8, "ring": (8, "contiguous", "all_gather")} | packed(120, 1128, 2984), 1


def ring_attention_pytorch() -> Cases:
    """lucidrains/ring-attention-pytorch: assert*.py with the defaults, each mask and each layout, on eight devices.

    Tree decoding on one device.
    """
    shape: Case = {"b": 2, "q": 32, "h": 8, "q_lengths": (31, 31), "k_lengths": (31, 31)}  # padded to whole chunks
    yield shape | {"d": 8, "causal": True, "ring": (8, "contiguous", "ring")}, 1
    yield from grid(**shape, d=8, causal=EITHER, ring=[(8, layout, "ring") for layout in ("contiguous", "striped")])
    yield shape | {"d": 16, "kv": 2, "causal": True, "ring": (8, "zigzag", "all_gather")}, 1
    yield from grid(b=2, q=62, h=2, d=16, mask=[{}, CAUSAL, {"segments": ("random", 1, 2)}])
    decode = _ends((1,), (31,)) | {"k": 32, "decode": True}
    yield decode | {"h": 8, "d": 64, "dtype": "float16"}, 1


PEERS = {
    "flash_attn_jax": flash_attn_jax, "jax.nn": jax_nn, "JAX splash attention": splash,
    "JAX ragged paged attention": ragged, "Flax": flax, "tokamax": tokamax, "MaxText": maxtext,
    "TransformerEngine": transformer_engine, "PyTorch": pytorch, "ring-flash-attention": ring_flash_attention,
    "ring-attention-pytorch": ring_attention_pytorch,
}  # fmt: skip
