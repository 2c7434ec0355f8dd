"""Numbers that change over training: constant, linear, cosine or step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

from kdlab.errors import UserError, unknown
from kdlab.ranges import share

Shape = Literal["linear", "cosine", "step"]


@dataclass(frozen=True)
class Schedule:
    """Number as a function of training progress in [0, 1].

    From ``start`` at progress ``begin`` to ``end`` at progress ``until``, along a line or half a cosine, constant
    before and after; ``step`` holds ``start`` and jumps to ``end`` at progress ``at``.

    >>> [Schedule(8, 1, "linear")(p) for p in (0.0, 0.5, 1.0)]
    [8.0, 4.5, 1.0]
    """

    start: float
    end: float
    shape: Shape = "linear"
    begin: float = 0.0
    until: float = 1.0
    at: float = 0.5

    def __post_init__(self) -> None:
        for name in ("start", "end", "begin", "until", "at"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise UserError(name, f"{value!r} in a schedule", "a finite number")
        if self.shape not in get_args(Shape):
            raise unknown("shape", self.shape, get_args(Shape), "schedule")
        if not 0 <= self.begin < self.until <= 1:
            raise UserError("begin, until", f"{self.begin}, {self.until}", "0 <= begin < until <= 1")
        share("at", self.at)

    def __call__(self, progress: float) -> float:
        """Return the value at a share of training, in [0, 1]."""
        if self.shape == "step":
            return float(self.start if progress < self.at else self.end)
        share = min(max((progress - self.begin) / (self.until - self.begin), 0.0), 1.0)
        if self.shape == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        low, high = self.range
        return float(min(max(self.start + (self.end - self.start) * share, low), high))  # rounding may step outside

    def times(self, factor: float) -> Schedule:
        """Return the same schedule with every number times ``factor``."""
        return replace(self, start=self.start * factor, end=self.end * factor)

    @property
    def range(self) -> tuple[float, float]:
        """Least and greatest value over training."""
        return min(self.start, self.end), max(self.start, self.end)


def schedule(value: float | Mapping | Schedule, key: str, least: float = -math.inf, most: float = math.inf) -> Schedule:
    """Read a number (constant) or a mapping ``{start, end, shape, ...}``.

    Raises:
        UserError: names ``key`` if the value is neither, or leaves ``[least, most]``.
    """
    if isinstance(value, Mapping):
        given = dict(value)
        try:
            value = Schedule(**given)
        except TypeError:
            accepted = ("start", "end", "shape", "begin", "until", "at")
            strange = [k for k in given if k not in accepted]
            if strange:
                raise unknown(key, strange[0], accepted, "key of a schedule") from None
            raise UserError(key, f"{given}; a schedule needs start and end") from None
        except UserError as error:
            raise error.under(key) from None
    elif (
        isinstance(value, bool)
        or not isinstance(value, Schedule | int | float)
        or (isinstance(value, float) and not math.isfinite(value))
    ):
        raise UserError(key, f"{value!r}", "a finite number, or a schedule such as {start: 8, end: 1, shape: cosine}")
    parsed = value if isinstance(value, Schedule) else Schedule(value, value)
    low, high = parsed.range
    if low < least or high > most:
        bounds = f"at least {least:g}" if most == math.inf else f"between {least:g} and {most:g}"
        raise UserError(key, f"{low if low < least else high:g}", bounds)
    return parsed
