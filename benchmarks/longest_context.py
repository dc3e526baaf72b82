"""How long a context can eight host devices of this machine train on, ring against vanilla?

    python benchmarks/longest_context.py [--gib 16] [--tokens 4096 ... 4194304] [--real-tokens 16384 65536] [--steps 20]
                                         [--json FILE] [--plot FILE.svg]

Memory of one optimiser step (one layer of 64 features, one head, float32, remat) as the compiler counts it, arguments
and scratch of all eight devices together, until it exceeds --gib. Then real steps: each kind at its longest length, but
no longer than its number in --real-tokens (vanilla, ring), and the peak memory that the system saw. Attention's work
grows with the square, so the longest that fits would take this machine hours: that it fits is the compiler's word.
"""

import argparse
import functools
import json
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from command_line import positive, told_in_one_line
from drawing import save_svg
from host_devices import in_process

DEVICES, KINDS = 8, ("vanilla", "ring")


def compile_step(kind: str, tokens: int) -> tuple[Any, Any, Any]:
    """The compiled optimiser step, its first state and a batch of random numbers."""
    import jax
    import jax.numpy as jnp
    from random_data import random_context

    from ringrl.config import TrainConfig
    from ringrl.model import make_agent, make_policy
    from ringrl.planning.workload import ACTION, OBSERVATION
    from ringrl.training.mesh import make_parallel

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


def worker(kind: str, tokens: int, steps: int) -> dict[str, float]:
    """Memory by the compiler, and after real steps by the system."""
    compiled, state, batch = compile_step(kind, tokens)
    memory = compiled.memory_analysis()
    each = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    results = {"gib": DEVICES * each / 2**30}
    began = time.perf_counter()
    for _ in range(steps):
        state, metrics = compiled(state, batch)
        results["loss"] = float(metrics["loss"])
    if steps:
        results["seconds_per_step"] = (time.perf_counter() - began) / steps
        results["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return results


def run_worker(kind: str, tokens: int, steps: int) -> dict[str, float]:
    """The same in a process of its own."""
    command = [__file__, "--worker", kind, "--tokens", tokens, "--worker-steps", steps]
    found: dict[str, float] = in_process(command, DEVICES, f"{kind}, {tokens} tokens")
    return found


def draw(results: dict[str, Any], gib: float, path: Path) -> None:
    """Memory against context length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    for kind in KINDS:
        points = results[kind]["compiled"]
        axes.loglog([int(t) for t in points], [p["gib"] for p in points.values()], "o-", label=kind, base=2)
    axes.axhline(gib, color="grey", linestyle="--", linewidth=1)
    axes.set(xlabel="tokens in the context", ylabel="memory of a step, GiB (eight devices)")
    axes.legend(frameon=False)
    save_svg(figure, path)


@told_in_one_line
def main(arguments: Sequence[str] | None = None) -> None:
    """Compile, train, print and, if asked, write JSON and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=16)
    parser.add_argument("--tokens", type=positive, nargs="+", default=[2**n for n in range(12, 23)])
    parser.add_argument("--real-tokens", type=int, nargs=len(KINDS), default=[2**14, 2**16], help="vanilla, ring")
    parser.add_argument("--steps", type=positive, default=20)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--worker", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--worker-steps", type=int, help=argparse.SUPPRESS)  # 0: it is only compiled
    options = parser.parse_args(arguments)
    if options.worker:
        print(json.dumps(worker(options.worker, options.tokens[0], options.worker_steps)))
        return
    results: dict[str, Any] = {}
    for kind, most in zip(KINDS, options.real_tokens, strict=True):
        results[kind] = {"compiled": {}}
        for tokens in options.tokens:
            found = results[kind]["compiled"][tokens] = run_worker(kind, tokens, 0)
            fits = found["gib"] <= options.gib
            print(f"{kind:<8}{tokens:>8} tokens{found['gib']:>10.2f} GiB{'' if fits else '  does not fit'}", flush=True)
            if not fits:
                break
        fitting = [t for t, found in results[kind]["compiled"].items() if found["gib"] <= options.gib]
        results[kind]["longest"] = max(fitting, default=0)
        tokens = max((t for t in fitting if t <= most), default=min(options.tokens))
        real = results[kind]["real"] = {"tokens": tokens} | run_worker(kind, tokens, options.steps)
        print(
            f"{kind}: {results[kind]['longest']} tokens fit; {options.steps} real steps at {tokens}: "
            f"{real['seconds_per_step']:.1f} s each, peak {real['peak_gib']:.2f} GiB, loss {real['loss']:.3f}",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    if options.plot:
        draw(results, options.gib, options.plot)


if __name__ == "__main__":
    main()
