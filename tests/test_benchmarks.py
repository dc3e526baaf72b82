"""The scripts in benchmarks/ reject wrong arguments, and their worker processes return results."""

import importlib
import runpy
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize(
    ("script", "arguments", "expected"),
    [
        ("random_returns", ["walker_wlak"], "random_returns.py: unknown task 'walker_wlak'; did you mean walker_walk"),
        ("collect", ["walker_wlak"], "collect.py: unknown task 'walker_wlak'; did you mean walker_walk"),
        ("data", ["relabel", "--exorl", "nothere"], "--exorl: nothere is no folder"),
        ("evaluation", ["walker_wlak"], "evaluation.py: unknown task 'walker_wlak'; did you mean walker_walk"),
        ("peers", ["nothere.h5", "--peer-python", "python"], "peers.py: nothere.h5: no such file"),
        ("plan_reality", ["--machine", "cpu"], "plan_reality.py: "),
        ("attention_gpu", [], "needs an NVIDIA GPU since Ampere, JAX finds cpu"),
        ("train_gpu", [], "needs a GPU, JAX finds cpu"),
    ],
)
def test_wrong_arguments_are_rejected(
    script: str,
    arguments: list[str],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    main = runpy.run_path(str(BENCHMARKS / f"{script}.py"), run_name=script)["main"]
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert expected in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("eight_devices")
def test_a_worker_trains_the_longest_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script = importlib.import_module("longest_context")
    compiled = script.measure("ring", 256, steps=0)
    trained = script.in_process(script.measure, "ring", 256, 1, devices=8)
    assert set(compiled) == {"gib"}
    assert trained["gib"] == compiled["gib"] > 0
    assert trained["loss"] > 0
    assert trained["seconds_per_step"] > 0
