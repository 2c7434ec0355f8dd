"""Output file of traces: one a line, whole after any kill, and all made with the same settings."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from filelock import Timeout

from kdlab.errors import Busy, UserError
from kdlab.system.files import atomic_write, lock_file, open_regular, open_to_append, read_json

FORMAT = 1
"""Version of the manifest."""

_SYNC_SECONDS = 5.0


class Output:
    """JSONL file that traces are appended to, with an index of those already there.

    Beside ``OUT`` stand ``OUT.manifest.json`` (what was asked, and how), and, where questions stayed without an answer,
    ``OUT.failed.jsonl``.

    Args:
        path: path of the JSONL file, new or of an earlier run.
        settings: settings that determine the traces; an earlier run must have had the same.

    Attributes:
        done: set of (question key, sample) of every trace in the file.

    Raises:
        UserError: if the file cannot be written, is not of this program, or has other settings; nothing is written
            by then.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        _check_writable(path)
        self.path = path
        self.settings: dict[str, Any] = json.loads(json.dumps({"format": FORMAT, **settings}))
        self.manifest = path.with_name(f"{path.name}.manifest.json")
        self.failures = path.with_name(f"{path.name}.failed.jsonl")
        self.done: set[tuple[str, int]] = set()
        self._whole = 0
        self._file: IO[bytes] | None = None
        self._synced = 0.0
        self._scan()

    def _scan(self) -> None:
        """Read what is already there: settings, keys, and the length of the whole lines."""
        self._check_settings()
        self.done, self._whole = set(), 0
        for _, row in self.rows():
            self.done.add((row["key"], row["sample"]))

    def rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (number, trace) of every whole line; one that a kill has torn off at the end is left out.

        Raises:
            UserError: for any other line that is not a trace.
        """
        if not self.path.exists():
            return
        place = 0
        with open_regular(self.path) as file:
            for number, raw in enumerate(file, 1):
                try:
                    row = json.loads(raw)
                    assert isinstance(row["key"], str) and isinstance(row["sample"], int)
                except (ValueError, RecursionError, KeyError, TypeError, AssertionError):
                    if not raw.endswith(b"\n"):
                        return
                    raise UserError(
                        self.path, f"line {number} is no trace of this command", "repair it, or another OUT"
                    ) from None
                place += len(raw)
                self._whole = max(self._whole, place)
                yield number, row

    def _check_settings(self) -> None:
        if not self.manifest.exists():
            if self.path.exists() and self.path.stat().st_size:
                raise UserError(self.path, f"exists, and no {self.manifest.name} says how it was made", "a new file")
            return
        try:
            recorded = read_json(self.manifest)
            assert isinstance(recorded, dict)
        except (OSError, ValueError, AssertionError):
            raise UserError(self.manifest, "damaged", "the file as it was written, or another OUT") from None
        for name in dict.fromkeys([*self.settings, *recorded]):
            before, now = recorded.get(name), self.settings.get(name)
            if before != now:
                raise UserError(
                    self.path,
                    f"was written with {name} {_short(before)}, and now it is {_short(now)}",
                    "the same settings, or another OUT",
                )

    def __enter__(self) -> Output:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock = lock_file(f"{self.path}.lock")
            self._lock.acquire(timeout=0)
        except Timeout:
            raise Busy(self.path, "another process writes to it", "wait for it, or another OUT") from None
        except OSError as error:
            raise UserError(f"{self.path}.lock", f"cannot be locked ({error})", "without that file") from None
        self._scan()  # again: it may have been someone else's until now
        if not self.manifest.exists():
            with atomic_write(self.manifest) as file:
                file.write((json.dumps(self.settings, indent=1, ensure_ascii=False) + "\n").encode())
        self._file = os.fdopen(open_to_append(self.path), "ab")
        if self._file.tell() > self._whole:
            self._file.truncate(self._whole)
        if self._whole and not self._ends_a_line():
            self._file.write(b"\n")  # a whole trace that lost only its end
        return self

    def _ends_a_line(self) -> bool:
        with open_regular(self.path) as file:
            file.seek(self._whole - 1)
            return file.read(1) == b"\n"

    def __exit__(self, *error: object) -> None:
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        self._lock.release()

    def add(self, key: tuple[str, int], line: bytes) -> None:
        """Append a trace; the operating system has it when this returns, and the disk within seconds.

        Args:
            key: hash of the question, and the number of the sample.
            line: line of the trace, with its line break.
        """
        assert self._file is not None, "the output is not open"
        self._file.write(line)
        self._file.flush()
        self.done.add(key)
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def write_failures(self, rows: list[dict[str, Any]]) -> None:
        """Write which questions stayed without an answer; without any, remove the file of an earlier run."""
        if not rows:
            self.failures.unlink(missing_ok=True)
            return
        with atomic_write(self.failures) as file:
            file.writelines((json.dumps(row, ensure_ascii=False) + "\n").encode() for row in rows)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]} ..."


def _check_writable(path: Path) -> None:
    """Check that a file can be written.

    Raises:
        UserError: if ``path`` is a folder, or it or the folder it would come into cannot be written to.
    """
    if path.is_dir():
        raise UserError(path, "is a folder", "a file to write to")
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise UserError(path, "is a link, a pipe or a device", "a file to write to")
    there = path if path.exists() else next(p for p in path.absolute().parents if p.exists())
    if not os.access(there, os.W_OK) or (there != path and not there.is_dir()):
        raise UserError(path, f"cannot be written to ({there})", "a file that can")
