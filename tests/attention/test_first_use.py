"""A kernel is checked before its first use. Stand-ins for Pallas kernels run on the host."""

import contextlib
import dataclasses
import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, Mesh, PartitionSpec

from ringrl.attention import attention, kernels, ring_attention
from ringrl.attention.contract import Gradients, Partial, merge
from ringrl.attention.kernels import Kernel, check, mosaic_tpu
from ringrl.attention.mask import Options, Rule, visible

pytestmark = pytest.mark.usefixtures("eight_devices")


def logits(inputs, options):  # type: ignore[no-untyped-def]
    """Return capped logits and their mask (heads, rows, keys)."""
    q, k = (x.astype("float32") for x in (inputs.q, inputs.kv[:, 0]))
    s = jnp.einsum("hqd,hkd->hqk", q, k, precision="highest") * options.scale
    if options.logits_soft_cap:
        s = options.logits_soft_cap * jnp.tanh(s / options.logits_soft_cap)
    mask = jnp.tile(visible(options.rule, inputs.queries, inputs.keys), (1, inputs.groups, 1))
    return s, jnp.repeat(mask, inputs.kv_heads, axis=0)


def dense(inputs, options, start=None):  # type: ignore[no-untyped-def]
    """Attend with all logits at once, which compiles faster than tiles."""
    s, mask = logits(inputs, options)
    lse = jax.nn.logsumexp(jnp.where(mask, s, -jnp.inf), axis=-1)
    p = jnp.where(mask, jnp.exp(s - jnp.where(jnp.isneginf(lse), 0, lse)[..., None]), 0)
    part = Partial(jnp.einsum("hqk,hkd->hqd", p, inputs.kv[:, 1].astype("float32"), precision="highest"), lse)
    return part if start is None else merge(part, start)


def dense_gradients(inputs, options, cotangents, dq=None):  # type: ignore[no-untyped-def]
    """Differentiate the logits, given the global log-sum-exp."""
    do, v = (x.astype("float32") for x in (cotangents.do, inputs.kv[:, 1]))
    s, of_logits = jax.vjp(lambda x: logits(x, options)[0], inputs)
    p = jnp.where(logits(inputs, options)[1], jnp.exp(s - cotangents.lse[..., None]), 0)
    dp = jnp.einsum("hqd,hkd->hqk", do, v, precision="highest")
    (found,) = of_logits(p * (dp - cotangents.delta[..., None]))
    dv = jnp.einsum("hqk,hqd->hkd", p, do, precision="highest")
    dq = found.q.astype("float32") + (0 if dq is None else dq)
    return Gradients(dq, jnp.stack([found.kv[:, 0].astype("float32"), dv], axis=1))


