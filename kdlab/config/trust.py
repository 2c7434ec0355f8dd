"""Whose code may be built now, and whether it may do more than read. Imports no torch."""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kdlab.config.signatures import find

__all__ = ["allowed", "is_own", "read_only", "trust"]


@dataclass(frozen=True)
class Trust:
    """Limits of what may be built: whether the user's own modules, and whether only parts that write no file."""

    user_modules: bool = False
    read_only: bool = False


_trust = Trust()


@contextmanager
def trust(*, user_modules: bool = False, read_only: bool = False) -> Iterator[None]:
    """Set what ``check`` and ``build`` accept, and what the parts that are built may do.

    A user's module is one that Python finds outside its standard library and site-packages: in the working
    folder, on PYTHONPATH. The command line trusts them; someone else's run folder does not get them.

    Args:
        user_modules: accept the user's own modules; the working folder is looked in.
        read_only: forbid what is built to write files or use the network, and take whatever a constructor raises for a
            mistake of the description: for folders that somebody else may have made.
    """
    global _trust
    if user_modules and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # ``python -m`` does so, the console script does not
    before, _trust = _trust, Trust(user_modules, read_only)
    try:
        yield
    finally:
        _trust = before


def allowed() -> Trust:
    """Return the limits of what may be built now."""
    return _trust


def read_only() -> bool:
    """Return whether what is built now may neither write files nor use the network."""
    return _trust.read_only


def is_own(module: str) -> bool:
    """Return whether a module is the user's own, and trusted."""
    return _trust.user_modules and _is_users(module)


def _is_users(module: str) -> bool:
    """Return whether a module is the user's own: neither kdlab's, nor Python's, nor installed."""
    if not module or module.split(".")[0] == "kdlab":
        return False
    path = find(module)
    if path is None:
        return find(module.split(".")[0]) is None  # not there at all: let the lookup say so
    path = path.resolve()
    if {"site-packages", "dist-packages"} & set(path.parts):
        return False
    library = sysconfig.get_paths()
    return not any(path.is_relative_to(Path(library[k]).resolve()) for k in ("stdlib", "platstdlib", "purelib"))
