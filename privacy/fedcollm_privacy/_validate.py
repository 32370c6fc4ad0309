"""Keyword validators: the keyword is the field's name in the message. All refuse NaN and bool-for-number."""

from __future__ import annotations

import math

from fedcollm_privacy.errors import InvalidValue

__all__ = ["at_least", "hex_digest", "in_range", "integer_at_least", "one_of", "positive", "public_name"]


def _number(name: str, value: object, allowed: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidValue(name, value, allowed)
    try:
        number = float(value)
    except OverflowError as error:  # an integer beyond every float
        raise InvalidValue(name, "an integer beyond 1e308", allowed) from error
    if not math.isfinite(number):
        raise InvalidValue(name, value, allowed)
    return number


def positive(**fields: object) -> None:
    """Each field is a finite number greater than zero.

    >>> positive(epsilon=8.0)
    """
    for name, value in fields.items():
        if not _number(name, value, "a finite number > 0") > 0:
            raise InvalidValue(name, value, "a finite number > 0")


def at_least(lowest: float, **fields: object) -> None:
    """Each field is a finite number not below ``lowest``."""
    for name, value in fields.items():
        if not _number(name, value, f"a finite number >= {lowest}") >= lowest:
            raise InvalidValue(name, value, f"a finite number >= {lowest}")


def integer_at_least(lowest: int, **fields: object) -> None:
    """Each field is an ``int`` not below ``lowest``; no float, however round, and no bool."""
    for name, value in fields.items():
        if type(value) is not int or value < lowest:
            raise InvalidValue(name, value, f"an integer >= {lowest}")


def in_range(low: float, high: float, **fields: object) -> None:
    """Each field is a finite number in ``[low, high]``."""
    for name, value in fields.items():
        if not low <= _number(name, value, f"a number in [{low}, {high}]") <= high:
            raise InvalidValue(name, value, f"a number in [{low}, {high}]")


def one_of(allowed: tuple[str, ...], **fields: object) -> None:
    """Each field is one of the allowed words."""
    for name, value in fields.items():
        if value not in allowed:
            raise InvalidValue(name, value, " | ".join(allowed))


def public_name(**fields: object) -> None:
    """Each field can safely be a file name and a log word: 1-64 letters, digits, ``_``, ``-``, ``.``."""
    for name, value in fields.items():
        ok = isinstance(value, str) and 0 < len(value) <= 64 and value[0].isalnum()
        if not ok or not all(c.isascii() and (c.isalnum() or c in "_-.") for c in str(value)):
            raise InvalidValue(name, value, "1-64 ASCII letters, digits, '_', '-', '.', first a letter or digit")


def hex_digest(**fields: object) -> None:
    """Each field is a SHA-256 as 64 lower-case hex digits."""
    for name, value in fields.items():
        if not isinstance(value, str) or len(value) != 64 or not set(value) <= set("0123456789abcdef"):
            raise InvalidValue(name, value, "64 lower-case hex digits")
