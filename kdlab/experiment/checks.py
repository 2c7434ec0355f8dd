"""Checks of everything that can be known to be wrong before anything is trained or written."""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdlab.data import DataModule
from kdlab.errors import UserError
from kdlab.experiment import build
from kdlab.experiment.assembly import Assembly, assemble
from kdlab.experiment.compatibility import check_beside, check_source, check_tasks
from kdlab.experiment.reading import check_learns
from kdlab.experiment.schema import Experiment
from kdlab.experiment.teacher import (
    each_member,
    ensemble,
    external_teacher,
    find_pretrained,
    has_weights,
    of_member,
    own_data,
    tasks_of,
)
from kdlab.experiment.teacher_cache import cache_obstacle, written
from kdlab.functional import Batch
from kdlab.losses import Objective
from kdlab.methods import Method
from kdlab.models import StepContext, cost
from kdlab.models.transforms.auxiliary import Auxiliary
from kdlab.models.transforms.steps import apply_steps
from kdlab.tasks import Task
from kdlab.teachers import FrozenTeacher, TasksTeacher, Teacher
from kdlab.training import evaluate

log = logging.getLogger("kdlab")

CHECKPOINT_ROOM = 8
"""Number of copies of the student that a run folder may hold: weights, optimizer states, best, last, one in writing."""


@dataclass(frozen=True)
class Finding:
    """Result of a check: its name, whether it passed, and what was found."""

    name: str
    ok: bool
    text: str


def preflight(config: Mapping[str, Any], deep: bool = False) -> list[Finding]:
    """Assemble one experiment (or one stage of it) and check it; nothing is trained or written.

    Args:
        config: configuration, resolved and plain.
        deep: whether to look further than each run does (a teacher's checkpoint must beat chance, every loader must
            give a batch), and to return what is wrong as the last finding instead of raising it.

    Raises:
        UserError: the first thing that is wrong, unless ``deep``.
    """
    findings: list[Finding] = []
    try:
        experiment = Experiment.of(config)
        check_values(experiment)
        findings.append(Finding("values", True, "in range"))
        findings.extend(Finding(name, True, text) for name, text in check(assemble(experiment), deep))
    except UserError as error:
        if not deep:
            raise
        findings.append(Finding(error.key, False, str(error)))
    return findings


def assemble_checked(experiment: Experiment) -> Assembly:
    """Assemble an experiment that can run.

    Raises:
        UserError: the first thing that is wrong.
    """
    check_values(experiment)
    parts = assemble(experiment)
    list(check(parts))
    return parts


def check_values(experiment: Experiment) -> None:
    """Check the values that need no data to be checked, as constructors do.

    Raises:
        UserError: the first of them.
    """
    build.dry_run(experiment)
    if experiment.self_teacher == "snapshot" and experiment.epochs < 2:
        raise UserError("epochs", experiment.epochs, "at least 2 for snapshots to teach in the last ones")


def check(parts: Assembly, deep: bool = False) -> Iterator[tuple[str, str]]:
    """Check that the parts of an assembly fit together, on copies of what checks would use up.

    Args:
        parts: assembly to check.
        deep: whether to look further, see :func:`preflight`.

    Yields:
        The name of each check, and its result in words.

    Raises:
        UserError: the first thing that is wrong.
    """
    experiment, data, task = parts.experiment, parts.data, parts.task
    objective = copy.deepcopy(parts.objective)
    yield from _check_data(parts, deep)
    check_learns(experiment, objective, data)
    check_tasks(experiment, data)
    student = parts.student()
    yield "student", f"{cost.parameters(student):,} parameters, {task.num_classes} classes"
    teacher = _teacher(experiment, data, objective.vocabulary_agnostic)
    members = _members(experiment, data, task, objective)
    known = None
    if experiment.teacher is not None and experiment.teacher.kind == "cached":
        known = written(experiment, data, objective)
        yield "teacher", known.describe()
    _check_method(parts, any((teacher is not None, members, known is not None)))
    student = _start(parts, student, teacher)
    check_source(parts, teacher)
    auxiliary = parts.auxiliary(student)
    check_beside(experiment, auxiliary, objective)
    yield from _check_together(parts, student, auxiliary, objective, teacher, members, known)
    if deep:
        yield from _deep(experiment, data, task, teacher, members)
    _room(experiment, *filter(None, (student, auxiliary)))
    yield "disk", "enough room"


