"""What travels while something is computed, as the compiler ordered it: read from a scheduled program's text."""

import re
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?[\w.\-]+ \([^\n]*\{\n(.*?)^\}", re.MULTILINE | re.DOTALL)
_START = re.compile(r"%?([\w.\-]+) = .* (collective-permute|all-gather|all-reduce|reduce-scatter|all-to-all)-start\(")
_DONE = re.compile(r" (?:collective-permute|all-gather|all-reduce|reduce-scatter|all-to-all)-done\(.*?%?([\w.\-]+)\)")
_WAITED = re.compile(r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)\(")
_INTEGERS = re.compile(r"\s*(?:ROOT )?%?[\w.\-]+ = \(?s32\[")
_KERNEL = re.compile(r'custom_call_target="(?:tpu_custom_call|mosaic_gpu[\w.]*|__gpu\$xla.gpu.triton)"')
_WORK = re.compile(r" (?:while|convolution|dot)\(| fusion\(.*kind=kOutput")


class Schedule(NamedTuple):
    """Transfers that the program holds, each counted once however often its loop runs it.

    Integers (positions and segments, a few bytes a token) are left out.
    """

    around_ring: int  # in a loop with a kernel of attention
    around_ring_hidden: int  # of them, with such a kernel between start and end
    others: int  # other asynchronous ones
    others_hidden: int  # of them, with a kernel, a matrix product or a loop between start and end
    waited_for: dict[str, int]  # that nothing can hide, by kind

    @property
    def hides_the_ring(self) -> bool:
        """Whether what goes from neighbour to neighbour does so while something else is done."""
        return "collective-permute" not in self.waited_for

    def __str__(self) -> str:
        waited = ", ".join(f"{number} {kind}" for kind, number in sorted(self.waited_for.items())) or "none"
        return (
            f"{self.around_ring_hidden} of {self.around_ring} transfers around the ring run behind a kernel of "
            f"attention, {self.others_hidden} of {self.others} others behind computation; waited for: {waited}"
        )


def read_schedule(text: str) -> Schedule:
    """Of the text of a compiled program whose instructions stand in the order of execution."""
    ring, ring_hidden, others, others_hidden = 0, 0, 0, 0
    waited: dict[str, int] = {}
    for body in _COMPUTATION.findall(text):
        lines = body.splitlines()
        has_kernel = any(_KERNEL.search(line) for line in lines)
        is_ring = has_kernel and not any(" while(" in line for line in lines)
        for behind_kernel, behind_work in _intervals(lines):
            if is_ring:
                ring, ring_hidden = ring + 1, ring_hidden + behind_kernel
            else:
                others, others_hidden = others + 1, others_hidden + (behind_kernel or behind_work)
        for kind in (found[1] for line in lines if (found := _WAITED.search(line)) and not _INTEGERS.match(line)):
            waited[kind] = waited.get(kind, 0) + 1
    return Schedule(ring, ring_hidden, others, others_hidden, waited)


def _intervals(lines: list[str]) -> list[tuple[bool, bool]]:
    """Of each transfer that ends where it starts: whether a kernel, and whether other work, runs in between."""
    open_since: dict[str, int] = {}
    found = []
    for index, line in enumerate(lines):
        if (start := _START.search(line)) and not _INTEGERS.match(line):
            open_since[start[1]] = index
        elif (done := _DONE.search(line)) and done[1] in open_since:
            between = lines[open_since.pop(done[1]) + 1 : index]
            found.append((any(_KERNEL.search(x) for x in between), any(_WORK.search(x) for x in between)))
    return found
