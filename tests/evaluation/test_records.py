"""The results format: round trips, damaged lines, searched folders, and errors that name the file and line."""

import gzip
import multiprocessing
import os
import resource
import shutil
import signal
from pathlib import Path

import numpy as np
import pydantic
import pytest

from ringrl.errors import UserError
from ringrl.evaluation.records import (
    EvaluationRecord,
    append_records,
    check_writable,
    data_records,
    find_results,
    library_versions,
    read_records,
    remove_damaged_lines,
)
from ringrl.files import with_crc, without_crc


def make_record(**changes) -> EvaluationRecord:
    values = {
        "task": "walker_walk", "method": "at", "token_set": "ring4", "train_trajectories": 2, "test_trajectories": 2,
        "seed": 1, "environment_seed": 5, "returns": (1.5, 2.25), "target_return": 900.0, "target_policy": "data_best",
        "steps_trained": 10, "versions": {"jax": "0.10.2"},
    }  # fmt: skip
    return EvaluationRecord(**{**values, **changes})


def test_a_record_is_shown_in_one_line():
    about = "EvaluationRecord(at, n=2, walker_walk, seed 1"
    assert repr(make_record()) == str(make_record()) == f"{about}, mean return 1.875 in 2 of 2 episodes)"
    assert (
        repr(make_record(returns=(4, None), context=False))
        == f"{about}, without memory, mean return 4 in 1 of 2 episodes)"
    )
    failed = make_record(method="bc", train_trajectories=None, returns=(None,), test_trajectories=1)
    assert repr(failed) == "EvaluationRecord(bc, walker_walk, seed 1, no return in 0 of 1 episodes)"


def test_round_trip(tmp_path):
    path = tmp_path / "new folder" / "results.jsonl"
    first, second, third = make_record(), make_record(seed=2, token_set=None), make_record(context=False)
    append_records(path, [first])
    append_records(path, [second, third])
    results = read_records(path)
    assert results.records == (first, second, third)
    assert results.sources == (path,)
    assert results.notes == ()
    assert len(path.read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"returns": (1.0,)}, "1 returns for test_trajectories=2"),
        ({"returns": (1.0, float("nan"))}, "finite"),
        ({"train_trajectories": 0}, "greater than 0"),
        ({"seed": -1}, "greater than or equal to 0"),
        ({"protocol": 2}, "Input should be 1"),
        ({"reward": 3}, "Extra inputs"),
        ({"task": ""}, "at least 1 character"),
        ({"returns": (None, 1.0)}, "a return after an episode that failed"),
        ({"start_seeds": (3,)}, "1 start_seeds for test_trajectories=2"),
    ],
)
def test_an_invalid_record_raises(changes, message):
    with pytest.raises(pydantic.ValidationError, match=message):
        make_record(**changes)


def test_starts_are_identified():
    assert make_record(start_seeds=(7, 8)).starts == ((7, 0), (8, 0))
    assert make_record(start_seeds=()).starts == ((5, 0), (5, 1)), "both from one stream of starts"


