"""VGG networks for small images."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from typing_extensions import override

from kdlab.errors import UserError, unknown
from kdlab.models.vision.blocks import conv3x3, global_pool, init_weights
from kdlab.models.vision.normalize import Normalize, Statistic

CONVOLUTIONS = {8: (1, 1, 1, 1, 1), 11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2)}
"""Number of convolutions of each of the five stages, by depth."""

SMALLEST = 8
"""Smallest height and width: three times halved, this is one pixel."""


class VGG(nn.Module):
    """VGG (Simonyan & Zisserman, ICLR 2015) in the benchmark's form: BatchNorm, a single linear classifier.

    Args:
        depth: 8, 11 or 13, by the benchmark's names.
        width: channels of the first stage; the others have 2, 4, 8 and 8 times as many.
        num_classes: number of classes of the data.
        in_channels: number of channels of the images.
        image_size: height and width of the images; from 64 pixels on, there is a fourth halving between ``layer4``
            and ``layer5``.
        mean: input normalisation, see ``Normalize``.
        std: see ``mean``.

    Shape: images (B, in_channels, H, W), H and W at least 8, to logits (B, num_classes).

    Layers to tap, for HxW inputs and width 64, each after its ReLU: ``layer1`` (B, 64, H, W), ``layer2``
    (B, 128, H/2, W/2), ``layer3`` (B, 256, H/4, W/4), ``layer4`` (B, 512, H/8, W/8), ``layer5`` likewise;
    ``pool`` (B, 512); ``fc`` the logits.

    Raises:
        UserError: ``depth`` unknown, a width below 1, images under 8 pixels (when built, or when they
            arrive).
    """

    published = tuple((rf"block{i}\.", f"layer{i + 1}.") for i in range(5))

    def __init__(
        self,
        depth: int,
        width: int = 64,
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: int | Sequence[int] = 32,
        mean: Statistic = None,
        std: Statistic = None,
    ) -> None:
        super().__init__()
        if depth not in CONVOLUTIONS:
            raise unknown("depth", depth, CONVOLUTIONS)
        if width < 1:
            raise UserError("width", f"{width} must be at least 1")
        smallest = image_size if isinstance(image_size, int) else min(image_size)
        _require(smallest)
        counts = CONVOLUTIONS[depth]
        self.normalize = Normalize(mean, std, in_channels)
        self.layer1 = _convolutions(in_channels, width, counts[0])
        self.layer2 = _convolutions(width, 2 * width, counts[1])
        self.layer3 = _convolutions(2 * width, 4 * width, counts[2])
        self.layer4 = _convolutions(4 * width, 8 * width, counts[3])
        self.layer5 = _convolutions(8 * width, 8 * width, counts[4])
        self.down = nn.MaxPool2d(2)
        self.last_down = nn.MaxPool2d(2) if smallest >= 64 else nn.Identity()
        self.pool = global_pool()
        self.fc = nn.Linear(8 * width, num_classes)
        init_weights(self, linear_std=0.01)

    @override
    def forward(self, x: Tensor) -> Tensor:
        _require(min(x.shape[-2:]))
        x = self.down(self.layer1(self.normalize(x)))
        x = self.down(self.layer2(x))
        x = self.down(self.layer3(x))
        x = self.layer5(self.last_down(self.layer4(x)))
        return self.fc(self.pool(x))


def _convolutions(inputs: int, outputs: int, count: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i in range(count):
        conv = conv3x3(inputs if i == 0 else outputs, outputs, bias=True)
        layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


def _require(pixels: int) -> None:
    if pixels < SMALLEST:
        raise UserError(
            "image_size", f"{pixels} is too small for VGG, which halves it three times; at least {SMALLEST}"
        )
