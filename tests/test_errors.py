"""Messages of errors."""

import pytest

from ringrl.errors import UserError, brief, is_out_of_memory, user_message


def test_brief_is_one_short_line() -> None:
    assert brief(ValueError("one\n  two\tthree ")) == "one two three"
    assert brief(MemoryError()) == ""
    assert brief(RuntimeError("x" * 301)) == "x" * 300
    assert brief(ValueError("\x1b[31mred ü\x07")) == r"\x1b[31mred ü\x07"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory"),
        RuntimeError("INTERNAL: Error dispatching computation: Out of memory allocating 4398046511104 bytes."),
        SystemError("error return without exception set"),
    ],
)
def test_out_of_memory_is_recognised(error: Exception) -> None:
    assert is_out_of_memory(error)
    assert "not enough memory" in str(user_message(error))
    assert not is_out_of_memory(OSError("No space left on device"))
    assert not is_out_of_memory(SystemError("bad argument to internal function"))


def test_user_message() -> None:
    assert user_message(UserError("--run: x")) == "--run: x"
    assert user_message(PermissionError(13, "Permission denied", "a/b")) == "a/b: Permission denied"
    for error in (ValueError("x"), OSError("x"), RuntimeError("x"), BrokenPipeError(32, "Broken pipe")):
        assert user_message(error) is None
