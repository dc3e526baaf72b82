"""Whole ablations of tiny cells, in real processes."""

import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from ringrl.cli import main
from ringrl.data import EpisodeStore
from ringrl.errors import UserError
from ringrl.evaluation.protocol import FIRST_SEED
from ringrl.evaluation.records import read_records
from ringrl.files import lock
from ringrl.report.conclusion import starts_warning
from ringrl.report.provenance import training_runs
from ringrl.report.results import read_results
from ringrl.report.tables import returns_table, training_table
from ringrl.study import runner
from ringrl.study.cells import attempt, cells, references
from ringrl.study.plan import read_plan
from ringrl.study.runner import ablate
from ringrl.training.run_folder import dataset_fingerprint

COMMAND = Path(sys.executable).with_name("ringrl")


def output_of(plan: Path, workers: int = 2) -> tuple[str, str | None]:
    """Run an ablation; returns its output and its error."""
    console = Console(record=True, width=200, file=io.StringIO())
    error = None
    try:
        ablate(read_plan(plan), console, "ringrl ablate plan.yaml", workers)
    except UserError as end:
        error = str(end)
    return console.export_text(), error


@pytest.mark.slow
def test_a_failed_cell_stops_no_other_and_runs_again(write_plan, jaco_store: EpisodeStore) -> None:
    plan = write_plan(jaco_store.path, baselines=[])
    runs = read_plan(plan).output / "jaco_reach_top_left"
    blocked = runs / "at_1_seed0"
    blocked.mkdir(parents=True)
    (blocked / "checkpoints").write_text("in the way")
    output, error = output_of(plan)
    assert error is not None
    assert error.startswith("1 of 4 failed")
    (line,) = [line for line in output.splitlines() if "at_1_seed0 failed: " in line]
    assert "cannot be written" in line
    assert str(blocked / "log.txt") in line
    assert "cannot be written" in (blocked / "log.txt").read_text()
    assert "0 running, 1 failed, 0 waiting" in output
    results = {folder.name: folder / "evaluation.jsonl" for folder in runs.iterdir()}
    assert {name for name, path in results.items() if path.exists()} == {"random", "data", "at_2_seed0"}

    before = {name: path.read_bytes() for name, path in results.items() if path.exists()}
    (blocked / "checkpoints").unlink()
    output, error = output_of(plan)
    assert error is None
    assert output.count("finished in") == 1
    assert {name: results[name].read_bytes() for name in before} == before
    _results_are_whole([results[name] for name in results], jaco_store)


def _results_are_whole(files: list[Path], store: EpisodeStore) -> None:
    records = read_records(files).records
    counts = {name: sum(record.method == name for record in records) for name in ("random", "data", "at")}
    assert counts == {"random": 4, "data": 8, "at": 8}
    for policy, length in (("random", None), ("at", 1), ("at", 2)):
        own = [r for r in records if (r.method, r.train_trajectories) == (policy, length)]
        starts = [record.starts for record in own if record.context]
        assert sorted(start for one in starts for start in one) == [(FIRST_SEED + index, 0) for index in range(4)]
    returns = store.returns("jaco_reach_top_left")
    assert [record.returns[0] for record in records if record.method == "data"] == pytest.approx(returns.tolist())
    contexts = [(record.context, record.test_trajectories) for record in own]
    assert contexts == [(True, 2)] * 2 + [(False, 2)] * 2
    assert {record.target_return for record in records if record.method == "at"} == {float(np.max(returns))}


def finish_all(plan: Path, store: EpisodeStore) -> list[str]:
    """Run what is not finished in this process; returns the names."""
    chosen, fingerprints = read_plan(plan), {"jaco_reach_top_left": dataset_fingerprint(store)}
    todo = [w for w in (*references(chosen, fingerprints), *cells(chosen, fingerprints)) if not w.is_finished]
    assert [attempt(work, "ringrl ablate plan.yaml") for work in todo] == [None] * len(todo)
    return [work.folder.name for work in todo]


