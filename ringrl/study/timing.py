"""How long the cells of an ablation will take, from real steps of each that differs from the others in its shape."""

import json
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from rich.console import Console

from ringrl.config import Section
from ringrl.data.digest import json_digest
from ringrl.envs import domain_of, make_vec
from ringrl.errors import UserError
from ringrl.evaluation.actors import SMALLEST_CACHE
from ringrl.evaluation.told import Told
from ringrl.study.cells import Cell, write
from ringrl.study.pool import run_all
from ringrl.training import TrainedPolicy, load_policy, train

TIMINGS = "timing.json"
STEPS = 6  # of the optimiser, the first of which is compiled and not counted
ACTIONS = 40  # of the policy and of the environments, likewise


class Timing(Section):
    """Seconds that the parts of a cell take."""

    start: float
    """Before and after the steps: reading data, compiling, saving."""
    step: float
    """Of the optimiser."""
    evaluation: float
    """All rollouts together."""


class Measured(NamedTuple):
    """Of one cell."""

    timing: Timing | None
    failure: str | None = None


def shape(cell: Cell) -> str:
    """A name that cells have in common which take equally long: but for seed, folder and steps they are the same."""
    apart = dict.fromkeys(("seed", "run", "checkpoint_every", "log_every", "log"), True)
    config = cell.config.model_dump(mode="json", exclude={**apart, "optimiser": {"steps": True}})
    rolled_out = [asdict(protocol) for protocol in cell.protocols]
    return json_digest([config, rolled_out])[:16]


def read_timings(output: Path) -> dict[str, Timing]:
    """What has been measured before, by shape; UserError where the file is damaged."""
    path = output / TIMINGS
    if not path.exists():
        return {}
    try:
        return {name: Timing.model_validate(value) for name, value in json.loads(path.read_text()).items()}
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path}: is damaged; remove it, and what it says will be measured again") from error


def measure_all(cells: Iterable[Cell], output: Path, workers: int, console: Console) -> dict[str, Timing]:
    """Timings of all shapes; those that are new are measured, in processes as the cells run in, and kept in `output`.

    They are measured once: where the budget is time, all seeds must have the same number of steps.

    Raises:
      UserError: a cell that cannot even begin.
    """
    known = read_timings(output)
    new = {name: cell for cell in cells if (name := shape(cell)) not in known}
    if not new:
        return known
    console.print(f"timing a few steps of {len(new)} kinds of cells")
    names = list(new)
    for ended in run_all([partial(attempt_measure, cell) for cell in new.values()], workers, lambda index: None):
        found: Measured = ended.result or Measured(None, ended.death)
        if found.timing is None:
            raise UserError(f"{new[names[ended.number]].name}: cannot be trained or evaluated: {found.failure}")
        known[names[ended.number]] = found.timing
        console.print(f"timed {new[names[ended.number]].name}", soft_wrap=True, markup=False, highlight=False)
        write(output / TIMINGS, json.dumps({key: value.model_dump() for key, value in known.items()}, indent=1))
    return known


def attempt_measure(cell: Cell) -> Measured:
    """Measure in another process, and tell of an error in words."""
    try:
        return Measured(measure(cell))
    except Exception as error:
        return Measured(None, " ".join(f"{type(error).__name__}: {error}".split()))


def measure(cell: Cell) -> Timing:
    """Train a few steps in a folder that is thrown away, act a few times with an empty and a full memory."""
    config = cell.config
    with tempfile.TemporaryDirectory(prefix="ringrl-timing-") as folder:
        short = config.optimiser.model_copy(update={"steps": STEPS})
        changes = {
            "run": Path(folder) / "run",
            "optimiser": short,
            "log": (),
            "log_every": 1,
            "checkpoint_every": STEPS,
        }
        began = time.perf_counter()
        run = train(config.model_copy(update=changes), quiet=True)
        whole = time.perf_counter() - began
        entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        step = median(1 / entry["steps_per_second"] for entry in entries[1:])
        trained = load_policy(run)
        return Timing(start=max(0.0, whole - STEPS * step), step=step, evaluation=_evaluation(cell, trained))


def _evaluation(cell: Cell, trained: TrainedPolicy) -> float:
    """Seconds of all rollouts of a cell."""
    task = cell.config.task
    length = domain_of(task).episode_length
    total = 0.0
    for protocol in cell.protocols:
        streams, steps = protocol.environments, length * protocol.episodes
        simulate = _simulate(task, streams)
        total += steps * (simulate + _act(trained, streams, steps))
        if protocol.control:
            total += steps * (simulate + _act(trained, streams, length))
    return total


def _act(trained: TrainedPolicy, streams: int, steps: int) -> float:
    """Mean seconds per action while a memory fills with so many steps; its room doubles whenever it is full."""
    tokens = steps * trained.policy.tokens_per_step
    full = _act_with(trained, streams, tokens)
    if tokens <= SMALLEST_CACHE:
        return full
    first = _act_with(trained, streams, SMALLEST_CACHE)
    return first + (full - first) * 2 / 3  # the mean room: 1/2 the time all of it, 1/4 half, 1/8 a quarter ...


def _act_with(trained: TrainedPolicy, streams: int, tokens: int) -> float:
    """Seconds per action with a memory of room for so many tokens, all of which is computed with, filled or not."""
    info, (graph, params) = trained.info, nnx.split(trained.policy)
    told = Told(info.normalisation, 0.0)
    before = told.before(streams, info.action_size)
    current = told.step(0, 0, np.zeros((streams, info.observation_size)), np.zeros(streams), before)
    # The memory is given back changed; not copying it is what a rollout does.
    act = jax.jit(lambda params, step, memory: nnx.merge(graph, params).act(step, step, memory), donate_argnums=2)
    memory = trained.policy.reset(streams, tokens)

    def once() -> None:
        nonlocal memory
        action, memory = act(params, current, memory)
        jax.block_until_ready(action)

    return _median_seconds(once)


def _simulate(task: str, streams: int) -> float:
    """Seconds per step of all environments together."""
    environments = make_vec(task, streams, 0)
    try:
        environments.reset()
        actions: Any = np.random.default_rng(0).uniform(-1, 1, environments.action_space.shape).astype(np.float32)
        return _median_seconds(lambda: environments.step(actions))
    finally:
        environments.close()


def _median_seconds(action: Callable[[], object]) -> float:
    seconds = []
    for _ in range(ACTIONS):
        began = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - began)
    return median(seconds[2:])
