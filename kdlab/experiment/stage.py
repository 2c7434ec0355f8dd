"""One fit of an experiment: data, teacher, student, objective, method, trainer."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kdlab.errors import UserError
from kdlab.experiment import build
from kdlab.experiment.class_order import classified_alone, permutation, reordered
from kdlab.experiment.from_run import normalised_as_started
from kdlab.experiment.model_store import write_model
from kdlab.experiment.schema import Experiment
from kdlab.experiment.teacher import ResolvedTeacher, TrainedModel, find_teacher, pretrained_start, resolve_teacher
from kdlab.losses import Objective
from kdlab.runs.formatting import plural
from kdlab.tasks import Task
from kdlab.training import FitResult, TrainerConfig, fit

log = logging.getLogger("kdlab")


@dataclass
class Stage:
    """One fit of an experiment, done."""

    experiment: Experiment
    data: Any
    task: Task
    training: TrainerConfig
    student: nn.Module
    lesson: ResolvedTeacher | None
    fitted: FitResult
    started_with: dict[str, Tensor] | None = None
    """The student's first weights, where they are neither random nor those of the stage before."""

    @property
    def as_teacher(self) -> TrainedModel:
        """Its student, for the stage after."""
        classes = tuple(self.data.class_names) if classified_alone(self.data) else ()
        return TrainedModel(self.student, self.data.describe(), self.fitted.seconds, classes=classes)


def fit_stage(
    experiment: Experiment, folder: Path, previous: TrainedModel | None, choices: Mapping[str, str], name: str
) -> Stage:
    """One fit: data, teacher, student, objective, method, trainer."""
    training = build.training(experiment.trainer)
    data = build.data(experiment.data, experiment.seed)
    task = build.task(experiment.task, data)
    objective = build.objective(experiment.loss, data)
    experiment = normalised_as_started(experiment, data)

    previous = _in_order(previous, experiment, data)
    from_before = previous if is_taught_by_previous(experiment) else None
    taught = is_taught(experiment, objective)
    source = lesson = None
    if taught or experiment.init in ("teacher", "layer_subset", "teacher_head"):
        source = find_teacher(experiment, data, training, from_before, choices, objective.vocabulary_agnostic)
    elif experiment.teacher is not None:
        log.info("%s: learns from itself or from labels alone, without the teacher that is configured", name)
    if source is not None and taught:
        lesson = resolve_teacher(source, experiment, data, task, objective, training)

    student = build.network(experiment.student, data, experiment.seed, "student")
    build.init_weights(
        student,
        experiment.init,
        previous=previous.net if previous else None,
        teacher=source.net if source else None,
        pretrained=pretrained_start(experiment, data, training, choices) if experiment.init == "pretrained" else None,
    )
    given = None
    if experiment.init in ("teacher", "layer_subset", "pretrained"):
        given = {name: value.detach().cpu().clone() for name, value in student.state_dict().items()}
    batches = build.batch_transform(experiment.batch_transform, data)
    adapted = build.attach_adapter(student, experiment.adapter, experiment.seed)
    auxiliary = build.auxiliary(experiment, student, data)
    teacher = lesson.teacher if lesson else None
    method = build.method(experiment, student, objective, task, teacher, batches, auxiliary)
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder, experiment.student, data, method.weights_file)
    loggers = build.loggers(experiment.logger, folder, experiment.name)
    log.info("%s: training %s on %s", name, plural(experiment.epochs, "epoch"), data.describe())
    for note in data.notes:
        log.info("data: %s", note)
    continued = experiment.continued_from is not None
    fitted = fit(method, data, training, folder, experiment.epochs, loggers, name, continued)
    adapted(fitted.weights)
    return Stage(experiment, data, task, training, student, lesson, fitted, given)


def _in_order(previous: TrainedModel | None, experiment: Experiment, data: Any) -> TrainedModel | None:
    """The stage before, with its classes in the order of ``data``: a copy where that is another one."""
    if previous is None or not previous.classes or not goes_on_from_previous(experiment) or not classified_alone(data):
        return previous
    order = permutation(previous.classes, data.class_names)
    if order is None:
        return previous
    net = copy.deepcopy(previous.net)
    if net is None or not reordered(net, order, data):
        raise UserError(
            "data.classes",
            f"{', '.join(data.class_names)}, and the stage before has {', '.join(previous.classes)}",
            "the same order",
        )
    log.info("the stage before: its classes are brought into the order %s", ", ".join(data.class_names))
    return replace(previous, net=net, classes=tuple(data.class_names))


def check_stages(plan: Mapping[str, Experiment]) -> None:
    """Refuse a stage with other classes than the stage before, where it goes on from that.

    Raises:
        UserError: naming the stage, and both.
    """
    if len(plan) < 2:
        return
    before: list[str] = []
    for name, experiment in plan.items():
        data = build.data(experiment.data, experiment.seed)
        names = list(data.class_names) if classified_alone(data) else []
        if goes_on_from_previous(experiment) and before and names and set(before) != set(names):
            raise UserError(
                f"stages.{name}",
                (
                    f"its data have the classes {', '.join(names[:12])}, and the stage before, from "
                    f"which it goes on, has {', '.join(before[:12])}"
                ),
                "the same classes",
            )
        before = names


def goes_on_from_previous(experiment: Experiment) -> bool:
    """Whether the stage before teaches, or is what the student starts from."""
    return experiment.init == "previous" or is_taught_by_previous(experiment)


def is_taught_by_previous(experiment: Experiment) -> bool:
    """Whether the stage before teaches: born-again generations, and ``teacher=previous``."""
    return experiment.method.get("self_teacher") == "previous" or (
        experiment.teacher is not None and experiment.teacher.previous
    )


def is_taught(experiment: Experiment, objective: Objective) -> bool:
    """Whether somebody else teaches: neither labels alone, nor a running average or snapshot of the student."""
    if experiment.teaches_itself:
        return False
    return objective.needs_teacher or experiment.method_name != "FineTune"
