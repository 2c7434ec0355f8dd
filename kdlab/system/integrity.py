"""Hashes of files that later commands rely on, written beside them and checked when they are used.

A run folder, and the folder of a kept network, name in ``result.json`` the SHA-256 of their weights and descriptions
(``files``), and a checksum of everything else that it says (``checksum``). Caches name their arrays' in the manifest.
So a damaged file is found, and so is a whole one that belongs to another run. Folders without hashes, which earlier
versions wrote, are taken as they are. Imports no torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kdlab.errors import UserError
from kdlab.system.files import Unreadable, expanded, file_hash, read_json

log = logging.getLogger("kdlab")

RESULT = "result.json"

FILES, CHECKSUM = "files", "checksum"
"""Entries of ``result.json``; a cache's manifest has the first of them."""

KEPT = (
    *("model.json", "stages.yaml", "tokenizer.json", "tokenizer_config.json"),
    *("*.pt", "*.safetensors", "adapter/*", "checkpoints/best.pt"),
)
"""Files that later commands read in the folder of a run, of one of its stages, or of a kept network.

For ``config.yaml`` the result has a hash of its own, which leaves out what changes no number.
"""

ON_PURPOSE = f"or, if it was edited on purpose, {RESULT} without its entries {FILES!r} and {CHECKSUM!r}"
"""Advice on how to accept a file that is not what was written, for messages."""

LEVELS = 4
"""Number of folders above a file that may hold its ``result.json``; ``stages/NAME/checkpoints/best.pt`` needs all."""

_KNOWN: dict[tuple[int, ...], str] = {}
"""Map of (device, inode, size and times of a file) → its hash."""


def known_hash(path: str | Path) -> str:
    """Return :func:`~kdlab.system.files.file_hash`, computed once a process as long as the file does not change.

    For large files that every job of a sweep opens: 1.5 GiB take a second.
    """
    status = os.stat(path)
    key = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    if key not in _KNOWN:
        _KNOWN[key] = file_hash(path)
    return _KNOWN[key]


# ---- result.json --------------------------------------------------------------------------------------------------


def sealed(folder: Path, result: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``result`` with hashes of what ``folder`` holds now, and a checksum of all its entries."""
    files = {str(path.relative_to(folder).as_posix()): file_hash(path) for path in _kept(folder)}
    content = {**{key: value for key, value in result.items() if key != CHECKSUM}, FILES: files}
    return {**content, CHECKSUM: checksum(content)}


def _kept(folder: Path) -> list[Path]:
    paths = {path for place in ("", "stages/*/") for name in KEPT for path in folder.glob(place + name)}
    return sorted(path for path in paths if path.is_file() and not path.is_symlink())


def checksum(result: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a result's content, whatever its layout as text, without its own entry ``checksum``."""
    content = json.loads(json.dumps({key: value for key, value in result.items() if key != CHECKSUM}))
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def damage(result: Mapping[str, Any]) -> str:
    """Return why a result that was read is not as it was written; empty where it is, or has no checksum."""
    recorded = result.get(CHECKSUM)
    try:
        fits = recorded is None or recorded == checksum(result)
    except (ValueError, RecursionError):  # what no run wrote
        fits = False
    return "" if fits else "its checksum does not fit what it says"


def changed(folder: Path, result: Mapping[str, Any]) -> list[Path]:
    """Return the files of ``folder`` that exist with another hash than the one in ``result``."""
    files = result.get(FILES)
    paths = []
    for name, expected in files.items() if isinstance(files, dict) else ():
        with contextlib.suppress(OSError, Unreadable):
            if file_hash(folder / name) != expected:
                paths.append(folder / name)
    return paths


# ---- the files that it names --------------------------------------------------------------------------------------


def check(path: str | Path, key: str = "", cure: str = "") -> None:
    """Check a file against its hash in the ``result.json`` beside or above it; without one, accept it as it is.

    Args:
        path: path of the file. One that is missing is for its reader to complain about.
        key: beginning of the message, such as the config key that the path came from.
        cure: other remedy that is accepted, for the message.

    Raises:
        UserError: if its content is another one.
    """
    path = expanded(path)
    record = _record(path)
    if record is None:
        return
    result, expected, why = record
    try:
        if file_hash(path) == expected:
            return
    except FileNotFoundError:
        return
    except (OSError, Unreadable) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{_lead(key)}{path} cannot be read ({reason})") from None
    if why:
        raise UserError(
            f"{_lead(key)}{result} is damaged ({why}), and {path} is not the file that it names; accepted: both as "
            f"they were{_or(cure)}"
        )
    raise UserError(
        f"{_lead(key)}{path} is not the file that was written",
        (f"its SHA-256 is not the one in {result} (it is damaged, edited, or of another run)"),
        f"the file as it was{_or(cure)}, {ON_PURPOSE}",
    )


def _lead(key: str) -> str:
    return f"{key}: " if key else ""


def _or(cure: str) -> str:
    return f", or {cure}" if cure else ""


def _record(path: Path) -> tuple[Path, str, str] | None:
    """Return the nearest ``result.json`` that names a file, the hash there, and what damage that result has, if any."""
    try:
        places = dict.fromkeys((Path(os.path.abspath(path)), path.resolve()))
    except (OSError, ValueError, RuntimeError):  # a name that no file has
        return None
    for place in places:
        for folder in list(place.parents)[:LEVELS]:
            result = _shortest(folder / RESULT)
            if not os.path.lexists(result):
                continue
            try:
                content = read_json(result)
            except (OSError, ValueError) as error:
                log.warning("%s is damaged (%s): %s cannot be held against it", result, error, path)
                break
            name = place.relative_to(folder).as_posix()
            files = content.get(FILES) if isinstance(content, dict) else None
            expected = files.get(name) if isinstance(files, dict) else None
            if isinstance(expected, str):
                return result, expected, damage(content)
            break  # of an earlier version, or a file that is not the run's
    return None


def _shortest(path: Path) -> Path:
    """Return a path relative to the working folder, if it is below it."""
    try:
        return path.relative_to(Path.cwd())
    except (OSError, ValueError):
        return path


# ---- the manifest of a cache --------------------------------------------------------------------------------------


def hashes(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Return a map of name → hash of files in ``folder``, for a manifest."""
    return {name: known_hash(folder / name) for name in names}


def check_manifest_files(folder: Path, said: Mapping[str, Any], names: Iterable[str], key: str) -> None:
    """Check the files of a cache against the hashes in its manifest; without hashes, log that they are not checked.

    A cache that does not fit is refused and not made again, even if it could be: what damages a file may be a disk
    that fails, other processes may be reading it at this moment, and a cache may have cost hours or money. Removing it
    is the user's to do.

    Args:
        folder: folder of the cache.
        said: content of its manifest.
        names: names of the files that are about to be read.
        key: beginning of a message.

    Raises:
        UserError: if a file is missing, or not what was written.
    """
    files = said.get(FILES)
    if files is None:
        log.info(
            "%s: %s carries no hashes (an earlier version wrote it), so that its files are not checked", key, folder
        )
        return
    for name in names:
        try:
            whole = isinstance(files, dict) and known_hash(folder / name) == files.get(name)
        except (OSError, Unreadable) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(key, f"{folder / name} cannot be read ({reason}); {_remove(folder)}") from None
        if not whole:
            raise UserError(
                key,
                (
                    f"{folder / name} is damaged, or of another cache: its SHA-256 is not the one in "
                    f"the manifest; {_remove(folder)}"
                ),
            )


def _remove(folder: Path) -> str:
    return f"accepted: a whole cache; remove the folder {folder}: it is made again"
