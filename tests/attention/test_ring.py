"""Ring attention over eight host devices against the definition in float64: values and each gradient.

Every two of ring size, layout, mask, number of heads and soft cap are combined; `QUICK_CASES` have each value once.
mutations.py repeats `RUNS` on mutated copies.
"""

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import ringrl.attention
from ringrl.attention import (
    attention,
    from_layout,
    pad_to_layout,
    ring_attention,
    ring_attention_shard,
    to_layout,
)
from ringrl.attention.attend import attend
from ringrl.attention.layout import LAYOUTS
from ringrl.attention.mask import Options, Rule, Side
from ringrl.attention.ring import make_ring

pytestmark = pytest.mark.usefixtures("eight_devices")

BATCH, TOKENS, HEAD_DIM = 2, 48, 8
NAMES = ("o", "lse", "dq", "dk", "dv")
GIVEN = ("q", "k", "v", "do", "dlse")
HEADS = {"MHA": (2, 2), "GQA": (4, 2), "MQA": (2, 1)}
QUICK = {"xla_backend_optimization_level": 0}  # compiles twice as fast
SAVED = jax.checkpoint_policies.save_only_these_names("ring_attention")
IN_ORDER = np.tile(np.arange(TOKENS), (BATCH, 1))
PACKED = np.stack([np.repeat([0, 1, 2], [21, 1, 26]), np.repeat([5, 2, 5], [33, 10, 5])])
SHUFFLED = np.stack([np.random.default_rng(row).permutation(TOKENS) for row in range(BATCH)])
STARTS = np.stack([np.repeat([0, 10, 45], [10, 35, 3]), np.repeat([0, 38], [38, 10])])  # of each query's document
MASKS = {
    "causal": {},
    "window": {"is_causal": False, "local_window_size": (9, 5)},
    "packed": {"segment_ids": PACKED},
    "full": {"is_causal": False},
    "prefix": {"local_window_size": (3, 0), "global_prefix": STARTS, "segment_ids": PACKED},
}
CASES = [
    (ring, LAYOUTS[(a + c) % 3], mask, tuple(HEADS)[(2 * a + c) % 3], (None, 1.5)[(a + c) % 2])
    for a, ring in enumerate((8, 4, 2, 1))
    for c, mask in enumerate(MASKS)
]
QUICK_CASES = [(8, "packed"), (8, "full"), (4, "causal"), (4, "prefix"), (2, "causal"), (1, "window")]
slow = partial(pytest.param, marks=pytest.mark.slow)


def mesh_of(**axes: int) -> Mesh:
    """Return a mesh over the first devices, with axis sizes by name."""
    devices = jax.devices()[: np.prod(list(axes.values()))]
    return Mesh(np.array(devices).reshape(*axes.values()), tuple(axes))


def through_the_ring(function: Callable, arrays: dict, mesh: Mesh, ring: int, layout: str, **keywords) -> dict:
    """Return the values of NAMES, computed in layout order and permuted back."""
    names = ("segment_ids", "positions", "global_prefix")
    integers = {name: keywords.pop(name) for name in names if name in keywords}

    @partial(jax.jit, compiler_options=QUICK)
    def run(arrays, integers):
        q, k, v, do, dlse, integers = jax.tree.map(
            lambda x: to_layout(x, layout, ring), (*(arrays[name] for name in GIVEN), integers)
        )
        attend = partial(function, mesh=mesh, layout=layout, return_residual=True, **keywords, **integers)
        values, backward = jax.vjp(attend, q, k, v)
        return [from_layout(x, layout, ring) for x in (*values, *backward((do, dlse)))]

    return dict(zip(NAMES, run(arrays, integers), strict=True))


def errors(got: dict, expected: dict) -> dict[str, float]:
    """Return the largest error of each value relative to its largest entry."""
    return {
        name: float(np.abs(np.asarray(got[name], np.float64) - x).max() / np.abs(x).max())
        for name, x in expected.items()
    }


def expect(oracle: Callable, arrays: dict, **keywords) -> dict:
    """Return the definition's values for keywords of ring_attention."""
    side = keywords.get("positions", IN_ORDER), keywords.get("segment_ids", np.zeros_like(IN_ORDER))
    rule = Rule(keywords.get("is_causal", True), keywords.get("local_window_size"))
    queries = (*side, keywords["global_prefix"]) if "global_prefix" in keywords else side
    return oracle(arrays, queries, side, rule, logits_soft_cap=keywords.get("logits_soft_cap"))


