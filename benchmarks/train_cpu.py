"""What share of attention's speed does a whole training step keep, and what do feeding and logging cost?

    python benchmarks/train_cpu.py [--trajectories 4] [--width 256] [--layers 2] [--steps 6] [--rounds 3] [--json FILE]

Contexts of 4 trajectories x 1000 steps x 4 tokens = 16,000 tokens, on one host device and around a ring of eight. In
GFLOP/s of useful operations, medians over rounds: attention alone (forward and gradients, 7 B H S^2 D: causal, what is
computed again does not count), and the whole optimiser step by the model's count (ringrl/training/throughput.py). Of
the run's own loop - batches from a store, metrics written at every step - the share of time in which no step runs:
waiting for a batch, or for metrics to be written.
"""

import argparse
import contextlib
import functools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from command_line import positive, told_in_one_line
from host_devices import in_process
from random_data import write_random_store

KINDS = {"one device": 1, "ring of 8": 8}
TASK = "walker_walk"


def seconds_of(function: Callable[[], Any]) -> float:
    """Of one call, until its results are there."""
    import jax

    began = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - began


def attention_rate(parallel: Any, tokens: int, heads: int, head_dim: int) -> Callable[[], float]:
    """A measurement of attention's forward pass and gradients, in GFLOP/s."""
    import jax

    from ringrl.attention import attention, ring_attention

    attend = functools.partial(ring_attention, mesh=parallel.mesh) if parallel.mesh else attention
    q, k, v = (jax.random.normal(jax.random.key(i), (1, tokens, heads, head_dim)) for i in range(3))
    if parallel.mesh:
        q, k, v = (jax.device_put(x, parallel.sharding("batch", "time", None, None)) for x in (q, k, v))
    gradients = jax.jit(jax.value_and_grad(lambda q, k, v: attend(q, k, v).sum(), (0, 1, 2)))
    jax.block_until_ready(gradients(q, k, v))
    return lambda: 7 * heads * tokens**2 * head_dim / seconds_of(lambda: gradients(q, k, v)) / 1e9


class Run:
    """A training run's own parts."""

    def __init__(self, options: argparse.Namespace, devices: int, folder: Path) -> None:
        from ringrl.config import TrainConfig
        from ringrl.data import EpisodeStore
        from ringrl.data.normalisation import Normalisation
        from ringrl.data.sampler import ContextSampler
        from ringrl.data.sharded import ShardedSampler
        from ringrl.model import make_policy
        from ringrl.training.agent import make_agent
        from ringrl.training.mesh import make_parallel
        from ringrl.training.throughput import step_flops

        heads = options.width // 64
        model = {"layers": options.layers, "width": options.width, "heads": heads, "kv_heads": heads}
        values = {"data": folder / "store.h5", "task": TASK, "run": folder / f"run{devices}", "model": model}
        values |= {"context": {"trajectories": options.trajectories}, "mesh": {"seq": devices}}
        self.config = config = TrainConfig.model_validate(values | {"optimiser": {"batch_size": 1, "steps": 1000}})
        self.parallel = make_parallel(config)
        store = EpisodeStore(config.data)
        sampler = ContextSampler(store, TASK, config.context, Normalisation.of(store), 1, 0)
        mesh = self.parallel.mesh
        self.source = ShardedSampler(sampler, mesh, self.parallel.layout) if mesh else sampler
        make = functools.partial(make_policy, config.model, 24, 6, 0, parallel=self.parallel)
        agent = make_agent(make, config, self.parallel)
        self.state, self.step = agent.init(), agent.update
        self.tokens = self.source.steps_per_batch * agent.tokens_per_step
        self.flops = step_flops(config.model, self.tokens, 1)
        self.batch = self.source.batch(0)
        self.state, _ = self.step(self.state, self.batch)

    def step_alone(self, steps: int) -> float:
        """Seconds per step on one batch that is there."""
        began = time.perf_counter()
        for _ in range(steps):
            self.state, metrics = self.step(self.state, self.batch)
            float(metrics["loss"])
        return (time.perf_counter() - began) / steps

    def share_of_waiting(self, steps: int) -> float:
        """Time in the loop outside of steps: for batches from the store, and for a line of metrics for each."""
        import jax
        from rich.console import Console

        from ringrl.data.loader import iterate_batches
        from ringrl.training.metrics import Cost, MetricsLog, Recorder, progress_bar

        self.config.run.mkdir(exist_ok=True)
        bar = progress_bar(Console(stderr=True), True)
        with contextlib.closing(iterate_batches(self.source, 1000)) as batches, MetricsLog(self.config.run, 0) as log:
            recorder = Recorder(self.config, Cost(self.tokens, self.flops, None), log, bar)
            next(batches)
            began, stepping = time.perf_counter(), 0.0
            for number in range(1, steps + 1):
                batch = next(batches)
                before = time.perf_counter()
                self.state, metrics = jax.block_until_ready(self.step(self.state, batch))
                stepping += time.perf_counter() - before
                recorder.add(number, metrics)
                recorder.flush()
            return 1 - stepping / (time.perf_counter() - began)


def worker(options: argparse.Namespace, devices: int) -> dict[str, float]:
    """All figures of one kind, in this process."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_random_store(folder / "store.h5", 4 * options.trajectories)
        run = Run(options, devices, folder)
        rate = attention_rate(run.parallel, run.tokens, options.width // 64, 64)
        rounds = [
            (rate(), run.step_alone(options.steps), run.share_of_waiting(options.steps)) for _ in range(options.rounds)
        ]
    steps = [run.flops / alone / 1e9 for _, alone, _ in rounds]
    return {
        "tokens": run.tokens,
        "attention_gflops": statistics.median(attention for attention, _, _ in rounds),
        "step_gflops": statistics.median(steps),
        "share": statistics.median(step / attention for step, (attention, _, _) in zip(steps, rounds, strict=True)),
        "step_seconds": statistics.median(alone for _, alone, _ in rounds),
        "feed_and_log": statistics.median(share for _, _, share in rounds),
    }


@told_in_one_line
def main(arguments: Sequence[str] | None = None) -> None:
    """Measure each kind in a process of its own, print and, if asked, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("trajectories", 4), ("width", 256), ("layers", 2), ("steps", 6), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=positive, default=default)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        print(json.dumps(worker(options, KINDS[options.worker])))
        return
    results = {}
    print(f"{'':<12}{'tokens':>8}{'attention':>12}{'step':>10}{'share':>8}{'s/step':>9}{'feed+log':>10}")
    for kind, devices in KINDS.items():
        command = [__file__, *(arguments or sys.argv[1:]), "--worker", kind]
        row = results[kind] = in_process(command, devices, kind)
        print(
            f"{kind:<12}{row['tokens']:>8}{row['attention_gflops']:>12.1f}{row['step_gflops']:>10.1f}"
            f"{row['share']:>8.0%}{row['step_seconds']:>9.2f}{row['feed_and_log']:>10.1%}",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