def _check_data(parts: Assembly, deep: bool) -> Iterator[tuple[str, str]]:
    data = parts.data
    yield "data", f"{data.describe()}; {data.counts['val']} for validation, {data.counts['test']} for the test"
    for note in data.notes:
        yield "data", note
    if data.counts["test"] == 0 and deep:
        raise UserError("data", "the test split is empty", "at least one row")
    data.to("cpu", accumulate=parts.experiment.trainer.get("accumulate") or 1).train_dataloader()


def _check_method(parts: Assembly, taught: bool) -> None:
    """Refuse a method that has no teacher where the loss needs one, or data that it cannot label."""
    experiment, needs = parts.experiment, parts.objective.needs_teacher
    if needs and experiment.self_teacher == "none":
        raise UserError(
            "method.self_teacher",
            "none has no teacher, and the loss has terms that need one",
            "method=offline_kd, or a loss without, such as mutual",
        )
    if needs and experiment.method_name == "FineTune":
        raise UserError(
            "method",
            "FineTune learns from labels alone, and the loss has terms that need a teacher",
            "loss=ce, or method=offline_kd",
        )
    if needs and not (taught or experiment.past_teaches or experiment.previous_teaches):
        raise UserError("teacher", "none, and the loss has terms that need one", "teacher=NAME, or loss=ce")
    if experiment.method_name == "SemiSupervisedKD" and not parts.data.classified:
        raise UserError(
            "method",
            f"SemiSupervisedKD labels rows of their own, and data ({parts.data.name}) is text",
            "method=offline_kd, whose soft targets need no labels (loss.alpha=1)",
        )


def _check_together(
    parts: Assembly,
    student: nn.Module,
    auxiliary: Auxiliary | None,
    objective: Objective,
    teacher: nn.Module | None,
    members: Sequence[nn.Module],
    known: Teacher | None,
) -> Iterator[tuple[str, str]]:
    """Run two rows through all networks that train or teach, together."""
    experiment, data, task = parts.experiment, parts.data, parts.task
    # the student's own past, or the stage before: a network like the student stands in for it
    stands_in = teacher is None and (experiment.past_teaches or experiment.previous_teaches)
    net = parts.student() if stands_in else teacher
    shown: Teacher | None = known if net is None else FrozenTeacher(net, task, objective.teacher_layers)
    if members:
        shown = ensemble(experiment, [FrozenTeacher(one, task) for one in members], data)
    method = parts.method(student, shown, auxiliary, objective)
    if teacher is not None:
        yield "teacher", f"{cost.parameters(teacher):,} parameters, {_origin(experiment)}"
        cache_obstacle(experiment, data, objective)
    if members:
        size = sum(cost.parameters(one) for one in members)
        yield "teacher", f"{len(members)} of {size:,} parameters together, {_origin(experiment)}"
    if members or (net is not None and not experiment.names_previous and not objective.vocabulary_agnostic):
        assert shown is not None
        _probe(method, shown, net, data)
        yield "layers and classes", "teacher and student fit together"
    elif data.classified and not objective.needs_teacher:
        _probe(method, None, None, data)
        if auxiliary is not None:
            yield "auxiliary", f"{cost.parameters(auxiliary):,} parameters beside the student"


def _origin(experiment: Experiment) -> str:
    assert experiment.teacher is not None
    return f"weights of {experiment.teacher.checkpoint}" if experiment.teacher.checkpoint else "to be trained, or known"


