"""Checks that an experiment learns from something, and that it reads the settings that were typed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from kdlab.data import DataModule
from kdlab.errors import UserError
from kdlab.experiment import build
from kdlab.experiment.schema import Experiment
from kdlab.losses import Objective


def check_learns(experiment: Experiment, objective: Objective, data: DataModule) -> None:
    """Refuse a loss of which no term can ever count.

    Raises:
        UserError: says why each term counts nothing.
    """
    why = {name: _counts_nothing(experiment, objective, term, data) for name, term in objective.terms.items()}
    if all(why.values()):
        reasons = ", ".join(f"{name} {reason}" for name, reason in why.items())
        raise UserError("loss", f"nothing to learn from: {reasons}", "a loss of which some term counts")


def _counts_nothing(experiment: Experiment, objective: Objective, term: Any, data: DataModule) -> str:
    """Return why a term never counts, in words; empty where it does."""
    if not term.weight.range[1]:
        return "has weight 0"
    alpha = objective.alpha if experiment.method_name != "FineTune" else None
    if alpha is not None and term.role == "label" and alpha.range[0] == 1:
        return "weighs 1 - alpha, and alpha is 1"
    if alpha is not None and term.role == "soft" and alpha.range[1] == 0:
        return "weighs alpha, and alpha is 0"
    gets_labels = experiment.method.get("labels") == "hard" or experiment.batch_transform is not None
    if term.rows == "labelled" and not data.counts["labelled"] and not gets_labels:
        return "counts rows with a label, and data have none"
    return ""


class Unread(NamedTuple):
    """Reason why nothing reads a setting, and what is accepted instead."""

    why: str
    accepted: str = "leave it out"


def unread(config: Mapping[str, Any], typed: Collection[str]) -> dict[str, Unread]:
    """Return the settings that the user typed and that nothing reads, with the reason.

    Args:
        config: configuration of an experiment or a stage, resolved and plain.
        typed: dotted keys and groups that the user set.
    """
    experiment = Experiment.of(config)
    objective = build.objective(experiment.loss)
    uses_temperature = any(getattr(module, "shares_temperature", False) for module in objective.modules())
    soft = any(term.role == "soft" for term in objective.terms.values())
    alike = experiment.data.get("views") not in (None, 1) and not experiment.data.get("augment")
    teacher = experiment.teacher
    given = teacher is not None and teacher.checkpoint is not None
    reasons = (
        (
            not uses_temperature,
            ("loss.temperature", "temperature"),
            Unread("no term of the loss softens", "leave it out, or loss=hinton"),
        ),
        (objective.alpha is not None and not soft, ("loss.alpha",), Unread("no term of the loss has soft targets")),
        (
            experiment.pretrained is not None and experiment.init != "pretrained",
            ("pretrained",),
            Unread(f"init is {experiment.init}, and nothing starts from it", "with init=pretrained"),
        ),
        (alike, ("data.views",), Unread("nothing in data.augment draws, and all views of an example are alike")),
        (
            teacher is not None and not given,
            ("teacher.mapping", "teacher.weights"),
            Unread("the teacher is trained here", "with teacher.checkpoint=FILE"),
        ),
        (
            given,
            ("teacher.epochs", "teacher.optimizer", "teacher.scheduler"),
            Unread("the teacher comes from teacher.checkpoint, and is not trained"),
        ),
    )
    return {key: why for unused, keys, why in reasons if unused for key in _among(typed, *keys)}


def _among(typed: Collection[str], *keys: str) -> list[str]:
    """Return the typed keys that are some keys, or inside of them."""
    return sorted(t for t in typed if any(t == key or t.startswith(f"{key}.") for key in keys))
