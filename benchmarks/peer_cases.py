"""Which cases of other libraries' attention tests run here, and whether the results are right.

    python benchmarks/peer_cases.py [--peer NAME ...] [--calls N] [--full] [--json FILE]

The cases are in peer_tables.py. Cases with the same numbers are one call, for example packed and separate arrays. Each
call computes output, log-sum-exp and gradients, and compares them with `ringrl.attention.definition` in float64. The
largest error may be 1e-5 of the largest number in float32, and three times the machine epsilon in bfloat16 and float16
(or four times float32's epsilon times the largest logit). Each reason to reject cases must raise an error of one line.

Without --full, batches are cut to two contexts, and lengths are divided by the power of two that leaves at most 256
tokens, or 128 around a ring. With --calls, other calls are only traced. With --json, a second run continues from the
calls of the first one (FILE.calls).
"""

import collections
import json
import math
import random
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import in_process, make_parser, one_line_errors, positive, save_json
from peer_tables import DEFAULTS, ENDLESS, PEERS, Case

TOLERANCES = {"float32": 1e-5, "bfloat16": 3 * 2.0**-7, "float16": 3 * 2.0**-10}
FAST = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}  # compiles three times as fast
NO_QUERY, NO_KEY = 10**6, 10**6 + 1  # segment ids that match nothing
LENGTHS = {"q": "query_seq_lengths", "k": "key_value_seq_lengths"}
Arrays = dict[str, Any]


def calls_of(peer: str, *, full: bool) -> tuple[dict[str, int], dict[str, int]]:
    """Return the number of the peer's cases for each call, as JSON, and for each reason to reject a case."""
    calls, rejected = collections.Counter[str](), collections.Counter[str]()
    for case, times in PEERS[peer]():
        if "rejected" in case:
            rejected[case["rejected"]] += times
        else:
            calls[json.dumps(scaled(DEFAULTS | case, full=full), sort_keys=True)] += times
    return dict(calls), dict(rejected)


