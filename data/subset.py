"""Which episodes of an archive are taken: a rule that can be said in one line."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Int64

from ringrl.errors import UserError

Rule = Literal["first", "last", "random", "spread"]


@dataclass(frozen=True)
class Subset:
    """A number of episodes, chosen by a rule; the order of the archive stays.

    Attributes:
        rule: the first or last ones, some drawn at random without replacement, or some at equal distances.
        max_episodes: how many at most; None for no limit.
        max_transitions: how many steps they may have together; None for no limit.
        seed: of the random draw.
    """

    rule: Rule = "first"
    max_episodes: int | None = None
    max_transitions: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """UserError for a limit below 1 or a negative seed."""
        for flag, number in (("--max-episodes", self.max_episodes), ("--max-transitions", self.max_transitions)):
            if number is not None and number < 1:
                raise UserError(f"{flag} is {number}, at least 1 is needed")
        if self.seed < 0:
            raise UserError(f"--seed is {self.seed}, it must not be negative")

    def choose(self, episodes: int, length: int) -> Int64[np.ndarray, " chosen"]:
        """The indices chosen among so many episodes of `length` steps each, ascending; UserError if none fits."""
        number = min(episodes, self.max_episodes or episodes)
        if self.max_transitions is not None:
            number = min(number, self.max_transitions // length)
        if number == 0:
            raise UserError(f"--max-transitions is {self.max_transitions}, less than one episode of {length} steps")
        if self.rule == "first":
            return np.arange(number)
        if self.rule == "last":
            return np.arange(episodes - number, episodes)
        if self.rule == "random":
            return np.sort(np.random.default_rng(self.seed).choice(episodes, number, replace=False))
        return np.round(np.linspace(0, episodes - 1, number)).astype(np.int64)

    def describe(self, chosen: int, episodes: int) -> str:
        """The rule and what came of it: "10 of 240 episodes at random (seed 3)"."""
        if chosen == episodes:
            return f"all {episodes:,} episodes"
        how = {
            "first": "the first ones",
            "last": "the last ones",
            "random": f"at random (seed {self.seed})",
            "spread": "at equal distances",
        }
        return f"{chosen:,} of {episodes:,} episodes, {how[self.rule]}"
