"""SimKD: the student's projected feature map, for the teacher's classifier."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from kdlab.errors import UserError
from kdlab.functional import Batch, Outputs, Schedule, dense, squared_error
from kdlab.losses.feature.layer_term import Layers, LayerTerm, maps_only
from kdlab.losses.feature.srrl import linear_head, reads_average
from kdlab.models.transforms.surgery import head_of


class SimKD(LayerTerm):
    r"""SimKD: the student's projected last feature map against the teacher's, so that the teacher's classifier fits it.

    .. math:: \tfrac{1}{C H W}\,\| P(F^S_i) - F^T_i \|^2

    with the student's projector P, which is deployed with it (:class:`~kdlab.models.SimKDStudent`), as is the teacher's
    classifier, which stays as it is (``init=teacher_head``). It is all that the student learns from: neither labels nor
    the teacher's answers are looked at.

    Chen, Mei, Zhang, Wang, Feng & Chen, *Knowledge Distillation with the Reused Teacher Classifier*, CVPR 2022.

    Args:
        student_layer: module path of the projector's output, (B, C, H, W).
        teacher_layer: module path of the map whose average the teacher's classifier reads.
        relu: apply a ReLU that stands, without a module of its own, between that layer and the average.
        weight: see :class:`~kdlab.losses.Term`.
    """

    single_task_only = True

    def __init__(
        self,
        student_layer: Layers,
        teacher_layer: Layers,
        relu: bool = False,
        weight: float | Mapping | Schedule = 1.0,
    ) -> None:
        super().__init__(student_layer, teacher_layer, weight)
        if len(self.student_layers) != 1:
            raise UserError("student_layer", f"{len(self.student_layers)} layers", "one, the projector's")
        self.relu = relu
        self._classifier: tuple[nn.Linear, ...] = ()

    @override
    def setup(self, student: nn.Module, teacher: nn.Module | None, examples: int | None) -> None:
        head, own = linear_head(teacher), head_of(student)[1]
        same = own.weight.shape == head.weight.shape and torch.equal(own.weight.cpu(), head.weight.cpu())
        if not same:  # nothing would ever train it: neither this term nor, with ce at 0, any other
            raise UserError(
                "student", "its classifier is not the teacher's, and SimKD trains none", "init=teacher_head"
            )
        self._classifier = (head,)

    @override
    def prepare(self, student: Outputs, teacher: Outputs | None) -> None:
        if not self._classifier:
            raise UserError(
                "SimKD", "call setup(student, teacher, examples) once before prepare, to see the classifier"
            )
        assert teacher is not None
        [(s, t)] = self.captured(student, teacher)
        maps_only([(s, t)], "SimKD")
        name = self.teacher_layers[0]
        if not reads_average(self._classifier[0], t, dense(teacher.logits)):
            raise UserError(
                "teacher_layer",
                f"{name}, whose average is not what the teacher's classifier reads",
                ("its last feature map, with relu=true where a ReLU follows that is no layer (bn1 of a WideResNet)"),
            )
        if bool((t < 0).any()):
            raise UserError(
                "teacher_layer",
                (f"{name} holds negative numbers, out of the reach of a projector that ends with a ReLU"),
                "a teacher whose last feature map is not negative",
            )
        if s.shape[1] != t.shape[1]:
            raise UserError(
                "student_layer, teacher_layer",
                f"{self.student_layers[0]} has {s.shape[1]} channels, {name} has {t.shape[1]}",
                f"as many, such as student.width={t.shape[1]}",
            )

    @override
    def captured(self, student: Outputs, teacher: Outputs | None) -> list[tuple[Tensor, Tensor]]:
        return [(s, F.relu(t) if self.relu else t) for s, t in super().captured(student, teacher)]

    @override
    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        [(s, t)] = self.pairs(student, teacher)
        return squared_error(s, t)
