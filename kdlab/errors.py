"""Mistakes that a user can make, each said in one line.

Every message names the key, the value and what is accepted, so that it can be acted on without a traceback.
The command line prints it and exits with status 2.
"""

from __future__ import annotations

import difflib
import errno
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Self

from kdlab.plain_text import one_line

NO_ROOM = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))
"""Errors of a disk, a quota or a file size limit that is reached."""

NOT_WRITABLE = (*NO_ROOM, errno.EROFS, errno.EIO)
"""Errors by which a disk says that nothing can be written."""


class UserError(ValueError):
    """A mistake of the user's, in one line: where it is, what was found there, and what is accepted.

    Args:
        key: the config key, file or argument that is wrong; alone, the whole message.
        found: value that stands there, and why it is refused; a value that is no text is shown as YAML would have it.
        accepted: values that may stand there, in words; empty where ``found`` says all.

    >>> error = UserError("rank", 0, "a whole number, at least 1")
    >>> str(error)
    'rank: 0; accepted: a whole number, at least 1'
    >>> str(error.under("adapter"))
    'adapter.rank: 0; accepted: a whole number, at least 1'
    """

    def __init__(self, key: object, found: object = "", accepted: object = "") -> None:
        self.key, self.found, self.accepted = one_line(key), one_line(shown(found)), one_line(accepted)
        text = f"{self.key}: {self.found}" if self.found else self.key
        super().__init__(f"{text}; accepted: {self.accepted}" if self.accepted else text)

    def under(self, owner: str) -> Self:
        """Return the same mistake in a part of ``owner``: its key becomes ``owner.key``."""
        if not owner:
            return self
        if not self.found:
            return type(self)(owner, self.key, self.accepted)
        return type(self)(f"{owner}.{self.key}", self.found, self.accepted)

    def inside(self, place: object) -> Self:
        """Return the same mistake, found inside of a file, a row of a table or a part of a command."""
        return type(self)(place, f"{self.key}: {self.found}" if self.found else self.key, self.accepted)

    def with_hint(self, hint: str) -> Self:
        """Return the same mistake with something to try, after what is accepted."""
        return type(self)(self.key, self.found, f"{self.accepted}{hint}")

    def at(self, key: str) -> Self:
        """Return the same mistake under another key."""
        return type(self)(key, self.found or self.key, self.accepted)


@contextmanager
def within(owner: str) -> Iterator[None]:
    """Lead the key of a mistake with the part that it is in: ``teacher.`` before ``data.labels``."""
    try:
        yield
    except UserError as error:
        raise error.under(owner) from None


def shown(value: object) -> str:
    """Return a value as it is typed in a config; text as it is.

    >>> shown(None), shown(True), shown(0.5), shown([1, None])
    ('null', 'true', '0.5', '[1, null]')
    """
    if isinstance(value, str | float):
        return str(value)
    return json.dumps(value, default=str, ensure_ascii=False)


class Busy(UserError):
    """Work that is asked for and that another process is doing right now."""


class RunFailed(RuntimeError):
    """A run that started and could not go on; what was written stays, and the message says how to continue."""


class CannotWrite(RunFailed):
    """A file that could not be written: the disk is full or read-only; what was there before is as it was."""

    def __init__(self, path: object, error: OSError) -> None:
        reason = error.strerror or str(error)
        if error.errno in NO_ROOM:
            reason = f"the disk is full ({reason})"
        where = f"cannot write {path}: " if path else ""
        super().__init__(f"{where}{reason}; what was written before is kept; make room, and go on with resume=auto")


def told(error: BaseException) -> str:
    """Return an unexpected error in words: what its notes say it happened in, its kind, and its message."""
    lead = "".join(f"{note}: " for note in getattr(error, "__notes__", ()))
    return f"{lead}{type(error).__name__}: {error}"


def nearest(value: object, accepted: Iterable[object], n: int = 3) -> list[str]:
    """Return the accepted names most like ``value``, best first (possibly none)."""
    return difflib.get_close_matches(str(value), [str(a) for a in accepted], n=n, cutoff=0.5)


def misspelt(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that ``name`` is a slip of, whatever its case; None where it is another word.

    >>> misspelt("anwser", ["answer", "gold"]), misspelt("choices", ["answer", "gold"])
    ('answer', None)
    """
    close = difflib.get_close_matches(name.casefold(), list(known), n=1, cutoff=0.8)
    return close[0] if close else None


def unknown(key: str, value: object, accepted: Iterable[object], what: str = "value") -> UserError:
    """Return the error for a name that is not there, with the nearest ones first.

    >>> str(unknown("student", "resnt8", ["resnet8", "resnet20", "mlp"]))
    "student: unknown value 'resnt8'; nearest: resnet8, resnet20; accepted: mlp, resnet20, resnet8"
    """
    names = sorted(str(a) for a in accepted)
    close = nearest(value, names)
    hint = f"; nearest: {', '.join(close)}" if close else ""
    listed = names if len(names) <= 40 else [*names[:40], f"... ({len(names)} in all)"]
    return UserError(key, f"unknown {what} {str(value)!r}{hint}", ", ".join(listed) or "nothing")