def test_more_episodes_and_lengths_are_rolled_out_later_and_other_settings_are_rejected(
    write_plan, jaco_store: EpisodeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = {"trajectories": [1], "baselines": [], "episodes": 2}
    plan = write_plan(jaco_store.path, **one)
    assert finish_all(plan, jaco_store) == ["random", "data", "at_1_seed0"]
    run = read_plan(plan).output / "jaco_reach_top_left" / "at_1_seed0"
    metrics = (run / "metrics.jsonl").read_bytes()
    assert all(json.loads(line)["peak_memory_bytes"] > 0 for line in metrics.splitlines())
    more = one | {"test_trajectories": [1, 2], "episodes": 4}
    assert finish_all(write_plan(jaco_store.path, **more), jaco_store) == ["random", "at_1_seed0"]
    assert (run / "metrics.jsonl").read_bytes() == metrics
    results = read_results(run.parent)
    table = returns_table(results)
    policies = table[table["kind"] != "data"]
    found = {(row["family"], row["test_trajectories"], row["episodes"]) for _, row in policies.iterrows()}
    assert found == {("random", 1, 4), ("at", 1, 4), ("at", 2, 4)}
    assert results.groupby(["family", "test_trajectories"])["matched"].any()["at", 2]
    assert starts_warning(results, table) is None
    settings = read_plan(write_plan(jaco_store.path)).settings
    wider = settings | {"model": settings["model"] | {"width": 32}}
    for changes, words in (
        ({"settings": wider}, "model.width was 16, is 32"),
        ({"episodes": 2}, "episodes was"),
    ):
        output, error = output_of(write_plan(jaco_store.path, **more | changes))
        assert error is not None
        assert words in error
        assert "finished in" not in output


@pytest.mark.slow
def test_the_checkpoint_of_the_lowest_held_out_loss_is_evaluated(write_plan, jaco_store: EpisodeStore) -> None:
    changes = {
        "trajectories": [1], "baselines": ["td3"], "episodes": 1, "control": False, "budget": "steps",
        "settings": {
            "model": {"layers": 1, "width": 16, "token_set": "fused1"},
            "optimiser": {"steps": 40, "learning_rate": 0.1},
            "validation_fraction": 0.375, "validate_every": 2, "checkpoint_every": 2, "stop_after": 2,
        },
    }  # fmt: skip
    plan = write_plan(jaco_store.path, **changes)
    assert finish_all(plan, jaco_store) == ["random", "data", "td3_seed0", "at_1_seed0"]
    run = read_plan(plan).output / "jaco_reach_top_left" / "at_1_seed0"
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {entry["step"]: entry["validation_loss"] for entry in entries if "validation_loss" in entry}
    best, end = min(losses, key=losses.__getitem__), len(entries)
    assert best < end < 40
    (last,) = read_records(run).records
    plan = write_plan(jaco_store.path, **changes, checkpoint="best")
    assert finish_all(plan, jaco_store) == ["at_1_seed0"], "td3 has no such loss"
    assert len((run / "metrics.jsonl").read_text().splitlines()) == end, "not trained again"
    record = read_records(run).records[-1]
    assert (last.steps_trained, record.steps_trained) == (end, best)
    assert record.checkpoint_hash != last.checkpoint_hash
    (td3,) = read_records(run.parent / "td3_seed0").records
    assert last.budget == record.budget, "the steps after the best checkpoint count"
    assert (record.budget.steps, record.budget.converged, td3.budget.converged) == (end, True, False)
    assert td3.steps_trained == 40
    results = read_results(run.parent)
    table = training_table(results, training_runs(results)).set_index("train_trajectories")
    assert table.loc[1, ["steps", "steps_trained", "converged"]].tolist() == [end, best, 1]
    (cell,) = (cell for cell in cells(read_plan(write_plan(jaco_store.path, **changes))) if cell.folder == run)
    with pytest.raises(UserError, match="checkpoint was best, but is last in the plan"):
        cell.check()


@pytest.mark.parametrize("baselines", [["copy"], pytest.param(["copy", "clone"], marks=pytest.mark.slow)], ids=str)
def test_prompts_have_the_starts_of_single_episodes_in_all_tasks(
    write_plan, jaco_store: EpisodeStore, monkeypatch: pytest.MonkeyPatch, baselines: list[str]
) -> None:
    monkeypatch.setattr("ringrl.evaluation.actors.CLONE_STEPS", 20)  # clones learn in evaluation/test_actors.py
    own, other = "jaco_reach_top_left", "jaco_reach_top_right"
    settings = {
        "model": {"layers": 1, "width": 16, "token_set": "fused1"}, "optimiser": {"steps": 2},
        "context": {"other_tasks": [other]},
    }  # fmt: skip
    prompts = {"trajectories": [0, 1], "draws": 2, "controls": [own, other], "baselines": baselines}
    changes = {"trajectories": [2], "test_trajectories": [1], "baselines": [], "episodes": 2, "prompts": prompts}
    variants = {"variants": {"last only": {"model": {"loss_on": "last"}}}, "variants_only": True}
    plan = write_plan(jaco_store.path, **changes, **variants, settings=settings)
    assert finish_all(plan, jaco_store) == ["random", "data"] * 2 + ["at_2_last-only_seed0"]
    records = read_records(read_plan(plan).output / "jaco_reach_top_left" / "at_2_last-only_seed0").records
    assert {r.variant for r in records} == {"last only"}
    drawn = lambda r: (r.task, r.prompt_seed, r.start_seeds, r.prompt_episodes)  # noqa: E731
    copied, cloned = ([r for r in records if r.method == name] for name in ("copy", "clone"))
    records = [r for r in records if r.method not in ("copy", "clone")]
    prompted = {drawn(r) for r in records if r.prompt_trajectories and not r.prompt_control}
    assert len(copied) == len(prompted) == 4
    assert {drawn(r) for r in copied} == prompted
    assert {drawn(r) for r in cloned} == (prompted if "clone" in baselines else set())
    assert [r.returns for r in copied] != [r.returns for r in cloned]
    controls = [r for r in records if r.prompt_control]
    assert {(r.task, r.prompt_control) for r in controls} == {(own, f"of {other}"), (other, f"of {own}")}
    records = [r for r in records if not r.prompt_control]
    found = {(r.task, r.prompt_trajectories): {} for r in records}
    for r in records:
        found[r.task, r.prompt_trajectories][r.start_seeds] = (r.prompt_seed, r.returns)
    assert found.keys() == {(task, length) for task in (own, other) for length in (0, 1)}
    assert {frozenset(starts) for starts in found.values()} == {frozenset({(FIRST_SEED,), (FIRST_SEED + 1,)})}
    prompted = found[own, 1]
    assert [prompted[(FIRST_SEED + draw,)][0] for draw in (0, 1)] == [0, 1]
    assert [value for _, value in prompted.values()] != [value for _, value in found[own, 0].values()]


def children(process: int) -> list[int]:
    """Processes that it started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            number, _, rest = path.read_text().partition(" ")
        except OSError:
            continue
        if int(rest.rpartition(")")[2].split()[1]) == process:
            found.append(int(number))
    return found


def wait_for(what, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_failed_and_killed_cells_stop_no_other_and_run_again(write_plan, jaco_store: EpisodeStore) -> None:
    """The first cell fails, the process of the second is killed. More kills: the next test, and tests/faults."""
    settings = {
        "model": {"layers": 1, "width": 16, "token_set": "fused1"}, "optimiser": {"steps": 60},
        "checkpoint_every": 10, "log_every": 5,
    }  # fmt: skip
    changes = {"trajectories": [1], "seeds": [0, 1], "baselines": [], "episodes": 1, "control": False}
    plan = write_plan(jaco_store.path, **changes, settings=settings)
    runs = read_plan(plan).output / "jaco_reach_top_left"
    blocked, killed = runs / "at_1_seed0", runs / "at_1_seed1"
    blocked.mkdir(parents=True)
    (blocked / "checkpoints").write_text("in the way")
    with ThreadPoolExecutor() as pool:
        first = pool.submit(output_of, plan, workers=1)
        wait_for(lambda: first.done() or len(list((killed / "checkpoints").glob("[0-9]*"))) > 1)
        (worker,) = multiprocessing.active_children()
        worker.kill()
        output, error = first.result()
    assert error is not None
    assert error.startswith("2 of 4 failed; the same command runs them again")
    (line,) = [line for line in output.splitlines() if "at_1_seed0 failed: " in line]
    assert "cannot be written" in line
    assert str(blocked / "log.txt") in line
    assert "cannot be written" in (blocked / "log.txt").read_text()
    assert "at_1_seed1 failed: its process died (often because memory is short)" in output
    results = {folder.name: folder / "evaluation.jsonl" for folder in runs.iterdir()}
    before = {name: path.read_bytes() for name, path in results.items() if path.exists()}
    assert before.keys() == {"random", "data"}
    log = killed / "metrics.jsonl"
    (first_step, *_), steps = log.read_text().splitlines(), log.read_bytes().count(b"\n")
    assert steps < 60

    (blocked / "checkpoints").unlink()
    output, error = output_of(plan, workers=1)
    assert (output.count("finished in"), error) == (2, None)
    assert {name: results[name].read_bytes() for name in before} == before
    lines = log.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 61))
    assert lines[0] == first_step, "training started again"
    records = read_records(list(results.values())).records
    assert [record.steps_trained for record in records if record.method == "at"] == [60, 60]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to find the worker processes")
def test_killed_processes_are_resumed(write_plan, jaco_store: EpisodeStore) -> None:
    """A worker is killed in the middle of a cell, then the main process in the middle of the next."""
    settings = {
        "model": {"layers": 1, "width": 16, "token_set": "fused1"}, "optimiser": {"steps": 120},
        "checkpoint_every": 20, "log_every": 5,
    }  # fmt: skip
    plan = write_plan(jaco_store.path, trajectories=[1], seeds=[0, 1], baselines=[], settings=settings)
    runs = read_plan(plan).output / "jaco_reach_top_left"
    command = [str(COMMAND), "ablate", str(plan)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    is_begun = lambda seed: len(list((runs / f"at_1_seed{seed}" / "checkpoints").glob("[0-9]*"))) > 1  # noqa: E731
    wait_for(lambda: is_begun(0))
    busy = rf"{read_plan(plan).output}: another process is running this ablation \(process {process.pid} on .*; wait"
    with pytest.raises(UserError, match=busy):
        ablate(read_plan(plan), Console(file=io.StringIO()))
    (worker,) = [child for child in children(process.pid) if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()]
    os.kill(worker, signal.SIGKILL)
    wait_for(lambda: is_begun(1))
    workers = children(process.pid)
    process.kill()
    _, output = process.communicate()
    assert "at_1_seed0: failed: its process died (often because memory is short)" in output
    wait_for(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers))
    lock = read_plan(plan).output / ".lock"
    assert lock.exists(), "left by the killed process"
    logs = [runs / f"at_1_seed{seed}" / "metrics.jsonl" for seed in (0, 1)]
    first_steps = [log.read_text().splitlines()[0] for log in logs]
    assert all(len(log.read_text().splitlines()) < 120 for log in logs)

    output, error = output_of(plan, workers=1)
    assert (output.count("finished in"), error) == (2, None)
    assert not lock.exists()
    for log, first in zip(logs, first_steps, strict=True):
        lines = log.read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(1, 121))
        assert lines[0] == first, "training started again"
        assert {record.steps_trained for record in read_records(log.parent).records} == {120}


def test_a_dry_run_prints_the_cost(write_plan, jaco_store: EpisodeStore, capsys: pytest.CaptureFixture[str]) -> None:
    changes = {"trajectories": [2], "seeds": [3, 4], "baselines": []}
    plan = write_plan(jaco_store.path, **changes)
    main(["ablate", str(plan), "--dry-run", "--workers", "2"])
    shown = capsys.readouterr().out
    runs = read_plan(plan).output
    assert not runs.exists()
    rows = rows_of(shown)
    _, number, steps, tokens, _, simulated, _ = rows["at_2"]
    assert int(number) == 2
    assert int(steps.replace(",", "")) == cells(read_plan(plan))[0].config.optimiser.steps
    assert int(tokens.replace(",", "")) == int(steps.replace(",", "")) * 2 * 250
    assert int(simulated.replace(",", "")) == 2 * 2 * 250 * 2, "streams, episodes, steps, and the control"
    assert "with 2 at a time" in shown


@pytest.mark.slow
def test_a_dry_run_leaves_accelerators_alone(write_plan, jaco_store: EpisodeStore) -> None:
    """Worker processes need their memory. An unknown platform fails as soon as JAX looks for devices."""
    command = [str(COMMAND), "ablate", str(write_plan(jaco_store.path)), "--dry-run"]
    done = subprocess.run(
        command, env=os.environ | {"JAX_PLATFORMS": "none"}, capture_output=True, text=True, check=True
    )
    assert "very roughly" in done.stdout


def test_a_length_that_the_data_cannot_fill_is_rejected_at_once(write_plan, jaco_store: EpisodeStore) -> None:
    count = jaco_store.num_episodes + 1
    plan = write_plan(
        jaco_store.path, trajectories=[1, count], trajectories_per_batch=count, episodes=count, baselines=[]
    )
    with pytest.raises(
        UserError, match=rf"^jaco_reach_top_left/at_{count}_seed0: context\.trajectories: {count} are more than"
    ):
        ablate(read_plan(plan), Console(file=io.StringIO()), dry_run=True)
    assert not read_plan(plan).output.exists()


def rows_of(text: str) -> dict[str, list[str]]:
    """Words of the lines of a table, by the first word."""
    return {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}


def test_shares_divide_a_plan(write_plan, jaco_store: EpisodeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = read_plan(write_plan(jaco_store.path, baselines=["bc"]))
    run = list[str]()
    monkeypatch.setattr(runner, "_run_all", lambda todo, *_: run.extend(one.name for one in todo) or ())
    for index in range(3):
        ablate(plan, Console(file=io.StringIO()), share=(index, 3))
    shares, run = list(run), []
    ablate(plan, Console(file=io.StringIO()))
    assert len(run) == len(set(run))
    assert sorted(shares) == sorted(run)
    assert {cell.name for cell in cells(plan)} < set(run)
    with lock(plan.output, "is running this ablation", file=plan.output / ".lock-1-of-3"):
        ablate(plan, Console(file=io.StringIO()), share=(0, 3))
        with pytest.raises(UserError, match="another process is running this ablation"):
            ablate(plan, Console(file=io.StringIO()), share=(1, 3))


@pytest.mark.parametrize("share", ["4/4", "1", "-1/4", "a/b", "0/0"])
def test_a_wrong_share_is_one_line(share: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["ablate", "results", f"--share={share}"])
    assert end.value.code == 2
    assert f"--share: '{share}' is not I/N with I from 0 to N - 1, for example 0/4" in capsys.readouterr().err
