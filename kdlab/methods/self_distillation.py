"""Networks that learn from themselves: a previous generation, a running average, an earlier state, or their peers."""

from __future__ import annotations

from typing import Any, Literal, get_args

from kdlab.errors import UserError, unknown
from kdlab.methods.method import Method
from kdlab.teachers import EMATeacher, SnapshotTeacher

TeacherKind = Literal["previous", "ema", "snapshot", "none"]


class SelfDistillation(Method):
    """Method whose teacher is the student's own architecture at another time, or that has no teacher.

    ``previous``: born-again networks; each generation is a fit of its own and learns from the one before, the first
    from labels (or from a given teacher). The generations, and the ensemble of all, are compared. Furlanello et al.,
    *Born-Again Neural Networks*, ICML 2018. ``ema``: a running average of the weights teaches. ``snapshot``: no
    teacher at first, and in the last epochs the earlier self. ``none``: no teacher; the terms compare what is said in
    the same step, by peers, by exits on inner layers, or about other rows, or was said in the step before.

    Args:
        self_teacher: kind of the teacher: ``previous``, ``ema``, ``snapshot`` or ``none``.
        generations: number of fits (``previous`` only).
        decay: decay of the running average (``ema`` only), see :class:`~kdlab.teachers.EMATeacher`.
        begin: share of the epochs without a teacher (``snapshot`` only), see :class:`~kdlab.teachers.SnapshotTeacher`.
        every: number of epochs between snapshots (``snapshot`` only); None keeps the first.
        **shared: arguments of :class:`~kdlab.methods.Method`.
    """

    def __init__(
        self,
        *,
        self_teacher: TeacherKind = "previous",
        generations: int = 1,
        decay: float = 0.99,
        begin: float = 0.5,
        every: int | None = None,
        **shared: Any,
    ) -> None:
        super().__init__(**shared)
        if self_teacher not in get_args(TeacherKind):
            raise unknown("method.self_teacher", self_teacher, get_args(TeacherKind))
        if generations < 1:
            raise UserError("method.generations", generations, "a whole number, at least 1")
        if self_teacher == "ema":
            self.teacher = EMATeacher(self.task, decay)
        elif self_teacher == "snapshot":
            self.teacher = SnapshotTeacher(self.task, begin, every)
        if self_teacher in ("ema", "snapshot"):
            assert self.teacher is not None
            self.teacher.layers = tuple(self.objective.teacher_layers)
        self.self_teacher, self.generations = self_teacher, generations
