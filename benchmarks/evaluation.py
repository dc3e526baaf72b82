"""Measure environment steps per second, with observations and rewards, next to dm_control and Gymnasium.

    python benchmarks/evaluation.py [--num-envs 64] [--threads N] [--runs 5] [--seconds 1] [--peer-python PYTHON]
        [--json FILE] [task ...]

make_vec  the vector environment
one       one dm_control environment (`make` for domains that dm_control's suite lacks)
async     Gymnasium's AsyncVectorEnv over `make` with two workers
physics   MuJoCo's mj_step alone, in a loop in C: a lower bound of the CPU time
EnvPool   the same task in EnvPool 1.2, with as many environments and threads. PYTHON is an interpreter that has it.

A run is an episode or `--seconds`, whichever is shorter, without the reset. The environments take turns, so that other
work on the machine slows all of them. Rates and ratios are medians over runs. CPU times are sums over threads.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from common import in_process, one_line_errors, positive

WORKERS = 2
DEFAULT_TASKS = (
    "walker_walk",
    "cheetah_run",
    "cartpole_swingup",
    "jaco_reach_top_left",
    "quadruped_walk",
    "point_mass_maze_reach_top_left",
)


@dataclass(frozen=True)
class Contender:
    """Environments to time."""

    num_envs: int
    reset: Callable[[], Any]
    step: Callable[[np.ndarray], Any]
    close: Callable[[], Any] = lambda: None


def contenders(task: str, num_envs: int, threads: int | None) -> dict[str, Contender]:
    """Return the environments to compare, by name."""
    from ringrl.envs import make, make_vec

    ours = make_vec(task, num_envs, seed=0, threads=threads)
    workers = gymnasium.vector.AsyncVectorEnv([partial(make, task, seed) for seed in range(WORKERS)])
    return {
        "make_vec": Contender(num_envs, ours.reset, ours.step, ours.close),
        "one": one_environment(task),
        "async": Contender(WORKERS, workers.reset, workers.step, workers.close),
    }


def one_environment(task: str) -> Contender:
    """Return dm_control's environment of a task, or ours if its suite has none."""
    from absl import logging
    from dm_control import suite

    from ringrl.envs import domain_of, make

    logging.set_verbosity(logging.ERROR)  # the suite's models use a deprecated attribute

    domain = domain_of(task).name
    name = task.removeprefix(f"{domain}_")
    if (domain, name) in suite.ALL_TASKS:
        original = suite.load(domain, name, task_kwargs={"random": 0})
        return Contender(1, original.reset, lambda actions: original.step(actions[0]))
    single = make(task, 0)
    return Contender(1, single.reset, lambda actions: single.step(actions[0]))


def measure(contender: Contender, action_size: int, length: int, seconds: float) -> dict[str, float]:
    """Return environment steps per second and, per environment, CPU seconds of a step and seconds of a reset."""
    shape = (length, contender.num_envs, action_size)
    actions = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    before_reset = time.perf_counter()
    contender.reset()
    begin, cpu = time.perf_counter(), time.process_time()
    steps, elapsed = 0, 0.0
    while steps < length and elapsed < seconds:
        contender.step(actions[steps])
        steps += 1
        elapsed = time.perf_counter() - begin
    cpu = time.process_time() - cpu
    total = steps * contender.num_envs
    return {"rate": total / elapsed, "cpu": cpu / total, "reset": (begin - before_reset) / contender.num_envs}


def physics_alone(task: str, seed: int) -> float:
    """Return the CPU seconds of one control timestep in mj_step, without Python."""
    from mujoco import MjData, mj_getState, mj_stateSize, mjtState, rollout

    from ringrl.envs import load_simulation

    simulation = load_simulation(task)
    simulation.reset(np.random.RandomState(seed))
    model, domain = simulation.model, simulation.domain
    state = np.empty(mj_stateSize(model, mjtState.mjSTATE_FULLPHYSICS))
    mj_getState(model, simulation.data, state, mjtState.mjSTATE_FULLPHYSICS)
    actions = np.random.default_rng(seed).uniform(-1, 1, (domain.episode_length, domain.action_size))
    substeps = round(domain.control_timestep / model.opt.timestep)
    controls = simulation.controls(actions).repeat(substeps, axis=0)
    begin = time.thread_time()
    rollout.rollout(model, MjData(model), state[None], controls[None])
    return (time.thread_time() - begin) / domain.episode_length


def envpool_run(task: str, num_envs: int, threads: int, seconds: float) -> dict[str, float] | None:
    """Measure EnvPool in its own interpreter. None if it lacks the task."""
    import envpool

    name = "".join(word.capitalize() for word in task.split("_")) + "-v1"
    if name not in envpool.list_all_envs():
        return None
    made = envpool.make_gymnasium(name, num_envs=num_envs, num_threads=threads)
    contender = Contender(num_envs, made.reset, made.step)
    return measure(contender, made.action_space.shape[-1], 1000, seconds)


def compare(task: str, options: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Return every run of every contender with the load of the machine, and of the physics alone."""
    from ringrl.envs import domain_of

    domain = domain_of(task)
    everyone = contenders(task, options.num_envs, options.threads)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in (*everyone, "physics")}
    for seed in range(options.runs):
        runs["physics"].append({"cpu": physics_alone(task, seed)})
        for name, contender in everyone.items():
            load = os.getloadavg()[0]
            run = measure(contender, domain.action_size, domain.episode_length, options.seconds)
            runs[name].append(run | {"load": load})
        if options.peer_python:
            threads = options.threads or os.cpu_count()
            given = task, options.num_envs, threads, options.seconds
            if run := in_process(envpool_run, *given, devices=1, python=options.peer_python):
                runs.setdefault("EnvPool", []).append(run)
    for contender in everyone.values():
        contender.close()
    return runs


def row(task: str, runs: dict[str, list[dict[str, float]]]) -> str:
    """Return the medians over the runs as a line of the table."""

    def values(name: str, what: str) -> np.ndarray:
        return np.array([run[what] for run in runs[name]])

    def ratio(peer: str) -> float:
        return float(np.median(values("make_vec", "rate") / values(peer, "rate")))

    def median(name: str, what: str) -> float:
        return float(np.median(values(name, what))) if name in runs else float("nan")

    return (
        f"{task:<31}{median('make_vec', 'rate'):>9.0f}{median('one', 'rate'):>8.0f}{ratio('one'):>7.1f}"
        f"{median('async', 'rate'):>8.0f}{ratio('async'):>7.1f}"
        f"{1e6 * median('make_vec', 'cpu'):>9.1f}{1e6 * median('one', 'cpu'):>8.1f}"
        f"{1e6 * median('physics', 'cpu'):>8.1f}{1e6 * median('EnvPool', 'cpu'):>8.1f}{median('EnvPool', 'rate'):>9.0f}"
        f"{1e3 * median('make_vec', 'reset'):>10.2f}{median('make_vec', 'load'):>7.1f}"
    )


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and, if asked, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=DEFAULT_TASKS, help="full task names (one per domain)")
    parser.add_argument("--num-envs", type=positive, default=64)
    parser.add_argument("--threads", type=positive, help="threads that simulate (one per core)")
    parser.add_argument("--runs", type=positive, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="at most, per run")
    parser.add_argument("--peer-python", help="an interpreter with EnvPool and gymnasium")
    parser.add_argument("--json", type=Path, help="also write every run to this file")
    options = parser.parse_args(arguments)
    settings = {"num_envs": options.num_envs, "threads": options.threads, "seconds": options.seconds}
    settings["cores"] = os.cpu_count()
    print(
        f"{options.num_envs} environments, {settings['cores']} cores; steps per second, then CPU microseconds per step"
    )
    print(
        f"{'task':<31}{'make_vec':>9}{'one':>8}{'ratio':>7}{'async':>8}{'ratio':>7}"
        f"{'make_vec':>9}{'one':>8}{'physics':>8}{'EnvPool':>8}{'steps/s':>9}{'reset ms':>10}{'load':>7}"
    )
    measured = {}
    for task in options.tasks:
        measured[task] = compare(task, options)
        print(row(task, measured[task]), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"settings": settings, "runs": measured}, indent=1))


if __name__ == "__main__":
    main()
