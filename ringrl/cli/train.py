"""ringrl train: train one policy."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import cyclopts
import pydantic
from cyclopts.config import Dict

from ringrl.cli.flags import check_launcher, command_line, given_flags
from ringrl.config import DistributedConfig, SlurmConfig, TrainConfig, merged, one_line, read_yaml
from ringrl.errors import UserError
from ringrl.methods import METHODS, MethodName, check_method


def train(
    *,
    settings: Annotated[TrainConfig, cyclopts.Parameter(name="*")],
    config: Path | None = None,
    method: MethodName | None = None,
    resume: bool = False,
    profile: bool = False,
    distributed: DistributedConfig = DistributedConfig(),
    launcher: Literal["none", "slurm"] = "none",
    slurm: SlurmConfig = SlurmConfig(),
) -> None:
    """Train a policy.

    Args:
        settings: settings of the run.
        config: YAML file of settings. --method and other flags override it.
        method: method to train. Sets the settings that define the method; other flags override them.
        resume: continue from the run's last checkpoint, on the same or on other devices. Without a checkpoint, training
            starts at step 0.
        profile: write a JAX trace of steps 4 to 6 to RUN/profile/.
        distributed: several processes that train one run; start each with the same command.
        launcher: slurm submits the run to SLURM and returns, instead of training here.
        slurm: resources of the SLURM job.
    """
    from ringrl.training import read_info
    from ringrl.training import train as train_run
    from ringrl.training.distributed import is_wanted
    from ringrl.training.slurm import submit
    from ringrl.training.supervisor import run_supervised

    check_launcher(launcher, slurm)
    if launcher == "slurm" and (flags := given_flags("distributed", distributed)):
        raise UserError(f"{flags}: not used with --launcher slurm, whose processes find each other; remove it")
    if method is not None:
        check_method(settings, method)
    run, work = settings.run, partial(train_run, settings, profile=profile)
    if launcher == "slurm":
        job, logs = submit(work, settings.run, slurm, resume)
        print(f"job {job}; output: {logs}")
        return
    if not is_wanted(distributed):
        work(resume=resume)
    elif run_supervised(partial(work, resume=resume), distributed) != 0:
        return  # process 0 reports
    step, steps = read_info(run)[0], settings.optimiser.steps
    if step < steps:  # a signal stopped it
        command = command_line() if resume else f"{command_line()} --resume"
        print(f"{run}: step {step} of {steps}; next: {command}")
    else:
        print(f"{run}; next: ringrl evaluate --checkpoint {run}")


def add_settings(app: cyclopts.App, commands: tuple[str, ...], arguments: cyclopts.ArgumentCollection) -> None:
    """Add the settings of --config and --method, which flags override; --method overrides --config."""
    file, name = _value(arguments, "--config"), _value(arguments, "--method")
    values = read_yaml(Path(file)) if file else {}
    if name in METHODS:  # the parser rejects other names
        try:
            values = merged(values, METHODS[name].settings or {})
        except UserError as error:
            raise UserError(f"{file}: {error}") from error
    required: dict[str, Any] = {"data": Path(), "task": "", "run": Path()}
    try:
        TrainConfig.model_validate(required | values)
    except pydantic.ValidationError as error:
        raise UserError(f"{file or '--method'}: {one_line(error)}") from error
    Dict({"train": values}, source=file or f"--method {name}")(app, commands, arguments)


def _value(arguments: cyclopts.ArgumentCollection, flag: str) -> str:
    """Return the value given with a flag; empty if none is."""
    tokens = arguments[flag].tokens
    return tokens[-1].value if tokens else ""
