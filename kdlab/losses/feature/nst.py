"""NST: neuron selectivity transfer."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from kdlab.functional import Batch, Outputs, polynomial_mmd
from kdlab.losses.feature.layer_term import LayerTerm, maps_only


class NST(LayerTerm):
    """Neuron selectivity: where each channel responds is a sample, and the two layers' samples are to agree.

    The discrepancy of :func:`~kdlab.functional.polynomial_mmd`, summed over the pairs; widths may differ. Huang & Wang,
    *Like What You Like: Knowledge Distill via Neuron Selectivity Transfer*, 2017.
    """

    @override
    def prepare(self, student: Outputs, teacher: Outputs | None) -> None:
        maps_only(self.captured(student, teacher), "neuron selectivity transfer")

    @override
    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        return torch.stack([polynomial_mmd(s, t) for s, t in self.pairs(student, teacher)]).sum(0)
