"""Which rows make up each optimizer step of an epoch, and under which view: a function of (seed, epoch) alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from kdlab.errors import UserError, unknown
from kdlab.functional.rng import fold, permutation, seed_of
from kdlab.functional.types import NO_LABEL

Pairing = Literal["same_class", "repeat_half"]
"""Arrangement of rows, other than as they come."""


@dataclass
class Steps:
    """Optimizer steps of one epoch, end to end."""

    rows: Tensor
    """Examples, step after step: (sum of sizes,) int64."""
    showing: Tensor
    """Number of times each has been shown before, counting epochs from 0: (sum of sizes,) int64."""
    sizes: list[int]
    """Rows of each step."""
    labelled: list[float]
    """Rows with a label of each step."""
    partner: Tensor | None = None
    """Position in ``rows`` of the row that each is to agree with, (sum of sizes,) int64; -1 for none."""


class Order:
    """Order of a training split.

    Args:
        targets: (N,) class ids on the CPU, -100 where there is no label.
        batch_size: rows of one optimizer step, over all its micro-batches and processes.
        unlabelled_ratio: unlabelled rows for each labelled row of a step. The two pools then go round by themselves,
            each reshuffled when it is through, and every step is full. None takes rows as they come; so does a split
            where all rows have a label, or none has.
        seed: seed of the run.
        parts: number of micro-batches (over all processes) that a step is split into.
        least: rows that each of them must have. Two by default: BatchNorm has no variance of one row.
        pairing: ``same_class`` shows the rows of an epoch in pairs of one class, drawn anew each epoch, each row the
            other's partner; an odd one of a class, and rows without a label, have none. ``repeat_half`` makes the first
            half of each step of the rows that were new in the step before, so that a row is shown twice in a row, and
            half as many of them an epoch; the pool goes round. None takes rows as they come.

    Raises:
        UserError: if an arrangement does not go with the other arguments.

    A last step that would give its parts fewer than ``least`` rows is left out of the epoch. Since the order changes
    with each epoch, other rows are left out the next time.
    """

    def __init__(
        self,
        targets: Tensor,
        batch_size: int,
        unlabelled_ratio: float | None = None,
        seed: int = 0,
        parts: int = 1,
        least: int = 2,
        pairing: str | None = None,
    ) -> None:
        self.seed, self.pairing = seed, pairing
        self._targets = targets
        self.known = targets != NO_LABEL
        self._all_known = bool(self.known.all())
        total = len(targets)
        labelled, unlabelled = self.known.nonzero()[:, 0], (~self.known).nonzero()[:, 0]
        self.steps = math.ceil(total / batch_size)
        if pairing is not None:
            _check(pairing, batch_size, unlabelled_ratio, bool(len(labelled) and len(unlabelled)), parts)
        if pairing == "repeat_half":
            self.pools, self.takes = [torch.arange(total)], [self.steps * batch_size]
            self.sizes = [min(batch_size, total - total % 2)] * self.steps
        elif unlabelled_ratio is None or not len(labelled) or not len(unlabelled):
            self.pools = [torch.arange(total)]
            last = total - (self.steps - 1) * batch_size
            if pairing is not None and parts > 1:
                last -= last % (2 * parts)  # so that no part cuts a pair
            if last < least * parts and self.steps > 1:
                self.steps, last = self.steps - 1, batch_size
            self.sizes = [batch_size] * (self.steps - 1) + [last]
            self.takes = [sum(self.sizes)]
        else:
            size = min(batch_size, total)
            share = size if unlabelled_ratio == 0 else min(max(1, round(size / (1 + unlabelled_ratio))), size - 1)
            self.pools = [labelled, unlabelled] if share < size else [labelled]
            self.sizes = [size] * self.steps
            self.takes = [self.steps * take for take in (share, size - share)[: len(self.pools)]]

    def epoch(self, epoch: int) -> Steps:
        """Return the steps of an epoch."""
        if self.pairing == "repeat_half":
            return self._counted(*self._repeated(epoch))
        pools = enumerate(zip(self.pools, self.takes, strict=True))
        drawn = [self._cycle(pool, take, number, epoch) for number, (pool, take) in pools]
        if len(drawn) == 1:
            rows, showing = drawn[0]
        else:
            rows, showing = (self._interleave([d[i] for d in drawn], epoch) for i in (0, 1))
        if self.pairing is not None:
            return self._counted(*self._paired(rows, showing, epoch))
        return self._counted(rows, showing)

    def _counted(self, rows: Tensor, showing: Tensor, partner: Tensor | None = None) -> Steps:
        if self._all_known:
            counts = [float(size) for size in self.sizes]
        else:
            counts = [float(part.sum()) for part in self.known[rows].split(self.sizes)]
        return Steps(rows, showing, self.sizes, counts, partner)

    def _paired(self, rows: Tensor, showing: Tensor, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Arrange an epoch's rows in pairs of one class where possible, with the position of each row's partner."""
        classes, known = self._targets[rows], self.known[rows]
        by_class = classes.argsort(stable=True)  # within a class, in the order of the epoch
        sizes = classes.unique(return_counts=True)[1]
        rank = torch.arange(len(rows)) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
        whole = (rank // 2 * 2 + 1 < sizes.repeat_interleave(sizes)) & known[by_class]
        pairs, alone = by_class[whole], by_class[~whole]
        alone = alone[permutation(len(alone), self.seed, "alone", epoch)]
        two = torch.cat([pairs, alone[: len(alone) // 2 * 2]]).view(-1, 2)
        mixed = permutation(len(two), self.seed, "pairs", epoch)
        place = torch.cat([two[mixed].flatten(), alone[len(alone) // 2 * 2 :]])
        partner = torch.full_like(place, -1)
        has = (mixed < len(pairs) // 2).repeat_interleave(2).nonzero()[:, 0]
        partner[has] = has ^ 1
        return rows[place], showing[place], partner

    def _repeated(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Return the rows of an epoch that repeats the new half of each step in the next, and how often each was shown.

        New rows are an endless stream, one shuffled round of the pool after the other; an epoch is a piece of it.
        """
        total, half = len(self.known), self.sizes[0] // 2
        first = epoch * self.steps * half
        number = torch.arange(first - half, first + self.steps * half)
        number = torch.where(number < 0, number % total, number)  # nothing was before the first step
        turns, inside = number // total, number % total
        rows = torch.empty_like(number)
        for turn in turns.unique().tolist():
            mine = turns == turn
            rows[mine] = permutation(total, self.seed, "order", turn)[inside[mine]]
        new, again = slice(half, None), slice(None, -half)
        steps = [
            torch.stack([before.view(-1, half), now.view(-1, half)], 1).flatten()
            for before, now in ((rows[again], rows[new]), (2 * turns[again] + 1, 2 * turns[new]))
        ]
        return steps[0], steps[1]

    def _cycle(self, pool: Tensor, take: int, number: int, epoch: int) -> tuple[Tensor, Tensor]:
        """Take ``take`` rows of a pool, gone through as often as needed, and count how often each was shown before."""
        rounds = math.ceil(take / len(pool))
        rows = torch.cat(
            [pool[permutation(len(pool), self.seed, "order", epoch, number, turn)] for turn in range(rounds)]
        )[:take]
        turns = torch.arange(rounds).repeat_interleave(len(pool))[:take]
        return rows, epoch * rounds + turns

    def _interleave(self, streams: list[Tensor], epoch: int) -> Tensor:
        """Build steps of a share of every stream, shuffled so that each micro-batch gets rows of all."""
        steps = torch.cat([stream.view(self.steps, -1) for stream in streams], dim=1)
        mixed = fold(seed_of(self.seed, "interleave", epoch), torch.arange(steps.numel())).view_as(steps)
        return steps.gather(1, mixed.argsort(dim=1, stable=True)).flatten()


def _check(pairing: str, batch_size: int, unlabelled_ratio: float | None, mixed: bool, parts: int) -> None:
    """Check that rows can be arranged so."""
    if pairing not in get_args(Pairing):
        raise unknown("data.pairing", pairing, get_args(Pairing), "pairing")
    if batch_size % (2 * parts):
        raise UserError("data.batch_size", f"{batch_size}, with data.pairing={pairing}", f"a multiple of {2 * parts}")
    if unlabelled_ratio is not None and mixed:
        raise UserError(
            "data.unlabelled_ratio", f"{unlabelled_ratio:g}, and data.pairing={pairing} mixes no two pools", "null"
        )


class Views:
    """Choice of the view of an example for each showing.

    Args:
        count: None shows a new view each time; K shows views 0 .. K-1 in turn, so that each is shown equally often.
        hashed: choose among the ``count`` by the hash of (seed, example, showing) instead. For enumerated views,
            where taking turns would give a whole batch the same crop.
        seed: seed of the run.
    """

    def __init__(self, count: int | None = None, hashed: bool = False, seed: int = 0) -> None:
        self.count, self.hashed, self.seed = count, hashed, seed

    def __call__(self, example: Tensor, showing: Tensor) -> Tensor:
        """Return the views (B,) int64 of examples (B,), given how often each was shown before."""
        if self.count is None:
            return showing
        if self.count == 1:
            return torch.zeros_like(showing)
        if not self.hashed:
            return showing % self.count
        bits = fold(fold(seed_of(self.seed, "view"), example), showing) >> 32 & 0xFFFFFFFF
        return bits * self.count >> 32


def parts_of(size: int, parts: int) -> list[int]:
    """Divide ``size`` rows among ``parts`` micro-batches as evenly as possible, the larger ones first.

    >>> parts_of(10, 4)
    [3, 3, 2, 2]
    """
    return [size // parts + (part < size % parts) for part in range(parts)]
