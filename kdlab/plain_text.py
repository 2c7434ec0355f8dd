"""Text that is safe to print: a name or message from a file cannot control the terminal."""

from __future__ import annotations

import unicodedata

__all__ = ["one_line", "printable"]

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
