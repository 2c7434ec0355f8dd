"""SRRL: the student's feature as the teacher's classifier reads it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from kdlab.errors import UserError
from kdlab.functional import Batch, Outputs, Schedule, dense, logit_squared_error, squared_error
from kdlab.losses.feature.layer_term import Layers, LayerTerm, project
from kdlab.models.transforms.surgery import head_of
from kdlab.models.vision.blocks import BatchNorm


class SRRL(LayerTerm):
    r"""SRRL: the student's last feature against the teacher's, as it is and as the teacher's classifier reads it.

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
        student_layer: module path of the feature that the student's classifier reads, (B, d).
        teacher_layer: module path of the feature that the teacher's classifier reads.
        regression: :math:`\lambda`, the weight of the classifier's part beside the feature's.
        relu: end the connector with a ReLU; off where the teacher's feature can be negative.
        weight: see :class:`~kdlab.losses.Term`.
    """

    single_task_only = True

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
            raise UserError("student_layer", f"{len(self.student_layers)} layers", "one, that the classifier reads")
        if not 0 <= regression < float("inf"):
            raise UserError("regression", regression, "a finite number, at least 0")
        self.regression, self.relu = regression, relu
        self.connector: nn.Sequential | None = None
        self._classifier: tuple[nn.Linear, ...] = ()

    @override
    def setup(self, student: nn.Module, teacher: nn.Module | None, examples: int | None) -> None:
        self._classifier = (linear_head(teacher),)

    @override
    def prepare(self, student: Outputs, teacher: Outputs | None) -> None:
        head = self._head()
        [(s, t)] = self.pairs(student, teacher)
        if s.ndim != 2:
            raise UserError("student_layer, teacher_layer", "SRRL takes the vectors (B, d) that the classifiers read")
        if t.shape[1] != head.in_features:
            raise UserError(
                "teacher_layer",
                (
                    f"{self.teacher_layers[0]} has {t.shape[1]} numbers, and the teacher's classifier "
                    f"reads {head.in_features}"
                ),
                "the layer that it reads",
            )
        if self.relu and bool((t < 0).any()):
            raise UserError(
                "relu",
                (
                    f"true, and the teacher's {self.teacher_layers[0]} holds negative numbers, out of "
                    "the reach of a connector that ends with a ReLU"
                ),
                "false",
            )
        if self.connector is None:
            last = [nn.ReLU()] if self.relu else []
            made = nn.Sequential(nn.Linear(s.shape[1], t.shape[1], bias=False), BatchNorm(t.shape[1]), *last)
            self.connector = made.to(s.device)

    @override
    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        if self.connector is None:
            raise UserError("SRRL", "call prepare(student, teacher) once before training, to make its connector")
        [(s, t)] = self.pairs(student, teacher)
        head = self._head()
        made = project(s, with_=self.connector)
        weight, bias = head.weight.detach(), None if head.bias is None else head.bias.detach()
        read = F.linear(made.to(weight.dtype), weight, bias)
        return squared_error(made, t) + self.regression * logit_squared_error(read, dense(teacher.logits))

    def _head(self) -> nn.Linear:
        if not self._classifier:
            raise UserError("SRRL", "call setup(student, teacher, examples) once before prepare, to see the classifier")
        return self._classifier[0]


def reads_average(head: nn.Linear, feature: Tensor, logits: Tensor) -> bool:
    """Return whether a classifier makes these logits of the map's average, within one percent for any precision."""
    if feature.shape[1] != head.in_features:
        return False
    rebuilt = head(feature.to(head.weight.dtype).mean((2, 3))).to(logits.dtype)
    return rebuilt.shape == logits.shape and bool((rebuilt - logits).abs().max() <= 0.01 * logits.abs().max())


def linear_head(teacher: nn.Module | None) -> nn.Linear:
    """Return the classifier of a teacher.

    Raises:
        UserError: if it cannot be seen, or is not linear.
    """
    if teacher is None:
        raise UserError("teacher", "its classifier cannot be seen", "a single live network")
    name, head = head_of(teacher)
    if not isinstance(head, nn.Linear):
        raise UserError("teacher", f"its classifier {name!r} is a {type(head).__name__}", "a linear layer")
    return head
