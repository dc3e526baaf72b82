"""Search for the best mesh, the longest context, and changes that make a workload fit; the formula comes first."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from ringrl.errors import UserError
from ringrl.planning.ahead_of_time import Compiled, compile_step, fits
from ringrl.planning.machines import MOST_DEVICES, Machine
from ringrl.planning.memory import fits_by_formula, longest_context, memory_of
from ringrl.planning.roofline import estimate
from ringrl.planning.workload import Workload

CLOSE_ENOUGH = 0.03  # between the longest context that fits and the shortest that does not


@dataclasses.dataclass(frozen=True)
class Longest:
    """The longest context that fits."""

    tokens: int  # 0 if no context fits
    is_compiled: bool  # by the compiler; else by the formula
    too_long: int | None  # shortest length that did not fit when compiled
    compiled: Mapping[int, Compiled]  # all compiled lengths, shortest first


def meshes(workload: Workload, devices: int) -> Iterator[Workload]:
    """Yield the workload on every mesh of `devices` devices that divides it."""
    divisors = [size for size in range(1, devices + 1) if devices % size == 0]
    for data, fsdp, tensor in itertools.product(divisors, repeat=3):
        seq, rest = divmod(devices, data * fsdp * tensor)
        if rest or not seq:
            continue
        candidate = workload.with_settings("mesh", data=data, fsdp=fsdp, tensor=tensor, seq=seq)
        try:
            candidate.check()
        except UserError:
            continue
        yield candidate


def best_meshes(workload: Workload, machine: Machine) -> list[Workload]:
    """Return all meshes: first those that fit by the formula, then by estimated time. Raise UserError for none."""

    def order(candidate: Workload) -> tuple[bool, float]:
        if fits_by_formula(candidate, machine):
            return False, estimate(candidate, machine).total
        return True, memory_of(candidate, machine.device.platform).total

    found = sorted(meshes(workload, machine.devices), key=order)
    if not found:
        contexts, multiple = workload.config.optimiser.batch_size, 2 * workload.tokens_per_step * machine.devices
        raise UserError(
            f"--machine {machine.name}: no mesh of {machine.devices} devices divides {contexts} contexts of "
            f"{workload.tokens} tokens, {workload.model.heads} heads and a width of {workload.model.width}; use "
            f"--tokens a multiple of {multiple}, other --contexts, or another number of devices"
        )
    return found


def find_longest(
    workload: Workload,
    machine: Machine,
    devices: list[Any] | None,
    compilations: int,
    known: Mapping[int, Compiled] = MappingProxyType({}),
    notice: Callable[[str], None] = lambda _: None,
) -> Longest:
    """Return the longest context that fits on this mesh.

    Without compilations the result is the formula's, corrected by the results in `known`. Near the memory limit the
    TPU compiler is ten times slower.

    Args:
      devices: devices to compile for; None: the formula alone.
      compilations: maximum number of compilations besides `known`.
      known: tokens -> result of earlier compilations.
      notice: called before every compilation.
    """
    tried = dict(known)
    if devices is None or compilations == 0:
        return Longest(_guess(workload, machine, tried), False, None, tried)
    for _ in range(compilations):
        tokens = _next(workload, machine, tried)
        if tokens is None:
            break
        notice(f"compiling {tokens} tokens")
        tried[tokens] = compile_step(workload.with_tokens(tokens), machine, devices)
    good, bad = _bracket(machine, tried)
    return Longest(good, True, bad, dict(sorted(tried.items())))


def granule(workload: Workload) -> int:
    """Return the unit of compiled lengths: whole tiles on each device."""
    return math.lcm(workload.multiple, 256 * workload.config.mesh.seq)


def _guess(workload: Workload, machine: Machine, tried: dict[int, Compiled]) -> int:
    """Return the longest context by the formula, corrected by the compiled total nearest to the memory limit."""
    counted = {tokens: found.total for tokens, found in tried.items() if not math.isnan(found.total)}
    if not counted:
        return longest_context(workload, machine)
    nearest = min(counted, key=lambda tokens: abs(counted[tokens] - machine.device.memory))
    extra = counted[nearest] - memory_of(workload.with_tokens(nearest), machine.device.platform).total
    return longest_context(workload, machine, extra=extra)


def _bracket(machine: Machine, tried: Mapping[int, Compiled]) -> tuple[int, int | None]:
    """Return the longest compiled length that fits, or 0, and the shortest that does not, or None."""
    good = max((tokens for tokens, found in tried.items() if fits(found, machine)), default=0)
    return good, min((tokens for tokens, found in tried.items() if not fits(found, machine)), default=None)


def _next(workload: Workload, machine: Machine, tried: dict[int, Compiled]) -> int | None:
    """Return the next length to compile, or None if the bracket is narrow enough."""
    step = granule(workload)
    good, too_long = _bracket(machine, tried)
    bad = too_long or 2**31
    if bad - good <= max(step, CLOSE_ENOUGH * good):
        return None
    tokens = _guess(workload, machine, tried) // step * step
    if not good < tokens < bad:  # bisect, or try a little beyond the longest that fits
        upper = bad if bad < 2**31 else int(good * (1 + 2 * CLOSE_ENOUGH))
        tokens = max((good + upper) // 2, good + step) // step * step
    return tokens if good < tokens < bad else None


@dataclasses.dataclass(frozen=True)
class Advice:
    """A change and the resulting bytes per device."""

    change: str
    total: float
    is_enough: bool


def advise(workload: Workload, machine: Machine, total: float) -> list[Advice]:
    """Return changes that save memory, sufficient changes first.

    `total`: bytes per device of the plan, from the compiler if known. All results of the formula are shifted by the
    formula's error for the plan.
    """
    platform = machine.device.platform
    extra = total - memory_of(workload, platform).total

    def judge(change: str, changed: Workload) -> Advice:
        return Advice(change, memory_of(changed, platform).total + extra, fits_by_formula(changed, machine, extra))

    found, everything = [], workload
    for change, section, values in _changes(workload):
        found.append(judge(change, workload.with_settings(section, **values)))
        everything = everything.with_settings(section, **values)
    found = [advice for advice in found if advice.total < total or advice.is_enough]
    if len(found) > 1 and not any(advice.is_enough for advice in found):
        found.append(judge("all changes above", everything))
    if more := _enough_devices(workload, machine, extra):
        found.append(more)
    return sorted(found, key=lambda advice: (not advice.is_enough, advice.total))


def _changes(workload: Workload) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield (text, section of the configuration, settings) of changes that may save memory."""
    model, mesh, optimiser = workload.model, workload.config.mesh, workload.config.optimiser
    if model.remat == "none":
        yield "--remat layers", "model", {"remat": "layers"}
    if model.attention in ("vanilla", "memory_efficient"):
        kind = "blockwise" if mesh.seq == 1 else "ring"
        yield f"--attention {kind}", "model", {"attention": kind}
    if model.dtype == "float32":
        yield "model.dtype: bfloat16", "model", {"dtype": "bfloat16"}
    block = max(512, model.block_tokens // 4)
    if model.attention in ("blockwise", "ring") and block < min(model.block_tokens, workload.local_tokens):
        yield f"--block-tokens {block}", "model", {"block_tokens": block}
    if workload.local_contexts > 1:
        parts = optimiser.accumulation * workload.local_contexts
        yield f"optimiser.accumulation: {parts}", "optimiser", {"accumulation": parts}


def _enough_devices(workload: Workload, machine: Machine, extra: float) -> Advice | None:
    """Return the smallest sufficient number of devices, scaled by a power of two along "seq"."""
    seq, devices = workload.config.mesh.seq, workload.config.mesh.devices
    factor = 2
    while devices * factor <= MOST_DEVICES:
        longer = workload.with_settings("mesh", seq=seq * factor)
        try:
            longer.check()
        except UserError:
            return None
        if fits_by_formula(longer, machine, extra / factor):
            total = memory_of(longer, machine.device.platform).total + extra / factor
            return Advice(f"{devices * factor} devices, --mesh.seq {seq * factor}", total, True)
        factor *= 2
    return None
