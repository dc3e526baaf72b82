"""Correctness and speed of attention on one NVIDIA GPU, in less than eight minutes.

    python benchmarks/attention_gpu.py [--kernel mosaic_gpu|cudnn] [--seconds 450] [--runs 5] [--json FILE]

First, all values and gradients are compared with float64 on the host. Second, the overhead of a ring: eight calls over
an eighth of the keys each, against one call. Third, rates in TFLOP/s of useful operations: 4 B H S^2 D forward, half of
that if causal, 2.5 times that backward, without recomputation. Rates are medians over the runs, for 32,768 tokens or
one sequence at a time, 2,048 features in heads of 64 or 128, bfloat16. Peers: jax.nn.dot_product_attention with cuDNN,
tokamax if installed, and the XLA kernel of this library (short sequences only).
"""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from common import make_parser, positive, save_json

from ringrl.attention.contract import Cotangents, Inputs, Partial, by_token
from ringrl.attention.kernels import Kernel, kernel_named, native_to, xla
from ringrl.attention.mask import Options, Rule, Side, visible

FEATURES, TOKENS = 2_048, 32_768
LENGTHS = (4_096, 16_384, 65_536)
LONGEST_FOR_XLA = 4_096
RESULTS = ("o", "lse", "dq", "dk", "dv")
NAMES = ("ours", "cudnn", "tokamax", "xla")
RING = 8
TOLERANCE = {"bfloat16": 1.5e-2, "float16": 2e-3}  # relative to the largest value


class Problem(NamedTuple):
    """The inputs of a kernel, with a cotangent of the output."""

    inputs: Inputs
    do: jax.Array
    options: Options


def side(positions: np.ndarray, segment_ids: np.ndarray | None = None) -> Side:
    """Return positions and segment ids of one context."""
    segment_ids = np.zeros_like(positions) if segment_ids is None else segment_ids
    return Side(*(jnp.asarray(x, jnp.int32)[None] for x in (positions, segment_ids)))


def random_problem(shape: tuple[int, ...], keys: int, dtype: str, sides: tuple[Side, Side], rule: Rule) -> Problem:
    """Return random arrays for queries (B, Hkv, G, S, D), with the same sides in all contexts of the batch."""
    batch, kv_heads, groups, queries, head_dim = shape
    heads = batch * kv_heads
    shapes = (heads, groups * queries, head_dim), (heads, 2, keys, head_dim), (heads, groups * queries, head_dim)
    draws = zip(jax.random.split(jax.random.key(0), 3), shapes, strict=True)
    q, kv, do = (jax.random.normal(key, shape, jnp.float32).astype(dtype) for key, shape in draws)
    sides = tuple(Side(*(jnp.tile(x, (batch, 1)) for x in each)) for each in sides)
    return Problem(Inputs(q, kv, *sides), do, Options(rule, head_dim**-0.5))


