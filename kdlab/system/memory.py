"""Amount of memory available, and refusal of what cannot fit before it is allocated. Imports no torch."""

from __future__ import annotations

import contextlib
from pathlib import Path

from kdlab.errors import UserError

_GROUPS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
"""Limit and use of a control group, as the two versions of Linux's call them."""


def available() -> int | None:
    """Return the bytes of memory that can be had without swapping; None where the system does not say."""
    amounts = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable:"))
        amounts.append(int(line.split()[1]) * 1024)
    for limit, used in _GROUPS:
        with contextlib.suppress(OSError, ValueError):  # no such group, or "max": no limit
            top = Path("/sys/fs/cgroup")
            amounts.append(int((top / limit).read_text()) - int((top / used).read_text()))
    return max(min(amounts), 0) if amounts else None


def refuse_larger(key: str, needed: int, what: str) -> None:
    """Refuse what needs more memory than is available.

    Args:
        key: name of the setting that makes it so large.
        needed: number of bytes that it needs.
        what: name of the object that is so large, in words.

    Raises:
        UserError: names the size, and what is available.
    """
    free = available()
    if free is not None and needed > free:
        raise UserError(key, f"{what} takes {size(needed)}, and {size(free)} of memory are available", "what fits")


def size(count: int) -> str:
    """Return a number of bytes in words: ``640 MiB``, ``3.1 GiB``."""
    for unit, power in (("TiB", 40), ("GiB", 30)):
        if count >= 2**power:
            return f"{count / 2**power:,.1f} {unit}" if count < 2 ** (power + 20) else f"{count / 2**power:.1e} {unit}"
    return f"{count / 2**20:.0f} MiB"
