"""What happens when something goes wrong, and what is lost? docs/faults.md's table comes from here.

    python benchmarks/faults.py [--only train evaluate] [--match "kill|disk"] [--list] [--folder FOLDER] [--output FILE]

Kills, fills disks, damages files, takes memory away and cuts the network, in turn, over `ringrl data download`,
`data import`, `train`, `evaluate` and `ablate`: the real command line in real processes, on a few episodes that
RingRL collects itself. After each fault the same command is given again (training with --resume, a study with
--retry), and what comes of it is compared with an undisturbed run: bytes, metrics, parameters, records.

A fault passes if the command ends in one line that says what to do, without a traceback and with the right exit
code, and if nothing is lost. Exit code 1 if any does not.
"""

import argparse
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from fault_cases.ablation import Ablate
from fault_cases.disk import Disk, Limit, go_on_in_own_namespace
from fault_cases.download import Download
from fault_cases.evaluation import Evaluate
from fault_cases.importing import Import
from fault_cases.material import make_material
from fault_cases.training import Train
from fault_cases.trial import Fault, Outcome, Trial, play

TRIALS: dict[str, type[Trial]] = {trial.name: trial for trial in (Download, Import, Train, Evaluate, Ablate)}


def chosen(options: argparse.Namespace, root: Path, disk: Disk) -> Iterator[tuple[Trial, list[Fault]]]:
    """The commands that are asked for, each with its faults."""
    for name in options.only:
        trial = TRIALS[name](root / "material", root / name)
        faults = [fault for fault in trial.faults(disk) if re.search(options.match, fault.name)]
        if faults:
            yield trial, faults


def verdict(outcome: Outcome) -> str:
    """In a word."""
    if not outcome.problems and not outcome.lost:
        return "pass"
    return "known" if outcome.accepted else "FAIL"


def show(outcome: Outcome) -> None:
    """A line of the table, and what is wrong with it."""
    lost = "; ".join(outcome.lost) or "nothing"
    cells = [outcome.command, outcome.fault, str(outcome.code), outcome.line.replace("|", "\\|") or "-", outcome.kept]
    print("| " + " | ".join([*cells, outcome.next, lost, verdict(outcome)]) + " |", flush=True)
    for problem in outcome.problems:
        print(f"  {problem}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Break, watch, mend, compare, print and, if asked, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(TRIALS), choices=TRIALS, help="commands")
    parser.add_argument("--match", default="", help="faults whose names match this regular expression")
    parser.add_argument("--list", action="store_true", help="name the faults and stop")
    parser.add_argument("--folder", type=Path, help="work here and keep it, instead of in a temporary folder")
    parser.add_argument("--output", type=Path, help="also write every outcome to this JSON file")
    parser.add_argument("--no-tmpfs", action="store_true", help="let a limit on file sizes stand for a full disk")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as a shell's background jobs do not, and would inherit
    if not (options.no_tmpfs or options.list or options.inside):
        go_on_in_own_namespace()
    root = options.folder or Path(tempfile.mkdtemp(prefix="ringrl-faults-"))
    root.mkdir(parents=True, exist_ok=True)
    try:
        _run(options, root.resolve(), (Disk if options.inside else Limit)(root.resolve() / "disk"))
    finally:
        if options.folder is None:
            shutil.rmtree(root, ignore_errors=True)


def _run(options: argparse.Namespace, root: Path, disk: Disk) -> None:
    if options.list:
        for trial, faults in chosen(options, root, disk):
            print("\n".join(f"{trial.name}: {fault.name}" for fault in faults))
        return
    print(f"# {datetime.now(UTC):%Y-%m-%d}, disks: {disk.kind}", file=sys.stderr)
    began = time.perf_counter()
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(root / "compiled")  # each program once for all processes
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    make_material(root / "material")
    print("| command | fault | code | the last line | kept | then | lost | |\n|---|---|---|---|---|---|---|---|")
    outcomes = []
    for trial, faults in chosen(options, root, disk):
        trial.run_undisturbed()
        for fault in faults:
            outcomes.append(play(trial, fault, root / "cases", disk))
            show(outcomes[-1])
            if options.output:
                _write(options.output, disk, outcomes)
    counts = Counter(map(verdict, outcomes))
    minutes = (time.perf_counter() - began) / 60
    print(f"{len(outcomes)} faults in {minutes:.0f} minutes: {dict(counts)}", file=sys.stderr)
    sys.exit(1 if counts["FAIL"] else 0)


def _write(path: Path, disk: Disk, outcomes: Sequence[Outcome]) -> None:
    from ringrl.evaluation.records import library_versions

    lines = [outcome.to_json() | {"verdict": verdict(outcome)} for outcome in outcomes]
    about = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "disk": disk.kind, "versions": library_versions()}
    path.write_text(json.dumps(about | {"outcomes": lines}, indent=1) + "\n")


if __name__ == "__main__":
    main()
