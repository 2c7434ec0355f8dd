"""The files of a cache of tokens: what a row takes on the disk, and a writer that can be killed at any point.

``rows.bin`` holds records of one size, ``index.bin`` says which of them belong to which sequence. Both only grow. Rows
reach the disk before the index names them, so that whatever the index names is whole; the rest is cut off.
``checks.bin`` holds a checksum of each sequence's records, for a writer that goes on. The manifest stands in
``writing.json``, which gets the hashes of both files and is called ``manifest.json`` once the cache is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdlab.errors import UserError
from kdlab.system.files import (
    Unreadable,
    atomic_write,
    lock_file,
    open_regular,
    open_to_append,
    read_json,
    remove_leftovers,
)
from kdlab.system.integrity import FILES, check_manifest_files, hashes
from kdlab.teachers.cache.rows import check_manifest
from kdlab.teachers.cache.sequences import positions_check, sequence_key

INDEX = np.dtype([("key", "<u8", 2), ("start", "<u8"), ("rows", "<u4"), ("check", "<u4"), ("seal", "<u4")])
"""Index entry of a sequence, 36 bytes: its key, its first record, the number of its records, a checksum of their
positions, and one of all that, which a torn entry lacks."""

LEAST = float(np.finfo(np.float16).min)
"""Least logarithm that is stored: as probabilities smaller ones are 0, in any precision."""

WRITING, COMPLETE = "writing.json", "manifest.json"

ROWS, INDEXED, CHECKS = "rows.bin", "index.bin", "checks.bin"

FLUSH_BYTES = 4 * 2**20
SPARE_BYTES = 16 * 2**20


@dataclass(frozen=True)
class TokenManifest:
    """Description of a cache of tokens; two with equal manifests hold the same numbers for the same sequence.

    Raises:
        UserError: if an entry cannot be.
    """

    teacher: str
    """Hash of the teacher's weights, or the name of an endpoint's model."""
    data: str
    """Fingerprint of the data."""
    classes: int
    """Size of the vocabulary."""
    k: int = 32
    """Number of classes kept or drawn a row; where all of the vocabulary are kept, plain logits are stored."""
    form: str = "topk"
    """Form of the rows: ``topk``, or ``sampled``, drawn in proportion to p to the power ``flatten``."""
    dtype: str = "float16"
    """Type of logarithms and weights. float16 keeps 11 bits: a logarithm of -10 is known to 0.004, so p to 0.4 %."""
    seed: int = 0
    """Seed of the draws; each sequence has its own draws, whatever the order."""
    flatten: float = 1.0
    """Power of the probabilities in the draws; see :meth:`~kdlab.functional.Sampled.of`."""
    splits: tuple[str, ...] = ("train",)

    def __post_init__(self) -> None:
        accepted = {
            "form": (self.form in ("topk", "sampled"), "topk, sampled"),
            "dtype": (self.dtype in ("float16", "float32"), "float16, float32"),
            "classes": (self.classes >= 2, "at least 2"),
            "k": (self.k >= 1 and (self.form == "sampled" or self.k <= self.classes), f"from 1 to {self.classes}"),
        }
        for name, (right, what) in accepted.items():
            if not right:
                raise UserError(f"teacher.cache.{name}", f"{getattr(self, name)!r}", what)

    @property
    def plain_logits(self) -> bool:
        """Whether rows are logits of all classes."""
        return self.form == "topk" and self.k == self.classes

    @property
    def record(self) -> np.dtype:
        """One row on the disk: ``ids``, ``values`` (logarithms, weights or logits), and ``rest`` (tail or entropy)."""
        if self.plain_logits:
            return np.dtype([("values", self.dtype, (self.k,))])
        ids = "<u2" if self.classes <= 2**16 else "<i4"
        return np.dtype([("ids", ids, (self.k,)), ("values", self.dtype, (self.k,)), ("rest", "<f4")])

    @property
    def key(self) -> str:
        """A short name for the cache's folder."""
        return hashlib.sha256(json.dumps(self.plain(), sort_keys=True).encode()).hexdigest()[:10]

    @classmethod
    def read(cls, folder: Path) -> TokenManifest:
        """Read the manifest of a finished cache.

        Raises:
            UserError: if there is none, or it is damaged or of another kind.
        """
        path = folder / COMPLETE
        try:
            entries = dict(read_json(path))
            entries.pop(FILES, None)
            return cls(**{**entries, "splits": tuple(entries["splits"])})
        except UserError:
            raise
        except (OSError, Unreadable, ValueError, TypeError, KeyError) as error:
            raise UserError(
                "teacher.cache", f"{path} is no manifest of a cache of tokens ({error})", "a finished one"
            ) from None

    def plain(self) -> dict[str, Any]:
        """Return the entries as they stand in ``manifest.json``."""
        return json.loads(json.dumps(asdict(self)))


