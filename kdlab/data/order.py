"""Which rows make up each optimizer step of an epoch, and under which view: a function of (seed, epoch) alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kdlab.data.rng import fold, permutation, seed_of
from kdlab.functional.types import NO_LABEL


@dataclass
class Steps:
    """The optimizer steps of one epoch, end to end."""

    rows: Tensor
    """(sum of sizes,) int64: which examples, step after step."""
    showing: Tensor
    """(sum of sizes,) int64: how many times each has been shown before, counting epochs from 0."""
    sizes: list[int]
    """Rows of each step."""
    labelled: list[float]
    """Rows with a label of each step."""


class Order:
    """The order of a training split.

    Args:
        targets: (N,) class ids on the CPU, -100 where there is no label.
        batch_size: rows of one optimizer step, over all its micro-batches and processes.
        ratio: unlabelled rows for each labelled row of a step. The two pools then go round by themselves, each
            reshuffled when it is through, and every step is full. None takes rows as they come; so does a split
            where all rows have a label, or none has.
        seed: of the run.
        parts: into how many micro-batches (over all processes) a step is split.
        least: rows that each of them must have. Two by default: BatchNorm has no variance of one row.

    A last step that would give its parts fewer than ``least`` rows is left out of the epoch. Since the order changes
    with each epoch, other rows are left out the next time.
    """

    def __init__(
        self,
        targets: Tensor,
        batch_size: int,
        ratio: float | None = None,
        seed: int = 0,
        parts: int = 1,
        least: int = 2,
    ) -> None:
        self.seed = seed
        self.known = targets != NO_LABEL
        self._all_known = bool(self.known.all())
        total = len(targets)
        labelled, unlabelled = self.known.nonzero()[:, 0], (~self.known).nonzero()[:, 0]
        self.steps = math.ceil(total / batch_size)
        if ratio is None or not len(labelled) or not len(unlabelled):
            self.pools = [torch.arange(total)]
            last = total - (self.steps - 1) * batch_size
            if last < least * parts and self.steps > 1:
                self.steps, last = self.steps - 1, batch_size
            self.sizes = [batch_size] * (self.steps - 1) + [last]
            self.takes = [sum(self.sizes)]
        else:
            size = min(batch_size, total)
            share = size if ratio == 0 else min(max(1, round(size / (1 + ratio))), size - 1)
            self.pools = [labelled, unlabelled] if share < size else [labelled]
            self.sizes = [size] * self.steps
            self.takes = [self.steps * take for take in (share, size - share)[: len(self.pools)]]

    def epoch(self, epoch: int) -> Steps:
        """The steps of an epoch."""
        pools = enumerate(zip(self.pools, self.takes, strict=True))
        drawn = [self._cycle(pool, take, number, epoch) for number, (pool, take) in pools]
        if len(drawn) == 1:
            rows, showing = drawn[0]
        else:
            rows, showing = (self._interleave([d[i] for d in drawn], epoch) for i in (0, 1))
        if self._all_known:
            counts = [float(size) for size in self.sizes]
        else:
            counts = [float(part.sum()) for part in self.known[rows].split(self.sizes)]
        return Steps(rows, showing, self.sizes, counts)

    def _cycle(self, pool: Tensor, take: int, number: int, epoch: int) -> tuple[Tensor, Tensor]:
        """``take`` rows of a pool, gone through as often as it needs, and how often each was shown before."""
        rounds = math.ceil(take / len(pool))
        rows = torch.cat(
            [pool[permutation(len(pool), self.seed, "order", epoch, number, turn)] for turn in range(rounds)]
        )[:take]
        turns = torch.arange(rounds).repeat_interleave(len(pool))[:take]
        return rows, epoch * rounds + turns

    def _interleave(self, streams: list[Tensor], epoch: int) -> Tensor:
        """Steps made of a share of every stream, shuffled so that each micro-batch gets of all."""
        steps = torch.cat([stream.view(self.steps, -1) for stream in streams], dim=1)
        mixed = fold(seed_of(self.seed, "interleave", epoch), torch.arange(steps.numel())).view_as(steps)
        return steps.gather(1, mixed.argsort(dim=1, stable=True)).flatten()


class Views:
    """Which view of an example a showing is.

    Args:
        count: None shows a new view each time; K shows views 0 .. K-1 in turn, so that each is shown equally often.
        hashed: choose among the ``count`` by the hash of (seed, example, showing) instead. For enumerated views,
            where taking turns would give a whole batch the same crop.
        seed: of the run.
    """

    def __init__(self, count: int | None = None, hashed: bool = False, seed: int = 0) -> None:
        self.count, self.hashed, self.seed = count, hashed, seed

    def __call__(self, example: Tensor, showing: Tensor) -> Tensor:
        """(B,) int64 views, of (B,) examples and how often each was shown before."""
        if self.count is None:
            return showing
        if self.count == 1:
            return torch.zeros_like(showing)
        if not self.hashed:
            return showing % self.count
        bits = fold(fold(seed_of(self.seed, "view"), example), showing) >> 32 & 0xFFFFFFFF
        return bits * self.count >> 32


def parts_of(size: int, parts: int) -> list[int]:
    """How many of ``size`` rows each of ``parts`` micro-batches gets: as equal as can be, the larger ones first.

    >>> parts_of(10, 4)
    [3, 3, 2, 2]
    """
    return [size // parts + (part < size % parts) for part in range(parts)]
