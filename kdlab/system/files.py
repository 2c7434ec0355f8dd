"""Files that are whole at any moment, and reading of files that somebody else may have made. Imports no torch.

A file from elsewhere may be a device, a pipe, endless, or made so that a small text stands for a huge object. The
readers here take regular files up to a size, and documents up to a depth and a number of values.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator, Mapping
from io import BufferedReader, BufferedWriter, FileIO
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from filelock import FileLock

from kdlab.errors import NOT_WRITABLE, CannotWrite

STALE_SECONDS = 3600
"""Age in seconds at which what a killed process left beside a file is removed."""

TEXT_BYTES = 16 * 2**20
"""Largest configuration, result or description that is read, in bytes."""

DOCUMENT_DEPTH = 64
"""Deepest nesting of a YAML or JSON document that is read."""

DOCUMENT_VALUES = 200_000
"""Largest number of values of a YAML document: an alias counts as its target, and 100 characters as one value."""

NUMBER_SIGNS = 400
"""Longest number of a YAML document that is read, in characters."""

LINE_BYTES = 2**20
"""Longest line of a file of JSON objects that is read, in bytes."""


class Unreadable(ValueError):
    """Reason that a file cannot be read as what it should be, in a few words and without its path."""


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[IO[bytes]]:
    """Yield a file to write to that takes the place of ``path`` once it is complete and on the disk.

    It is written beside ``path``: a rename is atomic only within one filesystem, and replaces a link instead of
    writing through it. What killed processes left there is removed once it is old.

    Raises:
        CannotWrite: if the disk is full or read-only, whatever a library that writes makes of that.
    """
    path = Path(path)
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > STALE_SECONDS:
                left.unlink()
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    noticed: list[OSError] = []
    try:
        with BufferedWriter(_Watched(temporary, noticed)) as file:
            _claim(file)
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            noticed.append(error)
        for cause in noticed:
            if cause.errno in NOT_WRITABLE and isinstance(error, Exception):
                raise CannotWrite(path, cause) from error
        raise
    # The rename itself is on the disk only when the folder is.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class _Watched(FileIO):
    """New file that records why writing failed: ``torch.save`` makes a RuntimeError of it without the reason."""

    def __init__(self, path: Path, noticed: list[OSError]) -> None:
        super().__init__(path, "xb")
        self._noticed = noticed

    def write(self, data: Any, /) -> int:  # type: ignore[override]
        try:
            return super().write(data)
        except OSError as error:
            self._noticed.append(error)
            raise


def reserve(path: str | Path, size: int) -> None:
    """Make sure that ``size`` bytes of the file ``path`` can be written.

    Writing into a memory-mapped file without room kills the process; here it is an ``OSError``.
    """
    if hasattr(os, "posix_fallocate") and size:
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, size)


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
    """Lock an open file until it is closed or its process ends; return whether nobody else has locked it.

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


def write_text(path: str | Path, text: str) -> None:
    """Write a small file whole or not at all; half a surrogate pair, which UTF-8 lacks, is spelled out."""
    with atomic_write(path) as file:
        file.write(text.encode("utf-8", "backslashreplace"))


def open_to_append(path: str | Path, read: bool = False) -> int:
    """Return a descriptor that appends to ``path``, made if missing; a link, pipe or device there is an ``OSError``.

    Args:
        path: the file.
        read: whether the descriptor reads as well.
    """
    refuse_link(path)
    flags = (os.O_RDWR if read else os.O_WRONLY) | os.O_CREAT | os.O_APPEND
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o666)


