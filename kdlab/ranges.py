"""Numbers held against the range that they may be in: one rule, and one message, for every argument."""

from __future__ import annotations

import math
from numbers import Real

from kdlab.errors import UserError

__all__ = ["at_least_zero", "positive", "share", "whole_number"]


def whole_number(key: str, value: object, least: int = 1, most: int | None = None, also: str = "") -> int:
    """Return the value, if it is a whole number in [least, most]; ``True`` and ``1.0`` are none.

    Args:
        key: config key, for the message.
        value: value that stands there.
        least: smallest number that is accepted.
        most: largest one; None sets no end.
        also: words for what else the caller accepts, such as ``or null``.

    Raises:
        UserError: otherwise.

    >>> whole_number("rank", 8)
    8
    """
    if type(value) is int and value >= least and (most is None or value <= most):
        return value
    span = f"at least {least}" if most is None else f"from {least} to {most}"
    raise UserError(key, _shown(value), f"a whole number, {span}{also and f', {also}'}")


def share(key: str, value: object, *, zero: bool = True, one: bool = True, also: str = "") -> float:
    """Return the value, if it is a share of a whole: a number from 0 to 1.

    Args:
        key: config key, for the message.
        value: value that stands there.
        zero: true if 0 is accepted.
        one: true if 1 is accepted.
        also: words for what else the caller accepts.

    Raises:
        UserError: otherwise.
    """
    if _is_number(value) and 0 <= value <= 1 and (zero or value > 0) and (one or value < 1):  # type: ignore[operator]
        return float(value)  # type: ignore[arg-type]
    ends = f"{'at least' if zero else 'above'} 0 and {'at most' if one else 'below'} 1"
    raise UserError(key, _shown(value), f"a number {ends}{also and f', {also}'}")


def positive(key: str, value: object, also: str = "") -> float:
    """Return the value, if it is a finite number above 0.

    Raises:
        UserError: otherwise.
    """
    if _is_number(value) and 0 < value < math.inf:  # type: ignore[operator]
        return float(value)  # type: ignore[arg-type]
    raise UserError(key, _shown(value), f"a finite number above 0{also and f', {also}'}")


def at_least_zero(key: str, value: object, also: str = "") -> float:
    """Return the value, if it is a finite number, at least 0.

    Raises:
        UserError: otherwise.
    """
    if _is_number(value) and 0 <= value < math.inf:  # type: ignore[operator]
        return float(value)  # type: ignore[arg-type]
    raise UserError(key, _shown(value), f"a finite number, at least 0{also and f', {also}'}")


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _shown(value: object) -> object:
    return repr(value) if isinstance(value, str) else value
