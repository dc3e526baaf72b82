"""How numbers are written for readers: in terminals, tables and sentences."""

import numpy as np

ABSENT = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"


def decimal(value: float | None) -> str:
    """A return in a table: one decimal; a dash where there is none."""
    return ABSENT if value is None else f"{value:.1f}".replace("-", MINUS)


def number(value: float | None, *, sign: bool = False) -> str:
    """A return in a sentence: whole from 100 on, one decimal below; a dash where there is none."""
    if value is None:
        return ABSENT
    value = value if abs(value) >= 0.05 else 0.0  # no nought with a sign
    return f"{value:{'+' if sign and value else ''}.{0 if abs(value) >= 99.95 else 1}f}".replace("-", MINUS)


def all_digits(value: float) -> str:
    """As part of a name: other numbers have other names."""
    return np.format_float_positional(value, trim="-")


def duration(seconds: float | None) -> str:
    """As h:mm:ss; a dash where it is not known."""
    if seconds is None:
        return ABSENT
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
