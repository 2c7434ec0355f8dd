"""What every batch transform is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from kdlab.functional import Batch
from kdlab.functional.types import Target

if TYPE_CHECKING:
    from kdlab.tasks import Task
    from kdlab.teachers import Teacher


class BatchTransform(ABC):
    """Base of the transforms that replace the rows or sequences of a batch by attacked, generated or written ones.

    Attributes:
        target: target that its rows have: ``class``, for data that is classified, or ``next_token``, for sequences.
        needs_teacher: whether it asks a teacher for its answers.
        needs_net: whether it looks into the teacher's network itself, which must then be one.
        makes_partners: whether it shows two views of a row, each the other's partner.
        teacher_writes: whether the teacher writes the sequences.
        progress: share of training done, in [0, 1]; set by the method.
    """

    target: ClassVar[Target] = "class"
    needs_teacher: bool = False
    needs_net: bool = False
    makes_partners: bool = False
    teacher_writes: bool = False
    progress: float = 0.0

    @abstractmethod
    def __call__(
        self, batch: Batch, student: nn.Module, teacher: Teacher | None, task: Task, seed: int, step: int, part: int = 0
    ) -> tuple[Batch, dict[str, Tensor]]:
        """Return the batch to learn from, and curves about it; a function of the arguments and of its own state.

        Args:
            batch: batch of the data.
            student: the network that is trained; nothing in it changes.
            teacher: the teacher, or None.
            task: task that reads the batch.
            seed: seed of the run.
            step: the optimizer step, counted from 0.
            part: index of the micro-batch within the step.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs; empty where all depends on the arguments alone."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - most have no state
        """Restore the state that :meth:`state_dict` returned."""
