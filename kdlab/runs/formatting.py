"""Numbers written for people, in tables and pictures."""

from __future__ import annotations


def percent(value: float | None, signed: bool = False, places: int = 2) -> str | None:
    """Format a fraction in per cent, without the sign of per cent: 0.9778 is ``97.78``."""
    return None if value is None else f"{100 * value:{'+' * signed}.{places}f}".replace("-", "−")


def plural(amount: int, what: str) -> str:
    """Format an amount with its noun: ``1 run``, ``2 runs``."""
    return f"{amount} {what}{'s' * (amount != 1)}"


def count(value: float | None) -> str | None:
    """Format a whole number with separators between thousands."""
    return None if value is None else f"{value:,.0f}"


def size(value: float | None) -> str | None:
    """Format a number of bytes for people: 21.4 kB, 1.1 MB (powers of 1000)."""
    if value is None:
        return None
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"


def seconds(value: float | None) -> str | None:
    """Format seconds with as many decimals as matter."""
    return None if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def number(value: float | None, digits: int = 3) -> str | None:
    """Format a plain number, to ``digits`` significant places."""
    return None if value is None else f"{value:.{digits}g}" if abs(value) < 1000 else f"{value:,.0f}"


def decimal(value: float | None, signed: bool = False, like: float | None = None) -> str | None:
    """Format a score that is no fraction, to about four significant places: ``4.512``, ``21.10``, ``1,634``.

    Args:
        value: number to write; a difference or a deviation has the decimals of the scores it comes from.
        signed: whether to write its sign.
        like: score whose decimals count; None: those of ``value``.
    """
    if value is None:
        return None
    scale = abs(value if like is None else like)
    if scale >= 1e6:
        return f"{value:{'+' if signed else ''}.3g}".replace("-", "−")
    places = 3 if scale < 10 else 2 if scale < 100 else 1 if scale < 1000 else 0
    return f"{value:{'+' if signed else ''},.{places}f}".replace("-", "−")
