"""CS-KD: another example of the same class teaches."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import override

from kdlab.errors import UserError
from kdlab.functional import Batch, Outputs, dense
from kdlab.losses.online.mutual import Agreement
from kdlab.losses.term import Rows


class CSKD(Agreement):
    r"""Class-wise self-distillation: each row that has a partner, another row of its class, agrees with it.

    .. math:: T^2\, \mathrm{KL}\big(p(T \mid x') \,\|\, p(T \mid x)\big)

    x' is ``Batch.partner`` of x, and no gradient flows into what is said of it. Yun et al., *Regularizing Class-wise
    Predictions via Self-knowledge Distillation*, CVPR 2020. In their code one row of each pair learns, from its label
    and the other; with ``data.pairing=same_class`` both do.
    """

    rows: Rows = "partnered"
    pairing = "same_class"

    @override
    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        if batch.partner is None:
            raise UserError("batch", "its rows have no partners", "data.pairing=same_class, or Batch.partner")
        logits = dense(student.logits)
        return self.kl(logits, logits[batch.partner.clamp(min=0)])
