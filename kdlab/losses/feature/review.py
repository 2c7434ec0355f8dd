"""Knowledge review: deep layers of the student help shallow ones to meet the teacher."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from kdlab.errors import UserError
from kdlab.functional import Batch, Outputs, Schedule, hierarchical_context
from kdlab.losses.feature.layer_term import Layers, LayerTerm
from kdlab.models.vision.blocks import BatchNorm

WIDEST = 512
"""Maximum number of channels in which features of several layers are fused."""


class Fusion(nn.Module):
    r"""Attention-based fusion of a layer's output with what came from deeper layers.

    .. math:: x = \mathrm{BN}(W_1 F), \quad (a, b) = \sigma(W_2 [x; y]), \quad z = a\,x + b\,y, \quad
        F' = \mathrm{BN}(W_3 * z)

    with :math:`y` the deeper layer's :math:`z` brought to this grid, :math:`a, b` one number a position each,
    :math:`W_1, W_2` 1x1 and :math:`W_3` a 3x3 convolution. The deepest layer has :math:`z = x`.

    Args:
        inputs: channels of the student's layer.
        middle: channels in which layers are fused.
        outputs: channels of the teacher's layer.
        deepest: true for the deepest layer, which has no other to be fused with.
    """

    def __init__(self, inputs: int, middle: int, outputs: int, deepest: bool) -> None:
        super().__init__()
        self.narrow = nn.Sequential(nn.Conv2d(inputs, middle, 1, bias=False), BatchNorm(middle))
        self.attention = None if deepest else nn.Conv2d(2 * middle, 2, 1)
        self.widen = nn.Sequential(nn.Conv2d(middle, outputs, 3, padding=1, bias=False), BatchNorm(outputs))

    def forward(self, feature: Tensor, deeper: Tensor | None) -> tuple[Tensor, Tensor]:
        """Fuse maps (B, inputs, H, W) with the deeper layer's; return maps to compare, and fused ones to hand on."""
        fused = self.narrow(feature)
        if self.attention is not None and deeper is not None:
            below = F.interpolate(deeper, size=fused.shape[2:], mode="nearest")
            share = self.attention(torch.cat([fused, below], 1)).sigmoid()
            fused = fused * share[:, :1] + below * share[:, 1:]
        return self.widen(fused), fused


class ReviewKD(LayerTerm):
    r"""ReviewKD: each of the student's layers, fused with all deeper ones, against the teacher's.

    .. math:: \sum_l \mathrm{HCL}\big(F'_l,\; F^T_l\big)

    with :math:`F'_l` from :class:`Fusion` and HCL from :func:`~kdlab.functional.hierarchical_context`. Layers are
    listed from the shallowest to the deepest: feature maps, and at the end also vectors, which are maps of one pixel.
    A pair is compared on the coarser of its grids. The fusions train, and are no part of the student; their BatchNorm
    makes the rows of a micro-batch interact, as the student's own does.

    Chen, Liu, Zhao & Jia, *Distilling Knowledge via Knowledge Review*, CVPR 2021.
    """

    def __init__(self, student_layer: Layers, teacher_layer: Layers, weight: float | Mapping | Schedule = 1.0) -> None:
        super().__init__(student_layer, teacher_layer, weight)
        self.fusions = nn.ModuleList()

    @override
    def prepare(self, student: Outputs, teacher: Outputs | None) -> None:
        maps = self._maps(student, teacher)
        sides = [min(s.shape[2:]) for s, _ in maps]
        if sides != sorted(sides, reverse=True):
            raise UserError("student_layer", f"grids of side {sides}", "layers from the shallowest to the deepest")
        if not self.fusions:
            deepest = len(maps) - 1
            middle = min(WIDEST, maps[deepest][0].shape[1])
            for n, (s, t) in enumerate(maps):
                self.fusions.append(Fusion(s.shape[1], middle, t.shape[1], n == deepest).to(s.device))

    @override
    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        if not self.fusions:
            raise UserError("ReviewKD", "call prepare(student, teacher) once before training, to make its fusions")
        losses: list[Tensor] = []
        fused: Tensor | None = None
        for fusion, (s, t) in reversed(list(zip(self.fusions, self._maps(student, teacher), strict=True))):
            made, fused = fusion(s.to(next(fusion.parameters()).dtype), fused)
            losses.append(hierarchical_context(made, t))
        return torch.stack(losses).sum(0)

    def _maps(self, student: Outputs, teacher: Outputs | None) -> list[tuple[Tensor, Tensor]]:
        return [(_as_map(s), _as_map(t)) for s, t in self.pairs(student, teacher)]


def _as_map(feature: Tensor) -> Tensor:
    if feature.ndim == 2:
        return feature[:, :, None, None]
    if feature.ndim != 4:
        raise UserError("student_layer, teacher_layer", "ReviewKD takes feature maps (B, C, H, W) and vectors (B, C)")
    return feature
