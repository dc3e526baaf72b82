"""Errors that a user can correct, and their one-line messages."""

from importlib.util import find_spec


class UserError(ValueError):
    """An error that the user can correct.

    The message is one line: what is wrong, where (file, flag or value), and what to do. The command line prints that
    line and exits with code 2; library users catch a ValueError.
    """


def require(what: str, extra: str, *modules: str) -> None:
    """Raise UserError if a module of an optional dependency is missing. `what` needs the modules: a flag or a name."""
    for module in modules:
        if find_spec(module) is None:
            raise UserError(f"{what}: needs {module}; install it with: pip install 'ringrl[{extra}]'")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether Python, NumPy or XLA ran out of memory. Such an error does not mean that a file is damaged."""
    if isinstance(error, SystemError):  # raised when JAX's device_put runs out of memory without setting an exception
        return "without exception set" in str(error)
    # XLA says INTERNAL when a computation that it has dispatched runs out.
    return isinstance(error, MemoryError) or any(
        words in str(error) for words in ("RESOURCE_EXHAUSTED", "Out of memory")
    )


def user_message(error: BaseException) -> str | None:
    """Return the one-line message of an error that the user can correct, and None for any other error."""
    if isinstance(error, UserError):
        return str(error)
    if is_out_of_memory(error):
        return (
            f"not enough memory ({brief(error) or 'MemoryError'}): free some, or reduce the batch, the context, "
            "--environments or --workers"
        )
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return None


def printable(text: str) -> str:
    """Return text with control characters, which may change a terminal, as escapes (`\\x1b`)."""
    if text.isprintable():  # fast
        return text
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def brief(error: BaseException) -> str:
    """Return the first 300 characters of an error's message, printable and without line breaks."""
    return printable(" ".join(str(error).split())[:300])