def check(draw, oracle, mesh, ring, layout, heads="GQA", function=ring_attention, setup=None, **keywords) -> None:
    """Assert that all five values are exact; `setup` defines the ring, `keywords` the computation."""
    arrays = draw(BATCH, TOKENS, *HEADS[heads], HEAD_DIM)
    got = through_the_ring(function, arrays, mesh, ring, layout, **(setup or {}), **keywords)
    for name, error in errors(got, expect(oracle, arrays, **keywords)).items():
        assert error <= 1e-5, f"{name}: error {error}"


@pytest.mark.parametrize(
    ("ring", "layout", "mask", "heads", "cap"),
    [case if (case[0], case[2]) in QUICK_CASES else slow(*case) for case in CASES],
)
def test_values_and_gradients_equal_the_definition(ring, layout, mask, heads, cap, draw, oracle):
    check(draw, oracle, mesh_of(seq=ring), ring, layout, heads, logits_soft_cap=cap, **MASKS[mask])


def test_cases_cover_all_pairs():
    for one, other in itertools.combinations(range(5), 2):
        pairs = {(case[one], case[other]) for case in CASES}
        values, options = ({case[i] for case in CASES} for i in (one, other))
        assert len(pairs) == len(values) * len(options)
    for index in range(5):
        assert {case[index] for case in CASES} == {case[index] for case in CASES if (case[0], case[2]) in QUICK_CASES}


@pytest.mark.slow
def test_custom_positions(draw, oracle):
    """With shuffled positions a window must not skip hops of a contiguous layout (see also the number of hops)."""
    keywords = {"positions": SHUFFLED, "is_causal": False, "local_window_size": (9, 5)}
    check(draw, oracle, mesh_of(seq=4), 4, "contiguous", **keywords)


@pytest.mark.parametrize("layout", [slow("contiguous"), slow("striped"), "zigzag"])
def test_arbitrary_prefixes(layout, draw, oracle):
    """Prefixes that end before and after the query, and a window that shows nothing."""
    prefix = np.random.default_rng(2).integers(1, TOKENS, (BATCH, TOKENS))
    keywords = {"global_prefix": prefix, "positions": SHUFFLED, "is_causal": False, "local_window_size": (-1, 0)}
    check(draw, oracle, mesh_of(seq=4), 4, layout, logits_soft_cap=1.5, **keywords)


@pytest.mark.parametrize(
    ("layout", "mask"),
    [("zigzag", "causal"), slow("contiguous", "window"), slow("striped", "packed"), slow("contiguous", "prefix")],
)
def test_bidirectional(layout, mask, draw, oracle):
    check(draw, oracle, mesh_of(seq=8), 8, layout, setup={"bidirectional": True}, **MASKS[mask])


MESHES = {
    "tuple_of_axes": ({"a": 2, "b": 4}, 8, {"axis_name": ("a", "b")}),
    "tuple_of_axes_in_another_order": ({"a": 2, "b": 4}, 8, {"axis_name": ("b", "a")}),
    "smaller_than_the_mesh": ({"data": 2, "seq": 4}, 4, {}),
    "batch_and_heads": ({"data": 2, "seq": 2, "tensor": 2}, 2, {"batch_axes": "data", "head_axes": "tensor"}),
}


# Meshes of several axes: the next test, and training/test_mesh.py.
@pytest.mark.parametrize("name", [slow(name) for name in MESHES])
def test_meshes(name, draw, oracle):
    axes, ring, setup = MESHES[name]
    check(draw, oracle, mesh_of(**axes), ring, "zigzag", setup=setup, **MASKS["packed"])


def test_window_with_axes_in_another_order(draw, oracle):
    """A window skips hops, so the order of neighbours matters."""
    setup = {"axis_name": ("b", "a")}
    check(draw, oracle, mesh_of(a=2, b=4), 8, "contiguous", setup=setup, **MASKS["window"])


STRATEGIES = {
    "ulysses_more_heads_than_devices": ({"seq": 2}, "zigzag", {"strategy": "ulysses"}),
    "ulysses_shared_key_heads": ({"seq": 4}, "striped", {"strategy": "ulysses"}),
    "ulysses_ring": ({"seq": 4, "heads": 2}, "zigzag", {"strategy": "ulysses_ring", "axis_name": ("seq", "heads")}),
    "all_gather": ({"seq": 4}, "zigzag", {"strategy": "all_gather"}),
    "auto": ({"seq": 4}, "contiguous", {"strategy": "auto"}),
}


