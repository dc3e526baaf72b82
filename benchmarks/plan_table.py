"""Table of the longest contexts by machine, model and kind of attention, from the formula and the TPU compiler.

    python benchmarks/plan_table.py [--compile all|none|7b@tpu-v4-1024 ...] [--scaling] [--json FILE]

The table has 3B, 7B, 13B and 30B models, with the values of 2310.01889 for 7B. As in the paper, vanilla,
memory_efficient and blockwise have one context per device with parameters divided over devices (fsdp); ring has one
context over all devices. --compile also compiles the ring of these cells at half of the formula's longest context (all:
every TPU). --scaling compiles the 350m model on 8, 64 and 512 TPU v4 chips. Compilation needs libtpu, 3 GiB and minutes
per cell; cells that FILE contains are not compiled again. The table without compilation takes a second.
"""

import json
import math
import resource
from collections.abc import Callable, Sequence
from typing import Any

import jax
from common import make_parser, save_json

from ringrl.planning.ahead_of_time import compile_step, devices_of, fits
from ringrl.planning.machines import GIB, find_machine
from ringrl.planning.memory import longest_context, memory_of
from ringrl.planning.workload import Workload, find_model, format_tokens

KINDS = ("vanilla", "memory_efficient", "blockwise", "ring")
PAPER = {  # values of a 7B model in 1024 tokens; v5p-512 replaces the paper's v3-512, which no longer compiles
    "8xa100": (2, 16, 32, 256),
    "32xa100": (4, 64, 128, 4096),
    "tpu-v5p-512": None,
    "tpu-v4-1024": (4, 8, 16, 8192),
    "tpu-v5e-256": (2, 8, 16, 2048),
}
MODELS = ("3b", "7b", "13b", "30b")
SHARE = 0.5  # compiled share of the longest context; close to the limit the compiler takes ten times as long
SCALING = ("tpu-v4-16", "tpu-v4-128", "tpu-v4-1024")  # 8, 64, 512 chips
PER_CHIP = 32_768  # tokens
Results = dict[str, dict[str, Any]]


def workload_of(model: str, machine: str, kind: str) -> Workload:
    """Return the paper's workload of a cell, with a placeholder length."""
    devices = find_machine(machine).devices
    workload = Workload(find_model(model), 1).with_settings("model", attention=kind)
    if kind == "ring":
        workload = workload.with_settings("mesh", seq=devices)
    else:
        workload = workload.with_settings("optimiser", batch_size=devices).with_settings("mesh", fsdp=devices)
    return workload.with_tokens(workload.multiple)


def compile_at(workload: Workload, machine: str, tokens: int) -> dict[str, Any]:
    """Compile a length and compare it with the formula."""
    where = find_machine(machine)
    granule = math.lcm(workload.multiple, 256 * workload.config.mesh.seq)  # whole tiles on each device
    planned = workload.with_tokens(tokens // granule * granule)
    found = compile_step(planned, where, devices_of(where))
    result = {
        "tokens": planned.tokens,
        "gib": found.total / GIB,
        "formula_gib": memory_of(planned, where.device.platform).total / GIB,
        "fits": fits(found, where),
        "refusal": found.refusal,
        "waits_for_hops": found.waits_for_hops,
        "seconds": found.seconds,
        "process_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    print(json.dumps(result), flush=True)
    return result


def compile_scaling(results: Results, save: Callable[[], None]) -> None:
    """Compile the 350m model with equal tokens per chip on 8, 64 and 512 chips, and twice as many on 8."""
    found = results.setdefault("scaling", {})
    for name, factor in ((SCALING[0], 1), (SCALING[0], 2), (SCALING[1], 1), (SCALING[2], 1)):
        key = f"{name} x {factor * PER_CHIP}"
        if key not in found:
            tokens = factor * PER_CHIP * find_machine(name).devices
            found[key] = compile_at(workload_of("350m", name, "ring"), name, tokens)
            save()


def scaling_rows(found: dict[str, Any]) -> list[str]:
    """Return the table of longest contexts, extrapolated from the compiled memory and its slope per token."""
    one, two = (found.get(f"{SCALING[0]} x {factor * PER_CHIP}") for factor in (1, 2))
    if not one or not two:
        return []
    slope = (two["gib"] - one["gib"]) / PER_CHIP
    lines = [
        "",
        "| chips | GiB per chip at 32,768 tokens each | longest context | tokens per chip |",
        "|---|---|---|---|",
    ]
    for name in SCALING:
        if at := found.get(f"{name} x {PER_CHIP}"):
            machine = find_machine(name)
            each = PER_CHIP + (machine.device.memory / GIB - at["gib"]) / slope
            longest = format_tokens(int(each) * machine.devices)
            lines.append(f"| {machine.devices} | {at['gib']:.3f} | {longest} | {each:,.0f} |")
    return lines


def rows(compiled: dict[str, Any]) -> list[str]:
    """Return the table in Markdown."""
    heads = ["machine", "model", *KINDS, "ring, remat full", "ring, compiled"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for machine, paper in PAPER.items():
        for model in MODELS:
            cells = []
            for column, kind in enumerate(KINDS):
                tokens = longest_context(workload_of(model, machine, kind), find_machine(machine))
                theirs = f" ({format_tokens(paper[column] * 1024)})" if paper and model == "7b" else ""
                cells.append((format_tokens(tokens) if tokens else "none") + theirs)
            full = workload_of(model, machine, "ring").with_settings("model", remat="full")
            cells.append(format_tokens(longest_context(full, find_machine(machine))))
            found = compiled.get(f"{model}@{machine}")
            last = f"{format_tokens(found['tokens'])}: {found['gib']:.1f} GiB" if found and found["fits"] else "-"
            lines.append(f"| {machine} | {model} | " + " | ".join(cells) + f" | {last} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Compute, compile and print."""
    parser = make_parser(__doc__)
    every = [f"{model}@{machine}" for machine in PAPER if "tpu" in machine for model in MODELS]
    parser.add_argument("--compile", nargs="+", choices=[*every, "all", "none"], default=["none"], metavar="CELL")
    parser.add_argument("--scaling", action="store_true")
    options = parser.parse_args(arguments)
    jax.config.update("jax_platforms", "cpu")
    results: Results = {"compiled": {}}
    if options.json and options.json.is_file():
        results = json.loads(options.json.read_text())

    def save() -> None:
        save_json(results, options.json)

    if options.scaling:
        compile_scaling(results, save)
    wanted = every if "all" in options.compile else [cell for cell in options.compile if cell != "none"]
    for cell in wanted:
        if cell not in results["compiled"]:
            print(f"{cell}:", flush=True)
            model, machine = cell.split("@")
            workload = workload_of(model, machine, "ring")
            tokens = int(SHARE * longest_context(workload, find_machine(machine)))
            results["compiled"][cell] = compile_at(workload, machine, tokens)
            save()
    print("\n".join(rows(results["compiled"])))
    print("\n".join(scaling_rows(results.get("scaling", {}))))


if __name__ == "__main__":
    main()
