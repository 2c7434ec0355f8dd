"""Terms that soften the labels without a teacher."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from kdlab.errors import UserError
from kdlab.functional import (
    Batch,
    Outputs,
    Schedule,
    cross_entropy,
    custom_target_weight,
    dense,
    entropy,
    kl,
    log_probabilities,
    masked_classes,
    virtual_teacher,
    without_target,
    zipf_kl,
)
from kdlab.losses.decoupled import named_classes, part_weights
from kdlab.losses.temperature import check_temperature
from kdlab.losses.term import Term


class ConfidencePenalty(Term):
    r"""How far the entropy of the student's output is below a threshold; the labels are not asked.

    .. math:: \max\big(0,\, \Gamma - H(p^S)\big)

    Without a threshold it is the greatest entropy, log C: the penalty is then KL(output ‖ uniform), which is the
    published -H plus a constant. Pereyra et al., *Regularizing Neural Networks by Penalizing Confident Output
    Distributions*, ICLR 2017 workshop; their beta is the weight.

    Args:
        threshold: Γ, in nats, above 0; None for log C, of the classes that are not masked.
        weight: see :class:`~kdlab.losses.Term`.
    """

    needs_teacher = False
    by_row = True

    def __init__(self, threshold: float | None = None, weight: float | Mapping | Schedule = 1.0) -> None:
        super().__init__(weight)
        if threshold is not None and not 0 < threshold < math.inf:
            raise UserError(f"threshold: {threshold}; accepted: a finite number above 0, in nats, or null for log C")
        self.threshold = threshold

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
    by_row = True

    def __init__(
        self, correct: float = 0.99, temperature: float = 20.0, weight: float | Mapping | Schedule = 1.0
    ) -> None:
        super().__init__(weight)
        if not 0 < correct < 1:
            raise UserError(f"correct: {correct}; accepted: a probability above 0 and below 1")
        check_temperature("temperature", temperature)
        self.correct, self.temperature = correct, temperature

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        logits = dense(student.logits)
        told = virtual_teacher(named_classes(batch.targets), logits.shape[-1], self.correct, self.temperature)
        return kl(logits, told.masked_fill(masked_classes(logits), -math.inf))


class USKD(Term):
    r"""Universal self-KD: soft labels that the student makes for itself.

    .. math::
        -\,w_{target}\,P_i \log p_{it}
        \;+\; w_{other}\,\mathrm{KL}\big(z_i \,\|\, \hat p_i\big)
        \;+\; w_{weak}\,\mathrm{CE}(y'_i, p^W_i),
        \qquad P_i = 1 + p_{it}^2 - \tfrac1B \textstyle\sum_j p_{jt}^2

    with :math:`\hat p` the distribution over the classes that are not the target, and :math:`z` Zipf's law over their
    ranks by :math:`\hat p + \hat p^W`. :math:`p^W` is the *weak* output: a linear layer, which trains beside the
    student and is no part of it, on the pooled output of a middle layer; it learns from the labels smoothed by 0.1.

    Yang et al., *From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized Loss
    and Customized Soft Labels*, ICCV 2023, whose alpha, beta and mu are the three weights. They write cross-entropy for
    KL, which adds a constant; their code ranks the target among the others before it leaves it out, so that ranks begin
    at 2 where it is first, and ranks by the student's log-probabilities beside the weak output's probabilities, here by
    probabilities both; the two change the gradient by at most 5 %. Their form for mixed pictures (two target classes a
    row) is left out: soft targets name the class that they favour. One value per row, though rows interact through the
    mean over the micro-batch, in which rows of weight 0 take no part.

    Args:
        student_layer: the middle layer, feature maps (B, C, H, W) or vectors; None leaves the weak output out, and
            ranks by the student's own output alone.
        target_weight: of the target's part.
        other_weight: of the non-target classes' part.
        weak_weight: of the weak output's cross-entropy.
        weight: of the whole term.
    """

    rows: Literal["labelled", "all"] = "labelled"
    needs_teacher = False

    one_task = True

    def __init__(
        self,
        student_layer: str | None = None,
        target_weight: float = 1.0,
        other_weight: float = 0.1,
        weak_weight: float = 0.005,
        weight: float | Mapping | Schedule = 1.0,
    ) -> None:
        super().__init__(weight)
        part_weights(target_weight=target_weight, other_weight=other_weight, weak_weight=weak_weight)
        self.student_layers = () if student_layer is None else (student_layer,)
        self.target_weight, self.other_weight, self.weak_weight = target_weight, other_weight, weak_weight
        self.weak: nn.Module | None = None

    def prepare(self, student: Outputs, teacher: Outputs | None) -> None:
        if self.student_layers and self.weak is None:
            feature = self._pooled(student)
            self.weak = nn.Linear(feature.shape[-1], student.logits.shape[-1], device=feature.device)

    def _pooled(self, student: Outputs) -> Tensor:
        (name,) = self.student_layers
        if name not in student.features:
            raise UserError(f"student_layer: no output of layer {name!r} was captured; accepted: a layer's module path")
        feature = student.features[name]
        if feature.ndim not in (2, 4) or len(feature) != student.logits.shape[0]:
            raise UserError(
                f"student_layer: {name!r} gives {tuple(feature.shape)}; accepted: feature maps (B, C, H, W) or vectors"
            )
        feature = feature.to(torch.promote_types(feature.dtype, torch.float32))
        return feature.mean((2, 3)) if feature.ndim == 4 else feature

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        logits, classes = dense(student.logits), named_classes(batch.targets)
        wide = torch.promote_types(logits.dtype, torch.float32)
        ours = without_target(logits.to(wide), classes)
        log_p = log_probabilities(logits).gather(-1, classes[:, None]).squeeze(-1)
        counted = batch.labelled if batch.weight is None else batch.labelled & (batch.weight > 0)
        value = -self.target_weight * custom_target_weight(logits, classes, counted) * log_p
        if not self.student_layers:
            return value + self.other_weight * zipf_kl(ours, by=[ours])
        weak = self._weak_logits(student)
        value = value + self.weak_weight * cross_entropy(weak, batch.targets, 0.1)
        return value + self.other_weight * zipf_kl(ours, by=[ours, without_target(weak.to(wide), classes)])

    def _weak_logits(self, student: Outputs) -> Tensor:
        if self.weak is None:
            raise UserError("USKD: call prepare(student, teacher) once before training, to make its weak output")
        feature = self._pooled(student)
        return self.weak(feature.to(next(self.weak.parameters()).dtype))
