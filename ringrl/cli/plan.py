"""ringrl plan: memory and time of a training step on hardware that this machine lacks."""

import contextlib
from typing import Literal

from rich.console import Console

from ringrl.config import MeshConfig, Strategy, TrainConfig


def plan(
    *,
    model: str,
    machine: str,
    tokens: str | None = None,
    mesh: MeshConfig = MeshConfig(),
    contexts: int | None = None,
    attention: Literal["vanilla", "memory_efficient", "blockwise", "ring"] | None = None,
    strategy: Strategy | None = None,
    remat: Literal["none", "layers", "full"] | None = None,
    block_tokens: int | None = None,
    method: Literal["best", "compiler", "formula"] = "best",
) -> None:
    """Estimate the memory and time of a training step on a given machine.

    Without --mesh flags, the plan uses the fastest mesh that fits, by estimate.

    Args:
        model: 3b, 7b, 13b, 30b or 350m; a preset; a run's folder; or a configuration file (.yaml).
        machine: tpu-v4-512 (v3, v4 and v5p count cores), tpu-v5e-256 (v5e and v6e count chips), 8xa100 (80 GB; any
            number), 8xa100-40, 8xh100, 8xh200, cpu-8 (host devices of this machine, measured), or a file
            with the machine's numbers, your own or that of `ringrl doctor --save`.
        tokens: tokens of a context, for example 32768, 512k or 8M (k is 1024, M is 1024 x 1024). Default: the tokens
            of the configuration and its dataset.
        mesh: devices along each axis.
        contexts: contexts per step. Default: the configuration's.
        attention: kind of attention. Default: the configuration's.
        strategy: how ring attention gets the keys of other devices. Default: the configuration's.
        remat: what the backward pass recomputes. Default: the configuration's.
        block_tokens: tokens that a feed-forward layer processes at a time. Default: the configuration's.
        method: compiler compiles ahead of time for TPUs (needs libtpu: pip install "jax[tpu]") and host devices, in
            minutes. formula uses the closed form only, in seconds. best uses the compiler where possible.
    """
    import jax

    from ringrl.planning.machines import find_machine, measure_host
    from ringrl.planning.plan import describe, make_plan
    from ringrl.planning.workload import context_tokens, find_model, read_tokens

    jax.config.update("jax_platforms", "cpu")  # planning must not occupy an accelerator
    values = find_model(model).model_dump()
    changes = {"attention": attention, "strategy": strategy, "remat": remat, "block_tokens": block_tokens}
    values["model"] |= {name: value for name, value in changes.items() if value is not None}
    if mesh.layout != MeshConfig().layout:  # a chosen mesh uses the layout too
        values["mesh"] |= {"layout": mesh.layout}
    if contexts is not None:
        values["optimiser"] |= {"batch_size": contexts}
    config = TrainConfig.model_validate(values)
    where = find_machine(machine)
    length = context_tokens(model, config) if tokens is None else read_tokens(tokens)
    chosen = None if mesh.devices == 1 else mesh.model_copy(update={"layout": config.mesh.layout})
    with Console(stderr=True).status("planning") as status:
        if where.device.platform == "cpu":
            with contextlib.suppress(RuntimeError):  # JAX is initialised already; the plan reports its devices
                jax.config.update("jax_num_cpu_devices", where.devices)
            where = where if where.measured else measure_host(where, config.model)
        made = make_plan(config, where, length, mesh=chosen, method=method, notice=lambda line: status.update(line))
    print(describe(made))
