"""One of several tasks: a term that sees the head, the teacher's answer and the labels of that task alone."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import Tensor, nn
from typing_extensions import override

from kdlab.errors import UserError, unknown
from kdlab.functional import Batch, Outputs
from kdlab.losses.term import Term


class TaskTerm(Term):
    """Term on the outputs of one of several tasks, which a network gives as ``heads`` by name.

    It has the role, the rows and the state of the term inside it; it is never asked by chunks of rows, since heads are
    no :class:`~kdlab.functional.Projected` logits.

    Args:
        term: term that is computed.
        task: name of the task whose outputs and labels it gets.
        share: weight of the task beside the others.
    """

    def __init__(self, term: Term, task: str, share: float = 1.0) -> None:
        super().__init__()
        self.term, self.task = term, task
        self.role, self.rows, self.needs_teacher = term.role, term.rows, term.needs_teacher
        self.auxiliary, self.pairing = term.auxiliary, term.pairing
        self.weight = term.weight.times(share)

    @override
    def setup(self, student: nn.Module, teacher: nn.Module | None, examples: int | None) -> None:
        self.term.setup(student, teacher, examples)

    @override
    def prepare(self, student: Outputs, teacher: Outputs | None) -> None:
        self.term.prepare(self._own(student), None if teacher is None else self._own(teacher))

    @override
    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        own, teacher_outputs = self._own(student), None if teacher is None else self._own(teacher)
        if teacher_outputs is not None and self.needs_teacher and own.logits.shape != teacher_outputs.logits.shape:
            raise UserError(
                "student, teacher",
                f"heads of {self.task} of shape {tuple(own.logits.shape)} and {tuple(teacher_outputs.logits.shape)}",
                "the same classes",
            )
        return self.term(own, teacher_outputs, batch.of_task(self.task))

    def _own(self, outputs: Outputs) -> Outputs:
        if self.task not in outputs.heads:
            raise unknown("task", self.task, outputs.heads, "head of the network")
        return Outputs(outputs.heads[self.task])


def for_each_task(terms: Mapping[str, Term], tasks: Mapping[str, float]) -> dict[str, Term]:
    """Copy terms on outputs for each task, named ``kl_digit``, ``kl_parity``; keep terms on layers as they are.

    All tasks share the layers.

    Args:
        terms: name → term.
        tasks: name → weight; they are brought to a mean of 1, so that a term's weight means the same as for one task.

    Raises:
        UserError: for a term that looks at layers and at an output.
    """
    mean = sum(tasks.values()) / len(tasks)
    by_name: dict[str, Term] = {}
    for name, term in terms.items():
        if term.single_task_only and (term.student_layers or term.teacher_layers):
            raise UserError(
                f"loss.terms.{name}",
                (f"looks at an output beside layers, and there are several tasks ({', '.join(tasks)})"),
                "terms on outputs, or on layers alone",
            )
        if term.student_layers or term.teacher_layers:
            by_name[name] = term
            continue
        for task, weight in tasks.items():
            by_name[f"{name}_{task}"] = TaskTerm(copy.deepcopy(term), task, weight / mean)
    return by_name
