"""ShuffleNet V1 and V2 for small images, in the distillation benchmark's form: a 1x1 stem without pooling.

Both keep PyTorch's own initialisation, as the benchmark does.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from kdlab.errors import unknown
from kdlab.models.vision.blocks import Staged, channel_shuffle, conv1x1, conv3x3
from kdlab.models.vision.normalize import Statistic

STEM = 24
COUNTS = (4, 8, 4)

V1_WIDTHS = {1: 144, 2: 200, 3: 240}
"""Channels of the first stage by number of groups, such that all have about the same cost."""

V2_WIDTHS = {
    0.5: (48, 96, 192, 1024),
    1.0: (116, 232, 464, 1024),
    1.5: (176, 352, 704, 1024),
    2.0: (244, 488, 976, 2048),
}
"""Channels of the three stages and of the last convolution, by width factor."""


class ShuffleNetV1(Staged):
    """ShuffleNet (Zhang et al., CVPR 2018) with a stem for small images.

    Args:
        groups: number of groups of the 1x1 convolutions: 1, 2 or 3 (the benchmark's).
        num_classes: number of classes of the data.
        in_channels: number of channels of the images.
        mean: input normalisation, see ``Normalize``.
        std: see ``mean``.

    Shape: images (B, in_channels, H, W), any size, to logits (B, num_classes).

    Layers to tap, for HxW inputs and 3 groups, each after its ReLU: ``layer1`` (B, 240, H/2, W/2), ``layer2``
    (B, 480, H/4, W/4), ``layer3`` (B, 960, H/8, W/8); ``pool`` (B, 960); ``fc`` the logits.

    Raises:
        UserError: ``groups`` unknown.
    """

    published = ((r"linear\.", "fc."),)

    def __init__(
        self,
        groups: int = 3,
        num_classes: int = 10,
        in_channels: int = 3,
        mean: Statistic = None,
        std: Statistic = None,
    ) -> None:
        if groups not in V1_WIDTHS:
            raise unknown("groups", groups, V1_WIDTHS)
        block = partial(GroupBlock, groups=groups)
        stages = [(V1_WIDTHS[groups] * 2**i, count, 2) for i, count in enumerate(COUNTS)]
        super().__init__(conv1x1(in_channels, STEM), block, stages, num_classes, mean, std)


class GroupBlock(nn.Module):
    """Block of grouped 1x1, shuffle, depthwise 3x3, grouped 1x1; plus the input, or at stride 2 beside it."""

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int) -> None:
        super().__init__()
        made = outputs - inputs if stride == 2 else outputs
        inner = made // 4
        # The stem has too few channels to split them into groups.
        self.groups = 1 if inputs == STEM else groups
        self.conv1 = conv1x1(inputs, inner, groups=self.groups)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = conv3x3(inner, inner, stride, groups=inner)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = conv1x1(inner, made, groups=groups)
        self.bn3 = nn.BatchNorm2d(made)
        self.down = nn.AvgPool2d(3, stride=2, padding=1) if stride == 2 else None
        self.preact = nn.Identity()

    @override
    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = channel_shuffle(out, self.groups)
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        joined = out + x if self.down is None else torch.cat([out, self.down(x)], dim=1)
        return F.relu(self.preact(joined))


class ShuffleNetV2(Staged):
    """ShuffleNet V2 (Ma et al., ECCV 2018) with a stem for small images.

    Args:
        width: 0.5, 1 (the benchmark's), 1.5 or 2.
        num_classes: number of classes of the data.
        in_channels: number of channels of the images.
        mean: input normalisation, see ``Normalize``.
        std: see ``mean``.

    Shape: images (B, in_channels, H, W), any size, to logits (B, num_classes).

    Layers to tap, for HxW inputs and width 1: ``layer1`` (B, 116, H/2, W/2), ``layer2`` (B, 232, H/4, W/4),
    ``layer3`` (B, 464, H/8, W/8), half of each block's channels after a ReLU of its own; ``pool`` (B, 1024),
    after a last 1x1 convolution; ``fc`` the logits.

    Raises:
        UserError: ``width`` unknown.
    """

    published = ((r"linear\.", "fc."),)

    def __init__(
        self,
        width: float = 1.0,
        num_classes: int = 10,
        in_channels: int = 3,
        mean: Statistic = None,
        std: Statistic = None,
    ) -> None:
        if width not in V2_WIDTHS:
            raise unknown("width", width, V2_WIDTHS)
        *widths, last = V2_WIDTHS[width]
        stages = [(outputs, count, 2) for outputs, count in zip(widths, COUNTS, strict=True)]
        super().__init__(conv1x1(in_channels, STEM), _split_block, stages, num_classes, mean, std, last)


def _split_block(inputs: int, outputs: int, stride: int) -> nn.Module:
    return SplitBlock(outputs) if stride == 1 else DownBlock(inputs, outputs)


class SplitBlock(nn.Module):
    """Block whose channels pass half as they are, half through 1x1, depthwise 3x3, 1x1, and are then shuffled."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = conv1x1(half, half)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = conv3x3(half, half, groups=half)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = conv1x1(half, half)
        self.bn3 = nn.BatchNorm2d(half)

    @override
    def forward(self, x: Tensor) -> Tensor:
        kept, out = x.chunk(2, dim=1)
        out = F.relu(self.bn1(self.conv1(out)))
        out = self.bn2(self.conv2(out))
        out = F.relu(self.bn3(self.conv3(out)))
        return channel_shuffle(torch.cat([kept, out], dim=1), 2)


class DownBlock(nn.Module):
    """Two branches of half the outputs each, both of stride 2, joined and shuffled."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = outputs // 2
        self.conv1 = conv3x3(inputs, inputs, stride=2, groups=inputs)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv2 = conv1x1(inputs, half)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = conv1x1(inputs, half)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = conv3x3(half, half, stride=2, groups=half)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = conv1x1(half, half)
        self.bn5 = nn.BatchNorm2d(half)

    @override
    def forward(self, x: Tensor) -> Tensor:
        short = F.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        long = F.relu(self.bn3(self.conv3(x)))
        long = F.relu(self.bn5(self.conv5(self.bn4(self.conv4(long)))))
        return channel_shuffle(torch.cat([short, long], dim=1), 2)
