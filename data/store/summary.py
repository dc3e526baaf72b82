"""The summary of a store: its content and origin, in one screen of plain text."""

import numpy as np

from ringrl.data.store.format import StoredDomain
from ringrl.data.store.reader import EpisodeStore
from ringrl.envs import is_foreign
from ringrl.envs.foreign import d4rl_returns
from ringrl.errors import printable

BARS = " ▁▂▃▄▅▆▇█"
BINS = 24
LEVELS = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)  # of the quantiles
RELABELLED = {
    "control_aware": "with the action that led to each state",
    "recorded": "no, the rewards are the recorded ones, of any size",
}


def describe(store: EpisodeStore) -> str:
    """Return the summary: one fact per line and one line of returns per task, at most 120 columns. Reads no steps."""
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
    return "\n".join([*map(printable, lines), "", *_returns_table(store)])


def _foreign_facts(domain: StoredDomain, episodes: int) -> dict[str, str]:
    limits = zip(domain.action_low, domain.action_high, strict=True)
    bounds = list(dict.fromkeys(f"[{low:g}, {high:g}]" for low, high in limits))
    actions = f"scaled to [-1, 1] from {', '.join(bounds[:4])}{', ...' if len(bounds) > 4 else ''}"
    if domain.is_discrete:
        actions = f"one of {domain.action_size} choices"
    elif bounds == ["[-1, 1]"]:
        actions = "as recorded, in [-1, 1]"
    scores = "D4RL's" if is_foreign(domain.name) and d4rl_returns(domain.name)[0] is not None else "unknown"
    if domain.reference_returns:
        scores = "0 at a return of {:g}, 100 at {:g}".format(*domain.reference_returns)
    parts = ", ".join(f"{name} {width}" for name, width in domain.observation.items())
    return {
        **({"observation": parts} if parts else {}),
        "environment": domain.name if is_foreign(domain.name) else "unknown: name one to evaluate in (--environment)",
        "actions": actions,
        "ends": f"{domain.num_terminated:,} terminated (discount 0 there), {episodes - domain.num_terminated:,} "
        "truncated; returns are undiscounted sums",
        "scores": scores,
    }


def _returns_table(store: EpisodeStore) -> list[str]:
    names = ["min", "5 %", "25 %", "median", "75 %", "95 %", "max", "mean"]
    width = max(map(len, store.tasks))
    lines = [f"{'return of':<{width}}" + "".join(f"{name:>8}" for name in names) + "  episodes from min to max"]
    for task in store.tasks:
        returns = store.returns(task).astype(np.float64)
        numbers = "".join(f" {value:7.1f}" for value in (*np.quantile(returns, LEVELS), returns.mean()))
        counts = np.histogram(returns, bins=BINS)[0].tolist()  # equal returns fill one bin
        # A bin with an episode is never blank.
        bars = "".join(BARS[-(-count * (len(BARS) - 1) // max(counts))] for count in counts)
        lines.append(f"{task:<{width}}{numbers}  {bars}")
    return lines