def definition(problem: Problem, dlse: np.ndarray) -> dict[str, np.ndarray]:
    """Return o, lse, dq, dk, dv in float64 on the host, one key head at a time."""
    inputs, scale = problem.inputs, problem.options.scale
    q, kv, do = (np.asarray(x.astype(jnp.float32), np.float64) for x in (inputs.q, inputs.kv, problem.do))
    masks = np.asarray(visible(problem.options.rule, inputs.queries, inputs.keys))
    found: dict[str, list[np.ndarray]] = {name: [] for name in RESULTS}
    for head, (k, v) in enumerate(kv):
        mask = np.tile(masks[head // inputs.kv_heads], (inputs.groups, 1))
        s = np.where(mask, scale * q[head] @ k.T, -np.inf)
        with np.errstate(divide="ignore"):
            maximum = np.maximum(s.max(1, keepdims=True), -1e30)
            lse = maximum[:, 0] + np.log(np.exp(s - maximum).sum(1))
        p = np.exp(s - np.where(np.isneginf(lse), 0, lse)[:, None])
        o = p @ v
        delta = (o * do[head]).sum(1) - np.where(np.isneginf(lse), 0, dlse[head])
        ds = scale * p * (do[head] @ v.T - delta[:, None])
        for name, x in zip(RESULTS, (o, lse, ds @ k, ds.T @ q[head], p.T @ do[head]), strict=True):
            found[name].append(x)
    return {name: np.stack(x) for name, x in found.items()}


def poison(problem: Problem) -> None:
    """Fill memory with NaN, which the next results are likely to reuse, to detect unwritten values."""
    shapes = [x.shape for x in (problem.inputs.q, problem.inputs.kv)] * 3
    jax.block_until_ready([jnp.full(shape, jnp.nan) for shape in shapes])


def part_of_keys(inputs: Inputs, part: slice) -> Inputs:
    """Return the inputs with a part of the keys."""
    return inputs._replace(kv=inputs.kv[:, :, part], keys=Side(*(x[:, part] for x in inputs.keys)))


def largest_errors(kernel: Kernel, problem: Problem) -> dict[str, float]:
    """Return the error of each result relative to its largest value; infinity if non-finite values differ."""
    inputs, do, options = problem
    dlse = np.random.default_rng(1).normal(size=inputs.q.shape[:-1])
    expected = definition(problem, dlse)
    poison(problem)
    forward, backward = (jax.jit(f, static_argnums=1) for f in (kernel.forward, kernel.backward))
    half = inputs.kv.shape[2] // 2
    first, second = (part_of_keys(inputs, part) for part in (slice(half), slice(half, None)))
    o, lse = forward(inputs, options)
    resumed = forward(second, options, forward(first, options))
    blind = np.isneginf(expected["lse"])
    delta = (expected["o"] * np.asarray(do.astype(jnp.float32))).sum(-1) - np.where(blind, 0, dlse)
    rows = (jnp.asarray(x, jnp.float32) for x in (expected["lse"], delta))
    poison(problem)
    dq, dkv = backward(inputs, options, Cotangents(do, *rows))
    results = dict(zip(RESULTS, (o, lse, dq, dkv[:, 0], dkv[:, 1]), strict=True))
    errors = {name: relative_error(np.asarray(x), expected[name]) for name, x in results.items()}
    return errors | {"o in two parts": relative_error(np.asarray(resumed.o), expected["o"])}


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference over the largest value; infinity if -inf or non-finite values differ."""
    infinite = np.isneginf(expected)
    if not np.array_equal(np.isneginf(found), infinite) or not np.isfinite(found[~infinite]).all():
        return float("inf")
    found, expected = found[~infinite], expected[~infinite]
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-9))


def checks() -> Iterator[tuple[str, str, Problem]]:
    """Yield (name, dtype, problem): all masks, dtypes and head sizes, two query heads per key head, odd lengths."""
    queries, keys = np.arange(300, 1300), np.arange(1300)
    segments = np.repeat([4, 1, 7], [500, 450, 350])
    shuffled = np.random.default_rng(0).permutation(1300)
    masks = {
        "causal": (Rule(), (side(queries), side(keys))),
        "full": (Rule(is_causal=False), (side(queries), side(keys))),
        "window": (Rule(window=(200, 0)), (side(queries), side(keys))),
        "packed": (Rule(), (side(queries, segments[300:]), side(keys, segments))),
        "shuffled": (Rule(), (side(shuffled[300:]), side(shuffled))),
        "blind rows": (Rule(), (side(queries - 500), side(keys))),
    }
    for number, (name, (rule, sides)) in enumerate(masks.items()):
        for head_dim in (64, 128):
            dtype = ("bfloat16", "float16")[(number + head_dim // 64) % 2]
            shape = (2, 2, 2, len(queries), head_dim)
            yield f"{name} D{head_dim} {dtype}", dtype, random_problem(shape, len(keys), dtype, sides, rule)
    # A hop of a zigzag ring: each device has an early and a late chunk.
    queries, keys = (
        np.concatenate([np.arange(2_048) + start for start in pair]) for pair in ((2**11, 2**14), (0, 2**15))
    )
    hop = random_problem((1, 1, 2, 4_096, 128), 4_096, "bfloat16", (side(queries), side(keys)), Rule())
    yield "zigzag hop D128 bfloat16", "bfloat16", hop
    # Long enough for several cells of work per multiprocessor.
    yield "long D128 bfloat16", "bfloat16", sequence(4_096, 128, is_causal=True, batch=1, heads=8)


def seconds_per_call(run: Callable[[], Any], runs: int) -> float:
    """Return the median seconds of a call. Short calls are issued in groups, so that the host is not the limit."""
    jax.block_until_ready(run())
    start = time.perf_counter()
    jax.block_until_ready(run())
    together = max(1, min(20, int(0.02 / (time.perf_counter() - start))))
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        jax.block_until_ready([run() for _ in range(together)][-1])
        seconds.append((time.perf_counter() - start) / together)
    return sorted(seconds)[runs // 2]


def kernel_passes(forward: Callable, backward: Callable, problem: Problem) -> tuple[Callable, Callable]:
    """Return (forward, backward) of a kernel of this library; the backward pass includes delta."""
    inputs, do, options = problem
    forward = jax.jit(forward, static_argnums=1)
    o, lse = forward(inputs, options)

    @partial(jax.jit, static_argnums=1)
    def gradients(inputs, options, o, lse, do):  # type: ignore[no-untyped-def]
        delta = (o * do.astype(jnp.float32)).sum(-1)
        return backward(inputs, options, Cotangents(do, lse, delta))

    return lambda: forward(inputs, options), lambda: gradients(inputs, options, o, lse, do)


def function_passes(attend: Callable, problem: Problem) -> tuple[Callable, Callable]:
    """Return (forward, backward) of a function of q, k and v (B, S, H, D)."""
    inputs = problem.inputs
    shape = inputs.queries.positions.shape
    q, k, v, do = (by_token(x, *shape) for x in (inputs.q, inputs.kv[:, 0], inputs.kv[:, 1], problem.do))
    forward = jax.jit(attend)
    _, pullback = jax.jit(lambda *qkv: jax.vjp(attend, *qkv))(q, k, v)
    backward = jax.jit(lambda pullback, do: pullback(do))
    return lambda: forward(q, k, v), lambda: backward(pullback, do)


def passes(kernel: Kernel, name: str, problem: Problem) -> tuple[Callable, Callable]:
    """Return (forward, backward) of one of NAMES. ImportError if tokamax is not installed."""
    is_causal = problem.options.rule.is_causal
    if name == "ours":
        return kernel_passes(kernel.forward, kernel.backward, problem)
    if name == "xla":
        return kernel_passes(xla.forward, xla.backward, problem)
    if name == "tokamax":
        import tokamax

        return function_passes(partial(tokamax.dot_product_attention, is_causal=is_causal), problem)
    cudnn = partial(jax.nn.dot_product_attention, is_causal=is_causal, implementation="cudnn")
    return function_passes(cudnn, problem)


def rates(kernel: Kernel, name: str, problem: Problem, runs: int) -> dict[str, float | str]:
    """Return TFLOP/s forward and backward, or the error of a peer."""
    inputs = problem.inputs
    operations = 4.0 * inputs.q.size * inputs.kv.shape[2]  # 4 B H S^2 D
    operations /= 2 if problem.options.rule.is_causal else 1
    try:
        forward, backward = passes(kernel, name, problem)
        return {
            "forward": operations / seconds_per_call(forward, runs) / 1e12,
            "backward": 2.5 * operations / seconds_per_call(backward, runs) / 1e12,
        }
    except Exception as error:
        if name == "ours":
            raise
        return {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}"}


def sequence(
    tokens: int, head_dim: int, is_causal: bool, batch: int | None = None, heads: int | None = None
) -> Problem:
    """Return a problem with plain sequences, by default with TOKENS tokens in total."""
    shape = (batch or max(1, TOKENS // tokens), heads or FEATURES // head_dim, 1, tokens, head_dim)
    places = (side(np.arange(tokens)),) * 2
    return random_problem(shape, tokens, "bfloat16", places, Rule(is_causal))


def ring_overhead(kernel: Kernel, head_dim: int, runs: int) -> dict[str, float]:
    """Return milliseconds of one call over all keys, and of eight consecutive calls over an eighth each."""
    problem = sequence(TOKENS, head_dim, is_causal=True)
    whole = jax.jit(kernel.forward, static_argnums=1)
    blocks = [
        jax.block_until_ready(part_of_keys(problem.inputs, slice(i * TOKENS // RING, (i + 1) * TOKENS // RING)))
        for i in range(RING)
    ]

    @partial(jax.jit, static_argnums=1)
    def hops(blocks: list[Inputs], options: Options) -> Partial | None:
        total: Partial | None = None
        for block in blocks:
            total = kernel.forward(block, options, total)
        return total

    calls = (lambda: whole(problem.inputs, problem.options)), (lambda: hops(blocks, problem.options))
    seconds = [seconds_per_call(run, runs) for run in calls]
    return {"whole_ms": seconds[0] * 1e3, "hops_ms": seconds[1] * 1e3, "overhead": seconds[1] / seconds[0] - 1}


def check_all(kernel: Kernel, out_of_time: Callable[[float], bool]) -> dict[str, dict[str, float]]:
    """Print and return all errors. SystemExit if one exceeds the tolerance."""
    results = {}
    for name, dtype, problem in checks():
        if out_of_time(0.3):
            print(f"{name:<28}skipped: out of time")
            continue
        errors = results[name] = largest_errors(kernel, problem)
        print(f"{name:<28}" + "  ".join(f"{what} {error:.1e}" for what, error in errors.items()), flush=True)
        if not max(errors.values()) <= TOLERANCE[dtype]:
            raise SystemExit(f"{name}: wrong")
    return results


def time_all(kernel: Kernel, out_of_time: Callable[[float], bool], runs: int) -> list[dict[str, Any]]:
    """Print and return the table of rates."""
    rows = []
    print(f"\n{'TFLOP/s':<10}{'tokens':>8}{'D':>5}{'':>8}{'forward':>10}{'backward':>10}")
    for tokens, head_dim, is_causal, name in itertools.product(LENGTHS, (64, 128), (True, False), NAMES):
        if name == "xla" and tokens > LONGEST_FOR_XLA:
            continue
        mask = "causal" if is_causal else "full"
        label = f"{name:<10}{tokens:>8}{head_dim:>5}{mask:>8}"
        if out_of_time(0.9):
            print(f"{label}   skipped: out of time")
            continue
        found = rates(kernel, name, sequence(tokens, head_dim, is_causal), runs)
        rows.append({"name": name, "tokens": tokens, "head_dim": head_dim, "mask": mask} | found)
        numbers = "".join(f"{found[x]:>10.0f}" for x in ("forward", "backward") if x in found)
        print(label + (numbers or f"   {found['failed']}"), flush=True)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Check, measure and print."""
    parser = make_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=450, help="time limit; the rest is skipped")
    parser.add_argument("--runs", type=positive, default=5)
    native = native_to(jax.devices()[0])
    parser.add_argument("--kernel", choices=("mosaic_gpu", "cudnn"), default=native, help="default: the GPU's own")
    options = parser.parse_args(arguments)
    if native not in ("mosaic_gpu", "cudnn"):
        kind = jax.devices()[0].device_kind
        parser.error(f"needs an NVIDIA GPU since Ampere, JAX finds {kind}; on CPUs: attention_cpu.py")
    kernel = kernel_named(options.kernel)
    start = time.perf_counter()

    def out_of_time(share: float) -> bool:
        return time.perf_counter() - start > share * options.seconds

    device = jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}, kernel {options.kernel}")
    results: dict[str, Any] = {"device": device.device_kind, "jax": jax.__version__, "kernel": options.kernel}
    results |= {"errors": check_all(kernel, out_of_time), "ring": {}}
    for head_dim in (64, 128):
        found = results["ring"][head_dim] = ring_overhead(kernel, head_dim, options.runs)
        print(
            f"ring of {RING}, {TOKENS} tokens, D{head_dim}: {found['hops_ms']:.2f} ms in {RING} calls, "
            f"{found['whole_ms']:.2f} ms in one ({found['overhead']:+.1%})",
            flush=True,
        )
    results["rates"] = time_all(kernel, out_of_time, options.runs)
    results["seconds"] = time.perf_counter() - start
    print(f"{results['seconds']:.0f} s")
    save_json(results, options.json)


if __name__ == "__main__":
    main()
