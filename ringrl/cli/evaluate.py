"""ringrl evaluate: roll out policies in their tasks."""

from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal

import cyclopts
from rich.console import Console

from ringrl.cli.flags import command_line, environment_task, reject_flags
from ringrl.config import MeshConfig
from ringrl.errors import UserError

ALL_OF_DOMAIN = "all-of-domain"


def evaluate(
    *,
    checkpoint: tuple[Path, ...] = (),
    tasks: Annotated[tuple[str, ...], cyclopts.Parameter(alias="--task")] = (),
    environment: str | None = None,
    episodes: int = 1,
    environments: int = 10,
    seed: int = 1_000_000,
    target: Annotated[str, cyclopts.Parameter(alias="--target-return")] = "best",
    prompt_trajectories: int = 0,
    prompt_seed: int = 0,
    prompt_task: str | None = None,
    prompt_rewards: Literal["kept", "zero"] = "kept",
    prompt_order: Literal["kept", "shuffled"] = "kept",
    policy: Literal["trained", "copy", "clone"] = "trained",
    data: Path | None = None,
    control: bool = False,
    step: int | None = None,
    checkpoint_kind: Literal["last", "best"] = "last",
    output: Path | None = None,
    again: bool = False,
    video: bool = False,
    side_by_side: bool = False,
    video_format: Literal["mp4", "gif", "apng"] = "mp4",
    video_speed: int = 1,
    step_timeout: float = 300.0,
    mesh: MeshConfig = MeshConfig(),
) -> None:
    """Roll out policies, and write the return of every episode to a results file.

    A stream is a number of episodes, one after another in one context. The results file has one line per stream.
    Finished evaluations are not repeated.

    Args:
        checkpoint: folders of runs made by `ringrl train`. Without one, uniform random actions are taken in --tasks.
        tasks: tasks to act in, or all-of-domain; by default the task of each checkpoint.
        environment: Gymnasium environment to act in, instead of --tasks, for example Hopper-v5. myenv:Point-v0 first
            imports the module myenv, which registers the environment.
        episodes: episodes per stream.
        environments: number of streams, which are rolled out together.
        seed: first environment seed. Episode k of stream i starts from seed + i * episodes + k.
        target: target return: best (of the training data), a return in units of the task (800), a multiple of the best
            (0.9x), or a quantile of the training data's returns (q0.75). Methods without a target return ignore it.
        prompt_trajectories: trajectories of the training data in the context before the first episode.
        prompt_seed: seed of the random draw of the prompt.
        prompt_task: draw the prompt from another task of the dataset, as a control.
        prompt_rewards: zero hides the rewards of the prompt, as a control.
        prompt_order: shuffled puts the prompt's trajectories in random order, as a control.
        policy: a baseline instead of the trained policy. copy: the action of the prompt's step with the nearest
            normalised observation. clone: a feed-forward network trained on the prompt alone.
        data: path of the training data if it has moved (read for a prompt, a quantile, another task's best, and means).
        control: also roll out the same episodes with the memory cleared before each episode (the prompt stays).
        step: step of the checkpoint, instead of --checkpoint-kind.
        checkpoint_kind: last (newest) or best (lowest held-out loss, or in runs without held-out episodes lowest
            training loss).
        output: results file (.jsonl); by default evaluation.jsonl in each run's folder.
        again: repeat finished evaluations.
        video: also write videos of the first, the median and the best episode, into a folder next to the results file.
        side_by_side: with --video, write one video instead: the first, the middle and the last episode of the context
            of median return, next to the control.
        video_format: format of the videos. gif and apng have 10 to 13 frames per second.
        video_speed: speed of the videos as a multiple of the simulated time.
        step_timeout: seconds that a reset or a step of a Gymnasium environment may take before its stream ends.
        mesh: devices over which the cache of each context is sharded (seq only).
    """
    given = locals()
    from ringrl.envs import domain_of, is_foreign
    from ringrl.evaluation import Evaluation, Protocol, evaluate_all, policy_evaluation, random_evaluation
    from ringrl.evaluation.actors import CompiledPolicy
    from ringrl.evaluation.policy import load_policy
    from ringrl.evaluation.progress import ProgressLines, final_table
    from ringrl.evaluation.protocol import prompt_only_evaluation
    from ringrl.evaluation.target import open_dataset
    from ringrl.evaluation.video import VideoOptions

    if environment is not None:
        if tasks:
            raise UserError("--environment: cannot be combined with --tasks; give only one")
        tasks = (environment_task(environment),)
    if checkpoint and prompt_seed and not prompt_trajectories:
        raise UserError("--prompt-seed: no prompt is drawn; give --prompt-trajectories too, or leave it out")
    if step is not None and checkpoint_kind != "last":
        raise UserError("--checkpoint-kind: --step already selects the checkpoint; give only one")
    if (side_by_side or video_format != "mp4" or video_speed != 1) and not video:
        raise UserError("--side-by-side, --video-format, --video-speed: need a video; give --video, too")
    if video_speed < 1:
        raise UserError(f"--video-speed: {video_speed} is too small; give at least 1")
    if side_by_side and not (control and episodes > 1):
        raise UserError("--side-by-side: compares episodes with the control; give --control and --episodes 2 or more")
    protocol = Protocol(
        environments, episodes, seed, target, control, prompt_trajectories, prompt_seed, prompt_task, prompt_rewards,
        prompt_order, step_timeout,
    )  # fmt: skip
    evaluations: list[Evaluation] = []
    data_means: dict[str, float] = {}
    command = command_line()
    for run in checkpoint:
        trained = load_policy(run, step, mesh, checkpoint_kind)
        own = trained.info.config.task
        compiled = CompiledPolicy(trained.policy, trained.parallel)
        named: list[str] = []
        for name in tasks or (own,):
            named += domain_of(own).tasks if name == ALL_OF_DOMAIN else [name]
        evaluations += [
            policy_evaluation(
                trained, protocol, task=task, data=data, command=command, results=output, compiled=compiled
            )
            for task in dict.fromkeys(named)
        ]
        with suppress(UserError):  # a missing dataset only leaves its row out
            store = open_dataset(trained.info, run, data)
            data_means |= {task: float(store.returns(task).mean()) for task in store.tasks if task in named}
    if policy != "trained":
        evaluations = [prompt_only_evaluation(evaluation, policy) for evaluation in evaluations]
    if not checkpoint:
        why = "has no effect on random actions; leave it out, or give a --checkpoint"
        used = {"checkpoint", "tasks", "environment", "episodes", "environments", "seed", "output", "again", "video",
                "step_timeout"}  # fmt: skip
        reject_flags(evaluate, given, why, used=used)
        if ALL_OF_DOMAIN in tasks:
            raise UserError("--tasks: all-of-domain needs a --checkpoint, which has a domain; name the tasks instead")
        if not tasks:
            raise UserError("--checkpoint: give the folder of a run, or give only --tasks to evaluate random actions")
        results = output or Path("random.jsonl")
        unique = dict.fromkeys(tasks)
        evaluations = [random_evaluation(task, protocol, command=command, results=results) for task in unique]
    if video and (foreign := [one.template.task for one in evaluations if is_foreign(one.template.task)]):
        raise UserError(
            f"--video: {foreign[0]} is drawn by its own package; leave it out, and record a player of the policy in "
            "ringrl.envs.make(task, render_mode='rgb_array') with Gymnasium's RecordVideo"
        )
    options = VideoOptions(side_by_side, video_format, video_speed) if video else None
    console = Console()
    with ProgressLines(console) as progress:
        summaries = evaluate_all(evaluations, again=again, video=options, progress=progress)
    console.print(final_table(summaries, data_means))
    for path in dict.fromkeys(evaluation.results for evaluation in evaluations):
        print(path)
    failed = [one.task for one in summaries if is_foreign(one.task) and one.failed + one.failed_without_context]
    if failed:
        raise UserError(
            f"{failed[0]}: the environment failed, so some episodes have no return; all others are kept; correct "
            "the environment, and repeat with --again"
        )
