"""Runs side by side: a table, CSV, and pictures."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Everything that follows is ``kdlab.runs.compare``'s."""
    from kdlab.runs import compare

    return compare.main(argv)
