"""Terms that hold two views of one row against each other, without a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor
from typing_extensions import override

from kdlab.errors import UserError, unknown
from kdlab.functional import Batch, Outputs, Schedule, cross_entropy, dense, kl
from kdlab.losses.term import Rows, Term
from kdlab.ranges import positive, share

Kind = Literal["hard", "soft"]


class Consistency(Term):
    r"""Consistency of two views of a row: the student's output for one, without gradient, is the other's target.

    With z the logits of the partner (the weak view) and z' those of the row (the strong view):

    .. math::
        \text{hard:}\quad \mathbb 1\big[\max_c q_c \ge \tau\big]\; \mathrm{CE}\big(\arg\max_c q_c,\, p(z')\big)
        \qquad
        \text{soft:}\quad \mathbb 1\big[\max_c q_c \ge \tau\big]\;
        \mathrm{KL}\big(\mathrm{softmax}(z / T) \,\|\, p(z')\big)

    with :math:`q = \mathrm{softmax}(z)`, averaged over all rows that have a partner, whether sure or not. Hard: Sohn et
    al., *FixMatch*, NeurIPS 2020. Soft: Xie et al., *Unsupervised Data Augmentation for Consistency Training*,
    NeurIPS 2020, who sharpen the target (T below 1), and not what decides whether it counts.

    Args:
        target: ``hard`` or ``soft``.
        threshold: least probability of the partner's first choice, in [0, 1); :math:`\tau`.
        sharpen: T of the soft target.
        weight: see :class:`~kdlab.losses.Term`.

    Raises:
        UserError: for an argument out of its range, or a batch without partners.
    """

    rows: Rows = "partnered"
    needs_teacher = False

    def __init__(
        self,
        target: Kind = "hard",
        threshold: float = 0.95,
        sharpen: float = 1.0,
        weight: float | Mapping | Schedule = 1.0,
    ) -> None:
        super().__init__(weight)
        if target not in get_args(Kind):
            raise unknown("target", target, get_args(Kind))
        share("threshold", threshold, one=False)
        positive("sharpen", sharpen)
        self.target, self.threshold, self.sharpen = target, threshold, sharpen

    @override
    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        if batch.partner is None:
            raise UserError("loss", "Consistency holds two views of a row together", "with batch_transform=strong_view")
        strong = dense(student.logits)
        weak = strong.detach()[batch.partner.clamp(min=0)]
        weak = weak.to(torch.promote_types(weak.dtype, torch.float32))
        sure, choice = weak.softmax(-1).max(-1)
        counts = (batch.partner >= 0) & (sure >= self.threshold)
        value = cross_entropy(strong, choice) if self.target == "hard" else kl(strong, weak / self.sharpen)
        return torch.where(counts, value, 0.0)
