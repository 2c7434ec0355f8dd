"""Plan of what a command would run: every point of a sweep and every stage, composed and validated."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from kdlab.cli.hydra import hydra_node
from kdlab.cli.hydra.compose import Composer, Composition, as_typed
from kdlab.cli.hydra.grid_sweeper import grid
from kdlab.cli.hydra.sweepers import check_settings
from kdlab.cli.validate import validate
from kdlab.config.override_text import argument
from kdlab.errors import UserError

QUIET = {
    "hydra.run.dir": ".",
    "hydra.sweep.subdir": ".",
    "hydra.output_subdir": "null",
    "hydra/job_logging": "none",
    "hydra/hydra_logging": "none",
}
"""Overrides that keep Hydra from writing and printing: run folders, logs and tables are kdlab's."""

OF_SWEEPS = ("hydra/sweeper", "hydra/launcher", "hydra.sweeper", "hydra.launcher")
"""Beginnings of the keys of sweeps' settings."""
OURS = (*QUIET, hydra_node.SWEEP_DIR)
"""Settings that kdlab reads as the user has them, and sets otherwise for Hydra itself."""


@dataclass(frozen=True)
class Flags:
    """Flags of the command line, and its overrides."""

    overrides: tuple[str, ...] = ()
    multirun: bool = False
    cfg: str | None = None
    resolve: bool = False
    package: str | None = None
    info: str | None = None
    config_dir: Path | None = None
    run: bool = False


@dataclass
class Plan:
    """Command, composed and validated."""

    composer: Composer
    texts: list[str]
    """Overrides as Hydra takes them, sweeps unexpanded."""
    points: list[Composition]
    """Points that would run: the one, all of a grid, or the ends of what a search draws from."""
    swept: tuple[str, ...] = ()
    searched: bool = False
    """Whether the points are only the ends of a search."""
    multirun: bool = False
    """Whether the command is a sweep, if only of one job."""
    folder: Path | None = None
    """The folder of the run or the sweep that the user named; None for one that kdlab names."""

    @property
    def jobs(self) -> int:
        """Number of runs that the command means."""
        return int(self.hydra.sweeper.n_trials) if self.searched else len(self.points)

    @property
    def hydra(self) -> DictConfig:
        """Hydra's own settings."""
        return self.points[0].hydra


def make_plan(flags: Flags, composer: Composer) -> Plan:
    """Compose and validate all that a command asks for; writes nothing and imports no torch.

    Raises:
        UserError: the first mistake in any point or stage.
    """
    parsed = composer.parse(flags.overrides)
    typed = {override.key_or_group for override in parsed}
    plain = composer.compose([str(o.input_line) for o in parsed if not o.is_sweep_override()])
    if hydra_node.is_multirun(plain) and flags.run:
        raise UserError("--run", "and hydra.mode is MULTIRUN", "one of them")
    multirun = flags.multirun or hydra_node.is_multirun(plain)
    hydra_node.check(plain, typed, multirun)
    if multirun:
        plan = _plan_sweep(composer, parsed, plain)
    else:
        refuse_sweeps(parsed)
        plan = Plan(composer, [str(o.input_line) for o in parsed], [plain])
        _refuse_unused(override.get_key_element() for override in parsed)
    for point in plan.points:
        validate(point, composer)
    _choose_folder(plan, typed)
    return plan


def _choose_folder(plan: Plan, typed: set[str]) -> None:
    """Note the folder that the user named, and check it before anything is built."""
    config = plan.points[0].config
    if plan.multirun:
        plan.folder = hydra_node.sweep_folder(plan.points, typed)
        if plan.folder is not None:
            from kdlab.cli.hydra.sweep import check_sweep_folder

            check_sweep_folder(plan.folder, as_typed(plan.texts))
        return
    plan.folder = hydra_node.run_folder(plan.points[0], typed)
    if plan.folder is not None and config.get("resume") in (None, "auto"):  # another run is looked at by the run
        from kdlab.runs import chosen_folder  # slower than most mistakes take to be found

        chosen_folder.check(plan.folder, config)


