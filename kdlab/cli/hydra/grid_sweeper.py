"""Sweeper over every combination of the swept values: what ``-m`` uses unless told to search."""

from __future__ import annotations

import itertools
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class LaunchingSweeper(Sweeper):
    """Base class of the sweepers, with a launcher and a parser of overrides.

    Args:
        params: further swept overrides, ``{key: "1,2,4"}``, as an option's file may hold them.
    """

    hydra_context: HydraContext
    config: DictConfig
    task_function: TaskFunction
    launcher: Launcher

    def __init__(self, params: dict[str, str] | None = None) -> None:
        self.params = dict(params or {})

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what Hydra hands over."""
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config
        own = getattr(task_function, "launcher", None)
        if own is not None:
            self.launcher = own
            own.setup(hydra_context=hydra_context, task_function=task_function, config=config)
            return
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def open(self) -> None:
        """Check the sweep where its jobs run, before anything is written or asked for."""
        from kdlab.cli.hydra.launcher import PoolLauncher

        if isinstance(self.launcher, PoolLauncher):
            self.launcher.open()

    def launch(self, jobs: list[list[str]], first: int) -> list[JobReturn]:
        """Run jobs, ``first`` the number of the first; one that crashes is recorded, and the others go on."""
        from kdlab.cli.hydra.launcher import PoolLauncher, apart_from_each_other, failed
        from kdlab.cli.hydra.workers import Outcome

        if isinstance(self.launcher, PoolLauncher):
            return list(self.launcher.launch(jobs, first))
        with apart_from_each_other():
            ended: list[Any] = list(self.launcher.launch(jobs, first))
        for n, job in enumerate(ended):
            if isinstance(job, Outcome):
                ended[n] = failed(self, first + n, jobs[n], job)
        return ended

    def parse(self, arguments: list[str]) -> list[Override]:
        """Parse the overrides of the command line, on top of ``params``."""
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        return parser.parse_overrides([*(f"{k}={v}" for k, v in self.params.items()), *arguments])


class GridSweeper(LaunchingSweeper):
    """Sweeper that runs every combination, in the order in which the values were written."""

    def sweep(self, arguments: list[str]) -> Any:
        """Launch every combination."""
        self.open()
        return self.launch(grid(self.parse(arguments)), 0)


def grid(parsed: list[Override]) -> list[list[str]]:
    """Return the overrides of every combination; where a key is given twice, the last counts."""
    values: dict[str, list[str]] = {}
    for override in parsed:
        key = override.get_key_element()
        swept = override.is_sweep_override()
        values[key] = [f"{key}={v}" for v in override.sweep_string_iterator()] if swept else [str(override.input_line)]
    return [list(point) for point in itertools.product(*values.values())]
