"""The sequences that a batch of text is made of, found again in it whatever the order, the padding and the packing."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from kdlab.errors import UserError
from kdlab.functional import Batch, SequenceBatch


class SequenceSpan(NamedTuple):
    """One sequence of a batch, up to the last of its positions that count."""

    line: int
    """Number of its line in the batch."""
    start: int
    """Position in that line at which it begins."""
    ids: np.ndarray
    """Token ids (n,) int32 that the network reads, the last counting position included."""
    positions: np.ndarray
    """Positions that count, of the n ones: (m,) int32, ascending."""
    rows: slice
    """Range of its m rows among those of the batch."""
    source: bytes = b""
    """Bytes of the encoder's input, if there is one."""

    @property
    def key(self) -> bytes:
        """See :func:`sequence_key`."""
        return sequence_key(self.ids, self.source)


def sequence_key(ids: np.ndarray, source: bytes = b"") -> bytes:
    """Compute 16 bytes that stand for a sequence: a hash of its token ids, and of its encoder's input.

    Two different sequences of a billion have the same key with a probability of about 1e-21.

    Args:
        ids: (n,) whole numbers, up to the last position that counts.
        source: the bytes of the encoder's input.
    """
    plain = np.ascontiguousarray(ids, "<i4").tobytes()
    # the length goes first, so that no token can pass for a piece of the source
    return hashlib.blake2b(
        len(plain).to_bytes(8, "little") + plain + source if source else plain, digest_size=16
    ).digest()


def positions_check(positions: np.ndarray) -> int:
    """Compute a checksum of the positions that count."""
    return zlib.crc32(np.ascontiguousarray(positions, "<i4").tobytes())


def sequences(batch: Batch) -> list[SequenceSpan]:
    """Return the sequences of a batch that have rows, in the order of their rows.

    A sequence begins at the start of a line, and where ``position_ids`` is 0. It ends at its last position that counts:
    what a causal network says about those does not depend on anything later, padding included.

    Raises:
        UserError: if the batch holds no text.
    """
    inputs = batch.inputs
    name = "decoder_input_ids" if isinstance(inputs, dict) and "decoder_input_ids" in inputs else "input_ids"
    if not isinstance(inputs, dict) or name not in inputs or not isinstance(batch, SequenceBatch):
        raise UserError(
            "teacher.cache", "a batch without token ids; accepted by a cache of tokens: sequences of tokens"
        )
    ids, where = _array(inputs[name]).astype("<i4"), _array(batch.loss_mask)
    lines, width = ids.shape
    fresh = np.zeros((lines, width), bool)
    if name == "input_ids" and "position_ids" in inputs:
        np.equal(_array(inputs["position_ids"]), 0, out=fresh)
    fresh[:, :1] = True
    starts, rows, flat = np.flatnonzero(fresh), np.flatnonzero(where), ids.reshape(-1)
    owner = np.searchsorted(starts, rows, "right") - 1
    owners, firsts, counts = np.unique(owner, return_index=True, return_counts=True)
    sources = _sources(inputs) if name == "decoder_input_ids" else [b""] * lines
    spans = []
    for start, first, count in zip(starts[owners].tolist(), firsts.tolist(), counts.tolist(), strict=True):
        positions = (rows[first : first + count] - start).astype("<i4")
        line, at = divmod(start, width)
        own = flat[start : start + int(positions[-1]) + 1]
        spans.append(SequenceSpan(line, at, own, positions, slice(first, first + count), sources[line]))
    return spans


def _sources(inputs: dict[str, Tensor]) -> Sequence[bytes]:
    """Return the bytes of the encoder's input, line by line, without padding."""
    mask = inputs.get("attention_mask")
    if "input_features" in inputs:
        values = _array(inputs["input_features"].float())
    else:
        values = _array(inputs["input_ids"]).astype("<i4")
    if mask is None:
        return [line.tobytes() for line in values]
    kept = _array(mask).astype(bool)
    if kept.shape[1] != values.shape[-1]:  # a mask of the encoder's own, coarser, time
        return [line.tobytes() + own.tobytes() for line, own in zip(values, kept, strict=True)]
    return [np.ascontiguousarray(line[..., own]).tobytes() for line, own in zip(values, kept, strict=True)]


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()
