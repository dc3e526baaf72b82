"""The folder of a run. It belongs to one configuration and one dataset."""

from pathlib import Path
from typing import Any

import pydantic

from ringrl.config import TrainConfig, one_line, read_yaml, to_yaml
from ringrl.data import EpisodeStore
from ringrl.errors import UserError
from ringrl.files import write_whole
from ringrl.training.checkpoints import read_info

MAY_CHANGE = ("data", "run", "keep_checkpoints", "log")  # settings that may differ when a run is resumed, and the mesh
IF_DAMAGED = "if config.yaml is damaged, remove it, and the newest checkpoint's settings are used"


def claim_folder(config: TrainConfig, resume: bool) -> None:
    """Create the run's folder, or check that an existing folder holds the run to resume.

    Raise UserError if the folder holds a run (without `resume`), another run, or other files.
    """
    saved = config.run / "config.yaml"
    if saved.exists() and not resume:
        raise UserError(f"{config.run}: holds a run already; use --resume to resume it, or give another --run")
    is_run = saved.exists() or (resume and (config.run / "checkpoints").is_dir())
    if is_run:
        check_configuration(config)
    if saved.exists():
        return
    try:
        config.run.mkdir(parents=True, exist_ok=True)
        # A run that was killed before it wrote its configuration leaves hidden files only.
        if not is_run and any(not path.name.startswith(".") for path in config.run.iterdir()):
            raise UserError(f"{config.run}: holds other files and no run; give another --run")
        write_whole(saved, to_yaml(config))
    except OSError as error:
        raise UserError(f"{config.run}: cannot be created ({error.strerror}); give another --run") from error


def saved_configuration(run: Path) -> TrainConfig:
    """Return the settings in config.yaml, or else in the newest checkpoint. Raise UserError if they cannot be read."""
    saved = run / "config.yaml"
    if not saved.exists():
        return read_info(run)[1].config
    try:
        return TrainConfig.model_validate(read_yaml(saved))
    except pydantic.ValidationError as error:
        raise UserError(
            f"{saved}: does not fit this version ({one_line(error)}); start a new --run, or {IF_DAMAGED}"
        ) from error
    except UserError as error:
        raise UserError(f"{error}; start a new --run, or {IF_DAMAGED}") from error


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
            f"{config.run}: the run began with other settings ({'; '.join(changed)}); give the same, or another --run; "
            f"{IF_DAMAGED}"
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
