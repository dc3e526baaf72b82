"""ringrl train: one policy."""

from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ringrl.cli.words import check_launcher, command_line, given_flags
from ringrl.config import DistributedConfig, SlurmConfig, TrainConfig
from ringrl.errors import UserError
from ringrl.methods import MethodName, check_method

Settings = Annotated[TrainConfig, tyro.conf.arg(name="")]  # its flags stand at the top: --model.layers 4


HERE, PLAIN_JOB = DistributedConfig(), SlurmConfig()


def train(
    settings: Settings,
    config: Path | None = None,
    method: MethodName | None = None,
    resume: bool = False,
    profile: bool = False,
    distributed: DistributedConfig = HERE,
    launcher: Literal["none", "slurm"] = "none",
    slurm: SlurmConfig = PLAIN_JOB,
) -> None:
    """Train a policy.

    Args:
        config: YAML file of settings; --method and flags given beside it win.
        method: what to train, by its name; sets what tells it from the others, and other flags win.
        resume: go on with the run exactly where its last checkpoint stands, on these devices or others.
        profile: write a JAX trace of steps 4 to 6 to the run's folder profile/.
        distributed: several processes as one run, each started with the same command.
        launcher: slurm: hand the run to SLURM and return, instead of training here.
        slurm: what is asked of SLURM.
    """
    from ringrl.training import read_info
    from ringrl.training import train as train_run
    from ringrl.training.distributed import is_wanted
    from ringrl.training.slurm import submit
    from ringrl.training.supervisor import run_supervised

    check_launcher(launcher, slurm)
    if launcher == "slurm" and (flags := given_flags("distributed", distributed)):
        raise UserError(f"{flags}: not heeded with --launcher slurm, whose processes find each other; leave it out")
    if method is not None:
        check_method(settings, method)
    run, work = settings.run, partial(train_run, settings, profile=profile)
    if launcher == "slurm":
        job, logs = submit(work, settings.run, slurm, resume)
        print(f"job {job}, whose output goes to {logs}")
        return
    if not is_wanted(distributed):
        work(resume=resume)
    elif run_supervised(partial(work, resume=resume), distributed) != 0:
        return  # process 0 speaks for all
    step, steps = read_info(run)[0], settings.optimiser.steps
    if step < steps:  # it was told to stop
        command = command_line() if resume else f"{command_line()} --resume"
        print(f"{run}: step {step} of {steps}; next: {command}")
    else:
        print(f"{run}; next: ringrl evaluate --checkpoint {run}")
