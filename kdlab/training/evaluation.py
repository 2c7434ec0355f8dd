"""Evaluation of networks and teachers on a split."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from kdlab.errors import UserError
from kdlab.functional import Batch, Outputs
from kdlab.tasks import Measures, Task
from kdlab.teachers import Teacher


@torch.no_grad()
def evaluate(
    task: Task,
    answers: Callable[[Batch, str], Outputs | None],
    loader: Iterable[Batch],
    device: torch.device | str = "cpu",
    teacher: Teacher | None = None,
    split: str = "test",
    words: int | None = None,
    keep: Callable[[str, Measures], None] | None = None,
) -> dict[str, float]:
    """Measure a network in eval mode, or a teacher, on a split, in float32.

    Args:
        task: task that says what is measured.
        answers: function (batch, split) → outputs.
        loader: batches of the split.
        device: device that the batches are moved to.
        teacher: teacher with which agreement and divergence are measured; None leaves them out.
        split: name of the split, for a cached teacher.
        words: number of words in the split, for measures per word.
        keep: function that receives the split and the task's measures once they are complete, with all that they hold.

    Raises:
        UserError: if the split is empty.
    """
    measures = task.measures(words)
    for batch in loader:
        batch = batch.to(device)
        outputs = answers(batch, split)
        assert outputs is not None
        measures.update(outputs, teacher(batch, split) if teacher is not None else None, batch)
    if not measures.rows:
        raise UserError("data", f"the {split} split is empty", "at least one row")
    if keep is not None:
        keep(split, measures)
    return measures.compute()
