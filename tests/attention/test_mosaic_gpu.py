"""The Hopper kernels in JAX's GPU interpret mode against the definition in float64.

Copies, barriers, loops and lists of visits are tested. Products are plain arithmetic (hopper.Warpgroup);
benchmarks/attention_gpu.py tests the tensor cores on a GPU.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ringrl.attention.contract import Cotangents, Inputs, Partial, by_head
from ringrl.attention.kernels import mosaic_gpu
from ringrl.attention.kernels.hopper import unsupported
from ringrl.attention.mask import Options, Rule, Side

interpreter = pytest.importorskip(
    "jax._src.pallas.mosaic_gpu.interpret.params", reason=f"jax {jax.__version__} has no GPU interpret mode"
)
callbacks = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks")

pytestmark = pytest.mark.usefixtures("eight_devices")  # each warpgroup needs its own thread

NAMES = ("o", "lse", "dq", "dk", "dv")
TOLERANCE = {"bfloat16": 1.5e-2, "float16": 2e-3}  # relative to the largest value
QUICK = {"xla_backend_optimization_level": 0}  # compiles twice as fast
PLAIN = Rule(is_causal=False)


def sides(*arrays: np.ndarray) -> tuple[Side, Side]:
    """Return (queries, keys) from their positions and segments, and the queries' global prefixes if given."""
    q_positions, q_segments, k_positions, k_segments, *prefix = (jnp.asarray(x, jnp.int32) for x in arrays)
    return Side(q_positions, q_segments, *prefix), Side(k_positions, k_segments)


