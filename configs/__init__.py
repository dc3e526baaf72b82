"""Presets: YAML files of settings, found by name. They are part of the installed package."""

from pathlib import Path

from ringrl.errors import UserError


def settings_file(given: str | Path) -> Path:
    """Return the path of a settings file, or of a preset such as "tiny". UserError for an unknown preset."""
    path = Path(given)
    is_name = len(path.parts) == 1 and not path.suffix and (path.is_dir() or not path.exists())
    return preset(path.name) if is_name else path


def preset(name: str) -> Path:
    """Return the file of a preset such as "demo". Raise UserError with the known names for another name."""
    folder = Path(__file__).parent
    path = folder / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
        raise UserError(f"no preset {name!r} and no such file; presets: {known}")
    return path