def read_index(folder: Path, record: np.dtype) -> np.ndarray:
    """Read the entries of ``index.bin`` whose rows are all there, up to the first that is damaged."""
    try:
        with open_regular(folder / INDEXED) as file:
            raw = file.read()
        stored = (folder / ROWS).stat().st_size // record.itemsize
    except (OSError, Unreadable):
        return np.zeros(0, INDEX)
    index = np.frombuffer(raw[: len(raw) // INDEX.itemsize * INDEX.itemsize], INDEX)
    ends = np.cumsum(index["rows"], dtype=np.uint64)
    whole = (index["start"] == ends - index["rows"]) & (index["rows"] > 0) & (ends <= stored)
    whole &= index["seal"] == [_seal(entry) for entry in index]
    return index if whole.all() else index[: int(whole.argmin())]


def check_files(folder: Path, said: dict) -> None:
    """Hold the files of a complete cache against its manifest.

    Raises:
        UserError: if one is not what was written.
    """
    check_manifest_files(folder, said, (ROWS, INDEXED), "teacher.cache")


def _seal(entry: np.ndarray) -> int:
    return zlib.crc32(entry.tobytes()[: INDEX.itemsize - 4])


class TokenWriter:
    """Writer that adds sequences to a cache, and goes on where a killed one stopped; other processes wait.

    Used as a context manager; leaving it without an error marks the cache as complete. It may be opened again, and
    grow.

    Args:
        folder: folder of the cache; made if need be.
        manifest: description of what is stored.

    Raises:
        UserError: if the folder holds a cache of something else.

    >>> import tempfile
    >>> manifest = TokenManifest(teacher="endpoint", data="questions", classes=50, k=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with TokenWriter(Path(folder) / "cache", manifest) as writer:
    ...         writer.append([7, 8, 9], [1, 2], [[4, 5], [6, 1]], [[-0.5, -1.5], [-0.1, -3.0]])
    ...         len(writer)
    1
    """

    def __init__(self, folder: Path, manifest: TokenManifest) -> None:
        self.folder, self.manifest = Path(folder), manifest
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self._lock = lock_file(f"{self.folder}.lock")
        self._lock.acquire()
        try:
            self._open()
        except BaseException:
            self._lock.release()
            raise

    def _open(self) -> None:
        self.folder.mkdir(exist_ok=True)
        remove_leftovers(self.folder)
        name = next((n for n in (COMPLETE, WRITING) if (self.folder / n).exists()), None)
        if name is not None:
            stored = check_manifest(self.folder, self.manifest, name)
            if name == COMPLETE:
                check_files(self.folder, stored)
        else:  # rows without a manifest may be of anything
            for left in (ROWS, INDEXED, CHECKS):
                (self.folder / left).unlink(missing_ok=True)
            self._write_manifest({})
        index = read_index(self.folder, self.manifest.record)
        self.rows = int(index["rows"].sum(dtype=np.int64))
        """Number of rows written so far, or waiting to be."""
        self._known = {key.tobytes() for key in index["key"]}
        self._waiting: list[tuple[bytes, np.ndarray]] = []
        self._waiting_bytes = 0
        sizes = {ROWS: self.rows * self.manifest.record.itemsize, CHECKS: 4 * len(index), INDEXED: index.nbytes}
        if not self._verify(index):
            del sizes[CHECKS]
        self._files = {name: os.fdopen(open_to_append(self.folder / name), "ab") for name in sizes}
        for name, size in sizes.items():
            self._files[name].truncate(size)

    def _write_manifest(self, files: dict[str, str]) -> None:
        entries = self.manifest.plain() | ({FILES: files} if files else {})
        with atomic_write(self.folder / WRITING) as manifest:
            manifest.write(json.dumps(entries, indent=1).encode())

    def _verify(self, index: np.ndarray) -> bool:
        """Hold the rows that are there against ``checks.bin``; False where an earlier version wrote none.

        Raises:
            UserError: if they are not what was written.
        """
        try:
            with open_regular(self.folder / CHECKS) as file:
                checks = np.frombuffer(file.read()[: 4 * len(index)], "<u4")
        except FileNotFoundError:
            return not len(index)
        except ValueError:  # cut in the middle of one
            return False
        if len(checks) < len(index):
            return False
        size = self.manifest.record.itemsize
        with open_regular(self.folder / ROWS) as rows:
            for number, (entry, check) in enumerate(zip(index, checks, strict=True)):
                if zlib.crc32(rows.read(int(entry["rows"]) * size)) != check:
                    raise UserError(
                        "teacher.cache",
                        f"{self.folder / ROWS} is damaged in its sequence {number}",
                        f"the file as it was; remove the folder {self.folder}: it is made again",
                    )
        return True

    def __contains__(self, key: bytes) -> bool:
        return key in self._known

    def __len__(self) -> int:
        return len(self._known)

    @property
    def complete(self) -> bool:
        """Whether the cache was once written to its end, and nothing was added since."""
        return (self.folder / COMPLETE).exists()

    def append(
        self,
        sequence_ids: object,
        rows: object,
        ids: object,
        log_probs: object,
        tail: object = None,
        source: bytes = b"",
    ) -> None:
        """Add the most probable classes at some positions of a sequence; one that is there already stays as it is.

        Args:
            sequence_ids: (n,) token ids of the sequence, from its first on; those behind the last row do not matter.
            rows: (m,) ascending positions that count: position t predicts the token at t + 1.
            ids: (m, k) classes, no two alike in a row.
            log_probs: (m, k) natural logarithms; -inf is a probability of 0 (for a row of fewer than k classes).
            tail: (m,) natural logarithm of the mass of all other classes; None takes what is left of 1.
            source: the bytes that the encoder reads, see :func:`~kdlab.teachers.cache.sequences.sequence_key`.

        Raises:
            UserError: if the shapes do not fit, or a value is none of these.
        """
        sequence, positions, kept = np.asarray(sequence_ids), np.asarray(rows), np.asarray(ids)
        logs = np.asarray(log_probs, np.float64)
        shape = (len(positions), self.manifest.k)
        if self.manifest.form != "topk" or self.manifest.plain_logits:
            raise UserError("teacher.cache", f"of form {self.manifest.form}, k={self.manifest.k}", "topk below V")
        if kept.shape != shape or logs.shape != shape:
            raise UserError("teacher.cache", f"ids {kept.shape}, log-probabilities {logs.shape}", f"{shape} both")
        if not len(positions) or positions[0] < 0 or positions[-1] >= len(sequence) or (np.diff(positions) < 1).any():
            raise UserError("teacher.cache", f"rows {positions.tolist()}", f"ascending, below {len(sequence)}")
        if kept.min() < 0 or kept.max() >= self.manifest.classes or (np.diff(np.sort(kept, 1), axis=1) == 0).any():
            raise UserError("teacher.cache", "class ids", f"below {self.manifest.classes}, each once a row")
        if not (logs <= 1e-3).all():  # endpoints round
            raise UserError("teacher.cache", f"a log-probability of {logs.max():g}", "at most 0")
        if tail is None:
            with np.errstate(divide="ignore"):
                tail = np.log(np.clip(1 - np.exp(logs).sum(1), 0, None))
        key = sequence_key(sequence[: int(positions[-1]) + 1], source)
        self.put(key, positions, self.records(logs, kept, np.asarray(tail)))

    def records(self, values: Any, ids: Any = None, rest: Any = None) -> np.ndarray:
        """Build records (n,) of (n, k) logarithms, weights or logits; (n, k) ids and (n,) tails or entropies.

        Raises:
            UserError: if a value is not finite as it is stored.
        """
        made = np.zeros(len(values), self.manifest.record)
        with np.errstate(over="ignore"):  # found below
            made["values"] = np.maximum(_array(values), LEAST)  # keeps NaN
        if not np.isfinite(made["values"]).all():
            raise UserError("teacher", f"its logits are not finite as {self.manifest.dtype}", "finite numbers")
        if ids is not None:
            made["ids"], made["rest"] = _array(ids), np.maximum(_array(rest), LEAST)
        return made

    def put(self, key: bytes, positions: np.ndarray, records: np.ndarray) -> None:
        """Add the records of one sequence, by its key."""
        if key in self._known:
            return
        entry = np.zeros(1, INDEX)
        entry["key"], entry["start"], entry["rows"] = np.frombuffer(key, "<u8"), self.rows, len(records)
        entry["check"] = positions_check(positions)
        entry["seal"] = _seal(entry)
        self._waiting.append((entry.tobytes(), records))
        self._waiting_bytes += records.nbytes
        self._known.add(key)
        self.rows += len(records)
        if self._waiting_bytes >= FLUSH_BYTES:
            self.flush()

    def require(self, size: int) -> None:
        """See that the disk has room for ``size`` bytes.

        Raises:
            UserError: if it has not; what is written stays.
        """
        free = shutil.disk_usage(self.folder).free
        if size + SPARE_BYTES > free:
            raise UserError(
                "teacher.cache",
                (f"needs {size / 2**20:.0f} MiB more, and {self.folder} has {free / 2**20:.0f} MiB free"),
                "more room, a smaller k, or teacher.cache=off",
            )

    def flush(self) -> None:
        """Bring everything to the disk; what is there survives a kill."""
        if not self._waiting:
            return
        self.require(self._waiting_bytes)
        self._rename(COMPLETE, WRITING)
        records = [record.tobytes() for _, record in self._waiting]
        parts = {
            ROWS: records,
            CHECKS: [zlib.crc32(one).to_bytes(4, "little") for one in records],
            INDEXED: [entry for entry, _ in self._waiting],
        }
        for name, file in self._files.items():  # the index last
            file.write(b"".join(parts[name]))
            file.flush()
            os.fsync(file.fileno())
        self._waiting, self._waiting_bytes = [], 0

    def _rename(self, old: str, new: str) -> None:
        if (self.folder / old).exists():
            os.replace(self.folder / old, self.folder / new)
            place = os.open(self.folder, os.O_RDONLY)
            try:
                os.fsync(place)
            finally:
                os.close(place)

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.flush()
                if not self.complete:
                    self._write_manifest(hashes(self.folder, (ROWS, INDEXED)))
                    self._rename(WRITING, COMPLETE)
        finally:
            for file in self._files.values():
                file.close()
            self._lock.release()


def _array(values: object) -> np.ndarray:
    if isinstance(values, Tensor):
        wide = values.detach().cpu()
        return (wide.float() if wide.dtype == torch.bfloat16 else wide).numpy()
    return np.asarray(values)
