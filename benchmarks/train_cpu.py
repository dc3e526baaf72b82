"""Measure the share of attention's speed that a whole training step keeps, and the cost of feeding and logging.

    python benchmarks/train_cpu.py [--trajectories 4] [--width 256] [--layers 2] [--steps 6] [--rounds 3] [--json FILE]

Contexts have 4 trajectories x 1000 steps x 4 tokens = 16,000 tokens, on one host device and around a ring of eight.
Medians over rounds, in GFLOP/s: attention alone (forward and gradients, 7 B H S^2 D for a causal mask) and the whole
optimiser step (ringrl/training/budget.py). Recomputed work is not counted. The last column is the share of time of a
training loop in which no step runs, because it waits for a batch or for metrics to be written.

Then, the time of a step with `episode_window: 20` relative to a step that sees its whole episode, in contexts of 8
trajectories, one token per timestep, one layer of 64 features. Both run in turn; the ratio is a median over rounds.
"""

import argparse
import contextlib
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from common import in_process, make_parser, one_line_errors, positive, save_json
from random_data import write_random_store
from rich.console import Console

from ringrl.attention import attention, ring_attention
from ringrl.config import TrainConfig
from ringrl.data import EpisodeStore
from ringrl.data.sampling.batches import ShardedSampler, iterate_batches
from ringrl.data.sampling.normalisation import Normalisation
from ringrl.data.sampling.sampler import ContextSampler
from ringrl.model import make_agent, make_policy
from ringrl.model.parallel import Parallel, make_parallel
from ringrl.training.budget import step_cost
from ringrl.training.metrics import MetricsLog, MetricsRecorder, progress_bar

KINDS = {"one device": 1, "ring of 8": 8}
TASK = "walker_walk"
SIZES = {"trajectories": 4, "width": 256, "layers": 2, "steps": 6, "rounds": 3}
WINDOWED, WINDOW = {"trajectories": 8, "width": 64, "layers": 1}, 20


def attention_rate(parallel: Parallel, tokens: int, heads: int, head_dim: int) -> Callable[[], float]:
    """Return a measurement of attention's forward pass and gradients, in GFLOP/s."""
    attend = functools.partial(ring_attention, mesh=parallel.mesh) if parallel.mesh else attention
    q, k, v = (jax.random.normal(jax.random.key(i), (1, tokens, heads, head_dim)) for i in range(3))
    if parallel.mesh:
        q, k, v = (jax.device_put(x, parallel.sharding("batch", "time", None, None)) for x in (q, k, v))
    gradients = jax.jit(jax.value_and_grad(lambda q, k, v: attend(q, k, v).sum(), (0, 1, 2)))
    jax.block_until_ready(gradients(q, k, v))

    def measure() -> float:
        began = time.perf_counter()
        jax.block_until_ready(gradients(q, k, v))
        return 7 * heads * tokens**2 * head_dim / (time.perf_counter() - began) / 1e9

    return measure


class TrainingRun:
    """The parts of a training run on a store of random numbers."""

    def __init__(self, options: argparse.Namespace, devices: int, folder: Path, **model: object) -> None:
        heads = options.width // 64
        model |= {"layers": options.layers, "width": options.width, "heads": heads, "kv_heads": heads}
        values = {"data": folder / "store.h5", "task": TASK, "run": folder / f"run{devices}", "model": model}
        values |= {"context": {"trajectories": options.trajectories}, "mesh": {"seq": devices}}
        self.config = config = TrainConfig.model_validate(values | {"optimiser": {"batch_size": 1, "steps": 1000}})
        self.parallel = make_parallel(config)
        store = EpisodeStore(config.data)
        normalisation = Normalisation.of(store)
        sampler = ContextSampler(store, TASK, config.context, normalisation, 1, 0)
        mesh = self.parallel.mesh
        self.source = ShardedSampler(sampler, mesh, self.parallel.layout) if mesh else sampler
        agent = make_agent(
            functools.partial(make_policy, config.model, 24, 6, 0, parallel=self.parallel), config, self.parallel
        )
        self.state, self.step, self.batch = agent.init(), agent.update, self.source.batch(0)
        self.cost = step_cost(config, normalisation.episode_length)
        self.state, _ = self.step(self.state, self.batch)

    def seconds_per_step(self, steps: int) -> float:
        """Return the seconds per step on one batch."""
        began = time.perf_counter()
        for _ in range(steps):
            self.state, metrics = self.step(self.state, self.batch)
            float(metrics["loss"])
        return (time.perf_counter() - began) / steps

    def share_of_waiting(self, steps: int) -> float:
        """Return the share of a training loop's time outside of steps, with one line of metrics per step."""
        self.config.run.mkdir(exist_ok=True)
        bar = progress_bar(Console(stderr=True), True)
        with contextlib.closing(iterate_batches(self.source, 1000)) as batches, MetricsLog(self.config.run, 0) as log:
            recorder = MetricsRecorder(self.config, self.cost, log, bar)
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


