"""Paired timing: A and B in turn, many times; the median of the ratios, and how sure it is.

A shared machine slows down and speeds up within seconds. Two things timed one right after the other see the same
machine, so the ratio of such a pair is worth far more than the ratio of two averages.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

Action = Callable[[], object]


@dataclass(frozen=True)
class Ratio:
    """A over B, of n pairs."""

    median: float
    low: float
    """Of the 95 % bootstrap interval of the median."""
    high: float
    quartiles: tuple[float, float]
    """Of the single pairs: how noisy the machine is."""
    n: int
    seconds: tuple[float, float]
    """Median time of A and of B."""

    def __str__(self) -> str:
        a, b = (duration(s) for s in self.seconds)
        return f"{self.spread()}  {a} : {b}"

    def spread(self) -> str:
        """Without the times."""
        return (
            f"{self.median:.3f} (95 % interval {self.low:.3f} to {self.high:.3f}; quartiles of pairs "
            f"{self.quartiles[0]:.2f}, {self.quartiles[1]:.2f}; n={self.n})"
        )


def compare(a: Action, b: Action, pairs: int, warmup: int = 1, clock: Callable[[], float] = time.perf_counter) -> Ratio:
    """Time ``a`` and ``b`` in turn, starting with the other one in every second pair."""
    for _ in range(warmup):
        a()
        b()
    times = []
    for n in range(pairs):
        if n % 2:
            t = seconds(b, clock)
            times.append((seconds(a, clock), t))
        else:
            times.append((seconds(a, clock), seconds(b, clock)))
    return ratio([t for t, _ in times], [t for _, t in times])


def seconds(action: Action, clock: Callable[[], float] = time.perf_counter) -> float:
    """How long an action takes."""
    start = clock()
    action()
    return clock() - start


def ratio(a: list[float], b: list[float], resamples: int = 4000) -> Ratio:
    """The ratio of paired times: median, and its bootstrap interval over the pairs."""
    pairs = np.array(a) / np.array(b)
    drawn = np.random.default_rng(0).integers(0, len(pairs), (resamples, len(pairs)))
    medians = np.median(pairs[drawn], axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    first, third = np.percentile(pairs, [25, 75])
    medians_of = statistics.median(a), statistics.median(b)
    return Ratio(float(np.median(pairs)), float(low), float(high), (float(first), float(third)), len(pairs), medians_of)


def duration(value: float) -> str:
    """Seconds in a fitting unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-6:.3g} µs"


def header(title: str) -> None:
    """What is measured, and on what."""
    import lightning
    import torch

    from kdlab.training.trainer import cpu_has_bf16

    bf16 = "bf16 in hardware" if cpu_has_bf16() else "no bf16 in hardware"
    print(f"\n== {title}")
    print(f"{_cpu()}, {os.cpu_count()} cores ({bf16}), load {os.getloadavg()[0]:.1f} before")
    print(f"python {platform.python_version()}, torch {torch.__version__}, lightning {lightning.__version__}\n")


def say(name: str, found: object, target: str = "") -> None:
    """One result."""
    print(f"{name}: {found}" + (f"  [target: {target}]" if target else ""), flush=True)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    told = {line.split(":")[0].strip(): line.split(":", 1)[1].strip() for line in lines if ":" in line}
    return f"{told.get('model name', platform.machine())}" + (
        " with AMX" if "amx_tile" in told.get("flags", "") else ""
    )
