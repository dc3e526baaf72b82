"""Presets: YAML files of settings, found by name."""

from pathlib import Path

from ringrl.errors import UserError


def preset(name: str) -> Path:
    """The file of a preset such as "demo"; UserError lists what there is."""
    folder = Path(__file__).parent
    path = folder / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
        raise UserError(f"no preset {name!r}; there are {known}")
    return path
