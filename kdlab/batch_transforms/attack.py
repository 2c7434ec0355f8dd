"""Inputs changed within a small ball so that the student errs, for a student that is to stand it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from kdlab.batch_transforms.base import BatchTransform
from kdlab.errors import UserError, unknown
from kdlab.functional import Batch, SequenceBatch, cross_entropy, dense, kl
from kdlab.functional.attack import pgd
from kdlab.functional.modes import input_gradients
from kdlab.functional.rng import fold, seed_of
from kdlab.ranges import share, whole_number
from kdlab.tasks import Task
from kdlab.teachers import Teacher

Against = Literal["labels", "teacher"]


class AttackedRows(BatchTransform):
    r"""Batch transform that shows the student attacked inputs, and the teacher the clean ones.

    The attack is projected gradient ascent in the maximum norm, from a random start inside the ball (Madry et al.,
    *Towards Deep Learning Models Resistant to Adversarial Attacks*, ICLR 2018), on the student as it is now, in eval
    mode: its gradients, its BatchNorm statistics and its mode stay as they were. It raises

    - ``labels``: the cross-entropy. A row without a label is attacked against the student's own clean answer.
    - ``teacher``: :math:`\mathrm{KL}(p^T(x) \| p^S(x'))`, x the clean input and x' the attacked one, as Zi et al.,
      *Revisiting Adversarial Robustness Distillation*, ICCV 2021 (RSLAD) do. As long as there is no teacher yet, the
      labels.

    With a ``clean`` share s each row stays as it is too, and counts s, its attacked version 1 - s: every term is then
    s times itself on clean rows and 1 - s times itself on attacked ones (RSLAD's 1/6 and 5/6 of KL).

    The start of a row is a function of (seed, step, example): the split of a step into micro-batches changes no bit.

    Args:
        against: ``labels`` or ``teacher``.
        eps: radius of the ball, on inputs in [0, 1].
        steps: number of ascent steps.
        step_size: size of each ascent step; None is a quarter of ``eps``, as 2/255 of 8/255.
        clean: share of the clean rows, in [0, 1).

    Raises:
        UserError: for an argument out of its range.
    """

    def __init__(
        self,
        against: Against = "labels",
        eps: float = 8 / 255,
        steps: int = 10,
        step_size: float | None = None,
        clean: float = 0.0,
    ) -> None:
        if against not in get_args(Against):
            raise unknown("batch_transform.against", against, get_args(Against))
        share("batch_transform.eps", eps, zero=False)
        whole_number("batch_transform.steps", steps)
        if step_size is not None and not 0 < step_size < math.inf:
            raise UserError("batch_transform.step_size", step_size, "above 0, or null")
        share("batch_transform.clean", clean, one=False)
        self.against, self.eps, self.steps = against, float(eps), steps
        self.step_size = self.eps / 4 if step_size is None else float(step_size)
        self.clean = float(clean)
        self.needs_teacher = against == "teacher"
        self._looked = False

    def __call__(
        self, batch: Batch, student: nn.Module, teacher: Teacher | None, task: Task, seed: int, step: int, part: int = 0
    ) -> tuple[Batch, dict[str, Tensor]]:
        """Return the batch with attacked inputs, and the clean ones in ``Batch.teacher_inputs``.

        Args:
            batch: batch of rows, with inputs (B, ...) in [0, 1].
            student: network that is attacked.
            teacher: teacher that reads the clean rows; needed with ``against="teacher"`` alone.
            task: task that reads the batch.
            seed: seed of the run.
            step: the optimizer step, counted from 0.
            part: index of the micro-batch within the step; used for batches without keys.

        Raises:
            UserError: for inputs that are no numbers in [0, 1].
        """
        inputs = self._checked(batch)
        teacher_outputs = teacher(batch.clean_view()) if self.needs_teacher and teacher is not None else None

        def answer(x: Tensor) -> Tensor:
            return dense(task.outputs(student, replace(batch, inputs=x.to(inputs.dtype))).logits)

        with input_gradients(student, device=inputs.device):
            if teacher_outputs is None:
                targets = _targets(batch, answer, inputs)
                harm = lambda x: cross_entropy(answer(x), targets)  # noqa: E731
            else:
                shown = dense(teacher_outputs.logits).detach()
                harm = lambda x: kl(answer(x), shown)  # noqa: E731
            start = _noise(batch, seed, step, part)
            attacked = pgd(harm, inputs.float(), self.eps, self.steps, self.step_size, start).to(inputs.dtype)
        read = inputs if batch.teacher_inputs is None else batch.teacher_inputs
        if not self.clean:
            return replace(batch, inputs=attacked, teacher_inputs=read), {}
        return self._both(batch, attacked, read), {}

    def _checked(self, batch: Batch) -> Tensor:
        inputs = batch.inputs
        if not isinstance(inputs, Tensor) or not inputs.is_floating_point() or isinstance(batch, SequenceBatch):
            raise UserError(
                "batch_transform", "an attack changes pictures or tables of numbers", "batch_transform=none"
            )
        if not self._looked:  # once: on a GPU a look is a wait
            self._looked = True
            least, most = float(inputs.min()), float(inputs.max())
            if least < 0 or most > 1:
                raise UserError(
                    "batch_transform",
                    f"an attack stays in [0, 1], and the inputs lie in [{least:.3g}, {most:.3g}]",
                    "pictures, or batch_transform=none",
                )
        return inputs

    def _both(self, batch: Batch, attacked: Tensor, read: Any) -> Batch:
        """Join clean and attacked rows, each pair with the weight of one row, so that the window stays as it is."""
        rows = len(batch)
        weight = torch.ones(rows, device=attacked.device) if batch.weight is None else batch.weight
        partner = batch.partner
        if partner is not None:
            partner = torch.cat([partner, torch.where(partner >= 0, partner + rows, partner)])
        return replace(
            batch,
            inputs=torch.cat([batch.inputs, attacked]),  # type: ignore[list-item]
            teacher_inputs=torch.cat([read, read]),
            targets=_twice(batch.targets),
            example_id=_twice(batch.example_id),
            hidden_targets=_twice(batch.hidden_targets),
            weight=torch.cat([self.clean * weight, (1 - self.clean) * weight]),
            partner=partner,
            window=batch.window if batch.window is not None else batch.count(),
        )


def _twice(value: Any) -> Any:
    return None if value is None else torch.cat([value, value])


@torch.no_grad()
def _targets(batch: Batch, answer: Any, inputs: Tensor) -> Tensor:
    """Return the labels; where there is none, the student's own prediction for the clean input."""
    labelled = batch.labelled
    if bool(labelled.all()):
        return batch.targets
    logits = answer(inputs)
    own = logits.argmax(-1)
    if batch.targets.ndim == 2:
        own = nn.functional.one_hot(own, logits.shape[-1]).to(batch.targets.dtype)
        labelled = labelled[:, None]
    return torch.where(labelled, batch.targets, own)


def _noise(batch: Batch, seed: int, step: int, part: int) -> Tensor:
    """Draw offsets in [-1, 1) from (seed, step, example), or from (seed, step, part, row) for rows without keys."""
    inputs = batch.inputs
    assert isinstance(inputs, Tensor)
    if batch.example_id is not None:
        state = fold(seed_of(seed, "attack", step), batch.example_id[:, 0])
    else:
        state = fold(seed_of(seed, "attack", step, part), torch.arange(len(batch), device=inputs.device))
    places = torch.arange(inputs[0].numel(), device=inputs.device)
    bits = (fold(state[:, None], places[None]) >> 40) & 0xFFFFFF
    return (bits.float() * 2.0**-23 - 1).view(inputs.shape)
