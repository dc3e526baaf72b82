"""What is done to files while nobody looks at them, and what is asked of them."""

from pathlib import Path


def flip(path: Path, share: float = 0.5, bit: int = 4) -> None:
    """Turn one bit of a file round, at this share of its length; of a new file, in case others are linked to it."""
    content = bytearray(path.read_bytes())
    content[int(share * (len(content) - 1))] ^= 1 << bit
    path.unlink()
    path.write_bytes(content)


def cut(path: Path, share: float = 0.5) -> None:
    """Keep the beginning only, likewise."""
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[: int(share * len(content))])


def append(path: Path, text: str) -> None:
    """What a kill in the middle of a line leaves."""
    with path.open("a") as file:
        file.write(text)


def names(folder: Path) -> list[str]:
    """All files below a folder, hidden ones too, by their paths in it."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def lines(path: Path) -> int:
    """Whole lines of a file; 0 where there is none."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def zeros(folder: Path) -> None:
    """In place of all that is in its files."""
    for file in folder.rglob("*"):
        if file.is_file():
            file.write_bytes(bytes(16))