RIGHT = Kernel(dense, dense_gradients, lambda *_: None)
CPU = AbstractDevice("cpu", 1, "cpu")


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Forget all verdicts and warnings, and check a short case. Return the file of the verdicts."""
    monkeypatch.setattr(check, "TOKENS", 96)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("RINGRL_KERNEL_CHECK", raising=False)
    check._verdict.cache_clear()
    kernels._warn_once.cache_clear()
    return tmp_path / "ringrl" / "kernels.json"


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> Callable[[Kernel], None]:
    """Return a function that makes a stand-in the kernel of host devices."""
    named = kernels.kernel_named

    def use(kernel: Kernel) -> None:
        monkeypatch.setattr(kernels, "native_to", lambda device: "mosaic_tpu")
        monkeypatch.setattr(kernels, "kernel_named", lambda name: kernel if name == "mosaic_tpu" else named(name))

    return use


def forward(**changes: Callable) -> Kernel:
    """Return a kernel whose forward pass changes its inputs, options, start or results."""
    same = lambda x: x  # noqa: E731

    def run(inputs, options, start=None):  # type: ignore[no-untyped-def]
        inputs, options = changes.get("inputs", same)(inputs), changes.get("options", same)(options)
        return Partial(*changes.get("results", same)(dense(inputs, options, changes.get("start", same)(start))))

    return RIGHT._replace(forward=run)


def backward(change: Callable) -> Kernel:
    """Return a kernel that changes its gradients."""
    return RIGHT._replace(backward=lambda *given: Gradients(*change(*dense_gradients(*given))))


def without_last_key(inputs):  # type: ignore[no-untyped-def]
    return inputs._replace(kv=inputs.kv[:, :, :-1], keys=jax.tree.map(lambda x: x[:, :-1], inputs.keys))


def one_further(inputs):  # type: ignore[no-untyped-def]
    return inputs._replace(queries=inputs.queries._replace(positions=inputs.queries.positions + 1))


def without_prefix(inputs):  # type: ignore[no-untyped-def]
    return inputs._replace(queries=inputs.queries._replace(prefix=None))


def without_segments(inputs):  # type: ignore[no-untyped-def]
    return inputs._replace(keys=inputs.keys._replace(segment_ids=inputs.queries.segment_ids))


CAUSAL = Options(Rule(), 0.1)
FULL, WINDOW, CAPPED = (dataclasses.replace(CAUSAL, **x) for x in (
    {"rule": Rule(False)}, {"rule": Rule(False, (300, 100))}, {"logits_soft_cap": 30.0},
))  # fmt: skip
scaled = forward(options=lambda x: dataclasses.replace(x, scale=1.1 * x.scale))
MUTATIONS = {  # kernel, the names that differ, dtype, options of the call
    "scale": (scaled, "o lse", "bfloat16", CAUSAL),
    "scale, window": (scaled, "o lse", "bfloat16", WINDOW),
    "last key dropped": (forward(inputs=without_last_key), "o lse", "bfloat16", CAUSAL),
    "last key dropped, soft cap": (forward(inputs=without_last_key), "o lse", "bfloat16", CAPPED),
    "mask off by one": (forward(inputs=one_further), "o lse", "bfloat16", CAUSAL),
    "window off by one": (forward(inputs=one_further), "o lse", "bfloat16", WINDOW),
    "prefix ignored": (forward(inputs=without_prefix), "o lse", "bfloat16", WINDOW),
    "blind queries see": (forward(inputs=without_segments), "o lse", "bfloat16", FULL),
    "start ignored": (forward(start=lambda _: None), "o lse", "bfloat16", CAUSAL),
    "lse shifted": (forward(results=lambda x: (x[0], x[1] + 0.02)), "lse", "bfloat16", CAUSAL),
    "o rounded": (forward(results=lambda x: (jnp.bfloat16(x[0]).astype("float32"), x[1])), "o", "float32", CAUSAL),
    "dq doubled": (backward(lambda dq, dkv: (2 * dq, dkv)), "dq", "bfloat16", CAUSAL),
    "dk and dv swapped": (backward(lambda dq, dkv: (dq, dkv[:, ::-1])), "dk dv", "bfloat16", CAUSAL),
    "nan": (backward(lambda dq, dkv: (dq, dkv.at[0, 1, 0, 0].set(jnp.nan))), "dv", "bfloat16", CAUSAL),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in ("scale, window", "last key dropped, soft cap") else name
        for name in MUTATIONS
    ],
)
def test_a_wrong_kernel_falls_back_with_one_warning(name, native, caplog):
    kernel, names, dtype, options = MUTATIONS[name]
    native(kernel)
    for _ in range(2):
        q = jax.ShapeDtypeStruct((1, 8, 2, 16), dtype)
        assert kernels.with_kernel(options, None, q, CPU).implementation == "xla"
    (line,) = caplog.messages
    differing = line.split(" computes another ")[1].split(f" ({dtype}, ")[0]
    assert [one.split()[0] for one in differing.split(", ")] == names.split()
    assert line.startswith('attention falls back to plain XLA: the kernel "mosaic_tpu" computes another')
    assert line.endswith(f"; {check.REPORT}")


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
@pytest.mark.parametrize("options", [CAUSAL, FULL, WINDOW, CAPPED], ids=["causal", "full", "window", "capped"])
def test_a_right_kernel_is_used(dtype, options, native, caplog, cache):
    native(RIGHT)
    q = jax.ShapeDtypeStruct((1, 8, 2, 16), dtype)
    assert kernels.with_kernel(options, None, q, CPU).implementation == "mosaic_tpu"
    assert not caplog.messages
    assert list(json.loads(cache.read_text()).values()) == [""]


def wrong_when_used(inputs, options, start=None):  # type: ignore[no-untyped-def]
    """Attend rightly in the check, and give 7 in calls, to see which kernel a call uses."""
    part = dense(inputs, options, start)
    return part if inputs.queries.positions.shape[1] == check.TOKENS else Partial(0 * part.o + 7, part.lse)


AROUND = ("nothing", "shard_map", "vmap", "ring", "set_mesh")
WRONG = MUTATIONS["dq doubled"][0]  # found wrong around nothing, it is found wrong around all


@pytest.mark.parametrize(
    ("around", "kernel"),
    [(around, RIGHT._replace(forward=wrong_when_used)) for around in AROUND]
    + [("nothing", WRONG)]
    + [pytest.param(around, WRONG, marks=pytest.mark.slow) for around in AROUND[1:]],
)
def test_the_check_runs_inside_transformations(around, kernel, native):
    native(kernel)
    q = jnp.asarray(np.random.default_rng(0).normal(size=(8, 32, 2, 8)), "float32")
    mesh, part = Mesh(np.array(jax.devices()[:8]), ("seq",)), PartitionSpec("seq")
    run = {
        "nothing": attention,
        "shard_map": jax.shard_map(attention, mesh=mesh, in_specs=part, out_specs=part),
        "vmap": jax.vmap(attention),
        "ring": partial(ring_attention, mesh=mesh),
        "set_mesh": attention,
    }[around]
    with jax.set_mesh(mesh) if around == "set_mesh" else contextlib.nullcontext():
        value, gradient = jax.jit(jax.value_and_grad(lambda q: run(q, q, q).sum()))(q)
    assert np.isfinite(gradient).all()
    assert (value == 7 * q.size) == (kernel.forward is wrong_when_used)


def never(*_):  # type: ignore[no-untyped-def]
    raise AssertionError("no check was due")


UNTOUCHED = RIGHT._replace(forward=never, backward=never)


@pytest.mark.parametrize("kernel", [RIGHT, MUTATIONS["dq doubled"][0]])
def test_the_next_process_reads_the_verdict(kernel, cache):
    first = check.failure(kernel, CAUSAL, jnp.float32, 16, CPU)
    check._verdict.cache_clear()
    assert check.failure(UNTOUCHED, CAUSAL, jnp.float32, 16, CPU) == first
    assert (first is None) == (kernel is RIGHT)
    # Other values of scale and window are the same case; other kinds of masks, widths and dtypes are not.
    same = dataclasses.replace(CAUSAL, scale=0.7)
    assert check.failure(UNTOUCHED, same, jnp.float32, 16, CPU) == first
    for options, width in ((dataclasses.replace(CAUSAL, rule=Rule(False)), 16), (CAUSAL, 24)):
        assert "AssertionError: no check was due" in check.failure(UNTOUCHED, options, jnp.float32, width, CPU)
    assert len(json.loads(cache.read_text())) == 1, "errors are not stored"


@pytest.mark.parametrize("damage", ["", "[1]", "{"])
def test_damaged_and_unwritable_caches_are_no_errors(damage, cache, monkeypatch):
    cache.parent.mkdir()
    cache.write_text(damage)
    assert check.failure(RIGHT, CAUSAL, jnp.float32, 16, CPU) is None
    assert list(cache.parent.iterdir()) == [cache], "written as a whole"
    assert list(json.loads(cache.read_text()).values()) == [""]
    check._verdict.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/cache")
    assert check.failure(RIGHT, CAUSAL, jnp.float32, 16, CPU) is None


def test_a_kernel_that_does_not_compile_falls_back(native, caplog):
    def refuse(*_):  # type: ignore[no-untyped-def]
        raise NotImplementedError("the compiler\nrefuses")

    native(RIGHT._replace(backward=refuse))
    for _ in range(2):
        q = jax.ShapeDtypeStruct((1, 8, 2, 16), "bfloat16")
        assert kernels.with_kernel(CAUSAL, None, q, CPU).implementation == "xla"
    (line,) = caplog.messages
    assert '"mosaic_tpu" does not run (bfloat16, head_dim 16, cpu): NotImplementedError: the compiler refuses;' in line


@pytest.mark.parametrize("why", ["named", "off", "not here", "another kind"])
def test_no_check(why, native, monkeypatch, caplog):
    wrong = MUTATIONS["scale"][0]
    device = {
        "not here": AbstractDevice("TPU v5p", 1, "tpu"),
        "another kind": AbstractDevice("other", 1, "cpu"),
    }.get(why, CPU)
    native(wrong)
    if why == "off":
        monkeypatch.setenv("RINGRL_KERNEL_CHECK", "off")
    name, q = "mosaic_tpu" if why == "named" else None, jax.ShapeDtypeStruct((1, 8, 2, 16), "float32")
    with caplog.at_level(logging.WARNING):
        assert kernels.with_kernel(CAUSAL, name, q, device).implementation == "mosaic_tpu"
    assert not caplog.messages


@pytest.mark.parametrize("rule", [Rule(), pytest.param(Rule(False, (1, 1)), marks=pytest.mark.slow)])
def test_the_tpu_kernel_passes_in_the_interpreter(rule):
    interpreted = (partial(run, interpret=True) for run in (mosaic_tpu.forward, mosaic_tpu.backward))
    options = dataclasses.replace(CAUSAL, rule=rule)
    assert check.failure(Kernel(*interpreted, lambda *_: None), options, jnp.bfloat16, 64, CPU) is None
