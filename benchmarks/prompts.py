"""How much of its return does a model owe to the trajectories that stand in its context?

    python benchmarks/prompts.py RUN [RUN ...] [--single RUN ...] [--lengths 0 1 2 3] [--draws 5] [--streams 4]
                                 [--results prompts.jsonl] [--json FILE] [--plot FILE.svg]

RUNs are folders of training runs that differ by their seed alone, for example cells of a study. Each model acts in
single episodes with so many trajectories of its training data in its memory, drawn and ordered as its training contexts
were: the same weights, the same starts and several draws, and only the context longer. `--single` names models of one
trajectory, which know no others: what such a model returns by itself. Every episode is kept in the file of results, so
that what is finished is not done again: a file beside the runs, for a report of a study is not to count these.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from command_line import positive, told_in_one_line
from drawing import save_svg

from ringrl.evaluation.protocol import FIRST_SEED, Protocol, plan_policy, programs_of
from ringrl.evaluation.records import EvaluationRecord, read_records
from ringrl.evaluation.session import Job, evaluate_all
from ringrl.evaluation.statistics import Estimate, estimate
from ringrl.training import load_policy

RESULTS = "prompts.jsonl"


def evaluate_prompts(
    run: Path, lengths: Sequence[int], draws: int, streams: int, results: Path
) -> list[EvaluationRecord]:
    """Single episodes with prompts of each length, `draws` of them with `streams` starts each, into a results file.

    In all tasks that the run was trained on. Returns these, whatever else the file holds.
    """
    trained, jobs = load_policy(run), []
    config = trained.info.config
    programs = programs_of(trained, Protocol(), config.task)
    for task in (config.task, *config.context.other_tasks):
        for draw in range(draws):
            for trajectories in sorted(set(lengths)):
                protocol = Protocol(
                    environments=streams,
                    seed=FIRST_SEED + draw * streams,
                    prompt_trajectories=trajectories,
                    prompt_seed=draw if trajectories else 0,
                )
                jobs.append(Job(plan_policy(trained, run, protocol, task=task, programs=programs), results))
    evaluate_all(jobs)
    asked = {job.plan.shared.evaluation for job in jobs}
    return [record for record in read_records(results).records if record.evaluation in asked]


def mean_returns(records: Sequence[EvaluationRecord]) -> list[np.ndarray]:
    """Per task, the mean return of each training seed (seeds,)."""
    found: dict[str, dict[int, list[float]]] = {}
    for record in records:
        found.setdefault(record.task, {}).setdefault(record.seed, []).extend(record.finished)
    return [np.array([np.mean(returns) for _, returns in sorted(runs.items())]) for _, runs in sorted(found.items())]


def summarised(records: Sequence[EvaluationRecord]) -> dict[str, Any]:
    """The interquartile mean over training seeds of the mean over tasks, with its interval, and the mean of each.

    A model acts in all tasks, so these are averaged first: they are no independent evidence of training.
    """
    returns = mean_returns(records)
    found: Estimate = estimate([np.mean(returns, axis=0)], generator=np.random.default_rng(0))
    per_task = zip(sorted({r.task for r in records}), returns, strict=True)
    return asdict(found) | {
        "episodes": sum(len(r.finished) for r in records),
        "failed": sum(r.failed for r in records),
        "tasks": {task: values.tolist() for task, values in per_task},
    }


def shown(found: dict[str, Any]) -> str:
    """Value and interval."""
    interval = found["interval"]
    return f"{found['value']:.0f}" + (f" [{interval['low']:.0f}, {interval['high']:.0f}]" if interval else "")


def ends(found: dict[str, Any]) -> tuple[float, float]:
    """Of the interval; the value itself where there is none."""
    interval = found["interval"] or {"low": found["value"], "high": found["value"]}
    return interval["low"], interval["high"]


def measure(
    runs: Sequence[Path], lengths: Sequence[int], draws: int, streams: int, results: Path
) -> dict[int, dict[str, Any]]:
    """Evaluate the runs; per length of the prompt, what they return."""
    found: list[EvaluationRecord] = []
    for run in runs:
        found += evaluate_prompts(run, lengths, draws, streams, results)
        print(f"{run}: done", flush=True)
    return {length: summarised([r for r in found if r.prompt_trajectories == length]) for length in lengths}


def table(found: dict[int, dict[str, Any]], single: dict[str, Any] | None) -> str:
    """As markdown."""
    lines = ["| trajectories before the episode | return | by training seed | episodes |", "|---|---|---|---|"]
    rows: list[tuple[str, dict[str, Any]]] = [(str(length), cell) for length, cell in found.items()]
    if single is not None:
        rows.append(("none, a model of one", single))
    for name, cell in rows:
        values = np.mean(list(cell["tasks"].values()), axis=0)
        lines.append(f"| {name} | {shown(cell)} | {', '.join(f'{x:.0f}' for x in values)} | {cell['episodes']} |")
    return "\n".join(lines)


def draw(found: dict[int, dict[str, Any]], single: dict[str, Any] | None, path: Path) -> None:
    """Return against the trajectories in the context."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    (line,) = axes.plot(list(found), [cell["value"] for cell in found.values()], "o-", label="the same model")
    axes.fill_between(
        list(found), *zip(*map(ends, found.values()), strict=True), color=line.get_color(), alpha=0.2, linewidth=0
    )
    if single is not None:
        axes.axhline(single["value"], color="grey", linestyle="--", label="a model of one trajectory")
        axes.axhspan(*ends(single), color="grey", alpha=0.15, linewidth=0)
    axes.set(xlabel="trajectories in the context before the episode", ylabel="return", ylim=(0, None))
    axes.set_xticks(list(found))
    axes.legend(frameon=False)
    save_svg(figure, path)


@told_in_one_line
def main(arguments: Sequence[str] | None = None) -> None:
    """Evaluate, print and, if asked, write JSON and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--single", type=Path, nargs="+", default=[])
    parser.add_argument("--lengths", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--draws", type=positive, default=5)
    parser.add_argument("--streams", type=positive, default=4)
    parser.add_argument("--results", type=Path, default=Path(RESULTS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args(arguments)
    drawn = options.draws, options.streams, options.results
    found = measure(options.runs, options.lengths, *drawn)
    single = measure(options.single, [0], *drawn)[0] if options.single else None
    print(table(found, single))
    if options.json:
        options.json.write_text(json.dumps({"prompts": found, "single": single}, indent=1))
    if options.plot:
        draw(found, single, options.plot)


if __name__ == "__main__":
    main()
