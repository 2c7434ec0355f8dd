"""Runs side by side: a table, CSV, and pictures."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Everything that follows is ``kdlab.report.compare.compare``'s."""
    from kdlab.report.compare import compare

    return compare.main(argv)
