"""Evaluation of a run's networks: measures on validation and test, size, and speed."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from kdlab.data import DataModule
from kdlab.errors import UserError
from kdlab.experiment import build
from kdlab.experiment.baseline import first_is_baseline, get_or_train_baseline
from kdlab.experiment.error_overlap import Keep, PredictionRecorder
from kdlab.experiment.schema import Experiment
from kdlab.experiment.stage import Stage
from kdlab.experiment.teacher import ResolvedTeacher, TrainedModel, data_in_teacher_tokens, ensemble, find_teacher
from kdlab.experiment.teacher_cache import MEASURED
from kdlab.models import cost
from kdlab.tasks import Task, tokens_per_second
from kdlab.teachers import CachedTeacher, CrossTokenizerTeacher, EnsembleTeacher, FrozenTeacher, TasksTeacher, Teacher
from kdlab.training import TrainerConfig, evaluate

log = logging.getLogger("kdlab")


def measure_all(
    done: Mapping[str, Stage], choices: Mapping[str, str], heard: PredictionRecorder
) -> tuple[dict[str, Any], dict[str, float]]:
    """Measure every network of the run on validation and test; return the measures, and the seconds of each part.

    Args:
        done: stages of the run.
        choices: map of group → chosen option.
        heard: recorder of the predictions of student, teacher and baseline, which counts the errors beside the
            teacher's.
    """
    stages = list(done.values())
    last = stages[-1]
    lesson = last.lesson
    models: dict[str, Any] = {"student": _model(last, last.student, last.fitted.seconds, heard.of("student"))}
    if lesson is not None and lesson.source.members:
        models |= _several(last.data, last.task, last.training, lesson.source, lesson.teacher, heard.of("teacher"))
    elif lesson is not None and lesson.source.net is not None:
        models |= {"teacher": described} if (described := _teacher(last, lesson, heard.of("teacher"))) else {}
    _record_folders(models, lesson)
    seconds = {
        "teacher": lesson.source.spent if lesson else 0.0,
        "cache": sum(stage.lesson.cache_seconds for stage in stages if stage.lesson),
        "student": sum(stage.fitted.seconds for stage in stages),
        "baseline": 0.0,
    }
    first_alone = last.experiment.baseline and first_is_baseline(stages)
    for name, stage in list(done.items())[:-1]:
        # the first of two generations is baseline and teacher at once: its errors beside its own would say nothing
        teaches = lesson is not None and lesson.source.net is stage.student
        keep = heard.of("baseline") if first_alone and stage is stages[0] and not teaches else None
        models[name] = _model(stage, stage.student, stage.fitted.seconds, keep) | {"folder": f"stages/{name}"}
    if last.experiment.self_teacher == "previous" and len(stages) > 1:
        models["ensemble"] = _ensemble(stages)
    if last.experiment.baseline:
        if first_alone:
            models["baseline"] = next(iter(models[name] for name in done))  # it learned from the labels alone
        elif kept := get_or_train_baseline(stages, choices):
            seconds_alone = sum(fit.seconds for fit in kept)
            models["baseline"] = _model(last, kept[-1].net, seconds_alone, heard.of("baseline"))
            models["baseline"]["folder"] = str(kept[-1].folder)
            seconds["baseline"] = sum(fit.seconds for fit in kept if fit.fresh)
    for role, errors in heard.errors().items():
        models[role] = {**models[role], "errors": errors}
    return models, seconds


def _record_folders(models: dict[str, Any], lesson: ResolvedTeacher | None) -> None:
    """Add to the teacher, or to each of several, its folder in the store."""
    if lesson is None:
        return
    for n, one in enumerate(lesson.source.members):
        if one.folder is not None:
            models[f"teacher_{n}"]["folder"] = str(one.folder)
    if lesson.source.folder is not None and "teacher" in models:
        models["teacher"]["folder"] = str(lesson.source.folder)


def _model(stage: Stage, net: nn.Module, seconds: float | None, keep: Keep | None = None) -> dict[str, Any]:
    """Describe one network of a run; agreement is with the stage's teacher."""
    teacher = stage.lesson.teacher if stage.lesson else None
    return describe_network(stage.data, stage.task, stage.training, net, seconds, teacher, keep=keep)


def _teacher(stage: Stage, lesson: ResolvedTeacher, keep: Keep) -> dict[str, Any] | None:
    """Describe the teacher; one with another tokenizer is measured in its own tokens."""
    assert lesson.source.net is not None
    data, task = stage.data, stage.task
    if isinstance(lesson.teacher, CrossTokenizerTeacher):
        try:
            data = data_in_teacher_tokens(stage.experiment)
        except UserError as error:
            log.warning("teacher: not measured in its own tokens, since %s", error)
            return None
        task = build.task(stage.experiment.task, data)
    known = lesson.teacher if isinstance(lesson.teacher, CachedTeacher) else None
    return describe_network(
        data, task, stage.training, lesson.source.net, lesson.source.seconds, known=known, keep=keep
    )


