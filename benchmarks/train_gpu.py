"""Measure speed and memory of training the paper's model on long contexts on one GPU. Eight minutes on an H200.

    python benchmarks/train_gpu.py [--preset paper_350m] [--tokens 32768 65536 131072 262144 524288] [--seconds 450]
                                   [--peers ours cudnn] [--json FILE]

Whole optimiser steps (forward, backward, AdamW) on a context of random numbers. The peer is the same step with
jax.nn.dot_product_attention (cuDNN). MFU is the model's operations (ringrl/training/budget.py) over the data sheet's
bfloat16 rate. Memory is the compiler's count of arguments and temporary buffers. Shorter contexts run first; a length
that does not fit into the remaining time is skipped with a message.
"""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import jax
import numpy as np
from common import one_line_errors, positive
from jax.ad_checkpoint import checkpoint_name
from random_data import random_context

from ringrl.config import TrainConfig
from ringrl.config_files import read_yaml
from ringrl.configs import preset
from ringrl.model import make_agent, make_policy, transformer
from ringrl.planning.workload import ACTION, OBSERVATION
from ringrl.training.budget import step_flops
from ringrl.training.metrics import peak_flops

RUNS, ENOUGH_SECONDS = 5, 15  # timed steps, and the time after which fewer are enough


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array, *, is_causal: bool, positions: jax.Array) -> jax.Array:
    """Return cuDNN's attention. Remat saves it like ours; tokens must be in temporal order."""
    o = jax.nn.dot_product_attention(q, k, v, is_causal=is_causal, implementation="cudnn")
    return checkpoint_name(o, transformer.SAVED)


PEERS: dict[str, Callable[..., jax.Array]] = {"ours": transformer.attention, "cudnn": cudnn}


def measure(config: TrainConfig, tokens: int, attention: Callable[..., jax.Array]) -> dict[str, float]:
    """Return seconds, MFU and memory of a step."""
    make = functools.partial(make_policy, config.model, OBSERVATION, ACTION, 0)
    with mock.patch.object(transformer, "attention", attention):
        agent = make_agent(make, config)
        state = agent.init()
        batch = jax.device_put(random_context(1, tokens // agent.policy(state.params).tokens_per_step))
        began = time.perf_counter()
        compiled = agent.update.lower(state, batch).compile()  # type: ignore[attr-defined]
        compile_seconds = time.perf_counter() - began
    memory = compiled.memory_analysis()
    seconds: list[float] = []
    while len(seconds) < RUNS and sum(seconds) < ENOUGH_SECONDS:
        began = time.perf_counter()
        state, metrics = compiled(state, batch)
        loss = float(metrics["loss"])
        seconds.append(time.perf_counter() - began)
    assert np.isfinite(loss)
    median = statistics.median(seconds[1:] or seconds)
    rate = (step_flops(config.model, tokens, 1) or np.nan) / median
    return {
        "seconds": median,
        "tokens_per_second": tokens / median,
        "tflops": rate / 1e12,
        "mfu": rate / (peak_flops(1) or np.nan),
        "gib": (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**30,
        "compile_seconds": compile_seconds,
        "loss": loss,
    }


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Measure. Print a table; write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="paper_350m")
    parser.add_argument("--tokens", type=positive, nargs="+", default=[2**15, 2**16, 2**17, 2**18, 2**19])
    parser.add_argument("--seconds", type=float, default=450)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if jax.default_backend() != "gpu":
        parser.error(f"needs a GPU, JAX finds {jax.devices()[0].device_kind}; on CPUs: train_cpu.py")
    required = {"data": "unused", "task": "unused", "run": "unused"}
    config = TrainConfig.model_validate(required | read_yaml(preset(options.preset)))
    config = config.model_copy(update={"optimiser": config.optimiser.model_copy(update={"batch_size": 1})})
    began, results = time.perf_counter(), []
    print(f"{options.preset} on one {jax.devices()[0].device_kind}, jax {jax.__version__}\n")
    columns = ("seconds", "tokens_per_second", "tflops", "mfu", "gib", "compile_seconds")
    print(f"{'tokens':>8}{'attention':>11}" + "".join(f"{name:>18}" for name in columns))
    slowest: dict[str, float] = {}
    for tokens in sorted(options.tokens):
        for name in options.peers:
            left = options.seconds - (time.perf_counter() - began)
            if left < slowest.get(name, 0) * 5:  # four times the work, and compilation
                print(f"{tokens:>8}{name:>11}  skipped: {left:.0f} s remain")
                continue
            started = time.perf_counter()
            try:
                row = measure(config, tokens, PEERS[name])
            except Exception as error:  # a length that is not supported, or out of memory: continue with the others
                print(f"{tokens:>8}{name:>11}  failed: {' '.join(str(error).split())[:120]}", flush=True)
                continue
            slowest[name] = time.perf_counter() - started - row["compile_seconds"]
            results.append({"tokens": tokens, "attention": name} | row)
            print(f"{tokens:>8}{name:>11}" + "".join(f"{row[column]:>18.4g}" for column in columns), flush=True)
    if options.json:
        about = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
        options.json.write_text(json.dumps(about | {"rows": results}, indent=1))


if __name__ == "__main__":
    main()
