"""A second, strongly changed view of rows: to agree with the first (consistency), or in its place (noise)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from kdlab.batch_transforms.base import BatchTransform
from kdlab.errors import UserError, unknown
from kdlab.functional import NO_LABEL, Batch
from kdlab.functional.rng import seed_of
from kdlab.tasks import Task
from kdlab.teachers import Teacher

Of = Literal["unlabelled", "all"]


class StrongViews(BatchTransform):
    """Batch transform that adds a strong view of rows to the batch, beside the (weak) view that the data show.

    A strong row has no label, and its ``partner`` is the weak row that it shows again; a term such as
    :class:`~kdlab.losses.Consistency` lets the student agree with itself. Sohn et al., *FixMatch: Simplifying
    Semi-Supervised Learning with Consistency and Confidence*, NeurIPS 2020; Xie et al., *Unsupervised Data
    Augmentation for Consistency Training*, NeurIPS 2020.

    ``instead`` shows the strong views in the place of the rows, labels and all: noise for the student alone, as in
    Xie et al., *Self-Training with Noisy Student Improves ImageNet Classification*, CVPR 2020.

    A teacher reads the weak view of every row. The view of an example is a function of (seed, step, example).

    Args:
        data: the data module, which shows pictures under transforms.
        augment: transforms that come on top of the weak view, as in ``data.augment``.
        of: ``unlabelled`` rows, or ``all`` of them.
        instead: show the strong views in the place of the weak ones.

    Raises:
        UserError: for transforms that the data cannot be shown under.
    """

    def __init__(self, data: Any, augment: Any, of: Of = "all", instead: bool = False) -> None:
        if of not in get_args(Of):
            raise unknown("batch_transform.of", of, get_args(Of))
        if not hasattr(data, "augmented"):
            raise UserError(
                "batch_transform", "strong views need pictures", "data of pictures, or batch_transform=none"
            )
        if not augment:
            raise UserError("batch_transform.augment", "none", "transforms, as in data.augment")
        try:
            data.augmented(torch.zeros(1, *data.input_shape), torch.zeros(1, dtype=torch.int64), 0, augment=augment)
        except UserError as error:
            raise error.at(error.key.replace("data.augment", "batch_transform.augment")) from None
        self.data, self.augment, self.of, self.instead = data, augment, of, instead
        self.makes_partners = not instead

    def __call__(
        self, batch: Batch, student: nn.Module, teacher: Teacher | None, task: Task, seed: int, step: int, part: int = 0
    ) -> tuple[Batch, dict[str, Tensor]]:
        """Return the batch with strong views.

        Args:
            batch: batch of pictures, with keys.
            student: network that is trained; not needed here.
            teacher: teacher; not needed here.
            task: task that reads the batch; not needed here.
            seed: seed of the run.
            step: the optimizer step, counted from 0.
            part: index of the micro-batch within the step; nothing depends on it.

        Raises:
            UserError: for rows that are no examples of the data.
        """
        if batch.example_id is None or not isinstance(batch.inputs, Tensor):
            raise UserError(
                "batch_transform",
                ("strong views, and the rows are no examples of their own (data.augment mixes them)"),
                "data.augment without mixup and cutmix, or batch_transform=none",
            )
        inputs = batch.inputs
        chosen = torch.arange(len(batch), device=inputs.device)
        if self.of == "unlabelled":
            chosen = chosen[~batch.labelled]
        view = seed_of(seed, "strong view", step) >> 1
        strong = self.data.augmented(inputs[chosen], batch.example_id[chosen, 0], view, augment=self.augment).to(
            inputs.dtype
        )
        read = inputs if batch.teacher_inputs is None else batch.teacher_inputs
        if self.instead:
            return replace(batch, inputs=inputs.index_copy(0, chosen, strong), teacher_inputs=read), {}
        if batch.partner is not None:
            raise UserError(
                "batch_transform",
                "strong views are the partners of rows, which have others already",
                "data.pairing=null, or batch_transform=none",
            )
        return self._added(batch, strong, chosen, read), {}

    def _added(self, batch: Batch, strong: Tensor, chosen: Tensor, read: Any) -> Batch:
        """Return the rows and then their strong views; the window counts both, over the whole step."""
        window = batch.window if batch.window is not None else batch.count()
        more = window.rows if self.of == "all" else window.rows - window.labelled
        before = torch.full((len(batch),), -1, dtype=torch.int64, device=strong.device)
        none = torch.full_like(batch.targets[chosen], NO_LABEL if batch.targets.ndim == 1 else 0)

        def with_chosen(value: Tensor | None) -> Tensor | None:
            return None if value is None else torch.cat([value, value[chosen]])

        return replace(
            batch,
            inputs=torch.cat([batch.inputs, strong]),  # type: ignore[list-item]
            teacher_inputs=with_chosen(read),
            targets=torch.cat([batch.targets, none]),
            example_id=with_chosen(batch.example_id),
            weight=with_chosen(batch.weight),
            hidden_targets=with_chosen(batch.hidden_targets),
            partner=torch.cat([before, chosen]),
            window=window._replace(rows=window.rows + more, partnered=more),
        )
