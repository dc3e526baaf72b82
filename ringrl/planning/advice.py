"""Changes that make a workload fit, from the memory formula."""

import dataclasses
from collections.abc import Iterator

from ringrl.errors import UserError
from ringrl.planning.closed_form import listed_tiles_fit, memory_of
from ringrl.planning.machines import MOST_DEVICES, Machine, gib
from ringrl.planning.workload import Workload


@dataclasses.dataclass(frozen=True)
class Advice:
    """A change and the resulting bytes per device."""

    change: str
    total: float
    is_enough: bool


def advise(workload: Workload, machine: Machine, total: float) -> list[Advice]:
    """Return changes that save memory, sufficient changes first.

    `total` are the bytes per device of the plan, from the compiler if known. The formula's result of each change is
    shifted by the formula's error for the plan.
    """
    platform, limit = machine.device.platform, machine.device.memory
    off = total - memory_of(workload, platform).total

    def judge(change: str, changed: Workload, saved: float = 0.0) -> Advice:
        after = memory_of(changed, platform).total + off - saved
        return Advice(change, after, after <= limit and listed_tiles_fit(changed, machine))

    changes = list(_changes(workload))
    found = [judge(change, changed) for change, changed in changes]
    found = [advice for advice in found if advice.total < total or advice.is_enough]
    if len(found) > 1 and not any(advice.is_enough for advice in found):
        everything = workload
        for _, changed in changes:
            everything = _merged(workload, everything, changed)
        found.append(judge("all changes above", everything))
    moments = memory_of(workload, platform).optimiser / 2
    name = "optimiser moments in bfloat16, which RingRL does not support"
    found.append(judge(name, workload, saved=moments))
    if devices := _enough_devices(workload, machine, off):
        needed, after = devices
        change = f"{needed} devices, --mesh.seq {needed * workload.config.mesh.seq // workload.config.mesh.devices}"
        found.append(Advice(change, after, True))
    return sorted(found, key=lambda advice: (not advice.is_enough, advice.total))


def _changes(workload: Workload) -> Iterator[tuple[str, Workload]]:
    model, mesh, optimiser = workload.model, workload.config.mesh, workload.config.optimiser
    if model.remat == "none":
        yield "--remat layers", workload.with_settings("model", remat="layers")
    if model.attention in ("vanilla", "memory_efficient"):
        kind = "blockwise" if mesh.seq == 1 else "ring"
        yield f"--attention {kind}", workload.with_settings("model", attention=kind)
    if model.dtype == "float32":
        yield "model.dtype: bfloat16", workload.with_settings("model", dtype="bfloat16")
    block = max(512, model.block_tokens // 4)
    if model.attention in ("blockwise", "ring") and block < min(model.block_tokens, workload.local_tokens):
        yield f"--block-tokens {block}", workload.with_settings("model", block_tokens=block)
    if workload.local_contexts > 1:
        parts = optimiser.accumulation * workload.local_contexts
        change = f"optimiser.accumulation: {parts}"
        yield change, workload.with_settings("optimiser", accumulation=parts)


def _merged(before: Workload, so_far: Workload, change: Workload) -> Workload:
    for section in ("model", "optimiser"):
        old, new = getattr(before.config, section).model_dump(), getattr(change.config, section).model_dump()
        if changed := {name: value for name, value in new.items() if value != old[name]}:
            so_far = so_far.with_settings(section, **changed)
    return so_far


def _enough_devices(workload: Workload, machine: Machine, off: float) -> tuple[int, float] | None:
    """Return the smallest sufficient number of devices, scaled by a power of two along "seq", and its bytes."""
    seq, devices = workload.config.mesh.seq, workload.config.mesh.devices
    factor = 2
    while devices * factor <= MOST_DEVICES:
        longer = workload.with_settings("mesh", seq=seq * factor)
        try:
            longer.check()
        except UserError:
            return None
        total = memory_of(longer, machine.device.platform).total + off / factor
        if total <= machine.device.memory and listed_tiles_fit(longer, machine):
            return devices * factor, total
        factor *= 2
    return None


def say(advice: Advice) -> str:
    """Format as one line."""
    return f"{'enough' if advice.is_enough else 'not enough'}: {advice.change} ({gib(advice.total)} per device)"
