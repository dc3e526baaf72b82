"""Damaged and hostile files: each is rejected in one line, counted as skipped, or read completely."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).parent / "fuzz" / "run.py"
SEEDS = 5  # of each of 25 kinds
NEVER_THE_SAME = {
    "archives": {
        "noise", "wrong_keys", "wrong_shapes", "wrong_dtypes", "pickles", "structured_dtypes", "wrong_values", "bombs",
        "paths_that_escape", "symbolic_links", "nested_archives", "overlapping_entries", "names_twice", "encrypted",
        "other_methods", "strange_names",
    },
    "stores": {
        "cut_short", "wrong_attributes", "missing_attributes", "wrong_provenance", "other_layouts", "compact_layout",
        "bombs", "external_files", "links", "one_array_twice", "virtual_datasets", "other_dtypes", "other_shapes",
        "groups_for_arrays", "other_offsets", "other_numbers",
    },
}  # fmt: skip
ALWAYS_THE_SAME = {"archives": {"harmless"}, "stores": {"longer", "rewritten"}}


@pytest.mark.parametrize("what", ["archives", "stores"])
def test_fuzzed_files(tmp_path, what):
    command = [sys.executable, RUN, what, str(SEEDS), tmp_path]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    tried = [json.loads(line) for line in run.stdout.splitlines()]
    assert run.returncode == 0, f"after {tried[-1:]}: {run.stderr[-2000:]}"
    assert len(tried) == 25 * SEEDS
    assert [case for case in tried if case["outcome"].startswith("fault")] == []
    for case in tried:
        if case["outcome"] in ("rejected", "found by verify"):
            assert "fuzzed." in case["message"], case
            assert case["message"].isprintable(), case
            assert len(case["message"]) < 2_000, case
        assert case["outcome"] != "same" or case["kind"] not in NEVER_THE_SAME[what], case
        assert case["outcome"] == "same" or case["kind"] not in ALWAYS_THE_SAME[what], case
    assert tried[-1]["kilobytes"] - tried[5]["kilobytes"] < 100_000, "no claim of a file may be believed with memory"
