"""TextLoader: batches of sequences, cut out of one run of tokens on the compute device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate as running_sum
from typing import Any

import torch
from torch import Tensor

from kdlab.data.loader import EpochLoader
from kdlab.data.order import Order
from kdlab.data.text.sequence import PROMPT
from kdlab.data.text.token_store import Flat
from kdlab.functional.types import Batch, SequenceBatch, StepTotals


@dataclass
class Reading:
    """Settings by which all loaders of a data set read sequences.

    Args:
        weights: (4,) float: weight of a predicted token of each segment.
        pad_id: the token that fills up.
        context: positions of a row when packing.
        source_length: every encoder input is padded to this length; None to the longest.
        source_fill: value that features are padded with.
    """

    weights: Tensor
    pad_id: int
    context: int
    source_length: int | None = None
    source_fill: float = 0.0


class TextLoader(EpochLoader):
    """Loader of one epoch after the other of a split of sequences, as Batches.

    ``where`` marks the positions whose prediction counts; targets, weights and segments have one entry for each. The
    window of a training batch holds the summed weight, of rows and of sequences, of the whole optimizer step.

    Args:
        flat: the sequences.
        reading: settings by which they are read.
        batch_size: sequences of one optimizer step, over all micro-batches and processes.
        pack: lay the sequences of a micro-batch one after the other into as few rows as they fit in; positions start
            again at 0 with each. ``key`` is then that of a row's first sequence.
        view: the view that keys name.
        **place: order, device, accumulate, rank and world, as :class:`~kdlab.data.loader.EpochLoader` takes them.
    """

    def __init__(
        self, flat: Flat, reading: Reading, batch_size: int, *, pack: bool = False, view: int = 0, **place: Any
    ) -> None:
        super().__init__(len(flat), batch_size, least=1, **place)
        self.flat, self.reading, self.pack, self.view = flat, reading, pack, view
        self._weights = reading.weights.float().to(self.device)
        self._sums = flat.sums(reading.weights)[0] if self.order else None

    def __iter__(self) -> Iterator[Batch]:
        skip, self.skip = self.skip, 0
        if self.order is None:
            rows, lengths = self._once()
            windows: list[StepTotals | None] = [None] * len(lengths)
        else:
            rows, lengths, windows = self._training_plan(self.order, self.sampler.epoch)
        for part, examples in enumerate(rows.split(lengths)[skip:], start=skip):
            yield self._batch(examples, windows[part])

    def _training_plan(self, order: Order, epoch: int) -> tuple[Tensor, list[int], list[StepTotals | None]]:
        assert self._sums is not None
        steps = order.epoch(epoch)
        starts = [0, *running_sum(steps.sizes)]
        totals = [float(part.sum()) for part in self._sums[steps.rows].split(steps.sizes)]
        shares = [float(part.sum()) for part in self.flat.weight.double()[steps.rows].split(steps.sizes)]
        places, windows = [], []
        for number, first, last in self._parts(steps.sizes):
            places.append(steps.rows[starts[number] + first : starts[number] + last])
            total, parts = totals[number], self.accumulate * self.world
            windows.append(StepTotals(total, total, parts, shares[number]))
        return torch.cat(places), [len(place) for place in places], list(windows)

    def _batch(self, examples: Tensor, window: StepTotals | None) -> Batch:
        """Build one micro-batch of the examples (n,)."""
        flat, device = self.flat, self.device
        read = flat.length[examples] - 1  # the last token is predicted, and never read
        row, offset = pack(read.tolist(), self.reading.context) if self.pack else (torch.arange(len(read)), None)
        if offset is None:
            offset = torch.zeros_like(row)
        else:
            place = (row * (self.reading.context + 1) + offset).argsort()
            examples, read, row, offset = examples[place], read[place], row[place], offset[place]
        rows, width, total = int(row[-1]) + 1, int((offset + read).max()), int(read.sum())

        # one entry for each token that is read: the sequence it is of, its position there, its place in the rows
        of = torch.stack([read, read.cumsum(0) - read, row * width + offset, flat.start[examples], flat.lead[examples]])
        count, before, place, start, lead = of.to(device, non_blocking=True)
        sequence = torch.repeat_interleave(count, output_size=total)
        position = torch.arange(total, device=self.device) - before[sequence]
        place, source = place[sequence] + position, start[sequence] + position
        following = source + 1
        segment = flat.segments[following].long()
        share = flat.weight[examples].to(device, non_blocking=True)
        weight = self._weights[segment] * share[sequence]
        counts = (weight > 0) & (position >= lead[sequence])

        ids = torch.full((rows * width,), self.reading.pad_id, device=self.device)
        ids[place] = flat.ids[source].long()
        where = torch.zeros(rows * width, dtype=torch.bool, device=self.device)
        where[place] = counts
        given = torch.zeros(rows * width, dtype=torch.bool, device=self.device)
        given[place] = flat.segments[source] == PROMPT
        inputs = {"input_ids": ids.view(rows, width)}
        if flat.source is None:
            inputs["position_ids"] = self._positions(row, read + offset, width, place, position)
        else:
            inputs = {**self._encoder(examples), "decoder_input_ids": inputs["input_ids"]}
        firsts = examples[torch.cat([torch.ones(1, dtype=torch.bool), row[1:] != row[:-1]])]
        return SequenceBatch(
            inputs,
            flat.ids[following][counts].long(),
            torch.stack([firsts, torch.full_like(firsts, self.view)], dim=1).to(device, non_blocking=True),
            weight[counts],
            segment=segment[counts],
            loss_mask=where.view(rows, width),
            prompts=None if self.pack else given.view(rows, width).long().cumprod(1).sum(1),
            sequence_weight=None if self.pack else share,
            window=window,
        )

    def _positions(self, row: Tensor, ends: Tensor, width: int, place: Tensor, position: Tensor) -> Tensor:
        """Return the positions of the tokens, (rows, width) int64.

        What fills up continues a row that holds one sequence, so that no mask is needed; behind packed sequences it is
        one more of them.
        """
        rows, steps = int(row[-1]) + 1, torch.arange(width, device=self.device)
        if not self.pack:
            return steps.expand(rows, width)
        filled = torch.zeros(rows, dtype=torch.long).scatter_reduce(0, row, ends, "amax").to(self.device)
        positions = (steps - filled[:, None]).flatten()
        positions[place] = position
        return positions.view(rows, width)

    def _encoder(self, examples: Tensor) -> dict[str, Tensor]:
        """Return the encoder's inputs, ids (n, L) or features (n, F, L), with a mask of the positions that hold any."""
        flat = self.flat
        assert flat.source is not None and flat.source_start is not None and flat.source_length is not None
        length = flat.source_length[examples]
        steps = torch.arange(self.reading.source_length or int(length.max()), device=self.device)
        inside = steps < length.to(self.device)[:, None]
        index = (flat.source_start[examples].to(self.device)[:, None] + steps).clamp(max=max(len(flat.source) - 1, 0))
        padded = flat.source[index]
        if padded.ndim == 2:
            ids = padded.long().masked_fill(~inside, self.reading.pad_id)
            return {"input_ids": ids, "attention_mask": inside.long()}
        features = padded.masked_fill(~inside[..., None], self.reading.source_fill)
        return {"input_features": features.transpose(1, 2).contiguous(), "attention_mask": inside.long()}


def pack(lengths: list[int], room: int) -> tuple[Tensor, Tensor]:
    """Lay sequences into rows of ``room`` positions by first-fit decreasing.

    At most 11/9 of the fewest rows, and one more (Johnson, 1973).

    Returns:
        (n,) the row of each sequence and (n,) where it starts there.

    >>> pack([3, 5, 2], 6)
    (tensor([1, 0, 1]), tensor([0, 0, 3]))
    """
    filled: list[int] = []
    row, offset = [0] * len(lengths), [0] * len(lengths)
    for number in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        size = lengths[number]
        chosen = next((r for r, used in enumerate(filled) if used + size <= room), len(filled))
        if chosen == len(filled):
            filled.append(0)
        row[number], offset[number] = chosen, filled[chosen]
        filled[chosen] += size
    return torch.tensor(row), torch.tensor(offset)
