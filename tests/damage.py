"""Damage to files, shared by the tests of single modules and those of the command line (tests/faults)."""

import shutil
from collections.abc import Callable
from pathlib import Path

Damage = Callable[[Path], object]


def flip(path: Path, share: float = 0.5, bit: int = 4) -> None:
    """Flip one bit at this share of a file's length. Writes a new file, in case others are linked to the old one."""
    content = bytearray(path.read_bytes())
    content[int(share * (len(content) - 1))] ^= 1 << bit
    path.unlink()
    path.write_bytes(content)


def cut(path: Path, share: float = 0.5) -> None:
    """Keep only this share of a file, in a new file."""
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[: int(share * len(content))])


def append(path: Path, text: str) -> None:
    """Append text, as a kill in the middle of a line would leave it."""
    with path.open("a") as file:
        file.write(text)


def write_zeros(folder: Path) -> None:
    """Replace the content of all files of a folder with zeros."""
    for file in folder.rglob("*"):
        if file.is_file():
            file.write_bytes(bytes(16))


def rewrite(path: Path, change: Callable[[list[str]], list[str]]) -> None:
    """Change the lines of a text file."""
    path.write_text("".join(change(path.read_text().splitlines(keepends=True))))


def arrays(step: Path) -> Path:
    """Return the file that holds most arrays of a checkpoint."""
    return max((step / "state").glob("**/d/*"), key=lambda path: path.stat().st_size)


def _change_digit(step: Path) -> None:
    file = step / "info" / "metadata"
    text = file.read_text()
    assert '"episode_length": 250' in text
    file.write_text(text.replace('"episode_length": 250', '"episode_length": 251'))


# Damage to the folder of one checkpoint, which every reader must notice.
CHECKPOINT: dict[str, Damage] = {
    "zeros": lambda step: write_zeros(step / "state"),
    "arrays cut short": lambda step: [cut(file) for file in step.glob("state/ocdbt.process_0/d/*")],
    "a digit of the description": _change_digit,
    "manifest gone": lambda step: (step / "state" / "manifest.ocdbt").unlink(),
    "state gone": lambda step: shutil.rmtree(step / "state"),
    "description cut short": lambda step: cut(step / "info" / "metadata", 0.1),
    "description gone": lambda step: shutil.rmtree(step / "info"),
    "all gone": lambda step: (shutil.rmtree(step), step.mkdir()),
}

# Damage to the state of the batch iterator in a checkpoint, which only resuming needs.
ITERATOR: dict[str, Damage] = {
    "iterator gone": lambda step: shutil.rmtree(step / "iterator"),
    "iterator cut short": lambda step: cut(step / "iterator" / "metadata", 0.1),
}

# Damage to metrics.jsonl, in two kinds: what a kill leaves behind, and what loses lines.
METRICS_TAIL: dict[str, Damage] = {
    "half a last line": lambda path: append(path, '{"step": 61, "lo'),
    "zeros at the end": lambda path: append(path, "\x00\x00\x00"),
    "a last line that is a number": lambda path: append(path, "61\n"),
}
METRICS_LOST: dict[str, Damage] = {
    "gone": lambda path: path.unlink(),
    "a flipped bit": lambda path: flip(path, 0.2, 7),
    "cut short": lambda path: cut(path, 0.1),
}

# Damage to a finished store, which `ringrl data info --verify` must notice; opening it notices the first four.
STORE: dict[str, Damage] = {
    "cut short": cut,
    "cut by a byte": lambda store: cut(store, 1 - 1 / store.stat().st_size),
    "empty": lambda store: cut(store, 0),
    "a flipped bit of the header": lambda store: flip(store, 0.0001),
    "a flipped bit at 0.1%": lambda store: flip(store, 0.001),
    "a flipped bit at 25%": lambda store: flip(store, 0.25),
    "a flipped bit at 50%": lambda store: flip(store, 0.5),
    "a flipped bit at 75%": lambda store: flip(store, 0.75),
    "a flipped bit at 99.9%": lambda store: flip(store, 0.999),
}

# Damage to any file with a checksum.
FILE: dict[str, Damage] = {"cut short": cut, "a flipped bit": flip, "empty": lambda path: cut(path, 0)}


def _sibling(part: Path, suffix: str) -> Path:
    return part.with_name(f"{part.name}.{suffix}")


# Damage to an incomplete download, given the path of its part; the note next to it names the version on the server.
DOWNLOAD: dict[str, Damage] = {
    "note cut short": lambda part: cut(_sibling(part, "json")),
    "note gone": lambda part: _sibling(part, "json").unlink(),
    "note with half a line more": lambda part: append(_sibling(part, "json"), '{"url": "ht'),
    "part cut short": cut,
    "part gone": Path.unlink,
}


def _halve_last_line(path: Path) -> None:
    rewrite(path, lambda lines: [*lines[:-1], lines[-1][:100]])


# Damage to a results file, which has a summary next to it.
RESULTS: dict[str, Damage] = {
    "half a last line": _halve_last_line,
    "last line gone": lambda path: rewrite(path, lambda lines: lines[:-1]),
    "all gone": Path.unlink,
    "summary cut short": lambda path: cut(path.with_suffix(".json")),
    "summary gone": lambda path: path.with_suffix(".json").unlink(),
    "a line that is not JSON": lambda path: rewrite(path, lambda lines: ["{broken\n", *lines[1:]]),
}


def _unfinished(damage: Damage) -> Damage:
    return lambda cell: ((cell / "finished.json").unlink(), damage(cell))


# Damage to the folder of a study's cell. Only the last needs the user.
CELL: dict[str, Damage] = {
    "finished.json cut short": lambda cell: cut(cell / "finished.json"),
    "half a last line of results": _unfinished(lambda cell: _halve_last_line(cell / "evaluation.jsonl")),
    "half a last line of metrics": _unfinished(lambda cell: append(cell / "metrics.jsonl", '{"st')),
    "newest checkpoint all zeros": _unfinished(lambda cell: write_zeros(cell / "checkpoints" / "60" / "state")),
    "cell gone": shutil.rmtree,
    "cell.yaml empty": _unfinished(lambda cell: cut(cell / "cell.yaml", 0)),
}
