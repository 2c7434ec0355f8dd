"""Terms without a teacher: confidence penalty, and the virtual teacher of Tf-KD."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from torch import Tensor
from typing_extensions import override

from kdlab.errors import UserError
from kdlab.functional import (
    Batch,
    Outputs,
    Schedule,
    dense,
    entropy,
    kl,
    masked_classes,
    virtual_teacher,
)
from kdlab.losses.response.dkd import named_classes
from kdlab.losses.temperature import check_temperature
from kdlab.losses.term import Term
from kdlab.ranges import share


class ConfidencePenalty(Term):
    r"""Shortfall of the entropy of the student's output below a threshold; the labels are not used.

    .. math:: \max\big(0,\, \Gamma - H(p^S)\big)

    Without a threshold it is the greatest entropy, log C: the penalty is then KL(output ‖ uniform), which is the
    published -H plus a constant. Pereyra et al., *Regularizing Neural Networks by Penalizing Confident Output
    Distributions*, ICLR 2017 workshop; their beta is the weight.

    Args:
        threshold: Γ, in nats, above 0; None for log C, of the classes that are not masked.
        weight: see :class:`~kdlab.losses.Term`.
    """

    needs_teacher = False
    rowwise = True

    def __init__(self, threshold: float | None = None, weight: float | Mapping | Schedule = 1.0) -> None:
        super().__init__(weight)
        if threshold is not None and not 0 < threshold < math.inf:
            raise UserError("threshold", threshold, "a finite number above 0, in nats, or null for log C")
        self.threshold = threshold

    @override
    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        logits = dense(student.logits)
        if self.threshold is None:
            return (~masked_classes(logits)).sum(-1).log() - entropy(logits)
        return (self.threshold - entropy(logits)).clamp(min=0)


class TfKD(Term):
    r"""Teacher-free KD with a virtual teacher that is right and knows nothing else.

    .. math::
        \mathrm{KL}\big(p^d(T) \,\|\, p^S\big), \qquad p^d_c(T) \propto (p^d_c)^{1/T}, \quad
        p^d_c = a \ \text{if}\ c = y,\ \text{else}\ \tfrac{1 - a}{C - 1}

    Yuan et al., *Revisiting Knowledge Distillation via Label Smoothing Regularization*, CVPR 2020 (Tf-KD with
    regularisation). As in the authors' code the temperature softens the virtual teacher alone, so there is no T². Their
    code softens it by a softmax of its probabilities over T, here it is one of its logarithms over T: at T = 20 the
    label's share is 0.0157 here and 0.0105 there of 100 classes, 0.135 and 0.105 of 10, and the gradient is the same to
    0.3 %.

    Args:
        correct: a, the virtual teacher's probability of the label, in (0, 1); 0.99 in the paper.
        temperature: T, above 0; at least 20 in the paper. The ``temperature`` group has no say in it.
        weight: see :class:`~kdlab.losses.Term`; alpha in the paper, whose cross-entropy weighs 1 - alpha.
    """

    rows: Literal["labelled", "all"] = "labelled"
    needs_teacher = False
    rowwise = True

    def __init__(
        self, correct: float = 0.99, temperature: float = 20.0, weight: float | Mapping | Schedule = 1.0
    ) -> None:
        super().__init__(weight)
        share("correct", correct, zero=False, one=False)
        check_temperature("temperature", temperature)
        self.correct, self.temperature = correct, temperature

    @override
    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        logits = dense(student.logits)
        teacher_logits = virtual_teacher(named_classes(batch.targets), logits.shape[-1], self.correct, self.temperature)
        return kl(logits, teacher_logits.masked_fill(masked_classes(logits), -math.inf))
