"""Mixing rows of one optimizer step: inputs and labels become those of two examples."""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor
from typing_extensions import override

from kdlab.errors import UserError
from kdlab.functional.rng import permutation, seed_of
from kdlab.functional.types import NO_LABEL, as_probabilities
from kdlab.ranges import share


class Mixing:
    """Base of the transforms that mix every row with a partner, in shares that one step has in common.

    Partners and shares are functions of (seed, step), the partner is any row of the whole step, and so neither
    depends on how the step is split into micro-batches.

    Args:
        alpha: parameter of the Beta(alpha, alpha) that the share of the row itself is drawn from.
        prob: probability that a step is mixed at all.
    """

    name = "mixing"

    def __init__(self, alpha: float = 1.0, prob: float = 1.0) -> None:
        if not (isinstance(alpha, (int, float)) and 0 < alpha < math.inf):
            raise UserError(f"data.augment.{self.name}.alpha", alpha, "above 0")
        share(f"data.augment.{self.name}.prob", prob)
        self.alpha, self.prob = float(alpha), float(prob)

    def combine(self, own: Tensor, partner: Tensor, share: float, place: tuple[float, float]) -> tuple[Tensor, float]:
        """Return the mixed inputs, and the share of ``own`` that is really in them."""
        raise TypeError(f"{type(self).__name__} does not say what it does: define combine")


class MixUp(Mixing):
    """Weighted mean λ·x + (1 - λ)·x' (Zhang et al., "mixup: Beyond empirical risk minimization", ICLR 2018)."""

    name = "mixup"

    def __init__(self, alpha: float = 0.2, prob: float = 1.0) -> None:
        super().__init__(alpha, prob)

    @override
    def combine(self, own: Tensor, partner: Tensor, share: float, place: tuple[float, float]) -> tuple[Tensor, float]:
        return own * share + partner * (1 - share), share


class CutMix(Mixing):
    """A box of the partner pasted in (Yun et al., "CutMix", ICCV 2019); labels go by area."""

    name = "cutmix"

    @override
    def combine(self, own: Tensor, partner: Tensor, share: float, place: tuple[float, float]) -> tuple[Tensor, float]:
        height, width = own.shape[-2:]
        side = math.sqrt(1 - share)
        tall, wide = round(height * side), round(width * side)
        # the centre is any pixel, and the box is cut at the border, as published
        y, x = int(place[0] * height) - tall // 2, int(place[1] * width) - wide // 2
        rows, columns = slice(max(y, 0), max(y + tall, 0)), slice(max(x, 0), max(x + wide, 0))
        mixed = own.clone()
        mixed[..., rows, columns] = partner[..., rows, columns]
        area = len(range(height)[rows]) * len(range(width)[columns])
        return mixed, 1 - area / (height * width)


class Recipe:
    """Random choices by which one optimizer step is mixed: the mixing, its share and place, and the partners.

    Args:
        mixings: configured mixings; a step takes one of them.
        seed: seed of the run.
        epoch: number of the epoch.
        step: number of the optimizer step in the epoch.
        rows: number of rows of the step.
    """

    def __init__(self, mixings: list[Mixing], seed: int, epoch: int, step: int, rows: int) -> None:
        draw = random.Random(seed_of(seed, "mix", epoch, step))
        self.mixing = mixings[draw.randrange(len(mixings))]
        self.active = draw.random() < self.mixing.prob
        self.share = draw.betavariate(self.mixing.alpha, self.mixing.alpha)
        self.place = (draw.random(), draw.random())
        self.partner = permutation(rows, seed, "partner", epoch, step) if self.active else torch.arange(rows)
        """Position in the step of each row's partner, (rows,) int64."""

    def __call__(
        self, own: Tensor, partner: Tensor, own_target: Tensor, partner_target: Tensor, classes: int
    ) -> tuple[Tensor, Tensor]:
        """Mix rows with their partners.

        Args:
            own: float inputs (B, ...).
            partner: see ``own``.
            own_target: (B,) class ids, -100 for none.
            partner_target: see ``own_target``.
            classes: C.

        Returns:
            Inputs (B, ...), and soft targets (B, C): all zero unless both of a pair have a label.
        """
        targets = as_probabilities(own_target, classes)
        if not self.active:
            return own, targets
        mixed, share = self.mixing.combine(own, partner, self.share, self.place)
        both = ((own_target != NO_LABEL) & (partner_target != NO_LABEL))[:, None]
        return mixed, (targets * share + as_probabilities(partner_target, classes) * (1 - share)) * both
