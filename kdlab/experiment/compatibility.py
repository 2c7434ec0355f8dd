"""Checks that the parts of an experiment belong together: its batch transform, auxiliary, terms and tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from kdlab.batch_transforms import BatchTransform
from kdlab.config import builder
from kdlab.data import DataModule
from kdlab.errors import UserError
from kdlab.experiment.assembly import Assembly
from kdlab.experiment.schema import Experiment
from kdlab.experiment.teacher import data_in_teacher_tokens
from kdlab.losses import Objective
from kdlab.models.transforms.auxiliary import Auxiliary


def check_tasks(experiment: Experiment, data: DataModule) -> None:
    """Check that the experiment can have several tasks at once, where the data have."""
    if not data.tasks:
        return
    several = f"and data.label names several tasks ({', '.join(data.tasks)})"
    if experiment.batch_transform is not None:
        raise UserError(
            "batch_transform",
            f"{_name(experiment.batch_transform)} makes rows of one task, {several}",
            "batch_transform=none",
        )
    if experiment.auxiliary is not None:
        raise UserError("auxiliary", f"{_name(experiment.auxiliary)}, {several}", "auxiliary=none")
    if experiment.method.get("labels") == "hard":
        raise UserError("method.labels", f"hard, {several}", "soft")
    if threshold := experiment.method.get("threshold"):
        raise UserError("method.threshold", f"{threshold} of one answer, {several}", "0")
    if experiment.init in ("teacher_head", "layer_subset"):
        raise UserError("init", f"{experiment.init}, {several}", "fresh, previous, teacher or pretrained")
    weighting = experiment.teacher.weighting if experiment.teacher is not None else "mean"
    if weighting in ("confidence", "learned"):
        raise UserError("teacher.weighting", f"{weighting}, {several}", "mean, or tasks")


def check_source(parts: Assembly, teacher: nn.Module | None) -> None:
    """Refuse a batch transform that the data, the teacher or the terms of the loss do not go with.

    Raises:
        UserError: naming it, or the term.
    """
    experiment, data, objective = parts.experiment, parts.data, parts.objective
    wanted, source = experiment.batch_transform, None
    if wanted is not None:
        takes = builder.parameters(wanted, "batch_transform", slot="batch_transform")
        if not data.vocab_size and "vocab_size" in takes:
            raise UserError(
                "batch_transform", f"{_name(wanted)}, and data ({data.name}) is no text", "batch_transform=none"
            )
        source = parts.batch_transform
    _partners(experiment, objective, source)
    if wanted is None or source is None:
        return
    if source.target == "class":
        _check_row_transform(experiment, source, data, teacher)
        return
    if source.teacher_writes and teacher is None and not experiment.names_previous:
        raise UserError(
            "batch_transform", "the teacher's text, and there is no teacher", "teacher=NAME, or batch_transform=none"
        )
    if source.teacher_writes and teacher is not None and objective.vocabulary_agnostic:
        tokenizer = data_in_teacher_tokens(experiment).tokenizer
        if tokenizer.fingerprint != data.tokenizer.fingerprint:
            raise UserError(
                "batch_transform",
                "the teacher's text, and it writes tokens of its own",
                "its text as traces (kdlab generate, then data=traces), or batch_transform=on_policy",
            )
    if experiment.data.get("pack"):
        raise UserError("batch_transform", "needs a sequence a row, and data.pack joins several", "data.pack=false")


def _check_row_transform(
    experiment: Experiment, source: BatchTransform, data: DataModule, teacher: nn.Module | None
) -> None:
    """Check that a transform of rows has rows, and the teacher that it needs."""
    assert experiment.batch_transform is not None
    name = _name(experiment.batch_transform)
    if not data.classified:
        raise UserError("batch_transform", f"{name} gives rows, and data ({data.name}) is text", "batch_transform=none")
    if (teacher is not None or experiment.names_previous) and not experiment.teaches_itself:
        return
    members = experiment.teacher is not None and experiment.teacher.kind == "several"
    if source.needs_net and members and not experiment.teaches_itself:
        raise UserError(
            "batch_transform",
            f"{name} makes rows after one network, and teacher.members are several",
            "teacher.members=null, or batch_transform=none",
        )
    other = experiment.self_teacher is not None or members
    if source.needs_net or (source.needs_teacher and not other):
        raise UserError(
            "batch_transform", f"{name} asks a teacher, and no network teaches", "teacher=NAME, or batch_transform=none"
        )


def _partners(experiment: Experiment, objective: Objective, source: BatchTransform | None) -> None:
    """Check that rows have partners where a term compares each with its own."""
    for name, term in objective.terms.items():
        if term.pairing:  # partners that data gives
            continue
        if term.rows == "partnered" and experiment.batch_transform is None:
            raise UserError(f"loss.terms.{name}", "compares two views of a row", "with batch_transform=strong_view")
        if term.rows == "partnered" and source is not None and not source.makes_partners:
            raise UserError(
                f"loss.terms.{name}",
                "compares two views of a row, and batch_transform shows one",
                "batch_transform=strong_view",
            )


def check_beside(experiment: Experiment, auxiliary: Auxiliary | None, objective: Objective) -> None:
    """Check that auxiliary, terms and the arrangement of rows belong together."""
    there = "" if auxiliary is None else auxiliary.kind
    for name, term in zip(objective.names, objective.terms.values(), strict=True):
        if term.auxiliary and term.auxiliary != there:
            raise UserError(
                "auxiliary",
                f"{there or 'none'}, and loss.terms.{name} looks at {term.auxiliary}",
                f"auxiliary={term.auxiliary}, or another loss",
            )
        arranged = experiment.data.get("pairing")
        if term.pairing and term.pairing != arranged and "pairing" in experiment.data:
            raise UserError(
                "data.pairing",
                f"{arranged or 'null'}, and loss.terms.{name} looks at rows arranged otherwise",
                f"data.pairing={term.pairing}, or another loss",
            )
    if there and not any(term.auxiliary == there for term in objective.terms.values()):
        fitting = {"peers": "loss=mutual", "exits": "loss=byot"}.get(there, "a loss with such a term")
        raise UserError("auxiliary", f"{there}, and no term of the loss looks at it", f"{fitting}, or auxiliary=none")


def _name(mapping: Mapping[str, Any]) -> str:
    return str(mapping.get("_target_", "")).rpartition(".")[2]