def test_json_that_is_too_deep_is_damaged(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"protocol": ' + "[" * 200_000 + "\n")
    assert read_records(path).notes == (f"{path}, line 1: damaged or cut short, left out",)


def test_failed_episodes_are_marked_and_counted(tmp_path):
    path = tmp_path / "results.jsonl"
    records = [make_record(), make_record(returns=(1.5, None)), make_record(returns=(None, None))]
    append_records(path, records)
    assert "NaN" not in path.read_text()
    found = read_records(path).records
    assert found == tuple(records)
    assert [record.failed for record in found] == [0, 1, 2]
    assert [record.finished for record in found] == [(1.5, 2.25), (1.5,), ()]


def test_older_records_are_read(tmp_path):
    """A line from before records had prompts, failures and evaluations."""
    path = tmp_path / "results.jsonl"
    path.write_text(
        '{"protocol":1,"task":"jaco_reach_top_left","method":"at","token_set":"fused1","train_trajectories":2,'
        '"test_trajectories":1,"context":true,"seed":0,"environment_seed":1000000,"returns":[0.25],"target_return":9.0,'
        '"target_policy":"data_best","steps_trained":3,"checkpoint":"run","checkpoint_hash":"1c","data_fingerprint":'
        '"61","command":"ringrl evaluate","versions":{"jax":"0.10.2"},"created":"2026-11-21T19:57:04.317178Z"}\n'
    )
    (record,) = read_records(path).records
    assert (record.prompt_trajectories, record.evaluation, record.failed) == (0, None, 0)


def test_checking_whether_a_file_can_be_written_leaves_no_file(tmp_path):
    check_writable(tmp_path / "new" / "results.jsonl")
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "there.jsonl").write_text("x")
    check_writable(tmp_path / "there.jsonl")
    assert (tmp_path / "there.jsonl").read_text() == "x"
    for path in (tmp_path / "new", tmp_path / "there.jsonl" / "results.jsonl"):
        with pytest.raises(UserError, match="cannot be written"):
            check_writable(path)


def test_a_record_is_frozen():
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        make_record().seed = 3


def test_a_half_written_last_line_is_ignored_and_reported(tmp_path):
    path = tmp_path / "results.jsonl"
    append_records(path, [make_record(), make_record(seed=2)])
    whole = path.read_bytes()
    end_of_first = whole.index(b"\n") + 1
    for cut in range(end_of_first + 1, len(whole) - 1):
        path.write_bytes(whole[:cut])
        results = read_records(path)
        assert [record.seed for record in results.records] == [1]
        assert results.notes == (f"{path}, line 2: damaged or cut short, left out",)
    path.write_bytes(whole[:-1])  # only the newline is missing, so the record is whole
    assert len(read_records(path).records) == 2
    assert read_records(path).notes == ()


