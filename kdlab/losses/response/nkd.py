"""NKD: the target class and the normalised others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor
from typing_extensions import override

from kdlab.functional import Batch, Outputs, Schedule, decoupled_kl, dense, target_cross_entropy
from kdlab.losses.response.dkd import named_classes, part_weights
from kdlab.losses.response.soft_term import SoftTerm
from kdlab.losses.temperature import Temperature
from kdlab.losses.term import Role


class NKD(SoftTerm):
    r"""Normalised KD: the teacher's belief in the target class, and KL over the other classes, renormalised.

    .. math:: -\,p^T_t \log p^S_t \;+\; w_{other}\,T^2\,\mathrm{KL}\big(\hat p^T(T) \,\|\, \hat p^S(T)\big)

    with :math:`\hat p` the distribution over the classes that are not the target. The target's part knows no
    temperature. Unlike :class:`DKD` it asks for ever more of the target class: it is not least at the teacher.

    Yang et al., *From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized Loss
    and Customized Soft Labels*, ICCV 2023, whose gamma is ``other_weight`` and whose lambda is the temperature. They
    write cross-entropy for KL: the same gradient, and a constant that grows with T².

    Args:
        other_weight: weight of the non-target-class part (1.5, at T = 1, in the authors' code for ImageNet).
        weight: weight of the whole term.
        temperature: see :class:`~kdlab.losses.SoftTerm`.
    """

    role: Role = "other"
    rows: Literal["labelled", "all"] = "labelled"

    def __init__(
        self,
        other_weight: float = 1.5,
        weight: float | Mapping | Schedule = 1.0,
        temperature: float | Mapping | Schedule | Temperature | None = None,
    ) -> None:
        super().__init__(weight, temperature)
        part_weights(other_weight=other_weight)
        self.other_weight = other_weight

    @override
    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        student_logits, teacher_logits, classes = (
            dense(student.logits),
            dense(teacher.logits),
            named_classes(batch.targets),
        )
        s, t, factor = self.temperature.soften(student_logits, teacher_logits)
        target = target_cross_entropy(student_logits, teacher_logits, classes)
        return target + self.other_weight * factor * decoupled_kl(s, t, classes)[1]
