"""Does a model of longer contexts return more than one of shorter contexts?

    python benchmarks/prompted_lengths.py CONFIG STORE [--task TASK] [--lengths 1 2 4 8] [--seeds 0 1 2] [--steps N]
                                          [--folder FOLDER] [--workers 1] [--json FILE] [--plot FILE.svg]

CONFIG is a file of settings of `ringrl train`, or the name of one of RingRL's own: `no_return_asked` (the trajectories
of the context show how good to be, and nothing else does) or `hidden_task` (their rewards show which task it is, and
nothing else does). Per context length n and seed a model is trained on contexts of n trajectories; all lengths take as
many steps and see as many trajectories. Each then acts in single episodes with n - 1 trajectories of the data in its
memory, drawn and ordered as in training: the same starts for all, from five draws. What is finished is not done again,
so the same command goes on after an interruption.

The control is the same model with nothing in its memory when the episode begins.
"""

import argparse
import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from command_line import positive, told_in_one_line
from drawing import save_svg
from prompts import RESULTS, ends, evaluate_prompts, shown, summarised

from ringrl.config import TrainConfig, merged, read_yaml
from ringrl.configs import preset
from ringrl.evaluation.records import EvaluationRecord
from ringrl.training import train

PROMPTS, STREAMS = 5, 5  # episodes of a task: their product, each prompt with starts of its own
KINDS = {"prompted": "prompt of n - 1 trajectories", "control": "the same models, empty memory"}


def run_cell(
    settings: dict[str, Any], store: Path, folder: Path, batch: int, cell: tuple[int, int]
) -> list[EvaluationRecord]:
    """Train one model, of contexts of so many trajectories and a seed, `batch` trajectories per step; evaluate it."""
    length, seed = cell
    own = {
        "data": store, "run": folder / f"n{length}-seed{seed}", "seed": seed, "context": {"trajectories": length},
        "optimiser": {"batch_size": batch // length},
    }  # fmt: skip
    config = TrainConfig.model_validate(merged(settings, own))
    run = train(config, resume=config.run.exists(), quiet=True)
    return evaluate_prompts(run, (0, length - 1), PROMPTS, STREAMS, run / RESULTS)


def summarise(records: Sequence[EvaluationRecord], lengths: Sequence[int]) -> dict[str, Any]:
    """Per kind and length, the interquartile mean over training seeds with its interval; means per task.

    For prompts also the mean return of the best trajectory in them.
    """
    results: dict[str, Any] = {}
    for kind in KINDS:
        results[kind] = {}
        for length in lengths:
            prompt = length - 1 if kind == "prompted" else 0
            chosen = [r for r in records if (r.train_trajectories, r.prompt_trajectories) == (length, prompt)]
            best = [max(r.prompt_returns) for r in chosen if r.prompt_returns]
            results[kind][length] = summarised(chosen) | {"best_of_prompt": float(np.mean(best)) if best else None}
    return results


def table(results: dict[str, Any]) -> str:
    """As markdown."""
    lines = [
        "| n | with n - 1 trajectories | by training seed | the best of these | empty memory | episodes each |",
        "|---|---|---|---|---|---|",
    ]
    for length, cell in results["prompted"].items():
        seeds = ", ".join(f"{x:.0f}" for x in np.mean(list(cell["tasks"].values()), axis=0))
        best = "none" if cell["best_of_prompt"] is None else f"{cell['best_of_prompt']:.0f}"
        empty = shown(results["control"][length])
        lines.append(f"| {length} | {shown(cell)} | {seeds} | {best} | {empty} | {cell['episodes']} |")
    return "\n".join(lines)


def draw(results: dict[str, Any], path: Path) -> None:
    """Return against context length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    for kind, label in KINDS.items():
        lengths, cells = list(results[kind]), list(results[kind].values())
        values = [cell["value"] for cell in cells]
        (line,) = axes.plot(lengths, values, "o-" if kind == "prompted" else "s--", label=label)
        axes.fill_between(lengths, *zip(*map(ends, cells), strict=True), color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.set(xlabel="trajectories in the context, n", ylabel="return (IQM over training seeds)", ylim=(0, None))
    axes.legend(frameon=False)
    save_svg(figure, path)


def settings_of(name: str, task: str | None, steps: int | None) -> dict[str, Any]:
    """A file's, or one of RingRL's own by its name; with another task or other steps where these are given."""
    own: dict[str, Any] = {} if steps is None else {"optimiser": {"steps": steps}}
    own |= {} if task is None else {"task": task}
    return merged(read_yaml(Path(name) if Path(name).suffix else preset(name)), own)


@told_in_one_line
def main(arguments: Sequence[str] | None = None) -> None:
    """Train, evaluate, print and, if asked, write JSON and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("store", type=Path)
    parser.add_argument("--task", help="where other than the file's")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 2, 4, 8], help="each divides the longest")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=positive, help="optimiser steps, where other than the file's")
    parser.add_argument("--folder", type=Path, default=Path("prompted_lengths"))
    parser.add_argument("--workers", type=positive, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args(arguments)
    if any(length < 1 or max(options.lengths) % length for length in options.lengths):
        parser.error(f"--lengths: each has to divide the longest, {max(options.lengths)}")
    settings = settings_of(options.config, options.task, options.steps)
    work = partial(run_cell, settings, options.store, options.folder, max(options.lengths))
    cells = [(length, seed) for seed in options.seeds for length in options.lengths]
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        records = []
        for (length, seed), found in zip(cells, pool.map(work, cells), strict=True):
            records += found
            print(f"n = {length}, seed {seed}: done", flush=True)
    results = summarise(records, options.lengths)
    print(table(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    if options.plot:
        draw(results, options.plot)


if __name__ == "__main__":
    main()
