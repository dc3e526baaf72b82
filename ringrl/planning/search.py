"""Search by the formula for the best mesh, and for changes that make a workload fit."""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

from ringrl.errors import UserError
from ringrl.model.parallel import MESH_AXES
from ringrl.planning.machines import MOST_DEVICES, Machine
from ringrl.planning.memory import fits_by_formula, memory_of
from ringrl.planning.roofline import step_time
from ringrl.planning.workload import Workload


def meshes(workload: Workload, devices: int) -> Iterator[Workload]:
    """Yield the workload on every mesh of `devices` devices that divides it."""
    divisors = [size for size in range(1, devices + 1) if devices % size == 0]
    groups = divisors if workload.model.strategy == "ulysses_ring" else [1]
    for data, fsdp, tensor, ulysses in itertools.product(divisors, divisors, divisors, groups):
        seq, rest = divmod(devices, data * fsdp * tensor)
        if rest or not seq or seq % ulysses:
            continue
        candidate = workload.with_settings("mesh", data=data, fsdp=fsdp, tensor=tensor, seq=seq, ulysses=ulysses)
        try:
            candidate.check()
        except UserError:
            continue
        yield candidate


def best_meshes(workload: Workload, machine: Machine) -> list[Workload]:
    """Return all meshes: first those that fit by the formula, then by estimated time. Raise UserError for none."""

    def order(candidate: Workload) -> tuple[bool, float]:
        if fits_by_formula(candidate, machine):
            return False, step_time(candidate, machine).total
        return True, memory_of(candidate, machine.device.platform).total

    found = sorted(meshes(workload, machine.devices), key=order)
    if not found:
        contexts, multiple = workload.config.optimiser.batch_size, 2 * workload.tokens_per_step * machine.devices
        model, fixes = workload.model, ["other --contexts", "another number of devices"]
        if workload.tokens % multiple:
            fixes.insert(0, f"--tokens a multiple of {multiple}")
        if model.strategy in ("ulysses", "ulysses_ring"):
            fixes.insert(0, "--strategy ring")
        raise UserError(
            f"--machine {machine.name}: no mesh of {machine.devices} devices divides {contexts} context(s) of "
            f"{workload.tokens} tokens, {model.heads} heads and a width of {model.width} with strategy "
            f"{model.strategy}; use {', '.join(fixes[:-1])} or {fixes[-1]}"
        )
    return found


class Advice(NamedTuple):
    """A change and the resulting bytes per device."""

    change: str
    total: float
    is_enough: bool


def advise(workload: Workload, machine: Machine, total: float) -> list[Advice]:
    """Return changes that save memory, sufficient changes first.

    All results of the formula are shifted by its error for the plan, which takes `total` bytes per device.
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
    if model.remat != "full":
        yield "--remat full", "model", {"remat": "full"}
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
            sizes = {axis: getattr(longer.config.mesh, axis) for axis in (*MESH_AXES, "ulysses")}
            axes = " ".join(f"--mesh.{axis} {size}" for axis, size in sizes.items() if size > 1)
            return Advice(f"{devices * factor} devices, {axes}", total, True)
        factor *= 2
    return None
