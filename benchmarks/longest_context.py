"""The longest context that eight host devices of this machine can train on, ring against vanilla attention.

    python benchmarks/longest_context.py [--gib 16] [--tokens 4096 ... 4194304] [--real-tokens 16384 65536] [--steps 20]
                                         [--json FILE] [--plot FILE.svg]

Memory of one optimiser step (one layer, 64 features, one head, float32, remat) from the compiler, arguments and scratch
of all devices, for growing contexts up to --gib. Then real steps at the longest length that fits, at most --real-tokens
(vanilla, ring), with the peak memory of the process. Attention is quadratic, so steps at the longest length of the ring
would take hours and are only compiled.
"""

import functools
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import in_process, make_parser, one_line_errors, positive, save_json, save_svg

DEVICES, KINDS = 8, ("vanilla", "ring")


def compile_step(kind: str, tokens: int) -> tuple[Any, Any, Any]:
    """Return the compiled optimiser step, its first state and a random batch."""
    import jax
    import jax.numpy as jnp
    from random_data import random_context

    from ringrl.config import TrainConfig
    from ringrl.model import make_agent, make_policy
    from ringrl.model.parallel import make_parallel
    from ringrl.planning.workload import ACTION, OBSERVATION

    model = {"token_set": "fused1", "layers": 1, "width": 64, "heads": 1, "kv_heads": 1, "attention": kind}
    values = {"data": "unused", "task": "unused", "run": "unused", "mesh": {"seq": DEVICES, "layout": "contiguous"}}
    values |= {"model": model | {"remat": "layers"}, "optimiser": {"batch_size": 1}}
    config = TrainConfig.model_validate(values)
    parallel = make_parallel(config)
    agent = make_agent(
        functools.partial(make_policy, config.model, OBSERVATION, ACTION, 0, parallel=parallel), config, parallel
    )
    place = lambda x: jax.device_put(x, parallel.sharding("batch", "time"))  # noqa: E731
    batch = jax.tree.map(place, random_context(1, tokens))
    state = agent.init()
    compiled = agent.update.lower(state, batch).compile()  # type: ignore[attr-defined]
    return compiled, state, jax.tree.map(jnp.asarray, batch)


def measure(kind: str, tokens: int, steps: int) -> dict[str, float]:
    """Return GiB of all devices from the compiler and, with steps, loss, seconds and peak memory."""
    compiled, state, batch = compile_step(kind, tokens)
    memory = compiled.memory_analysis()
    results = {"gib": DEVICES * (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**30}
    start = time.perf_counter()
    for _ in range(steps):
        state, metrics = compiled(state, batch)
        results["loss"] = float(metrics["loss"])
    if steps:
        results["seconds_per_step"] = (time.perf_counter() - start) / steps
        results["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return results


def draw(results: dict[str, Any], gib: float, path: Path) -> None:
    """Draw memory against context length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    for kind in KINDS:
        points = results[kind]["compiled"]
        axes.loglog(list(points), [point["gib"] for point in points.values()], "o-", label=kind, base=2)
    axes.axhline(gib, color="grey", linestyle="--", linewidth=1)
    axes.set(xlabel="tokens in the context", ylabel="memory of a step, GiB (eight devices)")
    axes.legend(frameon=False)
    save_svg(figure, path)


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Compile, train and print."""
    parser = make_parser(__doc__)
    parser.add_argument("--gib", type=float, default=16)
    parser.add_argument("--tokens", type=positive, nargs="+", default=[2**n for n in range(12, 23)])
    parser.add_argument("--real-tokens", type=int, nargs=len(KINDS), default=[2**14, 2**16], help="vanilla, ring")
    parser.add_argument("--steps", type=positive, default=20)
    parser.add_argument("--plot", type=Path, metavar="FILE.svg")
    options = parser.parse_args(arguments)
    results: dict[str, Any] = {}
    for kind, most in zip(KINDS, options.real_tokens, strict=True):
        compiled: dict[int, dict[str, float]] = {}
        for tokens in options.tokens:
            found = compiled[tokens] = in_process(measure, kind, tokens, 0, devices=DEVICES)
            fits = found["gib"] <= options.gib
            print(f"{kind:<8}{tokens:>8} tokens{found['gib']:>10.2f} GiB{'' if fits else '  does not fit'}", flush=True)
            if not fits:
                break
        fitting = [tokens for tokens, found in compiled.items() if found["gib"] <= options.gib]
        tokens = max((t for t in fitting if t <= most), default=min(options.tokens))
        real = in_process(measure, kind, tokens, options.steps, devices=DEVICES)
        results[kind] = {"compiled": compiled, "longest": max(fitting, default=0), "real": {"tokens": tokens} | real}
        print(
            f"{kind}: {results[kind]['longest']} tokens fit; {options.steps} steps at {tokens} tokens: "
            f"{real['seconds_per_step']:.1f} s each, peak {real['peak_gib']:.2f} GiB, loss {real['loss']:.3f}",
            flush=True,
        )
    save_json(results, options.json)
    if options.plot:
        draw(results, options.gib, options.plot)


if __name__ == "__main__":
    main()
