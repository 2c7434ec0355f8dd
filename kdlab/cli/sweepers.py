"""The sweepers: every combination (``grid``), and Optuna's search (``optuna``).

Hydra's own basic sweeper would compose every job once more than needed and leave a file behind; the Optuna
sweeper on the package index asks for an Optuna that is years old.
"""

from __future__ import annotations

from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins

from kdlab.cli.optuna_sweeper import OptunaSweeper


class GridSweeper(BasicSweeper):
    """Runs every combination of the swept values, in the order in which they were written."""

    def sweep(self, arguments: list[str]) -> Any:
        assert self.hydra_context is not None and self.launcher is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        parsed = parser.parse_overrides([*self._parse_config(), *arguments])
        return [
            self.launcher.launch(batch, initial_job_idx=0)
            for batch in self.split_arguments(parsed, max_batch_size=None)
        ]


def register() -> None:
    """Make both known to Hydra as ``hydra/sweeper=grid`` and ``hydra/sweeper=optuna``."""
    store = ConfigStore.instance()
    for name, sweeper, node in (
        ("grid", GridSweeper, {"max_batch_size": None, "params": None}),
        ("optuna", OptunaSweeper, {"n_trials": 20, "n_jobs": 1, "seed": 0, "startup": 8, "params": None}),
    ):
        # Hydra builds plugins only from its own namespace, registered or not
        sweeper.__module__ = "hydra_plugins.kdlab"
        Plugins.instance().register(sweeper)
        target = f"{sweeper.__module__}.{sweeper.__name__}"
        store.store(group="hydra/sweeper", name=name, node={"_target_": target, **node}, provider="kdlab")
