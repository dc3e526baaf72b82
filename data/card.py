"""The dataset card: what is in a store, in one screen of plain text or as JSON."""

import dataclasses
import json
from dataclasses import dataclass

import numpy as np

from ringrl.data.layout import RETURN_LEVELS
from ringrl.data.provenance import Provenance
from ringrl.data.store import EpisodeStore

BARS = " ▁▂▃▄▅▆▇█"
RELABELLED = {
    "control_aware": "with the action that led to each state",
    "exorl_compat": "with a control of zero, as ExoRL's own code does (exorl_compat)",
}


@dataclass(frozen=True)
class ReturnSummary:
    """How the returns of one task are spread over the episodes."""

    task: str
    quantiles: tuple[float, ...]  # at RETURN_LEVELS
    mean: float
    counts: tuple[int, ...]  # episodes in equal bins from the lowest return to the highest


@dataclass(frozen=True)
class DatasetCard:
    """What a store holds and where it comes from."""

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


def summarise(store: EpisodeStore, bins: int = 24) -> DatasetCard:
    """The card of a store; reads its description and returns only, never the steps."""
    return DatasetCard(
        path=str(store.path),
        file_bytes=store.path.stat().st_size,
        domain=store.domain,
        observation_size=store.observation_size,
        action_size=store.action_size,
        physics_size=store.arrays["physics"].shape[1],
        num_episodes=store.num_episodes,
        shortest=int(store.lengths.min()),
        longest=int(store.lengths.max()),
        num_steps=store.num_steps,
        provenance=store.provenance,
        recorded_task=store.recorded_task,
        fingerprint=store.fingerprint,
        returns=tuple(_summarise_returns(store, task, bins) for task in store.tasks),
    )


def describe(store: EpisodeStore, bins: int = 24) -> str:
    """The card as plain text of at most 120 columns, one fact per line and one line of returns per task."""
    card = summarise(store, bins)
    made = card.provenance
    length = f"{card.shortest}" if card.shortest == card.longest else f"{card.shortest} to {card.longest}"
    size = f" ({made.source_bytes:,} bytes, list of episodes sha256 {made.source_sha256[:16]})"
    facts = {
        "dataset": f"{card.path} ({card.file_bytes / 1e6:,.1f} MB)",
        "domain": f"{card.domain}: observation {card.observation_size}, action {card.action_size}, "
        f"physics {card.physics_size}",
        "episodes": f"{card.num_episodes:,} x {length} steps = {card.num_steps:,} transitions",
        "source": made.source + (size if made.source_sha256 else ""),
        "subset": made.subset,
        "skipped": f"{made.num_skipped:,} damaged" if made.num_skipped else "none",
        "recorded for": card.recorded_task or "no single task of this domain (all rewards are relabelled)",
        "relabelled": RELABELLED[made.relabelling],
        "imported": f"{made.created} by {made.created_by}",
        "fingerprint": f"sha256 {card.fingerprint}",
    }
    lines = [f"{name:<13} {fact}" for name, fact in facts.items()]
    after = list(facts).index("skipped") + 1
    lines[after:after] = [f"{'':<13} {reason}" for reason in made.skipped]
    return "\n".join([*lines, "", *_returns_table(card.returns)])


def to_json(store: EpisodeStore, bins: int = 24) -> str:
    """The card as JSON, with the levels of the quantiles and the whole sha256 of the source's list of episodes."""
    card = dataclasses.asdict(summarise(store, bins))
    return json.dumps(card | {"quantile_levels": RETURN_LEVELS}, indent=1)


def _summarise_returns(store: EpisodeStore, task: str, bins: int) -> ReturnSummary:
    returns = store.returns(task).astype(np.float64)
    # Equal returns have no width of their own to divide into bins: one unit around them shows as one bar.
    counts, _ = np.histogram(returns, bins=bins)
    quantiles = tuple(store.return_quantiles(task).tolist())
    return ReturnSummary(task, quantiles, float(returns.mean()), tuple(int(count) for count in counts))


def _returns_table(summaries: tuple[ReturnSummary, ...]) -> list[str]:
    names = ["min", "5 %", "25 %", "median", "75 %", "95 %", "max", "mean"]
    width = max(len(summary.task) for summary in summaries)
    lines = [f"{'return of':<{width}}" + "".join(f"{name:>8}" for name in names) + "  episodes from min to max"]
    for summary in summaries:
        numbers = "".join(f"{value:8.1f}" for value in (*summary.quantiles, summary.mean))
        lines.append(f"{summary.task:<{width}}{numbers}  {_bars(summary.counts)}")
    return lines


def _bars(counts: tuple[int, ...]) -> str:
    """One character per bin, as high as its share of the fullest bin; no bin that holds an episode looks empty."""
    fullest = max(counts)
    return "".join(BARS[-(-count * (len(BARS) - 1) // fullest)] for count in counts)
