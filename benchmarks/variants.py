"""What do an Agentic Transformer's choices change: loss, target, order, head, embeddings, token set?

    python benchmarks/variants.py STORE [--task walker_walk] [--trajectories 2] [--seeds 0 1 2] [--only NAME ...]
                                  [--folder variants] [--workers 1] [--json FILE]

Every variant changes one setting of configs/study_results.yaml and is trained with every seed. Each model then acts in
single episodes with an empty memory, and with n - 1 trajectories of its data in it: the same starts for all, from five
draws. What is finished is not done again, so the same command goes on after an interruption.
"""

import argparse
import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from command_line import positive, told_in_one_line
from prompts import RESULTS, evaluate_prompts, shown, summarised

from ringrl.config import TrainConfig, merged, read_yaml
from ringrl.configs import preset
from ringrl.evaluation.records import EvaluationRecord
from ringrl.training import train

VARIANTS: dict[str, dict[str, Any]] = {
    "as in the study": {},
    "loss on the last trajectory": {"model": {"loss_on": "last"}},
    "each asked for its own return": {"context": {"target": "own"}},
    "no return asked": {"context": {"target": "none"}},
    "descending": {"context": {"order": "descending"}},
    "as collected": {"context": {"order": "history"}},
    "random order": {"context": {"order": "random"}},
    "all returns alike often": {"context": {"sampling": "return_stratified"}},
    "gaussian head": {"model": {"action_head": "gaussian"}},
    "head of bins": {"model": {"action_head": "bins"}},
    "embedding of the timestep": {"model": {"timestep_embedding": True}},
    "embedding of the trajectory": {"model": {"trajectory_embedding": True}},
    "tokens dt3": {"model": {"token_set": "dt3"}},
    "tokens ring4": {"model": {"token_set": "ring4"}},
    "tokens at5": {"model": {"token_set": "at5"}},
}
PROMPTS, STREAMS = 5, 4  # episodes: their product, each prompt with starts of its own


def run_cell(settings: dict[str, Any], folder: Path, cell: tuple[str, int]) -> list[EvaluationRecord]:
    """Train and evaluate one model."""
    name, seed = cell
    own = {"run": folder / f"{name.replace(' ', '_')}-seed{seed}", "seed": seed}
    config = TrainConfig.model_validate(merged(merged(settings, VARIANTS[name]), own))
    run = train(config, resume=config.run.exists(), quiet=True)
    return evaluate_prompts(run, (0, config.context.trajectories - 1), PROMPTS, STREAMS, run / RESULTS)


def summarise(records: Sequence[EvaluationRecord], prompt: int) -> dict[str, Any]:
    """Of one variant, with an empty memory and with a prompt."""
    chosen = {length: [r for r in records if r.prompt_trajectories == length] for length in sorted({0, prompt})}
    return {str(length): summarised(found) for length, found in chosen.items()}


def table(results: dict[str, dict[str, Any]]) -> str:
    """As markdown, one row per variant."""
    prompt = max(int(length) for found in results.values() for length in found)
    lines = [f"| variant | empty memory | prompt of {prompt} | by training seed |", "|---|---|---|---|"]
    for name, found in results.items():
        (seeds,) = found[str(prompt)]["tasks"].values()
        values = ", ".join(f"{x:.0f}" for x in seeds)
        lines.append(f"| {name} | {shown(found['0'])} | {shown(found[str(prompt)])} | {values} |")
    return "\n".join(lines)


@told_in_one_line
def main(arguments: Sequence[str] | None = None) -> None:
    """Train, evaluate, print and, if asked, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--task", default="walker_walk")
    parser.add_argument("--trajectories", type=positive, default=2, help="of a context")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--folder", type=Path, default=Path("variants"))
    parser.add_argument("--workers", type=positive, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    own = {"data": options.store, "task": options.task, "context": {"trajectories": options.trajectories}}
    settings = merged(read_yaml(preset("study_results"))["settings"], own)
    cells = [(name, seed) for seed in options.seeds for name in options.only]
    records: dict[str, list[EvaluationRecord]] = {}
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        done = pool.map(partial(run_cell, settings, options.folder), cells)
        for (name, seed), found in zip(cells, done, strict=True):
            records.setdefault(name, []).extend(found)
            print(f"{name}, seed {seed}: done", flush=True)
    results = {name: summarise(found, options.trajectories - 1) for name, found in records.items()}
    print(table(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