def _teacher(experiment: Experiment, data: DataModule, vocabulary_agnostic: bool) -> nn.Module | None:
    wanted = experiment.teacher
    if wanted is None or wanted.net is None or wanted.kind == "several":
        return None
    if has_weights(wanted):
        return external_teacher(experiment, data, vocabulary_agnostic).net
    own = own_data(experiment, "teacher")
    if not vocabulary_agnostic:
        data.check_same_classes(own)
    return build.network(wanted.net, own, wanted.seed, "teacher.net")


def _members(experiment: Experiment, data: DataModule, task: Task, objective: Objective) -> list[nn.Module]:
    """Return the network of each of several teachers; none where there is one teacher, or none at all."""
    wanted = experiment.teacher
    learned = any(getattr(term, "reads_members", False) for term in objective.terms.values())
    if wanted is None or wanted.kind != "several":
        if wanted is not None and wanted.weighting != "mean":
            raise UserError(
                "teacher.weighting", f"{wanted.weighting}, and there is one teacher", "mean, or teacher.members"
            )
        return []
    if wanted.weighting == "learned" and not learned:
        raise UserError(
            "teacher.weighting",
            "learned, and no term of the loss has weights for the members",
            "mean, confidence, or loss=several",
        )
    for name, term in objective.terms.items():
        if layers := getattr(term, "teacher_layers", ()):
            raise UserError(
                f"loss.terms.{name}",
                (f"looks at the teacher's layers ({', '.join(layers)}), and teacher.members are several"),
                "terms on the output, or teacher.members=null",
            )
    if experiment.init in ("teacher", "layer_subset", "teacher_head"):
        raise UserError("init", f"{experiment.init}, and teacher.members are several", "fresh, or one teacher")
    rows = next(iter(data.ordered_loader("train", batch_size=2))).to("cpu")
    wanted_classes = _classes_of_members(experiment, data, task)
    nets = []
    for n, one in enumerate(each_member(experiment)):
        with of_member(n):
            build.dry_run(one)
            cache_obstacle(one, data, objective)
            net = _teacher(one, data, False)
            assert net is not None
            classes = FrozenTeacher(net, task)(rows).logits.shape[-1]
            if classes != wanted_classes[n]:
                raise UserError(
                    "teacher.net", f"{classes} classes, and data has {wanted_classes[n]}", "the same classes"
                )
        nets.append(net)
    return nets


def _classes_of_members(experiment: Experiment, data: DataModule, task: Task) -> list[int]:
    """Return the number of classes that each of several teachers must know: those of its task, or all the same."""
    assert experiment.teacher is not None
    if experiment.teacher.weighting != "tasks":
        return [task.num_classes] * len(each_member(experiment))
    named = tasks_of(experiment)
    if set(named) != set(data.tasks):
        raise UserError(
            "teacher.members",
            f"know {', '.join(named)}, and data.label names {', '.join(data.tasks) or 'no tasks'}",
            "a member for each task",
        )
    return [len(data.tasks[name].class_names) for name in named]


def _start(parts: Assembly, student: nn.Module, teacher: nn.Module | None) -> nn.Module:
    """Apply the steps that need no other fit to the student, and return the network that would train."""
    experiment, data = parts.experiment, parts.data
    pretrained = find_pretrained(experiment, data, parts.trainer, {})
    if pretrained is not None and experiment.pretrained is not None and experiment.pretrained.checkpoint is None:
        own_data(experiment, "pretrained")
    steps = parts.steps(pretrained.steps if pretrained is not None else ())
    trained_later = experiment.init == "previous" or experiment.names_previous
    if trained_later or (experiment.init == "pretrained" and experiment.pretrained.checkpoint is None):  # type: ignore[union-attr]
        steps.pop("init", None)
    context = StepContext(
        teacher=teacher,
        pretrained=pretrained.load if pretrained is not None else None,
        seed=experiment.seed,
        batches=data.train_dataloader,
    )
    student = apply_steps(student, steps, context)
    random = experiment.init in ("fresh", "teacher_head")
    if experiment.adapter is not None and random and not experiment.student.get("name"):
        raise UserError(
            "adapter",
            f"trains beside the student's own weights, which are random with init={experiment.init}",
            "init=pretrained, teacher, layer_subset or previous, a student.name that brings weights, or adapter=none",
        )
    return student


