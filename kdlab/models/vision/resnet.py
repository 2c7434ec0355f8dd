"""Residual networks for small images: basic blocks in three stages, and bottlenecks in four."""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from kdlab.errors import UserError, unknown
from kdlab.models.vision.blocks import Staged, conv1x1, conv3x3, init_weights
from kdlab.models.vision.normalize import Statistic

BOTTLENECK_BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


class CifarResNet(Staged):
    """ResNet of 6n+2 layers for small images (He et al., CVPR 2016, section 4.2).

    The form of the published distillation benchmark (Tian et al., ICLR 2020): ``width`` 16, 1x1 convolutions
    as shortcuts; its "x4" networks are ``width=64, stem=32``. With ``shortcut="A"``, the form of the ResNet
    paper.

    Args:
        depth: 6n+2: 8, 14, 20, 32, 44, 56, 110, ...
        width: channels of the first stage; the second has twice, the third four times as many.
        stem: channels of the first convolution; None is ``width``.
        shortcut: shortcut of a block where width or size changes: "B" a 1x1 convolution with BatchNorm,
            "A" every second pixel and zeros for the new channels, without parameters.
        num_classes: number of classes of the data.
        in_channels: number of channels of the images.
        mean: input normalisation, see ``Normalize``.
        std: see ``mean``.

    Shape: images (B, in_channels, H, W), any size, to logits (B, num_classes).

    Layers to tap, for HxW inputs: ``layer1`` (B, width, H, W), ``layer2`` (B, 2·width, H/2, W/2), ``layer3``
    (B, 4·width, H/4, W/4), each after its ReLU; ``pool`` (B, 4·width); ``fc`` the logits. A block's sum
    before its ReLU is ``preact``, as in ``layer3.2.preact``.

    Raises:
        UserError: ``depth`` is not 6n+2, ``shortcut`` unknown, a width below 1.
    """

    published = ((r"(.*)\.downsample\.", r"\1.shortcut."), (r"linear\.", "fc."))
    """Rules for the keys of published checkpoints: (pattern at the start of a key, replacement)."""

    def __init__(
        self,
        depth: int,
        width: int = 16,
        stem: int | None = None,
        shortcut: str = "B",
        num_classes: int = 10,
        in_channels: int = 3,
        mean: Statistic = None,
        std: Statistic = None,
    ) -> None:
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise UserError("depth", f"{depth} is not 6n+2", "8, 14, 20, 26, 32, 44, 56, 110, ...")
        if shortcut not in SHORTCUTS:
            raise unknown("shortcut", shortcut, SHORTCUTS)
        stem = width if stem is None else stem
        if min(width, stem) < 1:
            raise UserError("width", f"{width} and stem {stem} must be at least 1")
        block = partial(BasicBlock, shortcut=shortcut)
        stages = ((width, blocks, 1), (2 * width, blocks, 2), (4 * width, blocks, 2))
        super().__init__(conv3x3(in_channels, stem), block, stages, num_classes, mean, std)
        init_weights(self)


class BottleneckResNet(Staged):
    """ResNet-50, -101 and -152 (He et al., CVPR 2016) with one 3x3 convolution as the stem, for small images.

    The ResNet-50 of the published distillation benchmark (Tian et al., ICLR 2020).

    Args:
        depth: 50, 101 or 152.
        width: channels inside the first stage's blocks; the paper has 64.
        num_classes: number of classes of the data.
        in_channels: number of channels of the images.
        mean: input normalisation, see ``Normalize``.
        std: see ``mean``.

    Shape: images (B, in_channels, H, W), any size, to logits (B, num_classes).

    Layers to tap, for HxW inputs and width 64: ``layer1`` (B, 256, H, W), ``layer2`` (B, 512, H/2, W/2),
    ``layer3`` (B, 1024, H/4, W/4), ``layer4`` (B, 2048, H/8, W/8), each after its ReLU; ``pool`` (B, 2048);
    ``fc`` the logits.
    """

    published = CifarResNet.published

    def __init__(
        self,
        depth: int = 50,
        width: int = 64,
        num_classes: int = 10,
        in_channels: int = 3,
        mean: Statistic = None,
        std: Statistic = None,
    ) -> None:
        if depth not in BOTTLENECK_BLOCKS:
            raise unknown("depth", depth, BOTTLENECK_BLOCKS)
        if width < 1:
            raise UserError("width", f"{width} must be at least 1")
        n1, n2, n3, n4 = BOTTLENECK_BLOCKS[depth]
        out = Bottleneck.expansion * width
        stages = ((out, n1, 1), (2 * out, n2, 2), (4 * out, n3, 2), (8 * out, n4, 2))
        super().__init__(conv3x3(in_channels, width), Bottleneck, stages, num_classes, mean, std)
        init_weights(self)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: str = "B") -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = conv3x3(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = _shortcut(inputs, outputs, stride, shortcut)
        self.preact = nn.Identity()

    @override
    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(self.preact(out + self.shortcut(x)))


class Bottleneck(nn.Module):
    """Bottleneck: a 3x3 convolution between two 1x1 ones, at a quarter of the block's width, beside a shortcut."""

    expansion = 4

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        inner = outputs // self.expansion
        self.conv1 = conv1x1(inputs, inner)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = conv3x3(inner, inner, stride)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = conv1x1(inner, outputs)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.shortcut = _shortcut(inputs, outputs, stride, "B")
        self.preact = nn.Identity()

    @override
    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(self.preact(out + self.shortcut(x)))


class PadShortcut(nn.Module):
    """Shortcut of option A: every ``stride``-th pixel, and zeros on both sides of the old channels for the new ones."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.before = (outputs - inputs) // 2
        self.after = outputs - inputs - self.before

    @override
    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


def _conv_shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    return nn.Sequential(conv1x1(inputs, outputs, stride), nn.BatchNorm2d(outputs))


SHORTCUTS = {"A": PadShortcut, "B": _conv_shortcut}


def _shortcut(inputs: int, outputs: int, stride: int, option: str) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return SHORTCUTS[option](inputs, outputs, stride)
