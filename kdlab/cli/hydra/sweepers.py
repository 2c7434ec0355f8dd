"""Registration of kdlab's sweepers with Hydra: ``hydra/sweeper=grid`` (the default) and ``hydra/sweeper=optuna``.

Hydra's own basic sweeper would compose every job once more than needed and leave a file behind; the Optuna
sweeper on the package index asks for an Optuna that is years old.
"""

from __future__ import annotations

import sys
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from kdlab.cli.hydra.grid_sweeper import GridSweeper
from kdlab.cli.hydra.internals import register_plugin
from kdlab.cli.hydra.optuna_sweeper import OptunaSweeper
from kdlab.errors import UserError

__all__ = ["GridSweeper", "OptunaSweeper", "register"]

SETTINGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "grid": (GridSweeper, {"params": None}),
    "basic": (GridSweeper, {"params": None}),  # what Hydra takes by default
    "optuna": (OptunaSweeper, {"n_trials": 20, "n_jobs": 1, "seed": 0, "startup": 8, "params": None}),
}
"""Option → the sweeper, and its settings with their defaults."""


def register() -> None:
    """Register the sweepers, where Hydra will build them."""
    for name, (sweeper, settings) in SETTINGS.items():
        target = register_plugin(sys.modules[__name__], sweeper)
        ConfigStore.instance().store(group="hydra/sweeper", name=name, node={"_target_": target, **settings})


def check_settings(hydra: DictConfig) -> None:
    """Refuse settings of the sweeper and the launcher that they would stumble over, or not read.

    Args:
        hydra: Hydra's settings, composed.

    Raises:
        UserError: names the setting.
    """
    for part in ("sweeper", "launcher"):
        if not isinstance(hydra[part], DictConfig):
            raise UserError(f"hydra.{part}", f"{hydra[part]!r}", f"an option, such as hydra/{part}={_USUAL[part]}")
    for key, least in (("n_trials", 1), ("n_jobs", 1), ("seed", 0), ("startup", 0)):
        value = hydra.sweeper.get(key, least)
        if not _is_whole(value) or value < least:
            raise UserError(f"hydra.sweeper.{key}", f"{value!r}", f"an integer of at least {least}")
    params = hydra.sweeper.get("params")
    if params is not None and not isinstance(params, DictConfig):
        raise UserError("hydra.sweeper.params", f"{params!r}", "a mapping such as {loss.alpha: '0.1,0.9'}")
    option = str(hydra.runtime.choices.get("hydra/launcher"))
    if option in _READ:
        _check_launcher(hydra.launcher, option)


_USUAL = {"sweeper": "grid", "launcher": "basic"}

_READ = {"basic": (), "joblib": ("n_jobs",)}
"""Launcher → its settings that kdlab reads, which runs the jobs itself."""


def _check_launcher(launcher: DictConfig, option: str) -> None:
    jobs = launcher.get("n_jobs")
    if jobs is not None and (not _is_whole(jobs) or jobs == 0):
        raise UserError(
            "hydra.launcher.n_jobs", f"{jobs!r}", "an integer of at least 1, or below 0: -1 for a job a core"
        )
    default = ConfigStore.instance().load(f"hydra/launcher/{option}.yaml").node
    for key in map(str, launcher):
        value = launcher.get(key)
        if key not in ("_target_", *_READ[option]) and value != default.get(key):
            accepted = ", ".join(_READ[option]) or "none"
            raise UserError(f"hydra.launcher.{key}", f"{value!r}, which kdlab does not read", accepted)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
