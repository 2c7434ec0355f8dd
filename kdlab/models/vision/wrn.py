"""Wide residual networks."""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from kdlab.errors import UserError
from kdlab.models.vision.blocks import conv1x1, conv3x3, global_pool, init_weights, stage
from kdlab.models.vision.normalize import Normalize, Statistic

STEM = 16


class WideResNet(nn.Module):
    """Wide ResNet (WRN-depth-widen) for small images (Zagoruyko & Komodakis, BMVC 2016), as in the benchmark.

    Args:
        depth: 6n+4: 16, 22, 28, 40, ...
        widen: factor by which it is wider than the ResNet of the same form (stages of 16, 32, 64 channels).
        dropout: probability between the two convolutions of a block.
        num_classes: number of classes of the data.
        in_channels: number of channels of the images.
        mean: input normalisation, see ``Normalize``.
        std: see ``mean``.

    Shape: images (B, in_channels, H, W), any size, to logits (B, num_classes).

    Layers to tap, for HxW inputs: ``layer1`` (B, 16·widen, H, W), ``layer2`` (B, 32·widen, H/2, W/2),
    ``layer3`` (B, 64·widen, H/4, W/4), each the sum of a block, before BatchNorm and ReLU (which come first
    in the next block); ``pool`` (B, 64·widen), after both; ``fc`` the logits.

    Raises:
        UserError: ``depth`` is not 6n+4, ``widen`` below 1, ``dropout`` outside [0, 1).
    """

    published = (
        (r"block(\d)\.layer\.", r"layer\1."),
        (r"(.*)\.convShortcut\.", r"\1.shortcut."),
    )

    def __init__(
        self,
        depth: int,
        widen: int = 2,
        dropout: float = 0.0,
        num_classes: int = 10,
        in_channels: int = 3,
        mean: Statistic = None,
        std: Statistic = None,
    ) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 4, 6)
        if rest or blocks < 1:
            raise UserError("depth", f"{depth} is not 6n+4", "10, 16, 22, 28, 40, ...")
        if widen < 1:
            raise UserError("widen", f"{widen} must be at least 1")
        if not 0 <= dropout < 1:
            raise UserError("dropout", f"{dropout} is not in [0, 1)")
        width = STEM * widen
        block = partial(PreactBlock, dropout=dropout)
        self.normalize = Normalize(mean, std, in_channels)
        self.conv1 = conv3x3(in_channels, STEM)
        self.layer1 = stage(block, STEM, width, blocks, stride=1)
        self.layer2 = stage(block, width, 2 * width, blocks, stride=2)
        self.layer3 = stage(block, 2 * width, 4 * width, blocks, stride=2)
        self.bn1 = nn.BatchNorm2d(4 * width)
        self.pool = global_pool()
        self.fc = nn.Linear(4 * width, num_classes)
        init_weights(self)

    @override
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(self.normalize(x))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.pool(F.relu(self.bn1(x))))


class PreactBlock(nn.Module):
    """BatchNorm and ReLU before each of two 3x3 convolutions, beside a shortcut.

    Where the shortcut is a convolution, it starts from the activated input too.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.conv2 = conv3x3(outputs, outputs)
        self.changes = stride != 1 or inputs != outputs
        self.shortcut = conv1x1(inputs, outputs, stride) if self.changes else nn.Identity()

    @override
    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        out = F.relu(self.bn2(self.conv1(active)))
        out = self.conv2(self.dropout(out))
        return out + self.shortcut(active if self.changes else x)
