"""Sinks, slopes, a traced soft cap and values of another width, with derivatives of both orders, against float64."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from ringrl.attention import attention, from_layout, ring_attention, ring_attention_shard, to_layout
from ringrl.attention.mask import Rule, Side
from tests.attention.reference import reference_attention

pytestmark = pytest.mark.usefixtures("eight_devices")

QUICK = {"xla_backend_optimization_level": 0}  # compiles twice as fast
BATCH, TOKENS, WINDOW = 2, 32, (9, 0)
RANDOM = np.random.default_rng(5)
SEGMENTS = np.sort(RANDOM.integers(0, 3, (BATCH, TOKENS)))
ARRAYS = {
    "q": RANDOM.normal(size=(BATCH, TOKENS, 4, 8)),
    "k": RANDOM.normal(size=(BATCH, TOKENS, 2, 8)),
    "v": RANDOM.normal(size=(BATCH, TOKENS, 2, 12)),
    "sinks": np.array([0.3, -1.0, 2.0, 0.0]),
    "alibi_slopes": np.array([0.5, 0.25, 0.1, -0.2]),
    "logits_soft_cap": np.array(1.3),
}
TANGENTS = {name: RANDOM.normal(size=x.shape) for name, x in ARRAYS.items()}
WEIGHTS = RANDOM.normal(size=(BATCH, TOKENS, 4, 12))
FEW = ("q", "k", "v", "sinks")  # computed by every kernel


def loss(attend: Callable, given: dict) -> jax.Array:
    o, lse = attend(**given)
    return (jnp.sin(o) * WEIGHTS).sum() + (jnp.cos(lse) * WEIGHTS[..., 0]).sum()


def dot(x: dict, y: dict) -> jax.Array:
    return sum(jnp.sum(x[name] * y[name]) for name in x)


OPERATIONS: dict[str, Callable] = {
    "gradient": lambda f, x, t: jax.value_and_grad(f)(x),
    "jvp": lambda f, x, t: jax.jvp(f, (x,), (t,)),
    "jvp of grad": lambda f, x, t: jax.jvp(jax.grad(f), (x,), (t,))[1],
    "grad of grad": lambda f, x, t: jax.grad(lambda x: dot(jax.grad(f)(x), t))(x),
}


def apply(operation: str, attend: Callable, names: tuple[str, ...], dtype: str) -> list[np.ndarray]:
    """Return the operation's results for the arrays of these names and their tangents."""
    x, t = ({name: jnp.asarray(arrays[name], dtype) for name in names} for arrays in (ARRAYS, TANGENTS))
    run = jax.jit(lambda x, t: OPERATIONS[operation](partial(loss, attend), x, t), compiler_options=QUICK)
    return [np.asarray(y, np.float64) for y in jax.tree.leaves(run(x, t))]


@pytest.fixture(scope="module")
def expected() -> Callable[..., list[np.ndarray]]:
    known: dict[tuple, list[np.ndarray]] = {}
    side = Side(np.broadcast_to(np.arange(TOKENS), SEGMENTS.shape), SEGMENTS)

    def find(operation: str, names: tuple[str, ...]) -> list[np.ndarray]:
        operation = operation.replace("jvp of grad", "grad of grad")  # the Hessian is symmetric
        if (operation, names) not in known:
            with jax.enable_x64(True):
                attend = partial(reference_attention, queries=side, keys=side, rule=Rule(True, WINDOW), scale=8**-0.5)
                known[operation, names] = apply(operation, attend, names, "float64")
        return known[operation, names]

    return find


def over_devices(size: int, layout: str, **options) -> Callable:
    mesh = Mesh(np.array(jax.devices()[:size]), ("seq",))
    order = partial(to_layout, layout=layout, ring_size=size)
    options |= {"mesh": mesh, "layout": layout, "local_window_size": WINDOW, "return_residual": True}

    def attend(q, k, v, **per_head):  # type: ignore[no-untyped-def]
        found = ring_attention(*map(order, (q, k, v)), segment_ids=order(SEGMENTS), **options, **per_head)
        return jax.tree.map(partial(from_layout, layout=layout, ring_size=size), found)

    return attend


ATTENTION = partial(attention, segment_ids=SEGMENTS, local_window_size=WINDOW, return_residual=True)
CASES = {
    "one device": (lambda: ATTENTION, FEW, ("gradient", "jvp of grad", "grad of grad")),
    "one device, all": (lambda: ATTENTION, tuple(ARRAYS), tuple(OPERATIONS)),
    "autodiff by name": (lambda: partial(ATTENTION, implementation="autodiff"), FEW, ("jvp",)),
    "ring of 4": (lambda: over_devices(4, "zigzag"), FEW, ("gradient", "grad of grad")),
    "both ways": (lambda: over_devices(2, "striped", bidirectional=True), tuple(ARRAYS), ("gradient", "jvp of grad")),
    "ring of 8, all": (lambda: over_devices(8, "contiguous"), tuple(ARRAYS), ("gradient", "jvp")),
    "ulysses": (lambda: over_devices(2, "zigzag", strategy="ulysses"), tuple(ARRAYS), ("gradient",)),
    "all-gather": (lambda: over_devices(4, "contiguous", strategy="all_gather"), tuple(ARRAYS), ("gradient",)),
}  # fmt: skip


