"""Baseline of a run: the same student by the same steps, without its teacher."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from kdlab.data import DataModule
from kdlab.experiment import build
from kdlab.experiment.continuing import LAST, MAY_DIFFER, before
from kdlab.experiment.model_store import LABELS, STORES, Recipe, StoredModel, get_or_train
from kdlab.experiment.schema import Experiment
from kdlab.experiment.stage import Stage
from kdlab.models import weights_hash
from kdlab.runs import folder as folders

log = logging.getLogger("kdlab")


def first_is_baseline(stages: Sequence[Stage]) -> bool:
    """Return whether the first stage can serve as the baseline: untaught, with the same budget as the last stage."""
    first, last = stages[0].experiment, stages[-1].experiment
    if len(stages) == 1 or stages[0].lesson is not None or last.init != "fresh":
        return False
    if first.teaches_itself or first.auxiliary is not None:
        return False
    keys = ("student", "data", "epochs", "optimizer", "scheduler")
    return all(getattr(first, key) == getattr(last, key) for key in keys)


def get_or_train_baseline(stages: Sequence[Stage], choices: Mapping[str, str]) -> list[StoredModel]:
    """Train the student of a run by the same steps on labels alone, or load it; each fit is kept in the store.

    Where there is a teacher, it starts from what the student started from (every stage alike), and has its adapters;
    where that was its teacher's classifier alone, it starts from random weights, and trains all of them. A student
    without a teacher is compared with the same one from random weights. Stages that go on from each other and differ in
    nothing but their teacher are one fit of as many epochs.

    Returns:
        The fits, the last of which holds the baseline; none where no row has a label, or it would be the run itself.
    """
    taught = any(stage.lesson is not None for stage in stages)
    first = stages[0].experiment
    if not taught and first.init == "fresh" and all(_labels_alone(stage.experiment) for stage in stages):
        return []
    recipes = [without_teacher(stage.experiment, stage.data) for stage in stages]
    if None in recipes:
        log.info("baseline: none, since no row has a label")
        return []
    kept: list[StoredModel] = []
    name = choices.get("student", "student")
    for fit in _fits(stages, [recipe for recipe in recipes if recipe is not None]):
        stage, recipe = fit.stage, fit.recipe
        before = kept[-1] if kept and stage.experiment.init == "previous" else None
        given = before.net.state_dict() if before else stage.started_with if taught else None
        repeats = before.steps if before else stage.repeats
        if given is not None:
            recipe = replace(recipe, begin=f"from {weights_hash(given)}", repeats=repeats)
        elif not taught:  # an adapter beside random weights would be no student to compare with
            recipe = replace(recipe, adapter=None)

        def begin(net: nn.Module, given: Mapping[str, Any] | None = given) -> None:
            if given is not None:
                net.load_state_dict(given)

        output, logger = Path(stage.experiment.output), stage.experiment.logger
        recipe, shorter = _going_on(recipe, stage.experiment, stage.data, name)
        kept.append(
            get_or_train("baseline", recipe, output, stage.training, name, logger, begin=begin, shorter=shorter)
        )
    return kept


def _going_on(recipe: Recipe, experiment: Experiment, data: DataModule, name: str) -> tuple[Recipe, Path | None]:
    """Return the recipe of a baseline trained in the same parts as its student, and the folder of its first part."""
    old = before(experiment)
    if old is None:
        return recipe, None
    own = {key: getattr(old, key) for key in MAY_DIFFER}
    earlier, _ = _going_on(replace(recipe, **own), old, data, name)
    key = earlier.key(data.fingerprint)
    folder = Path(old.output) / STORES["baseline"] / f"{name}-{key}"
    if folders.read_result(folder) is None or not (folder / LAST).is_file():
        log.info("baseline: trained in one go, since that of the run before (%s) is not there", folder)
        return recipe, None
    return replace(recipe, begin=f"{recipe.begin} after {key}".strip()), folder


@dataclass
class _Fit:
    """Fit of a baseline: the stage it stands for, its recipe, and the number of steps of that stage."""

    stage: Stage
    recipe: Recipe
    steps: int


def _fits(stages: Sequence[Stage], recipes: Sequence[Recipe]) -> list[_Fit]:
    """Return the fits of a baseline, from the last fresh start on; the first takes the steps of all before it."""
    fits: list[_Fit] = []
    for stage, recipe in zip(stages, recipes, strict=True):
        goes_on = bool(fits) and stage.experiment.init == "previous"
        if goes_on and replace(recipe, epochs=0, seed=0) == replace(fits[-1].recipe, epochs=0, seed=0):
            last = fits[-1]
            last.recipe = replace(last.recipe, epochs=last.recipe.epochs + recipe.epochs)
            last.steps += stage.fitted.steps
        else:
            fits.append(_Fit(stage, recipe, stage.fitted.steps))
    start = max(i for i, fit in enumerate(fits) if i == 0 or fit.stage.experiment.init != "previous")
    first, spent = fits[start], sum(fit.steps for fit in fits[:start])
    per_epoch = first.stage.fitted.steps / first.stage.fitted.epochs
    first.recipe = replace(first.recipe, epochs=first.recipe.epochs + round(spent / per_epoch))
    return fits[start:]


def _labels_alone(experiment: Experiment) -> bool:
    """Return whether a fit without a teacher learns from nothing but the labels of the data's own rows."""
    if experiment.method_name != "FineTune" or experiment.batch_transform is not None:
        return False
    return all(term.role == "label" for term in build.objective(experiment.loss).terms.values())


def without_teacher(experiment: Experiment, data: DataModule) -> Recipe | None:
    """Return the recipe of one fit without its teacher: the same student, data, seed and steps, and the labels.

    It has no auxiliary, and takes rows as they come. Where only some rows have labels, its batches hold labelled rows
    only. None where none has.
    """
    if data.counts["labelled"] == 0:
        return None
    config = dict(experiment.data)
    if data.counts["labelled"] < data.counts["train"] and "unlabelled_ratio" in config:
        config["unlabelled_ratio"] = 0
    if "pairing" in config:
        config["pairing"] = None
    return Recipe(
        experiment.task,
        experiment.student,
        config,
        experiment.epochs,
        experiment.seed,
        experiment.optimizer,
        experiment.scheduler,
        experiment.trainer,
        _label_terms(experiment),
        experiment.adapter,
        experiment.steps or (),
    )


def _label_terms(experiment: Experiment) -> dict[str, Any]:
    """Return the label terms of the experiment's loss, such as label smoothing; schedules of alpha are left out.

    Where it has none, or only at weight 0, these are the terms by which teachers learn.
    """
    terms: dict[str, Any] = dict(build.objective(experiment.loss).terms.items())
    own = [name for name, term in terms.items() if term.role == "label" and not term.auxiliary and term.weight.range[1]]
    return {name: experiment.loss["terms"][name] for name in own} or dict(LABELS)
