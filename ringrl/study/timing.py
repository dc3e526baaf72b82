"""The cost of the cells of an ablation, from timed steps of each cell that differs in more than seed and steps."""

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from rich import box
from rich.table import Table

from ringrl.config import Section
from ringrl.envs import domain_of, make_vec
from ringrl.errors import UserError
from ringrl.evaluation.formatting import ABSENT, duration
from ringrl.evaluation.policy import TrainedPolicy, load_policy
from ringrl.evaluation.protocol import Protocol
from ringrl.evaluation.rollout import ContextBuilder
from ringrl.files import json_digest, with_crc, without_crc
from ringrl.study.cells import Cell, write
from ringrl.training import train
from ringrl.training.budget import step_cost
from ringrl.training.checkpoints import EarlyStopping, saved_steps

TIMINGS = "timing.json"
STEPS = 6  # of the optimiser; the first includes compilation and is not counted
ACTIONS = 40  # of the policy and of the environments; the first two are not counted


class Timing(Section):
    """Seconds that the parts of a cell take."""

    start: float
    """Before and after the steps: reading data, compiling, saving."""
    step: float
    """One optimiser step."""
    evaluation: float
    """All rollouts together."""


class CellCost(NamedTuple):
    """Remaining cost of a cell, or of several cells."""

    steps: int  # optimiser steps
    tokens: int  # seen by the model in training
    flops: float  # of the transformer blocks in training; 0 for other models
    simulated: int  # environment steps of the evaluation
    seconds: float | None  # training and evaluation; None: not timed


def shape(cell: Cell) -> str:
    """Return the name of the kind of a cell. Cells of a kind differ in seed, folder and steps only."""
    ignored = dict.fromkeys(("seed", "run", "checkpoint_every", "log_every", "log"), True)
    config = cell.config.model_dump(mode="json", exclude={**ignored, "optimiser": {"steps": True}})
    return json_digest([config, [asdict(protocol) for protocol in cell.protocols]])[:16]


def read_timings(output: Path) -> dict[str, Timing]:
    """Return the timings of an ablation, by shape. Raise UserError if the file is damaged."""
    path = output / TIMINGS
    if not path.exists():
        return {}
    try:
        return {name: Timing.model_validate(value) for name, value in json.loads(without_crc(path.read_text())).items()}
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path}: is damaged; remove it, and the cells will be timed again") from error


def write_timings(output: Path, timings: Mapping[str, Timing]) -> None:
    """Write the timings of an ablation. Raise UserError if the file cannot be written."""
    text = json.dumps({name: timing.model_dump() for name, timing in timings.items()}, indent=1)
    write(output / TIMINGS, with_crc(text))


def measure(cell: Cell) -> Timing:
    """Return the timing of a cell, from a few steps in a temporary folder."""
    optimiser = cell.config.optimiser.model_copy(update={"steps": STEPS})
    with TemporaryDirectory(prefix="ringrl-") as folder:
        changes = {
            "run": Path(folder) / "run",
            "log": (),
            "log_every": 1,
            "checkpoint_every": STEPS,
            "stop_after": None,
            "optimiser": optimiser,
        }
        began = time.perf_counter()
        run = train(cell.config.model_copy(update=changes), quiet=True)
        whole = time.perf_counter() - began
        entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        step = median(1 / entry["steps_per_second"] for entry in entries[1:])
        trained = load_policy(run)
        evaluation = len(cell.tasks) * sum(_rollout_seconds(cell.config.task, p, trained) for p in cell.protocols)
    return Timing(start=max(0.0, whole - STEPS * step), step=step, evaluation=evaluation)


