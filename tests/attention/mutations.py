"""Check that the tests detect a broken ring: break copies of the code and run the tests.

    python tests/attention/mutations.py [NAME ...]

Each mutation replaces one piece of text in a copy of ringrl.attention, which is imported under its own name and
must fail one of the exactness checks of test_ring.py (RUNS). A mutation whose text is not found is an error.
"""

import argparse
import importlib
import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import ringrl.attention


class Mutation(NamedTuple):
    """One mutation: in `file` of ringrl/attention, `before` becomes `after`."""

    file: str
    before: str
    after: str


MUTATIONS = {
    "keys_and_values_swapped": Mutation(
        "ring.py",
        "kernels.forward(share, options, start)",
        "kernels.forward(share._replace(kv=share.kv[:, ::-1]), options, start)",
    ),
    "values_swapped_in_backward": Mutation(
        "ring.py",
        "kernels.backward(share, options, *one)",
        "kernels.backward(share._replace(kv=share.kv[:, ::-1]), options, *one)",
    ),
    "stale_block_in_forward": Mutation(
        "ring.py",
        "return lax.optimization_barrier((attend(total, blocks), arriving)), None",
        "return lax.optimization_barrier((attend(total, blocks), blocks)), None",
    ),
    "stale_block_in_backward": Mutation(
        "ring.py",
        "return (dq, jax.tree.map(jnp.add, dblocks, dblocks_part), arriving), None",
        "return (dq, jax.tree.map(jnp.add, dblocks, dblocks_part), blocks), None",
    ),
    "last_hop_dropped": Mutation(
        "ring.py",
        "            total = attend(total, blocks)\n",
        "",
    ),
    "last_hop_dropped_in_backward": Mutation(
        "ring.py",
        "            dq, dblocks_part = gradients(dq, blocks)\n",
        "            _, dblocks_part = gradients(dq, blocks)\n",
    ),
    "one_hop_too_few": Mutation("ring.py", "(Leg(size - 1, (1, -1)", "(Leg(size - 2, (1, -1)"),
    "window_one_chunk_too_short": Mutation(
        "ring.py",
        "before = math.ceil(rule.window[0] / local_length)",
        "before = rule.window[0] // local_length",
    ),
    "window_looks_the_wrong_way": Mutation("ring.py", "Leg(after, (-1,))", "Leg(after, (1,))"),
    "second_leg_begins_at_home": Mutation(
        "ring.py",
        "return (self._send(leg, blocks), leg.hops - 1) if number else (blocks, leg.hops)",
        "return (blocks, leg.hops - 1) if number else (blocks, leg.hops)",
    ),
    "gradients_do_not_travel": Mutation(
        "ring.py",
        "                dblocks = self._send(leg, dblocks)\n                tied",
        "                tied",
    ),
    "gradients_do_not_come_home": Mutation(
        "ring.py",
        "self._send(back, jax.tree.map(jnp.add, dblocks, dblocks_part))",
        "jax.tree.map(jnp.add, dblocks, dblocks_part)",
    ),
    "gradients_sent_the_wrong_way_home": Mutation("ring.py", "shifts=tuple(-leg.hops", "shifts=tuple(leg.hops"),
    "gradients_of_the_last_leg_only": Mutation(
        "ring.py",
        "sum(returned[1:], start=returned[0])",
        "returned[-1]",
    ),
    "query_gradients_of_the_last_hop_only": Mutation(
        "ring.py",
        "kernels.backward(share, options, *one)",
        "kernels.backward(share, options, one[0])",
    ),
    "positions_stay_behind": Mutation(
        "ring.py",
        "met = zip(_kernel_inputs(leg, inputs, blocks), starts, strict=True)",
        "met = zip([x._replace(keys=inputs.keys) for x in _kernel_inputs(leg, inputs, blocks)], starts, strict=True)",
    ),
    "positions_stay_behind_in_backward": Mutation(
        "ring.py",
        "met = zip(_kernel_inputs(leg, inputs, blocks), known, strict=True)",
        "met = zip([x._replace(keys=inputs.keys) for x in _kernel_inputs(leg, inputs, blocks)], known, strict=True)",
    ),
    "what_was_seen_before_is_forgotten": Mutation("ring.py", "options, start)", "options)"),
    "wrong_device_s_positions": Mutation(
        "api.py",
        "index = lax.axis_index(axis_name)",
        "index = (lax.axis_index(axis_name) + 1) % size",
    ),
    "cotangent_of_the_log_sum_exp_dropped": Mutation("attend.py", ".sum(-1) - dlse", ".sum(-1)"),
    "cotangent_of_the_log_sum_exp_with_the_wrong_sign": Mutation("attend.py", ".sum(-1) - dlse", ".sum(-1) + dlse"),
    "positions_and_segments_swapped": Mutation("ring.py", "inputs.keys.stacked()", "inputs.keys.stacked()[::-1]"),
    "prefix_does_not_reach_other_devices": Mutation(
        "api.py", "given.key_positions, given.global_prefix", "given.key_positions"
    ),
    "prefix_is_not_gathered": Mutation("ulysses.py", "all_gather(side.stacked(),", "all_gather(side.stacked()[:2],"),
    "prefix_includes_its_end": Mutation(
        "mask.py", "keys.positions < queries.prefix)", "keys.positions <= queries.prefix)"
    ),
    "tiles_of_the_longest_prefix_skipped": Mutation("mask.py", "k_low < most", "k_low < least"),
    "tiles_of_the_shortest_prefix_not_masked": Mutation("mask.py", "(k_high < least)", "(k_high < most)"),
    "window_begins_at_the_longest_prefix": Mutation("mask.py", "maximum(k_low, least)", "maximum(k_low, most)"),
}


