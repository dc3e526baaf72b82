"""Files that are there whole or not at all."""

import os
from contextlib import suppress
from pathlib import Path


def write_whole(path: Path, content: str | bytes, *, alone: bool = True) -> None:
    """Write a file whole, or leave what is there as it is, whatever ends the process or the machine.

    Args:
      path: the file, whose folder is there; until it is whole, it grows under a hidden name beside it.
      content: text is written as UTF-8.
      alone: no other process writes the same file at the same time. What a kill leaves is then under one name, which
        the next try takes away; if others may write too, each has a name of its own.

    Raises:
      OSError: as the system has it; nothing is left over.
    """
    temporary = path.with_name(f".{path.name}.tmp" if alone else f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())  # or a crash of the machine may leave the new name with nothing in it
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