def refuse_link(path: str | Path) -> None:
    """Raise ``OSError`` if something stands at ``path`` that is no regular file: a link, a pipe, a folder."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(os.lstat(path).st_mode):
            message = "a link or something else stands where a file of kdlab's own belongs"
            raise OSError(errno.EINVAL, message, str(path))


def lock_file(path: str | Path) -> FileLock:
    """Return a lock on ``path`` between processes, not yet taken; a link or pipe in its place is an ``OSError``."""
    from filelock import FileLock

    refuse_link(path)  # some versions of the library follow links, and empty what they lead to
    return FileLock(path)


def make_folder(path: str | Path) -> Path:
    """Make the folder ``path`` inside a folder that is there; a symbolic link in its place is an ``OSError``."""
    path = Path(path)
    with contextlib.suppress(FileExistsError):
        path.mkdir()
    if not stat.S_ISDIR(os.lstat(path).st_mode):
        raise NotADirectoryError(
            errno.ENOTDIR, "a link or a file stands where a folder of kdlab's own belongs", str(path)
        )
    return path


def expanded(path: str | Path) -> Path:
    """Return ``path`` with the home folder for a leading ``~``; unchanged where there is no user of that name.

    >>> expanded("~nobody-of-this-name.pt").name
    '~nobody-of-this-name.pt'
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def links_inside(folder: Path, skip: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Yield all paths below ``folder`` that are neither folders nor regular files, such as links and pipes.

    Args:
        folder: folder to search; it may be a link itself.
        skip: names of folders at the top that are not looked into.
    """
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_dir(follow_symlinks=False):
            if entry.name not in skip:
                yield from links_inside(Path(entry.path))
        elif not entry.is_file(follow_symlinks=False):
            yield Path(entry.path)


def open_regular(path: str | Path) -> BufferedReader:
    """Open the regular file ``path`` for reading, without waiting for a pipe or reading a device.

    Raises:
        OSError: if it cannot be opened.
        Unreadable: if it is no regular file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except ValueError:  # a NUL in the name
        raise Unreadable("no name of a file") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise Unreadable("no regular file")
    return os.fdopen(descriptor, "rb")


def open_text(path: str | Path) -> TextIO:
    """Open a regular file as UTF-8 text, with or without byte order mark, line ends unchanged (for ``csv``).

    Raises:
        OSError: if it cannot be opened.
        Unreadable: if it is no regular file.
    """
    return io.TextIOWrapper(open_regular(path), encoding="utf-8-sig", newline="")


def read_bytes(path: str | Path, limit: int = TEXT_BYTES) -> bytes:
    """Return the content of a regular file of at most ``limit`` bytes.

    Raises:
        OSError: if it cannot be opened or read.
        Unreadable: if it is no regular file, or larger.
    """
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise Unreadable(f"larger than {limit / 2**20:g} MiB")
    return content


def read_text(path: str | Path, limit: int = TEXT_BYTES) -> str:
    """Return the UTF-8 text in a regular file of at most ``limit`` bytes, its line ends unchanged.

    Raises:
        OSError: if it cannot be opened or read.
        Unreadable: if it is no regular file, larger, or no UTF-8.
    """
    try:
        return read_bytes(path, limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise Unreadable(f"no text in UTF-8 ({error.reason} at byte {error.start})") from None


def read_json(path: str | Path, limit: int = TEXT_BYTES) -> Any:
    """Return the value in a JSON file.

    Raises:
        OSError: if it cannot be opened or read.
        Unreadable: if it is no JSON, too large or too deep.
    """
    return parse_json(read_text(path, limit))


def parse_json(text: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        Unreadable: if it is no JSON, or too deep.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise Unreadable("nested too deeply") from None
    except ValueError as error:  # a number of too many digits is a plain ValueError
        raise Unreadable(f"no JSON: {error}") from None
    if text.count("[") + text.count("{") > DOCUMENT_DEPTH:
        _check_depth(value)
    return value


def _check_depth(value: object) -> None:
    """Refuse a JSON value that is nested too deeply to be walked by recursion."""
    level, depth = [value], 0
    while level := [one for one in level if isinstance(one, (dict, list))]:
        depth += 1
        if depth > DOCUMENT_DEPTH:
            raise Unreadable(f"nested more than {DOCUMENT_DEPTH} levels deep")
        level = [inner for one in level for inner in (one.values() if isinstance(one, dict) else one)]


def read_json_lines(path: str | Path) -> Iterator[dict[str, Any] | None]:
    """Yield the JSON object in each line of a file, in order; None for a line that holds none, or was cut off.

    Raises:
        OSError: if it cannot be opened or read.
        Unreadable: if it is no regular file.
    """
    with open_regular(path) as file:
        while line := file.readline(LINE_BYTES + 1):
            if not line.strip():
                continue
            value = None
            if len(line) <= LINE_BYTES:
                with contextlib.suppress(Unreadable, UnicodeDecodeError):
                    value = parse_json(line.decode("utf-8"))
            while len(line) > LINE_BYTES and not line.endswith(b"\n"):  # the rest of a line that is too long
                line = file.readline(LINE_BYTES + 1)
            yield value if isinstance(value, dict) else None


def read_yaml(path: str | Path, limit: int = TEXT_BYTES) -> Any:
    """Return the plain value in a YAML file.

    Raises:
        OSError: if it cannot be opened or read.
        Unreadable: if it is no YAML of plain values, or too large or deep, also once its aliases are expanded.
    """
    return parse_yaml(read_text(path, limit))


def parse_yaml(text: str) -> Any:
    """Return the plain value of a YAML text.

    Raises:
        Unreadable: if it is no YAML of plain values, or too large or deep, also once its aliases are expanded.
    """
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        check_yaml(text)
        return yaml.load(text, Loader=loader)
    except Unreadable:
        raise
    except (yaml.YAMLError, ValueError, RecursionError, TypeError, AttributeError, OverflowError) as error:
        raise Unreadable(f"no YAML: {' '.join(str(error).split())}") from None


def check_yaml(text: str, values: int = DOCUMENT_VALUES) -> None:
    """Refuse a YAML document that is deep, recursive, or large once its aliases are expanded; builds nothing.

    Args:
        text: the document.
        values: largest number of values that it may hold.

    Raises:
        Unreadable: what it is.
        yaml.YAMLError: if it is no YAML.
    """
    import yaml

    _check_document(yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)), values)


def _check_scalar(event: Any) -> None:
    """Refuse a number with so many digits that parsing or writing it would not end."""
    quoted = not event.implicit[0] and event.tag is None
    if len(event.value) <= NUMBER_SIGNS or quoted or event.value[0] not in "+-.0123456789":
        return
    if not any(sign.isspace() for sign in event.value):
        raise Unreadable(f"a number of {len(event.value)} characters")


def read_mapping(path: str | Path, limit: int = TEXT_BYTES) -> dict[str, Any]:
    """Return the mapping in a YAML file, with texts as its keys at every level.

    Raises:
        OSError: if it cannot be opened or read.
        Unreadable: if it is something else, or as :func:`read_yaml` says.
    """
    content = read_yaml(path, limit)
    if not isinstance(content, dict):
        raise Unreadable(f"holds {'nothing' if content is None else type(content).__name__}; accepted: a mapping")
    inside: list[Any] = [content]
    while inside:
        value = inside.pop()
        if isinstance(value, Mapping):
            if strange := [key for key in value if not isinstance(key, str)]:
                raise Unreadable(f"has the key {strange[0]!r}; accepted: texts as keys")
            inside += value.values()
        elif isinstance(value, list):
            inside += value
    return content


def _check_document(events: Iterator[Any], most: int) -> None:
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
            anchor, size = event.anchor, 1 + len(event.value) // 100
            _check_scalar(event)
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise Unreadable(f"the alias *{event.anchor} stands inside of what it stands for, or for nothing")
            anchor, size = None, sizes[event.anchor]
        else:
            continue
        if anchor is not None:
            sizes[anchor] = size
        if size > most:
            raise Unreadable(f"more than {most:,} values once its aliases are expanded")
        if open_nodes:
            outer, inside = open_nodes[-1]
            open_nodes[-1] = (outer, inside + size)
            if inside + size > most:
                raise Unreadable(f"more than {most:,} values once its aliases are expanded")


def file_hash(path: str | Path) -> str:
    """Return the SHA-256 of a regular file's content, as ``sha256:<hex>``.

    Raises:
        OSError: if it cannot be opened or read.
        Unreadable: if it is no regular file.
    """
    with open_regular(path) as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
