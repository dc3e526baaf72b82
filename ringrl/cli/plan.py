"""ringrl plan: what fits where."""

import dataclasses
import json as json_module
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console

from ringrl.config import MeshConfig, TrainConfig
from ringrl.errors import UserError
from ringrl.files import write_whole

if TYPE_CHECKING:
    from ringrl.planning.machines import Machine

CHOSEN = MeshConfig()  # one device: the mesh is left to the plan


@dataclasses.dataclass(frozen=True)
class Custom:
    """Numbers of a machine of one's own (--machine custom)."""

    devices: int = 8
    """Devices in all."""
    memory: float = 0.0
    """GiB of a device that a program may use."""
    tflops: float = 0.0
    """10^12 bfloat16 operations per second of a device."""
    bandwidth: float = 0.0
    """10^9 bytes per second from and to a device's memory."""
    link: float = 0.0
    """10^9 bytes per second to a neighbour, one way."""


NO_NUMBERS = Custom()


def plan(
    model: str,
    machine: str,
    tokens: str,
    mesh: MeshConfig = CHOSEN,
    contexts: int | None = None,
    attention: Literal["vanilla", "memory_efficient", "blockwise", "ring"] | None = None,
    remat: Literal["none", "layers"] | None = None,
    block_tokens: int | None = None,
    method: Literal["best", "compiler", "formula"] = "best",
    compilations: int = 0,
    search: bool = False,
    custom: Custom = NO_NUMBERS,
    json: Path | None = None,
) -> None:
    """Say what fits where: memory and time of a training step on a machine that need not be there.

    Args:
        model: 3b, 7b, 13b, 30b or 350m; a preset; a run's folder; or a configuration of your own (.yaml).
        machine: tpu-v4-512 (v3, v4 and v5p by cores), tpu-v5e-256 (v5e and v6e by chips), 8xa100 (80 GB; or any other
            number), 8xa100-40, 8xh100, 8xh200, cpu-8 (host devices of this machine, measured), or custom.
        tokens: of a context, for example 32768, 512k or 8M: k is 1024, M is 1024 x 1024.
        mesh: devices along each axis; without it, the mesh of least estimated time among those that fit.
        contexts: contexts of a step; by default the model's configuration says.
        attention: kind of attention, instead of the configuration's.
        remat: what the backward pass computes anew, instead of the configuration's.
        block_tokens: tokens that a feed-forward layer takes at a time, instead of the configuration's.
        method: compiler: ahead of time, for TPUs (needs libtpu: pip install "jax[tpu]") and host devices, in minutes;
            formula: the closed form alone, in a second; best: the compiler where it can.
        compilations: let the compiler find the longest context, with at most so many attempts, each of which may take
            ten minutes close to the limit; 0: it is the formula's, corrected by the compiler's figure for --tokens.
        search: compile the best three meshes, not the best one alone.
        custom: numbers of a machine that is not known.
        json: also write everything there, as JSON.
    """
    import jax

    from ringrl.planning.plan import Request, make_plan
    from ringrl.planning.probe import measured
    from ringrl.planning.words import as_json, describe
    from ringrl.planning.workload import find_model, read_tokens

    jax.config.update("jax_platforms", "cpu")  # no accelerator is taken for planning
    changes = {"attention": attention, "remat": remat, "block_tokens": block_tokens}
    config = _changed(find_model(model), changes, contexts, mesh)
    where, length = _machine(machine, custom), read_tokens(tokens)
    chosen = None if mesh.devices == 1 else mesh.model_copy(update={"layout": config.mesh.layout})
    if compilations < 0:
        raise UserError(f"--compilations {compilations}: expected 0 or more")
    with Console(stderr=True).status("planning") as status:
        if where.device.platform == "cpu":
            _want_host_devices(where.devices)
            where = measured(where, config.model)
        request = Request(config, where, length, chosen, method, compilations, search)
        made = make_plan(request, lambda line: status.update(line))
    print(describe(made))
    if json is not None:
        _write(json, json_module.dumps(as_json(made), indent=1))


def _machine(name: str, custom: Custom) -> "Machine":
    from ringrl.planning.machines import custom_machine, find_machine

    if name == "custom":
        return custom_machine(*dataclasses.astuple(custom))
    if custom != NO_NUMBERS:
        raise UserError(f"--custom: holds numbers for --machine custom, and --machine is {name}; give one of the two")
    return find_machine(name)


def _changed(config: TrainConfig, model: Mapping[str, object], contexts: int | None, mesh: MeshConfig) -> TrainConfig:
    """The configuration with the flags' values; validated as a whole."""
    values = config.model_dump()
    values["model"] |= {name: value for name, value in model.items() if value is not None}
    if mesh.layout != CHOSEN.layout:  # which a mesh that is chosen has, too
        values["mesh"] |= {"layout": mesh.layout}
    if contexts is not None:
        values["optimiser"] |= {"batch_size": contexts}
    return TrainConfig.model_validate(values)


def _want_host_devices(number: int) -> None:
    """As many as the machine has, if JAX has not begun yet."""
    import jax

    try:
        jax.config.update("jax_num_cpu_devices", number)
    except RuntimeError:
        return  # it has: the plan says how many there are


def _write(path: Path, text: str) -> None:
    try:
        write_whole(path, text, alone=False)
    except OSError as error:
        raise UserError(f"--json {path}: cannot be written ({error.strerror})") from error
