"""Overrides as a user types them: values in Hydra's notation, quoted for a shell. Imports neither Hydra nor torch."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping

__all__ = ["argument", "as_one_text", "for_shell", "quoted", "value_text"]

_PLAIN = re.compile(r"[A-Za-z_/.][\w./+@%-]*", re.ASCII)
"""Texts that Hydra reads as they are, whatever they hold; a few of them mean something else (``_RESERVED``)."""

_RESERVED = re.compile(r"null|true|false|[-+]?(?:nan|inf)|[-+.\d][-+.\de_]*", re.IGNORECASE)

_HOLDS_EQUALS = r"(?<=[\[{,:\s])[^\[\]{},:'\"\s]*=[^\[\]{},'\"\s]*"

_SHELL_SAFE = re.compile(r"[\w./:=,+@%-]+", re.ASCII)


def quoted(text: str) -> str:
    """Quote ``text`` as a value of an override.

    >>> quoted("epoch=3-step=10.ckpt")
    "'epoch=3-step=10.ckpt'"
    """
    mark = '"' if "'" in text and '"' not in text else "'"
    # of backslashes, Hydra takes for an escape those alone that stand before the mark
    inner = re.sub(rf"(\\*){mark}", rf"\1\1\\{mark}", text)
    inner = re.sub(r"(\\+)$", r"\1\1", inner)
    return f"{mark}{inner}{mark}"


def value_text(value: object) -> str:
    """Format ``value`` as it stands behind the ``=`` of an override.

    >>> value_text({"student.": "", "teacher.": None})
    "{student.: '', teacher.: null}"
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {value_text(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(value_text, value)) + "]"
    text = str(value)
    if isinstance(value, str) and (not _PLAIN.fullmatch(text) or _RESERVED.fullmatch(text)):
        return quoted(text)
    return text


def as_one_text(text: str) -> str:
    """Quote the value of an override ``key=value``, or the items with a ``=`` inside of its list or mapping.

    >>> as_one_text("teacher.checkpoint=epoch=3.ckpt")
    "teacher.checkpoint='epoch=3.ckpt'"
    >>> as_one_text("teacher.members=[{checkpoint: epoch=3.ckpt}]")
    "teacher.members=[{checkpoint: 'epoch=3.ckpt'}]"
    """
    key, _, value = text.partition("=")
    if value[:1] in "[{" and value[-1:] in "]}":
        return f"{key}={re.sub(_HOLDS_EQUALS, lambda match: quoted(match[0]), value)}"
    return f"{key}={quoted(value)}"


def for_shell(text: str) -> str:
    """Quote one argument of a command line where a shell would take it otherwise."""
    if _SHELL_SAFE.fullmatch(text):
        return text
    return shlex.quote(text) if re.search(r'[$`"\\!]', text) else f'"{text}"'


def argument(key: str, value: object) -> str:
    """Return the argument of a command line that sets ``key`` to ``value``, quoted for the shell where needed.

    >>> print(argument("teacher.checkpoint", "epoch=3-step=10.ckpt"))
    "teacher.checkpoint='epoch=3-step=10.ckpt'"
    >>> print(argument("teacher.weights", "ema"))
    teacher.weights=ema
    """
    return for_shell(f"{key}={value_text(value)}")
