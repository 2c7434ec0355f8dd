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
    """Number of rows counted so far."""

    def update(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> None:
        """Count one batch."""

    def compute(self) -> dict[str, float]:
        """Compute the measures over everything counted."""


class Task:
    """Base of the tasks: the outputs of a network for a batch, their measures, and the one that decides.

    Args:
        num_classes: number of classes of the logits, at least 2.
    """

    target: Target = "class"
    """Target that data must have."""
    score = "acc"
    """Validation measure that chooses between epochs and runs."""
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
        """Build measures for one pass over a split.

        Args:
            words: number of words of the split's text, for measures per word.
        """
        raise TypeError(f"{type(self).__name__} does not say what it measures: define measures")

    def further(self, net: nn.Module, data: DataModule, split: str, device: torch.device) -> dict[str, float]:
        """Compute measures of a finished network that need more than batches, such as those of generated text."""
        return {}

    def samples(self, net: nn.Module, data: DataModule, split: str, device: torch.device, count: int = 4) -> str | None:
        """Return samples of a network's outputs for a split, in Markdown; None where there is nothing to read."""
        return None
