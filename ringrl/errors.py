"""The one kind of error that is the user's to mend, and what is asked of all others."""


class UserError(ValueError):
    """A mistake a user can mend.

    The message is one line: what is wrong, where (file, flag or value), and what to do. The command line prints that
    line and exits with code 2; library users catch it as a ValueError.
    """


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, NumPy or XLA did not get the memory that it asked for; such an error says nothing about files.

    Where JAX's device_put gets none, it fails without saying why, and Python says that it did.
    """
    if isinstance(error, SystemError):
        return "without exception set" in str(error)
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


def what_to_mend(error: BaseException) -> str | None:
    """The one line for an error that the user can mend; None for any other."""
    if isinstance(error, UserError):
        return str(error)
    if is_out_of_memory(error):
        return (
            f"not enough memory ({brief(error) or 'MemoryError'}): free some, or ask for less "
            "(a smaller batch or context, fewer --environments or --workers); what was finished is kept"
        )
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return None


def brief(error: BaseException) -> str:
    """What an error says, as a part of one line: the first 300 characters, without line breaks."""
    return " ".join(str(error).split())[:300]
