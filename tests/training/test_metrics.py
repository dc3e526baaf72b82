import json
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event  # type: ignore[import-untyped]

from ringrl.config import TrainConfig
from ringrl.errors import UserError
from ringrl.files import with_crc, without_crc
from ringrl.training import train
from ringrl.training.budget import StepCost
from ringrl.training.metrics import (
    MetricsLog,
    MetricsRecorder,
    TensorBoardWriter,
    peak_flops,
    progress_bar,
    step_memory,
)
from tests.damage import METRICS_TAIL


def line(step: int) -> dict[str, float]:
    return {"step": step, "loss": 0.5 / step}


def test_lines_are_appended_and_visible_at_once(tmp_path):
    with MetricsLog(tmp_path, 0) as log:
        log.write([line(1), line(2)])
        seen = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(without_crc(text)) for text in seen] == [line(1), line(2)]
        log.write([line(3)])
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("damage", [None, *METRICS_TAIL])
def test_lines_after_the_checkpoint_are_dropped(tmp_path, damage):
    with MetricsLog(tmp_path, 0) as log:
        log.write([line(step) for step in range(1, 5)])
    if damage:
        METRICS_TAIL[damage](tmp_path / "metrics.jsonl")
    for resumed_at in (4, 2, 0):
        with MetricsLog(tmp_path, resumed_at) as log:
            assert log.missing == 0
            kept = [json.loads(text)["step"] for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert kept == list(range(1, resumed_at + 1))
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".tmp")] == []


@pytest.mark.parametrize("damage", [b"\xff\xfe", b"61", b"[]", b'{"loss": 1}', b'{"step": "2"}', b"{"])
def test_a_damaged_line_is_dropped_alone_and_counted(tmp_path, damage):
    with MetricsLog(tmp_path, 0) as log:
        log.write([line(step) for step in range(1, 5)])
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines()
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([lines[0], damage, *lines[2:]]) + b"\n")
    with MetricsLog(tmp_path, 3) as log:
        assert log.missing == 1
    assert (tmp_path / "metrics.jsonl").read_bytes().splitlines() == [lines[0], lines[2]]
    (tmp_path / "metrics.jsonl").unlink()
    with MetricsLog(tmp_path, 3) as log:
        assert log.missing == 3


