"""WSLD: soft targets weighted by row."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from typing_extensions import override

from kdlab.functional import (
    Batch,
    Outputs,
    dense,
    kl,
    soft_label_weight,
)
from kdlab.losses.response.soft_term import SoftTerm
from kdlab.losses.term import Role


class WSLD(SoftTerm):
    r"""Weighted soft labels: KL times T², each row weighted by the student's lag behind the teacher on its label.

    .. math::
        T^2\,\Big(1 - \exp\big(-\tfrac{\mathrm{CE}(y, p^S)}{\mathrm{CE}(y, p^T)}\big)\Big)\,
        \mathrm{KL}\big(p^T(T) \,\|\, p^S(T)\big)

    The cross-entropies of the weight are those at temperature 1, and no gradient goes through them. Zhou et al.,
    *Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance Tradeoff Perspective*, ICLR 2021, write
    cross-entropy for KL: the same gradient, and a value that does not end at 0.
    """

    role: Role = "other"
    rows: Literal["labelled", "all"] = "labelled"

    @override
    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        student_logits, teacher_logits = dense(student.logits), dense(teacher.logits)
        s, t, factor = self.temperature.soften(student_logits, teacher_logits)
        return factor * soft_label_weight(student_logits, teacher_logits, batch.targets) * kl(s, t)
