"""Log on standard error, for verbs that have no run folder to keep it in."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from kdlab.system.terminal import LineFormatter


@contextmanager
def log_shown() -> Iterator[None]:
    """Show what kdlab logs, line by line."""
    log, handler = logging.getLogger("kdlab"), logging.StreamHandler()
    handler.setFormatter(LineFormatter("%(message)s"))
    level, propagate = log.level, log.propagate
    log.setLevel(logging.INFO)
    log.propagate = False
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagate
