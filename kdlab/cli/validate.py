"""Checks of a composed config: against signatures, and against rules that no signature can say."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from omegaconf import OmegaConf

from kdlab.cli.hydra.compose import Composer, Composition
from kdlab.config import builder
from kdlab.errors import UserError
from kdlab.experiment.schema import ROOT, TEACHER, merge_members
from kdlab.runs import loggers
from kdlab.system.names import check_names, check_output


def validate(composition: Composition, composer: Composer) -> None:
    """Check a config and its stages.

    Raises:
        UserError: the first mistake, with its dotted key.
    """
    _check_experiment(composition, composer)
    _check(composition.config)
    _check_terms(composition, composer)
    for name, stage in composition.stages.items():
        try:
            validate(stage, composer)
        except UserError as error:
            raise UserError(f"stages.{name}", str(error)) from None


def _check(config: Mapping[str, Any]) -> None:
    builder.check(config, target=ROOT)
    for name, parameter in builder.signature(ROOT).parameters.items():
        if parameter.required and config.get(name) is None:
            raise UserError(name, "missing", f"{name}=OPTION")
        _check_is_part(config.get(name), name, {"stages", "continued_from", "teacher", "pretrained"})
    _check_is_part((config.get("auxiliary") or {}).get("net"), "auxiliary.net", ())
    for owner in ("teacher", "pretrained"):
        for name, value in (config.get(owner) or {}).items():
            if value or name == "net":  # a stage before that teaches has an empty recipe
                _check_is_part(value, f"{owner}.{name}", {f"{owner}.data", f"{owner}.mapping"})
    output = check_output(config.get("output"))
    check_names("name", config["name"], f"the name of a folder inside {output}")
    logger = str((config.get("logger") or {}).get("_target_"))
    if logger.startswith(f"{loggers.__name__}."):
        loggers.require(logger.rpartition(".")[2])
    data = config.get("data") or {}
    for owner in ("teacher", "pretrained"):
        overlay = (config.get(owner) or {}).get("data") if isinstance(config.get(owner), Mapping) else None
        if overlay:
            builder.check({**data, **overlay}, f"{owner}.data", slot="data")
    _check_members(config.get("teacher"), data)


def _check_is_part(value: Any, key: str, plain: Collection[str]) -> None:
    """Check that a mapping in the place of a part says what is to be built."""
    if isinstance(value, Mapping) and key not in plain and not isinstance(value.get("_target_"), str):
        raise UserError(key, f"{json.dumps(value, default=str)}", f"{key}=OPTION, or a mapping with _target_")


def _check_members(teacher: Any, data: Mapping[str, Any]) -> None:
    """Check each of several teachers as a single one is checked."""
    if not isinstance(teacher, Mapping) or teacher.get("members") is None:
        return
    for n, member in enumerate(merge_members(teacher)):
        builder.check(member, f"teacher.members[{n}]", target=TEACHER)
        if member.get("data"):
            builder.check({**data, **member["data"]}, f"teacher.members[{n}].data", slot="data")


def _check_experiment(composition: Composition, composer: Composer) -> None:
    """Refuse an experiment's file without its ``@package`` line, whose keys would be below one of its own."""
    if not isinstance(composition.config.get("experiment"), Mapping):
        return
    for name in composition.chosen("experiment"):
        path = composer.options.file("experiment", name)
        if path and "@package _global_" not in path.read_text(encoding="utf-8", errors="replace"):
            raise UserError("experiment", f"{path} does not start with '# @package _global_'")


def _check_terms(composition: Composition, composer: Composer) -> None:
    """Refuse two loss recipes that fill the same term: the last would silently win."""
    recipes = composition.chosen("loss")
    if len(recipes) < 2:
        return
    owner: dict[str, str] = {}
    for recipe in recipes:
        if recipes.count(recipe) > 1:
            raise UserError("loss", f"{recipe!r} is chosen twice", "each recipe once")
        for term in _terms(recipe, composer):
            if term in owner:
                raise UserError("loss", f"{owner[term]!r} and {recipe!r} both fill loss.terms.{term}", "one of them")
            owner[term] = recipe


def _terms(recipe: str, composer: Composer) -> list[str]:
    path = composer.options.file("loss", recipe)
    if path is None:
        return []
    raw = OmegaConf.to_container(OmegaConf.load(path))
    return list((raw.get("terms") or {}) if isinstance(raw, dict) else {})
