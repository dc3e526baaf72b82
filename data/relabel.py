"""Rewards computed from recorded physics states, for any task of the domain.

ExoRL's own relabelling sets the control to zero, sets each state and runs the full forward dynamics. Here the control
is the action that led to the state, without which the dense cartpole rewards come out too high, and MuJoCo computes
only what the rewards are made of; the reward functions themselves run once, over all the states.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float32, Float64

from ringrl.data.provenance import Relabelling
from ringrl.envs import Domain, domain_named, domain_of
from ringrl.errors import UserError

if TYPE_CHECKING:
    from ringrl.envs.simulation import Simulation

_simulations = threading.local()  # one simulation per domain and thread: MuJoCo's state must not be shared


def relabel(
    task: str, physics: Float64[np.ndarray, "time physics"], action: Float32[np.ndarray, "time action"]
) -> Float32[np.ndarray, " time"]:
    """The rewards of a recorded episode under a task.

    Row t follows ExoRL's convention: the reward of arriving in state `physics[t]` by `action[t]`, the action taken one
    state before. Row 0 is the reset, its reward 0.

    Args:
        task: full task name, "walker_walk"; the task need not be the one recorded.
        physics: (T+1, P) float64 positions, velocities and activations.
        action: (T+1, A) float32 actions in [-1, 1], row 0 unused.

    Raises:
        UserError: unknown task, widths that are not the domain's, unequal lengths, or rows that are not finite.
    """
    domain = domain_of(task)
    _check(domain, physics, action)
    return _rewards(task, _sensors(domain, physics), action)


def relabel_all(
    domain: str,
    physics: Float64[np.ndarray, "time physics"],
    action: Float32[np.ndarray, "time action"],
    relabelling: Relabelling = "control_aware",
) -> dict[str, Float32[np.ndarray, " time"]]:
    """The rewards of a recorded episode under every task of its domain, for the price of one pass over the states.

    Arguments and rows as in `relabel`; the keys are the full task names. With `relabelling` "exorl_compat" the rewards
    are those of ExoRL's own code, which sets the control to zero: too high in the dense cartpole tasks and the maze,
    the same elsewhere.

    Raises:
        UserError: unknown domain, or as `relabel` does.
    """
    facts = domain_named(domain)
    _check(facts, physics, action)
    sensors = _sensors(facts, physics)
    if relabelling == "exorl_compat":
        action = np.zeros_like(action)
    return {task: _rewards(task, sensors, action) for task in facts.tasks}


def _rewards(
    task: str, sensors: Float64[np.ndarray, "time sensors"], action: Float32[np.ndarray, "time action"]
) -> Float32[np.ndarray, " time"]:
    rewards = _simulation(domain_of(task)).reward(task, sensors, action).astype(np.float32)
    rewards[0] = 0
    return rewards


def _sensors(domain: Domain, physics: Float64[np.ndarray, "time physics"]) -> Float64[np.ndarray, "time sensors"]:
    """What the domain's rewards are computed from, state by state."""
    simulation = _simulation(domain)
    set_state, refresh, sensors = simulation.set_physics_state, simulation.refresh, simulation.sensors
    rows = []
    for state in physics:
        set_state(state)
        refresh()
        rows.append(sensors())
    return np.array(rows)


def _simulation(domain: Domain) -> Simulation:
    loaded: dict[str, Simulation] = vars(_simulations)
    if domain.name not in loaded:
        from ringrl.envs import load_simulation

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
