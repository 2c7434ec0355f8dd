"""Printing that is safe: a name or message from a file cannot control the terminal."""

from __future__ import annotations

import logging
import re
import sys
import warnings
from typing import TextIO

from kdlab.plain_text import one_line, printable

__all__ = ["LineFormatter", "clean_terminal", "say", "warn"]

_BOLD = re.compile("(\x1b\\[[01]m)")
"""The two escapes that kdlab's own tables use: bold type on and off."""


def say(text: object = "", *, file: TextIO | None = None) -> None:
    """Print ``text`` at once (on standard output), its control characters removed but for bold type.

    Signs that the stream's encoding lacks are spelled out. A name from a file that stands inside of a line goes through
    :func:`one_line` first.
    """
    stream = file or sys.stdout
    parts = _BOLD.split(str(text))
    cleaned = "".join(part if number % 2 else printable(part) for number, part in enumerate(parts))
    encoding = stream.encoding or "utf-8"
    stream.write(cleaned.encode(encoding, "replace").decode(encoding) + "\n")  # one write: other processes print too
    stream.flush()


def warn(text: object) -> None:
    """Print a warning of one line on standard error."""
    say(f"kdlab: warning: {one_line(text)}", file=sys.stderr)


class LineFormatter(logging.Formatter):
    """Formatter of a log record as one printable line; an exception's traceback follows on lines of its own."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (of the standard library)
        """Return the message without control characters."""
        record.message = " ".join(record.message.splitlines())
        return printable(super().formatMessage(record))

    def formatException(self, ei: object) -> str:  # noqa: N802 (of the standard library)
        """Return the traceback without control characters."""
        return printable(super().formatException(ei))  # type: ignore[arg-type]


_format_warning = warnings.formatwarning


def clean_terminal() -> None:
    """Remove control characters from this process's log and from Python's warnings, unless others set these up."""
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(LineFormatter("%(message)s"))
    warnings.formatwarning = lambda *given, **named: printable(_format_warning(*given, **named))
