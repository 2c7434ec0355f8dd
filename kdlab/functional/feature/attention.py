"""Attention maps: where a layer's activations are large."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def attention_map(features: Tensor, power: float = 2.0) -> Tensor:
    r"""Compute the normalised spatial attention map of a layer: (B, C, H, W) -> (B, H*W), unit length.

    .. math:: Q_i = \mathrm{vec}\Big(\tfrac{1}{C}\sum_c |F_{ic}|^p\Big), \qquad Q_i / \|Q_i\|_2

    Zagoruyko & Komodakis, *Paying More Attention to Attention*, ICLR 2017.
    """
    features = features if features.dtype == torch.float64 else features.float()
    return F.normalize(features.abs().pow(power).mean(1).flatten(1), dim=1)
