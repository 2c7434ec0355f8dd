"""Classification: how a network reads a batch, and what is measured."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from kdlab.functional import Batch, Outputs, Taps, cross_entropy, kl, log_probabilities


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
    expected calibration error over 15 bins (Guo et al., *On Calibration of Modern Neural Networks*, ICML 2017); with a
    teacher also ``kl`` (always at temperature 1, so that runs compare) and ``agreement``, the share of rows where both
    name the same class.

    A few numbers a row are kept, and averaged at the end in float64: no synchronisation, and no object a measure, which
    on a small split would cost more than its forward pass.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.rows = 0
        self.compared = False
        self._labelled: list[Tensor] = []
        self._against_labels: list[Tensor] = []
        self._against_teacher: list[Tensor] = []

    def to(self, device: torch.device) -> Measures:
        """Nothing: what is counted stays where the outputs are."""
        return self

    @torch.no_grad()
    def update(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> None:
        """Count one batch; rows without a label count for the agreement with the teacher alone."""
        logits, classes = student.logits.float(), _classes(batch.targets)
        self.rows += len(classes)
        first = logits.argmax(-1)
        among = logits.topk(min(5, self.num_classes)).indices == classes[:, None]
        confidence = log_probabilities(logits).amax(-1).exp()
        against_labels = [first == classes, among.any(-1), cross_entropy(logits, classes), confidence]
        self._labelled.append(batch.labelled)
        self._against_labels.append(torch.stack([column.float() for column in against_labels], 1))
        if teacher is not None:
            self.compared = True
            against_teacher = [(first == teacher.logits.argmax(-1)).float(), kl(logits, teacher.logits)]
            self._against_teacher.append(torch.stack(against_teacher, 1))

    def compute(self) -> dict[str, float]:
        """The measures over everything counted."""
        labelled = torch.cat(self._labelled)
        right, among, ce, confidence = torch.cat(self._against_labels)[labelled].cpu().double().unbind(1)
        found = {"ce": ce.mean(), "acc": right.mean(), "ece": _calibration_error(right, confidence)}
        if self.num_classes > 5:
            found["acc5"] = among.mean()
        if self.compared:
            found["agreement"], found["kl"] = torch.cat(self._against_teacher).cpu().double().mean(0)
        return {name: float(value) for name, value in found.items()}


def _calibration_error(right: Tensor, confidence: Tensor, bins: int = 15) -> Tensor:
    """Mean over all rows of the difference between accuracy and mean confidence in a row's bin of confidence."""
    bin_of = ((confidence * bins).ceil().long() - 1).clamp(0, bins - 1)
    off = torch.zeros(bins, dtype=right.dtype).index_add_(0, bin_of, right - confidence)
    return off.abs().sum() / len(right)


def _classes(targets: Tensor) -> Tensor:
    return targets if targets.ndim == 1 else targets.argmax(-1)
