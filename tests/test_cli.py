"""The command line as a user meets it: whole commands, and one clear line for every mistake."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from ringrl.cli import COMMANDS, main
from ringrl.data import EpisodeStore
from ringrl.envs import DOMAINS
from ringrl.errors import UserError

TINY = [
    "--model.layers=1", "--model.width=16", "--model.token-set=fused1", "--context.trajectories=2",
    "--optimiser.steps=3", "--optimiser.batch-size=2",
]  # fmt: skip


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must fail; its one line."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("ringrl: ")
    return said.strip()


@pytest.fixture(scope="module")
def run(jaco_store: EpisodeStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny trained run."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    main(["train", "--data", str(jaco_store.path), "--task", "jaco_reach_top_left", "--run", str(folder), *TINY])
    return folder


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    said = capsys.readouterr().out
    assert all(f"ringrl {name}" in said for name in COMMANDS)
    main(["help"])
    assert capsys.readouterr().out == said


@pytest.mark.parametrize("arguments", [["data"], ["data", "--help"], ["data", "-h"], ["data", "help"]])
def test_data_alone_lists_its_commands(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(arguments)
    said = capsys.readouterr().out
    assert all(
        (f"ringrl {name} " in said and COMMANDS[name].__doc__.splitlines()[0] in said) == name.startswith("data ")
        for name in COMMANDS
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*name.split(), "--help"])
    assert not stop.value.code
    said = capsys.readouterr().out
    assert f"ringrl {name}" in said
    assert "(default:" in said or "(required)" in said


def test_from_folder_to_page(jaco_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, folder, page = tmp_path / "jaco.h5", tmp_path / "run", tmp_path / "report"
    main(["data", "import", str(jaco_folder), "--domain", "jaco", "--output", str(store)])
    main(["data", "info", str(store), "--verify"])
    said = capsys.readouterr().out
    assert "jaco_reach_top_left" in said
    assert "verified" in said
    main(["data", "info", str(store), "--json", "--verify"])
    assert json.loads(capsys.readouterr().out)["num_episodes"] == 8
    (tmp_path / "preset.yaml").write_text(yaml.safe_dump({"model": {"layers": 2}, "task": "jaco_reach_top_left"}))
    main(["train", "--config", str(tmp_path / "preset.yaml"), "--data", str(store), "--run", str(folder), *TINY])
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert saved["model"]["layers"] == 1, "a flag wins over the preset"
    assert saved["task"] == "jaco_reach_top_left", "the preset wins over the default"
    main(["evaluate", "--checkpoint", str(folder), "--environments", "2", "--episodes", "2", "--control"])
    lines = [json.loads(line) for line in (folder / "evaluation.jsonl").read_text().splitlines()]
    assert [line["context"] for line in lines] == [True, True, False, False]
    random = tmp_path / "random.jsonl"
    main(["evaluate", "--task", "jaco_reach_top_left", "--environments", "2", "--output", str(random)])
    main(["report", str(folder), str(random), "--output", str(page)])
    assert "</html>" in (page / "index.html").read_text()


def test_import_takes_a_subset(jaco_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["data", "import", str(jaco_folder), "--domain", "jaco", "--output", str(tmp_path / "jaco.h5")]
    some = ["--subset", "random", "--max-transitions", "1000", "--seed", "3", "--relabel", "exorl_compat"]
    main([*command, *some, "--on-damaged", "skip", "--workers", "1"])
    said = capsys.readouterr().out
    assert "4 of 8 episodes, at random (seed 3)" in said
    assert "exorl_compat" in said
    assert "--max-episodes is 0" in refused([*command, "--overwrite", "--max-episodes", "0"], capsys)
    assert "--subset" in refused([*command, "--overwrite", "--subset", "middle"], capsys)
    assert "--seed: only with --subset random" in refused([*command, "--overwrite", "--seed", "1"], capsys)


@pytest.mark.parametrize(
    ("archive", "store"),
    [(".", "../run_v1.0.h5"), ("buffer/..", "../run_v1.0.h5"), ("../run_v1.1", "../run_v1.1.h5"), ("a.zip", "a.h5")],
)
def test_a_store_lies_beside_its_archive_under_the_same_name(
    archive: str, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(archive: Path, destination: Path, *arguments: object, **settings: object) -> None:
        raise UserError(f"to {destination.resolve()}")

    (tmp_path / "run_v1.0" / "buffer").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "run_v1.0")
    monkeypatch.setattr("ringrl.data.import_archive", told)
    assert refused(["data", "import", archive, "--domain", "jaco"], capsys) == f"ringrl: to {Path(store).resolve()}"


def test_what_the_system_refuses_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = str(tmp_path / ("x" * 300))
    for command in (["data", "info", long], ["data", "import", long, "--domain", "jaco"]):
        assert f"{long}: File name too long" in refused(command, capsys)


@pytest.mark.parametrize("platform", ["cuda", "nonsense"])
def test_devices_that_are_not_there_are_told_in_one_line(
    platform: str, run: Path, jaco_store: EpisodeStore, tmp_path: Path
) -> None:
    ringrl = str(Path(sys.executable).with_name("ringrl"))
    train = ["train", "--data", str(jaco_store.path), "--task", "jaco_reach_top_left", "--run", str(tmp_path / "run")]
    for command in (train, ["evaluate", "--checkpoint", str(run)]):
        environment = os.environ | {"JAX_PLATFORMS": platform}
        done = subprocess.run([ringrl, *command], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert f"ringrl: JAX_PLATFORMS={platform}: JAX cannot use it here (" in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_an_output_that_cannot_show_everything_shows_the_rest(jaco_store: EpisodeStore) -> None:
    ringrl = str(Path(sys.executable).with_name("ringrl"))
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = [ringrl, "data", "info", str(jaco_store.path)]
    done = subprocess.run(command, env=environment, capture_output=True, check=True)
    assert b"jaco_reach_top_left" in done.stdout


def test_controls_start_where_the_streams_start(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "results.jsonl"
    two = ["--environments", "2", "--episodes", "2", "--control"]
    main(["evaluate", "--checkpoint", str(run), *two, "--output", str(output)])
    streams, controls = [], []
    for line in map(json.loads, output.read_text().splitlines()):
        (streams if line["context"] else controls).append(line["returns"])
    assert [first for first, _ in streams] == pytest.approx([first for first, _ in controls], rel=1e-6)


def interrupted(command: list[str], file: Path, number: signal.Signals) -> int:
    """Run a command in a process of its own, send it a signal once the file is there; its exit code."""
    ringrl = str(Path(sys.executable).with_name("ringrl"))
    with subprocess.Popen([ringrl, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while not file.exists():
            assert process.poll() is None, process.communicate()[1].decode()
            time.sleep(0.01)
        process.send_signal(number)
        process.communicate()
        return process.returncode


def test_an_evaluation_that_was_stopped_twice_gives_the_same_returns(run: Path, tmp_path: Path) -> None:
    """By Ctrl-C, then by kill -9; bit for bit."""
    whole, output = tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl"
    command = ["evaluate", "--checkpoint", str(run), "--environments", "2", "--episodes", "3", "--control"]
    main([*command, "--output", str(whole)])

    command += ["--output", str(output)]
    (name,) = {json.loads(line)["evaluation"] for line in whole.read_text().splitlines()}
    journal = tmp_path / "stopped.journal" / f"jaco_reach_top_left.{name[:12]}"
    assert interrupted(command, journal / "context_00000.npz", signal.SIGINT) == 130
    assert not output.exists()
    assert interrupted(command, journal / "control_00000.npz", signal.SIGKILL) == -signal.SIGKILL
    written = sorted(path.name for path in journal.glob("*.npz"))
    assert written[:4] == ["context_00000.npz", "context_00001.npz", "context_00002.npz", "control_00000.npz"]
    assert len(written) < 6, "there was something left to do"
    main(command)
    one, other = ([json.loads(line) for line in path.read_text().splitlines()] for path in (whole, output))
    same = ("returns", "context", "environment_seed", "steps_simulated", "evaluation", "checkpoint_hash")
    assert [[line[key] for key in same] for line in one] == [[line[key] for key in same] for line in other]
    assert not journal.parent.exists()


def test_every_task_of_a_domain_once(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "all.jsonl"
    command = ["evaluate", "--checkpoint", str(run), "--tasks", "all-of-domain", "--environments", "1"]
    command += ["--prompt-trajectories", "1", "--target", "0.9x", "--output", str(output)]
    main(command)
    said = capsys.readouterr().out
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["task"] for line in lines] == list(DOMAINS["jaco"].tasks)
    assert {line["target_policy"] for line in lines} == {"0.9x data_best"}
    assert {len(line["prompt_episodes"]) for line in lines} == {1}
    summary = json.loads((tmp_path / "all.json").read_text())["evaluations"]
    assert [part["returns"] for part in summary] == [line["returns"] for line in lines]
    assert all(said.count(task) >= 2 for task in DOMAINS["jaco"].tasks), "as it ended, and in the table"
    assert said.strip().endswith(str(output))
    before = output.read_bytes()
    main(command)
    assert capsys.readouterr().out.count("holds this very evaluation already") == 4
    assert output.read_bytes() == before


def test_several_checkpoints_and_named_tasks(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    tasks = ["--task", "jaco_reach_top_right", "--target-return", "5"]
    main(["evaluate", "--checkpoint", str(run), str(other), *tasks, "--environments", "1"])
    for folder in (run, other):
        line = json.loads((folder / "evaluation.jsonl").read_text().splitlines()[-1])
        assert (line["task"], line["train_task"], line["target_return"]) == (tasks[1], "jaco_reach_top_left", 5)
        assert line["checkpoint"] == str(folder)


def test_mistakes_about_evaluations(
    run: Path, jaco_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    some = tmp_path / "some.h5"
    main(["data", "import", str(jaco_folder), "--domain", "jaco", "--output", str(some), "--max-episodes", "4"])
    (tmp_path / "file").write_text("")
    base = ["evaluate", "--checkpoint", str(run)]
    for flags, said in (
        (["--environments", "0"], "environments: 0 is too few"),
        (["--tasks", "walker_walk"], "was trained on jaco and cannot act in task walker_walk"),
        (["--tasks", "jaco_reach_top_lift"], "did you mean jaco_reach_top_left"),
        (["--data", str(some), "--prompt-trajectories", "1"], f"{some}: is not the dataset that"),
        (["--prompt-trajectories", "9"], "9 do not fit"),
        (["--target", "good"], "--target"),
        (["--output", str(tmp_path)], "is not a results file; give a name that ends in .jsonl"),
        (["--output", str(tmp_path / "file" / "x.jsonl")], "results cannot be written"),
        (["--output", str(tmp_path / "x.json")], "give a name that ends in .jsonl"),
    ):
        capsys.readouterr()
        assert said in refused([*base, *flags], capsys)
    assert "needs a --checkpoint" in refused(["evaluate", "--tasks", "all-of-domain"], capsys)
    assert "--checkpoint" in refused(["evaluate"], capsys)
    assert "--prompt-seed: no prompt is drawn" in refused([*base, "--prompt-seed", "3"], capsys)
    random = ["evaluate", "--tasks", "jaco_reach_top_left", "--output", str(tmp_path / "random.jsonl")]
    assert "--prompt-seed: random actions know nothing" in refused([*random, "--prompt-seed", "3"], capsys)
    assert refused([*random, "--seed", str(2**32)], capsys).startswith("ringrl: --seed: ")
    assert not list(tmp_path.glob("random*")), "no journal"


def test_unknown_command_lists_the_near_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean train" in refused(["trian"], capsys)
    assert "data import" in refused(["data", "imprt"], capsys)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--model.layer 3", "--model.layer: there is no such flag; did you mean --model.layers?"),
        (
            "--zzz --model.layer=3",
            "--zzz: there is no such flag; --model.layer: there is no such flag; did you mean --model.layers?",
        ),
        ("--resume yes", "yes: is one word too many"),
        ("--model.heads 3", "--model: heads: 3 heads do not split a width of 128 into even parts"),
        ("--method foo", "--method: there is no 'foo'; choose one of ad, at, bc, bc-10%, dt, td3, td3+bc"),
        ("--launcher foo", "--launcher: there is no 'foo'; choose one of none, slurm"),
        ("--optimiser.steps", "--optimiser.steps: needs a value"),
        ("--optimiser.steps many", "--optimiser.steps: expected INT, got 'many'"),
        ("--context.max-transitions many", "--context.max-transitions: expected INT, got 'many'"),
        ("--optimiser.learning-rate x", "--optimiser.learning-rate: expected FLOAT, got 'x'"),
        ("--optimiser.learning-rate inf", "--optimiser.learning-rate: Input should be a finite number"),
        ("--optimiser.batch-size 0", "--optimiser.batch-size: Input should be greater than or equal to 1"),
        ("--actor-critic.hindsight.radius 0", "--actor-critic.hindsight.radius: Input should be greater than 0"),
        ("--seed -1", "--seed: Input should be greater than or equal to 0"),
        ("--context.other-tasks y", "context.other_tasks: names a task twice, or the run's own task"),
    ],
)
def test_a_wrong_flag_is_named_in_one_line(
    flags: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["train", "--data", "x", "--task", "y", "--run", str(tmp_path / "run")]
    assert refused([*base, *flags.split()], capsys) == f"ringrl: {said} (ringrl train --help tells more)"
    assert not (tmp_path / "run").exists()


def test_what_a_command_needs_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert "ringrl: --data, --task and --run are needed (" in refused(["train"], capsys)
    said = refused(["train", "--dat=x", "--task", "y", "--run", "z"], capsys)
    assert "ringrl: --data is needed; --dat: there is no such flag; did you mean --data? (" in said
    assert "DOMAIN and ALGORITHM are needed (ringrl data download" in refused(["data", "download"], capsys)
    assert "--compare: expected PATH PATH, got 'a' (" in refused(["report", "--compare", "a"], capsys)


def test_a_flag_of_several_values_that_is_there_twice_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The parser would keep the last of them alone."""
    train = ["train", "--data", "x", "--task", "y", "--run", str(tmp_path / "run")]
    twice = ["--context.other_tasks", "a", "--context.other-tasks=b", "--seed", "1", "--seed", "2"]
    assert "ringrl: --context.other-tasks: is there twice; give all its values" in refused([*train, *twice], capsys)
    assert "--tasks: is there twice" in refused(["evaluate", "--tasks", "a", "--tasks", "b"], capsys)
    assert "--seed: Input should be" in refused([*train, "--seed", "1", "--seed", "-2"], capsys), (
        "the last of them counts"
    )


