"""A student that ends with its teacher's classifier: a network, a projector to the teacher's width, the classifier."""

from __future__ import annotations

from torch import Tensor, nn
from typing_extensions import override

from kdlab.errors import UserError
from kdlab.models.transforms.surgery import freeze, head_of
from kdlab.models.vision.blocks import conv1x1, conv3x3, global_pool, init_weights


class SimKDStudent(nn.Module):
    """Network whose last feature map a projector turns into one that its teacher's classifier can read.

    Chen, Mei, Zhang, Wang, Feng & Chen, *Knowledge Distillation with the Reused Teacher Classifier*, CVPR 2022 (SimKD).
    The projector is the one of the authors' code: a bottleneck of 1x1, 3x3 and 1x1 convolutions, each with BatchNorm
    and ReLU. It is part of what is deployed. Where the student's grid is finer than the teacher's, their code averages
    it down before the projector, by the teacher's map; here the projector works on the student's own grid, so that what
    is deployed needs no teacher, and its output is averaged down for the loss alone.

    Args:
        net: a network for pictures that ends with a global average ``pool`` and a linear classifier, which it loses.
        width: channels of the teacher's last feature map, which its classifier reads.
        factor: factor by which the bottleneck is narrower.
        num_classes: number of classes of the data.

    Shape: what ``net`` takes, to logits (B, num_classes).

    Layers to tap: ``net.layer1`` and so on, as ``net`` calls them; ``connector`` (B, width, H, W), after its ReLU, on
    the grid of the last map of ``net``; ``pool`` (B, width); ``fc`` the logits.

    Raises:
        UserError: ``net`` ends otherwise, or ``width`` or ``factor`` is out of range.
    """

    def __init__(self, net: nn.Module, width: int, factor: int = 2, num_classes: int = 10) -> None:
        super().__init__()
        if not 1 <= factor <= width:
            raise UserError("width, factor", f"{width}, {factor}", "whole numbers, 1 <= factor <= width")
        channels = _end_with_map(net)
        inner = width // factor
        self.connector = nn.Sequential(
            *(conv1x1(channels, inner), nn.BatchNorm2d(inner), nn.ReLU()),
            *(conv3x3(inner, inner), nn.BatchNorm2d(inner), nn.ReLU()),
            *(conv1x1(inner, width), nn.BatchNorm2d(width), nn.ReLU()),
        )
        init_weights(self.connector)
        self.net = net
        self.pool = global_pool()
        self.fc = nn.Linear(width, num_classes)

    @override
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.connector(self.net(x))))


def _end_with_map(net: nn.Module) -> int:
    """Take pool and classifier off ``net``, in place, so that it answers with its last feature map.

    Returns:
        The channels of that map.

    Raises:
        UserError: it does not end with these.
    """
    name, head = head_of(net)
    if not isinstance(getattr(net, "pool", None), nn.Module) or not isinstance(head, nn.Linear):
        raise UserError(
            "net",
            (f"{type(net).__name__} does not end with a global average `pool` and a linear classifier"),
            ("a network for pictures that does, such as resnet8, wrn_16_2, vgg8, mobilenetv2 or shufflenetv2"),
        )
    net.pool = nn.Identity()
    net.set_submodule(name, nn.Identity())
    return head.in_features


def reuse_teacher_head(student: nn.Module, teacher: nn.Module) -> str:
    """Give a student its teacher's classifier, in place: a copy, frozen, so that no training changes it.

    Returns:
        The dotted name of the student's classifier.

    Raises:
        UserError: if the two read vectors of different widths, or differ otherwise.
    """
    (_, teacher_head), (name, student_head) = head_of(teacher), head_of(student)
    reads, wanted = _width(student_head), _width(teacher_head)
    if reads != wanted:
        raise UserError(
            "init",
            f"teacher_head, and the teacher's classifier reads {wanted} numbers, the student's {reads}",
            f"the same width, such as student=simkd student.width={wanted}",
        )
    if _shapes(student_head) != _shapes(teacher_head):
        raise UserError(
            "init",
            f"teacher_head, and the teacher's classifier is {_said(teacher_head)}, the student's {_said(student_head)}",
            "two of one shape",
        )
    student_head.load_state_dict(teacher_head.state_dict())
    freeze(student, name)
    return name


def _width(head: nn.Module) -> int:
    return int(head.weight.shape[1])  # type: ignore[union-attr, arg-type, index]


def _shapes(head: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in head.state_dict().items()}


def _said(head: nn.Module) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in _shapes(head).items())
