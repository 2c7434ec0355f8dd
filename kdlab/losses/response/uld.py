"""ULD: distributions over different vocabularies, compared in the order of their probabilities."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from kdlab.errors import UserError
from kdlab.functional import Batch, Outputs, SequenceBatch, dense
from kdlab.losses.response.soft_term import SoftTerm


def picked_rows(hidden: Tensor, batch: Batch) -> Tensor:
    """Return the hidden states (rows, d) of a batch's rows, from (rows, d) or (B, T, d)."""
    if hidden.ndim == 3 and isinstance(batch, SequenceBatch) and hidden.shape[:2] == batch.loss_mask.shape:
        return hidden[batch.loss_mask]
    if hidden.ndim == 2 and len(hidden) == len(batch):
        return hidden
    raise UserError(
        "student_layer, teacher_layer",
        f"an output of shape {tuple(hidden.shape)}",
        f"one hidden state for each of the {len(batch)} rows, or for each position",
    )


class ULD(SoftTerm):
    r"""Universal logit distillation: distance of the sorted probabilities, whatever tokens they belong to, times T.

    .. math:: T \sum_{c=1}^{\max(C^S, C^T)} \big| p^S_{(c)}(T) - p^T_{(c)}(T) \big|

    with :math:`p_{(1)} \ge p_{(2)} \ge \dots`, and zeros where the smaller vocabulary has ended: the Wasserstein
    distance of both if all tokens are equally far from each other. Boizard et al., *Towards Cross-Tokenizer
    Distillation: the Universal Logit Distillation Loss for LLMs*, TMLR 2025, who train on cross-entropy plus 1.5 times
    this, at T = 1.

    A row that :class:`~kdlab.teachers.CrossTokenizerTeacher` found no partner for (``teacher.heads["paired"]``) is 0.
    """

    vocabulary_agnostic = True

    @override
    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        s, t, factor = self.temperature.soften(dense(student.logits), dense(teacher.logits))
        wide = max(s.shape[-1], t.shape[-1])
        p, q = (F.pad(z.softmax(-1).sort(-1, descending=True).values, (0, wide - z.shape[-1])) for z in (s, t))
        value = (p - q).abs().sum(-1) * factor**0.5
        paired = teacher.heads.get("paired")
        return value if paired is None else torch.where(paired, value, 0.0)
