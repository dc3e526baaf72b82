"""A plan: memory and time of one optimiser step on a machine, the longest context, and their text."""

import dataclasses
import math
from collections.abc import Callable
from functools import cached_property
from typing import Literal

from ringrl.config import MeshConfig, TrainConfig
from ringrl.errors import UserError
from ringrl.planning.ahead_of_time import Compiled, compile_step, devices_of, fits, why_not
from ringrl.planning.machines import GPU_SHARE, Machine, gib, kernel_of
from ringrl.planning.memory import Memory, fits_by_formula, longest_context, memory_of
from ringrl.planning.roofline import StepTime, attained_by, step_time
from ringrl.planning.search import Advice, advise, best_meshes
from ringrl.planning.workload import Workload, format_tokens


@dataclasses.dataclass(frozen=True)
class Plan:
    """Memory, time and longest context of a workload on a machine."""

    workload: Workload
    machine: Machine
    compiled: Compiled | None
    why_not_compiled: str | None

    @cached_property
    def formula(self) -> Memory:
        """Bytes per device from the formula."""
        return memory_of(self.workload, self.machine.device.platform)

    @cached_property
    def time(self) -> StepTime:
        """Estimated time of a step. Transfers that the compiler made synchronous are not hidden."""
        hops_hide = self.compiled is None or not self.compiled.waits_for_hops
        return step_time(self.workload, self.machine, hops_hide=hops_hide)

    @property
    def total(self) -> float:
        """Bytes per device from the compiler, else from the formula."""
        if self.compiled is None or math.isnan(self.compiled.total):
            return self.formula.total
        return self.compiled.total

    @property
    def fits(self) -> bool:
        """Whether the step fits into the memory of each device."""
        if self.compiled is not None:
            return fits(self.compiled, self.machine)
        return fits_by_formula(self.workload, self.machine)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest context that fits on this mesh, by the corrected formula; 0 if none fits."""
        return longest_context(self.workload, self.machine, extra=self.total - self.formula.total)

    @cached_property
    def advice(self) -> list[Advice]:
        """Changes that save memory, if the step does not fit."""
        return [] if self.fits else advise(self.workload, self.machine, self.total)


def make_plan(
    config: TrainConfig,
    machine: Machine,
    tokens: int,
    *,
    mesh: MeshConfig | None = None,
    method: Literal["compiler", "formula", "best"] = "best",
    notice: Callable[[str], None] = lambda _: None,
) -> Plan:
    """Return the plan of one optimiser step on contexts of `tokens` tokens, by default on the fastest mesh that fits.

    `method` "compiler" requires ahead-of-time compilation, and "best" compiles if possible. `notice` is called before
    compilation. Raise UserError if the mesh or the tokens do not divide, or if "compiler" cannot compile.
    """
    reason = "--method formula" if method == "formula" else why_not(machine)
    devices = devices_of(machine) if reason is None or method == "compiler" else None
    workload, compiled = _on_mesh(Workload(config, tokens, machine.device.device_kind), machine, mesh), None
    if devices:
        notice(f"compiling {tokens} tokens on {workload.mesh_in_words}")
        compiled = compile_step(workload, machine, devices)
    return Plan(workload, machine, compiled, reason)


def _on_mesh(workload: Workload, machine: Machine, mesh: MeshConfig | None) -> Workload:
    """Return the workload on the given or the best mesh."""
    if mesh is None and machine.devices > 1:
        return best_meshes(workload, machine)[0]
    if mesh is not None and mesh.devices != machine.devices:
        raise UserError(
            f"--mesh: data x fsdp x tensor x seq is {mesh.devices}, expected the {machine.devices} devices of "
            f"{machine.name}"
        )
    axes = MeshConfig().model_dump(exclude={"layout"}) if mesh is None else mesh.model_dump()
    workload = workload.with_settings("mesh", **axes)
    workload.check()
    return workload


def describe(plan: Plan) -> str:
    """Return the plan as text for a terminal."""
    model, machine, config = plan.workload.model, plan.machine, plan.workload.config
    device, compiled, share = machine.device, plan.compiled, ""
    if device.platform == "gpu" and machine.network is not None:  # a known GPU, with more memory than JAX's default
        share = f" (with XLA_PYTHON_CLIENT_MEM_FRACTION={GPU_SHARE}; JAX's default is 0.75)"
    method = f"from the formula: {plan.why_not_compiled}"
    if compiled is not None:
        method = f"from the compiler ({compiled.seconds:.0f} s); the formula gives {gib(plan.formula.total)}"
    lines = [
        f"{plan.workload.parameters.total:,} parameters, {model.attention} attention, remat "
        f"{model.remat}, {model.dtype}; {config.optimiser.batch_size} context(s) of {plan.workload.tokens} tokens",
        f"{machine.name}: {machine.devices} x {device.device_kind}, {gib(device.memory)} each{share}; mesh "
        f"{plan.workload.mesh_in_words}",
        *([f"strategy {', '.join(plan.workload.strategy)}"] if config.mesh.seq > 1 else []),
        method,
        "",
        *_memory(plan),
        "",
        *_verdict(plan),
        *_time(plan),
    ]
    return "\n".join(lines)


def _memory(plan: Plan) -> list[str]:
    formula, compiled = plan.formula, plan.compiled
    held = formula if compiled is None else compiled
    rows = {"parameters": held.parameters, "optimiser": held.optimiser, "batch": held.batch}
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
        lines = [f"does not fit: {plan.compiled.refusal if plan.compiled else 'too many tiles for the TPU kernel'}"]
    for advice in plan.advice:
        verdict = "enough" if advice.is_enough else "not enough"
        lines.append(f"  {verdict}: {advice.change} ({gib(advice.total)} per device)")
    if plan.longest == 0:
        return [*lines, "no context fits on this mesh"]
    how = "from the formula" + ("" if plan.total == plan.formula.total else ", corrected by the compiler")
    tokens = f"{plan.longest} tokens ({format_tokens(plan.longest)}; {how})"
    return [*lines, f"longest context that fits on this mesh: {tokens}"]


def _time(plan: Plan) -> list[str]:
    time, tokens = plan.time, plan.workload.tokens * plan.workload.config.optimiser.batch_size
    strategy = plan.workload.strategy.strategy
    synchronous = " (synchronous)" if plan.compiled and plan.compiled.waits_for_hops else ""
    parts = {
        "matrices": time.matrices,
        "attention": time.attention,
        "memory (overlaps)": time.memory,
        f"exposed {strategy}{synchronous}": time.ring,
        "exposed parameters": time.parameters,
        "all-reduce": time.sums,
    }
    of = " of the measured rate" if plan.machine.measured else ""
    return [
        f"estimated step: {time.total:.3g} s, {tokens / time.total:.3g} tokens/s, {time.model_flops:.3g} operations, "
        f"MFU {time.mfu:.0%}{of}",
        "  " + ", ".join(f"{name} {value:.2g} s" for name, value in parts.items()),
        f"  {_rates(plan)}",
    ]


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