@pytest.mark.parametrize("kept", [1, 30, -1])
def test_appending_after_a_half_written_line(tmp_path, kept):
    path = tmp_path / "results.jsonl"
    append_records(path, [make_record(checkpoint="c" * 10_000), make_record(seed=2)])
    whole = path.read_bytes()
    cut = len(whole) - 1 if kept == -1 else whole.index(b"\n") + 1 + kept
    path.write_bytes(whole[:cut])
    append_records(path, [make_record(seed=3)])
    found = read_records(path)
    assert [record.seed for record in found.records] == ([1, 2, 3] if kept == -1 else [1, 3])
    assert len(found.notes) == (kept != -1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1, 2]", "line 2: is not an evaluation record"),
        ('{"loss": 0.5, "step": 3}', "line 2: is not an evaluation record"),
        ('{"protocol": 7, "anything": 1}', "line 2: has evaluation protocol 7.*protocol 1 only"),
        (with_crc('{"protocol": 1, "task": "walker_walk"}'), "line 2: method: Field required"),
    ],
)
def test_an_invalid_line_raises(tmp_path, line, message):
    path = tmp_path / "results.jsonl"
    good = make_record().model_dump_json()
    path.write_text(f"{good}\n{line}\n{good}\n")
    with pytest.raises(UserError, match=message) as caught:
        read_records(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("sealed", [True, False])
def test_a_damaged_line_costs_that_line_only(tmp_path, sealed):
    path = tmp_path / "results.jsonl"
    append_records(path, [make_record(seed=seed) for seed in range(3)])
    lines = [line if sealed else without_crc(line) for line in path.read_text().splitlines()]
    broken = [lines[1].replace("2.25", "2.35"), lines[1].replace('"crc32"', '"crc33"')] if sealed else []
    for line in (*broken, lines[1][:-9], lines[1].replace('"returns"', '"retorns"'), lines[1][:50] + "\xff"):
        path.write_text("\n".join([lines[0], line, lines[2], ""]), "latin-1")
        found = read_records(path)
        assert [record.seed for record in found.records] == [0, 2]
        assert found.notes == (f"{path}, line 2: damaged or cut short, left out",)
    remove_damaged_lines(path)
    assert path.read_text().splitlines() == [lines[0], lines[2]]


def test_links_are_followed_and_copies_count_once(tmp_path):
    study, run = tmp_path / "study", tmp_path / "scratch" / "run"
    append_records(run / "evaluation.jsonl", [make_record()])
    append_records(study / "own" / "evaluation.jsonl", [make_record(seed=2)])
    shutil.copytree(run, study / ".hidden")
    os.mkfifo(study / "pipe.jsonl")
    (study / "linked").symlink_to(run)
    (study / "own" / "loop").symlink_to(study)
    shutil.copytree(run, study / "run copied")
    found = read_records(study)
    assert sorted(record.seed for record in found.records) == [1, 2]
    assert found.notes == ("1 results are also in another file: counted once",)
    with pytest.raises(UserError, match=r"pipe\.jsonl: is not a regular file"):
        read_records(study / "pipe.jsonl")


def test_compressed_results(tmp_path):
    path = tmp_path / "results.jsonl"
    append_records(path, [make_record(), make_record(seed=2)])
    packed = tmp_path / "packed" / "results.jsonl.gz"
    packed.parent.mkdir()
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert read_records(packed.parent).records == read_records(str(path)).records == read_records([str(path)]).records
    for damaged in (packed.read_bytes()[:-20], b"no gzip", packed.read_bytes().replace(b"\x00", b"\x01")):
        packed.write_bytes(damaged)
        with pytest.raises(UserError, match=r"results.jsonl.gz: cannot be read \(.+\)"):
            read_records(packed)


def test_a_binary_file_raises(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_bytes(bytes(range(256)))
    with pytest.raises(UserError, match=r"results\.jsonl: is not a results file; give results of"):
        read_records(path)


def test_folders_are_searched_and_files_read_once(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "metrics.jsonl").write_text('{"loss": 1}\n')  # the metrics of training
    (tmp_path / "a" / "notes.txt").write_text("not results")
    append_records(tmp_path / "a" / "b" / "evaluation.jsonl", [make_record()])
    append_records(tmp_path / "a" / "evaluation.jsonl", [make_record(seed=2)])
    found = find_results([tmp_path / "a" / "b" / "evaluation.jsonl", tmp_path / "a"])
    assert found == [tmp_path / "a" / "b" / "evaluation.jsonl", tmp_path / "a" / "evaluation.jsonl"]
    assert sorted(record.seed for record in read_records(tmp_path).records) == [1, 2]
    with pytest.raises(UserError, match="no such file or folder"):
        read_records([tmp_path / "missing.jsonl"])


def test_data_records_have_one_return_each():
    records = data_records(
        "walker_walk", np.array([3.0, 1.0], np.float32), data_fingerprint="abc", versions={"jax": "1"}
    )
    assert [record.returns for record in records] == [(3.0,), (1.0,)]
    assert [record.environment_seed for record in records] == [0, 1]
    assert {record.method for record in records} == {"data"}


def test_library_versions_of_installed_libraries():
    versions = library_versions()
    assert {"python", "ringrl", "jax", "numpy"} <= set(versions)


def _append_many(path: str, seed: int) -> None:
    for index in range(20):
        append_records(Path(path), [make_record(seed=seed, environment_seed=index, checkpoint="x" * 5000)])


def test_writers_share_a_file(tmp_path):
    path = tmp_path / "results.jsonl"
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_append_many, args=(str(path), seed)) for seed in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(read_records(path).records) == 40


def test_a_failed_write_leaves_the_file_unchanged(tmp_path):
    path = tmp_path / "results.jsonl"
    append_records(path, [make_record()])
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, limits[1]))  # a disk with 100 bytes left
        with pytest.raises(UserError, match="is full"):
            append_records(path, [make_record(seed=2), make_record(seed=3)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before


def test_a_folder_in_place_of_the_file_raises(tmp_path):
    with pytest.raises(UserError, match="cannot be written"):
        append_records(tmp_path, [make_record()])
