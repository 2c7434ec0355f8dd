"""Many sequences as a few tensors: what batches are cut out of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from kdlab.data.text.sequence import Sequence


@dataclass
class Flat:
    """Sequences of a split, end to end; windows of running text overlap.

    ``ids`` (n,) int32 and ``segments`` (n,) uint8 belong to tokens. ``start``, ``length``, ``lead`` (N,) int64 and
    ``weight`` (N,) float belong to examples: an example is the tokens ``start .. start + length - 1``, and the first
    ``lead`` of the predictions within it do not count. ``source`` holds what an encoder is given, (m,) int32 ids or
    (m, F) float features, of which an example has ``source_length`` from ``source_start`` on.
    """

    ids: Tensor
    segments: Tensor
    start: Tensor
    length: Tensor
    lead: Tensor
    weight: Tensor
    source: Tensor | None = None
    source_start: Tensor | None = None
    source_length: Tensor | None = None

    def __len__(self) -> int:
        return len(self.start)

    def take(self, examples: Tensor) -> Flat:
        """Return some of the examples; the tokens stay where they are."""

        def of(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[examples]

        return replace(
            self,
            start=self.start[examples],
            length=self.length[examples],
            lead=self.lead[examples],
            weight=self.weight[examples],
            source_start=of(self.source_start),
            source_length=of(self.source_length),
        )

    def to(self, device: Any) -> Flat:
        """Move the tokens to ``device``; what belongs to examples stays, since shapes follow from it."""
        source = None if self.source is None else self.source.to(device)
        return replace(self, ids=self.ids.to(device), segments=self.segments.to(device), source=source)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors that it holds, by name."""
        for one in fields(self):
            if getattr(self, one.name) is not None:
                yield one.name, getattr(self, one.name)

    def sums(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return the summed weight (N,) and number (N,) of each example's rows, given each segment's weight (4,)."""
        table = weights.double()
        first, last = self.start + self.lead + 1, self.start + self.length
        last = last.maximum(first).clamp(max=len(self.ids))
        first = first.minimum(last)
        kinds = self.segments.to(table.device).long()
        sums = []
        for values in (table, (table > 0).double()):
            total = torch.cat([torch.zeros(1, dtype=torch.double), values[kinds].cumsum(0)])
            sums.append(total[last] - total[first])
        positive = self.weight > 0
        return sums[0] * self.weight * positive, (sums[1] * positive).round().long()


def windows(length: int, context: int, stride: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cut running text of ``length`` tokens into windows of up to ``context + 1`` tokens.

    A window starts every ``stride`` tokens; within it, only what no window before has predicted counts. Together they
    predict every token but the first, once.

    Returns:
        start, length and lead of each, (N,) int64.

    >>> windows(8, 3, 3)
    (tensor([0, 3, 6]), tensor([4, 4, 2]), tensor([0, 0, 0]))
    >>> windows(8, 4, 2)
    (tensor([0, 2, 4]), tensor([5, 5, 4]), tensor([0, 2, 2]))
    """
    predicted = max(length - 1, 0)
    count = 0 if not predicted else 1 + -(-max(predicted - context, 0) // stride)
    start = torch.arange(count) * stride
    lead = torch.full_like(start, context - stride)
    lead[:1] = 0
    return start, (length - start).clamp(max=context + 1), lead


def flatten(sequences: list[Sequence], context: int, stride: int) -> tuple[Flat, Tensor]:
    """Lay sequences end to end; running text is cut into windows, other sequences stay whole.

    Returns:
        The examples, and (N,) which sequence each is of.
    """
    starts: list[int] = []
    lengths: list[int] = []
    leads: list[int] = []
    origins: list[int] = []
    begin = 0
    for number, one in enumerate(sequences):
        size = len(one)
        cut = [part.tolist() for part in windows(size, context, stride)] if one.running else ([0], [size], [0])
        starts += [begin + start for start in cut[0]]
        lengths += cut[1]
        leads += cut[2]
        origins += [number] * len(cut[0])
        begin += size
    origin = torch.tensor(origins, dtype=torch.long)
    flat = Flat(
        _end_to_end([one.ids for one in sequences], torch.int32),
        _end_to_end([one.segments for one in sequences], torch.uint8),
        torch.tensor(starts, dtype=torch.long),
        torch.tensor(lengths, dtype=torch.long),
        torch.tensor(leads, dtype=torch.long),
        torch.tensor([one.weight for one in sequences], dtype=torch.float32)[origin],
    )
    sources = [one.source for one in sequences if one.source is not None]
    if not sources:
        return flat, origin
    # time first, as ids have it, so that an index picks positions of both
    along = [source if source.ndim == 1 else source.T for source in sources]
    length = torch.tensor([len(source) for source in along])
    flat.source = torch.cat(along).to(torch.int32 if along[0].ndim == 1 else torch.float32)
    flat.source_start, flat.source_length = (length.cumsum(0) - length)[origin], length[origin]
    return flat, origin


def _end_to_end(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([part.to(dtype) for part in parts]) if parts else torch.zeros(0, dtype=dtype)
