"""A language model's distributions, computed once: the most probable classes, or draws, of every token that counts.

Rows are found by a hash of the token ids of their sequence. They do not depend on the order, the padding or the packing
of the batches, nor on the epoch.

The ``k`` most probable classes bias the loss: of the rest the student only learns how much there is
(:func:`tail_mass` says how much that is), not where. ``form="sampled"`` is unbiased at temperature 1, and noisier.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from typing_extensions import override

from kdlab.errors import UserError
from kdlab.functional import Batch, Outputs, Projected, Sampled, Sparse, hash_seed
from kdlab.teachers.cache.rows import check_manifest
from kdlab.teachers.cache.sequences import SequenceSpan, positions_check, sequences
from kdlab.teachers.cache.token_files import COMPLETE, WRITING, TokenManifest, TokenWriter, check_files, read_index
from kdlab.teachers.teacher import Teacher

CHUNK_ROWS = 128
"""Number of rows whose logits of all classes exist at once."""


def write_tokens(
    folder: Path,
    manifest: TokenManifest,
    teacher: Teacher,
    batches: Callable[[str], Iterable[Batch]],
    report: Callable[[int, int], None] = lambda done, total: None,
    rows: int = 0,
) -> None:
    """Fill a cache of tokens; one that was interrupted goes on, a second process waits and finds it done.

    Args:
        folder: the cache's folder.
        manifest: description of what is stored.
        teacher: teacher that answers, on its device. It is not asked for sequences that are there already.
        batches: split → its batches, in any order, padded and packed in any way.
        report: function that is called with rows done and ``rows``.
        rows: number of rows to come, to check beforehand that the disk has room; 0 where it is unknown.

    Raises:
        UserError: if the disk has not enough room, the teacher's logits are not finite or of another number of
            classes, or the folder holds a cache of something else.
    """
    with TokenWriter(folder, manifest) as writer:
        if writer.complete:
            return
        writer.require(max(rows - writer.rows, 0) * manifest.record.itemsize)
        done = 0
        for split in manifest.splits:
            for batch in batches(split):
                fresh: dict[bytes, SequenceSpan] = {}
                for stretch in sequences(batch):
                    key = stretch.key
                    if key not in writer:
                        fresh.setdefault(key, stretch)
                if fresh:
                    answer = teacher(batch, split)
                    assert answer is not None, "a teacher that does not answer yet cannot be stored"
                    _put(writer, answer.logits, fresh)
                done += len(batch)
                report(done, rows)


def _put(writer: TokenWriter, logits: Any, fresh: dict[bytes, SequenceSpan]) -> None:
    """Store the rows of some sequences of one batch."""
    manifest = writer.manifest
    if logits.shape[-1] != manifest.classes:
        raise UserError("teacher", f"logits of {logits.shape[-1]} classes", manifest.classes)
    if manifest.form == "sampled":
        for key, stretch in fresh.items():
            seed = hash_seed(manifest.seed, int.from_bytes(key[:8], "little"))
            source = torch.Generator(logits.device).manual_seed(seed)
            writer.put(key, stretch.positions, _records(writer, logits[stretch.rows], source))
        return
    chosen = torch.cat([torch.arange(s.rows.start, s.rows.stop, device=logits.device) for s in fresh.values()])
    records = _records(writer, logits if len(chosen) == len(logits) else logits[chosen])
    start = 0
    for key, stretch in fresh.items():
        stop = start + len(stretch.positions)
        writer.put(key, stretch.positions, records[start:stop])
        start = stop


@torch.no_grad()
def _records(writer: TokenWriter, logits: Any, source: torch.Generator | None = None) -> np.ndarray:
    """Convert logits (rows, C), dense or projected, to records, a chunk of rows at a time."""
    manifest, made = writer.manifest, []
    for start in range(0, len(logits), CHUNK_ROWS):
        part = logits[start : start + CHUNK_ROWS]
        part = part.dense() if isinstance(part, Projected) else part
        if not part.amax(-1).isfinite().all():  # of NaN it is NaN; a masked class, -inf, is fine
            raise UserError("teacher", "its logits are not finite", "finite numbers")
        if manifest.plain_logits:
            made.append(writer.records(part))
        elif manifest.form == "sampled":
            drawn = Sampled.of(part, manifest.k, manifest.flatten, source)
            made.append(writer.records(drawn.weights, drawn.ids, drawn.entropy))
        else:
            kept = Sparse.of(part, manifest.k)
            made.append(writer.records(kept.log_probs, kept.ids, kept.tail))
    return np.concatenate(made)


class TokenCache(Teacher):
    """Teacher that reads what :func:`write_tokens` or a :class:`TokenWriter` stored, by token ids, memory-mapped.

    Answers with :class:`~kdlab.functional.Sparse` or :class:`~kdlab.functional.Sampled` logits, or with dense ones
    where k is the whole vocabulary.

    Args:
        folder: folder of the cache.
        manifest: manifest that is asked for; must equal the folder's.

    Raises:
        UserError: if the manifest differs, or the cache is not complete, or damaged.
    """

    def __init__(self, folder: Path, manifest: TokenManifest) -> None:
        self.folder, self.manifest = Path(folder), manifest
        if not (self.folder / COMPLETE).exists() and (self.folder / WRITING).exists():
            raise UserError("teacher.cache", f"{folder} is not complete", "write it to its end, it goes on")
        check_files(self.folder, check_manifest(self.folder, manifest))
        index = read_index(self.folder, manifest.record)
        try:
            damaged = len(index) * index.itemsize != (self.folder / "index.bin").stat().st_size
        except OSError:
            damaged = True
        if damaged or not len(index):
            raise UserError("teacher.cache", f"{folder} is empty or damaged", "remove it, and write it again")
        self._index = index[np.lexsort((index["key"][:, 1], index["key"][:, 0]))]
        self._first = np.ascontiguousarray(self._index["key"][:, 0])
        size = manifest.record.itemsize
        self._records = np.memmap(self.folder / "rows.bin", np.uint8, "r", shape=(len(self), size))
        self._device = torch.device("cpu")

    def __len__(self) -> int:
        """Return the number of rows."""
        return int(self._index["rows"].sum(dtype=np.int64))

    @override
    def to(self, device: torch.device) -> TokenCache:
        self._device = torch.device(device)
        return self

    def missing(self, batch: Batch) -> tuple[int, int]:
        """Count the sequences of a batch that are missing here, and all of them."""
        keys = {s.key for s in sequences(batch)}
        return len(keys - self._known), len(keys)

    @cached_property
    def _known(self) -> set[bytes]:
        return {key.tobytes() for key in self._index["key"]}

    def _entries(self, spans: list[SequenceSpan]) -> np.ndarray:
        """Return the index entries of some sequences."""
        wanted = np.frombuffer(b"".join(s.key for s in spans), "<u8").reshape(-1, 2)
        at = np.searchsorted(self._first, wanted[:, 0])
        while True:  # past others whose first half is the same; almost never runs
            inside = np.minimum(at, len(self._first) - 1)
            keys = self._index["key"][inside]
            same = (keys[:, 0] == wanted[:, 0]) & (at < len(self._first))
            other = same & (keys[:, 1] != wanted[:, 1])
            if not other.any():
                break
            at = at + other
        if not same.all():
            first = spans[int(same.argmin())]
            raise UserError(
                "teacher.cache",
                (
                    f"{self.folder} has no such sequence ({(~same).sum()} of {len(spans)} in this "
                    f"batch; one begins with the ids {first.ids[:8].tolist()})"
                ),
                "those it was written for, or a live teacher (teacher.cache=off)",
            )
        entries = self._index[inside]
        for entry, stretch in zip(entries, spans, strict=True):
            if entry["rows"] != len(stretch.positions) or entry["check"] != positions_check(stretch.positions):
                raise UserError(
                    "teacher.cache",
                    (
                        f"{self.folder} has {entry['rows']} rows of a sequence of which {len(stretch.positions)}"
                        ", or others, count"
                    ),
                    "the segment weights it was written with",
                )
        return entries

    @override
    @torch.no_grad()
    def __call__(self, batch: Batch, split: str = "train") -> Outputs | None:
        if split not in self.manifest.splits:
            return None
        spans = sequences(batch)
        if not spans:
            return Outputs(self._answer(np.zeros(0, self.manifest.record)))
        entries = self._entries(spans)
        counts = entries["rows"].astype(np.int64)
        before = np.cumsum(counts) - counts
        chosen = np.repeat(entries["start"].astype(np.int64) - before, counts) + np.arange(counts.sum())
        return Outputs(self._answer(self._records.take(chosen, 0).view(self.manifest.record)[:, 0]))

    def _answer(self, records: np.ndarray) -> Any:
        def tensor(name: str) -> torch.Tensor:
            values = np.ascontiguousarray(records[name])
            if name == "ids":
                values = values.astype(np.int32, copy=False)
            return torch.from_numpy(values).to(self._device, non_blocking=True)

        values = tensor("values").float()
        if self.manifest.plain_logits:
            return values
        if self.manifest.form == "sampled":
            return Sampled(tensor("ids"), values, self.manifest.classes, tensor("rest"))
        return Sparse(tensor("ids"), values, tensor("rest"), self.manifest.classes)

    @override
    def describe(self) -> str:
        kinds = {"topk": "most probable", "sampled": "drawn"}
        what = "logits of all" if self.manifest.plain_logits else f"{self.manifest.k} {kinds[self.manifest.form]}"
        size = self._records.nbytes + self._index.nbytes
        return (
            f"cached teacher: {what} classes of {len(self)} tokens in {len(self._index)} sequences, "
            f"{size / 2**20:.1f} MiB of {self.manifest.dtype}, {size / len(self):.0f} bytes a token ({self.folder})"
        )


def tail_mass(cache: TokenCache) -> float:
    """Compute the mean probability of the classes that a cache of the most probable ones leaves out, about its bias.

    Raises:
        UserError: if the cache holds draws.
    """
    if cache.manifest.form != "topk":
        raise UserError("teacher.cache", f"of form {cache.manifest.form}", "topk, which has a tail")
    if cache.manifest.plain_logits:
        return 0.0
    total, block = 0.0, 2**16
    for start in range(0, len(cache), block):
        rows = np.ascontiguousarray(cache._records[start : start + block]).view(cache.manifest.record)
        total += float(np.exp(rows["rest"].astype(np.float64)).sum())
    return total / len(cache)