def scaled(case: Case, *, full: bool) -> Case:
    """Fill in sizes that follow from others, and shorten the case unless `full`."""
    case = case | {"k": case["k"] or case["q"], "kv": case["kv"] or case["h"], "dv": case["dv"] or case["d"]}
    longest = math.inf if full else 128 if case["ring"] else 256
    factor = 2 ** max(0, math.ceil(math.log2(max(case["q"], case["k"]) / longest))) if not full else 1
    for name in ("q", "k", "q_lengths", "k_lengths", "window", "segments", "places"):
        case[name] = _divided(case[name], factor)
    if not (full or case["vmap"] or case["k_lengths"]):
        case["b"] = max(min(case["b"], 2), case["axes"][0])
    chunks = 2 * case["ring"][0] if case["ring"] else 1
    return case | {name: -(-case[name] // chunks) * chunks for name in "qk"}


def _divided(x: Any, factor: int) -> Any:
    if isinstance(x, tuple | list) and x[0] != "random":
        return [_divided(one, factor) for one in x]
    return -(-x // factor) if isinstance(x, int) and x != ENDLESS else x


def segments_of(case: Case) -> Arrays:
    """Return the keywords for `segments`. If packed queries and keys differ, positions begin again in each segment."""
    if case["segments"] is None:
        return {}
    (kind, *values), b, found = case["segments"], case["b"], Arrays()
    if kind == "packed":  # lengths of the segments of the queries, tokens in use of each; the same of the keys
        for number, (side, size, nothing) in enumerate((("", "q", NO_QUERY), ("key_", "k", NO_KEY))):
            lengths, used = values[2 * number : 2 * number + 2]
            place = np.concatenate([np.arange(n) for n in [*lengths, case[size]]])[: case[size]]
            ids = np.repeat(np.arange(len(lengths) + 1), [*lengths, case[size]])[: case[size]]
            ids = np.where(place < np.array([*used, 0])[ids], ids, nothing)
            found |= {f"{side}segment_ids": ids} | ({f"{side}positions": place} if values[0] != values[2] else {})
    elif kind == "random":  # segments of the queries and of the keys, equal if their numbers are
        drawn = [np.random.default_rng(1).integers(0, n, (b, case[size])) for n, size in zip(values, "qk", strict=True)]
        found = {"segment_ids": drawn[0], "key_segment_ids": drawn[1]}
    else:  # "between": other queries see nothing, and other keys are hidden
        q, k = np.arange(case["q"]), np.arange(case["k"])
        found["segment_ids"] = np.where((values[0] <= q) & (q < values[1]), 0, NO_QUERY)
        found["key_segment_ids"] = np.where((values[2] <= k) & (k < values[3]), 0, NO_KEY)
    return {name: np.broadcast_to(x, (b, x.shape[-1])) for name, x in found.items()}


def integers_of(case: Case) -> Arrays:
    """Return the keywords that are arrays of integers."""
    found, b, q, k = segments_of(case), case["b"], np.arange(case["q"]), np.arange(case["k"])
    found |= {LENGTHS[name]: np.array(case[f"{name}_lengths"]) for name in "qk" if case[f"{name}_lengths"]}
    kind, *values = case["places"] or [""]
    permuted = np.random.default_rng(2).permutation
    if kind == "offset":  # of the queries
        q = q + values[0]
    elif kind == "end":  # the queries are the last tokens of their context
        q = q + (found[LENGTHS["k"]] - found[LENGTHS["q"]])[:, None]
    elif kind == "reversed keys":
        k = k[::-1]
    elif kind == "permuted":
        q, k = (permuted(x) if name in values else x for name, x in (("q", q), ("k", k)))
    elif kind == "from the centre":
        q, k = (np.abs(2 * x - len(x) + 1) for x in (q, k))
    elif kind == "blocks":  # of 16 tokens, in random order; the segments move, too
        q = k = permuted(q.reshape(-1, 16)).ravel()
        found = {name: x[:, q] for name, x in found.items()}
    if kind and "positions" not in found:
        found |= {name: np.broadcast_to(x, (b, x.shape[-1])) for name, x in (("positions", q), ("key_positions", k))}
    return found


def expect(case: Case, given: Arrays) -> Arrays:
    """Return the definition's values. A sink is one more key of the value 0: `share` is what the others keep."""
    from ringrl.attention.definition import definition
    from ringrl.attention.mask import Rule

    if case["vmap"] == "queries":  # all contexts have the same keys and values
        many = expect(case | {"vmap": None}, given | {name: np.repeat(given[name], case["b"], 0) for name in "kv"})
        return many | {name: many[name].sum(0, keepdims=True) for name in ("dk", "dv")}
    integers, b, sides = integers_of(case), case["b"], []
    for name, size, first, nothing in (("", "q", case["k"] - case["q"], NO_QUERY), ("key_", "k", 0, NO_KEY)):
        place = np.broadcast_to(np.arange(case[size]), (b, case[size]))
        ids = np.broadcast_to(integers.get(f"{name}segment_ids", 0), place.shape)
        ids = np.where(place < integers.get(LENGTHS[size], np.full(b, case[size]))[:, None], ids, nothing)
        sides.append((integers.get(f"{name}positions", place + first), ids))
    rule = Rule(case["causal"], case["window"] and tuple(case["window"]))
    define = partial(definition, queries=sides[0], keys=sides[1], rule=rule)
    define = partial(define, scale=case["scale"], logits_soft_cap=case["cap"])
    found = define(given)
    if "sinks" not in given:
        return found
    lse = np.logaddexp(found["lse"], given["sinks"])
    share = np.exp(found["lse"] - lse)
    moved = (given["do"] * found["o"]).sum(-1) * share * (1 - share)
    inner = define(given | {"do": given["do"] * share[..., None], "dlse": given["dlse"] * share + moved})
    dsinks = (given["dlse"] * (1 - share) - moved).sum((0, 1))
    return inner | {"o": found["o"] * share[..., None], "lse": lse, "dsinks": dsinks}


def attend_of(case: Case, mesh: Any) -> Callable[..., Any]:
    """Return the library's function with all arguments but the arrays."""
    import jax

    from ringrl.attention import attention, decode_attention, ring_attention

    options = {"local_window_size": case["window"], "scale": case["scale"], "logits_soft_cap": case["cap"]}
    options |= {"return_residual": True}
    if case["decode"]:
        return partial(decode_attention, length=np.array(case["k_lengths"]), **options)
    options |= {"is_causal": case["causal"]}
    if case["ring"]:
        options |= {"mesh": mesh, "batch_axes": "data", "head_axes": "tensor"}
        return partial(ring_attention, layout=case["ring"][1], strategy=case["ring"][2], **options)
    attend = partial(attention, **options)
    if case["vmap"] == "queries":
        return lambda q, k, v: jax.vmap(attend, (0, None, None))(q, k[0], v[0])
    return jax.vmap(attend) if case["vmap"] else attend


def compute(case: Case, given: Arrays, *, only_traced: bool = False) -> Arrays:
    """Return output, log-sum-exp and gradients of the library."""
    import jax
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    from ringrl.attention import from_layout, to_layout

    integers, mesh = {} if case["decode"] else integers_of(case), None
    ring, layout, _ = case["ring"] or (1, "contiguous", "")
    whole = ("sinks", "dsinks", *LENGTHS.values())  # have no axis of tokens
    names = [name for name in ("q", "k", "v", "sinks") if name in given]
    if case["ring"]:
        shape, kind = (*case["axes"], ring), AxisType.Explicit if case["explicit"] else AxisType.Auto
        mesh = jax.make_mesh(shape, ("data", "tensor", "seq"), (kind,) * 3, devices=jax.devices()[: math.prod(shape)])

        def place(name: str, x: np.ndarray) -> jax.Array:
            axes = ["tensor"] if name == "sinks" else ["data", "seq", "tensor"][: 1 if name in whole else x.ndim]
            x = x if name in whole else to_layout(x, layout, ring)
            return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))

        given, integers = ({name: place(name, x) for name, x in group.items()} for group in (given, integers))

    def forward(given: Arrays, integers: Arrays) -> Any:
        attend = partial(attend_of(case, mesh), **integers)
        return lambda *x: attend(*x[:3], **dict(zip(["sinks"], x[3:], strict=False)))

    def run(given: Arrays, integers: Arrays) -> Any:
        found, backward = jax.vjp(forward(given, integers), *(given[name] for name in names))
        return *found, *backward((given["do"], given["dlse"]))

    if only_traced:
        jax.eval_shape(lambda given, integers: forward(given, integers)(*(given[x] for x in names)), given, integers)
        return {}
    values = map(np.asarray, jax.jit(run, compiler_options=FAST)(given, integers))
    found = zip(["o", "lse", *(f"d{name}" for name in names)], values, strict=True)
    return {name: np.asarray(x if name in whole else from_layout(x, layout, ring)).astype(float) for name, x in found}


def error_of(case: Case, *, only_traced: bool = False) -> float | None:
    """Return the largest error of an array, as a multiple of the tolerance."""
    import jax.numpy as jnp

    draw, (b, q, h) = np.random.default_rng(0).normal, (case[name] for name in ("b", "q", "h"))
    keys = (1 if case["vmap"] == "queries" else b, case["k"], case["kv"])
    shapes = {"q": (b, q, h, case["d"]), "k": (*keys, case["d"]), "v": (*keys, case["dv"]), "do": (b, q, h, case["dv"])}
    given = {name: draw(size=shape).astype(jnp.dtype(case["dtype"])) for name, shape in shapes.items()}
    given["dlse"] = draw(size=(b, q, h)).astype(np.float32)
    if case["sinks"]:
        given["sinks"] = (draw(size=h) * (case["sinks"] == "learned")).astype(np.float32)
    found = compute(case, given, only_traced=only_traced)
    if only_traced:
        return None
    expected, errors = expect(case, {name: x.astype(float) for name, x in given.items()}), [0.0]
    least = 4 * np.finfo(np.float32).eps * np.abs(expected["lse"][np.isfinite(expected["lse"])]).max(initial=0)
    for name, y in expected.items():
        x, seen = found[name], np.isfinite(y)
        if not np.array_equal(x[~seen], y[~seen]):
            return math.inf
        error = np.abs(x[seen] - y[seen]).max(initial=0) / max(np.abs(y[seen]).max(initial=0), 1e-30)
        errors.append(float(error / max(TOLERANCES["float32" if name == "lse" else case["dtype"]], least)))
    return max(errors) if np.isfinite(errors).all() else math.inf


def check_rejections(reasons: Sequence[str]) -> None:
    """Check that each reason raises an error of one line."""
    import jax
    import jax.numpy as jnp

    from ringrl.attention import as_attention_fn, attention, ring_attention

    x = jnp.ones((1, 8, 8, 8))
    mesh = jax.make_mesh((8, 1), ("tensor", "seq"))
    checks: dict[str, Callable[[], Any]] = {
        "bias": lambda: attention(x, x, x, bias=jnp.ones((8, 8, 8))),
        "mask": lambda: attention(x, x, x, mask=jnp.ones((1, 8, 8), bool)),
        "mask by head": lambda: attention(x, x, x, mask=jnp.ones((8, 8, 8), bool)),
        "dropout": lambda: as_attention_fn(attention)(x, x, x, dropout_rate=0.1),
        "key heads < devices": lambda: ring_attention(x, x[:, :, :1], x[:, :, :1], mesh=mesh, head_axes="tensor"),
        "largest logit": lambda: attention(x, x, x, return_max_logit=True),
        "unnormalised output": lambda: attention(x, x, x, normalize_output=False),
    }
    checks |= {name: partial(lambda y: attention(y, y, y), x.astype(name)) for name in ("float8_e5m2", "int8", "int4")}
    for reason in reasons:
        try:
            checks[reason]()
        except (TypeError, ValueError) as error:
            if "\n" not in str(error):
                continue
        raise SystemExit(f"{reason}: expected an error of one line")


def measure(peers: Sequence[str], devices: int, limit: int | None, full: bool, file: str) -> None:
    """Write the errors of the peers' calls with this number of devices to a file, after each call; None if traced."""
    path = Path(file)
    errors = json.loads(path.read_text()) if path.exists() else {}
    for calls, rejected in (calls_of(peer, full=full) for peer in peers):
        if devices > 1:
            check_rejections(list(rejected))
        for number, call in enumerate(random.Random(0).sample(list(calls), len(calls))):
            case, only_traced = json.loads(call), limit is not None and number >= limit
            if (
                (devices > 1) == bool(case["ring"])
                and errors.get(call) is None
                and not (only_traced and call in errors)
            ):
                errors[call] = error_of(case, only_traced=only_traced)
                path.write_text(json.dumps(errors, indent=0))


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the calls and print a table."""
    parser = make_parser(__doc__)
    parser.add_argument("--peer", choices=PEERS, action="append", help="only these peers")
    parser.add_argument(
        "--calls", type=positive, metavar="N", help="compare N calls of each peer, and trace the others"
    )
    parser.add_argument("--full", action="store_true", help="keep the lengths and the batches")
    options = parser.parse_args(arguments)
    peers, results = options.peer or list(PEERS), {}
    with tempfile.TemporaryDirectory() as folder:
        file = options.json.with_suffix(".calls") if options.json else Path(folder) / "calls"
        for devices in (1, 8):
            in_process(measure, peers, devices, options.calls, options.full, str(file), devices=devices)
        errors = json.loads(file.read_text())
    print(f"{'':<28}{'cases':>7}{'run here':>10}{'calls':>7}{'compared':>10}{'wrong':>7}{'error':>7}  rejected")
    for peer in peers:
        calls, rejected = calls_of(peer, full=options.full)
        compared = {call: errors[call] for call in calls if errors[call] is not None}
        wrong, worst = [call for call, error in compared.items() if not error <= 1], max(compared.values())
        run, reasons = sum(calls.values()), ", ".join(f"{reason} {n}" for reason, n in rejected.items())
        results[peer] = {"run": run, "rejected": rejected, "calls": len(calls), "errors": compared, "wrong": wrong}
        total = run + sum(rejected.values())
        print(f"{peer:<28}{total:>7}{run:>10}{len(calls):>7}{len(compared):>10}{len(wrong):>7}{worst:>7.2f}  {reasons}")
    save_json(results, options.json)


if __name__ == "__main__":
    main()
