"""Names that become folders: the experiment's, its stages', a board's rows. Imports no torch."""

from __future__ import annotations

from typing import Any

from kdlab.errors import UserError
from kdlab.plain_text import printable

__all__ = ["check_name", "check_names", "check_output"]

LONGEST = 100
"""Largest size of a name in bytes of UTF-8; filesystems take 255, and some names get a number or a hash appended."""

DEEPEST = 8
"""Largest number of parts in a name of folders inside each other."""

RESERVED = ("teachers", "pretrained", "baselines", "cache", "leaderboard")
"""Folders of ``output`` in which kdlab keeps what runs share; runs do not go there."""

ACCEPTED = f"no path, no control characters, not blank, at most {LONGEST} bytes"


def check_name(key: str, value: object, accepted: str = "a name") -> str:
    """Check that a value is a plain name of one folder, and return it.

    Args:
        key: config key to name in the message.
        value: value of that key.
        accepted: meaning of a name here, for the message.

    Raises:
        UserError: of a path, a blank, a control character, or a name too long for a folder.
    """
    if not isinstance(value, str) or not _is_name(value):
        raise UserError(key, f"{value!r}", f"{accepted} ({ACCEPTED})")
    return value


def _is_name(text: str) -> bool:
    if not text.strip() or text != text.strip() or text in (".", ".."):
        return False
    if any(separator in text for separator in ("/", "\\", "\n", "\t")) or printable(text) != text:
        return False
    return len(text.encode()) <= LONGEST


def check_names(key: str, value: Any, accepted: str = "a name") -> str:
    """Check as :func:`check_name` does, but accept ``a/b`` too: a folder in a folder.

    Raises:
        UserError: as :func:`check_name`, of any part; or of a folder that kdlab keeps for itself.
    """
    parts = value.split("/") if isinstance(value, str) else []
    if not 1 <= len(parts) <= DEEPEST or not all(map(_is_name, parts)):
        raise UserError(key, f"{value!r}", f"{accepted} ({ACCEPTED}; a/b is a folder in a folder)")
    if parts[0] in RESERVED:
        raise UserError(key, f"{value!r}; {parts[0]} is kept for what runs share", "another name")
    return value


def check_output(value: object) -> str:
    """Check that ``output`` names a folder, and return it.

    Raises:
        UserError: of a blank, or of anything but a text.
    """
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise UserError("output", f"{value!r}", "a folder, such as outputs, or . for the working folder")
    return value
