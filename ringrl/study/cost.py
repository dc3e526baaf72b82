"""The cost of the cells of an ablation: counts, and an estimate of the time.

The estimate for a kind of cell is the mean time of its finished cells. Before the first one has finished, it is a rough
estimate from the speed of this machine, which is measured in a second.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from statistics import mean
from typing import Any, NamedTuple

import numpy as np
from rich import box
from rich.table import Table

from ringrl.envs import domain_of, make_vec
from ringrl.evaluation.formatting import ABSENT, duration
from ringrl.evaluation.protocol import Protocol
from ringrl.files import json_digest
from ringrl.model.tokens import TOKEN_SETS
from ringrl.study.cells import Cell
from ringrl.training.budget import forward_flops, longest_episode, step_cost
from ringrl.training.checkpoints import EarlyStopping, saved_steps

_SHARE_OF_PEAK = 1 / 3  # speed of small models on a CPU, as a share of a matrix product's
_LEAST_STEP = 0.01  # seconds of an optimiser step, at least; steps of a feed-forward policy take about this time
_START = 10.0  # seconds of a cell before and after its steps: reading data, compiling, saving
_READ_SPEED = 5e9  # bytes of the key-value cache per second, each read once per action
_ACT = 5e-4  # seconds per action of a batch, without reading the cache


class CellCost(NamedTuple):
    """Remaining cost of a cell, or of several cells."""

    steps: int  # optimiser steps
    tokens: int  # seen by the model in training
    flops: float  # of the transformer blocks in training; 0 for other models
    simulated: int  # environment steps of the evaluation
    seconds: float = 0.0  # training and evaluation


class Speed(NamedTuple):
    """Speed of this machine."""

    flops: float  # of a matrix product, per second
    simulation: Mapping[str, float]  # task -> seconds per environment step

    @classmethod
    def measure(cls, tasks: Iterable[str]) -> "Speed":
        """Return the speed of the cores in these tasks. Accelerators are not used: the cells need their memory."""
        size = 1024
        x = np.ones((size, size), np.float32)
        seconds = least_seconds(lambda: x @ x, 5)
        return cls(2 * size**3 / seconds, {task: _seconds_per_step(task) for task in tasks})


def _seconds_per_step(task: str, streams: int = 8) -> float:
    with closing(make_vec(task, streams, 0)) as environments:
        environments.reset()
        actions: Any = np.random.default_rng(0).uniform(-1, 1, environments.action_space.shape).astype(np.float32)
        return least_seconds(lambda: environments.step(actions), 20) / streams


def least_seconds(action: Callable[[], object], times: int) -> float:
    """Return the shortest of several times, since other programs may be busy."""
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def estimates(cells: Sequence[Cell], workers: int) -> dict[str, CellCost]:
    """Return the remaining cost of every unfinished cell of a plan, by name, if `workers` cells run at the same time.

    The time of finished cells estimates the cells that differ only in the seed.
    """
    known, waiting = defaultdict[str, list[float]](list), list[Cell]()
    for cell in cells:
        if not cell.is_finished:
            waiting.append(cell)
        elif (seconds := cell.seconds) is not None:
            known[_kind(cell)].append(seconds)
    unknown = {task for cell in waiting if _kind(cell) not in known for task in cell.tasks}
    speed = Speed.measure(unknown)
    found = {}
    for cell in waiting:
        one = cost(cell)
        if kind := known.get(_kind(cell)):
            # Training takes most of the time, and the evaluation at least a tenth.
            seconds = mean(kind) * max(0.1, one.steps / cell.config.optimiser.steps)
        else:
            seconds = _rough_seconds(cell, one, speed, min(workers, len(waiting)))
        found[cell.name] = one._replace(seconds=seconds)
    return found


def _kind(cell: Cell) -> str:
    """Return the name of the kind of a cell. Cells of a kind differ in seed, folder and logging only."""
    ignored = dict.fromkeys(("seed", "run", "checkpoint_every", "log_every", "log"), True)
    config = cell.config.model_dump(mode="json", exclude=ignored)
    return json_digest([config, cell.tasks, [asdict(protocol) for protocol in _rollouts(cell)]])


def _rough_seconds(cell: Cell, one: CellCost, speed: Speed, workers: int) -> float:
    """Return a rough estimate, right within a factor of about three."""
    seconds_per_flop = workers / (speed.flops * _SHARE_OF_PEAK)
    training = max(one.flops * seconds_per_flop, one.steps * _LEAST_STEP)
    model, length = cell.config.model, domain_of(cell.config.task).episode_length
    segment, tokens = cell.config.context.segment_steps, TOKEN_SETS[model.token_set].size
    per_step = again = 0.0  # bytes of keys and values, and seconds of repeated work
    if model.family.has_context and segment:  # the whole live segment is computed again at every step
        again = forward_flops(model, segment * tokens) * seconds_per_flop
    elif model.family.has_context:
        per_step = 8 * tokens * model.layers * model.width * model.kv_heads / model.heads
    acting = 0.0
    for protocol in _rollouts(cell):
        for episodes in (protocol.episodes, *([1] if protocol.control else [])):
            # The memory grows and is half full on average.
            cache = per_step * length * (episodes / 2 + protocol.prompt_trajectories)
            acting += length * protocol.episodes * (_ACT + protocol.environments * (again + cache / _READ_SPEED))
    simulating = sum(speed.simulation[task] for task in cell.tasks) / len(cell.tasks) * one.simulated
    return _START + training + len(cell.tasks) * acting + simulating


def _rollouts(cell: Cell) -> list[Protocol]:
    return [*cell.protocols, *(protocol for _, protocol in cell.prompt_only)]


def cost(cell: Cell) -> CellCost:
    """Return the remaining cost of a cell, without the time. A started evaluation counts in full."""
    config, length = cell.config, domain_of(cell.config.task).episode_length
    done = max(saved_steps(cell.folder), default=0)
    has_converged = EarlyStopping.saved(cell.folder, done).has_converged(config)
    one = step_cost(config, longest_episode(config))
    steps = 0 if has_converged else max(0, config.optimiser.steps - done)
    episodes = sum(p.environments * p.episodes * (2 if p.control else 1) for p in _rollouts(cell))
    return CellCost(steps, steps * one.tokens, steps * (one.flops or 0.0), length * episodes * len(cell.tasks))


def cost_table(cells: Sequence[Cell], costs: Mapping[str, CellCost], finished: int, workers: int) -> Table:
    """Return a table of the remaining cost per kind of cell and in total. The caption counts the `finished` cells."""
    kinds: dict[str, dict[str, list[CellCost]]] = {}
    for cell in cells:
        kind = cell.folder.name.rpartition("_seed")[0]
        kinds.setdefault(cell.config.task, {}).setdefault(kind, []).append(costs[cell.name])
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("Cell", "Number", "Steps", "Tokens", "TFLOP", "Simulated", "Time each"):
        shown.add_column(name, justify="left" if name == "Cell" else "right", no_wrap=name != "Cell", overflow="fold")
    for task, groups in kinds.items():
        shown.add_section()
        shown.add_row(f"[bold]{task}")
        for kind, group in groups.items():
            shown.add_row(kind, str(len(group)), *_numbers(group[0]))
    shown.add_section()
    whole = CellCost(*map(sum, zip(*(costs[cell.name] for cell in cells), strict=True)))
    shown.add_row("total", str(len(cells)), *_numbers(whole))
    at_once = min(workers, len(cells))
    shown.caption = f"very roughly {duration(whole.seconds / at_once)} with {at_once} at a time"
    shown.caption += f"; {finished} other cells are finished" if finished else ""
    return shown


def _numbers(found: CellCost) -> list[str]:
    flops = f"{found.flops / 1e12:,.3g}" if found.flops else ABSENT
    return [_short(found.steps), _short(found.tokens), flops, _short(found.simulated), duration(found.seconds)]


def _short(number: int) -> str:
    return f"{number:,}" if number < 1_000_000 else f"{number / 1e6:,.1f}M"