# The mask "prefix" has segments, too. More heads than devices: RUNS. Auto chooses one of the others.
STRATEGY_CASES = [("ulysses_shared_key_heads", "window"), ("ulysses_ring", "prefix"), ("all_gather", "prefix")]
OTHER_CASES = [(name, mask) for name in STRATEGIES for mask in ("window", "prefix")]


@pytest.mark.parametrize(
    ("name", "mask"), [*STRATEGY_CASES, *(slow(*case) for case in OTHER_CASES if case not in STRATEGY_CASES)]
)
def test_strategies(name, mask, draw, oracle):
    axes, layout, setup = STRATEGIES[name]
    ring = int(np.prod(list(axes.values())))
    check(draw, oracle, mesh_of(**axes), ring, layout, setup=setup, **MASKS[mask])


def test_batch_and_heads_keep_their_sharding(draw, oracle):
    mesh = mesh_of(data=2, seq=2, tensor=2)
    arrays = draw(BATCH, TOKENS, 4, 2, HEAD_DIM)
    spec = PartitionSpec("data", "seq", "tensor")
    q, k, v = (jax.device_put(to_layout(arrays[name], "zigzag", 2), NamedSharding(mesh, spec)) for name in "qkv")
    o = ring_attention(q, k, v, mesh=mesh)  # reads the shardings
    assert o.sharding.is_equivalent_to(q.sharding, o.ndim)
    expected = expect(oracle, arrays)["o"]
    np.testing.assert_allclose(from_layout(o, "zigzag", 2), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_batch_sharded_over_the_sequence_axis_is_moved(draw, quick):
    mesh, arrays = mesh_of(seq=8), draw(8, 16, 2, 2, 8)
    where = NamedSharding(mesh, PartitionSpec("seq"))
    attend = partial(ring_attention, mesh=mesh, layout="contiguous")
    q, k, v = (jax.device_put(arrays[name], where) for name in "qkv")
    np.testing.assert_allclose(attend(q, k, v), quick(attention)(*(arrays[n] for n in "qkv")), rtol=1e-5, atol=1e-5)


def test_replicated_key_heads(draw, oracle):
    """Multi-query attention under tensor parallelism replicates k and v over the head axis."""
    mesh, arrays = mesh_of(heads=2, seq=4), draw(1, 32, 4, 1, 8)
    heads, whole = PartitionSpec(None, "seq", "heads"), PartitionSpec(None, "seq")
    attend = jax.shard_map(
        partial(ring_attention_shard, layout="contiguous", return_residual=True),
        mesh=mesh,
        in_specs=(heads, whole, whole),
        out_specs=(heads, heads),
    )

    @jax.jit
    def run(q, k, v, do, dlse):
        values, backward = jax.vjp(attend, q, k, v)
        return *values, *backward((do, dlse))

    found = run(*(arrays[name] for name in ("q", "k", "v", "do", "dlse")))
    side = np.arange(32)[None], np.zeros((1, 32), int)
    for (name, expected), x in zip(oracle(arrays, side, side, Rule()).items(), found, strict=True):
        np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-5, err_msg=name)


def test_padding_with_its_own_segment_has_no_effect(draw, oracle):
    """45 tokens, padded to 48 for a ring of 8, keep all five values."""
    tokens, ring = 45, 8
    arrays = draw(BATCH, tokens, 4, 2, HEAD_DIM)
    side = IN_ORDER[:, :tokens], np.zeros((BATCH, tokens), int)
    padded = {name: pad_to_layout(x, "zigzag", ring, value=0 if "d" in name else 7) for name, x in arrays.items()}
    segments = pad_to_layout(side[1], "zigzag", ring, value=1)
    keywords = {"segment_ids": segments, "is_causal": False}
    got = through_the_ring(ring_attention, padded, mesh_of(seq=ring), ring, "zigzag", **keywords)
    got = {name: x[:, :tokens] for name, x in got.items()}
    assert max(errors(got, oracle(arrays, side, side, Rule(is_causal=False))).values()) <= 1e-5