def test_doubled_lines_count_once(tmp_path):
    with MetricsLog(tmp_path, 0) as log:
        log.write([line(step) for step in (1, 2, 2, 1, 3)])
    with MetricsLog(tmp_path, 4) as log:
        assert log.missing == 1
    kept = [json.loads(text)["step"] for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert kept == [1, 2, 3]


def test_a_changed_line_is_dropped_alone(tmp_path):
    """One wrong digit of a step number used to drop every later line."""
    with MetricsLog(tmp_path, 0) as log:
        log.write([line(step) for step in range(1, 5)])
    whole = (tmp_path / "metrics.jsonl").read_text()
    for was, now in (('"step": 2', '"step": 9'), ('"step": 2', '"step": 1'), ("0.25", "0.75")):
        (tmp_path / "metrics.jsonl").write_text(whole.replace(was, now))
        with MetricsLog(tmp_path, 4) as log:
            assert log.missing == 1
        kept = [json.loads(text)["step"] for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert kept == [1, 3, 4]


def test_a_number_that_is_not_finite_is_null(tmp_path):
    with MetricsLog(tmp_path, 0) as log:
        log.write([{"step": 1, "loss": float("nan"), "parts": [1.5, float("nan")]}])
    expected = with_crc('{"step": 1, "loss": null, "parts": [1.5, null]}') + "\n"
    assert (tmp_path / "metrics.jsonl").read_text() == expected


def test_tensorboard_holds_the_same_numbers(tmp_path):
    with MetricsLog(tmp_path, 0, [TensorBoardWriter(tmp_path, 0)]) as log:
        log.write([line(1) | {"parts": [1.0, 2.0]}, line(2)])
    (file,) = (tmp_path / "tensorboard").iterdir()
    data, place, found = file.read_bytes(), 0, []
    while place < len(data):  # records: length (8), checksum (4), event, checksum (4)
        size = int.from_bytes(data[place : place + 8], "little")
        event = Event.FromString(data[place + 12 : place + 12 + size])
        found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
        place += 16 + size
    assert found == [("loss", 1, 0.5), ("loss", 2, 0.25)]


FULL = """
    import resource, sys
    from pathlib import Path
    from ringrl.training.metrics import MetricsLog, TensorBoardWriter

    for size in (20_000, 0):
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        folder = Path(sys.argv[1]) / str(size)
        folder.mkdir()
        try:
            with MetricsLog(folder, 0, [TensorBoardWriter(folder, 0)]) as log:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
                for step in range(1, 1000):
                    log.write([{"step": step, "loss": 1 / step}])
        except OSError as error:
            print(error.strerror)
"""


@pytest.mark.slow
def test_a_full_disk_raises_oserror(tmp_path):
    """In the middle or at once. Nothing blocks, and nothing else is printed."""
    child = [sys.executable, "-c", textwrap.dedent(FULL), str(tmp_path)]
    done = subprocess.run(child, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == 2 * "File too large\n"
    assert done.stderr == ""


def test_missing_wandb_is_reported_before_any_file_is_made(tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'ringrl\[wandb\]'"):
        train(tiny.model_copy(update={"log": ("wandb",)}), quiet=True)
    assert not tiny.run.exists()


def test_wandb_offline_keeps_every_step_and_its_id(tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="needs wandb: pip install 'ringrl[wandb]'")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    short = tiny.model_copy(update={"log": ("tensorboard", "wandb")})
    train(short, quiet=True)
    identity = (tiny.run / "wandb" / "id.txt").read_text()
    (file,) = tiny.run.glob(f"wandb/offline-run-*/run-{identity}.wandb")
    held = file.read_bytes()
    entries = [json.loads(text) for text in (tiny.run / "metrics.jsonl").read_text().splitlines()]
    assert len(entries) == 14
    for entry in entries:
        for name in ("loss", "gradient_norm"):
            assert name.encode() in held
            assert repr(entry[name]).encode() in held
    assert (tiny.run / "tensorboard").is_dir()
    train(short.model_copy(update={"log": ("wandb",)}), resume=True, quiet=True)
    assert (tiny.run / "wandb" / "id.txt").read_text() == identity


def test_a_cpu_has_no_peak_rate():
    assert jax.devices()[0].platform != "cpu" or peak_flops(1) is None


def test_step_memory_is_known_without_tracing_again() -> None:
    traced = []

    @jax.jit
    def step(x: jax.Array) -> jax.Array:
        traced.append(x.shape)
        return (x @ x).T @ x

    x = jnp.ones((256, 256))
    step(x)
    found = step_memory(step, x)
    assert found is not None
    assert x.nbytes < found <= 5 * x.nbytes, "the arguments and temporary buffers"
    assert len(traced) == 1


def test_a_notebook_shows_one_line_that_changes(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """Rich's own bar would warn that it needs ipywidgets."""
    shown: list[str] = []

    def display(text: dict[str, str], *, raw: bool, display_id: bool) -> SimpleNamespace:
        shown.append(text["text/plain"])
        return SimpleNamespace(update=lambda text, raw: shown.__setitem__(-1, text["text/plain"]))

    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=display))
    config = TrainConfig(data=Path("x"), task="walker_walk", run=Path("y"))
    for quiet in (False, True):
        with progress_bar(Console(force_jupyter=True), quiet) as bar:
            recorder = MetricsRecorder(config, StepCost(100, 100, None), None, bar)
            for step in (1, 2):
                recorder.add(step, {"loss": 0.5 / step})
                recorder.flush()
    assert [line.partition(" tokens")[0].rpartition("  ")[0] for line in shown] == ["step 2 of 1000  loss 0.2500"]
    assert not list(recwarn)