def refuse_sweeps(parsed: Iterable[Override]) -> None:
    """Refuse several values for a key where one run is meant.

    Raises:
        UserError: names the key and its values.
    """
    for override in parsed:
        if override.is_sweep_override():
            key, value = override.get_key_element(), override.get_value_string()
            # a comma may belong to the name of a file
            file = re.search(r"\.[A-Za-z]\w*$", value) and not re.search(r"[\'\"(\[{]", value)
            named = f", or {argument(key, value)} for one name with a comma" if file else ""
            raise UserError(
                key,
                f"{value!r} is several values",
                f"one value, a list [a,b], or -m before it to sweep over them{named}",
            )


def _refuse_unused(given: Iterable[str]) -> None:
    """Refuse settings of sweeps where one run is meant."""
    for key in given:
        if key.lstrip("+~").startswith(OF_SWEEPS):
            raise UserError(key, "a setting of sweeps, and this is one run", "with -m before it")


def _plan_sweep(composer: Composer, parsed: list[Override], params: Composition) -> Plan:
    """Plan every point of a sweep; params that a file sweeps over (``hydra.sweeper.params``) are included.

    Args:
        composer: composer of the points.
        parsed: all overrides.
        params: composition of those overrides that are no sweeps.
    """
    texts = [str(override.input_line) for override in parsed]
    check_settings(params.hydra)
    own = OmegaConf.to_container(params.hydra.sweeper).get("params") or {}  # type: ignore[union-attr]
    given = {o.get_key_element() for o in parsed}
    parsed = [*composer.parse(f"{k}={v}" for k, v in own.items() if k not in given), *parsed]
    searched = "optuna" in str(params.hydra.runtime.choices.get("hydra/sweeper"))
    if searched and importlib.util.find_spec("optuna") is None:
        raise UserError("hydra/sweeper", "'optuna' needs a package that is not installed: pip install optuna")
    swept = tuple(o.get_key_element().lstrip("+") for o in parsed if o.is_sweep_override())
    points = _ends(parsed) if searched else _grid(parsed)
    plan = Plan(composer, texts, [composer.compose(p) for p in points], swept, searched, multirun=True)
    if any(point.config.get("resume") not in (None, "auto") for point in plan.points):
        raise UserError("resume", "a sweep goes on by itself", "leave it out")
    return plan


def _grid(parsed: list[Override]) -> list[list[str]]:
    for override in parsed:
        if override.is_interval_sweep():
            raise UserError(
                override.get_key_element(),
                f"{override.get_value_string()!r}",
                "choices a,b or range(low,high); an interval needs hydra/sweeper=optuna",
            )
        if override.is_hydra_override() and override.is_sweep_override():
            raise UserError(override.get_key_element(), "cannot be swept", "one value")
    return grid(parsed)


def _ends(parsed: list[Override]) -> list[list[str]]:
    """Return the points of a search to check: each value that it may draw once, intervals at both ends and inside."""
    from kdlab.cli.hydra.optuna_sweeper import samples

    draws = []
    for override in parsed:
        key = override.get_key_element()
        if override.is_interval_sweep():
            draws.append([f"{key}={value}" for value in samples(override)])
        elif override.is_sweep_override():
            draws.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        else:
            draws.append([str(override.input_line)])
    return [[values[min(i, len(values) - 1)] for values in draws] for i in range(max(map(len, draws), default=1))]


def distinct(points: Iterable[Composition]) -> Iterator[dict[str, Any]]:
    """Yield every config and stage that differs in more than its seed."""
    seen = set()
    for point in points:
        for config in [stage.config for stage in point.stages.values()] or [point.config]:
            key = json.dumps({**config, "seed": None, "stages": None}, sort_keys=True, default=str)
            if key not in seen:
                seen.add(key)
                yield config
