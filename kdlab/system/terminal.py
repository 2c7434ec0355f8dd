"""Text that is safe to print: a name or message from a file cannot control the terminal. Imports no torch."""

from __future__ import annotations

import logging
import re
import sys
import unicodedata
import warnings
from typing import TextIO

__all__ = ["LineFormatter", "clean_terminal", "one_line", "printable", "say", "warn"]

_HIDDEN = frozenset(("Cc", "Cf", "Cs", "Co"))
"""Unicode categories of control characters, direction marks, surrogates and private characters."""


def printable(text: str) -> str:
    r"""Remove terminal escapes and invisible direction marks from ``text``; line breaks and tabs stay.

    >>> printable("a\x1b[31mb\n")
    'a[31mb\n'
    """
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in _HIDDEN)


def one_line(value: object) -> str:
    r"""Return ``value`` as one line of printable text, with each run of white space as one space.

    >>> one_line("two\n  lines")
    'two lines'
    """
    return printable(" ".join(str(value).split()))


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
