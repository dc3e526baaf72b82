"""ringrl evaluate: policies in their tasks."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import cyclopts
from rich.console import Console

from ringrl.cli.flags import command_line
from ringrl.config import MeshConfig
from ringrl.errors import UserError

if TYPE_CHECKING:  # JAX and MuJoCo are imported by what runs, not by --help
    from ringrl.evaluation.protocol import Protocol
    from ringrl.evaluation.session import Job
    from ringrl.training import TrainedPolicy

ALL_OF_DOMAIN = "all-of-domain"
ONE_DEVICE = MeshConfig()


def evaluate(
    *,
    checkpoint: tuple[Path, ...] = (),
    tasks: Annotated[tuple[str, ...], cyclopts.Parameter(alias="--task")] = (),
    episodes: int = 1,
    environments: int = 10,
    seed: int = 1_000_000,
    target: Annotated[str, cyclopts.Parameter(alias="--target-return")] = "best",
    prompt_trajectories: int = 0,
    prompt_seed: int = 0,
    data: Path | None = None,
    control: bool = False,
    step: int | None = None,
    output: Path | None = None,
    again: bool = False,
    video: bool = False,
    cache_dtype: Literal["float32", "bfloat16"] | None = None,
    mesh: MeshConfig = ONE_DEVICE,
) -> None:
    """Roll policies out in dm_control; one result per stream of episodes is appended to a file, a summary lies beside.

    The same command goes on after an interruption, and repeats nothing that is finished.

    Args:
        checkpoint: folders of runs made by `ringrl train`; without any, uniform random actions in --tasks.
        tasks: to act in, or all-of-domain; by default the one that each checkpoint was trained on.
        episodes: in-context episodes per stream, one after another in one context.
        environments: streams, rolled out in lockstep.
        seed: episode k of stream i starts from environment seed + i * episodes + k.
        target: return asked for: best (of the training data), a return in units of the task (800), so many times the
            best (0.9x), or a quantile of the data's returns (q0.75); methods that ask for none are not told.
        prompt_trajectories: trajectories of the training data that stand in the context before the first episode.
        prompt_seed: what they are drawn with.
        data: where the training data lies, if it has moved (for a prompt, a quantile, or another task's best).
        control: also roll out as many episodes without memory of each other (the prompt stays).
        step: checkpoint to take; by default the newest.
        output: results file (.jsonl); by default evaluation.jsonl in each run's folder.
        again: repeat what the results file holds already.
        video: also write the first, the median and the best episode as mp4, into a folder beside the results file.
        cache_dtype: what keys and values are kept in; by default what the policy computes in.
        mesh: devices among which the cache of each context is divided (seq alone).
    """
    from ringrl.evaluation.board import Board, final_table
    from ringrl.evaluation.protocol import Protocol
    from ringrl.evaluation.session import evaluate_all
    from ringrl.training import load_policy

    if output is not None and output.suffix != ".jsonl":
        raise UserError(f"--output: {output} is not a results file; give a name that ends in .jsonl")
    if checkpoint and prompt_seed and not prompt_trajectories:
        raise UserError("--prompt-seed: no prompt is drawn; give --prompt-trajectories too, or leave it out")
    protocol = Protocol(environments, episodes, seed, target, control, prompt_trajectories, prompt_seed, cache_dtype)
    if checkpoint:
        jobs = [
            job for run in checkpoint for job in _jobs(load_policy(run, step, mesh), run, tasks, protocol, data, output)
        ]
    else:
        given = {"--data": data, "--step": step, "--cache-dtype": cache_dtype, "--control": control}
        given |= {
            "--target": target != "best",
            "--prompt-trajectories": prompt_trajectories,
            "--prompt-seed": prompt_seed,
            "--mesh": mesh.devices > 1,
        }
        for flag in (name for name, value in given.items() if value):
            raise UserError(f"{flag}: random actions know nothing of it; leave it out, or give a --checkpoint")
        jobs = _random_jobs(tasks, protocol, output)
    console = Console()
    with Board(jobs, console) as board:
        summaries = evaluate_all(jobs, again=again, video=video, audience=board)
    console.print(final_table(summaries))
    for path in dict.fromkeys(job.results for job in jobs):
        print(path)


def _jobs(
    trained: "TrainedPolicy",
    run: Path,
    tasks: tuple[str, ...],
    protocol: "Protocol",
    data: Path | None,
    output: Path | None,
) -> "list[Job]":
    """Of one checkpoint."""
    from ringrl.evaluation.protocol import plan_policy, programs_of
    from ringrl.evaluation.session import Job

    own = trained.info.config.task
    chosen, programs = _tasks(tasks, trained.info.domain) or [own], programs_of(trained, protocol, own)
    plan = partial(plan_policy, trained, run, protocol, data=data, command=command_line(), programs=programs)
    plans = [plan(task=task) for task in chosen]
    return [Job(plan, output or run / "evaluation.jsonl") for plan in plans]


def _random_jobs(tasks: tuple[str, ...], protocol: "Protocol", output: Path | None) -> "list[Job]":
    from ringrl.evaluation.protocol import plan_random
    from ringrl.evaluation.session import Job

    if ALL_OF_DOMAIN in tasks:
        raise UserError("--tasks: all-of-domain needs a --checkpoint, which has a domain; name the tasks one by one")
    if not tasks:
        raise UserError("--checkpoint: give the folder of a run, or name --tasks alone to evaluate random actions")
    plans = [plan_random(task, protocol, command=command_line()) for task in _tasks(tasks, "")]
    return [Job(plan, output or Path("random.jsonl")) for plan in plans]


def _tasks(names: tuple[str, ...], domain: str) -> list[str]:
    """The tasks that are named, each once."""
    from ringrl.envs import domain_named

    everything = [task for name in names for task in (domain_named(domain).tasks if name == ALL_OF_DOMAIN else [name])]
    return list(dict.fromkeys(everything))