def _rollout_seconds(task: str, protocol: Protocol, trained: TrainedPolicy) -> float:
    """Return the seconds of all rollouts of a protocol, from a few actions with a memory of average size."""
    length, streams = domain_of(task).episode_length, protocol.environments
    steps, tokens = length * protocol.episodes, trained.policy.tokens_per_step
    simulate = _simulate(task, streams)
    prompt = protocol.prompt_trajectories * (trained.info.config.context.segment_steps or length) * tokens
    # A full memory doubles, so it has its last size half of the time, and two thirds of that size on average.
    total = steps * (simulate + _act(trained, streams, prompt + steps * tokens * 2 // 3))
    if protocol.control:
        total += steps * (simulate + _act(trained, streams, length * tokens * 2 // 3))
    return total


def _act(trained: TrainedPolicy, streams: int, tokens: int) -> float:
    """Return the seconds per action with a memory of this size."""
    info, (graph, params) = trained.info, nnx.split(trained.policy)
    builder = ContextBuilder(info.normalisation, 0.0)
    before = builder.first_outcome(streams, info.action_size)
    current = builder.step(0, 0, np.zeros((streams, info.observation_size)), np.zeros(streams), before, first=0)
    # As in a rollout, the memory is donated instead of copied.
    act = jax.jit(lambda params, step, memory: nnx.merge(graph, params).act(step, step, memory), donate_argnums=2)
    memory = trained.policy.reset(streams, tokens)

    def once() -> None:
        nonlocal memory
        action, memory = act(params, current, memory)
        jax.block_until_ready(action)

    return _median_seconds(once)


def _simulate(task: str, streams: int) -> float:
    """Return the seconds per step of all environments together."""
    with closing(make_vec(task, streams, 0)) as environments:
        environments.reset()
        actions: Any = np.random.default_rng(0).uniform(-1, 1, environments.action_space.shape).astype(np.float32)
        return _median_seconds(lambda: environments.step(actions))


def _median_seconds(action: Callable[[], object]) -> float:
    seconds = []
    for _ in range(ACTIONS):
        began = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - began)
    return median(seconds[2:])


def cost(cell: Cell, timings: Mapping[str, Timing]) -> CellCost:
    """Return the remaining cost of a cell. A started evaluation counts whole."""
    config, length = cell.config, domain_of(cell.config.task).episode_length
    done = max(saved_steps(cell.folder), default=0)
    has_converged = EarlyStopping.saved(cell.folder, done).has_converged(config)
    one, steps = step_cost(config, length), 0 if has_converged else max(0, config.optimiser.steps - done)
    timing = timings.get(shape(cell))
    rollouts = (*cell.protocols, *(protocol for _, protocol in cell.prompt_only))
    episodes = sum(p.environments * p.episodes * (2 if p.control else 1) for p in rollouts)
    return CellCost(
        steps=steps,
        tokens=steps * one.tokens,
        flops=steps * (one.flops or 0.0),
        simulated=length * episodes * len(cell.tasks),
        seconds=None if timing is None else timing.start + steps * timing.step + timing.evaluation,
    )


def cost_table(cells: Sequence[Cell], timings: Mapping[str, Timing], finished: int, workers: int) -> Table:
    """Return a table of the remaining cost per kind of cell, and in all. The caption counts the `finished` cells."""
    costs = [cost(cell, timings) for cell in cells]
    kinds: dict[str, dict[str, list[CellCost]]] = {}
    for cell, found in zip(cells, costs, strict=True):
        kind = cell.folder.name.rpartition("_seed")[0]
        kinds.setdefault(cell.config.task, {}).setdefault(kind, []).append(found)
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("Cell", "Number", "Steps", "Tokens", "TFLOP", "Simulated", "Time each"):
        shown.add_column(name, justify="left" if name == "Cell" else "right", no_wrap=True)
    for task, groups in kinds.items():
        shown.add_section()
        shown.add_row(f"[bold]{task}")
        for kind, group in groups.items():
            shown.add_row(kind, str(len(group)), *_numbers(group[0]))
    shown.add_section()
    shown.add_row("in all", str(len(cells)), *_numbers(_total(costs)))
    if (seconds := _total(costs).seconds) is not None:
        at_once = min(workers, len(cells))
        shown.caption = f"about {duration(seconds / at_once)} with {at_once} at a time"
        shown.caption += ", and the videos" if any(cell.about["videos"] for cell in cells) else ""
        shown.caption += f"; {finished} more are finished" if finished else ""
    return shown


def _total(costs: Iterable[CellCost]) -> CellCost:
    steps, tokens, flops, simulated, seconds = zip(*costs, strict=True)
    known = [value for value in seconds if value is not None]
    return CellCost(sum(steps), sum(tokens), sum(flops), sum(simulated), sum(known) if known else None)


def _numbers(found: CellCost) -> list[str]:
    return [
        f"{found.steps:,}",
        f"{found.tokens:,}",
        f"{found.flops / 1e12:,.3g}" if found.flops else ABSENT,
        f"{found.simulated:,}",
        duration(found.seconds),
    ]
