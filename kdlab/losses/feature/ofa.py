"""What trains beside a student and stays behind: branches from its layers to a space in which it is compared."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from kdlab.errors import UserError
from kdlab.functional import Batch, Outputs, Schedule, cross_entropy, dense, enhanced_target
from kdlab.losses.feature.layer_term import Layers, layer_of, paths, project
from kdlab.losses.term import Role, Term
from kdlab.models.vision.blocks import BatchNorm

COARSE = 4
"""Side of the grid that a branch brings maps to, where the student's last layer has none."""


class Tokens(nn.Module):
    """Mean over positions of normalised hidden states, (B, T, d) to (B, d)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    @override
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x).mean(1)


def separable(inputs: int, outputs: int) -> nn.Sequential:
    """Build two depthwise separable convolutions, the first of which halves the grid."""

    def one(before: int, after: int, stride: int) -> list[nn.Module]:
        depthwise = nn.Conv2d(before, before, 3, stride, padding=1, groups=before, bias=False)
        return [depthwise, nn.Conv2d(before, after, 1, bias=False), BatchNorm(after), nn.ReLU()]

    return nn.Sequential(*one(inputs, inputs, 2), *one(inputs, outputs, 1))


def branch(feature: Tensor, classes: int, last: Tensor) -> nn.Sequential:
    """Build a trainable branch from a layer's output to logits.

    Args:
        feature: the layer's output, (B, C, H, W), (B, T, d) or (B, d).
        classes: number of classes.
        last: the output of the student's last layer that has a branch; maps are brought near its grid and width.

    Returns:
        Feature maps: as many halvings as lie between this grid and the last one, each by :func:`separable` and twice as
        wide up to the last one's width, then the mean over positions; hidden states: normalised, then the mean over
        positions; and a linear map.
    """
    if feature.ndim not in (2, 3, 4):
        raise UserError("student_layer", f"an output of {feature.ndim} dimensions", "maps, hidden states, vectors")
    made: list[nn.Module] = []
    width = feature.shape[1] if feature.ndim == 4 else feature.shape[-1]
    if feature.ndim == 3:
        made.append(Tokens(width))
    elif feature.ndim == 4:
        # a last vector is the mean of a grid that nobody sees here
        side, most = (last.shape[-1], last.shape[1]) if last.ndim == 4 else (COARSE, last.shape[-1])
        for _ in range(round(math.log2(max(feature.shape[-1] / side, 1)))):
            wider = max(min(2 * width, most), width)
            made.append(separable(width, wider))
            width = wider
        made += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*made, nn.Linear(width, classes)).to(feature.device)


class OFA(Term):
    r"""OFA-KD: branches on layers of the student predict the class, and learn from the teacher as the output does.

    .. math::
        \sum_{b} \Big(-\big(1 + p^T_{\hat c}\big)^{\gamma} \log p^b_{\hat c} - \sum_{c \ne \hat c} p^T_c \log p^b_c\Big)

    over the branches b. In the space of logits, what an architecture's features have of their own is gone, so that
    a transformer can teach a convolutional network and the other way round. See
    :func:`~kdlab.functional.enhanced_target`. The student's own logits get the same, less the label's
    :math:`-\log p_{\hat c}`, which the objective's label term has already.

    Takes no temperature (the authors' is 1): the label's part does not shrink with one, as T² assumes. Needs the class
    of every row, so it counts over labelled rows. The branches train, and are no part of the student; their BatchNorm
    makes the rows of a micro-batch interact, as the student's own does. See :func:`branch` (the authors' have a block
    of attention more for transformers).

    Hao et al., *One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge Distillation*, NeurIPS
    2023.

    Args:
        student_layer: module paths in the student, from the shallowest to the deepest.
        gamma: exponent by which a teacher that is sure of the label counts for more; at least 1.
        output: compare the student's own logits too.
        weight: see :class:`~kdlab.losses.Term`.

    Raises:
        UserError: for no layer, or gamma below 1.
    """

    role: Role = "other"
    rows: Literal["labelled", "all"] = "labelled"

    single_task_only = True

    def __init__(
        self,
        student_layer: Layers,
        gamma: float = 1.5,
        output: bool = True,
        weight: float | Mapping | Schedule = 1.0,
    ) -> None:
        super().__init__(weight)
        self.student_layers = paths(student_layer)
        if not self.student_layers:
            raise UserError("student_layer", "none", "at least one module path")
        if not 1 <= gamma < math.inf:
            raise UserError("gamma", gamma, "a finite number, at least 1")
        self.gamma, self.output = gamma, output
        self.branches = nn.ModuleList()

    @override
    def prepare(self, student: Outputs, teacher: Outputs | None) -> None:
        if not self.branches:
            features = [layer_of(student, name, "student_layer") for name in self.student_layers]
            self.branches.extend(branch(feature, student.logits.shape[-1], features[-1]) for feature in features)

    @override
    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        if not self.branches:
            raise UserError("OFA", "call prepare(student, teacher) once before training, to make its branches")
        classes = batch.targets.argmax(-1) if batch.targets.ndim == 2 else batch.targets.clamp(min=0)
        teacher_logits = dense(teacher.logits)
        losses = []
        for name, exit_ in zip(self.student_layers, self.branches, strict=True):
            logits = project(layer_of(student, name, "student_layer"), with_=exit_)
            losses.append(enhanced_target(logits, teacher_logits, classes, self.gamma))
        if self.output:
            student_logits = dense(student.logits)
            losses.append(
                enhanced_target(student_logits, teacher_logits, classes, self.gamma)
                - cross_entropy(student_logits, classes)
            )
        return torch.stack(losses).sum(0)
