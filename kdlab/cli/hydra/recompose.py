"""Configurations of the stages of a run, from its folder: as they are kept there, or composed again safely."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdlab.config import builder
from kdlab.errors import UserError
from kdlab.system import integrity
from kdlab.system.files import Unreadable, read_yaml

Stages = dict[str, Mapping[str, Any]]


def stages_of(run: Path, trust: bool = False) -> Stages | None:
    """Return the composed configuration of each stage of a run.

    Args:
        run: a run folder, of whomever.
        trust: true to accept the user's own modules in it.

    Returns:
        Name → configuration; None where the run has no stages, or nothing says any more what they were.

    Raises:
        UserError: if those that are kept are not as they were written.
    """
    config = _read(run / "config.yaml")
    if not isinstance(config, Mapping) or not isinstance(config.get("stages"), Mapping) or not config["stages"]:
        return None
    kept = run / "stages.yaml"
    return _kept(kept, config) if kept.exists() else _composed(run / "overrides.yaml", config, trust)


def _read(path: Path) -> Any:
    try:
        return read_yaml(path)
    except (OSError, Unreadable):
        return None


def _kept(path: Path, config: Mapping[str, Any]) -> Stages | None:
    """Return the stages that the run wrote, if they belong to this configuration; else None."""
    integrity.check(path)
    record = _read(path)
    if not isinstance(record, Mapping) or record.get("config_hash") != builder.config_hash(config):
        return None
    stages = record.get("stages")
    if not isinstance(stages, Mapping) or list(stages) != list(config["stages"]):
        return None
    return dict(stages) if all(isinstance(one, Mapping) for one in stages.values()) else None


def _composed(path: Path, config: Mapping[str, Any], trust: bool) -> Stages | None:
    """Compose the stages again from what was typed: folders of earlier versions do not keep them.

    Settings of Hydra's are left out, since these say where it finds its code; and of texts with an interpolation
    nothing is composed, since these could read the environment.
    """
    from kdlab.cli.hydra.compose import is_hydras
    from kdlab.cli.hydra.plan import Flags, make_plan
    from kdlab.cli.start import session

    typed = _read(path)
    if not isinstance(typed, list) or not all(isinstance(text, str) and "${" not in text for text in typed):
        return None
    try:
        with session(Flags(), user_modules=trust) as composer:
            texts = [str(one.input_line) for one in composer.parse(typed) if not is_hydras(one)]
            point = make_plan(Flags(tuple(texts)), composer).points[0]
    except UserError:
        return None
    if builder.config_hash(point.config) != builder.config_hash(config):
        return None
    return {name: stage.config for name, stage in point.stages.items()}
