"""What the numbers say, in sentences that are computed from them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from math import comb
from typing import Literal

from ringrl.evaluation.formatting import number
from ringrl.evaluation.statistics import Estimate
from ringrl.study.report_cells import (
    Cell,
    Grid,
    contrast,
    in_sentence,
    middle,
    middle_or_none,
    series_of,
    summarise,
)
from ringrl.study.report_variants import Variant
from ringrl.study.tables import context_label

Kind = Literal["helps", "hurts", "unclear", "one seed", "not compared"]

# Chance may look like a difference once in so many times (5 %); a claim that is easier to come by is worded with care.
ENOUGH_ODDS = 20


@dataclass(frozen=True)
class Verdict:
    """Whether context helps one method on one task, and the sentence that says so."""

    task: str
    method: str
    subject: str  # what was varied
    compared: str  # the two that are compared, "1 trajectory to 8 trajectories"
    returns: tuple[float, ...]  # of either; one where nothing was compared
    change: Estimate | None
    paired: bool  # whether the two are of the same training runs
    sentence: str

    @property
    def kind(self) -> Kind:
        """What the interval of the change says."""
        if self.change is None:
            return "not compared"
        if self.change.interval is None:
            return "one seed"
        if 0 in self.change.interval:
            return "unclear"
        return "helps" if self.change.value > 0 else "hurts"

    @property
    def seeds(self) -> int:
        """Training seeds behind the change."""
        return self.change.runs if self.change else 0

    @property
    def odds(self) -> int:
        """Once in how many times its seeds would agree by chance."""
        return odds(self.seeds, self.paired)


@dataclass(frozen=True)
class Summary:
    """What stands at the top of the page."""

    headline: str
    verdicts: tuple[Verdict, ...]  # one per task and method
    notes: tuple[str, ...]  # one paragraph per task
    caution: str | None  # what few seeds can and cannot show


@dataclass(frozen=True)
class _Memory:
    gain: Estimate  # paired by training seed, for the control is the same policy
    kept: float  # return with memory, and
    wiped: float  # of the control from the same starts


def summary(grid: Grid) -> Summary:
    """Headline, verdicts, and what else is worth knowing at first glance."""
    verdicts = [
        _verdict(grid, variant, cells)
        for task in grid.tasks
        for variant in grid.variants
        if (cells := grid.cells_of(task, variant))
    ]
    notes = [" ".join(sentences) for task in grid.tasks if (sentences := _notes(grid, task))]
    return Summary(_headline(verdicts), tuple(verdicts), tuple(notes), _caution(verdicts))


def _headline(verdicts: Sequence[Verdict]) -> str:
    kinds = [verdict.kind for verdict in verdicts]
    if not kinds:
        return "No method with a context was measured."
    judged = [verdict for verdict in verdicts if verdict.kind in ("helps", "hurts", "unclear")]
    if not judged:
        if "one seed" in kinds:
            return "One training seed: too few to say whether context helps."
        return "Only one context length was measured."
    subjects = {verdict.subject for verdict in judged}
    subject = subjects.pop() if len(subjects) == 1 else "Context"
    claims = []
    for kind, bare in (("helps", "help"), ("hurts", "hurt")):
        found = [verdict for verdict in judged if verdict.kind == kind]
        if found:
            careful = min(verdict.odds for verdict in found) < ENOUGH_ODDS
            claim = f"seems to {bare}" if careful else kind
            if len(judged) == 1:
                return f"{subject} {claim}."
            share = f"all {len(found)}" if len(found) == len(judged) else f"{len(found)} of {len(judged)}"
            claims.append(f"{claim} in {share}")
    if not claims:
        return f"{subject} makes no clear difference."
    return f"{subject} {' and '.join(claims)} comparisons."


def odds(seeds: int, paired: bool) -> int:
    """Once in how many times seeds agree by chance, one way or the other: all of the same runs change alike, or two
    groups of n runs lie wholly apart (2 of (2n choose n) orders)."""
    return 2 ** max(seeds - 1, 0) if paired else comb(2 * seeds, seeds) // 2


def caution(clear: Iterable[tuple[int, bool]]) -> str | None:
    """What differences of so few training seeds (a side; whether of the same runs) can and cannot show.

    Told of the weakest; None where there are none, or all have seeds enough.
    """
    seeds, paired = min(clear, key=lambda one: odds(*one), default=(0, False))
    if not seeds or odds(seeds, paired) >= ENOUGH_ODDS:
        return None
    chance = (
        f"all {seeds} runs would still change alike"
        if paired
        else f"two groups of {seeds} would still lie wholly apart"
    )
    return (
        f"With {seeds} training seeds per point this is a hint, not proof: if nothing differed, {chance} once in "
        f"{odds(seeds, paired)} times, and bootstrap intervals of so few are too narrow."
    )


def _caution(verdicts: Sequence[Verdict]) -> str | None:
    return caution((verdict.seeds, verdict.paired) for verdict in verdicts if verdict.kind in ("helps", "hurts"))


def _verdict(grid: Grid, variant: Variant, cells: Sequence[Cell]) -> Verdict:
    """Longest against shortest context; where there is one length only, memory against the control without."""
    points = series_of(cells)[-1].points
    shortest, longest = points[0][1], points[-1][1]
    value, memory = middle(longest.runs()), _memory(longest)
    task, name = longest.task, grid.name(variant)
    of_context = " of context" if longest.train == longest.test else ""
    verdict = partial(Verdict, task, name)

    def claim(value: float) -> str:
        return f"On {task} the {name} returns {number(value)} {_when(longest)}{of_context}"

    if shortest is not longest:
        found = contrast(longest, shortest)
        value, before = found.levels
        sentence = f"{claim(value)} and {number(before)} {_when(shortest)}: {_judge(found.change)}"
        if longest.control and longest.test > 1:
            wiped = number(middle(longest.control_runs()))
            sentence += f" With its memory wiped before each episode it returns {wiped}."
        compared = _between(shortest, longest)
        return verdict("A longer context", compared, (before, value), found.change, found.paired, sentence)
    if memory:
        sentence = f"{claim(memory.kept)} and {number(memory.wiped)} when its memory is wiped before each episode: "
        compared = f"memory wiped to kept, {context_label(longest)}"
        returns = (memory.wiped, memory.kept)
        return verdict("Memory across episodes", compared, returns, memory.gain, True, sentence + _judge(memory.gain))
    sentence = f"{claim(value)}; no other length was measured."
    return verdict("Context", context_label(longest), (value,), None, False, sentence)


def _when(cell: Cell) -> str:
    """A context length within a sentence: "with 4 trajectories", "when trained on 1 and rolled out for 4"."""
    if cell.train == cell.test:
        return f"with {context_label(cell)}"
    return f"when trained on {cell.train} and rolled out for {cell.test}"


def _between(shortest: Cell, longest: Cell) -> str:
    """Two context lengths; what both have in common is said once."""
    if shortest.test == longest.test:
        return f"trained on {shortest.train} to {longest.train}, rolled out for {longest.test}"
    if shortest.train == longest.train:
        return f"trained on {longest.train}, rolled out for {shortest.test} to {longest.test}"
    return f"{context_label(shortest)} to {context_label(longest)}"


def _memory(cell: Cell) -> _Memory | None:
    """What memory gains; None where there is nothing to remember or the control was not measured."""
    kept, wiped = cell.beside_control()
    if cell.test == 1 or not len(kept):
        return None
    return _Memory(summarise(kept - wiped), middle(kept), middle(wiped))


def _judge(change: Estimate) -> str:
    size = number(change.value, sign=True)
    if change.interval is None:
        return f"{size}. One training seed gives no interval, so this may be chance."
    ends = f"{number(change.interval.low, sign=True)} to {number(change.interval.high, sign=True)}"
    if 0 in change.interval:
        return f"{size}, no more than training seeds differ among themselves (95 % interval {ends})."
    return f"{size} (95 % interval {ends}, {change.runs} training seeds)."


def _notes(grid: Grid, task: str) -> list[str]:
    levels = [f"{in_sentence(grid.name(cell.variant))} {number(middle(cell.runs()))}" for cell in grid.levels(task)]
    if task in grid.data:
        returns = grid.data[task]
        levels.append(f"the dataset's episodes {number(returns.mean())} on average, {number(returns.max())} at best")
    sentences = [f"For comparison on {task}: {'; '.join(levels)}."] if levels else []
    for variant in grid.variants:
        longest = max(grid.cells_of(task, variant), key=lambda cell: (cell.test, cell.train or 0), default=None)
        if longest is not None and longest.test > 1:
            sentences += _in_context(grid.name(variant), longest)
    return sentences


def _in_context(name: str, cell: Cell) -> list[str]:
    first, last, best = (number(middle_or_none(cell.runs(metric))) for metric in ("first", "last", "best"))
    sentences = [f"The {name} goes from {first} in the first of {cell.test} episodes in context to {last} in the last."]
    if cell.control:
        ends = (number(middle_or_none(cell.control_runs(metric))) for metric in ("first", "last"))
        sentences.append(f"From the same starts without memory it goes from {' to '.join(ends)}.")
        control = number(middle(cell.control_runs("best")))
        sentences.append(
            f"Its best of {cell.test} is {best}, where the best of {cell.test} tries without memory is {control}."
        )
    return sentences
