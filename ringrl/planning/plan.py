"""A plan: memory and time of one optimiser step on a machine, whether it fits, and the longest context."""

import dataclasses
import math
import resource
import time
from collections.abc import Callable
from typing import Any, Literal

from ringrl.config import MeshConfig, TrainConfig
from ringrl.errors import UserError
from ringrl.planning.advice import Advice, advise
from ringrl.planning.ahead_of_time import Compiled, compile_step, devices_of, fits, why_not
from ringrl.planning.closed_form import Memory, listed_tiles_fit, memory_of
from ringrl.planning.machines import Machine
from ringrl.planning.roofline import StepTime, estimate
from ringrl.planning.search import Longest, best_meshes, find_longest
from ringrl.planning.workload import Workload

Notice = Callable[[str], None]
CANDIDATES = 3  # meshes that a search compiles


@dataclasses.dataclass(frozen=True)
class Plan:
    """Memory, time, longest context and advice for a workload on a machine."""

    workload: Workload
    machine: Machine
    formula: Memory
    compiled: Compiled | None
    why_not_compiled: str | None
    time: StepTime
    longest: Longest
    advice: tuple[Advice, ...]
    candidates: tuple[tuple[Workload, Compiled | None], ...]  # meshes of a search, best first
    seconds: float  # planning time
    peak_memory: float  # peak bytes of this process

    @property
    def total(self) -> float:
        """Bytes per device from the compiler, else from the formula."""
        has_figure = self.compiled is not None and not math.isnan(self.compiled.total)
        return self.compiled.total if self.compiled is not None and has_figure else self.formula.total

    @property
    def fits(self) -> bool:
        """Whether the step fits into the memory of each device."""
        if self.compiled is not None:
            return fits(self.compiled, self.machine)
        return self.total <= self.machine.device.memory and listed_tiles_fit(self.workload, self.machine)


@dataclasses.dataclass(frozen=True)
class Request:
    """A planning request; with mesh None the plan chooses the mesh."""

    config: TrainConfig
    machine: Machine
    tokens: int
    mesh: MeshConfig | None = None
    method: Literal["compiler", "formula", "best"] = "best"
    compilations: int = 0  # at most, for the longest context
    search: bool = False


def make_plan(request: Request, notice: Notice = lambda _: None) -> Plan:
    """Return the plan of a request; `notice` is called before every compilation.

    Raises:
      UserError: the mesh or the tokens do not divide; method "compiler" without a compiler for the machine.
    """
    began, machine = time.perf_counter(), request.machine
    reason = "--method formula" if request.method == "formula" else why_not(machine)
    devices = devices_of(machine) if reason is None or request.method == "compiler" else None
    tried = [(each, _compile(each, machine, devices, notice) if devices else None) for each in _workloads(request)]
    tried.sort(key=lambda each: each[1] is None or not fits(each[1], machine))
    workload, compiled = tried[0]
    known = () if compiled is None else ((workload.tokens, compiled),)
    longest = find_longest(workload, machine, devices, request.compilations, known, notice)
    hops_hide = compiled is None or compiled.schedule is None or compiled.schedule.hides_the_ring
    plan = Plan(
        workload, machine, memory_of(workload, machine.device.platform), compiled, reason,
        estimate(workload, machine, hops_hide=hops_hide), longest, (), tuple(tried) if request.search else (), 0.0, 0.0,
    )  # fmt: skip
    advice = () if plan.fits else tuple(advise(workload, machine, plan.total))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
    return dataclasses.replace(plan, advice=advice, seconds=time.perf_counter() - began, peak_memory=peak)


def _workloads(request: Request) -> list[Workload]:
    """Return the workload to plan, or the best meshes of a search."""
    workload, machine = Workload(request.config, request.tokens), request.machine
    if request.mesh is None:
        if machine.devices == 1:
            workload = workload.with_settings("mesh", data=1, fsdp=1, tensor=1, seq=1)
            workload.check()
            return [workload]
        return best_meshes(workload, machine)[: CANDIDATES if request.search else 1]
    if request.search:
        raise UserError("--search: cannot be combined with --mesh; remove one of them")
    if request.mesh.devices != machine.devices:
        raise UserError(
            f"--mesh: data x fsdp x tensor x seq is {request.mesh.devices}, expected the {machine.devices} devices of "
            f"{machine.name}"
        )
    workload = workload.with_settings("mesh", **request.mesh.model_dump())
    workload.check()
    return [workload]


def _compile(workload: Workload, machine: Machine, devices: list[Any], notice: Notice) -> Compiled:
    notice(f"compiling {workload.tokens} tokens on {workload.mesh_in_words}")
    return compile_step(workload, machine, devices)