def test_queries_without_visible_keys(draw, oracle):
    """They give 0, log-sum-exp -inf and finite gradients, and do not affect gradients of hidden keys."""
    arrays = draw(BATCH, TOKENS, 4, 2, HEAD_DIM)
    keys = IN_ORDER, np.zeros_like(IN_ORDER)
    queries = IN_ORDER, np.where(IN_ORDER % 5 == 0, 9, 0)
    expected = oracle(arrays, queries, keys, Rule())
    options, spec = Options(Rule(), HEAD_DIM**-0.5), PartitionSpec(None, "seq")

    def shard(q, k, v, queries, keys):
        plan = make_ring("seq", q.shape[1], "contiguous", options.rule, is_plain_window=True, bidirectional=False)
        return attend(q, k, v, queries, keys, options, plan)

    @partial(jax.jit, compiler_options=QUICK)
    def run(q, k, v, do, dlse):
        mapped = jax.shard_map(shard, mesh=mesh_of(seq=4), in_specs=spec, out_specs=spec)
        sides = (Side(*(jnp.asarray(x, jnp.int32) for x in side)) for side in (queries, keys))
        values, backward = jax.vjp(lambda *qkv: mapped(*qkv, *sides), q, k, v)
        return *values, *backward((do, dlse))

    got = dict(zip(NAMES, map(np.asarray, run(*(arrays[name] for name in GIVEN))), strict=True))
    blind = queries[1] == 9
    assert (got["o"][blind] == 0).all()
    assert np.isneginf(got["lse"][blind]).all()
    assert (got["dq"][blind] == 0).all()
    got.pop("lse"), expected.pop("lse")
    assert max(errors(got, expected).values()) <= 1e-5


@pytest.mark.slow
def test_other_segments_have_no_effect(draw):
    arrays = draw(BATCH, TOKENS, 4, 2, HEAD_DIM)
    segments = np.tile(np.arange(TOKENS) % 2, (BATCH, 1))
    other = arrays | {name: np.where(segments[..., None, None] == 1, 1e3, arrays[name]) for name in "kv"}
    results = [
        through_the_ring(ring_attention, x, mesh_of(seq=4), 4, "zigzag", segment_ids=segments)["o"]
        for x in (arrays, other)
    ]
    np.testing.assert_array_equal(*(np.asarray(o)[segments == 0] for o in results))
    assert (np.asarray(results[0]) != np.asarray(results[1])).any()


def test_bfloat16_error_does_not_grow_with_the_ring(draw, oracle):
    arrays = draw(BATCH, TOKENS, 4, 2, HEAD_DIM)
    half = {name: x if name == "dlse" else jnp.asarray(x, jnp.bfloat16) for name, x in arrays.items()}
    expected = expect(oracle, {name: np.asarray(x, np.float32) for name, x in half.items()})
    found = [
        errors(through_the_ring(ring_attention, half, mesh_of(seq=ring), ring, "zigzag"), expected) for ring in (1, 8)
    ]
    for name in NAMES:
        assert found[0][name] <= 3 * float(jnp.finfo(jnp.bfloat16).eps)
        assert found[1][name] <= 1.5 * found[0][name] + 1e-6, name


def sends(function: Callable, *arguments) -> int:
    """Count the collective permutes that a function executes, including iterations of loops."""

    def count(jaxpr) -> int:
        return sum(map(of_equation, jaxpr.eqns))

    def of_equation(equation) -> int:
        inside = jax.extend.core.jaxprs_in_params(equation.params)
        rounds = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        return (equation.primitive.name == "ppermute") + rounds * sum(
            count(getattr(part, "jaxpr", part)) for part in inside
        )

    return count(jax.make_jaxpr(function)(*arguments).jaxpr)


@pytest.fixture
def qkv(draw) -> Iterator[tuple[np.ndarray, ...]]:
    arrays = draw(BATCH, TOKENS, 4, 2, HEAD_DIM)
    return tuple(arrays[name] for name in "qkv")


@pytest.mark.parametrize(
    ("layout", "keywords", "hops"),
    [
        ("contiguous", {"local_window_size": 6}, 1),
        ("contiguous", {"local_window_size": 7}, 2),
        ("contiguous", {"local_window_size": 0}, 0),
        ("contiguous", {"local_window_size": (13, 6), "is_causal": False}, 4),
        ("contiguous", {"local_window_size": 48}, 7),
        ("contiguous", {"local_window_size": 6, "positions": SHUFFLED}, 7),
        ("contiguous", {"local_window_size": 6, "global_prefix": STARTS}, 7),
        ("zigzag", {"local_window_size": 6}, 7),
        ("striped", {"local_window_size": 6}, 7),
        ("contiguous", {}, 7),
    ],
)
def test_window_on_contiguous_chunks_reduces_hops(layout, keywords, hops, qkv):
    """Six tokens per device; a hop sends arrays and integers."""
    assert sends(partial(ring_attention, mesh=mesh_of(seq=8), layout=layout, **keywords), *qkv) == 2 * hops


