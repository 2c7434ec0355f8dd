"""Attention transfer: where the activations of a layer are large."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from kdlab.functional import Batch, Outputs, attention_map
from kdlab.losses.feature.layer_term import LayerTerm, maps_only


class AttentionTransfer(LayerTerm):
    r"""Squared distance of the two normalised spatial attention maps, (B, C, H, W) features.

    .. math:: \| Q^S_i / \|Q^S_i\| - Q^T_i / \|Q^T_i\| \|_2^2 / (H W), \qquad Q = \tfrac1C\sum_c |F_c|^2

    summed over the pairs. The mean over positions and the published weight of 1,000 are those of the authors' code.
    Zagoruyko & Komodakis, *Paying More Attention to Attention*, ICLR 2017.
    """

    @override
    def prepare(self, student: Outputs, teacher: Outputs | None) -> None:
        maps_only(self.captured(student, teacher), "attention transfer")

    @override
    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        pairs = self.pairs(student, teacher)
        return torch.stack([(attention_map(s) - attention_map(t)).pow(2).mean(1) for s, t in pairs]).sum(0)
