"""Numbers as text."""

from ringrl.evaluation.formatting import decimal, duration, number


def test_numbers_are_short_and_have_true_minus_signs() -> None:
    assert [number(value) for value in (0.0, 12.34, 99.96, 1234.5)] == ["0.0", "12.3", "100", "1234"]
    assert number(-3.0) == decimal(-3.0) == "\N{MINUS SIGN}3.0"
    assert number(3.0, sign=True) == "+3.0"
    assert number(-0.01, sign=True) == "0.0"
    assert decimal(1234.56) == "1234.6"
    assert decimal(None) == number(None) == duration(None) == "\N{EN DASH}"


def test_durations_are_rounded_to_seconds() -> None:
    assert [duration(seconds) for seconds in (0, 59.6, 3599.4, 360_061.0)] == [
        "0:00:00", "0:01:00", "0:59:59", "100:01:01",
    ]  # fmt: skip