def measure(sizes: dict[str, int], devices: int) -> dict[str, float]:
    """Return all figures of one kind, measured in this process."""
    options = argparse.Namespace(**sizes)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_random_store(folder / "store.h5", 4 * options.trajectories)
        run = TrainingRun(options, devices, folder)
        rate = attention_rate(run.parallel, run.cost.tokens, options.width // 64, 64)
        figures = lambda: (rate(), run.seconds_per_step(options.steps), run.share_of_waiting(options.steps))  # noqa: E731
        rounds = [figures() for _ in range(options.rounds)]
    rates, seconds, waiting = (list(column) for column in zip(*rounds, strict=True))
    steps = [run.cost.flops / x / 1e9 for x in seconds]
    return {
        "tokens": run.cost.tokens,
        "attention_gflops": statistics.median(rates),
        "step_gflops": statistics.median(steps),
        "share": statistics.median(step / rate for step, rate in zip(steps, rates, strict=True)),
        "step_seconds": statistics.median(seconds),
        "feed_and_log": statistics.median(waiting),
    }


def measure_window(sizes: dict[str, int], window: int) -> dict[str, float]:
    """Return the seconds per step without and with a window, and the ratio, measured in this process."""
    options = argparse.Namespace(**sizes)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_random_store(folder / "store.h5", 2 * options.trajectories)
        runs = [TrainingRun(options, 1, folder, token_set="fused1", episode_window=steps) for steps in (None, window)]
        runs[0].seconds_per_step(1)  # the first steps of a process are slower
        rounds = [[run.seconds_per_step(options.steps) for run in runs] for _ in range(options.rounds)]
    whole, windowed = (statistics.median(column) for column in zip(*rounds, strict=True))
    ratio = statistics.median(b / a for a, b in rounds)
    return {"tokens": runs[0].cost.tokens, "whole_seconds": whole, "window_seconds": windowed, "ratio": ratio}


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Measure each kind in a process of its own and print a table."""
    parser = make_parser(__doc__)
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=positive, default=default)
    options = parser.parse_args(arguments)
    sizes = {name: getattr(options, name) for name in SIZES}
    results = {}
    print(f"{'':<12}{'tokens':>8}{'attention':>12}{'step':>10}{'share':>8}{'s/step':>9}{'feed+log':>10}")
    for kind, devices in KINDS.items():
        row = results[kind] = in_process(measure, sizes, devices, devices=devices)
        print(
            f"{kind:<12}{row['tokens']:>8}{row['attention_gflops']:>12.1f}{row['step_gflops']:>10.1f}"
            f"{row['share']:>8.0%}{row['step_seconds']:>9.2f}{row['feed_and_log']:>10.1%}",
            flush=True,
        )
    row = results["window"] = in_process(measure_window, sizes | WINDOWED, WINDOW, devices=1)
    print(f"{'':<12}{'tokens':>8}{'whole episode':>15}{f'window of {WINDOW}':>15}{'ratio':>8}   s/step")
    print(
        f"{'window':<12}{row['tokens']:>8}{row['whole_seconds']:>15.2f}{row['window_seconds']:>15.2f}{row['ratio']:>8.2f}"
    )
    save_json(results, options.json)


if __name__ == "__main__":
    main()
