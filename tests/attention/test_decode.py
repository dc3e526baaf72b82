"""Attention to a cache against attention over the whole sequence."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ringrl.attention import (
    Prefix,
    append_to_cache,
    attention,
    decode_attention,
    from_layout,
    grow_cache,
    to_layout,
)

TOKENS, CAPACITY = 11, 16
slow = partial(pytest.param, marks=pytest.mark.slow)


def filled(x: np.ndarray, length: int, beyond: float) -> np.ndarray:
    """A cache of CAPACITY tokens that contains the first `length`; slots beyond contain `beyond`."""
    cache = np.full((x.shape[0], CAPACITY, *x.shape[2:]), beyond, x.dtype)
    cache[:, :length] = x[:, :length]
    return cache


@pytest.mark.parametrize(
    ("new", "heads"), [(1, (2, 2)), (1, (4, 2)), (1, (3, 1)), (3, (4, 2)), (TOKENS, (4, 2))], ids=str
)
def test_equals_attention(new, heads, draw):
    arrays = draw(2, TOKENS, *heads, 8)
    q, k, v = (arrays[name] for name in "qkv")
    whole = jax.jit(partial(attention, scale=0.3))(q, k, v)
    decode = jax.jit(lambda *caches, length: decode_attention(*caches, length=length, scale=0.3))
    for length in range(new, TOKENS + 1):
        caches = filled(k, length, 1e30), filled(v, length, -1e30)
        got = decode(q[:, length - new : length], *caches, length=length)
        np.testing.assert_allclose(got, whole[:, length - new : length], rtol=1e-5, atol=1e-5)


def test_slots_beyond_the_length_have_no_effect(draw):
    arrays = draw(1, TOKENS, 2, 1, 8)
    q, k, v = (arrays[name] for name in "qkv")
    results = [
        decode_attention(q[:, 5:8], filled(k, 8, beyond), filled(v, 8, beyond), length=8) for beyond in (0, 1, -1e30)
    ]  # without jit
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


@pytest.mark.parametrize(("shared", "window"), [(1, None), (6, 4), slow(1, 4), slow(6, None)])
def test_prefix_equals_its_tokens_in_every_cache(shared, window, draw):
    """All contexts start with the same tokens, stored once or in each cache."""
    q, k, v = alike(draw(3, TOKENS, 4, 2, 8), shared)
    options = {"local_window_size": window, "logits_soft_cap": 2.0}
    whole = jax.jit(partial(attention, **options))(q, k, v)
    before = Prefix(filled(k[:1], shared, 1e30), filled(v[:1], shared, -1e30), shared)
    decode = jax.jit(partial(decode_attention, **options))
    for new in (1, 3):
        for length in range(new, TOKENS - shared + 1):
            caches = filled(k[:, shared:], length, 1e30), filled(v[:, shared:], length, -1e30)
            tokens = slice(shared + length - new, shared + length)
            got = decode(q[:, tokens], *caches, length=length, prefix=before)
            np.testing.assert_allclose(got, whole[:, tokens], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_each_prefix_belongs_to_a_part_of_the_batch(draw):
    q, k, v = (draw(4, TOKENS, 4, 2, 8)[name] for name in "qkv")
    for x in (q, k, v):
        x[1, :6], x[3, :6] = x[0, :6], x[2, :6]
    before = Prefix(k[::2, :6], v[::2, :6], 6)
    got = decode_attention(q[:, 9:], k[:, 6:], v[:, 6:], length=5, prefix=before)
    np.testing.assert_allclose(got, attention(q, k, v)[:, 9:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("prefixes", "parts"), [slow(1, 2), slow(2, 2), slow(4, 2), (2, 4), (8, 4)])
def test_prefixes_with_a_sharded_batch(prefixes, parts, eight_devices, draw):
    q, k, v = (draw(8, TOKENS, 4, 2, 8)[name] for name in "qkv")
    before = Prefix(k[:prefixes, :6], v[:prefixes, :6], 6)
    given = q[:, 9:], k[:, 6:10], v[:, 6:10]
    mesh = Mesh(np.array(jax.devices()[: 2 * parts]).reshape(parts, 2), ("data", "seq"))
    striped = [to_layout(x, "striped", 2) for x in given[1:]]
    shared = Prefix(*(to_layout(x, "striped", 2) for x in before[:2]), 6)
    decode = jax.jit(partial(decode_attention, mesh=mesh, batch_axes="data"))
    got = decode(given[0], *striped, length=4, prefix=shared)
    np.testing.assert_allclose(got, decode_attention(*given, length=4, prefix=before), rtol=1e-5, atol=1e-5)


def positions_with_gaps(token: jax.Array) -> jax.Array:
    """Return -7 -6 -5, -2 -1 0, 3 4 5 ...: a step of five positions has three tokens. The first are negative."""
    return token + token // 3 * 2 - 7


# Positions where the prefixes of the queries end, different in each context. Context 3 has no prefix.
ENDS = np.stack([np.repeat([-7, -2], [5, 6]), np.arange(-7, 4), np.repeat([-7, 3], [9, 2]), np.full(11, -9)])
MASKED = {"position_of": positions_with_gaps, "logits_soft_cap": 2.0}


@pytest.mark.parametrize(("shared", "window"), [(0, (-1, 0)), (6, (4, 0)), slow(0, (4, 0)), slow(6, (-1, 0))])
def test_global_prefix_and_positions(shared, window, draw):
    """Two shared prefixes or none. Empty slots stay hidden when positions are negative."""
    q, k, v = (draw(4, TOKENS, 4, 2, 8)[name] for name in "qkv")
    for x in (q, k, v):
        x[1, :shared], x[3, :shared] = x[0, :shared], x[2, :shared]
    positions = positions_with_gaps(np.arange(TOKENS))
    options = {"local_window_size": window, "logits_soft_cap": 2.0}
    whole = jax.jit(partial(attention, **options))(q, k, v, positions=positions, global_prefix=ENDS)
    before = Prefix(filled(k[::2], shared, 1e30), filled(v[::2], shared, -1e30), shared) if shared else None
    decode = jax.jit(partial(decode_attention, **MASKED, local_window_size=window))
    for new in (1, 3):
        for length in range(new, TOKENS - shared + 1):
            caches = filled(k[:, shared:], length, 1e30), filled(v[:, shared:], length, -1e30)
            tokens = slice(shared + length - new, shared + length)
            got = decode(q[:, tokens], *caches, length=length, prefix=before, global_prefix=ENDS[:, tokens])
            np.testing.assert_allclose(got, whole[:, tokens], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ends", [ENDS, slow(ENDS[1])], ids=["each_context", "all_contexts"])
def test_global_prefix_with_sharded_caches(ends, eight_devices, draw):
    q, k, v = (draw(4, TOKENS, 4, 2, 8)[name] for name in "qkv")
    before = Prefix(k[:2, :6], v[:2, :6], 6)
    given, options = (q[:, 8:10], k[:, 6:10], v[:, 6:10]), MASKED | {"local_window_size": (1, 0)}
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "seq"))
    striped = [to_layout(x, "striped", 2) for x in given[1:]]
    shared = Prefix(*(to_layout(x, "striped", 2) for x in before[:2]), 6)
    decode = jax.jit(partial(decode_attention, mesh=mesh, batch_axes="data", **options))
    got = decode(given[0], *striped, length=4, prefix=shared, global_prefix=ends[..., 8:10])
    expected = decode_attention(*given, length=4, prefix=before, global_prefix=ends[..., 8:10], **options)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_prefixes_across_shards_of_the_batch_raise(eight_devices, draw):
    q, k, v = (draw(6, TOKENS, 4, 2, 8)[name] for name in "qkv")
    mesh = Mesh(np.array(jax.devices()[:2]).reshape(2, 1), ("data", "seq"))
    with pytest.raises(ValueError, match=r"^prefix: expected a number of prefixes that divides the 2 shards"):
        decode_attention(q, k, v, length=TOKENS, prefix=Prefix(k[:3], v[:3], 1), mesh=mesh, batch_axes="data")


def alike(arrays: dict[str, np.ndarray], shared: int) -> list[np.ndarray]:
    """Return q, k and v of contexts that start with the same `shared` tokens."""
    for x in arrays.values():
        x[:, :shared] = x[:1, :shared]
    return [arrays[name] for name in "qkv"]


def test_cache_with_another_dtype_than_the_queries(draw):
    """Keys, values and q are each rounded once."""
    arrays = draw(2, TOKENS, 4, 2, 16)
    q, k, v = (arrays[name] for name in "qkv")
    kept = [append_to_cache(jnp.zeros((2, CAPACITY, 2, 16), jnp.bfloat16), x, 0) for x in (k, v)]
    got = decode_attention(q[:, -2:], *kept, length=TOKENS, prefix=None)
    assert (kept[0].dtype, got.dtype) == (jnp.bfloat16, jnp.float32)
    rounded = [x.astype(jnp.bfloat16).astype(np.float32) for x in (q, k, v)]
    np.testing.assert_allclose(got, attention(*rounded)[:, -2:], atol=0.01)


def test_default_scale_and_bfloat16(draw):
    arrays = {name: jnp.asarray(x, jnp.bfloat16) for name, x in draw(1, TOKENS, 4, 2, 16).items()}
    q, k, v = (arrays[name] for name in "qkv")
    got = jax.jit(partial(decode_attention, length=TOKENS))(q[:, -2:], k, v)
    assert got.dtype == jnp.bfloat16
    exact = jax.jit(attention)(*(x.astype(jnp.float32) for x in (q, k, v)))[:, -2:]
    np.testing.assert_allclose(np.asarray(got, np.float32), exact, atol=0.02)


def test_an_empty_batch_gives_an_empty_result(draw):
    arrays = draw(1, TOKENS, 4, 2, 8)
    q, k, v = (arrays[name][:0] for name in "qkv")
    o, lse = decode_attention(q[:, -2:], k, v, length=np.zeros(0, int), return_residual=True)
    assert (o.shape, lse.shape) == ((0, 2, 4, 8), (0, 2, 4))


def test_invalid_arguments_are_named(draw):
    arrays = draw(1, TOKENS, 4, 2, 8)
    q, k, v = (arrays[name] for name in "qkv")
    wrong = [
        ("k_cache", (q[:, :, :3], k, v), 5),
        ("k_cache", (q[..., :4], k, v), TOKENS),
        ("k_cache", (q, k[:0], v[:0]), TOKENS),
        ("v_cache", (q, k, v[:, :5]), TOKENS),
        ("q", (q, k[:, :5], v[:, :5]), TOKENS),
        ("length", (q[:, :3], k, v), 2),
        ("length", (q[:, :3], k, v), TOKENS + 1),
        ("length", (q[:, :3], k, v), np.int64(TOKENS + 1)),
        ("length", (q[:, :3], k, v), jnp.int32(2)),
        ("length", (q[:, :3], k, v), np.array([3] * (len(q) - 1) + [2])),
        ("length", (q[:, :3], k, v), np.full(len(q) + 1, 3)),
        ("k_cache", (q, k.astype(np.int8), v), TOKENS),
        ("q", (q[0], k, v), TOKENS),
        ("q", (q[:, :0], k, v), TOKENS),
        ("v_cache", (q, k, v[0]), TOKENS),
        ("v_cache", (q, k, v.astype(jnp.float8_e4m3fn)), TOKENS),
    ]
    for count in (-1, TOKENS + 1, np.int64(TOKENS + 1)):
        with pytest.raises(ValueError, match=f"^prefix.length: expected 0 ... {TOKENS} tokens, got"):
            decode_attention(q, k, v, length=TOKENS, prefix=Prefix(k, v, count))
    with pytest.raises(ValueError, match=r"^prefix.k: expected float32"):
        decode_attention(q, k, v, length=TOKENS, prefix=Prefix(k.astype(np.int8), v, 1))
    for prefix in (k[:1, :, :1], k[:0]), (k[:1], v[:1, ..., :4]):
        with pytest.raises(ValueError, match=r"^prefix: expected \(P, tokens, 2, 8\)"):
            decode_attention(q, k, v, length=TOKENS, prefix=Prefix(*prefix, 3))
    with pytest.raises(ValueError, match=r"^prefix: expected a Prefix, got tuple"):
        decode_attention(q, k, v, length=TOKENS, prefix=(k, v, 1))
    for name, window, ends in (
        ("global_prefix", None, np.zeros(TOKENS, int)),
        ("global_prefix", 2, np.zeros(TOKENS)),
        ("global_prefix", 2, np.zeros((2, TOKENS), int)),
        ("local_window_size", (-2, 0), np.zeros(TOKENS, int)),
        ("local_window_size", (-1, 0), None),
    ):
        with pytest.raises(ValueError, match=f"^{name}: "):
            decode_attention(q, k, v, length=TOKENS, local_window_size=window, global_prefix=ends)
    for name, given, length in wrong:
        with pytest.raises(ValueError, match=f"^{name}: "):
            decode_attention(*given, length=length)


@pytest.fixture(scope="module")
def mesh(eight_devices: None) -> Mesh:
    return Mesh(np.array(jax.devices()[:4]).reshape(1, 4), ("data", "seq"))


@pytest.mark.parametrize("shards", [slow(1), 4])
def test_contexts_of_different_lengths(shards, mesh, draw):
    """Each context continues at its own length, also with sinks, slopes, wide values and a shared prefix."""
    q, k, v = alike(draw(2, TOKENS, 4, 2, 8), 3)
    v = np.concatenate([v, v[..., ::-2]], axis=-1)
    options = {
        "sinks": jnp.array([0.5, -1, 2, 0]),
        "alibi_slopes": jnp.array([0.5, 0.1, 0, -0.2]),
        "local_window_size": 6,
    }
    options |= {"logits_soft_cap": jnp.float32(2), "return_residual": True}
    whole = jax.jit(partial(attention, **options))(q, k, v)
    where = {"mesh": mesh, "batch_axes": "data"} if shards > 1 else {}
    order = partial(to_layout, layout="striped", ring_size=shards)
    before = Prefix(order(filled(k[:1], 3, 1e30)), order(filled(v[:1], 3, -1e30)), 3)
    lengths, new = np.array([1, 5]), 2
    rows = 3 + lengths[:, None] + np.arange(new)
    take = jax.vmap(lambda x, row: x[row])

    def cached(x: np.ndarray) -> jax.Array:
        held = np.stack([filled(x[i : i + 1, 3:], length, 7e8)[0] for i, length in enumerate(lengths)])
        cache = order(held)
        return jax.jit(partial(append_to_cache, **where))(cache, take(x, rows), lengths)

    decode = jax.jit(partial(decode_attention, **options, **where))
    got = decode(take(q, rows), cached(k), cached(v), length=lengths + new, prefix=before)
    for x, y in zip(got, whole, strict=True):
        np.testing.assert_allclose(x, take(y, rows), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [slow(None), 3])
def test_sharded_cache_fills_and_grows(window, mesh, draw):
    """Tokens arrive 1, 2, 3, ... at a time, and a full cache doubles; results equal attention over the whole."""
    arrays = draw(2, 26, 4, 2, 8)
    q, k, v = (arrays[name] for name in "qkv")
    options = {"local_window_size": window, "logits_soft_cap": 2.0}
    whole = jax.jit(partial(attention, **options))(q, k, v)
    place = NamedSharding(mesh, PartitionSpec("data", "seq"))
    where = {"mesh": mesh, "batch_axes": "data"}

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(k_cache, v_cache, q, k, v, length):
        k_cache, v_cache = (append_to_cache(x, y, length, **where) for x, y in ((k_cache, k), (v_cache, v)))
        o = decode_attention(q, k_cache, v_cache, length=length + q.shape[1], **where, **options)
        return o, k_cache, v_cache

    k_cache, v_cache = (jax.device_put(np.full((2, 8, 2, 8), 7e8, np.float32), place) for _ in range(2))
    length = 0
    for new in (1, 2, 3, 4, 5, 6, 5):
        tokens = slice(length, length + new)
        while length + new > k_cache.shape[1]:
            grow = jax.jit(partial(grow_cache, capacity=2 * k_cache.shape[1], **where))
            k_cache, v_cache = grow(k_cache), grow(v_cache)
        o, k_cache, v_cache = step(k_cache, v_cache, q[:, tokens], k[:, tokens], v[:, tokens], length)
        np.testing.assert_allclose(o, whole[:, tokens], rtol=1e-5, atol=1e-5, err_msg=f"{length} + {new}")
        length += new
    assert length == 26
    assert k_cache.shape[1] == 32
    assert k_cache.sharding.is_equivalent_to(place, 4)
    np.testing.assert_array_equal(np.asarray(k_cache)[:, :7], k[:, 0:26:4])  # device 0 holds every fourth token


def test_sharded_prefix(mesh, draw):
    """Six shared tokens over four devices, and five own tokens per context."""
    q, k, v = alike(draw(2, TOKENS, 4, 2, 8), 6)
    whole = jax.jit(attention)(q, k, v)
    place = NamedSharding(mesh, PartitionSpec(None, "seq"))
    striped = lambda x, held: jax.device_put(to_layout(filled(x, held, 7e8), "striped", 4), place)  # noqa: E731
    before = Prefix(striped(k[:1], 6), striped(v[:1], 6), 6)
    caches = striped(k[:, 6:], 5), striped(v[:, 6:], 5)
    decode = jax.jit(partial(decode_attention, mesh=mesh, batch_axes="data"))
    np.testing.assert_allclose(decode(q[:, 9:], *caches, length=5, prefix=before), whole[:, 9:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("new", [1, 2, 5])
@pytest.mark.parametrize("shards", [1, 4])
def test_step_does_not_copy_the_cache(shards, new, mesh):
    """XLA copied the cache eight times in a program that writes a single slot and attends to it."""
    where = {} if shards == 1 else {"mesh": mesh, "batch_axes": "data"}
    placed = None if shards == 1 else NamedSharding(mesh, PartitionSpec("data", "seq"))
    cache = jax.ShapeDtypeStruct((2, 256, 1, 8), jnp.float32, sharding=placed)
    tokens = jax.ShapeDtypeStruct((2, new, 1, 8), jnp.float32)

    def step(k_cache, v_cache, x, length):
        k_cache, v_cache = (append_to_cache(kept, x, length, **where) for kept in (k_cache, v_cache))
        return decode_attention(x, k_cache, v_cache, length=length + new, **where), k_cache, v_cache

    program = jax.jit(step, donate_argnums=(0, 1)).lower(cache, cache, tokens, 0).compile().as_text()
    held = f"f32[2,{256 // shards},1,8]"
    assert f"{held}{{3,2,1,0}} parameter" in program
    assert not [line for line in program.splitlines() if " copy(" in line and held in line]


@pytest.mark.parametrize("shards", [1, 4])
def test_tokens_are_written_to_their_slots_only(shards, mesh):
    """Any number of tokens at any length, up to the last slot."""
    where = {} if shards == 1 else {"mesh": mesh, "batch_axes": "data"}
    append = jax.jit(partial(append_to_cache, **where))
    for capacity in (shards, 2 * shards, 8):
        blank = np.random.default_rng(0).normal(size=(2, capacity, 2, 3)).astype(np.float32)
        for new in range(capacity + 1):
            x = np.random.default_rng(1).normal(size=(2, new, 2, 3)).astype(np.float32)
            for length in range(capacity - new + 1):
                expected = np.array(from_layout(blank, "striped", shards))
                expected[:, length : length + new] = x
                expected = to_layout(expected, "striped", shards)
                np.testing.assert_array_equal(append(blank, x, length), expected, err_msg=f"{capacity, length, new}")


def test_invalid_cache_arguments_are_named():
    cache = jnp.zeros((2, 8, 2, 4))
    with pytest.raises(ValueError, match=r"^new: "):
        append_to_cache(cache, jnp.zeros((2, 9, 2, 4)), 0)
    with pytest.raises(ValueError, match=r"^new: "):
        append_to_cache(cache, jnp.zeros((2, 1, 1, 4)), 0)
    for length in (6, np.int64(6), jnp.int32(6), -1):
        with pytest.raises(
            ValueError, match=rf"^length: expected 0 ... 5 tokens, got {length}; enlarge the cache by grow_cache"
        ):
            append_to_cache(cache, jnp.zeros((2, 3, 2, 4)), length)
    with pytest.raises(ValueError, match=r"^capacity: "):
        grow_cache(cache, 7)
    with pytest.raises(ValueError, match=r"^axis_name: "):
        grow_cache(cache, 16, mesh=Mesh(np.array(jax.devices()[:1]), ("data",)))


def test_gradient_of_a_sharded_cache(mesh, draw):
    """The gradient passes the merge over the devices."""
    q, k, v = (draw(2, CAPACITY, 4, 2, 8)[name] for name in "qkv")
    order = partial(to_layout, layout="striped", ring_size=4)

    def loss(q, k, v, order=lambda x: x, **where):  # type: ignore[no-untyped-def]
        return jnp.sin(decode_attention(q, order(k), order(v), length=CAPACITY - 3, **where)).sum()

    gradients = (
        jax.jit(jax.grad(one, (0, 1, 2)))(q[:, :2], k, v) for one in (loss, partial(loss, order=order, mesh=mesh))
    )
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), *gradients)


def test_an_empty_prefix_is_none(draw):
    q, k, v = (draw(2, TOKENS, 4, 2, 8)[name] for name in "qkv")
    attend = partial(decode_attention, q[:, -1:], k, v, length=TOKENS)
    np.testing.assert_array_equal(attend(prefix=Prefix(k[:1, :0], v[:1, :0], 0)), attend())


def test_axes_of_a_sharded_cache(mesh, draw):
    q, k, v = (draw(3, 16, 4, 2, 8)[name] for name in "qkv")
    striped = jax.device_put(k, NamedSharding(mesh, PartitionSpec(None, "seq")))
    for message, call in {
        "k_cache: its tokens are sharded over 'seq'; pass mesh": lambda: decode_attention(
            q[:, :1], striped, v, length=9
        ),
        "cache: its tokens are sharded over 'seq'": lambda: append_to_cache(striped, k[:, :1], 9),
        "batch_axes: the mesh axis 'seq' has another use": lambda: decode_attention(
            q[[0, 0, 0, 0], :1], k[[0] * 4], v[[0] * 4], length=9, mesh=mesh, batch_axes="seq"
        ),
        "head_axes: the mesh has no axis 'x'": lambda: append_to_cache(k, k[:, :1], 9, mesh=mesh, head_axes="x"),
        "capacity: a capacity of 18 does not divide": lambda: grow_cache(k, 18, mesh=mesh),
    }.items():
        with pytest.raises(ValueError, match=f"^{message}"):
            call()
