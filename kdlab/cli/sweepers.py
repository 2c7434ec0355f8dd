"""Make kdlab's sweepers known to Hydra: ``hydra/sweeper=grid`` (the default) and ``hydra/sweeper=optuna``.

Hydra's own basic sweeper would compose every job once more than needed and leave a file behind; the Optuna
sweeper on the package index asks for an Optuna that is years old.
"""

from __future__ import annotations

import sys
from typing import Any

from hydra._internal import core_plugins
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins

from kdlab.cli.grid_sweeper import GridSweeper
from kdlab.cli.optuna_sweeper import OptunaSweeper

__all__ = ["GridSweeper", "OptunaSweeper", "register"]

SETTINGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "grid": (GridSweeper, {"params": None}),
    "optuna": (OptunaSweeper, {"n_trials": 20, "n_jobs": 1, "seed": 0, "startup": 8, "params": None}),
}
"""Option → the sweeper and what can be set of it."""


def register() -> None:
    """Register both, where Hydra will build them."""
    # Hydra builds a plugin only if its dotted name lies in a package of Hydra's own, registered or not
    home = f"{core_plugins.__name__}.kdlab"
    sys.modules[home] = sys.modules[__name__]
    vars(core_plugins)["kdlab"] = sys.modules[__name__]
    for name, (sweeper, settings) in SETTINGS.items():
        target = f"{home}.{sweeper.__name__}"
        Plugins.instance().class_name_to_class[target] = sweeper
        ConfigStore.instance().store(group="hydra/sweeper", name=name, node={"_target_": target, **settings})
