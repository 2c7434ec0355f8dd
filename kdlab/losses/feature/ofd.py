"""OFD: features before a ReLU, against the teacher's after a margin ReLU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from typing_extensions import override

from kdlab.errors import UserError, unknown
from kdlab.functional import Batch, Outputs, Schedule, negative_mean, partial_l2
from kdlab.losses.feature.layer_term import Layers, LayerTerm, maps_only, project
from kdlab.models.vision.blocks import BatchNorm

Margin = Literal["norm", "batch"]


class ConnectedTerm(LayerTerm):
    """Base of terms on pairs of maps, the student's through a 1×1 convolution and BatchNorm; earlier pairs count half.

    Both papers' codes scale the last pair by 1, the one before by 1/2, then 1/4: an earlier map has more elements, and
    the distances are sums.
    """

    who: str

    def __init__(self, student_layer: Layers, teacher_layer: Layers, weight: float | Mapping | Schedule = 1.0) -> None:
        super().__init__(student_layer, teacher_layer, weight)
        self.connectors = nn.ModuleList()

    @override
    def prepare(self, student: Outputs, teacher: Outputs | None) -> None:
        maps_only(self.captured(student, teacher), self.who)
        if not self.connectors:
            self.connectors.extend(_connector(s, t) for s, t in self.pairs(student, teacher))

    @override
    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        pairs = self.pairs(student, teacher)
        if not self.connectors:
            name = type(self).__name__
            raise UserError(name, "call prepare(student, teacher) once before training, to make its connectors")
        distances, last = [], len(pairs) - 1
        for n, ((s, t), connector) in enumerate(zip(pairs, self.connectors, strict=True)):
            distances.append(self.distance(project(s, with_=connector), t, n) / 2 ** (last - n))
        return torch.stack(distances).sum(0)

    def distance(self, student: Tensor, teacher: Tensor, pair: int) -> Tensor:
        """Return the distance (B,) of the ``pair``-th pair's features, which have the same shape by now."""
        raise TypeError(f"{type(self).__name__} does not say what it measures: define distance")


def _connector(student: Tensor, teacher: Tensor) -> nn.Module:
    student_width, teacher_width = student.shape[1], teacher.shape[1]
    return nn.Sequential(nn.Conv2d(student_width, teacher_width, 1, bias=False), BatchNorm(teacher_width)).to(
        student.device
    )


class OFD(ConnectedTerm):
    """Overhaul of feature distillation: partial distance of responses before the ReLU, the teacher's with a margin.

    The distance of :func:`~kdlab.functional.partial_l2` between the student's responses, through a trained connector,
    and the teacher's raised to a margin by channel, :func:`~kdlab.functional.negative_mean`, below which they tell
    nothing; summed over neurons, each pair half of the one after it. Heo et al., *A Comprehensive Overhaul of Feature
    Distillation*, ICCV 2019.

    The BatchNorm that says how a channel is distributed is the layer itself, or the last one before it that its block
    holds directly. Of a residual sum that is the norm of the branch, as in the paper; the shortcut's share is not in
    it. A channel that this norm makes nearly never negative has a margin near 0 (the authors' code: -3 deviations).

    Args:
        student_layer: module paths of responses before a ReLU, such as ``layer2.0.preact``, in the network's order.
        teacher_layer: module paths in the teacher, as many.
        margin: ``norm`` reads the margins from the teacher's BatchNorms; ``batch`` takes the mean negative response to
            the batch that ``prepare`` sees, for a teacher without BatchNorm there, or whose inside cannot be seen.
        weight: see :class:`~kdlab.losses.Term`.

    Raises:
        UserError: (from ``meet`` and ``prepare``) if no BatchNorm belongs to a layer, or none was shown.
    """

    who = "the overhaul"

    def __init__(
        self,
        student_layer: Layers,
        teacher_layer: Layers,
        margin: Margin = "norm",
        weight: float | Mapping | Schedule = 1.0,
    ) -> None:
        super().__init__(student_layer, teacher_layer, weight)
        if margin not in get_args(Margin):
            raise unknown("margin", margin, get_args(Margin))
        self.margin = margin
        self._margins: list[Tensor] = []

    @override
    def setup(self, student: nn.Module, teacher: nn.Module | None, examples: int | None) -> None:
        if self.margin == "norm" and teacher is not None:
            norms = [_norm_before(teacher, layer) for layer in self.teacher_layers]
            self._margins = [negative_mean(norm.bias.detach().float(), norm.weight.detach().float()) for norm in norms]

    @override
    def prepare(self, student: Outputs, teacher: Outputs | None) -> None:
        super().prepare(student, teacher)
        if self._has_margins():
            return
        teacher_features = [t for _, t in self.captured(student, teacher)]
        if self.margin == "norm" and not self._margins:
            raise UserError("margin", "norm, and the teacher's inside was not seen", "margin=batch, or meet() first")
        if self.margin == "batch":
            self._margins = [_mean_negative(t) for t in teacher_features]
        for n, (margin, t, layer) in enumerate(zip(self._margins, teacher_features, self.teacher_layers, strict=True)):
            if margin.shape != t.shape[1:2]:
                raise UserError(
                    "teacher_layer",
                    f"{layer} has {t.shape[1]} channels, and the BatchNorm before it {len(margin)}",
                    "a response that one BatchNorm makes, or margin=batch",
                )
            self.register_buffer(f"margin{n}", margin.to(t.device))

    def _has_margins(self) -> bool:
        return hasattr(self, "margin0")

    @override
    def distance(self, student: Tensor, teacher: Tensor, pair: int) -> Tensor:
        margin: Tensor = getattr(self, f"margin{pair}")
        wide = torch.promote_types(teacher.dtype, margin.dtype)
        return partial_l2(student, torch.maximum(teacher.to(wide), margin.to(wide).view(-1, 1, 1)))


def _norm_before(net: nn.Module, layer: str) -> nn.BatchNorm2d:
    """Return the BatchNorm whose output a layer passes on: itself, or the last one before an Identity in its block."""
    modules = dict(net.named_modules())
    at, block = modules.get(layer), modules[layer.rpartition(".")[0]] if layer in modules else net
    before: list[nn.Module] = []
    if isinstance(at, nn.Identity):
        children = list(block.children())
        before = children[: children.index(at)]
    for module in [at, *reversed(before)]:
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            return module
    raise UserError(
        "teacher_layer",
        f"{layer} follows no BatchNorm of its block",
        "a response before a ReLU, such as layer2.0.preact, or margin=batch",
    )


def _mean_negative(feature: Tensor) -> Tensor:
    """Compute the mean of the negative values of each channel, 0 where there are none: (B, C, H, W) -> (C,)."""
    wide = feature.to(torch.promote_types(feature.dtype, torch.float32))
    return wide.clamp(max=0).sum((0, 2, 3)) / (wide < 0).sum((0, 2, 3)).clamp(min=1)
