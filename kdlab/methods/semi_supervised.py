"""Distillation on rows of which only some have labels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from kdlab.errors import unknown
from kdlab.functional import Batch, Outputs, as_probabilities
from kdlab.methods.offline import OfflineKD
from kdlab.ranges import share

PseudoLabels = Literal["soft", "hard"]


class SemiSupervisedKD(OfflineKD):
    """Method in which the teacher labels the rows that have no label, softly or with its most probable class.

    ``soft``: unlabelled rows count for the soft-target terms. ``hard``: the teacher's first choice becomes the row's
    label. Under a ``threshold``, rows where the teacher is less sure are left out of both; they stay in the
    count, so that few confident rows weigh little. The share of unlabelled rows in a batch is the data's
    (``data.unlabelled_ratio``). With no labels at all this is distillation from the teacher alone.

    Curves: ``train/pseudo_coverage`` (share of the unlabelled rows that are used) and ``train/pseudo_acc``
    (share of those where the teacher is right, by the labels withheld from training).

    Lee, *Pseudo-Label*, ICML 2013 workshop; Chen et al., *Big Self-Supervised Models are Strong Semi-Supervised
    Learners*, NeurIPS 2020 (soft form).

    Args:
        labels: kind of the teacher's labels: ``soft`` or ``hard``.
        threshold: least probability of the teacher's first choice, in [0, 1); 0 uses every row.
        **shared: arguments of :class:`~kdlab.methods.Method`.
    """

    def __init__(self, *, labels: PseudoLabels = "soft", threshold: float = 0.0, **shared: Any) -> None:
        super().__init__(**shared)
        if labels not in get_args(PseudoLabels):
            raise unknown("method.labels", labels, get_args(PseudoLabels))
        share("method.threshold", threshold, one=False)
        self.labels, self.threshold = labels, threshold

    def relabel(self, batch: Batch, teacher: Outputs | None) -> tuple[Batch, dict[str, Tensor]]:
        """Give unlabelled rows the teacher's label, and drop those that the teacher is not sure of."""
        assert teacher is not None
        confidence, choice = teacher.logits.float().softmax(-1).max(-1)
        unlabelled = ~batch.labelled
        used = unlabelled & (confidence >= self.threshold)
        extra = self._curves_of(batch, unlabelled, used, choice)
        window = batch.window if batch.window is not None else batch.count()
        if self.labels == "hard":
            targets = self._with_choice(batch, used, choice, teacher.logits.shape[-1])
            # every row may be labelled now; those left out stay in the count
            batch = replace(batch, targets=targets, window=window._replace(labelled=window.rows))
        if self.threshold > 0:
            keep = (used | ~unlabelled).float()
            weight = keep if batch.weight is None else keep * batch.weight
            batch = replace(batch, weight=weight, window=batch.window or window)
        return batch, extra

    @staticmethod
    def _with_choice(batch: Batch, used: Tensor, choice: Tensor, classes: int) -> Tensor:
        if batch.targets.ndim == 2:
            return torch.where(used[:, None], as_probabilities(choice, classes), batch.targets)
        return torch.where(used, choice, batch.targets)

    @staticmethod
    def _curves_of(batch: Batch, unlabelled: Tensor, used: Tensor, choice: Tensor) -> dict[str, Tensor]:
        curves = {"pseudo_coverage": used.sum() / unlabelled.sum()}  # 0 / 0 is nan: no unlabelled row in this batch
        if batch.hidden_targets is not None:
            curves["pseudo_acc"] = ((choice == batch.hidden_targets) & used).sum() / used.sum()
        return curves
