"""Assembly of the parts of one fit, made once: for checks, for training, and for measuring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from kdlab.batch_transforms import BatchTransform
from kdlab.data import DataModule
from kdlab.experiment import build
from kdlab.experiment.from_run import normalised_as_started
from kdlab.experiment.schema import Experiment
from kdlab.losses import Objective
from kdlab.methods import Method
from kdlab.models import NetworkStep
from kdlab.models.transforms.auxiliary import Auxiliary
from kdlab.tasks import Task
from kdlab.teachers import Teacher
from kdlab.training import TrainerConfig


@dataclass
class Assembly:
    """Parts of an experiment, or of one stage of it, before anything trains."""

    experiment: Experiment
    """Experiment whose student normalises inputs as the weights do that it starts from."""
    data: DataModule
    task: Task
    objective: Objective
    """Objective, without what it makes for the layers of particular networks."""
    trainer: TrainerConfig
    note: str = ""
    """Line for the log about what was changed to make the parts fit; empty where nothing was."""

    def student(self) -> nn.Module:
        """Build a fresh student; its first weights are a function of the experiment's seed."""
        return build.network(self.experiment.student, self.data, self.experiment.seed, "student")

    def steps(self, repeats: Sequence[Mapping[str, Any]] = ()) -> dict[str, NetworkStep]:
        """Build the steps that the student goes through: see :func:`~kdlab.experiment.build.student_steps`."""
        return build.student_steps(self.experiment, repeats)

    @cached_property
    def batch_transform(self) -> BatchTransform | None:
        """Transform that replaces the batches of training; None for the data's own."""
        return build.batch_transform(self.experiment.batch_transform, self.data)

    def auxiliary(self, student: nn.Module) -> Auxiliary | None:
        """Build the auxiliary network that trains beside a student; None where there is none."""
        return build.auxiliary(self.experiment, student, self.data)

    def method(
        self,
        student: nn.Module,
        teacher: Teacher | None,
        auxiliary: Auxiliary | None,
        objective: Objective | None = None,
    ) -> Method:
        """Build the LightningModule that trains a student.

        Args:
            student: network that trains.
            teacher: teacher; None where there is none.
            auxiliary: auxiliary network that trains beside it.
            objective: objective to use up; None is this assembly's own.
        """
        objective = self.objective if objective is None else objective
        batches = self.batch_transform
        return build.method(self.experiment, student, objective, self.task, teacher, batches, auxiliary)


def assemble(experiment: Experiment) -> Assembly:
    """Put the parts of an experiment together; nothing is trained or written.

    Raises:
        UserError: what a part refuses.
    """
    data = build.data(experiment.data, experiment.seed)
    objective = build.objective(experiment.loss, data)
    task = build.task(experiment.task, data)
    trainer = build.trainer(experiment.trainer)
    experiment, note = normalised_as_started(experiment, data)
    return Assembly(experiment, data, task, objective, trainer, note)
