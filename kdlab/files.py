"""Files that are whole at any moment, and reading of files that somebody else may have made. Imports no torch.

A file from elsewhere may be a device, a pipe, endless, or made so that a small text stands for a huge object. The
readers here take regular files up to a size, and documents up to a depth and a number of values.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

STALE_SECONDS = 3600
"""Age at which what a killed process left beside a file is removed."""

TEXT_BYTES = 16 * 2**20
"""Largest configuration, result or description that is read, in bytes."""

DOCUMENT_DEPTH = 64
"""Deepest nesting of a YAML document that is read."""

DOCUMENT_VALUES = 1_000_000
"""Most values of a YAML document that is read, with every alias counted as what it stands for."""


class Unreadable(ValueError):
    """Why a file cannot be read as what it should be, in a few words and without its path."""


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[IO[bytes]]:
    """A file to write to that takes the place of ``path`` once it is complete and on the disk.

    It is written beside ``path``: a rename is atomic only within one filesystem, and replaces a link instead of
    writing through it. What killed processes left there is removed once it is old.
    """
    path = Path(path)
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > STALE_SECONDS:
                left.unlink()
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            _claim(file)
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    # The rename itself is on the disk only when the folder is.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")
"""Names that :func:`atomic_write` gives to what it has not finished."""


def remove_leftovers(folder: str | Path) -> None:
    """Remove the temporary files that killed processes left in ``folder`` and the folders below it, at once.

    Those that a process still writes to stay, as do the files of folders that cannot be written to. Links are not
    followed.
    """
    for place, _, names in os.walk(folder):
        for name in filter(_TEMPORARY.fullmatch, names):
            with contextlib.suppress(OSError):
                _remove_if_dead(Path(place, name))


def _remove_if_dead(path: Path) -> None:
    if not stat.S_ISREG(os.lstat(path).st_mode):
        return
    with path.open("r+b") as file:
        if _claim(file):
            path.unlink()


def _claim(file: IO[bytes]) -> bool:
    """Lock an open file until it is closed or its process ends; whether nobody else has locked it.

    Where there are no such locks (Windows), a file that is open cannot be removed anyway.
    """
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def open_to_append(path: str | Path) -> int:
    """A descriptor that appends to ``path``, made if missing; a symbolic link there is an ``OSError``."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0), 0o666)


def make_folder(path: str | Path) -> Path:
    """Make the folder ``path`` inside a folder that is there; a symbolic link in its place is an ``OSError``."""
    path = Path(path)
    with contextlib.suppress(FileExistsError):
        path.mkdir()
    if not stat.S_ISDIR(os.lstat(path).st_mode):
        raise NotADirectoryError(20, "a link or a file stands where a folder of kdlab's own belongs", str(path))
    return path


def expanded(path: str | Path) -> Path:
    """``path`` with the home folder for a leading ``~``; as it is where no user is called so.

    >>> expanded("~nobody-of-this-name.pt").name
    '~nobody-of-this-name.pt'
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def open_regular(path: str | Path) -> BufferedReader:
    """``path`` opened for reading, without waiting for a pipe or reading a device.

    Raises:
        OSError: if it cannot be opened.
        Unreadable: if it is no regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise Unreadable("no regular file")
    return os.fdopen(descriptor, "rb")


def read_bytes(path: str | Path, limit: int = TEXT_BYTES) -> bytes:
    """The content of a regular file of at most ``limit`` bytes.

    Raises:
        OSError: if it cannot be opened or read.
        Unreadable: if it is no regular file, or larger.
    """
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise Unreadable(f"larger than {limit / 2**20:g} MiB")
    return content


def read_json(path: str | Path, limit: int = TEXT_BYTES) -> Any:
    """The value in a JSON file.

    Raises:
        OSError: if it cannot be opened or read.
        Unreadable: if it is no JSON, too large or too deep.
    """
    try:
        return json.loads(read_bytes(path, limit).decode("utf-8"))
    except RecursionError:
        raise Unreadable("nested too deeply") from None
    except UnicodeDecodeError:
        raise Unreadable("no text in UTF-8") from None
    except ValueError as error:  # also of a number of too many digits
        raise Unreadable(f"no JSON: {error}") from None


def read_yaml(path: str | Path, limit: int = TEXT_BYTES) -> Any:
    """The plain value in a YAML file.

    Raises:
        OSError: if it cannot be opened or read.
        Unreadable: if it is no YAML of plain values, or too large or deep, also once its aliases are expanded.
    """
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    content = read_bytes(path, limit)
    try:
        text = content.decode("utf-8")
        _check_document(yaml.parse(text, Loader=loader))
        return yaml.load(text, Loader=loader)
    except UnicodeDecodeError:
        raise Unreadable("no text in UTF-8") from None
    except Unreadable:
        raise
    except (yaml.YAMLError, ValueError, RecursionError, TypeError) as error:
        raise Unreadable(f"no YAML: {' '.join(str(error).split())}") from None


def _check_document(events: Iterator[Any]) -> None:
    """Refuse a document that is deep, recursive, or large once its aliases are expanded; builds nothing."""
    import yaml

    sizes: dict[str, int] = {}
    open_nodes: list[tuple[str | None, int]] = []  # anchor, values inside so far
    for event in events:
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, 1))
            if len(open_nodes) > DOCUMENT_DEPTH:
                raise Unreadable(f"nested more than {DOCUMENT_DEPTH} levels deep")
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, size = open_nodes.pop()
        elif isinstance(event, yaml.ScalarEvent):
            anchor, size = event.anchor, 1
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise Unreadable(f"the alias *{event.anchor} stands inside of what it stands for, or for nothing")
            anchor, size = None, sizes[event.anchor]
        else:
            continue
        if anchor is not None:
            sizes[anchor] = size
        if size > DOCUMENT_VALUES:
            raise Unreadable(f"more than {DOCUMENT_VALUES:,} values once its aliases are expanded")
        if open_nodes:
            outer, inside = open_nodes[-1]
            open_nodes[-1] = (outer, inside + size)


def file_hash(path: str | Path) -> str:
    """SHA-256 of a regular file's content, as ``sha256:<hex>``.

    Raises:
        OSError: if it cannot be opened or read.
        Unreadable: if it is no regular file.
    """
    with open_regular(path) as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
