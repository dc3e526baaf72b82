"""Is the last episode of a context better than what methods without memory return from the same starts?

    python benchmarks/last_episode.py RESULTS [RESULTS ...] [--episodes 8] [--json FILE]

RESULTS are files or folders of `ringrl evaluate`. The last episodes of contexts of N begin from a few of the starts
that all episodes are spread over, which may be easier or harder than the rest. So all methods are measured from those
starts alone: contexts of other lengths by their last episodes, too, where these begin there, and what has no memory by
its single episodes. Models that were rolled out for more or fewer episodes than they were trained on, or after a
prompt, are left out. Read from results, nothing is rolled out.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from command_line import positive, told_in_one_line
from prompts import shown

from ringrl.errors import UserError
from ringrl.evaluation.records import EvaluationRecord, read_records
from ringrl.evaluation.statistics import estimate
from ringrl.study.report_cells import Cell, gather

Start = tuple[int, int]


def last_returns(records: Iterable[EvaluationRecord], is_wiped: bool) -> dict[int, dict[Start, float]]:
    """Training seed -> start -> return of the contexts' last episodes, where these did not fail."""
    found: dict[int, dict[Start, float]] = defaultdict(dict)
    for record in records:
        if record.context != is_wiped and record.returns[-1] is not None:
            found[record.seed][record.starts[-1]] = record.returns[-1]
    return found


def from_starts(cell: Cell, starts: frozenset[Start], is_wiped: bool = False) -> dict[str, Any] | None:
    """Interquartile mean over training seeds of the mean return from these starts; None if none has them all."""
    found = last_returns(cell.records, is_wiped).items()
    means = [np.mean([returns[start] for start in starts]) for _, returns in sorted(found) if starts <= returns.keys()]
    if not means:
        return None
    return asdict(estimate([np.array(means)], generator=np.random.default_rng(0))) | {"starts": len(starts)}


def summarise(records: Sequence[EvaluationRecord], episodes: int) -> dict[str, dict[str, dict[str, Any]]]:
    """Task -> method -> what it returns from the starts of the last of so many episodes."""
    grid = gather(records)
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for task in sorted({cell.task for cell in grid.cells}):
        cells = [cell for cell in grid.cells if cell.task == task and cell.test == (cell.train or 1)]
        of_length = [last_returns(cell.records, is_wiped=False) for cell in cells if cell.test == episodes]
        seeds = [frozenset(returns) for found in of_length for returns in found.values()]
        if not seeds or not (starts := frozenset.intersection(*seeds)):
            continue
        rows = results[task] = {}
        for cell in cells:
            name = grid.name(cell.variant) + (f", n = {cell.train}" if cell.train else "")
            for kind, is_wiped in (("", False), (", wiped", True)):
                if found := from_starts(cell, starts, is_wiped):
                    rows[name + kind] = found
    return results


def table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """As markdown."""
    lines = ["| task | method | return | training seeds | starts |", "|---|---|---|---|---|"]
    for task, rows in results.items():
        lines += [
            f"| {task} | {name} | {shown(found)} | {found['runs']} | {found['starts']} |"
            for name, found in rows.items()
        ]
    return "\n".join(lines)


@told_in_one_line
def main(arguments: Sequence[str] | None = None) -> None:
    """Read, print and, if asked, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument(
        "--episodes", type=positive, default=8, help="of the contexts whose last episodes are asked about"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    records = [record for record in read_records(options.results).records if record.prompt_trajectories == 0]
    results = summarise(records, options.episodes)
    if not results:
        raise UserError(
            f"--episodes: no contexts of {options.episodes} episodes with starts in common; give another number"
        )
    print(table(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
