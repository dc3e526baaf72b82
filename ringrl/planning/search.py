"""Search for the best mesh and the longest context, with the formula first and few compilations."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

from ringrl.errors import UserError
from ringrl.model.parallel import MESH_AXES
from ringrl.planning.ahead_of_time import Compiled, compile_step, fits
from ringrl.planning.closed_form import listed_tiles_fit, longest_context, memory_of
from ringrl.planning.machines import Machine
from ringrl.planning.roofline import estimate
from ringrl.planning.workload import Workload

CLOSE_ENOUGH = 0.03  # between the longest context that fits and the shortest that does not


@dataclasses.dataclass(frozen=True)
class Longest:
    """The longest context that fits; `tokens` is 0 if none fits."""

    tokens: int
    is_compiled: bool  # whether the compiler confirmed the length; else from the formula
    too_long: int | None  # shortest length that did not fit when compiled
    compiled: tuple[tuple[int, Compiled], ...] = ()  # all compiled lengths


def meshes(workload: Workload, devices: int) -> Iterator[Workload]:
    """Yield the workload on every mesh of `devices` devices that divides it."""
    for mesh in factorisations(devices, len(MESH_AXES)):
        candidate = workload.with_settings("mesh", **dict(zip(MESH_AXES, mesh, strict=True)))
        try:
            candidate.check()
        except UserError:
            continue
        yield candidate


def factorisations(number: int, factors: int) -> Iterator[tuple[int, ...]]:
    """Yield all ordered factorisations of a number into `factors` factors."""
    if factors == 1:
        yield (number,)
        return
    for first in (size for size in range(1, number + 1) if number % size == 0):
        for rest in factorisations(number // first, factors - 1):
            yield first, *rest


def best_meshes(workload: Workload, machine: Machine) -> list[Workload]:
    """Return all meshes: first those that fit by the formula, then by estimated time. UserError if none divides."""

    def order(candidate: Workload) -> tuple[bool, float]:
        total = memory_of(candidate, machine.device.platform).total
        is_fitting = total <= machine.device.memory and listed_tiles_fit(candidate, machine)
        return not is_fitting, estimate(candidate, machine).total if is_fitting else total

    found = sorted(meshes(workload, machine.devices), key=order)
    if not found:
        raise UserError(_no_mesh(workload, machine))
    return found


def _no_mesh(workload: Workload, machine: Machine) -> str:
    """Return an error message with changes that give a mesh."""
    devices, contexts = machine.devices, workload.config.optimiser.batch_size
    multiple, parts = 2 * workload.tokens_per_step * devices, workload.config.optimiser.accumulation
    changes = {
        f"--tokens a multiple of {multiple}": workload.with_tokens(multiple),
        f"--contexts {devices * parts}": workload.with_settings("optimiser", batch_size=devices * parts),
    }
    ways = [change for change, changed in changes.items() if any(True for _ in meshes(changed, devices))]
    return (
        f"--machine {machine.name}: no mesh of {devices} devices divides {contexts} contexts of {workload.tokens} "
        f"tokens, {workload.model.heads} heads and a width of {workload.model.width}; use "
        + " or ".join([*ways, "another number of devices"])
    )


def find_longest(
    workload: Workload,
    machine: Machine,
    devices: list[Any] | None,
    compilations: int,
    known: tuple[tuple[int, Compiled], ...] = (),
    notice: Callable[[str], None] = lambda _: None,
) -> Longest:
    """Return the longest context that fits on this mesh.

    Without compilations the result is the formula's, corrected by the results in `known`. Close to the memory limit
    the TPU compiler takes ten times as long as elsewhere.

    Args:
      devices: devices to compile for; None: the formula alone.
      compilations: maximum number of compilations besides `known` (tokens, result).
      notice: called before every compilation.
    """
    tried = dict(known)
    if devices is None or compilations == 0:
        return Longest(_guess(workload, machine, tried), False, None, tuple(sorted(tried.items())))
    for _ in range(compilations):
        tokens = _next(workload, machine, tried)
        if tokens is None:
            break
        notice(f"compiling {tokens} tokens")
        tried[tokens] = compile_step(workload.with_tokens(tokens), machine, devices)
    good = max((tokens for tokens, found in tried.items() if fits(found, machine)), default=0)
    bad = min((tokens for tokens, found in tried.items() if not fits(found, machine)), default=None)
    return Longest(good, True, bad, tuple(sorted(tried.items())))


def granule(workload: Workload) -> int:
    """Return the unit of compiled lengths: whole tiles on each device."""
    return math.lcm(workload.multiple, 256 * workload.config.mesh.seq)


def _guess(workload: Workload, machine: Machine, tried: dict[int, Compiled]) -> int:
    """Return the longest context by the formula, corrected by the compiled total nearest to the memory limit."""
    counted = {tokens: found.total for tokens, found in tried.items() if not math.isnan(found.total)}
    if not counted:
        return longest_context(workload, machine)
    nearest = min(counted, key=lambda tokens: abs(counted[tokens] - machine.device.memory))
    surplus = counted[nearest] - memory_of(workload.with_tokens(nearest), machine.device.platform).total
    return longest_context(workload, machine, spare=surplus)


def _next(workload: Workload, machine: Machine, tried: dict[int, Compiled]) -> int | None:
    """Return the next length to compile, or None if the bracket is narrow enough."""
    step = granule(workload)
    good = max((tokens for tokens, found in tried.items() if fits(found, machine)), default=0)
    bad = min((tokens for tokens, found in tried.items() if not fits(found, machine)), default=2**31)
    if bad - good <= max(step, CLOSE_ENOUGH * good):
        return None
    tokens = _guess(workload, machine, tried) // step * step
    if not good < tokens < bad:  # bisect, or try a little beyond the longest that fits
        upper = bad if bad < 2**31 else int(good * (1 + 2 * CLOSE_ENOUGH))
        tokens = max((good + upper) // 2, good + step) // step * step
    return tokens if good < tokens < bad else None
