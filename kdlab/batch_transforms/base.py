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
    """Puts other rows or sequences in the place of the data's: attacked, generated, written by a network.

    Attributes:
        target: what its rows are for: ``class``, of data that is classified, or ``next_token``, of sequences.
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
        """The batch to learn from, and curves about it; a function of the arguments and of its own state.

        Args:
            batch: of the data.
            student: the network that is trained; nothing in it changes.
            teacher: the teacher, or None.
            task: reads the batch.
            seed: of the run.
            step: the optimizer step, counted from 0.
            part: which micro-batch of the step.
        """

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs; nothing where all depends on the arguments alone."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - most have no state
        """Take back what :meth:`state_dict` gave."""