def _probe(method: Method, teacher: Teacher | None, net: nn.Module | None, data: DataModule) -> None:
    """Run two rows through all networks that train or teach, so that a wrong layer, shape or class count shows now."""
    objective = method.objective
    rows: Batch = next(iter(data.ordered_loader("train", batch_size=2))).to("cpu")
    rows.partner = torch.tensor([1, 0])[: len(rows)] if data.classified else None  # a source may give others
    with torch.no_grad():
        teacher_outputs = None if teacher is None else _named("teacher_layer", objective, lambda: teacher(rows))
        student_outputs = _named("student_layer", objective, lambda: method.dry_forward(rows))
        objective.setup(method.student, net, data.counts["train"])
        objective.prepare(student_outputs, teacher_outputs)
        objective(student_outputs, teacher_outputs, rows)


def _named(key: str, objective: Objective, action: Callable[[], Any]) -> Any:
    """Call an action that may miss a layer, and prefix its error with the key of the term that names the layer."""
    try:
        return action()
    except UserError as error:
        if error.key != "layer":
            raise
        layers = {name: getattr(term, f"{key}s") for name, term in objective.terms.items()}
        owner = next((name for name, paths in layers.items() if any(repr(path) in error.found for path in paths)), None)
        raise error.at(f"loss.terms.{owner}.{key}" if owner else key) from None


def _deep(
    experiment: Experiment, data: DataModule, task: Task, teacher: nn.Module | None, members: Sequence[nn.Module] = ()
) -> Iterator[tuple[str, str]]:
    for split in ("train", "val", "test"):
        if data.counts[split] or split != "val":
            loader = getattr(data, f"{split}_dataloader")()
            if not len(loader):
                raise UserError("data", f"the {split} loader is empty", "at least one batch")
    yield "loaders", f"{len(data.train_dataloader())} steps an epoch"
    for n, (one, net) in enumerate(zip(each_member(experiment), members, strict=True)):
        with of_member(n):
            yield from _beats_chance(one, data, task, net)
    yield from _beats_chance(experiment, data, task, teacher)


def _beats_chance(
    experiment: Experiment, data: DataModule, task: Task, teacher: nn.Module | None
) -> Iterator[tuple[str, str]]:
    wanted = experiment.teacher
    if teacher is None or wanted is None or wanted.checkpoint is None:
        return
    split = "val" if data.counts["val"] else "test"
    loader = getattr(data, f"{split}_dataloader")()
    known: Teacher = FrozenTeacher(teacher, task)
    if data.tasks and isinstance(label := wanted.data.get("label"), str):
        known = TasksTeacher({label: known})
    measures = evaluate(task, known, loader, split=split)
    score, chance = measures[task.score], task.chance
    form = ".1%" if task.greater else ".4g"
    text = f"{task.score} {score:{form}} on the {split} split (chance is {chance:{form}})"
    if score < 1.5 * chance if task.greater else 1.5 * score > chance:
        raise UserError(
            "teacher.checkpoint",
            f"{wanted.checkpoint} has {text}",
            (
                "weights for these classes in this order, with their input normalisation "
                "(teacher.net.mean, teacher.net.std) or tokenizer"
            ),
        )
    yield "teacher's score", text


def _room(experiment: Experiment, *nets: nn.Module) -> None:
    folder = Path(experiment.output).absolute()
    while not folder.exists():
        folder = folder.parent
    needed, free = CHECKPOINT_ROOM * sum(map(cost.size_bytes, nets)), shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            "output",
            (f"{folder} has {free / 2**20:.0f} MiB free, and a run writes about {needed / 2**20:.0f} MiB"),
            "a folder with more room",
        )
