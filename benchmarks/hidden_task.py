"""Does a longer context pay where nothing but the context tells which task it is?

    python benchmarks/hidden_task.py STORE [--lengths 1 2 4 8] [--seeds 0 1 2] [--steps 2000] [--folder hidden_task]
                                     [--workers 1] [--json FILE] [--plot FILE.svg]

STORE holds jaco episodes towards all four places; `docs/results.md` says how it is collected. Per context length n and
seed, an Agentic Transformer is trained (configs/hidden_task.yaml) on contexts of n trajectories, each context rewarded
for one of the four places. All lengths see as many trajectories. Each model then acts in single episodes of all four
tasks with n - 1 trajectories of that task's data in its memory: the same starts for all, from five prompts. What is
finished is not done again, so the same command goes on after an interruption.

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

from prompts import RESULTS, ends, evaluate_prompts, shown, summarised

from ringrl.config import TrainConfig, merged, read_yaml
from ringrl.configs import preset
from ringrl.evaluation.records import read_records
from ringrl.training import train

TRAJECTORIES_PER_BATCH = 8
PROMPTS, STREAMS = 5, 5  # episodes of a task: their product, each prompt with starts of its own
KINDS = {"prompted": "prompt of n - 1 trajectories", "control": "the same models, empty memory"}


def train_cell(store: Path, folder: Path, steps: int, length: int, seed: int) -> Path:
    """One model, trained on contexts of so many trajectories; its run's folder."""
    own = {
        "data": store, "run": folder / f"n{length}-seed{seed}", "seed": seed, "context": {"trajectories": length},
        "optimiser": {"steps": steps, "batch_size": TRAJECTORIES_PER_BATCH // length},
    }  # fmt: skip
    config = TrainConfig.model_validate(merged(read_yaml(preset("hidden_task")), own))
    return train(config, resume=config.run.exists(), quiet=True)


def run_cell(store: Path, folder: Path, steps: int, cell: tuple[int, int]) -> Path:
    """Train and evaluate one model."""
    run = train_cell(store, folder, steps, *cell)
    evaluate_prompts(run, (0, cell[0] - 1), PROMPTS, STREAMS)
    return run


def summarise(runs: Sequence[Path], lengths: Sequence[int]) -> dict[str, Any]:
    """Per kind and length, the interquartile mean over tasks and training seeds with its interval; means per task."""
    records = [record for run in runs for record in read_records(run / RESULTS).records]
    results: dict[str, Any] = {}
    for kind in KINDS:
        results[kind] = {}
        for length in lengths:
            prompt = length - 1 if kind == "prompted" else 0
            chosen = [r for r in records if (r.train_trajectories, r.prompt_trajectories) == (length, prompt)]
            results[kind][length] = summarised(chosen)
    return results


def table(results: dict[str, Any]) -> str:
    """As markdown."""
    lines = [
        "| n | with n - 1 trajectories of the task | the same models, empty memory | episodes each |",
        "|---|---|---|---|",
    ]
    for length in results["prompted"]:
        both = [results[kind][length] for kind in KINDS]
        lines.append(f"| {length} | {shown(both[0])} | {shown(both[1])} | {both[0]['episodes']} |")
    return "\n".join(lines)


def draw(results: dict[str, Any], path: Path) -> None:
    """Return against context length."""
    import matplotlib
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
    axes.set(xlabel="trajectories in the context, n", ylabel="return (IQM over tasks and seeds)", ylim=(0, None))
    axes.legend(frameon=False)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ringrl"}):  # text stays text
        figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, evaluate, print and, if asked, write JSON and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 2, 4, 8], help="each divides 8")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--folder", type=Path, default=Path("hidden_task"))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args(arguments)
    cells = [(length, seed) for seed in options.seeds for length in options.lengths]
    work = partial(run_cell, options.store, options.folder, options.steps)
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        runs = []
        for run in pool.map(work, cells):
            runs.append(run)
            print(f"{len(runs)} of {len(cells)}: {run}", flush=True)
    results = summarise(runs, options.lengths)
    print(table(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    if options.plot:
        draw(results, options.plot)


if __name__ == "__main__":
    main()
