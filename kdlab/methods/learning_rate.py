"""The course of the learning rate, as a factor over training progress."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

from kdlab.errors import UserError, unknown
from kdlab.ranges import share

Course = Literal["constant", "linear", "cosine", "multistep"]


class LearningRate:
    """Factor on the optimizer's ``lr`` over training: a warmup, then a decay.

    Args:
        shape: shape of the decay: ``constant``; ``linear`` or ``cosine`` from 1 to ``final``; ``multistep`` times
            ``gamma`` at each milestone.
        warmup: share of training over which the factor rises from 0 along a line.
        final: factor at the end (linear, cosine).
        milestones: milestones of ``multistep``, in epochs, or below 1 as shares of training.
        gamma: factor at each milestone.
    """

    def __init__(
        self,
        shape: Course = "cosine",
        warmup: float = 0.0,
        final: float = 0.0,
        milestones: Sequence[float] = (),
        gamma: float = 0.1,
    ) -> None:
        if shape not in get_args(Course):
            raise unknown("scheduler.shape", shape, get_args(Course))
        share("scheduler.warmup", warmup, one=False)
        share("scheduler.final", final)
        if shape == "multistep" and (not milestones or list(milestones) != sorted(milestones)):
            raise UserError("scheduler.milestones", f"{list(milestones)}", "one or more epochs, ascending")
        self.shape, self.warmup, self.final = shape, warmup, final
        self.milestones, self.gamma = tuple(milestones), gamma

    def __call__(self, progress: float, epochs: int) -> float:
        """Return the factor at ``progress`` in [0, 1] of a training of ``epochs`` epochs."""
        if progress < self.warmup:
            return max(progress / self.warmup, 1e-3)
        if self.shape == "multistep":
            shares = (m if m < 1 else m / epochs for m in self.milestones)
            return self.gamma ** sum(progress >= share - 1e-9 for share in shares)
        share = min((progress - self.warmup) / (1 - self.warmup), 1.0)
        down = {"constant": 0.0, "linear": share, "cosine": (1 - math.cos(math.pi * share)) / 2}[self.shape]
        return 1 - (1 - self.final) * down