def test_flags_that_would_go_unheeded_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(yaml.safe_dump({"data": "x", "task": "jaco_reach_top_left", "output": str(tmp_path / "runs")}))
    train = ["train", "--data", "x", "--task", "jaco_reach_top_left", "--run", str(tmp_path / "run")]
    for command in (train, ["ablate", str(plan)], ["ablate", str(plan), "--dry-run"]):
        said = refused([*command, "--slurm.gpus-per-node", "1", "--slurm.restarts=3"], capsys)
        assert "--slurm.gpus-per-node, --slurm.restarts: heeded only with --launcher slurm" in said
    said = refused([*train, "--launcher", "slurm", "--distributed.enabled", "on"], capsys)
    assert "--distributed.enabled: not heeded with --launcher slurm" in said
    assert [path.name for path in tmp_path.iterdir()] == ["plan.yaml"]


def test_a_method_stands_over_the_file_and_under_the_flags(
    jaco_store: EpisodeStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared, folder = tmp_path / "shared.yaml", tmp_path / "run"
    shared.write_text(yaml.safe_dump({"model": {"token_set": "at5", "layers": 3}, "context": {"trajectories": 4}}))
    base = ["train", "--data", str(jaco_store.path), "--task", "jaco_reach_top_left", "--config", str(shared)]
    base += ["--model.width=16", "--model.layers=1", "--optimiser.steps=2", "--run", str(folder)]
    main([*base, "--method", "dt", "--model.no-timestep-embedding"])
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert (saved["context"]["trajectories"], saved["context"]["target"]) == (1, "own"), "the method over the file"
    assert saved["model"]["token_set"] == "dt3"
    assert (saved["model"]["timestep_embedding"], saved["model"]["layers"]) == (False, 1), "flags over the method"

    capsys.readouterr()
    said = refused([*base, "--method=dt", "--context.trajectories=2", "--run", str(tmp_path / "other")], capsys)
    assert "--method dt: with the other settings the run is at" in said
    assert "bc-10%" in refused([*base, "--method", "cloning"], capsys), "lists what there is"
    shared.write_text(yaml.safe_dump({"context": {"max_transitions": 5000}}))
    assert "needs consecutive episodes" in refused([*base, "--method", "ad"], capsys)
    for section in (3, "transformer"):
        shared.write_text(yaml.safe_dump({"model": section}))
        assert f"{shared}: model: expected settings by name" in refused([*base, "--method", "bc"], capsys)
    assert not (tmp_path / "other").exists()


def test_mistakes_about_files_name_the_file(
    run: Path, jaco_store: EpisodeStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "missing"
    for arguments in (
        ["data", "info", str(missing)],
        ["data", "import", str(missing), "--domain", "walker"],
        ["evaluate", "--checkpoint", str(missing)],
        ["report", str(missing)],
        ["ablate", str(missing)],
        ["train", "--config", str(missing)],
    ):
        assert str(missing) in refused(arguments, capsys)
    plan = tmp_path / "plan.yaml"
    plan.write_text(yaml.safe_dump({"data": str(missing), "task": "jaco_reach_top_left", "output": str(missing)}))
    assert str(missing) in refused(["ablate", str(plan), "--dry-run"], capsys)
    assert "--workers" in refused(["ablate", str(plan), "--workers", "0"], capsys)
    plan.write_text(plan.read_text() + "settings: {model: 3}\n")
    assert "model: expected settings by name" in refused(["ablate", str(plan), "--dry-run"], capsys)
    data = ["--data", str(jaco_store.path), "--run", str(missing)]
    assert "walker_walk" in refused(["train", "--task", "walker_walk", *data], capsys)
    assert "walker_walk" in refused(["evaluate", "--checkpoint", str(run), "--task", "walker_walk"], capsys)
    assert "walker_walk" in refused(["evaluate", "--task", "walker_wlak"], capsys)
    assert "at least 1" in refused(["evaluate", "--checkpoint", str(run), "--episodes", "0"], capsys)
    assert str(run) in refused(["evaluate", "--checkpoint", str(run), "--step", "7"], capsys)
    again = ["train", "--data", str(jaco_store.path), "--task", "jaco_reach_top_left", "--run", str(run), *TINY]
    assert "--resume" in refused(again, capsys)
    assert "model.width was 16, is 32" in refused([*again, "--model.width=32", "--resume"], capsys)
    assert not missing.exists()


def test_the_installed_command_ends_with_code_2_and_no_traceback(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("ringrl")), "data", "info", str(tmp_path / "nothing.h5")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


def test_output_that_nobody_takes_ends_without_a_traceback(jaco_store: EpisodeStore) -> None:
    command = [str(Path(sys.executable).with_name("ringrl")), "data", "info", str(jaco_store.path)]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, ""), "as a shell tells SIGPIPE"
    for arguments in (command, [command[0], "train", "--help"]):
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(arguments, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        assert done.returncode == 2
        assert done.stderr.startswith("ringrl: standard output: cannot be written (No space left on device); ")
        assert done.stderr.count("\n") == 1


def test_want_of_memory_is_one_line_and_no_damage(
    jaco_folder: Path, jaco_store: EpisodeStore, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    def want(*arguments: object, **keywords: object) -> None:
        raise MemoryError

    store = tmp_path / "jaco.h5"
    command = ["data", "import", str(jaco_folder), "--domain", "jaco", "--output", str(store), "--workers", "1"]
    with monkeypatch.context() as patch:
        patch.setattr("numpy.lib.format.read_array_header_1_0", want)
        said = refused([*command, "--on-damaged", "skip"], capsys)
        assert "not enough memory" in said
        assert "damaged" not in said, "no healthy episode is skipped"
    with monkeypatch.context() as patch:
        patch.setattr("h5py.File", want)
        assert "not enough memory" in refused(["data", "info", str(jaco_store.path)], capsys)
    main(command)
    assert len(EpisodeStore(store)) == 8


def test_only_the_echoes_of_a_full_disk_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("sys.unraisablehook", lambda ignored: said.append(str(ignored.exc_value)))
    for _ in range(2):
        main(["--version"])
    for text in ("Event loop is closed", "another"):
        sys.unraisablehook(SimpleNamespace(exc_value=RuntimeError(text)))  # type: ignore[arg-type]
    assert said == ["another"]
