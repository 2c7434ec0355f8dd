"""MobileNetV2 for small images."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from typing_extensions import override

from kdlab.errors import UserError
from kdlab.models.vision.blocks import conv1x1, conv3x3, global_pool, init_weights, stage
from kdlab.models.vision.normalize import Normalize, Statistic

STAGES = ((16, 1, 1), (24, 2, 1), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1))
"""Channels at full width, blocks and stride of each stage."""

STEM, LAST = 32, 1280


class MobileNetV2(nn.Module):
    """MobileNetV2 (Sandler et al., CVPR 2018) in the distillation benchmark's form: half width, plain ReLU.

    Args:
        width: factor on all channels but those of ``conv2`` (which grow with it only above 1).
        expand: factor by which a block is wider inside; the first stage has 1.
        num_classes: number of classes of the data.
        in_channels: number of channels of the images.
        mean: input normalisation, see ``Normalize``.
        std: see ``mean``.

    Shape: images (B, in_channels, H, W), any size, to logits (B, num_classes).

    Layers to tap, for HxW inputs and width 0.5: ``layer2`` (B, 12, H/2, W/2), ``layer3`` (B, 16, H/4, W/4),
    ``layer5`` (B, 48, H/8, W/8), ``layer7`` (B, 160, H/16, W/16), each without activation, as the paper has
    it (``layer1``, ``layer4`` and ``layer6`` lie between); ``conv2`` (B, 1280, H/16, W/16) after its ReLU;
    ``pool`` (B, 1280); ``fc`` the logits.

    Raises:
        UserError: ``width`` leaves a stage without channels, ``expand`` below 1.
    """

    published = tuple((rf"blocks\.{i}\.", f"layer{i + 1}.") for i in range(len(STAGES)))

    def __init__(
        self,
        width: float = 0.5,
        expand: int = 6,
        num_classes: int = 10,
        in_channels: int = 3,
        mean: Statistic = None,
        std: Statistic = None,
    ) -> None:
        super().__init__()
        if int(STAGES[0][0] * width) < 1:
            raise UserError("width", f"{width} is too small; at least {1 / STAGES[0][0]}")
        if expand < 1:
            raise UserError("expand", f"{expand} must be at least 1")
        channels = int(STEM * width)
        last = int(LAST * max(width, 1.0))
        self.normalize = Normalize(mean, std, in_channels)
        self.conv1 = nn.Sequential(conv3x3(in_channels, channels, stride=2), nn.BatchNorm2d(channels), nn.ReLU())
        for i, (full, count, stride) in enumerate(STAGES, start=1):
            block = partial(InvertedResidual, expand=1 if i == 1 else expand)
            outputs = int(full * width)
            self.add_module(f"layer{i}", stage(block, channels, outputs, count, stride))
            channels = outputs
        self.conv2 = nn.Sequential(conv1x1(channels, last), nn.BatchNorm2d(last), nn.ReLU())
        self.pool = global_pool()
        self.fc = nn.Linear(last, num_classes)
        init_weights(self, linear_std=0.01)

    @override
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(self.normalize(x))
        for i in range(1, len(STAGES) + 1):
            x = getattr(self, f"layer{i}")(x)
        return self.fc(self.pool(self.conv2(x)))


class InvertedResidual(nn.Module):
    """Inverted residual: widen, depthwise 3x3, narrow without activation; plus the input where the shapes agree."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        inner = inputs * expand
        self.residual = stride == 1 and inputs == outputs
        self.conv = nn.Sequential(
            conv1x1(inputs, inner),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            conv3x3(inner, inner, stride, groups=inner),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            conv1x1(inner, outputs),
            nn.BatchNorm2d(outputs),
        )

    @override
    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        return x + out if self.residual else out
