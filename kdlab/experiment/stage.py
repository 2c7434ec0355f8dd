"""Stage of an experiment, which is one fit: data, teacher, student, objective, method, trainer."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kdlab.data import DataModule
from kdlab.errors import UserError
from kdlab.experiment import build
from kdlab.experiment.assembly import Assembly
from kdlab.experiment.class_order import classified_alone, permutation, reordered
from kdlab.experiment.model_store import write_model
from kdlab.experiment.schema import Experiment
from kdlab.experiment.teacher import ResolvedTeacher, TrainedModel, find_pretrained, find_teacher, resolve_teacher
from kdlab.losses import Objective
from kdlab.models import NetworkStep, StepContext
from kdlab.models.transforms.steps import apply_steps, describe_steps, finish_steps, first_weights
from kdlab.runs.formatting import plural
from kdlab.tasks import Task
from kdlab.training import FitResult, TrainerConfig, fit

log = logging.getLogger("kdlab")


@dataclass
class Stage:
    """Finished fit of an experiment."""

    assembly: Assembly
    student: nn.Module
    lesson: ResolvedTeacher | None
    """Teacher that taught it; None where there was none."""
    fitted: FitResult
    steps: list[dict[str, Any]]
    """Recorded steps of the student."""
    started_with: dict[str, Tensor] | None = None
    """First weights of the student, where they are neither random nor those of the stage before."""
    repeats: Sequence[Mapping[str, Any]] = ()
    """Recorded steps of the network whose weights it started from."""

    @property
    def experiment(self) -> Experiment:
        """Experiment of this stage."""
        return self.assembly.experiment

    @property
    def data(self) -> DataModule:
        """Data that it learned from."""
        return self.assembly.data

    @property
    def task(self) -> Task:
        """Task of this stage."""
        return self.assembly.task

    @property
    def training(self) -> TrainerConfig:
        """Trainer settings of this stage."""
        return self.assembly.trainer

    @property
    def as_teacher(self) -> TrainedModel:
        """Student of this stage as a teacher for the stage after."""
        classes = tuple(self.data.class_names) if classified_alone(self.data) else ()
        seconds = self.fitted.seconds
        return TrainedModel(self.student, self.data.describe(), seconds, steps=self.steps, classes=classes)


def fit_stage(
    parts: Assembly, folder: Path, previous: TrainedModel | None, choices: Mapping[str, str], name: str
) -> Stage:
    """Fit the student of an assembly: find its teacher, start it, train it, finish it.

    Args:
        parts: assembly to fit; its objective is used up.
        folder: folder that gets checkpoints and the deployable weights.
        previous: model of the stage before.
        choices: map of group → chosen option, for names.
        name: name of the stage.
    """
    experiment, data, trainer = parts.experiment, parts.data, parts.trainer
    previous = _in_order(previous, experiment, data)
    source, teacher = _find_teacher(parts, previous, choices, name)
    pretrained = find_pretrained(experiment, data, trainer, choices)
    origin = {"previous": previous, "teacher": source, "pretrained": pretrained}.get(experiment.init)
    repeats = origin.steps if origin is not None else ()

    context = StepContext(
        previous=previous.net if previous else None,
        teacher=source.net if source else None,
        pretrained=pretrained.load if pretrained else None,
        seed=experiment.seed,
        batches=data.train_dataloader,
    )
    steps = parts.steps(repeats)
    if experiment.init == "previous" and previous is None:  # nothing before the first stage: it starts fresh
        del steps["init"]
    start, changes = _split(steps)
    student = apply_steps(parts.student(), start, context)
    given = first_weights(student) if experiment.init in STORED_STARTS else None
    student = apply_steps(student, changes, context)

    auxiliary = parts.auxiliary(student)
    method = parts.method(student, teacher.teacher if teacher else None, auxiliary)
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder, experiment.student, data, method.weights_file, describe_steps(steps))
    loggers = build.loggers(experiment.logger, folder, experiment.name)
    log.info("%s: training %s on %s", name, plural(experiment.epochs, "epoch"), data.describe())
    for note in filter(None, [parts.note, *(f"data: {note}" for note in data.notes)]):
        log.info("%s", note)
    continued = experiment.continued_from is not None
    fitted = fit(method, data, trainer, folder, experiment.epochs, loggers, name, continued)
    student = finish_steps(student, steps, context, fitted.weights)
    write_model(folder, experiment.student, data, fitted.weights.name, describe_steps(steps))
    return Stage(parts, student, teacher, fitted, describe_steps(steps), given, repeats)


STORED_STARTS = ("teacher", "layer_subset", "pretrained")
"""Values of ``init`` with which a baseline starts from the student's first weights too."""


def _find_teacher(
    parts: Assembly, previous: TrainedModel | None, choices: Mapping[str, str], name: str
) -> tuple[TrainedModel | None, ResolvedTeacher | None]:
    """Find the network that teaches or that the student starts from, and make it a teacher where it teaches."""
    experiment, data, objective = parts.experiment, parts.data, parts.objective
    taught = is_taught(experiment, objective)
    if not taught and experiment.init not in ("teacher", "layer_subset", "teacher_head"):
        if experiment.teacher is not None:
            log.info("%s: learns from itself or from labels alone, without the teacher that is configured", name)
        return None, None
    before = previous if experiment.previous_teaches else None
    source = find_teacher(experiment, data, parts.trainer, before, choices, objective.vocabulary_agnostic)
    if source is None or not taught:
        return source, None
    return source, resolve_teacher(source, experiment, data, parts.task, objective, parts.trainer)


def _split(steps: Mapping[str, NetworkStep]) -> tuple[dict[str, NetworkStep], dict[str, NetworkStep]]:
    """Return the steps up to what the student starts from, and those that change it from there on."""
    names = list(steps)
    count = names.index("init") + 1 if "init" in steps else 0
    return {name: steps[name] for name in names[:count]}, {name: steps[name] for name in names[count:]}


def _in_order(previous: TrainedModel | None, experiment: Experiment, data: DataModule) -> TrainedModel | None:
    """Return the stage before, with its classes in the order of ``data``: a copy where that is another one."""
    if previous is None or not previous.classes or not experiment.goes_on or not classified_alone(data):
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
        if experiment.goes_on and before and names and set(before) != set(names):
            raise UserError(
                f"stages.{name}",
                (
                    f"its data have the classes {', '.join(names[:12])}, and the stage before, from "
                    f"which it goes on, has {', '.join(before[:12])}"
                ),
                "the same classes",
            )
        before = names


def with_generations(plan: Mapping[str, Experiment]) -> Iterator[tuple[str, Experiment]]:
    """Yield every fit of a plan by its name: stages, and the generations of each."""
    for name, experiment in plan.items():
        generations = experiment.method.get("generations", 1)
        if generations == 1:
            yield name, experiment
        for n in range(1, generations + 1) if generations > 1 else ():
            # each with a seed of its own: networks of one start and order would make a poor ensemble
            yield f"{name}_generation_{n}".lstrip("_"), replace(experiment, seed=experiment.seed + n - 1)


def is_taught(experiment: Experiment, objective: Objective) -> bool:
    """Return whether there is another teacher: neither labels alone, nor an average or snapshot of the student."""
    if experiment.teaches_itself:
        return False
    return objective.needs_teacher or experiment.method_name != "FineTune"
