"""What every task has in common: how a network reads a batch, and what is measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Protocol

import torch
from torch import nn

from kdlab.data import DataModule
from kdlab.functional import Batch, Outputs, Taps
from kdlab.functional.types import Target


class Measures(Protocol):
    """Measures of one pass over a split."""

    rows: int
    """Counted so far."""

    def update(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> None:
        """Count one batch."""

    def compute(self) -> dict[str, float]:
        """The measures over everything counted."""


class Task:
    """How a network reads a batch, what is measured of it, and which measure decides.

    Args:
        num_classes: of the logits, at least 2.
    """

    target: Target = "class"
    """What data must ask for."""
    score = "acc"
    """The validation measure that chooses between epochs and runs."""
    greater = True
    """Whether a greater score is better."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes

    def outputs(self, net: nn.Module, batch: Batch, layers: Iterable[str] = ()) -> Outputs:
        """Run ``net`` on a batch, capturing the outputs of ``layers`` (module paths)."""
        layers = tuple(layers)
        with Taps(net, layers) if layers else nullcontext({}) as features:
            raw = net(**batch.inputs) if isinstance(batch.inputs, Mapping) else net(batch.inputs)
        return Outputs.of(raw, features)

    @property
    def chance(self) -> float:
        """The score of a network that knows nothing."""
        return 1 / self.num_classes

    def measures(self, words: int | None = None) -> Measures:
        """Fresh measures for one pass over a split.

        Args:
            words: how many words the split's text has, for measures per word.
        """
        raise TypeError(f"{type(self).__name__} does not say what it measures: define measures")

    def further(self, net: nn.Module, data: DataModule, split: str, device: torch.device) -> dict[str, float]:
        """Measures of a finished network that a pass over batches cannot give, such as those of generated text."""
        return {}

    def samples(self, net: nn.Module, data: DataModule, split: str, device: torch.device, count: int = 4) -> str | None:
        """Something to read of what a network makes of a split, in Markdown; None where there is nothing to read."""
        return None
