"""Whether the parts of an experiment belong together: its source of rows, companion, terms and tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from kdlab.config import builder
from kdlab.errors import UserError
from kdlab.experiment import build
from kdlab.experiment.schema import Experiment
from kdlab.experiment.teacher import tokens_of_teacher
from kdlab.losses import Objective
from kdlab.models.transforms.auxiliary import Companion


def previous(experiment: Experiment) -> bool:
    return experiment.teacher is not None and experiment.teacher.previous


def check_tasks(experiment: Experiment, data: Any) -> None:
    """Whether the experiment can have several tasks at once, where the data have."""
    if not getattr(data, "tasks", None):
        return
    several = f"and data.label names several tasks ({', '.join(data.tasks)})"
    if experiment.source is not None:
        raise UserError(f"source: {_name(experiment.source)} makes rows of one task, {several}; accepted: source=none")
    if experiment.companion is not None:
        raise UserError(f"companion: {_name(experiment.companion)}, {several}; accepted: companion=none")
    if experiment.method.get("labels") == "hard":
        raise UserError(f"method.labels: hard, {several}; accepted: soft")
    if threshold := experiment.method.get("threshold"):
        raise UserError(f"method.threshold: {threshold} of one answer, {several}; accepted: 0")
    if experiment.init in ("classifier", "cut"):
        raise UserError(f"init: {experiment.init}, {several}; accepted: fresh, previous, teacher or pretrained")
    weighing = experiment.teacher.weighing if experiment.teacher is not None else "mean"
    if weighing in ("confidence", "learned"):
        raise UserError(f"teacher.weighing: {weighing}, {several}; accepted: mean, or tasks")


def check_source(experiment: Experiment, data: Any, teacher: nn.Module | None, objective: Objective) -> None:
    """Whether rows or sequences can come from where ``source`` says, and with the partners that terms ask for."""
    wanted, source = experiment.source, None
    if wanted is not None:
        takes = builder.parameters(wanted, "source", slot="source")
        if data.gives == "rows" and "vocab_size" in takes:
            raise UserError(f"source: {_name(wanted)}, and data ({data.name}) is no text; accepted: source=none")
        source = build.source(wanted, data)
    _partners(experiment, objective, source)
    if wanted is None or source is None:
        return
    if getattr(source, "reads", "sequences") == "rows":
        _source_of_rows(experiment, source, data, teacher)
        return
    if source.writer == "teacher" and teacher is None and not previous(experiment):
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


def _source_of_rows(experiment: Experiment, source: Any, data: Any, teacher: nn.Module | None) -> None:
    """Whether what changes or makes rows has rows, and the teacher that it asks."""
    assert experiment.source is not None
    name = _name(experiment.source)
    if data.gives != "rows":
        raise UserError(f"source: {name} gives rows, and data ({data.name}) is text; accepted: source=none")
    if (teacher is not None or previous(experiment)) and not experiment.teaches_itself:
        return
    members = getattr(experiment.teacher, "members", None)
    if source.needs_net and members and not experiment.teaches_itself:
        raise UserError(
            f"source: {name} makes rows after one network, and teacher.members are several; accepted: "
            "teacher.members=null, or source=none"
        )
    other = experiment.method.get("source") is not None or members
    if source.needs_net or (source.needs_teacher and not other):
        raise UserError(
            f"source: {name} asks a teacher, and no network teaches; accepted: teacher=NAME, or source=none"
        )


def _partners(experiment: Experiment, objective: Objective, source: Any) -> None:
    """Whether rows have partners where a term compares each with its own."""
    for name, term in objective.terms.items():
        if term.arrange:  # partners that data gives
            continue
        if term.rows == "partnered" and experiment.source is None:
            raise UserError(f"loss.terms.{name}: compares two views of a row; accepted: with source=strong_view")
        if term.rows == "partnered" and not getattr(source, "pairs", True):
            raise UserError(
                f"loss.terms.{name}: compares two views of a row, and source shows one; accepted: source=strong_view"
            )


def check_beside(experiment: Experiment, companion: Companion | None, objective: Objective) -> None:
    """Whether companion, terms and the arrangement of rows belong together."""
    there = "" if companion is None else companion.kind
    for name, term in zip(objective.names, objective.terms.values(), strict=True):
        if term.companion and term.companion != there:
            raise UserError(
                f"companion: {there or 'none'}, and loss.terms.{name} looks at {term.companion}; "
                f"accepted: companion={term.companion}, or another loss"
            )
        arranged = experiment.data.get("arrange")
        if term.arrange and term.arrange != arranged and "arrange" in experiment.data:
            raise UserError(
                f"data.arrange: {arranged or 'null'}, and loss.terms.{name} looks at rows arranged otherwise; "
                f"accepted: data.arrange={term.arrange}, or another loss"
            )
    if there and not any(term.companion == there for term in objective.terms.values()):
        fitting = {"peers": "loss=mutual", "exits": "loss=byot"}.get(there, "a loss with such a term")
        raise UserError(
            f"companion: {there}, and no term of the loss looks at it; accepted: {fitting}, or companion=none"
        )


def _name(mapping: Mapping[str, Any]) -> str:
    return str(mapping.get("_target_", "")).rpartition(".")[2]
