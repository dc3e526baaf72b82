"""The cuDNN kernel on CPUs, where a stand-in computes JAX's cuDNN primitives (cudnn_on_cpu.py), against float64.

In most tests the XLA kernel gives NaN, so that they fail if a block of their masks is not left to cuDNN.
"""

import functools
import re
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax._src.cudnn import fused_attention_stablehlo as fused
from jax.sharding import Mesh

from ringrl.attention import attention, from_layout, kernels, ring_attention, to_layout
from ringrl.attention.contract import Cotangents, Inputs, Partial
from ringrl.attention.kernels import check, cudnn, xla
from ringrl.attention.mask import Options, Rule, Side
from tests.attention.cudnn_on_cpu import on_cpu

pytestmark = pytest.mark.usefixtures("eight_devices")

slow = functools.partial(pytest.param, marks=pytest.mark.slow)
BATCH, TOKENS, HEADS, KV_HEADS, HEAD_DIM = 2, 64, 4, 2, 16
NAMES = ("o", "lse", "dq", "dk", "dv")
TOLERANCE = {"bfloat16": 1.5e-2, "float16": 2e-3}  # relative to the largest value
RANDOM = np.random.default_rng(1)
IN_ORDER, NONE = np.arange(TOKENS), np.zeros(TOKENS, int)
# Positions of queries and keys, and segments.
MASKS = {
    "in order": (IN_ORDER, IN_ORDER, NONE),
    "halves are packed": (IN_ORDER, IN_ORDER, IN_ORDER // 32),
    "packed": (IN_ORDER, IN_ORDER, IN_ORDER // 25),
    "shuffled": (RANDOM.permutation(TOKENS), RANDOM.permutation(TOKENS), NONE),
    "queries before all keys": (IN_ORDER, IN_ORDER + 24, NONE),
    "keys one later": (IN_ORDER, IN_ORDER + 1, NONE),  # query i sees the keys up to i - 1
    "twins": (IN_ORDER // 2, IN_ORDER // 2, NONE),
    "zigzag": (np.roll(IN_ORDER, 16), np.roll(IN_ORDER, 16), NONE),
}


@pytest.fixture(scope="module", autouse=True)
def small_gpu() -> Iterator[None]:
    """Let CPUs be GPUs with cuDNN, with parts of 16 tokens or more, and one or two heads at a time."""
    with on_cpu(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "native_to", lambda _: "cudnn")
        patch.setenv("RINGRL_KERNEL_CHECK", "off")
        patch.setattr(cudnn, "LEAST", 16)
        patch.setattr(cudnn, "ROWS", 2 * TOKENS)
        yield


@pytest.fixture
def without_xla(monkeypatch) -> None:
    """Let XLA's part give NaN."""
    monkeypatch.setattr(xla, "forward", lambda *_: jax.tree.map(lambda x: x * jnp.nan, _[2]))
    monkeypatch.setattr(xla, "backward", lambda x, *_: (_[2] * jnp.nan, x.kv * jnp.float32(jnp.nan)))


def with_gradients(attend: Callable, arrays: dict, **keywords) -> dict:
    """Return the values of NAMES."""
    attend = functools.partial(attend, return_residual=True, **keywords)
    found, backward = jax.vjp(attend, *(arrays[name] for name in "qkv"))
    return dict(zip(NAMES, (*found, *backward((arrays["do"], arrays["dlse"]))), strict=True))


def rounded(arrays: dict, dtype: str = "bfloat16") -> dict:
    return {name: jnp.asarray(x, jnp.float32 if name == "dlse" else dtype) for name, x in arrays.items()}


def compare(found: dict, oracle: Callable, arrays: dict, queries, keys, rule: Rule, dtype: str = "bfloat16") -> None:
    """Assert that all values equal the definition up to rounding. Infinite values are those of blind rows."""
    arrays = {name: np.asarray(x, np.float64) for name, x in arrays.items()}
    queries, keys = ([np.broadcast_to(x, (BATCH, len(x))) for x in side] for side in (queries, keys))
    for name, expected in oracle(arrays, queries, keys, rule).items():
        blind = np.isneginf(expected)
        np.testing.assert_array_equal(np.isneginf(found[name]), blind)
        x, expected = np.asarray(found[name], np.float64)[~blind], expected[~blind]
        assert np.abs(x - expected).max() <= TOLERANCE[dtype] * np.abs(expected).max(), name


@functools.cache
def compiled(rule: Rule, dtype: str, has_prefix: bool) -> Callable:
    def run(arrays, places, key_places, segments, prefix):  # type: ignore[no-untyped-def]
        keywords = {"positions": places, "key_positions": key_places, "segment_ids": segments}
        keywords |= {"global_prefix": prefix} if has_prefix else {}
        keywords |= {"is_causal": rule.is_causal, "local_window_size": rule.window}
        return with_gradients(attention, arrays, **keywords)

    return jax.jit(run)


@pytest.mark.parametrize("mask", MASKS)
def test_causal_masks_equal_the_definition(mask, draw, oracle):
    arrays = rounded(draw(BATCH, TOKENS, HEADS, KV_HEADS, HEAD_DIM))
    places, key_places, segments = MASKS[mask]
    found = compiled(Rule(), "bfloat16", False)(arrays, *MASKS[mask], NONE)
    compare(found, oracle, arrays, (places, segments), (key_places, segments), Rule())


@pytest.mark.parametrize(
    ("rule", "prefix"),
    [(Rule(is_causal=False), None), (Rule(window=(20, 0)), IN_ORDER // 40 * 40)],
    ids=["full", "prefix"],
)
def test_other_masks_equal_the_definition(rule, prefix, draw, oracle):
    arrays = rounded(draw(BATCH, TOKENS, HEADS, KV_HEADS, HEAD_DIM), "float16")
    found = compiled(rule, "float16", prefix is not None)(arrays, IN_ORDER, IN_ORDER, NONE, prefix)
    queries = (IN_ORDER, NONE) if prefix is None else (IN_ORDER, NONE, prefix)
    compare(found, oracle, arrays, queries, (IN_ORDER, NONE), rule, "float16")


@pytest.mark.parametrize(
    ("ring", "layout", "keywords"),
    [
        (4, "zigzag", {}),
        slow(4, "zigzag", {"bidirectional": True}),
        slow(8, "zigzag", {}),
        slow(4, "contiguous", {"is_causal": False}),
        slow(4, "contiguous", {"local_window_size": (1000, 0)}),
        slow(4, "zigzag", {"strategy": "all_gather"}),
        slow(2, "zigzag", {"strategy": "ulysses"}),
    ],
)
def test_rings_need_no_xla(ring, layout, keywords, draw, oracle, without_xla, monkeypatch):
    monkeypatch.setattr(cudnn, "LEAST", TOKENS * 2 // (2 * ring))  # the chunks of zigzag
    check_ring(ring, layout, keywords, draw, oracle)


@pytest.mark.slow
def test_striped_ring(draw, oracle):
    """Its blocks have the mask "keys one later"."""
    check_ring(4, "striped", {}, draw, oracle)


def check_ring(ring: int, layout: str, keywords: dict, draw: Callable, oracle: Callable) -> None:
    """Check twice as many tokens."""
    tokens = 2 * TOKENS
    arrays = rounded(draw(BATCH, tokens, HEADS, KV_HEADS, HEAD_DIM))
    mesh = Mesh(np.array(jax.devices()[:ring]), ("seq",))

    @jax.jit
    def run(arrays):  # type: ignore[no-untyped-def]
        arrays = {name: to_layout(x, layout, ring) for name, x in arrays.items()}
        found = with_gradients(functools.partial(ring_attention, mesh=mesh, layout=layout), arrays, **keywords)
        return {name: from_layout(x, layout, ring) for name, x in found.items()}

    side = np.arange(tokens), np.zeros(tokens, int)
    rule = Rule(keywords.get("is_causal", True), keywords.get("local_window_size"))
    compare(run(arrays), oracle, arrays, side, side, rule)


def test_last_queries_of_more_keys(draw, oracle, without_xla):
    """Keys are cut to the length of the queries: three full blocks and a causal one."""
    arrays = rounded(draw(BATCH, TOKENS, HEADS, KV_HEADS, HEAD_DIM))
    arrays |= {name: arrays[name][:, :16] for name in ("q", "do", "dlse")}
    found = jax.jit(lambda arrays: with_gradients(attention, arrays))(arrays)
    compare(found, oracle, arrays, (IN_ORDER[-16:], NONE[:16]), (IN_ORDER, NONE), Rule())


@pytest.mark.parametrize("dtype", [slow("bfloat16"), "float16"])
def test_rows_with_a_cotangent_of_the_log_sum_exp_alone(dtype, draw, oracle):
    """No output gives their delta, so XLA computes their parts. Tiny cotangents in float16 are no such rows."""
    arrays = draw(BATCH, TOKENS, HEADS, KV_HEADS, HEAD_DIM)
    arrays["do"][:, 40:44] = 0
    arrays["do"][:, 50] = 1e-7
    arrays = rounded(arrays, dtype)
    found = compiled(Rule(), dtype, False)(arrays, *MASKS["in order"], NONE)
    compare(found, oracle, arrays, (IN_ORDER, NONE), (IN_ORDER, NONE), Rule(), dtype)


def test_outputs_that_give_delta():
    do = jnp.array([[1.0, -2.0], [3e-5, 1e-5], [0.0, 0.0], [0.0, 0.0], [1e-7, 0.0]], jnp.float16)[None, None]
    delta = jnp.array([4.0, 1e-9, 0.0, 0.3, 4.0])[None, None]
    o, is_exact = cudnn._output_for(Cotangents(do, delta, delta))
    assert is_exact[0, 0].tolist() == [True, True, True, False, False]
    np.testing.assert_allclose((o * do.astype(jnp.float32)).sum(-1)[0, 0, :3], delta[0, 0, :3], rtol=2e-3, atol=1e-9)
    assert cudnn._output_for(Cotangents(do.astype(jnp.bfloat16), delta, delta))[1][0, 0].tolist() == [True] * 3 + [
        False,
        True,
    ]


@pytest.mark.slow
def test_vmap_over_queries_and_over_segments(draw):
    """One axis of queries with the same keys, one of all arrays with segments of different lengths."""
    arrays = rounded(draw(BATCH, 16, HEADS, KV_HEADS, HEAD_DIM))
    q, k, v = (arrays[name] for name in "qkv")
    segments = jnp.stack([NONE[:16], IN_ORDER[:16] // 9])

    def loss(q, k, v, **keywords):  # type: ignore[no-untyped-def]
        return attention(q, k, v, **keywords).astype(jnp.float32).sum()

    queries = jax.grad(lambda k: jax.vmap(lambda q: loss(q, k[0], v[0]))(q).sum())
    repeated = jax.grad(lambda k: loss(q, *(jnp.repeat(x[:1], BATCH, axis=0) for x in (k, v))))
    packed = jax.grad(lambda k: jax.vmap(lambda *x: loss(*x[:3], segment_ids=x[3]))(q, k, v, segments).sum())
    batched = jax.grad(lambda k: loss(q, k, v, segment_ids=segments))
    found = jax.jit(lambda k: [f(k).astype(jnp.float32) for f in (queries, repeated, packed, batched)])(k)
    for mapped, expected in (found[:2], found[2:]):
        np.testing.assert_allclose(mapped, expected, atol=1e-2 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("dtype", "head_dim", "cap", "reason"),
    [
        ("float32", 64, None, "cuDNN supports bfloat16 and float16, not float32"),
        ("bfloat16", 256, None, "multiple of 8 up to 128, not 256"),
        ("bfloat16", 60, None, "multiple of 8 up to 128, not 60"),
        ("bfloat16", 64, 30.0, "no logits_soft_cap"),
        ("float16", 128, None, None),
    ],
)
def test_unsupported(dtype, head_dim, cap, reason):
    found = cudnn.unsupported(jnp.dtype(dtype), head_dim, Options(Rule(), 0.1, cap))
    assert found is reason is None or reason in found


def test_a_jax_with_other_names_is_unsupported(monkeypatch):
    monkeypatch.delattr(fused, "_dot_product_attention_bwd_p")
    cudnn.cudnn.cache_clear()
    try:
        assert "jax" in cudnn.unsupported(jnp.dtype("bfloat16"), 64, Options(Rule(), 0.1))
    finally:
        cudnn.cudnn.cache_clear()


def test_calls_in_the_program_for_cuda():
    """The shapes, order and options of the real custom calls: one full and one causal for each size of block."""
    batch, tokens, head_dim = 2, 256, 64

    def argument(*shape: int, dtype: str = "bfloat16") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    side = Side(*[argument(batch, tokens, dtype="int32")] * 2)
    kv = argument(batch * KV_HEADS, 2, tokens, head_dim)
    inputs = Inputs(argument(batch * KV_HEADS, 2 * tokens, head_dim), kv, side, side)

    def run(inputs: Inputs, do: jax.Array) -> tuple[Partial, jax.Array]:
        part = cudnn.forward(inputs, Options(Rule(), 0.3))
        return part, cudnn.backward(inputs, Options(Rule(), 0.3), Cotangents(do, part.lse, part.lse))

    names = [f"__cudnn$fmhaSoftmax{which}" for which in ("", "Backward")]
    allowed = [export.DisabledSafetyCheck.custom_call(name) for name in names]
    text = export.export(jax.jit(run), platforms=["cuda"], disabled_checks=allowed)(inputs, inputs.q).mlir_module()
    q, kv, rows = "1x2x256x64xbf16", "1x1x256x64xbf16", "1x2x256xf32"  # one head at a time
    signatures = {
        names[0]: ([q, kv, kv], [q, rows, "0xui8"]),
        names[1]: ([q, kv, kv, rows, q, q], [q, kv, kv, "0xui8"]),
    }
    for name, (operands, results) in signatures.items():
        lines = [line for line in text.splitlines() if f"@{name}(" in line]
        assert len(lines) == 6
        whole = [line for line in lines if q in line]
        assert {re.search(r"mask_type\\22: \\22(\w+)", line)[1] for line in whole} == {"NO_MASK", "CAUSAL"}
        for line in whole:
            before, after = (re.findall(r"tensor<([^>]*)>", side) for side in line.rsplit(" : ", 1)[1].split("->"))
            assert (before, after) == (operands, results)
            assert r"fmha_scale\22: 0.3" in line


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["full", "causal"])
def test_check_before_the_first_use_computes_full_and_causal_blocks(wrong, monkeypatch, tmp_path):
    monkeypatch.delenv("RINGRL_KERNEL_CHECK")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(check, "TOKENS", 16)
    q, right = jax.ShapeDtypeStruct((1, 8, 2, 16), "bfloat16"), cudnn.cudnn()
    broken = right._replace(full=right.causal) if wrong == "full" else right._replace(causal=right.full)
    for number, (used, chosen) in enumerate(((right, "cudnn"), (broken, "xla"))):
        monkeypatch.setattr(cudnn, "cudnn", lambda used=used: used)
        options = Options(Rule(), 0.25, block_k=8 * number)  # verdicts and traces differ by options
        assert kernels.with_kernel(options, None, q, jax.devices()[0]).implementation == chosen
