"""Terms on classifiers inside the student, which the deepest one teaches (be your own teacher)."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from kdlab.functional import Batch, Outputs, cross_entropy, dense, squared_error
from kdlab.losses.online.mutual import Agreement, numbered
from kdlab.losses.term import LabelTerm, Term


class ExitsCE(LabelTerm):
    r"""Cross-entropy of every exit with the labels, summed over the exits.

    Of a :class:`~kdlab.models.Exits`.

    .. math:: \sum_i -\log p^i_{y}

    Zhang et al., *Be Your Own Teacher: Improve the Performance of Convolutional Neural Networks via Self Distillation*,
    ICCV 2019.
    """

    auxiliary = "exits"

    @override
    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        exits = numbered(student, "exit")
        return torch.stack([cross_entropy(logits, batch.targets) for logits in exits]).sum(0)


class ExitsKL(Agreement):
    r"""KL of every exit from the student's own output, from which no gradient flows, summed over the exits.

    .. math:: T^2 \sum_i \mathrm{KL}\big(p^C(T) \,\|\, p^i(T)\big)

    C is the deepest classifier, the student's own. Zhang et al., *Be Your Own Teacher*, ICCV 2019 (in their code T
    is 3, and there is no T²).
    """

    auxiliary = "exits"

    @override
    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        deepest = dense(student.logits)
        return torch.stack([self.kl(logits, deepest) for logits in numbered(student, "exit")]).sum(0)


class ExitsHint(Term):
    r"""Distance of every exit's feature from the one that the student's own head reads, which gets no gradient.

    .. math:: \sum_i \tfrac1n \| F^i - F^C \|_2^2

    n is the width of both. Zhang et al., *Be Your Own Teacher*, ICCV 2019, who sum over the n elements. A common
    reimplementation leaves out elements that are at most 0 in both. It is equal where the student's feature ends in a
    ReLU, as those of the exits do; where that may be negative, up to 60 % of the gradient are its elements.
    """

    needs_teacher = False
    auxiliary = "exits"

    @override
    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        features = numbered(student, "exit", "_feature")
        deepest = student.heads["feature"].detach()
        return torch.stack([squared_error(feature, deepest) for feature in features]).sum(0)
