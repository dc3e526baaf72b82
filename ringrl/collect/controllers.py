"""Scripted controllers: sinusoids (walker, cheetah, quadruped), swing-up (cartpole), reaching (jaco), paths (maze)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float64

from ringrl.envs import domain_of

if TYPE_CHECKING:
    from ringrl.envs.simulation import Simulation

ParameterVector = Float64[np.ndarray, " parameters"]  # of a controller, see `Recipe`
# Returns the action at a step of an episode, which may exceed [-1, 1]. It may read the state of the simulation.
Controller = Callable[[int], Float64[np.ndarray, " action"]]


@dataclass(frozen=True)
class Recipe:
    """A family of controllers with a parameter vector, and the start of the search over this vector."""

    controller: Callable[[Simulation, ParameterVector], Controller]  # called after a reset of the simulation
    mean: ParameterVector
    deviation: ParameterVector  # standard deviation
    # Limits of the share of noise in an action, at the start and at the end of the collection. An episode's share is
    # uniform below the limit.
    noise: tuple[float, float]


def recipe_of(task: str) -> Recipe:
    """Return the recipe of a task's domain, which fits all tasks of the domain. Raise UserError for an unknown task."""
    recipes = {
        "walker": _sinusoid_recipe(action_size=6, frequency=1.0),
        "cheetah": _sinusoid_recipe(action_size=6, frequency=2.0),
        "cartpole": _SWING_UP,
        "jaco": _REACH,
        # Half of the quadruped's episodes start on its back, and sinusoids do not turn it over.
        "quadruped": _sinusoid_recipe(action_size=12, frequency=1.0),
        "point_mass_maze": _MAZE,
    }
    return recipes[domain_of(task).name]


def _sinusoid_recipe(action_size: int, frequency: float) -> Recipe:
    """Return sinusoids with a common frequency (Hz), and an amplitude, an offset and a phase per actuator."""

    def parameters(log_frequency: float, amplitude: float, offset: float, phase: float) -> Float64[np.ndarray, " p"]:
        return np.concatenate(([log_frequency], np.repeat((amplitude, offset, phase), action_size)))

    return Recipe(
        controller=partial(_sinusoid, action_size),
        mean=parameters(np.log(frequency), 0.5, 0.0, 0.0),
        deviation=parameters(0.4, 0.3, 0.3, 2.0),
        noise=(0.2, 0.2),  # constant: the search itself varies the episodes
    )


def _sinusoid(action_size: int, simulation: Simulation, parameters: ParameterVector) -> Controller:
    frequency = np.exp(parameters[0])
    amplitude, offset, phase = parameters[1:].reshape(3, action_size)
    domain = simulation.domain
    seconds = domain.control_timestep * np.arange(domain.episode_length)[:, None]
    actions = offset + amplitude * np.sin(2 * np.pi * frequency * seconds + phase)
    return lambda step: actions[step]


_POLE = 2  # index of the body after world and cart
_GRAVITY = 9.81
_SWING = np.array((1.0, 0.3, 0.3))  # good gains of the swing-up: energy, cart position, cart velocity
# Linear-quadratic regulator of the upright pole (state cost 1, 1, .1, .1, control cost 1): gains of pole angle, pole
# velocity, cart position and cart velocity.
_BALANCE = np.array((6.7, 1.8, 1.0, 1.1))
_UPRIGHT_COSINE = 0.8  # the regulator acts above this cosine of the pole angle


def _swing_up(simulation: Simulation, parameters: Float64[np.ndarray, " 8"]) -> Controller:
    """Swing up by energy control (Åström and Furuta 2000), then linear feedback.

    Parameters: logarithms of seven gains relative to good gains, and a shift of `_UPRIGHT_COSINE`.
    """
    model, data = simulation.model, simulation.data
    mass, length = model.body_mass[_POLE], model.body_ipos[_POLE, 2]
    weight = mass * _GRAVITY * length
    inertia = model.body_inertia[_POLE, 1] + mass * length**2
    energy_gain, swing_position, swing_velocity = _SWING * np.exp(parameters[:3])
    angle_gain, spin_gain, position_gain, velocity_gain = _BALANCE * np.exp(parameters[3:7])
    upright_cosine = _UPRIGHT_COSINE + parameters[7]

    def act(step: int) -> Float64[np.ndarray, " 1"]:
        (position, angle), (velocity, spin) = data.qpos, data.qvel
        cosine = math.cos(angle)
        if cosine > upright_cosine:
            force = angle_gain * math.sin(angle) + spin_gain * spin
            return np.array([force + position_gain * position + velocity_gain * velocity])
        excess = 0.5 * inertia * spin**2 / weight + cosine - 1  # energy, zero when upright and at rest
        return np.array([energy_gain * excess * spin * cosine - swing_position * position - swing_velocity * velocity])

    return act