# The others use the same rules: second derivatives of all arrays around a ring are those of "both ways".
SLOW = [
    ("one device", "jvp of grad"), ("one device, all", "jvp of grad"), ("ring of 4", "grad of grad"),
    ("both ways", "gradient"), ("ring of 8, all", "gradient"), ("ring of 8, all", "jvp"), ("all-gather", "gradient"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("case", "operation"),
    [
        pytest.param(case, operation, marks=pytest.mark.slow) if (case, operation) in SLOW else (case, operation)
        for case, (*_, operations) in CASES.items()
        for operation in operations
    ],
)
def test_equals_the_definition(case, operation, expected):
    attend, names, _ = CASES[case]
    for got, want in zip(apply(operation, attend(), names, "float32"), expected(operation, names), strict=True):
        assert np.abs(got - want).max() <= 2e-5 * np.abs(want).max()


@pytest.mark.slow
def test_bfloat16_sums_gradients_in_float32(expected):
    """Rounding is that of the inputs and results only: gradients of keys are not summed in bfloat16."""
    x = {name: ARRAYS[name].astype(jnp.bfloat16).astype(np.float64) for name in ARRAYS}
    exact, rounded = (
        jax.jit(jax.grad(lambda x, dtype=dtype: loss(ATTENTION, _cast(x, dtype))))(_cast(x, "float32"))
        for dtype in ("float32", "bfloat16")
    )
    for name in "qkv":
        error = np.abs(np.float32(rounded[name]) - exact[name]).max()
        assert error <= 0.01 * np.abs(exact[name]).max(), name


def _cast(x: dict, dtype: str) -> dict:
    return {name: jnp.asarray(y, dtype if name in "qkv" else "float32") for name, y in x.items()}


def test_a_query_that_sees_nothing_and_a_sink():
    """The sink takes all weight: the output is 0, and the log-sum-exp is the sink."""
    q, k, v = (jnp.asarray(ARRAYS[name], "float32") for name in "qkv")
    sinks = jnp.asarray(ARRAYS["sinks"], "float32")
    options = {"positions": np.full(TOKENS, -1), "key_positions": np.arange(TOKENS), "return_residual": True}
    attend = jax.jit(partial(attention, **options))
    for slopes in (None, jnp.asarray(ARRAYS["alibi_slopes"], "float32")):
        (o, lse), backward = jax.vjp(
            lambda *x, slopes=slopes: attend(*x[:3], sinks=x[3], alibi_slopes=slopes), q, k, v, sinks
        )
        assert not o.any()
        np.testing.assert_array_equal(lse, np.broadcast_to(sinks, lse.shape))
        *of_tokens, of_sinks = backward((jnp.ones_like(o), jnp.ones_like(lse)))
        assert not any(x.any() for x in of_tokens)
        np.testing.assert_allclose(of_sinks, BATCH * TOKENS)
    absent = sinks.at[1].set(-jnp.inf)  # no sink on this head
    (o, lse), backward = jax.vjp(lambda sinks: attend(q, k, v, sinks=sinks), absent)
    assert not o.any()
    np.testing.assert_array_equal(lse, np.broadcast_to(absent, lse.shape))
    assert np.isfinite(backward((jnp.ones_like(o), jnp.zeros_like(lse)))[0]).all()
    seen = jax.jit(attention)
    np.testing.assert_array_equal(seen(q, k, v, sinks=absent)[:, :, 1], seen(q, k, v)[:, :, 1])
    o, lse = attention(q, k[:, :0], v[:, :0], sinks=sinks, return_residual=True)
    assert o.shape == (*q.shape[:3], 12)
    np.testing.assert_array_equal(lse, np.broadcast_to(sinks, lse.shape))


@pytest.mark.parametrize("inside", [False, True])
def test_vmap_around_and_inside_a_mesh(inside):
    mesh = Mesh(np.array(jax.devices()[:4]), ("seq",))
    q, k, v = (jnp.asarray(ARRAYS[name], "float32") for name in "qkv")
    slopes = jnp.asarray(ARRAYS["alibi_slopes"], "float32")
    attend = ring_attention_shard if inside else partial(ring_attention, mesh=mesh)
    one = partial(attend, layout="contiguous", alibi_slopes=slopes)
    mapped = jax.vmap(one)
    if inside:
        spec = PartitionSpec(None, "seq")
        mapped = jax.shard_map(mapped, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)
    np.testing.assert_allclose(jax.jit(mapped)(q, k, v), attention(q, k, v, alibi_slopes=slopes), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"sinks": np.zeros(3)}, r"sinks: expected 4 real numbers, one for each head of q, got float32 \(3,\)"),
        ({"sinks": np.arange(4)}, "sinks: expected 4 real numbers, one for each head of q, got int32"),
        ({"logits_soft_cap": jnp.float32(-1)}, "logits_soft_cap: expected a finite number > 0, got -1.0"),
        ({"alibi_slopes": np.zeros(4, int)}, "alibi_slopes: expected 4 real numbers"),
        ({"alibi_slopes": np.zeros(4), "implementation": "xla"}, "implementation: 'xla' takes neither alibi_slopes"),
        ({"logits_soft_cap": jnp.ones(2)}, r"logits_soft_cap: expected one number, got float32 \(2,\)"),
    ],
)
def test_bad_arguments(keywords, message):
    with pytest.raises(ValueError, match=message):
        attention(*(jnp.asarray(ARRAYS[name], "float32") for name in "qkv"), **keywords)
