"""Switch that lets jobs run in processes of their own; :mod:`kdlab.cli.hydra.workers` takes longer to import."""

from __future__ import annotations

import os

_allowed = False


def allow_forks() -> None:
    """Say that this process is the command line's own, and has imported nothing that a fork could break."""
    global _allowed
    _allowed = True


def may_fork() -> bool:
    """Return whether jobs run in processes of their own."""
    return _allowed and hasattr(os, "fork") and os.environ.get("KDLAB_IN_PROCESS", "0") in ("", "0")
