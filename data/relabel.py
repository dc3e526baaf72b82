"""Rewards computed from recorded physics states, for any task of the domain.

ExoRL's own relabelling sets the control to zero and runs the full forward dynamics in each state. Here the control is
the action that led to the state; with zero control the dense cartpole rewards are too high. MuJoCo computes only the
quantities that the rewards need, and the reward functions run once over all states.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float32, Float64

from ringrl.envs import Domain, domain_named, domain_of
from ringrl.errors import UserError

if TYPE_CHECKING:
    from ringrl.envs.simulation import Simulation

_simulations = threading.local()  # one simulation per domain and thread: threads must not share MuJoCo's state


def relabel(
    task: str, physics: Float64[np.ndarray, "time physics"], action: Float32[np.ndarray, "time action"]
) -> Float32[np.ndarray, " time"]:
    """Return the rewards of a recorded episode for a task (T+1,) float32.

    Row t follows ExoRL's convention: the reward of arriving in state `physics[t]` by `action[t]`, the action taken in
    the state before. Row 0 is the reset, with reward 0.

    Args:
        task: full task name, "walker_walk", of the recorded domain.
        physics: (T+1, P) float64 positions, velocities and activations.
        action: (T+1, A) float32 actions in [-1, 1], row 0 unused.

    Raises:
        UserError: unknown task, widths that are not the domain's, unequal lengths, or rows that are not finite.
    """
    return relabel_all(domain_of(task).name, physics, action, (task,))[task]


def relabel_all(
    domain: str,
    physics: Float64[np.ndarray, "time physics"],
    action: Float32[np.ndarray, "time action"],
    tasks: Sequence[str] | None = None,
) -> dict[str, Float32[np.ndarray, " time"]]:
    """Return the rewards of a recorded episode for several tasks of its domain, in one pass over the states.

    Arguments, rows and errors are as in `relabel`. The keys are full task names, by default all tasks of the domain.
    """
    facts = domain_named(domain)
    _check(facts, physics, action)
    simulation = _simulation(facts)
    rows = []
    set_state, refresh, read = simulation.set_physics_state, simulation.refresh, simulation.sensors
    for state in physics:
        set_state(state)
        refresh()
        rows.append(read())
    sensors = np.array(rows)
    rewards = {task: simulation.reward(task, sensors, action).astype(np.float32) for task in tasks or facts.tasks}
    for reward in rewards.values():
        reward[0] = 0
    return rewards


def _simulation(domain: Domain) -> Simulation:
    loaded: dict[str, Simulation] = vars(_simulations)
    if domain.name not in loaded:
        from ringrl.envs import load_simulation  # imports MuJoCo, which is slow

        loaded[domain.name] = load_simulation(domain.tasks[0])
    return loaded[domain.name]


def _check(domain: Domain, physics: np.ndarray, action: np.ndarray) -> None:
    for name, array, width in (("physics", physics, domain.physics_size), ("action", action, domain.action_size)):
        if array.ndim != 2 or array.shape[1] != width:
            raise UserError(f"{name} has shape {array.shape}, but {domain.name} needs (time, {width})")
        finite = np.isfinite(array).all(axis=1)
        if not finite.all():
            raise UserError(f"{name} is not finite in row {int(np.argmin(finite))}; {domain.name} cannot be relabelled")
    if len(physics) != len(action) or len(physics) == 0:
        raise UserError(f"physics has {len(physics)} rows and action {len(action)}; both need one row per state")
