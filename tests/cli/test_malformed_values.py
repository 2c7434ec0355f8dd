"""Malformed values at every key of composed experiments: one line says what is wrong, or they are judged to be fine.

Each key of a config gets each of ``VALUES``; what comes of it is either a :class:`~kdlab.errors.UserError` or
nothing. A sample of all pairs is tried in every run of the tests, a larger one with ``-m slow``.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kdlab import experiment
from kdlab.cli.hydra.compose import Composition, composer
from kdlab.cli.validate import validate
from kdlab.config import builder
from kdlab.errors import UserError

VALUES = [
    None, True, "", "a b='c\"\n\x1b[31m", "auto", "nan", "3", -1, 0, 1, 0.5, 1.0, 1.5, float("nan"), float("inf"),
    -float("inf"), 1e308, 1e-308, 10**6, 10**12, 2**63, 10**30, [], [1, "a", None], {}, {"a": 1},
]  # fmt: skip

EXPERIMENTS = [
    "experiment=kd_mlp",
    "experiment=kd_resnet teacher=mlp student=mlp data.augment=[crop]",
    "experiment=kd_resnet student=resnet8 teacher=resnet8_w4 loss=[hinton,fitnets] temperature=annealed "
    "loss.terms.hint.student_layer=layer1 loss.terms.hint.teacher_layer=layer1",
    "experiment=ema student=mlp",
    "experiment=semi_resnet student=mlp teacher=mlp",
    "experiment=mutual student=mlp",
]

TOO_SLOW = {("data", "n"), ("data", "features"), ("data", "num_classes")}
"""Sizes of made data: a million rows fit into memory, and take a while."""


def places(config: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every value in nested mappings and in mappings inside of lists."""
    items = config.items() if isinstance(config, dict) else enumerate(config)
    for key, value in items:
        if key != "_target_":
            yield (*path, key)
        if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(one, dict) for one in value)):
            yield from places(value, (*path, key))


def put(config: dict[str, Any], path: tuple, value: Any) -> dict[str, Any]:
    """The config with another value at a path."""
    changed = copy.deepcopy(config)
    node: Any = changed
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return changed


def sample(config: dict[str, Any], share: float) -> Iterator[tuple[tuple, Any]]:
    """A share of all pairs of a path and a value, the same in every run."""
    for path in places(config):
        for value in VALUES:
            drawn = hashlib.sha256(repr((path, value)).encode()).digest()[0] / 256
            if drawn < share and not (path in TOO_SLOW and isinstance(value, int) and value > 10**5):
                yield path, value


def said(found: Composition, made: Any, config: dict[str, Any]) -> str | None:
    """The mistake that a config is refused for; None if it is fine. Whatever else is raised is a defect."""
    try:
        validate(replace(found, config=config), made)
        experiment.preflight(config)
    except UserError as error:
        return str(error)
    return None


def try_all(words: str, share: float) -> int:
    refused = 0
    with composer() as made, builder.trust(user_modules=True):
        found = made.compose(words.split())
        assert said(found, made, found.config) is None
        for path, value in sample(found.config, share):
            try:
                text = said(found, made, put(found.config, path, value))
            except Exception as error:
                raise AssertionError(f"{'.'.join(map(str, path))} = {value!r}: {error!r}") from error
            if text is not None:
                refused += 1
                assert "\n" not in text and "\x1b" not in text and len(text) < 4000, text
    return refused


@pytest.mark.parametrize("words", EXPERIMENTS)
def test_a_sample_of_malformed_values(words, place):
    before = set(Path(place).iterdir())
    assert try_all(words, 0.02) > 5
    assert set(Path(place).iterdir()) == before


@pytest.mark.slow
@pytest.mark.parametrize("words", EXPERIMENTS)
def test_malformed_values_of_all_kinds(words, place):
    before = set(Path(place).iterdir())
    assert try_all(words, 1.0) > 100
    assert set(Path(place).iterdir()) == before
