"""What the convolutional families share.

No activation works in place: a tapped layer's output must not change after it was captured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import override

from kdlab.models.vision.normalize import Normalize, Statistic

Block = Callable[[int, int, int], nn.Module]
"""Function that builds a block from its input channels, its output channels and a stride."""


class BatchNorm(_BatchNorm):
    """BatchNorm of vectors (B, C) or maps (B, C, H, W).

    A batch of one value a channel (the last one of an epoch may be) has no variance; it takes the running statistics.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    @override
    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.numel() == x.shape[1]:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return super().forward(x)


class Staged(nn.Module):
    """Plain form: ``normalize``; ``conv1``, ``bn1``; the stages ``layer1``, ``layer2``, ...; ``pool``; ``fc``.

    Args:
        stem: the first convolution; BatchNorm and ReLU follow it.
        block: builder of the stages' blocks.
        stages: (channels, blocks, stride) of each.
        last: channels of one more 1x1 convolution ``conv2``, with BatchNorm and ReLU, before the pool; None for none.
        num_classes: number of classes of the data.
        mean: input normalisation.
        std: see ``mean``.
    """

    def __init__(
        self,
        stem: nn.Conv2d,
        block: Block,
        stages: Sequence[tuple[int, int, int]],
        num_classes: int,
        mean: Statistic,
        std: Statistic,
        last: int | None = None,
    ) -> None:
        super().__init__()
        self.normalize = Normalize(mean, std, stem.in_channels)
        self.conv1 = stem
        self.bn1 = nn.BatchNorm2d(stem.out_channels)
        self.depth = len(stages)
        channels = stem.out_channels
        for i, (outputs, count, stride) in enumerate(stages, start=1):
            self.add_module(f"layer{i}", stage(block, channels, outputs, count, stride))
            channels = outputs
        self.conv2: nn.Module | None = None
        if last is not None:
            self.conv2, self.bn2 = conv1x1(channels, last), nn.BatchNorm2d(last)
            channels = last
        self.pool = global_pool()
        self.fc = nn.Linear(channels, num_classes)

    @override
    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(self.normalize(x))))
        for i in range(1, self.depth + 1):
            x = getattr(self, f"layer{i}")(x)
        if self.conv2 is not None:
            x = F.relu(self.bn2(self.conv2(x)))
        return self.fc(self.pool(x))


def conv3x3(inputs: int, outputs: int, stride: int = 1, groups: int = 1, bias: bool = False) -> nn.Conv2d:
    """Build a 3x3 convolution; the size is divided by ``stride`` and rounded up, so never under one pixel."""
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, groups=groups, bias=bias)


def conv1x1(inputs: int, outputs: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Build a 1x1 convolution without bias."""
    return nn.Conv2d(inputs, outputs, 1, stride, groups=groups, bias=False)


def stage(block: Block, inputs: int, outputs: int, count: int, stride: int) -> nn.Sequential:
    """Build ``count`` blocks by ``block(inputs, outputs, stride)``; the first one changes width and size."""
    first = block(inputs, outputs, stride)
    return nn.Sequential(first, *(block(outputs, outputs, 1) for _ in range(count - 1)))


def global_pool() -> nn.Sequential:
    """Build the average over all positions, whatever the image size: (B, C, H, W) to (B, C)."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Interleave the channels of ``groups`` groups, so that the next grouped convolution mixes them."""
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


def init_weights(net: nn.Module, linear_std: float | None = None) -> None:
    """Initialise convolutions as He et al. (ICCV 2015), by fan-out, and BatchNorm by one and zero.

    Linear layers keep PyTorch's own, or are drawn from N(0, ``linear_std``²) with zero bias.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear) and linear_std is not None:
            nn.init.normal_(module.weight, std=linear_std)
            nn.init.zeros_(module.bias)
