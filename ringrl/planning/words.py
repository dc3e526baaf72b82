"""A plan as text and as JSON."""

import dataclasses
import math
from typing import Any

from ringrl.planning import advice
from ringrl.planning.ahead_of_time import Compiled
from ringrl.planning.kernel import kernel_of
from ringrl.planning.machines import GPU_SHARE, Machine, gib
from ringrl.planning.plan import Plan
from ringrl.planning.roofline import attained_by
from ringrl.planning.workload import Workload, say_tokens


def describe(plan: Plan) -> str:
    """Return the plan as text for a terminal."""
    model, machine, config = plan.workload.model, plan.machine, plan.workload.config
    device, mesh = machine.device, plan.workload.mesh_in_words
    lines = [
        f"{plan.workload.parameters.total / 1e9:.3g} billion parameters, {model.attention} attention, remat "
        f"{model.remat}, {model.dtype}; {config.optimiser.batch_size} context(s) of {plan.workload.tokens} tokens",
        f"{machine.name}: {machine.devices} x {device.kind}, {gib(device.memory)} each{_share(machine)}; mesh {mesh}",
        _method(plan),
        "",
        *_memory(plan),
        "",
        *_verdict(plan),
        *_time(plan),
    ]
    if plan.candidates:
        lines += ["", "meshes, best first:", *(f"  {_candidate(*each)}" for each in plan.candidates)]
    lines.append(f"planned in {plan.seconds:.0f} s with {gib(plan.peak_memory)} on this machine")
    return "\n".join(lines)


def _share(machine: Machine) -> str:
    """Return the memory fraction that a known GPU needs, which is larger than JAX's default."""
    if machine.device.platform != "gpu" or machine.network is None:
        return ""
    return f" (with XLA_PYTHON_CLIENT_MEM_FRACTION={GPU_SHARE}; JAX's default is 0.75)"


def _method(plan: Plan) -> str:
    if plan.compiled is None:
        return f"from the formula: {plan.why_not_compiled}"
    return f"from the compiler ({plan.compiled.seconds:.0f} s); the formula gives {gib(plan.formula.total)}"


def _memory(plan: Plan) -> list[str]:
    formula, compiled = plan.formula, plan.compiled
    rows = {"parameters": formula.parameters, "optimiser": formula.optimiser, "batch": formula.batch}
    if compiled is not None:
        rows = {"parameters": compiled.parameters, "optimiser": compiled.optimiser, "batch": compiled.batch}
    if compiled is None or math.isnan(compiled.total):
        rows |= {"gradients": formula.gradients, "activations": formula.activations, "scratch": formula.scratch}
    else:
        rows["activations"] = formula.activations
        rows["gradients and scratch"] = compiled.total - sum(rows.values())
    lines = [f"  {name:<24}{gib(value):>14}" for name, value in rows.items()]
    share = plan.total / plan.machine.device.memory
    return ["per device", *lines, f"  {'total':<24}{gib(plan.total):>14}  ({share:.0%} of the memory)"]


def _verdict(plan: Plan) -> list[str]:
    limit = plan.machine.device.memory
    if plan.fits:
        lines = [f"fits, with {gib(limit - plan.total)} free"]
    elif plan.total > limit:
        lines = [f"does not fit: {gib(plan.total - limit)} too much per device"]
    else:
        refusal = plan.compiled.refusal if plan.compiled is not None else "too many tiles for the TPU kernel"
        lines = [f"does not fit: {refusal}"]
    lines += [f"  {advice.say(each)}" for each in plan.advice]
    longest = plan.longest
    if longest.tokens == 0:
        return [*lines, "no context fits on this mesh"]
    how = "from the formula" + (", corrected by the compiler" if longest.compiled else "")
    if longest.is_compiled:
        how = "compiled" + (f"; {longest.too_long} does not fit" if longest.too_long else "; nothing longer was tried")
    return [*lines, f"longest context that fits: {longest.tokens} tokens ({say_tokens(longest.tokens)}; {how})"]


def _time(plan: Plan) -> list[str]:
    time, tokens = plan.time, plan.workload.tokens * plan.workload.config.optimiser.batch_size
    parts = {
        "matrices": time.matrices,
        "attention": time.attention,
        "memory (overlaps)": time.memory,
        "exposed ring": time.ring,
        "exposed parameters": time.parameters,
        "all-reduce": time.sums,
    }
    of = " of the measured rate" if plan.machine.measured else ""
    lines = [
        f"estimated step: {time.total:.3g} s, {tokens / time.total:.3g} tokens/s, {time.model_flops:.3g} operations, "
        f"MFU {time.mfu:.0%}{of}",
        "  " + ", ".join(f"{name} {value:.2g} s" for name, value in parts.items()),
        f"  {_rates(plan)}",
    ]
    if plan.compiled is not None and plan.compiled.schedule is not None:
        lines.append(f"  schedule: {plan.compiled.schedule}")
    return lines


def _rates(plan: Plan) -> str:
    """Return the assumed or measured rates."""
    device, attained = plan.machine.device, attained_by(plan.workload, plan.machine)
    if plan.machine.measured:
        each = device.flops / 1e9
        return (
            f"measured per device ({plan.machine.devices} at once): {each:.3g} GFLOP/s in a matrix product, "
            f"{each * attained.attention:.3g} in attention, {device.bandwidth / 1e9:.2g} GB/s"
        )
    by = " (plain XLA, no kernel)" if kernel_of(plan.workload.model, device) == "xla" else ""
    return (
        f"assumed: {attained.matrices:.0%} of the bfloat16 peak in matrix products, {attained.attention:.0%} in "
        f"attention{by}, {attained.memory:.0%} of the memory and {attained.links:.0%} of the link rate; not timed"
    )


def _candidate(workload: Workload, compiled: Compiled | None) -> str:
    found = "not compiled" if compiled is None else (compiled.refusal or gib(compiled.total))
    return f"{workload.mesh_in_words}: {found}"


def as_json(plan: Plan) -> dict[str, Any]:
    """Return all numbers of the plan in bytes, seconds and tokens."""
    compiled = plan.compiled
    return {
        "machine": dataclasses.asdict(plan.machine),
        "model": plan.workload.model.model_dump(mode="json"),
        "mesh": plan.workload.config.mesh.model_dump(mode="json"),
        "contexts": plan.workload.config.optimiser.batch_size,
        "tokens": plan.workload.tokens,
        "method": "formula" if compiled is None else "compiler",
        "why_not_compiled": plan.why_not_compiled,
        "formula_bytes": dataclasses.asdict(plan.formula) | {"total": plan.formula.total},
        "compiled": None if compiled is None else _compiled_json(compiled),
        "total_bytes": plan.total,
        "fits": plan.fits,
        "longest_tokens": plan.longest.tokens,
        "longest_is_compiled": plan.longest.is_compiled,
        "too_long_tokens": plan.longest.too_long,
        "tried_bytes": {tokens: _number(found.total) for tokens, found in plan.longest.compiled},
        "advice": [dataclasses.asdict(each) for each in plan.advice],
        "step": dataclasses.asdict(plan.time) | {"seconds": plan.time.total},
        "assumed": attained_by(plan.workload, plan.machine)._asdict(),
        "planning_seconds": plan.seconds,
        "planning_peak_bytes": plan.peak_memory,
    }


def _compiled_json(compiled: Compiled) -> dict[str, Any]:
    schedule = None if compiled.schedule is None else compiled.schedule._asdict()
    return compiled._asdict() | {"schedule": schedule, "total": _number(compiled.total)}


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
