"""Schedules of compiled programs: which transfers overlap with work."""

import re
from collections import Counter
from typing import NamedTuple


class Schedule(NamedTuple):
    """Numbers of transfers in a program. A transfer in a loop counts once. Transfers of integers are ignored."""

    around_ring: int  # transfers in a loop with an attention kernel
    around_ring_hidden: int  # of around_ring, with an attention kernel between start and end
    others: int  # other asynchronous transfers
    others_hidden: int  # of others, with a kernel, a matrix product or a loop between start and end
    waited_for: dict[str, int]  # synchronous transfers by kind


_COMPUTATION = re.compile(r"^(?:ENTRY )?%?[\w.\-]+ \([^\n]*\{\n(.*?)^\}", re.MULTILINE | re.DOTALL)
_START = re.compile(r"%?([\w.\-]+) = .* (collective-permute|all-gather|all-reduce|reduce-scatter|all-to-all)-start\(")
_DONE = re.compile(r" (?:collective-permute|all-gather|all-reduce|reduce-scatter|all-to-all)-done\(.*?%?([\w.\-]+)\)")
_WAITED = re.compile(r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)\(")
_INTEGERS = re.compile(r"\s*(?:ROOT )?%?[\w.\-]+ = \(?s32\[")
_KERNEL = re.compile(r'custom_call_target="(?:tpu_custom_call|mosaic_gpu[\w.]*|__gpu\$xla.gpu.triton)"')
_WORK = re.compile(r" (?:while|convolution|dot)\(| fusion\(.*kind=kOutput")


def read_schedule(text: str) -> Schedule:
    """Parse the text of a compiled program with instructions in order of execution."""
    ring, ring_hidden, others, others_hidden = 0, 0, 0, 0
    waited: Counter[str] = Counter()
    for body in _COMPUTATION.findall(text):
        lines = body.splitlines()
        has_kernel = any(_KERNEL.search(line) for line in lines)
        is_ring = has_kernel and not any(" while(" in line for line in lines)
        for behind_kernel, behind_work in _intervals(lines):
            if is_ring:
                ring, ring_hidden = ring + 1, ring_hidden + behind_kernel
            else:
                others, others_hidden = others + 1, others_hidden + (behind_kernel or behind_work)
        waited.update(found[1] for line in lines if (found := _WAITED.search(line)) and not _INTEGERS.match(line))
    return Schedule(ring, ring_hidden, others, others_hidden, dict(waited))


def _intervals(lines: list[str]) -> list[tuple[bool, bool]]:
    """Return for each transfer of a computation whether a kernel and whether other work runs between start and end."""
    open_since: dict[str, int] = {}
    found = []
    for index, line in enumerate(lines):
        if (start := _START.search(line)) and not _INTEGERS.match(line):
            open_since[start[1]] = index
        elif (done := _DONE.search(line)) and done[1] in open_since:
            between = lines[open_since.pop(done[1]) + 1 : index]
            found.append((any(_KERNEL.search(x) for x in between), any(_WORK.search(x) for x in between)))
    return found
