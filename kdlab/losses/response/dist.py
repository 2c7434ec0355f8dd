"""DIST: Pearson correlation of predictions instead of their KL."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import override

from kdlab.functional import (
    Batch,
    Outputs,
    dense,
    inter_class_distance,
    intra_class_distance,
)
from kdlab.losses.response.soft_term import SoftTerm
from kdlab.losses.term import Role


def counted(batch: Batch, *rows: Tensor) -> tuple[Tensor, ...]:
    """Return the rows of tensors (rows, ...) whose weight is not 0."""
    return rows if batch.weight is None else tuple(each[batch.weight > 0] for each in rows)


class DISTInter(SoftTerm):
    r"""DIST between classes: 1 minus the correlation of a row's probabilities with the teacher's; one value per row.

    .. math:: 1 - \rho\big(p^S_{i,:}(T),\, p^T_{i,:}(T)\big)

    The student may be more or less sure than the teacher, as long as its preferences are alike. A correlation is blind
    to scale, so that neither it nor its gradient shrinks as T grows: there is no factor T². (The authors' code
    multiplies by T²; a weight of 32 at T = 4 is their 2. It also adds 1e-8 to the product of the norms, which silences
    classes of probabilities below 1e-4 in the whole batch, and batches of two rows in which the true gradient is 0: of
    33 rows of confident logits the value here differs by 1e-4 and the gradient by 3 %, of two rows by up to 11 %.)

    Huang et al., *Knowledge Distillation from A Stronger Teacher*, NeurIPS 2022.
    """

    role: Role = "other"

    @override
    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        s, t, _ = self.temperature.soften(dense(student.logits), dense(teacher.logits))
        return inter_class_distance(s, t)


class DISTIntra(SoftTerm):
    r"""DIST within classes: 1 minus the correlation, over the rows of a batch, of the probabilities of one class.

    .. math:: \tfrac1C \sum_c \Big(1 - \rho\big(p^S_{:,c}(T),\, p^T_{:,c}(T)\big)\Big)

    A scalar: rows interact. A step that is split into micro-batches correlates the rows of each alone. As for
    :class:`DISTInter` there is no factor T². Huang et al., NeurIPS 2022.
    """

    role: Role = "other"
    rowwise = False

    @override
    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        s, t, _ = self.temperature.soften(*counted(batch, dense(student.logits), dense(teacher.logits)))
        return intra_class_distance(s, t)