def loss(q, k, v, attend=ring_attention, **keywords):
    o, lse = attend(q, k, v, mesh=mesh_of(seq=4), return_residual=True, **keywords)
    return (jnp.sin(o) * jnp.arange(o.shape[1])[:, None, None]).sum() + jnp.cos(lse).sum()


def gradients(function: Callable, *arguments):
    """Return value and gradients of a function of q, k and v."""
    return jax.jit(jax.value_and_grad(function, (0, 1, 2)), compiler_options=QUICK)(*arguments)


def assert_same(got, expected) -> None:
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), got, expected)


@pytest.mark.slow
def test_vmap(qkv):
    """One context per call, mapped over the batch."""
    value, expected = gradients(loss, *qkv)
    mapped = lambda *qkv: jax.vmap(lambda *x: loss(*(y[None] for y in x)))(*qkv).sum()  # noqa: E731
    assert_same(gradients(mapped, *qkv), (value, expected))


def test_remat_that_saves_the_name_does_not_repeat_the_ring(qkv):
    saved = jax.checkpoint(loss, policy=SAVED)
    assert_same(gradients(saved, *qkv), gradients(loss, *qkv))
    plain, kept, replayed = (sends(jax.grad(f, (0, 1, 2)), *qkv) for f in (loss, saved, jax.checkpoint(loss)))
    assert plain == 2 * 3 + 3 * 3 + 2, "arrays and integers forward; with gradients backward; one more hop, and home"
    assert kept == plain
    assert replayed == plain + 2 * 3


@pytest.mark.slow
def test_scan_over_layers_with_remat(qkv):
    """Three layers in a scan equal three unrolled layers. Transformers with remat: training/test_mesh.py."""
    weights = np.linspace(0.5, 1.5, 3, dtype=np.float32)

    def layer(x, weight, k, v):
        return x + ring_attention(x * weight, k, v, mesh=mesh_of(seq=4)), None

    def scanned(q, k, v):
        step = jax.checkpoint(lambda x, w: layer(x, w, k, v), policy=SAVED)
        return jnp.sin(jax.lax.scan(step, q, weights)[0]).sum()

    def unrolled(q, k, v):
        for weight in weights:
            q, _ = layer(q, weight, k, v)
        return jnp.sin(q).sum()

    assert_same(gradients(scanned, *qkv), gradients(unrolled, *qkv))


@pytest.mark.slow
def test_shard_inside_a_user_shard_map(draw, oracle):
    """With check_vma (the default) and other operations inside the shard_map."""

    def inside(q, k, v, *, mesh, layout, return_residual):
        spec = PartitionSpec(None, "seq")
        shard = partial(ring_attention_shard, layout=layout, return_residual=return_residual)
        return jax.shard_map(lambda *qkv: shard(*qkv), mesh=mesh, in_specs=spec, out_specs=spec)(q, k, v)

    check(draw, oracle, mesh_of(seq=4), 4, "zigzag", function=inside)


# Small cases for mutations.py, which cover every line of the ring.
RUNS = {
    "zigzag": (4, "zigzag", {"segment_ids": PACKED, "is_causal": False}),
    "window": (8, "contiguous", {"is_causal": False, "local_window_size": (9, 5)}),
    "prefix": (3, "contiguous", {"local_window_size": (3, 0), "global_prefix": STARTS}),
    "prefix_ulysses": (2, "zigzag", {"local_window_size": (3, 0), "global_prefix": STARTS, "strategy": "ulysses"}),
}


def wrong_values(package, run: str, draw: Callable, oracle: Callable) -> list[str]:
    """Return the wrong values of a copy of ringrl.attention in one of RUNS."""
    ring, layout, keywords = RUNS[run]
    arrays = draw(BATCH, TOKENS, 4, 2, HEAD_DIM)
    got = through_the_ring(package.ring_attention, arrays, mesh_of(seq=ring), ring, layout, **keywords)
    found = errors(got, expect(oracle, arrays, **keywords))
    return [name for name, error in found.items() if not error <= 1e-5]


@pytest.mark.parametrize("run", RUNS)
def test_mutation_cases_pass_without_mutation(run, draw, oracle):
    assert wrong_values(ringrl.attention, run, draw, oracle) == []
