"""Terms against the teacher's output distribution (its soft targets)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from kdlab.errors import UserError
from kdlab.functional import Batch, Outputs, Schedule, decoupled_kl, kl, squared_error
from kdlab.losses.temperature import Temperature, temperature
from kdlab.losses.term import Role, Term


class SoftTerm(Term):
    """A term on softened outputs.

    Args:
        weight: see :class:`~kdlab.losses.Term`.
        temperature: its own temperature; None takes the one that the objective shares among its terms (1 outside one).
    """

    role: Role = "soft"

    def __init__(
        self,
        weight: float | Mapping | Schedule = 1.0,
        temperature: float | Mapping | Schedule | Temperature | None = None,
    ) -> None:
        super().__init__(weight)
        self.shares_temperature = temperature is None
        self.temperature = _temperature(1.0 if temperature is None else temperature)


_temperature = temperature


class KL(SoftTerm):
    r"""Hinton's distillation term: KL of the softened student from the softened teacher, times T².

    .. math:: T^2 \sum_c p^T_c(T)\,\big(\log p^T_c(T) - \log p^S_c(T)\big), \qquad p(T) = \mathrm{softmax}(z / T)

    One value per row, in float32. Hinton, Vinyals & Dean, *Distilling the Knowledge in a Neural Network*, NIPS 2014
    workshop.
    """

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        s, t, factor = self.temperature.soften(student.logits, teacher.logits)
        return factor * kl(s, t)


class LogitMSE(SoftTerm):
    r"""Mean squared difference of the logits, :math:`\tfrac{1}{C}\|z^S - z^T\|^2`; takes no temperature.

    Ba & Caruana, *Do Deep Nets Really Need to be Deep?*, NIPS 2014. It is the limit of T²·KL for T → ∞ (times 2, and
    without the mean of the logits).
    """

    def __init__(self, weight: float | Mapping | Schedule = 1.0) -> None:
        super().__init__(weight, temperature=1.0)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        return squared_error(student.logits, teacher.logits)


class DKD(SoftTerm):
    r"""Decoupled KD: the target-class and the non-target-class part of KL, weighted apart, times T².

    .. math:: T^2\,(w_{target}\,\mathrm{TCKD} + w_{other}\,\mathrm{NCKD})

    Needs the class of every row, so it counts over labelled rows. Zhao et al., *Decoupled Knowledge Distillation*,
    CVPR 2022, whose alpha and beta are ``target_weight`` and ``other_weight``.

    Args:
        target_weight: of the target-class part (1 in the paper).
        other_weight: of the non-target-class part (8 for most CIFAR-100 pairs of the paper).
        weight: of the whole term.
        temperature: see :class:`SoftTerm`.
    """

    role: Role = "other"
    rows: Literal["labelled", "all"] = "labelled"

    def __init__(
        self,
        target_weight: float = 1.0,
        other_weight: float = 8.0,
        weight: float | Mapping | Schedule = 1.0,
        temperature: float | Mapping | Schedule | Temperature | None = None,
    ) -> None:
        super().__init__(weight, temperature)
        for name, value in (("target_weight", target_weight), ("other_weight", other_weight)):
            if not 0 <= value < math.inf:
                raise UserError(f"{name}: {value}; accepted: a finite number, at least 0")
        self.target_weight, self.other_weight = target_weight, other_weight

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        s, t, factor = self.temperature.soften(student.logits, teacher.logits)
        classes = batch.targets.argmax(-1) if batch.targets.ndim == 2 else batch.targets.clamp(min=0)
        tckd, nckd = decoupled_kl(s, t, classes)
        return factor * (self.target_weight * tckd + self.other_weight * nckd)
