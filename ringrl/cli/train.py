"""ringrl train: train one policy."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import cyclopts
import pydantic
from cyclopts.config import Dict

from ringrl.cli.flags import command_line
from ringrl.config import DistributedConfig, TrainConfig
from ringrl.config_files import merged, one_line, read_yaml
from ringrl.configs import settings_file
from ringrl.errors import UserError
from ringrl.files import expanded
from ringrl.methods import METHODS, MethodName, check_method


def train(
    *,
    settings: Annotated[TrainConfig, cyclopts.Parameter(name="*")],
    config: Path | None = None,
    method: MethodName | None = None,
    resume: str | None = None,
    resume_or_start: bool = False,
    distributed: DistributedConfig = DistributedConfig(),
) -> None:
    """Train a policy.

    Args:
        settings: settings of the run.
        config: YAML file of settings, or the name of a preset (tiny, small, ...). --method and other flags override
            the file.
        method: method to train. Sets all settings that define the method. Other flags override these settings.
        resume: folder of a run. Continues the run from its newest checkpoint, with its own settings, on the same or on
            other devices. Without a value: the folder of --run, or the folder of a run's own config.yaml in --config.
        resume_or_start: resume the run in --run if there is one, else start it. For jobs that a scheduler restarts.
        distributed: several processes that train one run together.
    """
    from ringrl.training import read_info
    from ringrl.training import train as train_run
    from ringrl.training.checkpoints import EarlyStopping
    from ringrl.training.distributed import is_first, is_wanted, run_to_the_end

    if method is not None:
        check_method(settings, method)
    run, is_resumed = settings.run, resume is not None or resume_or_start

    def work() -> None:
        train_run(settings, resume=is_resumed)
        step, steps = read_info(run)[0], settings.optimiser.steps
        if not is_first():
            return
        if step < steps and not EarlyStopping.saved(run, step).has_converged(settings):  # a signal stopped it
            print(f"{run}: step {step} of {steps}; next: {command_line()}{'' if is_resumed else ' --resume'}")
        else:
            command = ["ringrl", "evaluate", "--checkpoint", str(run)]
            if len(settings.tasks) > 1:
                command += ["--tasks", *settings.tasks]
                if settings.context.trajectories > 1:  # only a prompt shows the policy its task
                    command += ["--prompt-trajectories", "1"]
            print(f"{run}; next: {shlex.join(command)}")

    if is_wanted(distributed):
        run_to_the_end(work, distributed)
    work()


def add_settings(app: cyclopts.App, commands: tuple[str, ...], arguments: cyclopts.ArgumentCollection) -> None:
    """Add the settings of the resumed run, of --config and of --method, if flags do not override them.

    Later settings in this list override earlier ones.

    Raise UserError if a file cannot be used, or if there is no run to resume.
    """
    file, name = _value(arguments, "--config"), _value(arguments, "--method")
    values = read_yaml(settings_file(expanded(file))) if file else {}
    if (run := _resumed_run(arguments, file, values)) is not None:
        from ringrl.training.run_folder import saved_configuration

        saved = saved_configuration(run)
        values = merged(saved.model_dump(mode="json") | {"data": saved.data}, values | {"run": run})
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
    for flag in ("data", "run"):  # the text of a saved path would be expanded again
        if isinstance(path := values.get(flag), Path):
            tokens = arguments[f"--{flag}"].tokens
            tokens[:] = [t if t.source == "cli" else t.evolve(implicit_value=path) for t in tokens]


def _resumed_run(arguments: cyclopts.ArgumentCollection, file: str, values: Mapping[str, Any]) -> Path | None:
    """Return the folder of the run to resume; None if a run starts. Raise UserError if there is none to resume."""
    is_asked, is_optional = bool(arguments["--resume"].tokens), bool(arguments["--resume-or-start"].tokens)
    if not is_asked and not is_optional:
        return None
    from ringrl.training.run_folder import holds_run

    given, run = _value(arguments, "--resume"), _value(arguments, "--run")
    if given and run and Path(given) != Path(run):
        raise UserError(f"--run {run}: differs from --resume {given}; remove one of them")
    own = expanded(file).parent if Path(file).name == "config.yaml" else None
    is_own = own is not None and holds_run(own)
    named = given or run or (own if is_own else values.get("run"))
    if not named:
        raise UserError("--resume: give the folder of a run")
    folder = expanded(named)
    if holds_run(folder):
        return folder
    if is_optional:
        return None
    raise UserError(f"{folder}: holds no run to resume; give the folder of a run, or remove --resume to start one")


def _value(arguments: cyclopts.ArgumentCollection, flag: str) -> str:
    """Return the value given with a flag; empty if none is."""
    tokens = arguments[flag].tokens
    return tokens[-1].value if tokens else ""
