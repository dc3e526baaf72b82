"""The packages form layers, and no import cycle exists."""

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import ringrl

# Each package imports only itself, packages to its left and single modules such as ringrl.config.
LAYERS = (
    "attention", "model", "envs", "data", "collect", "training", "planning", "evaluation", "study", "report", "cli",
)  # fmt: skip
ROOT = Path(ringrl.__file__).resolve().parent


def modules() -> dict[str, Path]:
    """Return every file of the package by its module name, files of linked packages included."""
    folders = [ROOT, *(folder for folder in ROOT.iterdir() if folder.is_dir())]
    files = [file for folder in folders for file in folder.resolve().rglob("*.py")]
    return {name_of(file): file for file in files}


def name_of(file: Path) -> str:
    """Return the module name of a file."""
    root = ROOT if file.is_relative_to(ROOT) else ROOT.parent
    parts = ("ringrl", *file.relative_to(root).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.AST, known: dict[str, Path]) -> Iterator[str]:
    """Yield the modules that a module imports, in functions too. Imports for type checkers only are left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in known else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        else:
            yield from imported(node, known)


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    known = modules()
    return {name: set(imported(ast.parse(file.read_text()), known)) & set(known) for name, file in known.items()}


def test_no_import_cycle(imports: dict[str, set[str]]) -> None:
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_packages_import_only_packages_of_lower_layers(imports: dict[str, set[str]]) -> None:
    used: dict[str, set[str]] = {layer: set() for layer in LAYERS}
    for name, others in imports.items():
        used.setdefault(package_of(name), set()).update(map(package_of, others))
    for place, layer in enumerate(LAYERS):
        above = used[layer] & set(LAYERS[place + 1 :])
        assert not above, f"ringrl.{layer} imports {sorted(above)}, layers above it"
    assert used["attention"] == {"attention"}, "ringrl.attention imports nothing else of the project"


def package_of(name: str) -> str:
    return (*name.split("."), "")[1]


def test_completion_lists_public_names_and_imports_nothing() -> None:
    script = "import sys, ringrl; print(*dir(ringrl)); print(*(name for name in sys.modules if name[:6] == 'ringrl'))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    listed, loaded = (line.split() for line in done.stdout.splitlines())
    assert loaded == ["ringrl"]
    packages = {*listed} - {"__version__", "train"}
    assert all(importlib.import_module(f"ringrl.{name}") is getattr(ringrl, name) for name in packages)
    assert ringrl.train is importlib.import_module("ringrl.training").train
    pages = "".join(page.read_text() for page in [ROOT.parent / "README.md", *(ROOT.parent / "docs").rglob("*.md")])
    assert {*re.findall(r"^(?:from|:::) ringrl[.](\w+)", pages, re.MULTILINE)} <= {*listed}
    for name in ("envs", "evaluation"):
        package = getattr(ringrl, name)
        assert dir(package) == sorted(package.__all__)
        assert all(hasattr(package, public) for public in package.__all__)
        named = re.findall(rf"^from ringrl[.]{name} import (.+)$", pages, re.MULTILINE)
        assert {public for names in named for public in names.split(", ")} <= {*dir(package)}
