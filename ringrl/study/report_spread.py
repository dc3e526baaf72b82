"""Whole distributions over training seeds, and how often one method beats another."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations

import numpy as np
from matplotlib.axes import Axes

from ringrl.evaluation.scores import score_or_none
from ringrl.evaluation.statistics import Estimate, performance_profile, probability_of_improvement
from ringrl.study.report_cells import BOOTSTRAP_SEED, RESAMPLES, Cell, Grid, Runs, series_of, strata
from ringrl.study.report_draw import PANEL, Chart, Panel, dress, linestyle, styles
from ringrl.study.report_svg import colour
from ringrl.study.report_variants import Variant
from ringrl.study.tables import context_label

_THRESHOLDS = 101
_PALE = 0.4  # of the shortest context, beside the longest


@dataclass(frozen=True)
class Contender:
    """A method at one context length, on every task where it has more than one training seed."""

    variant: Variant
    longest: bool
    length: str  # "8 trajectories", "the longest context" where tasks differ; empty without a context
    cells: Mapping[str, Cell]  # task -> where it stands

    def name(self, grid: Grid) -> str:
        """In words."""
        return f"{grid.name(self.variant)}{self.length and f', {self.length}'}"


@dataclass(frozen=True)
class Contest:
    """How probably a run of one beats a run of the other on the same task."""

    ours: str
    theirs: str
    tasks: int
    found: Estimate
    colour: str  # name in PALETTE


def contenders(grid: Grid) -> list[Contender]:
    """Every method with a context at its longest and its shortest, then those without."""
    found = []
    for variant in grid.variants:
        ends = {task: series_of(cells)[-1].points for task in grid.tasks if (cells := grid.cells_of(task, variant))}
        for longest in (True, False):
            points = {task: points[-1 if longest else 0] for task, points in ends.items()}
            if not longest and all(len(ends[task]) == 1 for task in ends):
                continue
            labels = {context_label(cell) for _, cell in points.values()}
            label = labels.pop() if len(labels) == 1 else f"the {'longest' if longest else 'shortest'} context"
            found.append(Contender(variant, longest, label, {task: cell for task, (_, cell) in points.items()}))
    for variant in grid.context_free:
        alike = [cell for task in grid.tasks for cell in grid.levels(task) if cell.variant == variant]
        found.append(Contender(variant, True, "", {cell.task: cell for cell in alike}))
    several = (
        replace(one, cells={task: cell for task, cell in one.cells.items() if len(cell.seeds) > 1}) for one in found
    )
    return [one for one in several if one.cells]


def contests(grid: Grid) -> list[Contest]:
    """The longest context against the shortest of each method, against every other method, and against each other."""
    known = contenders(grid)
    longest = [one for one in known if one.longest and not one.variant.context_free]
    shortest = {one.variant: one for one in known if not one.longest}
    pairs = [(one, shortest[one.variant]) for one in longest if one.variant in shortest]
    pairs += list(combinations(longest, 2))
    pairs += [(one, other) for one in longest for other in known if other.variant.context_free]
    shades = styles(grid)
    found = []
    for ours, theirs in pairs:
        tasks = [task for task in ours.cells if task in theirs.cells]
        if tasks:
            runs, together = strata([side.cells[task] for side in (ours, theirs) for task in tasks])
            count = len(tasks)
            wins = probability_of_improvement(
                runs[:count],
                runs[count:],
                together=together[:count],
                baseline_together=together[count:],
                generator=np.random.default_rng(BOOTSTRAP_SEED),
                resamples=RESAMPLES,
            )
            colour_name = shades[ours.variant].colour
            found.append(Contest(ours.name(grid), theirs.name(grid), len(tasks), wins, colour_name))
    return found


def profile_chart(grid: Grid) -> Chart | None:
    """Performance profiles: the fraction of runs above each score; None where no method has two seeds."""
    known = contenders(grid)
    tasks = sorted({task for one in known for task in one.cells})
    if not tasks or not grid.variants:
        return None
    panels = []
    if len(tasks) > 1 and all(score_or_none(task, 0.0) is not None for task in tasks):
        common = [one for one in known if len(one.cells) == len(tasks)]
        if common:
            draw = partial(_draw_profiles, grid=grid, known=common, tasks=tasks, score=True)
            panels.append(Panel("All tasks, normalised score", draw, "Fraction of runs above each normalised score."))
    for task in tasks:
        some = [one for one in known if task in one.cells]
        draw = partial(_draw_profiles, grid=grid, known=some, tasks=[task], score=False)
        panels.append(Panel(task, draw, f"Fraction of runs on {task} that return more than each level."))
    caption = (
        "Performance profiles: the fraction of training runs that return more than the value below. A method whose "
        "line lies above another's everywhere is better, whatever counts as good. Strong lines are the longest "
        "context, pale ones the shortest; bands are pointwise 95 % intervals (stratified bootstrap over seeds)."
    )
    shades = styles(grid)
    keys = tuple(shades[variant] for variant in dict.fromkeys(one.variant for one in known))
    records = grid.records_of(tasks)
    return Chart("performance_profiles", "All runs, not only their middle", caption, tuple(panels), keys, records)


def contest_chart(grid: Grid, found: Sequence[Contest]) -> Chart | None:
    """Probabilities of improvement with their intervals, a line each."""
    if not found:
        return None
    size = (PANEL[0], 0.75 + 0.5 * len(found))
    words = "; ".join(f"{one.ours} over {one.theirs}: {one.found.value:.2f}" for one in found)
    panel = Panel("Probability of improvement", partial(_draw_contests, found=found), words, size)
    tasks = sorted({task for one in contenders(grid) for task in one.cells})
    caption = (
        "The probability that a training run of the first beats a run of the second on the same task, averaged over "
        "the tasks that both were measured on; a tie is half a win. At one half, the dashed line, neither is better. "
        "Bars are 95 % intervals (stratified bootstrap over seeds)."
    )
    return Chart("probability_of_improvement", "Which is better", caption, (panel,), (), grid.records_of(tasks))


def _draw_profiles(axes: Axes, grid: Grid, known: Sequence[Contender], tasks: Sequence[str], score: bool) -> None:
    shades = styles(grid)
    drawn = [strata([one.cells[task] for task in tasks]) for one in known]
    scored = [[_scores(task, runs, score) for task, runs in zip(tasks, some.runs, strict=True)] for some in drawn]
    every = np.concatenate([runs for scores in scored for runs in scores])
    room = 0.04 * (np.ptp(every) or 1.0)
    thresholds = np.linspace(every.min() - room, every.max() + room, _THRESHOLDS)
    for one, scores, some in zip(known, scored, drawn, strict=True):
        found = performance_profile(
            scores, thresholds, generator=np.random.default_rng(BOOTSTRAP_SEED), together=some.together,
            resamples=RESAMPLES,
        )  # fmt: skip
        key, strength = shades[one.variant], 1.0 if one.longest else _PALE
        axes.plot(
            thresholds, found.fractions, color=colour(key.colour), linestyle=linestyle(key.dash), alpha=strength,
            linewidth=1.8, drawstyle="steps-post",
        )  # fmt: skip
        if found.low is not None and found.high is not None and not one.variant.context_free:
            axes.fill_between(
                thresholds, found.low, found.high, color=colour(key.colour), alpha=0.14 * strength, linewidth=0,
                step="post",
            )  # fmt: skip
    axes.set_ylim(-0.02, 1.02)
    dress(axes, "normalised score" if score else "return", "fraction of runs above")


def _scores(task: str, runs: Runs, score: bool) -> Runs:
    return np.array([score_or_none(task, run) for run in runs], np.float64) if score else runs


def _draw_contests(axes: Axes, found: Sequence[Contest]) -> None:
    for place, one in enumerate(reversed(found)):
        axes.plot([0.5] * 2, [place - 0.2, place + 0.2], color=colour("muted"), linewidth=1, linestyle=(0, (2, 2)))
        shade = colour(one.colour)
        if one.found.interval:
            ends = [one.found.interval.low, one.found.interval.high]
            axes.plot(ends, [place] * 2, color=shade, linewidth=5, alpha=0.3, solid_capstyle="butt")
        axes.plot([one.found.value], [place], "o", color=shade, markersize=5.5)
        words = f"{one.ours}\nover {one.theirs}" if len(one.ours + one.theirs) > 52 else f"{one.ours} over {one.theirs}"
        axes.annotate(
            words, (0, place), (0, 9), textcoords="offset points", fontsize=8.5, color=colour("ink"),
            linespacing=1.1, annotation_clip=False,
        )  # fmt: skip
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.5, len(found) - 0.2)
    axes.set_yticks([])
    dress(axes, "probability that the first is better", "")
