"""The summary of a store: its content and origin, in one screen of plain text or as JSON."""

import dataclasses
import json
from typing import Any

import numpy as np

from ringrl.data.store.format import RETURN_LEVELS, StoredDomain
from ringrl.data.store.reader import EpisodeStore
from ringrl.envs import is_foreign
from ringrl.errors import printable

BARS = " ▁▂▃▄▅▆▇█"
BINS = 24
RELABELLED = {
    "control_aware": "with the action that led to each state",
    "recorded": "no, the rewards are the recorded ones, of any size",
}


def summarise(store: EpisodeStore) -> dict[str, Any]:
    """Return the facts about a store in JSON's types. Reads the attributes and returns only, never the steps.

    "returns" has one entry per task: the quantiles at RETURN_LEVELS, the mean, and the numbers of episodes in BINS
    equal bins from the lowest return to the highest. "foreign" is None for ExoRL's domains.
    """
    returns = {task: store.returns(task).astype(np.float64) for task in store.tasks}
    return {
        "path": str(store.path),
        "file_bytes": store.path.stat().st_size,
        "domain": store.domain,
        "observation_size": store.observation_size,
        "action_size": store.action_size,
        "physics_size": store.facts.physics_size,
        "num_episodes": store.num_episodes,
        "shortest": int(store.lengths.min()),  # steps
        "longest": int(store.lengths.max()),
        "num_steps": store.num_steps,
        "provenance": dataclasses.asdict(store.provenance),
        "recorded_task": store.recorded_task,
        "fingerprint": store.fingerprint,
        "returns": [
            {
                "task": task,
                "quantiles": store.return_quantiles(task).tolist(),
                "mean": float(values.mean()),
                "counts": np.histogram(values, bins=BINS)[0].tolist(),  # equal returns fill one bin
            }
            for task, values in returns.items()
        ],
        "foreign": dataclasses.asdict(store.facts) if isinstance(store.facts, StoredDomain) else None,
    }


def describe(store: EpisodeStore) -> str:
    """Return the summary as plain text of at most 120 columns: one fact per line and one line of returns per task."""
    shortest, longest, made = int(store.lengths.min()), int(store.lengths.max()), store.provenance
    length = f"{shortest}" if shortest == longest else f"{shortest} to {longest}"
    size = f" ({made.source_bytes:,} bytes, list of episodes sha256 {made.source_sha256[:16]})"
    facts = {
        "dataset": f"{store.path} ({store.path.stat().st_size / 1e6:,.1f} MB)",
        "domain": f"{store.domain}: observation {store.observation_size}, action {store.action_size}, "
        f"physics {store.facts.physics_size}",
        "episodes": f"{store.num_episodes:,} x {length} steps = {store.num_steps:,} transitions",
        **(_foreign_facts(store.facts, store.num_episodes) if isinstance(store.facts, StoredDomain) else {}),
        "source": made.source + (size if made.source_sha256 else ""),
        "subset": made.subset,
        "recorded for": store.recorded_task or "no single task of this domain (all rewards are relabelled)",
        "relabelled": RELABELLED[made.relabelling],
        "imported": f"{made.created} by {made.created_by}",
        "fingerprint": f"sha256 {store.fingerprint}",
    }
    lines = [f"{name:<13} {fact}" for name, fact in facts.items()]
    return "\n".join([*map(printable, lines), "", *_returns_table(summarise(store)["returns"])])


def to_json(store: EpisodeStore) -> str:
    """Return the summary as JSON, with the levels of the quantiles and the whole sha256 of the list of episodes."""
    return json.dumps(summarise(store) | {"quantile_levels": RETURN_LEVELS}, indent=1)


def _foreign_facts(domain: StoredDomain, episodes: int) -> dict[str, str]:
    limits = zip(domain.action_low, domain.action_high, strict=True)
    bounds = list(dict.fromkeys(f"[{low:g}, {high:g}]" for low, high in limits))
    actions = f"scaled to [-1, 1] from {', '.join(bounds[:4])}{', ...' if len(bounds) > 4 else ''}"
    if domain.is_discrete:
        actions = f"one of {domain.action_size} choices"
    elif bounds == ["[-1, 1]"]:
        actions = "as recorded, in [-1, 1]"
    return {
        "environment": domain.name if is_foreign(domain.name) else "unknown: name one to evaluate in (--environment)",
        "actions": actions,
        "ends": f"{domain.num_terminated:,} terminated (discount 0 there), {episodes - domain.num_terminated:,} "
        "truncated; returns are undiscounted sums",
    }


def _returns_table(summaries: list[dict[str, Any]]) -> list[str]:
    names = ["min", "5 %", "25 %", "median", "75 %", "95 %", "max", "mean"]
    width = max(len(summary["task"]) for summary in summaries)
    lines = [f"{'return of':<{width}}" + "".join(f"{name:>8}" for name in names) + "  episodes from min to max"]
    for summary in summaries:
        numbers = "".join(f" {value:7.1f}" for value in (*summary["quantiles"], summary["mean"]))
        fullest = max(summary["counts"])
        # A bin with an episode is never blank.
        bars = "".join(BARS[-(-count * (len(BARS) - 1) // fullest)] for count in summary["counts"])
        lines.append(f"{summary['task']:<{width}}{numbers}  {bars}")
    return lines
