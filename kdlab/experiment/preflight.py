"""Everything that can be known to be wrong before anything is trained or written."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdlab.errors import UserError
from kdlab.experiment import parts
from kdlab.experiment.caching import why_not_cached, written
from kdlab.experiment.schema import Experiment
from kdlab.experiment.teaching import came_with_weights, foreign_teacher, own_data, tokens_of_teacher
from kdlab.functional import Batch
from kdlab.losses import Objective
from kdlab.methods import evaluate
from kdlab.models import load_weights, measure
from kdlab.tasks import Task
from kdlab.teachers import FrozenTeacher

CHECKPOINT_ROOM = 8
"""Sizes of the student that a run folder may take: weights, two optimizer states, best, last, one being written."""


@dataclass(frozen=True)
class Finding:
    """One check: what was looked at, whether it is well, and what was found."""

    name: str
    ok: bool
    text: str


def preflight(config: Mapping[str, Any], deep: bool = False) -> list[Finding]:
    """Check one experiment (or one stage of it); nothing is trained or written.

    Args:
        config: resolved and plain.
        deep: look further than each run does (a teacher's checkpoint must beat chance, every loader must give a
            batch), and return what is wrong as the last finding instead of raising it.

    Raises:
        UserError: the first thing that is wrong, unless ``deep``.
    """
    findings: list[Finding] = []
    try:
        for name, text in _checks(Experiment.of(config), deep):
            findings.append(Finding(name, True, text))
    except UserError as error:
        if not deep:
            raise
        findings.append(Finding(str(error).split(":")[0], False, str(error)))
    return findings


def _checks(experiment: Experiment, deep: bool) -> Iterator[tuple[str, str]]:
    parts.dry_run(experiment)
    if experiment.method.get("source") == "snapshot" and experiment.epochs < 2:
        raise UserError(f"epochs: {experiment.epochs}; accepted: at least 2 for snapshots to teach in the last ones")
    yield "values", "in range"
    data = parts.data(experiment.data, experiment.seed)
    yield "data", f"{data.describe()}; {data.counts['val']} for validation, {data.counts['test']} for the test"
    if data.counts["test"] == 0 and deep:
        raise UserError("data: the test split is empty; accepted: at least one row")
    data.place("cpu", accumulate=experiment.trainer.get("accumulate") or 1).train_dataloader()
    objective = parts.objective(experiment.loss)
    task = parts.task(experiment.task, data)
    student = parts.network(experiment.student, data, experiment.seed, "student")
    yield "student", f"{measure.parameters(student):,} parameters, {task.num_classes} classes"
    teacher = _teacher(experiment, data, objective.any_vocabulary)
    itself = experiment.method.get("source") is not None
    if objective.needs_teacher and experiment.method_name == "FineTune":
        raise UserError(
            "method: FineTune learns from labels alone, and the loss has terms that need a teacher; "
            "accepted: loss=ce, or method=offline_kd"
        )
    known = None
    if experiment.teacher is not None and experiment.teacher.written:
        known = written(experiment, data, objective)
        yield "teacher", known.describe()
    if objective.needs_teacher and teacher is None and not (itself or known is not None or _previous(experiment)):
        raise UserError("teacher: none, and the loss has terms that need one; accepted: teacher=NAME, or loss=ce")
    if experiment.method_name == "SemiSupervisedKD" and data.gives != "rows":
        raise UserError(
            f"method: SemiSupervisedKD labels rows of their own, and data ({data.name}) is text; accepted: "
            "method=offline_kd, whose soft targets need no labels (loss.alpha=1)"
        )
    _start(experiment, data, student, teacher)
    _adapter(experiment, student)
    _source(experiment, data, teacher, objective)
    # the student's own past, or the stage before: a network like the student stands in for it
    stands_in = teacher is None and (itself or _previous(experiment))
    told = parts.network(experiment.student, data, experiment.seed, "student") if stands_in else teacher
    shown = known if told is None else FrozenTeacher(told, task, objective.teacher_layers)
    parts.method(experiment, student, objective, task, shown)
    if teacher is not None:
        yield "teacher", f"{measure.parameters(teacher):,} parameters, {_origin(experiment)}"
        why_not_cached(experiment, data, objective)
    if told is not None and not _previous(experiment) and not objective.any_vocabulary:
        _probe(student, told, objective, task, data)
        yield "layers and classes", "teacher and student fit together"
    if deep:
        yield from _deep(experiment, data, task, teacher)
    _room(experiment, student)
    yield "disk", "enough room"


def _previous(experiment: Experiment) -> bool:
    return experiment.teacher is not None and experiment.teacher.previous


def _origin(experiment: Experiment) -> str:
    assert experiment.teacher is not None
    return f"weights of {experiment.teacher.checkpoint}" if experiment.teacher.checkpoint else "to be trained, or known"


def _teacher(experiment: Experiment, data: Any, any_vocabulary: bool) -> nn.Module | None:
    wanted = experiment.teacher
    if wanted is None or wanted.net is None:
        return None
    if came_with_weights(wanted):
        return foreign_teacher(experiment, data, any_vocabulary)[0]
    own = own_data(experiment, "teacher")
    if not any_vocabulary:
        data.like(own)
    return parts.network(wanted.net, own, wanted.seed, "teacher.net")


def _start(experiment: Experiment, data: Any, student: nn.Module, teacher: nn.Module | None) -> None:
    """Whether the student can start from what ``init`` names."""
    if experiment.init in ("teacher", "cut") and not _previous(experiment):
        parts.start(student, experiment.init, previous=None, teacher=teacher, pretrained=None)
    if experiment.init != "pretrained":
        return
    wanted = experiment.pretrained
    if wanted is None:
        raise UserError("init: pretrained, and the experiment has none; accepted: pretrained=trained, or init=fresh")
    if wanted.checkpoint is not None:
        load_weights(student, wanted.checkpoint, wanted.mapping, key="pretrained.checkpoint", head=False)
    else:
        own_data(experiment, "pretrained")


def _adapter(experiment: Experiment, student: nn.Module) -> None:
    """Whether the adapter has something to adapt."""
    parts.adapted(student, experiment.adapter, experiment.seed)
    if experiment.adapter is not None and experiment.init == "fresh" and not experiment.student.get("name"):
        raise UserError(
            "adapter: trains beside the student's own weights, which are random with init=fresh; accepted: "
            "init=pretrained, teacher, cut or previous, a student.name that brings weights, or adapter=none"
        )


def _source(experiment: Experiment, data: Any, teacher: nn.Module | None, objective: Objective) -> None:
    """Whether sequences can come from where ``source`` says."""
    if experiment.source is None:
        return
    if data.gives == "rows":
        raise UserError(f"source: {_name(experiment.source)}, and data ({data.name}) is no text; accepted: source=none")
    source = parts.source(experiment.source, data)
    if source.writer == "teacher" and teacher is None and not _previous(experiment):
        raise UserError("source: the teacher's text, and there is no teacher; accepted: teacher=NAME, or source=none")
    if source.writer == "teacher" and teacher is not None and objective.any_vocabulary:
        theirs = tokens_of_teacher(experiment).tokenizer
        if theirs.fingerprint != data.tokenizer.fingerprint:
            raise UserError(
                "source: the teacher's text, and it writes tokens of its own; accepted: its text as traces (kdlab "
                "generate, then data=traces), or source=on_policy"
            )
    if experiment.data.get("pack"):
        raise UserError("source: needs a sequence a row, and data.pack joins several; accepted: data.pack=false")


def _name(mapping: Mapping[str, Any]) -> str:
    return str(mapping.get("_target_", "")).rpartition(".")[2]


def _probe(student: nn.Module, teacher: nn.Module, objective: Objective, task: Task, data: Any) -> None:
    """Run two rows through both, so that a wrong layer, shape or class count shows now."""
    rows: Batch = next(iter(data.sequential("train", batch_size=2))).to("cpu")
    with torch.no_grad():
        layers = objective.teacher_layers
        theirs = _named("teacher_layer", objective, lambda: FrozenTeacher(teacher, task, layers)(rows))
        training = student.training
        student.eval()
        ours = _named("student_layer", objective, lambda: task.outputs(student, rows, objective.student_layers))
        student.train(training)
        objective.meet(student, teacher, data.counts["train"])
        objective.prepare(ours, theirs)
        objective(ours, theirs, rows)


def _named(key: str, objective: Objective, action: Callable[[], Any]) -> Any:
    """Do what may miss a layer, and lead the mistake with the key of the term that names it."""
    try:
        return action()
    except UserError as error:
        text = str(error)
        if not text.startswith("layer:"):
            raise
        said = text.split(";")[0]
        owners = [n for n, term in objective.terms.items() if any(repr(x) in said for x in getattr(term, f"{key}s"))]
        raise UserError(f"{f'loss.terms.{owners[0]}.' if owners else ''}{key}{text[5:]}") from None


def _deep(experiment: Experiment, data: Any, task: Task, teacher: nn.Module | None) -> Iterator[tuple[str, str]]:
    for split in ("train", "val", "test"):
        if data.counts[split] or split != "val":
            loader = getattr(data, f"{split}_dataloader")()
            if not len(loader):
                raise UserError(f"data: the {split} loader is empty; accepted: at least one batch")
    yield "loaders", f"{len(data.train_dataloader())} steps an epoch"
    wanted = experiment.teacher
    if teacher is None or wanted is None or wanted.checkpoint is None:
        return
    split = "val" if data.counts["val"] else "test"
    loader = getattr(data, f"{split}_dataloader")()
    teacher.eval()
    found = evaluate(task, lambda batch, _: task.outputs(teacher, batch), loader, split=split)
    score, chance = found[task.score], task.chance
    form = ".1%" if task.greater else ".4g"
    said = f"{task.score} {score:{form}} on the {split} split (chance is {chance:{form}})"
    if score < 1.5 * chance if task.greater else 1.5 * score > chance:
        raise UserError(
            f"teacher.checkpoint: {wanted.checkpoint} has {said}; accepted: weights for these classes in this order, "
            "with their input normalisation (teacher.net.mean, teacher.net.std) or tokenizer"
        )
    yield "teacher's score", said


def _room(experiment: Experiment, student: nn.Module) -> None:
    folder = Path(experiment.output).absolute()
    while not folder.exists():
        folder = folder.parent
    needed, free = CHECKPOINT_ROOM * measure.size_bytes(student), shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"output: {folder} has {free / 2**20:.0f} MiB free, and a run writes about {needed / 2**20:.0f} MiB; "
            "accepted: a folder with more room"
        )
