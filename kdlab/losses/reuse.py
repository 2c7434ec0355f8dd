"""Terms that use a part of the teacher: its classifier."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdlab.errors import UserError
from kdlab.functional import Batch, Outputs, Schedule, dense, logit_squared_error, squared_error
from kdlab.losses.features import Layers, LayerTerm, maps_only, project
from kdlab.models.parts import BatchNorm
from kdlab.models.surgery import head_of


class SRRL(LayerTerm):
    r"""SRRL: the student's last feature, through a connector, against the teacher's, as it is and as its classifier
    reads it.

    .. math::
        \tfrac{1}{d}\,\| r(h^S_i) - h^T_i \|^2 + \tfrac{\lambda}{C}\,\| W^T r(h^S_i) + b^T - z^T_i \|^2

    with the teacher's own classifier :math:`W^T, b^T`, which stays as it is, and its logits :math:`z^T`. The connector
    r is a linear map, BatchNorm and ReLU; it trains, and is no part of the student. Its BatchNorm makes the rows of
    a micro-batch interact, as the student's own does.

    Yang, Martinez, Bulat & Tzimiropoulos, *Knowledge Distillation via Softmax Regression Representation Learning*,
    ICLR 2021, of whose two forms of softmax regression (cross-entropy, squared difference of the logits) this is the
    second, that of the authors' code. Theirs connects the maps before the average over positions; here, as in
    the benchmark on CIFAR-100 of Chen et al. (*Knowledge Distillation with the Reused Teacher Classifier*, CVPR 2022),
    the averages.

    Args:
        student_layer: module path of what the student's classifier reads, (B, d).
        teacher_layer: that of what the teacher's reads.
        regression: :math:`\lambda`, the weight of the classifier's part beside the feature's.
        relu: whether the connector ends with a ReLU; off where the teacher's feature can be negative.
        weight: see :class:`~kdlab.losses.Term`.
    """

    one_task = True

    def __init__(
        self,
        student_layer: Layers,
        teacher_layer: Layers,
        regression: float = 1.0,
        relu: bool = True,
        weight: float | Mapping | Schedule = 1.0,
    ) -> None:
        super().__init__(student_layer, teacher_layer, weight)
        if len(self.student_layers) != 1:
            raise UserError(
                f"student_layer: {len(self.student_layers)} layers; accepted: one, that the classifier reads"
            )
        if not 0 <= regression < float("inf"):
            raise UserError(f"regression: {regression}; accepted: a finite number, at least 0")
        self.regression, self.relu = regression, relu
        self.connector: nn.Sequential | None = None
        self._classifier: tuple[nn.Linear, ...] = ()

    def meet(self, student: nn.Module, teacher: nn.Module | None, examples: int | None) -> None:
        self._classifier = (linear_head(teacher),)

    def prepare(self, student: Outputs, teacher: Outputs | None) -> None:
        head = self._head()
        [(s, t)] = self.pairs(student, teacher)
        if s.ndim != 2:
            raise UserError("student_layer, teacher_layer: SRRL takes the vectors (B, d) that the classifiers read")
        if t.shape[1] != head.in_features:
            raise UserError(
                f"teacher_layer: {self.teacher_layers[0]} has {t.shape[1]} numbers, and the teacher's classifier reads "
                f"{head.in_features}; accepted: the layer that it reads"
            )
        if self.relu and bool((t < 0).any()):
            raise UserError(
                f"relu: true, and the teacher's {self.teacher_layers[0]} holds negative numbers, out of the reach of a "
                "connector that ends with a ReLU; accepted: false"
            )
        if self.connector is None:
            last = [nn.ReLU()] if self.relu else []
            made = nn.Sequential(nn.Linear(s.shape[1], t.shape[1], bias=False), BatchNorm(t.shape[1]), *last)
            self.connector = made.to(s.device)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        if self.connector is None:
            raise UserError("SRRL: call prepare(student, teacher) once before training, to make its connector")
        [(s, t)] = self.pairs(student, teacher)
        head = self._head()
        made = project(s, with_=self.connector)
        weight, bias = head.weight.detach(), None if head.bias is None else head.bias.detach()
        read = F.linear(made.to(weight.dtype), weight, bias)
        return squared_error(made, t) + self.regression * logit_squared_error(read, dense(teacher.logits))

    def _head(self) -> nn.Linear:
        if not self._classifier:
            raise UserError("SRRL: call meet(student, teacher, examples) once before prepare, to see the classifier")
        return self._classifier[0]


class SimKD(LayerTerm):
    r"""SimKD: the student's projected last feature map against the teacher's, so that the teacher's classifier fits it.

    .. math:: \tfrac{1}{C H W}\,\| P(F^S_i) - F^T_i \|^2

    with the student's projector P, which is deployed with it (:class:`~kdlab.models.Reused`), as is the teacher's
    classifier, which stays as it is (``init=classifier``). It is all that the student learns from: neither labels nor
    the teacher's answers are looked at.

    Chen, Mei, Zhang, Wang, Feng & Chen, *Knowledge Distillation with the Reused Teacher Classifier*, CVPR 2022.

    Args:
        student_layer: module path of the projector's output, (B, C, H, W).
        teacher_layer: that of the map whose average the teacher's classifier reads.
        relu: whether a ReLU without a module of its own stands between that layer and the average.
        weight: see :class:`~kdlab.losses.Term`.
    """

    one_task = True

    def __init__(
        self,
        student_layer: Layers,
        teacher_layer: Layers,
        relu: bool = False,
        weight: float | Mapping | Schedule = 1.0,
    ) -> None:
        super().__init__(student_layer, teacher_layer, weight)
        if len(self.student_layers) != 1:
            raise UserError(f"student_layer: {len(self.student_layers)} layers; accepted: one, the projector's")
        self.relu = relu
        self._classifier: tuple[nn.Linear, ...] = ()

    def meet(self, student: nn.Module, teacher: nn.Module | None, examples: int | None) -> None:
        head, own = linear_head(teacher), head_of(student)[1]
        same = own.weight.shape == head.weight.shape and torch.equal(own.weight.cpu(), head.weight.cpu())
        if not same:  # nothing would ever train it: neither this term nor, with ce at 0, any other
            raise UserError(
                "student: its classifier is not the teacher's, and SimKD trains none; accepted: init=classifier"
            )
        self._classifier = (head,)

    def prepare(self, student: Outputs, teacher: Outputs | None) -> None:
        if not self._classifier:
            raise UserError("SimKD: call meet(student, teacher, examples) once before prepare, to see the classifier")
        assert teacher is not None
        [(s, t)] = self.captured(student, teacher)
        maps_only([(s, t)], "SimKD")
        name = self.teacher_layers[0]
        if not _reads(self._classifier[0], t, dense(teacher.logits)):
            raise UserError(
                f"teacher_layer: {name}, whose average is not what the teacher's classifier reads; accepted: its last "
                "feature map, with relu=true where a ReLU follows that is no layer (bn1 of a WideResNet)"
            )
        if bool((t < 0).any()):
            raise UserError(
                f"teacher_layer: {name} holds negative numbers, out of the reach of a projector that ends with a ReLU; "
                "accepted: a teacher whose last feature map is not negative"
            )
        if s.shape[1] != t.shape[1]:
            raise UserError(
                f"student_layer, teacher_layer: {self.student_layers[0]} has {s.shape[1]} channels, {name} has "
                f"{t.shape[1]}; accepted: as many, such as student.width={t.shape[1]}"
            )

    def captured(self, student: Outputs, teacher: Outputs | None) -> list[tuple[Tensor, Tensor]]:
        return [(s, F.relu(t) if self.relu else t) for s, t in super().captured(student, teacher)]

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        [(s, t)] = self.pairs(student, teacher)
        return squared_error(s, t)


def _reads(head: nn.Linear, feature: Tensor, logits: Tensor) -> bool:
    """Whether a classifier makes these logits of the average of that map; one percent is room for any precision."""
    if feature.shape[1] != head.in_features:
        return False
    said = head(feature.to(head.weight.dtype).mean((2, 3))).to(logits.dtype)
    return said.shape == logits.shape and bool((said - logits).abs().max() <= 0.01 * logits.abs().max())


def linear_head(teacher: nn.Module | None) -> nn.Linear:
    """The classifier of a teacher.

    Raises:
        UserError: if it cannot be seen, or is not linear.
    """
    if teacher is None:
        raise UserError("teacher: its classifier cannot be seen; accepted: a single live network")
    name, head = head_of(teacher)
    if not isinstance(head, nn.Linear):
        raise UserError(f"teacher: its classifier {name!r} is a {type(head).__name__}; accepted: a linear layer")
    return head
