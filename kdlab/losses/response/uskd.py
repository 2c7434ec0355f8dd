"""USKD: soft labels of the student's own making."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from kdlab.errors import UserError
from kdlab.functional import (
    Batch,
    Outputs,
    Schedule,
    cross_entropy,
    custom_target_weight,
    dense,
    log_probabilities,
    without_target,
    zipf_kl,
)
from kdlab.losses.response.dkd import named_classes, part_weights
from kdlab.losses.term import Term


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
        student_layer: module path of the middle layer, maps (B, C, H, W) or vectors; None leaves the weak output
            out, and ranks by the student's own output alone.
        target_weight: weight of the target's part.
        other_weight: weight of the non-target classes' part.
        weak_weight: weight of the weak output's cross-entropy.
        weight: weight of the whole term.
    """

    rows: Literal["labelled", "all"] = "labelled"
    needs_teacher = False

    single_task_only = True

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

    @override
    def prepare(self, student: Outputs, teacher: Outputs | None) -> None:
        if self.student_layers and self.weak is None:
            feature = self._pooled(student)
            self.weak = nn.Linear(feature.shape[-1], student.logits.shape[-1], device=feature.device)

    def _pooled(self, student: Outputs) -> Tensor:
        (name,) = self.student_layers
        if name not in student.features:
            raise UserError("student_layer", f"no output of layer {name!r} was captured", "a layer's module path")
        feature = student.features[name]
        if feature.ndim not in (2, 4) or len(feature) != student.logits.shape[0]:
            raise UserError(
                "student_layer", f"{name!r} gives {tuple(feature.shape)}", "feature maps (B, C, H, W) or vectors"
            )
        feature = feature.to(torch.promote_types(feature.dtype, torch.float32))
        return feature.mean((2, 3)) if feature.ndim == 4 else feature

    @override
    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        logits, classes = dense(student.logits), named_classes(batch.targets)
        wide = torch.promote_types(logits.dtype, torch.float32)
        other_logits = without_target(logits.to(wide), classes)
        log_p = log_probabilities(logits).gather(-1, classes[:, None]).squeeze(-1)
        counted = batch.labelled if batch.weight is None else batch.labelled & (batch.weight > 0)
        value = -self.target_weight * custom_target_weight(logits, classes, counted) * log_p
        if not self.student_layers:
            return value + self.other_weight * zipf_kl(other_logits, by=[other_logits])
        weak = self._weak_logits(student)
        value = value + self.weak_weight * cross_entropy(weak, batch.targets, 0.1)
        return value + self.other_weight * zipf_kl(
            other_logits, by=[other_logits, without_target(weak.to(wide), classes)]
        )

    def _weak_logits(self, student: Outputs) -> Tensor:
        if self.weak is None:
            raise UserError("USKD", "call prepare(student, teacher) once before training, to make its weak output")
        feature = self._pooled(student)
        return self.weak(feature.to(next(self.weak.parameters()).dtype))
