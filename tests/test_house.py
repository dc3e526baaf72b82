"""The rooms of the package stand on those before them, and no file stands on itself."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import ringrl

ROOMS = ("attention", "model", "envs", "data", "training", "planning", "evaluation", "study", "cli")
ROOT = Path(ringrl.__file__).resolve().parent


def modules() -> dict[str, Path]:
    """Files by the names they are imported with; rooms that are links included."""
    folders = [ROOT, *(folder for folder in ROOT.iterdir() if folder.is_dir())]
    files = [file for folder in folders for file in folder.resolve().rglob("*.py")]
    return {name_of(file): file for file in files}


def name_of(file: Path) -> str:
    root = ROOT if file.is_relative_to(ROOT) else ROOT.parent
    parts = ("ringrl", *file.relative_to(root).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.AST, known: dict[str, Path]) -> Iterator[str]:
    """Modules that run when this one, or a function of it, does; those that only type checkers read are left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in known else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        else:
            yield from imported(node, known)


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    known = modules()
    return {name: set(imported(ast.parse(file.read_text()), known)) & set(known) for name, file in known.items()}


def test_no_import_comes_back_to_where_it_began(imports: dict[str, set[str]]) -> None:
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_rooms_stand_only_on_those_before_them(imports: dict[str, set[str]]) -> None:
    stands_on: dict[str, set[str]] = {room: set() for room in ROOMS}
    for name, others in imports.items():
        stands_on.setdefault(room_of(name), set()).update(map(room_of, others))
    for place, room in enumerate(ROOMS):
        assert not stands_on[room] & set(ROOMS[place + 1 :]), room
    assert stands_on["attention"] == {"attention"}, "a library of its own"


def room_of(name: str) -> str:
    return (*name.split("."), "")[1]
