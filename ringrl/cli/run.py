"""ringrl train and evaluate: one policy."""

from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from ringrl.cli.words import command_line
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
    from ringrl.training import train as train_run
    from ringrl.training.distributed import is_wanted
    from ringrl.training.slurm import submit
    from ringrl.training.supervisor import run_supervised

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
    print(f"{run}; next: ringrl evaluate --checkpoint {run}")


def evaluate(
    checkpoint: Path | None = None,
    task: str | None = None,
    episodes: int = 1,
    environments: int = 10,
    seed: int = 1_000_000,
    target_return: float | None = None,
    control: bool = False,
    step: int | None = None,
    output: Path | None = None,
) -> None:
    """Roll a policy out in dm_control and append one result per stream of episodes.

    Args:
        checkpoint: folder of a run made by `ringrl train`; without it, uniform random actions in --task.
        task: task to act in; by default the one that was trained on.
        episodes: in-context episodes per stream, one after another in one context.
        environments: streams, rolled out in lockstep.
        seed: stream i starts from environment seed + i.
        target_return: return asked for, in units of the task; by default the best of the training data.
        control: also roll out as many episodes without memory of each other.
        step: checkpoint to take; by default the newest.
        output: results file (.jsonl); by default evaluation.jsonl in the run's folder.
    """
    from ringrl.evaluation.protocol import Protocol, evaluate_policy, evaluate_random
    from ringrl.evaluation.records import append_records
    from ringrl.study.report import table
    from ringrl.training import load_policy

    console = Console()
    protocol = Protocol(environments, episodes, seed, target_return, control)
    if checkpoint is None:
        if task is None:
            raise UserError("--checkpoint: give the folder of a run, or --task alone to evaluate random actions")
        output = output or Path("random.jsonl")
        records = evaluate_random(task, protocol, command=command_line())
    else:
        trained = load_policy(checkpoint, step)
        output = output or checkpoint / "evaluation.jsonl"
        with console.status("rolling out") as status:
            records = evaluate_policy(
                trained,
                checkpoint,
                protocol,
                task=task,
                command=command_line(),
                on_episode=lambda returns: status.update(f"rolling out: mean return {returns.mean():.1f}"),
            )
    append_records(output, records)
    console.print(table([output]))
    print(output)
