"""Does a model learn within one context, and from what happened in it? Read from results, nothing is rolled out.

    python benchmarks/within_context.py RESULTS [RESULTS ...] [--episodes 8] [--json FILE]

RESULTS are files or folders of `ringrl evaluate --episodes N --control`, of one method, of which the same count as in a
report. Per task, for contexts of N episodes with memory and, if measured from all of the same starts, with the memory
wiped before every episode: the return of each episode, as the interquartile mean over training seeds. Then how far an
episode goes with the one before it: the correlation of their returns, each taken less the mean of its training seed and
place in the context. Memory that told a model no more than how many episodes have been would leave none.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from command_line import positive, told_in_one_line
from jaxtyping import Float
from prompts import shown

from ringrl.errors import UserError
from ringrl.evaluation.records import read_records
from ringrl.evaluation.statistics import estimate
from ringrl.study.report_cells import Cell, gather

Returns = Float[np.ndarray, "contexts episodes"]


def whole_contexts(streams: Mapping[int, Returns]) -> dict[int, Returns]:
    """Those in which no episode failed, by training seed."""
    whole = {seed: returns[np.isfinite(returns).all(1)] for seed, returns in sorted(streams.items())}
    return {seed: returns for seed, returns in whole.items() if len(returns)}


def correlation(runs: Mapping[int, Returns]) -> float | None:
    """Of successive episodes, without what their training seed and their place explain; None if nothing is left."""
    rest = np.concatenate([returns - returns.mean(0) for returns in runs.values()])
    before, after = rest[:, :-1].ravel(), rest[:, 1:].ravel()
    return float(np.corrcoef(before, after)[0, 1]) if before.std() and after.std() else None


def summarise(cell: Cell) -> dict[str, Any]:
    """Of one task, with and without memory."""
    results = {}
    for name, streams in (("with memory", cell.streams), ("wiped", cell.control)):
        if runs := whole_contexts(streams):
            means = np.array([returns.mean(0) for returns in runs.values()])  # (seeds, episodes)
            episodes = [asdict(estimate([column], generator=np.random.default_rng(0))) for column in means.T]
            contexts = sum(len(returns) for returns in runs.values())
            results[name] = {"episodes": episodes, "correlation": correlation(runs), "contexts": contexts}
    return results


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """As markdown."""
    most = max(len(found["episodes"]) for kinds in results.values() for found in kinds.values())
    lines = [
        f"| task | memory | {' | '.join(map(str, range(1, most + 1)))} | correlation | contexts |",
        "|" + "---|" * (most + 4),
    ]
    for task, kinds in results.items():
        for name, found in kinds.items():
            *middle, last = found["episodes"]
            values = [f"{episode['value']:.0f}" for episode in middle] + [shown(last)]
            related = "none" if found["correlation"] is None else f"{found['correlation']:.2f}"
            lines.append(f"| {task} | {name} | {' | '.join(values)} | {related} | {found['contexts']} |")
    return "\n".join(lines)


@told_in_one_line
def main(arguments: Sequence[str] | None = None) -> None:
    """Read, print and, if asked, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--episodes", type=positive, default=8, help="of a context, in training and in evaluation")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    lengths = options.episodes, options.episodes
    records = [
        record
        for record in read_records(options.results).records
        if (record.train_trajectories, record.test_trajectories) == lengths and record.prompt_trajectories == 0
    ]
    grid = gather(records)
    if len(names := {grid.name(cell.variant) for cell in grid.cells}) > 1:
        raise UserError(f"results of {' and '.join(sorted(names))}; give those of one method")
    if options.episodes < 2 or not grid.cells:
        raise UserError(f"--episodes: no contexts of {options.episodes} episodes there; give another number, from 2 on")
    results = {cell.task: summarise(cell) for cell in grid.cells}
    print(table(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
