"""Text files that someone else wrote."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

from kdlab.errors import UserError
from kdlab.system.files import Unreadable, open_regular


def read_text(path: Path, key: str) -> str:
    """Read the text of a UTF-8 file, its line ends as they are.

    Raises:
        UserError: if it is not there, no UTF-8, or empty.
    """
    try:
        with open_regular(path) as file:
            text = file.read().decode("utf-8")
    except OSError as error:
        raise UserError(key, f"{path} cannot be read ({error.strerror})", "a text file") from None
    except Unreadable as error:
        raise UserError(key, f"{path} cannot be read ({error})", "a text file") from None
    except UnicodeDecodeError as error:
        raise UserError(key, f"{path} is no UTF-8 text ({error.reason} at byte {error.start})", "UTF-8") from None
    if not text:
        raise UserError(key, f"{path} is empty", "a file with text")
    return text


def find_files(paths: str | Sequence[str], key: str) -> list[Path]:
    """Find files by path or pattern (``books/**/*.txt``), in the order given; those of a pattern by name.

    Raises:
        UserError: naming the path or pattern that fits no file.
    """
    files: list[Path] = []
    for path in [paths] if isinstance(paths, str | Path) else paths:
        name = str(Path(path).expanduser())
        matches = [name] if Path(name).is_file() else sorted(glob.glob(name, recursive=True))
        here = [match for match in matches if Path(match).is_file()]
        if not here:
            raise UserError(key, f"{path}: no such file", "a text file, a list of them, or a pattern")
        files += [Path(p) for p in here]
    if not files:
        raise UserError(key, "names no file", "a text file, a list of them, or a pattern")
    return files


def read_texts(paths: str | Sequence[str], key: str) -> list[str]:
    """Read the text of each file that :func:`find_files` finds."""
    return [read_text(path, key) for path in find_files(paths, key)]
