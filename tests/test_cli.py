"""Whole commands, and one line for every error a user can cause."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ringrl.cli import COMMANDS, main, parse
from ringrl.config import TrainConfig
from ringrl.config_files import merged, read_yaml
from ringrl.configs import preset
from ringrl.data import EpisodeStore
from ringrl.envs import DOMAINS
from ringrl.errors import UserError
from ringrl.evaluation.formatting import number
from ringrl.study.plan import read_plan

TINY = [
    "--model.layers=1", "--model.width=16", "--model.token-set=fused1", "--context.trajectories=2",
    "--optimiser.steps=3", "--optimiser.batch-size=2",
]  # fmt: skip


RINGRL = str(Path(sys.executable).with_name("ringrl"))


def rejected(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must fail, and return the line it prints."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert line.startswith("ringrl: ")
    return line.strip()


@pytest.fixture(scope="module")
def run(jaco_store: EpisodeStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny trained run."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    main(["train", "--data", str(jaco_store.path), "--task", "jaco_reach_top_left", "--run", str(folder), *TINY])
    return folder


def listed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> set[str]:
    """Return the commands that a help text lists."""
    main(arguments)
    lines = capsys.readouterr().out.replace("│", " ").splitlines()
    return {line.split()[0] for line in lines if line.startswith("  ") and line[2] not in " -"}


@pytest.mark.parametrize("arguments", [[], ["help"], ["--help"], ["-h"]])
def test_help_lists_every_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert listed(arguments, capsys) == {name.split()[0] for name in COMMANDS}
    assert listed(["data", *arguments], capsys) == {name.split()[1] for name in COMMANDS if " " in name}


def test_help_does_not_import_the_commands() -> None:
    script = "import sys; from ringrl.cli import main; main(['--help']); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "Train a policy." in done.stdout
    modules = ast.literal_eval(done.stdout.splitlines()[-1])
    assert not {"ringrl.config", "ringrl.cli.train", "jax", "numpy"} & set(modules), "half a second on a slow machine"


def test_missing_flags_have_their_own_names(capsys: pytest.CaptureFixture[str]) -> None:
    line = rejected(["train", "--model.remat", "half"], capsys)
    assert line.startswith(
        "ringrl: --data: is required; --task: is required; --run: is required; --model.remat: expected"
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([*name.split(), "--help"])
    text = capsys.readouterr().out
    assert f"ringrl {name}" in text
    assert "[default:" in text or "[required]" in text or name == "doctor", "doctor only has files to write"


@pytest.mark.parametrize("name", ["paper_350m", "small"])
def test_a_file_gives_its_settings(name: str, tmp_path: Path) -> None:
    required = {"data": "x", "task": "walker_walk", "run": "y", "log": [], "context": {"max_transitions": None}}
    values = merged(read_yaml(preset(name)), required)
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(values))
    _, bound = parse(["train", "--config", str(tmp_path / "settings.yaml")])
    assert bound.arguments["settings"] == TrainConfig.model_validate(values)


def test_presets_are_found_by_name_unless_a_file_has_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["train", "--data", "x", "--task", "walker_walk", "--run", "y", "--config"]
    (tmp_path / "tiny").mkdir()
    expected = read_yaml(preset("tiny")) | {"data": "x", "task": "walker_walk", "run": "y"}
    assert parse([*command, "tiny"])[1].arguments["settings"] == TrainConfig.model_validate(expected)
    (tmp_path / "small").write_text("seed: 7")
    assert parse([*command, "small"])[1].arguments["settings"].seed == 7
    assert read_plan("results") == read_plan(preset("results"))
    for line in (rejected([*command, "tinny"], capsys), rejected(["ablate", "tinny"], capsys)):
        assert line.startswith("ringrl: no preset 'tinny' and no such file; presets: demo, ")
        assert "tiny" in line.split("presets:")[1]
    for missing in ("tiny.yaml", "configs/tiny"):
        assert f"{missing}: cannot be read" in rejected([*command, missing], capsys)


@pytest.mark.slow
def test_from_folder_to_page(jaco_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, folder, page = tmp_path / "jaco.h5", tmp_path / "run", tmp_path / "report"
    main(["data", "import", str(jaco_folder), "--domain", "jaco", "--output", str(store)])
    main(["data", "info", str(store), "--verify"])
    text = capsys.readouterr().out
    assert "jaco_reach_top_left" in text
    assert "verified" in text
    (tmp_path / "preset.yaml").write_text(yaml.safe_dump({"model": {"layers": 2}, "task": "jaco_reach_top_left"}))
    main(["train", "--config", str(tmp_path / "preset.yaml"), "--data", str(store), "--run", str(folder), *TINY])
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert saved["model"]["layers"] == 1, "a flag wins over the preset"
    assert saved["task"] == "jaco_reach_top_left", "the preset wins over the default"
    main(["evaluate", "--checkpoint", str(folder), "--environments", "2", "--episodes", "2", "--control"])
    text = capsys.readouterr().out
    (known,) = [line.split()[3] for line in text.splitlines() if "Dataset, all episodes" in line]
    assert known == number(EpisodeStore(store).returns("jaco_reach_top_left").mean())
    assert folder.name in text
    assert "Random policy" in text
    lines = [json.loads(line) for line in (folder / "evaluation.jsonl").read_text().splitlines()]
    assert [line["context"] for line in lines] == [True, True, False, False]
    random = tmp_path / "random.jsonl"
    main(["evaluate", "--task", "jaco_reach_top_left", "--environments", "2", "--output", str(random)])
    main(["report", str(folder), str(random), "--output", str(page)])
    assert "</html>" in (page / "index.html").read_text()


def test_import_of_a_subset(jaco_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["data", "import", str(jaco_folder), "--domain", "jaco", "--output", str(tmp_path / "jaco.h5")]
    main([*command, "--subset", "spread", "--max-episodes", "4"])
    assert "4 of 8 episodes, at equal distances" in capsys.readouterr().out
    assert "--max-episodes: 0 is too small" in rejected([*command, "--overwrite", "--max-episodes", "0"], capsys)
    assert "--output of their episodes" in rejected(["data", "import", "a", "b", "--domain", "jaco"], capsys)
    assert "ARCHIVES requires an argument" in rejected(["data", "import", "--domain", "jaco"], capsys)
    assert "--subset" in rejected([*command, "--overwrite", "--subset", "middle"], capsys)


@pytest.mark.parametrize(
    ("archive", "store"),
    [(".", "../run_v1.0.h5"), ("buffer/..", "../run_v1.0.h5"), ("../run_v1.1", "../run_v1.1.h5"), ("a.zip", "a.h5")],
)
def test_the_default_store_is_next_to_the_archive(
    archive: str, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(archive: Path, destination: Path, *arguments: object, **settings: object) -> None:
        raise UserError(f"to {destination.resolve()}")

    (tmp_path / "run_v1.0" / "buffer").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "run_v1.0")
    monkeypatch.setattr("ringrl.data.import_archive", stop)
    assert rejected(["data", "import", archive, "--domain", "jaco"], capsys) == f"ringrl: to {Path(store).resolve()}"


def test_an_error_of_the_system_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = str(tmp_path / ("x" * 300))
    for command in (["data", "info", long], ["data", "import", long, "--domain", "jaco"]):
        assert f"{long}: File name too long" in rejected(command, capsys)


@pytest.mark.parametrize("platform", ["cuda", pytest.param("nonsense", marks=pytest.mark.slow)])
def test_a_missing_device_is_one_line(platform: str, run: Path, jaco_store: EpisodeStore, tmp_path: Path) -> None:
    if platform == "cuda":
        command = ["train", "--data", str(jaco_store.path), "--task", "jaco_reach_top_left", "--run", f"{tmp_path}/run"]
    else:
        command = ["evaluate", "--checkpoint", str(run)]
    environment = os.environ | {"JAX_PLATFORMS": platform}
    done = subprocess.run([RINGRL, *command], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"ringrl: JAX_PLATFORMS={platform}: JAX cannot use it here (" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_characters_that_the_output_lacks_are_replaced(jaco_store: EpisodeStore) -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = [RINGRL, "data", "info", str(jaco_store.path)]
    done = subprocess.run(command, env=environment, capture_output=True, check=True)
    assert b"jaco_reach_top_left" in done.stdout


@pytest.mark.slow
def test_controls_start_from_the_initial_states_of_the_streams(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "results.jsonl"
    two = ["--environments", "2", "--episodes", "2", "--control"]
    main(["evaluate", "--checkpoint", str(run), *two, "--output", str(output)])
    streams, controls = [], []
    for line in map(json.loads, output.read_text().splitlines()):
        (streams if line["context"] else controls).append(line["returns"])
    assert [first for first, _ in streams] == pytest.approx([first for first, _ in controls], rel=1e-6)


@pytest.mark.slow
def test_evaluation_of_every_task_of_a_domain(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "all.jsonl"
    command = ["evaluate", "--checkpoint", str(run), "--tasks", "all-of-domain", "--environments", "1"]
    command += ["--prompt-trajectories", "1", "--target", "0.9x", "--output", str(output)]
    main(command)
    text = capsys.readouterr().out
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["task"] for line in lines] == list(DOMAINS["jaco"].tasks)
    assert {line["target_policy"] for line in lines} == {"0.9x data_best"}
    assert {len(line["prompt_episodes"]) for line in lines} == {1}
    summary = json.loads((tmp_path / "all.json").read_text())["evaluations"]
    assert [part["returns"] for part in summary] == [line["returns"] for line in lines]
    assert all(text.count(task) >= 2 for task in DOMAINS["jaco"].tasks), "once as it ends, once in the table"
    assert text.strip().endswith(str(output))
    before = output.read_bytes()
    main(command)
    assert capsys.readouterr().out.count("contains this evaluation; --again repeats it") == 4
    assert output.read_bytes() == before


@pytest.mark.slow
def test_evaluation_of_several_checkpoints(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    tasks = ["--task", "jaco_reach_top_right", "--target-return", "5"]
    main(["evaluate", "--checkpoint", str(run), str(other), *tasks, "--environments", "1"])
    for folder in (run, other):
        line = json.loads((folder / "evaluation.jsonl").read_text().splitlines()[-1])
        assert (line["task"], line["train_task"], line["target_return"]) == (tasks[1], "jaco_reach_top_left", 5)
        assert line["checkpoint"] == str(folder)
    copy = [
        "--prompt-trajectories",
        "1",
        "--policy",
        "copy",
        "--environments",
        "1",
        "--output",
        str(tmp_path / "c.jsonl"),
    ]
    main(["evaluate", "--checkpoint", str(run), *copy])
    (line,) = map(json.loads, (tmp_path / "c.jsonl").read_text().splitlines())
    assert (line["method"], line["prompt_trajectories"], line["checkpoint"]) == ("copy", 1, None)


def test_errors_of_evaluations(
    run: Path, jaco_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    some = tmp_path / "some.h5"
    main(["data", "import", str(jaco_folder), "--domain", "jaco", "--output", str(some), "--max-episodes", "4"])
    (tmp_path / "file").write_text("")
    base = ["evaluate", "--checkpoint", str(run)]
    for flags, expected in (
        (["--environments", "0"], "environments: 0 is too small"),
        (["--tasks", "walker_walk"], "was trained on jaco and cannot act in task walker_walk"),
        (["--tasks", "jaco_reach_top_lift"], "did you mean jaco_reach_top_left"),
        (["--data", str(some), "--prompt-trajectories", "1"], f"{some}: is not the dataset that"),
        (["--prompt-trajectories", "9"], "context.trajectories: 9 are more than the 8 eligible episodes"),
        (["--target", "good"], "--target"),
        (["--output", str(tmp_path)], "is not a results file; give a name that ends in .jsonl"),
        (["--output", str(tmp_path / "file" / "x.jsonl")], "x.jsonl: cannot be written"),
        (["--output", str(tmp_path / "x.json")], "give a name that ends in .jsonl"),
    ):
        capsys.readouterr()
        assert expected in rejected([*base, *flags], capsys)
    assert "needs a --checkpoint" in rejected(["evaluate", "--tasks", "all-of-domain"], capsys)
    assert "--checkpoint" in rejected(["evaluate"], capsys)
    assert "--prompt-seed: no prompt is drawn" in rejected([*base, "--prompt-seed", "3"], capsys)
    both = ["--step", "12", "--checkpoint-kind", "best"]
    assert "--checkpoint-kind: --step already selects the checkpoint" in rejected([*base, *both], capsys)
    random = ["evaluate", "--tasks", "jaco_reach_top_left", "--output", str(tmp_path / "random.jsonl")]
    assert "--prompt-seed: has no effect on random actions" in rejected([*random, "--prompt-seed", "3"], capsys)
    assert rejected([*random, "--seed", str(2**32)], capsys).startswith("ringrl: --seed: ")
    assert not list(tmp_path.glob("random*"))


def test_an_unknown_command_lists_similar_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert rejected(["trian"], capsys).startswith('ringrl: Unknown command "trian". Did you mean "train"?')
    assert 'Unknown command "imprt". Did you mean "import"?' in rejected(["data", "imprt"], capsys)


def test_a_method_overrides_the_file_and_flags_override_the_method(
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
    line = rejected([*base, "--method=dt", "--context.trajectories=2"], capsys)
    assert "--method dt: with the other settings the run is at" in line
    assert "bc-10%" in rejected([*base, "--method", "cloning"], capsys), "lists the methods"
    shared.write_text(yaml.safe_dump({"context": {"max_transitions": 5000}}))
    assert "needs consecutive episodes" in rejected([*base, "--method", "ad"], capsys)
    for section in (3, "transformer"):
        shared.write_text(yaml.safe_dump({"model": section}))
        assert f"{shared}: model: expected settings by name" in rejected([*base, "--method", "bc"], capsys)
    assert not (tmp_path / "other").exists()


def test_errors_of_files_name_the_file(
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
        assert str(missing) in rejected(arguments, capsys)
    plan = tmp_path / "plan.yaml"
    plan.write_text(yaml.safe_dump({"data": str(missing), "task": "jaco_reach_top_left", "output": str(missing)}))
    assert str(missing) in rejected(["ablate", str(plan), "--dry-run"], capsys)
    assert (
        rejected(["ablate", str(plan), "--workers=0"], capsys) == "ringrl: --workers: 0 is too small; give at least 1"
    )
    plan.write_text(plan.read_text() + "settings: {model: 3}\n")
    assert "model: expected settings by name" in rejected(["ablate", str(plan), "--dry-run"], capsys)
    data = ["--data", str(jaco_store.path), "--run", str(missing)]
    assert "walker_walk" in rejected(["train", "--task", "walker_walk", *data], capsys)
    assert "walker_walk" in rejected(["evaluate", "--checkpoint", str(run), "--task", "walker_walk"], capsys)
    assert "walker_walk" in rejected(["evaluate", "--task", "walker_wlak"], capsys)
    assert "at least 1" in rejected(["evaluate", "--checkpoint", str(run), "--episodes", "0"], capsys)
    assert str(run) in rejected(["evaluate", "--checkpoint", str(run), "--step", "7"], capsys)
    for flags in (["--side-by-side"], ["--video", "--side-by-side", "--episodes=2"], ["--video", "--video-speed=0"]):
        assert flags[-1].split("=")[0] in rejected(["evaluate", "--checkpoint", str(run), *flags], capsys)
    again = ["train", "--data", str(jaco_store.path), "--task", "jaco_reach_top_left", "--run", str(run), *TINY]
    assert "--resume" in rejected(again, capsys)
    assert "seed was 0, is 1" in rejected([*again, "--seed=1", "--resume"], capsys)
    assert not missing.exists()


def test_the_installed_command_exits_with_code_2_and_no_traceback(tmp_path: Path) -> None:
    command = [RINGRL, "data", "info", str(tmp_path / "nothing.h5")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


def test_output_that_cannot_be_written_ends_without_a_traceback(jaco_store: EpisodeStore) -> None:
    command = [RINGRL, "data", "info", str(jaco_store.path)]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, ""), "the exit code for SIGPIPE"
    for arguments in (command, [command[0], "train", "--help"]):
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(arguments, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        assert done.returncode == 2
        assert done.stderr.startswith("ringrl: standard output: cannot be written (No space left on device); ")
        assert done.stderr.count("\n") == 1


def test_out_of_memory_is_one_line_and_no_damage(
    jaco_folder: Path, jaco_store: EpisodeStore, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    def fail(*arguments: object, **keywords: object) -> None:
        raise MemoryError

    store = tmp_path / "jaco.h5"
    command = ["data", "import", str(jaco_folder), "--domain", "jaco", "--output", str(store)]
    with monkeypatch.context() as patch:
        patch.setattr("numpy.lib.format.read_array_header_1_0", fail)
        line = rejected(command, capsys)
        assert "not enough memory" in line
        assert "damaged" not in line, "no healthy episode is called damaged"
    with monkeypatch.context() as patch:
        patch.setattr("h5py.File", fail)
        assert "not enough memory" in rejected(["data", "info", str(jaco_store.path)], capsys)
    main(command)
    assert len(EpisodeStore(store)) == 8


def test_without_a_terminal_data_commands_print_lines(
    jaco_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["data", "import", str(jaco_folder), "--domain", "jaco", "--output"]
    main([*command, str(tmp_path / "a.h5")])
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("ringrl.pace.SECONDS", 0)
    main([*command, str(tmp_path / "b.h5")])
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("importing: 1/")
    assert lines[-1].endswith(f"{len(lines)}/{len(lines)} episodes")


def test_terminal_escapes_in_errors_are_printed_as_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = rejected(["data", "info", str(tmp_path / "\x1b[31m.h5")], capsys)
    assert "\x1b" not in line
    assert r"\x1b[31m.h5: no such file" in line


@pytest.mark.slow
def test_workers_start_next_to_a_module_of_pythons_name(tmp_path: Path) -> None:
    (tmp_path / "signal.py").write_text("")
    command = [RINGRL, "data", "collect", "jaco_reach_top_left", "--episodes", "2", "--workers", "2", "--output", "a"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