def mutate(name: str, folder: Path) -> ModuleType:
    """Return a copy of ringrl.attention with one mutation, imported as a separate package."""
    file, before, after = MUTATIONS[name]
    source = Path(ringrl.attention.__file__).parent
    package = f"broken_{name}"
    for path in source.rglob("*.py"):
        text = path.read_text()
        if path.relative_to(source).as_posix() == file:
            found = text.count(before)
            if found != 1:
                raise ValueError(f"{name}: its text was found {found} times in {file}, expected once: {before!r}")
            text = text.replace(before, after)
        copy = folder / package / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(text.replace("ringrl.attention", package))
    importlib.invalidate_caches()
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(package)
    finally:
        sys.path.remove(str(folder))


def notice(name: str, ring: ModuleType, checks: ModuleType) -> str:
    """Return the failure caused by a mutation, or "" if the tests pass."""
    with tempfile.TemporaryDirectory() as folder:
        package = mutate(name, Path(folder))
    for run in ring.RUNS:
        if wrong := ring.wrong_values(package, run, checks.random_arrays, checks.definition):
            return f"{run}: {', '.join(wrong)} wrong"
    return ""


def load(name: str) -> ModuleType:
    """Import a module of this folder."""
    specification = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def main(arguments: Sequence[str] | None = None) -> None:
    """Run mutations, print the failure of each, and exit with 1 if one is not detected."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of mutations; all by default")
    names = parser.parse_args(arguments).names or MUTATIONS
    import jax

    jax.config.update("jax_num_cpu_devices", 8)
    ring, checks = load("test_ring"), load("conftest")
    for run in ring.RUNS:
        if wrong := ring.wrong_values(ringrl.attention, run, checks.random_arrays, checks.definition):
            raise SystemExit(f"without mutation, {run}: {', '.join(wrong)} wrong")
    undetected = []
    for name in names:
        found = notice(name, ring, checks)
        print(f"{name:<50} {found or 'NOT DETECTED'}", flush=True)
        undetected += [] if found else [name]
    if undetected:
        raise SystemExit(f"not detected: {', '.join(undetected)}")


if __name__ == "__main__":
    main()
