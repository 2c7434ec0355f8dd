"""Termination by signals, and the end of processes in words. Imports no torch."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from kdlab.errors import RunFailed

TERMINATED = 143
"""Exit status after SIGTERM: 128 + 15."""

_HINTS = {"SIGKILL": " (out of memory?)", "SIGSEGV": " (a fault in compiled code)", "SIGBUS": " (a full disk?)"}


class Terminated(SystemExit):
    """Exit requested by SIGTERM; any other ``SystemExit`` is raised by code that gives up, and is a failure."""

    def __init__(self) -> None:
        super().__init__(TERMINATED)


def terminate(number: int = signal.SIGTERM, frame: object = None) -> NoReturn:
    """Raise :class:`Terminated`, as a handler of SIGTERM."""
    raise Terminated


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end the process at once with status 143 inside this context."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def exit_as_failure(end: SystemExit) -> RunFailed:
    """Return the failure that a ``SystemExit`` of a user's code stands for, whatever its status.

    >>> str(exit_as_failure(SystemExit(0)))
    'SystemExit(0): code that the run uses asked to end the process (sys.exit); that is a failure, whatever its status'
    """
    return RunFailed(
        f"SystemExit({end.code!r}): code that the run uses asked to end the process (sys.exit); "
        "that is a failure, whatever its status"
    )


def ending(status: int) -> str:
    """Return in words how a process ended.

    Args:
        status: status as ``os.waitpid`` returns it.

    >>> ending(9), ending(7 << 8)
    ('was killed by SIGKILL (out of memory?)', 'ended by itself with status 7')
    """
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"ended by itself with status {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:  # a real-time signal
        name = f"signal {-code}"
    return f"was killed by {name}{_HINTS.get(name, '')}"
