"""Input normalisation as the first layer of every network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from typing_extensions import override

from kdlab.errors import UserError, unknown

KNOWN = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}
"""Channel means and standard deviations that published checkpoints were trained with, by data set."""

Statistic = Sequence[float] | float | str | None
"""Statistic of inputs: one number a channel, one for all, the name of a data set in ``KNOWN``, or None."""


class Normalize(nn.Module):
    """Normalisation ``(x - mean) / std`` of each channel, so that a network carries its own.

    Teacher and student may thus differ in it, and an exported network takes plain images. The two buffers are
    not part of the state dict: published checkpoints do not hold them, and they belong to the network's
    description.

    Args:
        mean: number for each channel, one for all channels, or a name in ``KNOWN``; None subtracts nothing.
        std: positive number for each channel, one for all, or a name in ``KNOWN``; None divides by nothing.
        channels: number of channels (or, for flat inputs, features); checked against both.

    Shape: (B, C, ...) in and out; float in [0, 1], or integers in 0..255, which are divided by 255 first.
    """

    mean: Tensor | None
    std: Tensor | None

    def __init__(self, mean: Statistic = None, std: Statistic = None, channels: int | None = None) -> None:
        super().__init__()
        self.register_buffer("mean", _statistic("mean", mean, channels), persistent=False)
        self.register_buffer("std", _statistic("std", std, channels), persistent=False)
        if self.std is not None and not bool((self.std > 0).all()):
            raise UserError("std", f"{std} is not positive in every channel")

    @override
    def forward(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            x = x.to(torch.get_default_dtype()) / 255
        shape = (-1,) + (1,) * (x.ndim - 2)
        if self.mean is not None:
            x = x - self.mean.view(shape)
        if self.std is not None:
            x = x / self.std.view(shape)
        return x

    @override
    def extra_repr(self) -> str:
        mean, std = (None if b is None else [round(v, 4) for v in b.tolist()] for b in (self.mean, self.std))
        return f"mean={mean}, std={std}"


def _statistic(key: str, value: Statistic, channels: int | None) -> Tensor | None:
    if value is None:
        return None
    if isinstance(value, str):
        if value not in KNOWN:
            raise unknown(key, value, KNOWN, "data set")
        value = KNOWN[value][("mean", "std").index(key)]
    values = [float(value)] if isinstance(value, int | float) else [float(v) for v in value]
    if not values:
        raise UserError(key, "an empty list", "a number, a number a channel, or null")
    if channels is not None and len(values) not in (1, channels):
        raise UserError(key, f"{len(values)} numbers for {channels} channels; give 1 or {channels}")
    tensor = torch.tensor(values)
    if not bool(tensor.isfinite().all()):
        raise UserError(key, f"{values} holds a number that is not finite")
    return tensor