def describe_network(
    data: DataModule,
    task: Task,
    training: TrainerConfig,
    net: nn.Module,
    seconds: float | None,
    told: Teacher | None = None,
    known: Teacher | None = None,
    keep: Keep | None = None,
) -> dict[str, Any]:
    """Return size, speed and measures of one network, on validation and test where there are any.

    Args:
        data: data that it is measured on.
        task: task that says what is measured.
        training: trainer settings, which name the device.
        net: network to describe.
        seconds: number of seconds of its training.
        told: teacher of the network, for the agreement.
        known: teacher that has its answers; None runs the network itself.
        keep: function that receives the measures of each split, as of :func:`~kdlab.training.evaluate`.
    """
    net.cpu().eval()
    example = next(iter(data.ordered_loader("test" if data.counts["test"] else "train", batch_size=1))).to("cpu").inputs
    described = {
        "parameters": cost.parameters(net),
        "bytes": cost.size_bytes(net),
        "flops": cost.flops(net, example),
        "latency_ms": cost.latency_ms(net, example),
        "seconds": seconds,
    }
    if not data.classified:
        described["tokens_per_s"] = tokens_per_second(net, data)
    net.to(training.device)
    by_split = _splits(data, task, training, known or (lambda batch, _: task.outputs(net, batch)), told, keep)
    for split, measures in by_split.items():
        measures.update(task.further(net, data, split, training.device))
    return {**described, **by_split}


def _several(
    data: DataModule,
    task: Task,
    training: TrainerConfig,
    source: TrainedModel,
    teacher: Teacher,
    keep: Keep | None = None,
) -> dict[str, Any]:
    """Describe several teachers together, which answer one after the other, and each of them by itself."""
    each: dict[str, Any] = {}
    for n, one in enumerate(source.members):
        assert one.net is not None
        alone = FrozenTeacher(one.net, task)
        known = TasksTeacher({teacher.tasks[n]: alone}) if isinstance(teacher, TasksTeacher) else None
        each[f"teacher_{n}"] = describe_network(data, task, training, one.net, one.seconds, known=known)
    together = {
        key: None if any(one[key] is None for one in each.values()) else sum(one[key] for one in each.values())
        for key in ("parameters", "bytes", "flops", "latency_ms")
    }
    by_split = _splits(data, task, training, teacher.to(training.device), None, keep)
    return {"teacher": {**together, "seconds": source.seconds, **by_split}, **each}


def _ensemble(stages: Sequence[Stage]) -> dict[str, Any]:
    """Describe the ensemble of all generations: the mean of their probabilities."""
    last = stages[-1]
    members = EnsembleTeacher([FrozenTeacher(stage.student, last.task) for stage in stages])
    teacher = last.lesson.teacher if last.lesson else None
    return {
        "parameters": sum(cost.parameters(stage.student) for stage in stages),
        "bytes": sum(cost.size_bytes(stage.student) for stage in stages),
        "flops": None,
        "latency_ms": None,
        "seconds": sum(stage.fitted.seconds for stage in stages),
        **_splits(last.data, last.task, last.training, members, teacher),
    }


def _splits(
    data: DataModule,
    task: Task,
    training: TrainerConfig,
    answers: Any,
    teacher: Teacher | None,
    keep: Keep | None = None,
) -> dict[str, dict[str, float]]:
    data.to(training.device)
    by_split = {}
    for split in MEASURED:
        if data.counts.get(split):
            loader = getattr(data, f"{split}_dataloader")()
            by_split[split] = evaluate(task, answers, loader, training.device, teacher, split, data.words(split), keep)
    return by_split


def evaluate_teacher(config: Mapping[str, Any]) -> dict[str, Any]:
    """Measure the configured teacher on validation and test, for ``python -m kdlab evaluate``.

    Raises:
        UserError: if there is no teacher, or its checkpoint does not load.
    """
    experiment = Experiment.of(config)
    if experiment.teacher is None or experiment.teacher.kind in ("previous", "cached"):
        raise UserError("teacher", "none", "teacher=NAME, with teacher.checkpoint=FILE to measure a file")
    data = build.data(experiment.data, experiment.seed)
    task, training = build.task(experiment.task, data), build.trainer(experiment.trainer)
    source = find_teacher(experiment, data, training, None, {})
    assert source is not None
    if source.members:
        teacher = ensemble(experiment, [FrozenTeacher(one.net, task) for one in source.members if one.net], data)
        described = _several(data, task, training, source, teacher)["teacher"]
    else:
        assert source.net is not None
        described = describe_network(data, task, training, source.net, source.seconds)
    return {**described, "trained_on": source.trained_on, "counts": data.counts, "notes": list(data.notes)}
