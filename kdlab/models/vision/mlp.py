"""Multi-layer perceptrons."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn
from typing_extensions import override

from kdlab.errors import UserError
from kdlab.models.vision.normalize import Normalize, Statistic


class MLP(nn.Module):
    """Linear layers with ReLU between them, for flat rows or images.

    Args:
        hidden: width of each hidden layer; empty for a linear classifier.
        dropout: probability after each hidden layer.
        in_features: number of features of an example; None takes it from ``in_channels`` and ``image_size``.
        num_classes: number of classes of the data.
        in_channels: channels of the images, or number of features of a flat row.
        image_size: height and width of the images (one number for squares); None for flat rows.
        mean: input normalisation, one number a channel or one for all, see ``Normalize``.
        std: see ``mean``.

    Shape: (B, in_channels) or (B, in_channels, H, W) to logits (B, num_classes).

    Layers to tap: ``layer1`` (B, hidden[0]), ``layer2`` (B, hidden[1]), ..., each after its ReLU; ``fc`` the
    logits.

    Raises:
        UserError: a width below 1, ``dropout`` outside [0, 1), an input of another size.
    """

    published = ()

    def __init__(
        self,
        hidden: Sequence[int] = (20,),
        dropout: float = 0.0,
        in_features: int | None = None,
        num_classes: int = 10,
        in_channels: int = 1,
        image_size: int | Sequence[int] | None = None,
        mean: Statistic = None,
        std: Statistic = None,
    ) -> None:
        super().__init__()
        if any(width < 1 for width in hidden):
            raise UserError("hidden", f"{list(hidden)} holds a width below 1")
        if not 0 <= dropout < 1:
            raise UserError("dropout", f"{dropout} is not in [0, 1)")
        self.in_features = in_features or in_channels * _pixels(image_size)
        self.normalize = Normalize(mean, std, None if in_features else in_channels)
        self.flatten = nn.Flatten()
        self.depth = len(hidden)
        width = self.in_features
        for i, outputs in enumerate(hidden, start=1):
            layer = nn.Sequential(nn.Linear(width, outputs), nn.ReLU())
            if dropout:
                layer.append(nn.Dropout(dropout))
            self.add_module(f"layer{i}", layer)
            width = outputs
        self.fc = nn.Linear(width, num_classes)

    @override
    def forward(self, x: Tensor) -> Tensor:
        x = self.flatten(self.normalize(x))
        if x.shape[1] != self.in_features:
            raise UserError("MLP", f"an example has {x.shape[1]} numbers, the network was built for {self.in_features}")
        for i in range(1, self.depth + 1):
            x = getattr(self, f"layer{i}")(x)
        return self.fc(x)


def _pixels(size: int | Sequence[int] | None) -> int:
    if size is None:
        return 1
    return size * size if isinstance(size, int) else math.prod(size)