# The search starts with small gains, which mostly fail, and with strong noise.
_SWING_UP = Recipe(
    controller=_swing_up,
    mean=np.array((-0.7, -0.7, -0.7, -0.2, -0.2, -0.2, -0.2, 0.0)),
    deviation=np.array((1.0, 1.0, 1.0, 0.4, 0.4, 0.4, 0.4, 0.05)),
    noise=(1.0, 0.3),
)


_ARM = 6  # joints and actuators of the arm; three of the fingers follow
_DAMPING = 0.1  # metres per radian: slows the arm down near a singularity
_PINCH_SITE = "jaco_arm/jaco_hand/pinchsite"
_MIRRORS = np.array([(1, 1, 1), (-1, 1, 1), (1, -1, 1), (-1, -1, 1)])  # targets relative to the task's own


def _reach(simulation: Simulation, parameters: Float64[np.ndarray, " 6"]) -> Controller:
    """Reach for a target by damped least squares on the hand's Jacobian (Wampler 1986).

    Parameters: a preference for each of the four targets (the highest wins), the logarithm of the gain (1/s), and the
    action of the fingers.
    """
    import mujoco  # slow to import

    model, data = simulation.model, simulation.data
    site = model.site(_PINCH_SITE).id
    target = model.site("target_site").pos * _MIRRORS[np.argmax(parameters[:4])]
    gain = np.exp(parameters[4])
    fastest = model.actuator_ctrlrange[:_ARM, 1]  # radians per second: the actuators are velocity servos
    jacobian = np.empty((3, model.nv))
    action = np.full(model.nu, parameters[5])

    def act(step: int) -> Float64[np.ndarray, " 9"]:
        mujoco.mj_jacSite(model, data, jacobian, None, site)
        arm = jacobian[:, :_ARM]
        wanted = gain * (target - data.site_xpos[site])
        velocities = arm.T @ np.linalg.solve(arm @ arm.T + _DAMPING**2 * np.eye(3), wanted)
        action[:_ARM] = velocities / fastest
        return action

    return act


# All targets are equally likely at first: the search has to find the task's target.
_REACH = Recipe(_reach, np.zeros(6), np.array((1.0, 1.0, 1.0, 1.0, 1.0, 0.3)), noise=(1.0, 0.5))


# Positions of passages, metres. Episodes start in the top left room. The right passage leads to the bottom right room.
_TOP, _LEFT, _RIGHT = (0.0, 0.24), (-0.24, 0.0), (0.24, 0.0)
_WAYS = (  # waypoints of each of ExoRL's tasks, the goal last
    ((-0.15, 0.15),),
    (_TOP, (0.15, 0.15)),
    (_LEFT, (-0.15, -0.15)),
    (_TOP, _RIGHT, (0.15, -0.15)),
)
_CLOSE = 0.03  # metres: a waypoint within this distance is reached
_GAIN = 40.0  # action per metre


def _walk(simulation: Simulation, parameters: Float64[np.ndarray, " 5"]) -> Controller:
    """Move along waypoints. Parameters: a preference for each of four goals (the highest wins), and the log gain.

    In a task other than ExoRL's four, the goal is that of the task.
    """
    data = simulation.data
    *passages, goal = _WAYS[int(np.argmax(parameters[:4]))]
    if simulation.task not in simulation.domain.tasks:
        goal = simulation.physics.named.model.site_pos["goal"][:2]
        *passages, _ = next(way for way in _WAYS if (np.sign(way[-1]) == np.sign(goal)).all())
    ahead = list(np.array([*passages, goal]))
    gain = _GAIN * np.exp(parameters[4])

    def act(step: int) -> Float64[np.ndarray, " 2"]:
        if len(ahead) > 1 and np.linalg.norm(ahead[0] - data.qpos) < _CLOSE:
            ahead.pop(0)
        return gain * (ahead[0] - data.qpos)

    return act


_MAZE = Recipe(_walk, np.zeros(5), np.ones(5), noise=(0.8, 0.3))
