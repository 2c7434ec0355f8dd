"""DKD: KL divergence in two parts with weights of their own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from torch import Tensor
from typing_extensions import override

from kdlab.errors import UserError
from kdlab.functional import Batch, Outputs, Schedule, decoupled_kl, dense
from kdlab.losses.response.soft_term import SoftTerm
from kdlab.losses.temperature import Temperature
from kdlab.losses.term import Role


def named_classes(targets: Tensor) -> Tensor:
    """Return class ids (B,) that are safe to index with.

    Soft targets name the class that they favour, and a row without a label names class 0 (what is said of such a row is
    not counted).
    """
    return targets.argmax(-1) if targets.ndim == 2 else targets.clamp(min=0)


def part_weights(**weights: float) -> None:
    """Refuse a weight of a part that is no finite number of at least 0."""
    for name, value in weights.items():
        if not 0 <= value < math.inf:
            raise UserError(name, value, "a finite number, at least 0")


class DKD(SoftTerm):
    r"""Decoupled KD: the target-class and the non-target-class part of KL, weighted apart, times T².

    .. math:: T^2\,(w_{target}\,\mathrm{TCKD} + w_{other}\,\mathrm{NCKD})

    Needs the class of every row, so it counts over labelled rows. Zhao et al., *Decoupled Knowledge Distillation*,
    CVPR 2022, whose alpha and beta are ``target_weight`` and ``other_weight``.

    Args:
        target_weight: weight of the target-class part (1 in the paper).
        other_weight: weight of the non-target-class part (8, 6 or 2 in the authors' code, by CIFAR-100 pair).
        weight: weight of the whole term.
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
        part_weights(target_weight=target_weight, other_weight=other_weight)
        self.target_weight, self.other_weight = target_weight, other_weight

    @override
    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        s, t, factor = self.temperature.soften(dense(student.logits), dense(teacher.logits))
        tckd, nckd = decoupled_kl(s, t, named_classes(batch.targets))
        return factor * (self.target_weight * tckd + self.other_weight * nckd)
