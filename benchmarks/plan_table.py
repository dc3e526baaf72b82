"""How long a context fits where? The papers' table by this implementation, by formula and by the TPU compiler.

    python benchmarks/plan_table.py [--compile all|none|7b@tpu-v4-1024 ...] [--scaling] [--json FILE]

Longest contexts of 3B, 7B, 13B and 30B models, by kind of attention, the 7B ones beside those of 2310.01889. As there,
vanilla, memory_efficient and blockwise have each context on one device, and the devices divide the parameters (fsdp);
ring has one context around all of them. Cells that --compile names (all: ring on every TPU that compiles) are compiled
at half of the formula's longest; results are kept in FILE, and those that are there already are not compiled again.
--scaling: the 350m model on 8, 64 and 512 TPU v4 chips. Both need libtpu, 3 GiB and minutes a cell; the table alone
takes a second.
"""

import argparse
import json
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from ringrl.planning.ahead_of_time import compile_step, devices_of, fits
from ringrl.planning.closed_form import longest_context, memory_of
from ringrl.planning.machines import GIB, find_machine
from ringrl.planning.search import granule
from ringrl.planning.workload import Workload, find_model, say_tokens

KINDS = ("vanilla", "memory_efficient", "blockwise", "ring")
PAPER = {  # of a 7B model, in 1024 tokens; v5p-512 stands where the paper has v3-512, which no longer compiles
    "8xa100": (2, 16, 32, 256),
    "32xa100": (4, 64, 128, 4096),
    "tpu-v5p-512": None,
    "tpu-v4-1024": (4, 8, 16, 8192),
    "tpu-v5e-256": (2, 8, 16, 2048),
}
MODELS = ("3b", "7b", "13b", "30b")
SHARE = 0.5  # of the formula's longest is compiled: close to the limit the compiler takes ten times as long
SCALING = ("tpu-v4-16", "tpu-v4-128", "tpu-v4-1024")  # 8, 64, 512 chips
PER_CHIP = 32_768  # tokens
Results = dict[str, dict[str, Any]]


def workload_of(model: str, machine: str, kind: str) -> Workload:
    """As the paper has it; the length is a placeholder."""
    devices = find_machine(machine).devices
    workload = Workload(find_model(model), 1).with_settings("model", attention=kind)
    if kind == "ring":
        workload = workload.with_settings("mesh", seq=devices)
    else:
        workload = workload.with_settings("optimiser", batch_size=devices).with_settings("mesh", fsdp=devices)
    return workload.with_tokens(workload.multiple)


def compile_at(workload: Workload, machine: str, tokens: int) -> dict[str, Any]:
    """What the compiler says of a length, beside the formula."""
    where = find_machine(machine)
    planned = workload.with_tokens(tokens // granule(workload) * granule(workload))
    found = compile_step(planned, where, devices_of(where))
    result = {
        "tokens": planned.tokens,
        "gib": found.total / GIB,
        "formula_gib": memory_of(planned, where.device.platform).total / GIB,
        "fits": fits(found, where),
        "refusal": found.refusal,
        "schedule": str(found.schedule),
        "seconds": found.seconds,
        "process_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    print(json.dumps(result), flush=True)
    return result


def compile_cell(model: str, machine: str) -> dict[str, Any]:
    """A length that the compiler takes."""
    workload = workload_of(model, machine, "ring")
    print(f"{model} on {machine}:", flush=True)
    return compile_at(workload, machine, int(SHARE * longest_context(workload, find_machine(machine))))


def compile_scaling(results: Results, save: Any) -> None:
    """Of the 350m model: as many tokens per chip on 8, 64 and 512 chips, and twice as many on 8 for the slope."""
    found = results.setdefault("scaling", {})
    for name, factor in ((SCALING[0], 1), (SCALING[0], 2), (SCALING[1], 1), (SCALING[2], 1)):
        key = f"{name} x {factor * PER_CHIP}"
        if key not in found:
            tokens = factor * PER_CHIP * find_machine(name).devices
            found[key] = compile_at(workload_of("350m", name, "ring"), name, tokens)
            save()


def scaling_rows(found: dict[str, Any]) -> list[str]:
    """The longest context by the compiler's memory at one length and its slope per token of a chip."""
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
            longest = say_tokens(int(each) * machine.devices)
            lines.append(f"| {machine.devices} | {at['gib']:.3f} | {longest} | {each:,.0f} |")
    return lines


def rows(compiled: dict[str, Any]) -> list[str]:
    """The table in Markdown."""
    lines = ["| machine | model | " + " | ".join(KINDS) + " | ring, compiled |", "|---" * (len(KINDS) + 3) + "|"]
    for machine, paper in PAPER.items():
        for model in MODELS:
            cells = []
            for column, kind in enumerate(KINDS):
                tokens = longest_context(workload_of(model, machine, kind), find_machine(machine))
                theirs = f" ({say_tokens(paper[column] * 1024)})" if paper and model == "7b" else ""
                cells.append((say_tokens(tokens) if tokens else "none") + theirs)
            found = compiled.get(f"{model}@{machine}")
            last = f"{say_tokens(found['tokens'])}: {found['gib']:.1f} GiB" if found and found["fits"] else "-"
            lines.append(f"| {machine} | {model} | " + " | ".join(cells) + f" | {last} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Compute, compile what is asked for, print and, if asked, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [f"{model}@{machine}" for machine in PAPER if "tpu" in machine for model in MODELS]
    parser.add_argument("--compile", nargs="+", choices=[*every, "all", "none"], default=["none"], metavar="CELL")
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    jax.config.update("jax_platforms", "cpu")
    results: Results = {"compiled": {}}
    if options.json and options.json.is_file():
        results = json.loads(options.json.read_text())

    def save() -> None:
        if options.json:
            options.json.write_text(json.dumps(results, indent=1))

    if options.scaling:
        compile_scaling(results, save)
    wanted = every if "all" in options.compile else [cell for cell in options.compile if cell != "none"]
    for cell in wanted:
        if cell not in results["compiled"]:
            results["compiled"][cell] = compile_cell(*cell.split("@"))
            save()
    print("\n".join(rows(results["compiled"])))
    print("\n".join(scaling_rows(results.get("scaling", {}))))


if __name__ == "__main__":
    main()
