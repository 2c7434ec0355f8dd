"""What one pass over a split says of a classifier; and of one that has several tasks at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

from kdlab.functional import NO_LABEL, Batch, Outputs, cross_entropy, kl


class ClassMeasures:
    """Measures of a student, and of its agreement with a teacher, in one pass over a split.

    ``acc`` and ``acc5`` (where there are more than five classes) against the labels, ``ce`` in nats, ``ece`` the
    expected calibration error over 15 bins (Guo et al., *On Calibration of Modern Neural Networks*, ICML 2017); with a
    teacher also ``kl`` (always at temperature 1, so that runs compare) and ``agreement``, the share of rows where both
    name the same class.

    Rows are kept, and measured once at the end: no synchronisation on the way, and no metric object to build and to
    update, which on a small split would cost more than its forward pass. A row takes 4 bytes a class.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.rows = 0
        self.compared = False
        self._logits: list[Tensor] = []
        self._targets: list[Tensor] = []
        self._against_labels: list[Tensor] = []
        self._against_teacher: list[Tensor] = []

    @torch.no_grad()
    def update(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> None:
        """Count one batch; rows without a label count for the agreement with the teacher alone."""
        logits = student.logits.float()
        classes = class_ids(batch.targets).masked_fill(~batch.labelled, NO_LABEL)
        self.rows += len(classes)
        self._logits.append(logits)
        self._targets.append(classes)
        self._against_labels.append(cross_entropy(logits, classes))
        if teacher is not None:
            self.compared = True
            same = logits.argmax(-1) == teacher.logits.argmax(-1)
            self._against_teacher.append(torch.stack([same.float(), kl(logits, teacher.logits)], 1))

    def seen(self) -> tuple[Tensor, Tensor]:
        """Return all logits (N, C) and class ids (N,) counted, in order, on the CPU; -100 without a label."""
        return torch.cat(self._logits).cpu(), torch.cat(self._targets).cpu()

    def compute(self) -> dict[str, float]:
        """Compute the measures over everything counted."""
        targets = torch.cat(self._targets)
        labelled = targets != NO_LABEL
        targets, logits = targets[labelled], torch.cat(self._logits)[labelled]
        measures = {"ce": torch.cat(self._against_labels)[labelled].double().mean()}
        options: dict[str, Any] = {"num_classes": self.num_classes, "validate_args": False}
        if len(targets):
            measures["acc"] = multiclass_accuracy(logits, targets, average="micro", **options)
            measures["ece"] = multiclass_calibration_error(logits.softmax(-1), targets, **options)
            if self.num_classes > 5:
                measures["acc5"] = multiclass_accuracy(logits, targets, average="micro", top_k=5, **options)
        if self.compared:
            measures["agreement"], measures["kl"] = torch.cat(self._against_teacher).double().mean(0)
        return {name: float(value) for name, value in measures.items()}


class TaskMeasures:
    """Measures of each task (``acc_digit``, ``acc_parity``), and their means (``acc``).

    A network that answers for some of the tasks alone, as a teacher of one does, is measured on those.

    Args:
        tasks: name → number of classes.
    """

    def __init__(self, tasks: Mapping[str, int]) -> None:
        self.rows = 0
        self._each = {name: ClassMeasures(classes) for name, classes in tasks.items()}

    def update(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> None:
        """Count one batch."""
        self.rows += len(batch)
        for name, measures in self._each.items():
            if name not in student.heads:
                continue
            has_teacher = teacher is not None and name in teacher.heads
            against = Outputs(teacher.heads[name]) if teacher is not None and has_teacher else None
            measures.update(Outputs(student.heads[name]), against, batch.of_task(name))

    def compute(self) -> dict[str, float]:
        """Compute the measures over everything counted."""
        each = {name: one.compute() for name, one in self._each.items() if one.rows}
        shared = [key for key in next(iter(each.values()), {}) if all(key in one for one in each.values())]
        means = {key: sum(one[key] for one in each.values()) / len(each) for key in shared}
        return means | {f"{key}_{name}": value for name, one in each.items() for key, value in one.items()}


def class_ids(targets: Tensor) -> Tensor:
    """Return class ids (rows,), of soft targets the most probable ones."""
    return targets if targets.ndim == 1 else targets.argmax(-1)
