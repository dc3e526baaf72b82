"""Numbers as text, in terminals, tables and sentences."""

import numpy as np

ABSENT = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"


def decimal(value: float | None) -> str:
    """Format a return for a table, with one decimal; a dash for None."""
    return ABSENT if value is None else f"{value if abs(value) >= 0.05 else 0.0:.1f}".replace("-", MINUS)


def number(value: float | None, *, sign: bool = False) -> str:
    """Format a return for a sentence, with one decimal below 100 and none above; a dash for None."""
    if value is None:
        return ABSENT
    value = value if abs(value) >= 0.05 else 0.0  # no "-0.0"
    return f"{value:{'+' if sign and value else ''}.{0 if abs(value) >= 99.95 else 1}f}".replace("-", MINUS)


def p_value(value: float) -> str:
    """Format a p-value."""
    return "below 0.001" if value < 0.0005 else f"{value:.3f}"


def all_digits(value: float) -> str:
    """Format a number for a name, so that different numbers have different names."""
    return np.format_float_positional(value, trim="-")


def duration(seconds: float | None) -> str:
    """Format a duration as h:mm:ss; a dash for None."""
    if seconds is None:
        return ABSENT
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
