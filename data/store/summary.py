"""The summary of a store: its content and origin, in one screen of plain text or as JSON."""

import dataclasses
import json
from dataclasses import dataclass

import numpy as np

from ringrl.data.store.format import RETURN_LEVELS
from ringrl.data.store.provenance import ForeignDomain, Provenance
from ringrl.data.store.reader import EpisodeStore

BARS = " ▁▂▃▄▅▆▇█"
RELABELLED = {
    "control_aware": "with the action that led to each state",
    "exorl_compat": "with a control of zero, as ExoRL's own code does (exorl_compat)",
    "recorded": "no, the rewards are the recorded ones, of any size",
}


@dataclass(frozen=True)
class ReturnSummary:
    """The distribution of the episode returns of one task."""

    task: str
    quantiles: tuple[float, ...]  # at RETURN_LEVELS
    mean: float
    counts: tuple[int, ...]  # episodes in equal bins from the lowest return to the highest


@dataclass(frozen=True)
class StoreSummary:
    """The content and the origin of a store."""

    path: str
    file_bytes: int
    domain: str
    observation_size: int
    action_size: int
    physics_size: int
    num_episodes: int
    shortest: int  # steps
    longest: int  # steps
    num_steps: int
    provenance: Provenance
    recorded_task: str | None
    fingerprint: str
    returns: tuple[ReturnSummary, ...]
    foreign: ForeignDomain | None  # facts about a domain that is none of ExoRL's


def summarise(store: EpisodeStore, bins: int = 24) -> StoreSummary:
    """Return the summary of a store. Reads the attributes and returns only, never the steps."""
    return StoreSummary(
        path=str(store.path),
        file_bytes=store.path.stat().st_size,
        domain=store.domain,
        observation_size=store.observation_size,
        action_size=store.action_size,
        physics_size=store.facts.physics_size,
        num_episodes=store.num_episodes,
        shortest=int(store.lengths.min()),
        longest=int(store.lengths.max()),
        num_steps=store.num_steps,
        provenance=store.provenance,
        recorded_task=store.recorded_task,
        fingerprint=store.fingerprint,
        returns=tuple(_summarise_returns(store, task, bins) for task in store.tasks),
        foreign=store.facts if isinstance(store.facts, ForeignDomain) else None,
    )


def describe(store: EpisodeStore, bins: int = 24) -> str:
    """Return the summary as plain text of at most 120 columns: one fact per line and one line of returns per task."""
    summary = summarise(store, bins)
    made = summary.provenance
    length = (
        f"{summary.shortest}" if summary.shortest == summary.longest else f"{summary.shortest} to {summary.longest}"
    )
    size = f" ({made.source_bytes:,} bytes, list of episodes sha256 {made.source_sha256[:16]})"
    facts = {
        "dataset": f"{summary.path} ({summary.file_bytes / 1e6:,.1f} MB)",
        "domain": f"{summary.domain}: observation {summary.observation_size}, action {summary.action_size}, "
        f"physics {summary.physics_size}",
        "episodes": f"{summary.num_episodes:,} x {length} steps = {summary.num_steps:,} transitions",
        **(_foreign_facts(summary.foreign, summary.num_episodes) if summary.foreign else {}),
        "source": made.source + (size if made.source_sha256 else ""),
        "subset": made.subset,
        "skipped": f"{made.num_skipped:,} damaged" if made.num_skipped else "none",
        "recorded for": summary.recorded_task or "no single task of this domain (all rewards are relabelled)",
        "relabelled": RELABELLED[made.relabelling],
        "imported": f"{made.created} by {made.created_by}",
        "fingerprint": f"sha256 {summary.fingerprint}",
    }
    lines = [f"{name:<13} {fact}" for name, fact in facts.items()]
    after = list(facts).index("skipped") + 1
    lines[after:after] = [f"{'':<13} {reason}" for reason in made.skipped]
    return "\n".join([*lines, "", *_returns_table(summary.returns)])


def to_json(store: EpisodeStore, bins: int = 24) -> str:
    """Return the summary as JSON, with the levels of the quantiles and the whole sha256 of the list of episodes."""
    return json.dumps(dataclasses.asdict(summarise(store, bins)) | {"quantile_levels": RETURN_LEVELS}, indent=1)


def _summarise_returns(store: EpisodeStore, task: str, bins: int) -> ReturnSummary:
    returns = store.returns(task).astype(np.float64)
    counts, _ = np.histogram(returns, bins=bins)  # equal returns fill one bin
    quantiles = tuple(store.return_quantiles(task).tolist())
    return ReturnSummary(task, quantiles, float(returns.mean()), tuple(int(count) for count in counts))


def _foreign_facts(domain: ForeignDomain, episodes: int) -> dict[str, str]:
    return {
        "simulation": "none in RingRL: evaluate in the dataset's own environment",
        "actions": domain.describe_actions(),
        "ends": f"{domain.num_terminated:,} terminated (discount 0 there), {episodes - domain.num_terminated:,} "
        "truncated; returns are undiscounted sums",
    }


def _returns_table(summaries: tuple[ReturnSummary, ...]) -> list[str]:
    names = ["min", "5 %", "25 %", "median", "75 %", "95 %", "max", "mean"]
    width = max(len(summary.task) for summary in summaries)
    lines = [f"{'return of':<{width}}" + "".join(f"{name:>8}" for name in names) + "  episodes from min to max"]
    for summary in summaries:
        numbers = "".join(f" {value:7.1f}" for value in (*summary.quantiles, summary.mean))
        lines.append(f"{summary.task:<{width}}{numbers}  {_bars(summary.counts)}")
    return lines


def _bars(counts: tuple[int, ...]) -> str:
    """One character per bin, as high as its share of the fullest bin. A bin with an episode is never blank."""
    fullest = max(counts)
    return "".join(BARS[-(-count * (len(BARS) - 1) // fullest)] for count in counts)
