"""The folder of a run. It belongs to one configuration and one dataset."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pydantic

from ringrl.config import TrainConfig
from ringrl.config_files import one_line, read_yaml, to_yaml
from ringrl.data import EpisodeStore
from ringrl.errors import UserError
from ringrl.files import lock, write_whole
from ringrl.training.checkpoints import read_info, saved_steps

# Settings that may change when a run is resumed. The mesh may change, too, and the transfers depend on the mesh.
MAY_CHANGE = ("data", "run", "keep_checkpoints", "log", "model.strategy", "model.bidirectional")


def holds_run(run: Path) -> bool:
    """Return whether a folder holds a run with at least one step. A run that failed before does not count."""
    log = run / "metrics.jsonl"
    return bool(saved_steps(run)) or (log.is_file() and log.stat().st_size > 0)


@contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Hold the lock of a run's folder, which is created. Raise UserError if another process trains in it."""
    run.resolve().mkdir(parents=True, exist_ok=True)  # the target of a link, if nothing is there yet
    try:
        with lock(run, "trains in it", file=run / ".lock"):
            yield
    finally:
        with suppress(OSError):  # holds files
            run.rmdir()


def claim_folder(config: TrainConfig, resume: bool) -> None:
    """Write config.yaml into a run's folder, or check that the folder holds the run to resume.

    Raise UserError if the folder holds a run (without `resume`), another run, or other files.
    """
    saved = config.run / "config.yaml"
    if holds_run(config.run):
        if not resume:
            raise UserError(f"{config.run}: holds a run already; use --resume to resume it, or give another --run")
        check_configuration(config)
        if saved.exists():
            return
    # A run that was killed before it wrote its configuration leaves hidden files only.
    elif not saved.exists() and any(not path.name.startswith(".") for path in config.run.iterdir()):
        raise UserError(f"{config.run}: holds other files and no run; give another --run")
    write_whole(saved, to_yaml(config))


def saved_configuration(run: Path) -> TrainConfig:
    """Return the settings of a run, from its newest checkpoint or config.yaml. UserError if they cannot be read."""
    if saved_steps(run):
        return read_info(run)[1].config
    saved = run / "config.yaml"
    try:
        return TrainConfig.from_saved(read_yaml(saved))
    except ValueError as error:
        why = one_line(error) if isinstance(error, pydantic.ValidationError) else error
        raise UserError(f"{saved}: cannot be read ({why}), and there is no checkpoint; start a new --run") from error


def check_configuration(config: TrainConfig) -> None:
    """Raise UserError if the folder holds a run with other settings."""
    saved = saved_configuration(config.run)
    was, now = (flat(settings.model_dump(mode="json")) for settings in (saved, config))
    changed = [
        f"{name} was {was.get(name)}, is {value}"
        for name, value in now.items()
        if name not in MAY_CHANGE and not name.startswith("mesh.") and was.get(name) != value
    ]
    if changed:
        raise UserError(
            f"{config.run}: the run began with other settings ({'; '.join(changed)}); give the same, or another --run"
        )


def dataset_fingerprint(store: EpisodeStore) -> str:
    """Return the fingerprint of the recorded content, with the kind of relabelling if it is not the default."""
    relabelling = store.provenance.relabelling
    return store.fingerprint if relabelling == "control_aware" else f"{store.fingerprint} {relabelling}"


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the settings of nested sections under names such as model.layers."""
    settings: dict[str, Any] = {}
    for name, value in values.items():
        settings |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return settings