def places(queries: int, keys: int, kinds: tuple[str, ...]) -> tuple[np.ndarray, ...]:
    """Return positions and segments of queries and keys, one context of each kind."""
    random, tokens = np.random.default_rng(1), max(queries, keys)
    of_kind = {
        "in_order": (np.arange(tokens), np.zeros(tokens)),
        "packed": (np.arange(tokens), np.repeat([3, 1, 2], [tokens // 3, 1, tokens - tokens // 3 - 1])),
        "shuffled": (random.permutation(tokens), np.zeros(tokens)),
    }
    positions, segments = (np.stack([of_kind[kind][i] for kind in kinds]) for i in range(2))
    return positions[:, -queries:], segments[:, -queries:], positions[:, :keys], segments[:, :keys]


class Case:
    """Inputs rounded to the kernel's dtype, with the results of the definition and of the kernels."""

    def __init__(self, draw: Callable, oracle: Callable, where: tuple, dtype: str, head_dim: int, options: Options):
        (batch, queries), keys = where[0].shape, where[2].shape[1]
        arrays = draw(batch, max(queries, keys), 2, 1, head_dim)
        arrays |= {name: arrays[name][:, :queries] for name in ("q", "do", "dlse")}
        arrays |= {name: arrays[name][:, :keys] for name in ("k", "v")}
        rounded = {name: np.asarray(jnp.asarray(x, dtype), np.float32) for name, x in arrays.items() if name != "dlse"}
        expected = oracle(
            rounded | {"dlse": arrays["dlse"]},
            where[:2] + where[4:],
            where[2:4],
            options.rule,
            scale=options.scale,
            logits_soft_cap=options.logits_soft_cap,
        )
        self.options, self.dtype, self.dlse = options, dtype, by_head(jnp.asarray(arrays["dlse"]), 1)
        q, k, v, self.do = (by_head(jnp.asarray(rounded[name], dtype), 1) for name in ("q", "k", "v", "do"))
        self.inputs = Inputs(q, jnp.stack([k, v], axis=1), *sides(*where))
        self.expected = {name: np.asarray(by_head(jnp.asarray(expected[name], jnp.float32), 1)) for name in NAMES}

    def forward(self, start: Partial | None = None, keys: slice = slice(None), **interpreted: Any) -> Partial:
        """Run the forward kernel over some of the keys."""
        side = jax.tree.map(lambda x: x[:, keys], self.inputs.keys)
        inputs = self.inputs._replace(kv=self.inputs.kv[:, :, keys], keys=side)
        parameters = interpreter.InterpretGPUParams(**interpreted)
        run = partial(mosaic_gpu.forward, options=self.options, interpret=parameters)
        return jax.jit(lambda inputs, start: run(inputs, start=start), compiler_options=QUICK)(inputs, start)

    def backward(self, **interpreted: Any) -> tuple[jax.Array, ...]:
        """Return dq, dk, dv from the definition's log-sum-exp and output, which checks the backward pass alone."""
        lse = jnp.asarray(self.expected["lse"])
        dlse = jnp.where(jnp.isneginf(lse), 0, self.dlse)
        delta = (self.expected["o"] * self.do.astype(jnp.float32)).sum(-1) - dlse
        parameters = interpreter.InterpretGPUParams(**interpreted)
        cotangents = Cotangents(self.do, lse, delta)
        run = partial(mosaic_gpu.backward, options=self.options, interpret=parameters)
        both = jax.jit(lambda inputs, given: run(inputs, cotangents=given), compiler_options=QUICK)
        dq, dkv = both(self.inputs, cotangents)
        return dq, dkv[:, 0], dkv[:, 1]

    def check(self, **found: jax.Array) -> None:
        """Check each result; queries without visible keys give exactly 0 and -inf."""
        blind = np.isneginf(self.expected["lse"])
        for name, x in found.items():
            x, expected = np.asarray(x), self.expected[name]
            assert x.dtype == np.float32, name
            if name in ("o", "dq"):
                np.testing.assert_array_equal(x[blind], 0, err_msg=name)
            if name == "lse":
                np.testing.assert_array_equal(np.isneginf(x), blind)
                x, expected = x[~blind], expected[~blind]
            error = np.abs(x - expected).max() / np.abs(expected).max()
            assert error <= TOLERANCE[self.dtype], (name, error)


def with_blind_queries(where: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
    """Add two contexts: half of the queries sees no key in one, no query in the other."""
    q_positions, q_segments, k_positions, k_segments = (np.concatenate([x, x[:1], x[:1]]) for x in where)
    q_segments[-2, q_segments.shape[1] // 2 :] = q_segments[-1] = 9
    return q_positions, q_segments, k_positions, k_segments


CASES = {
    # Two query heads per key head; lengths that no tile divides, S != K.
    "causal": (with_blind_queries(places(100, 150, ("shuffled",))), "bfloat16", Rule()),
    "window": (places(140, 70, ("in_order",)), "float16", Rule(is_causal=False, window=(40, 20))),
    "prefix": (
        (*places(140, 140, ("packed",)), np.repeat([0, 30, 110], [30, 80, 30])[None]),
        "bfloat16",
        Rule(window=(9, 0)),
    ),
}


@pytest.mark.parametrize(
    "name", ["causal", *(pytest.param(name, marks=pytest.mark.slow) for name in ("window", "prefix"))]
)
def test_values_and_each_gradient(name, draw, oracle):
    """Includes queries without visible keys and keys without visible queries; unwritten memory would be NaN."""
    where, dtype, rule = CASES[name]
    case = Case(draw, oracle, where, dtype, 64, Options(rule, 0.2, None, 64, 64))
    if name == "causal":
        blind = np.isneginf(case.expected["lse"]).reshape(-1, 2, 100)
        assert blind[-1].all()
        assert blind[-2, :, 50:].all()
        assert not blind[-2, :, :50].any()
    case.check(**dict(zip(("o", "lse"), case.forward(uninitialized_memory="nan"), strict=True)))
    case.check(**dict(zip(("dq", "dk", "dv"), case.backward(uninitialized_memory="nan"), strict=True)))


def test_forward_continues_from_start(draw, oracle):
    """Two halves of the keys in turn; the first queries do not see the second half."""
    case = Case(draw, oracle, places(100, 100, ("in_order",)), "bfloat16", 64, Options(Rule(), 0.3, None, 64, 64))
    later = case.forward(keys=slice(64, None))
    assert np.isneginf(np.asarray(later.lse).reshape(2, 100)[:, :64]).all()
    case.check(**dict(zip(("o", "lse"), case.forward(later, keys=slice(64)), strict=True)))


def test_hidden_tiles_are_not_read_and_copies_do_not_race(draw, oracle):
    """NaN in a hidden tile does not spread; reads of a slot wait for copies, and copies for reads."""
    q_positions, q_segments, k_positions, k_segments = places(128, 192, ("in_order",))
    where = (q_positions, q_segments, k_positions, np.where(np.arange(192) < 128, k_segments, 9))
    case = Case(draw, oracle, where, "bfloat16", 128, Options(PLAIN, 0.2, 2.0, 64, 64))
    case.inputs = case.inputs._replace(kv=case.inputs.kv.at[:, :, 128:].set(jnp.nan))
    case.check(**dict(zip(("o", "lse"), case.forward(detect_races=True), strict=True)))
    assert not callbacks.get_races().races_found
    dq, *gradients = case.backward(detect_races=True)
    assert not callbacks.get_races().races_found
    case.check(dq=dq)
    for name, x in zip(("dk", "dv"), gradients, strict=True):
        case.expected[name] = case.expected[name][:, :128]
        case.check(**{name: x[:, :128]})


def test_unsupported_arguments_are_named():
    options = Options(Rule(), 0.3)
    assert unsupported(jnp.bfloat16, 128, options) is None
    rejected = [
        ("float32", unsupported(jnp.float32, 64, options)),
        ("head_dim", unsupported(jnp.float16, 80, options)),
        ("scale", unsupported(jnp.float16, 64, Options(Rule(), -1.0))),
    ]
    for name, reason in rejected:
        assert reason is not None
        assert name in reason
