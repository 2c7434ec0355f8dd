"""Classification: how a network reads a batch, and what is measured."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from kdlab.functional import Batch, Outputs, Taps, cross_entropy, kl


class Classification:
    """Images or vectors in, one class out.

    Args:
        num_classes: number of classes, at least 2.
    """

    score = "acc"
    """The validation measure that chooses between epochs and runs; greater is better."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes

    def outputs(self, net: nn.Module, batch: Batch, layers: Iterable[str] = ()) -> Outputs:
        """Run ``net`` on a batch, capturing the outputs of ``layers`` (module paths)."""
        layers = tuple(layers)
        with Taps(net, layers) if layers else nullcontext({}) as features:
            raw = net(batch.inputs)
        return Outputs.of(raw, features)

    def measures(self) -> Measures:
        """Fresh measures for one pass over a split."""
        return Measures(self.num_classes)


class Measures:
    """What one pass over a split says of a student, and of its agreement with a teacher.

    ``acc`` and ``acc5`` (where there are more than five classes) against the labels, ``ce`` in nats, ``ece`` the
    expected calibration error over 15 bins; with a teacher also ``kl`` (always at temperature 1, so that runs
    compare) and ``agreement``, the share of rows where both name the same class.
    """

    def __init__(self, num_classes: int) -> None:
        against_labels: dict[str, Any] = {
            "acc": MulticlassAccuracy(num_classes, average="micro", validate_args=False, sync_on_compute=False),
            "ece": MulticlassCalibrationError(num_classes, validate_args=False, sync_on_compute=False),
        }
        if num_classes > 5:
            against_labels["acc5"] = MulticlassAccuracy(
                num_classes, top_k=5, average="micro", validate_args=False, sync_on_compute=False
            )
        self.labels = MetricCollection(against_labels, compute_groups=False)
        self.agreement = MulticlassAccuracy(num_classes, average="micro", validate_args=False, sync_on_compute=False)
        # the default drops nan rows, and a student that broke on some of them would look fine
        self.ce, self.kl = (MeanMetric(nan_strategy="disable", sync_on_compute=False) for _ in range(2))
        self.rows = 0
        self.compared = False

    def to(self, device: torch.device) -> Measures:
        """Move the counters to ``device``."""
        for metric in (self.labels, self.agreement, self.ce, self.kl):
            metric.to(device)
        return self

    @torch.no_grad()
    def update(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> None:
        """Count one batch; rows without a label count for the agreement with the teacher alone."""
        logits, targets, labelled = student.logits.float(), _classes(batch.targets), batch.labelled
        self.rows += len(targets)
        if labelled.any():
            self.labels.update(logits[labelled].softmax(-1), targets[labelled])
            self.ce.update(cross_entropy(logits[labelled], targets[labelled]))
        if teacher is not None:
            self.compared = True
            self.agreement.update(logits.argmax(-1), teacher.logits.argmax(-1))
            self.kl.update(kl(logits, teacher.logits))

    def compute(self) -> dict[str, float]:
        """The measures over everything counted."""
        found = {"ce": self.ce.compute(), **self.labels.compute()}
        if self.compared:
            found.update(kl=self.kl.compute(), agreement=self.agreement.compute())
        return {name: float(value) for name, value in found.items()}


def _classes(targets: Tensor) -> Tensor:
    return targets if targets.ndim == 1 else targets.argmax(-1)
