"""What a user can get wrong, said in one line.

Every message names the key, the value and what is accepted, so that it can be acted on without a traceback.
The command line prints it and exits with status 2.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable

from kdlab.system.terminal import one_line

NO_ROOM = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))
"""Errors of a disk, a quota or a file size limit that is reached."""

NOT_WRITABLE = (*NO_ROOM, errno.EROFS, errno.EIO)
"""Errors by which a disk says that nothing can be written."""


class UserError(ValueError):
    """A mistake of the user's: one line that names the key, the value and what is accepted."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class Busy(UserError):
    """What is asked for is being done by another process right now."""


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
    """An unexpected error in words: what its notes say it happened in, its kind, and its message."""
    lead = "".join(f"{note}: " for note in getattr(error, "__notes__", ()))
    return f"{lead}{type(error).__name__}: {error}"


def nearest(value: object, accepted: Iterable[object], n: int = 3) -> list[str]:
    """The accepted names most like ``value``, best first (possibly none)."""
    return difflib.get_close_matches(str(value), [str(a) for a in accepted], n=n, cutoff=0.5)


def misspelt(name: str, known: Iterable[str]) -> str | None:
    """The known name that ``name`` is a slip of, whatever its case; None where it is another word.

    >>> misspelt("anwser", ["answer", "gold"]), misspelt("choices", ["answer", "gold"])
    ('answer', None)
    """
    found = difflib.get_close_matches(name.casefold(), list(known), n=1, cutoff=0.8)
    return found[0] if found else None


def unknown(key: str, value: object, accepted: Iterable[object], what: str = "value") -> UserError:
    """The error for a name that is not there, with the nearest ones first.

    >>> str(unknown("student", "resnt8", ["resnet8", "resnet20", "mlp"]))
    "student: unknown value 'resnt8'; nearest: resnet8; accepted: mlp, resnet20, resnet8"
    """
    names = sorted(str(a) for a in accepted)
    close = nearest(value, names)
    hint = f" nearest: {', '.join(close)};" if close else ""
    shown = names if len(names) <= 40 else [*names[:40], f"... ({len(names)} in all)"]
    return UserError(f"{key}: unknown {what} {str(value)!r};{hint} accepted: {', '.join(shown) or 'nothing'}")
