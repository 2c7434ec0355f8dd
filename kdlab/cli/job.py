"""What Hydra runs: the one experiment of a command, or one job of a sweep."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from kdlab import spec
from kdlab.cli.compose import Composer, Composition, as_typed, composition
from kdlab.cli.sweep import job_folder, objective, read_result, remaining
from kdlab.runs.folder import record_failure


@dataclass
class Single:
    """Runs an experiment that is composed already; an error is kept, for Hydra would print it its own way."""

    composition: Composition
    composer: Composer
    error: Exception | None = None

    def __call__(self, _: DictConfig) -> None:
        try:
            run(self.composition, self.composer, None)
        except Exception as error:
            self.error = error


def run(found: Composition, composer: Composer, folder: Path | None) -> dict[str, Any]:
    """Hand a composed experiment over to the code that runs it; returns its result."""
    from kdlab import experiment

    return experiment.run(
        found.config,
        folder=folder,
        overrides=as_typed(found.overrides),
        stages={name: stage.config for name, stage in found.stages.items()},
        choices=found.choices(composer.options.groups),
    )


@dataclass(frozen=True)
class Job:
    """Runs one job of a sweep, maybe in another process: skips what is done, records what fails, and returns.

    Returns what a search maximises: the student's accuracy on validation data, or None.
    """

    folder: Path
    """Of the sweep."""
    composer: Composer
    swept: tuple[str, ...]
    """The keys that differ between jobs."""
    total: int
    parallel: int = 1

    def __call__(self, tree: DictConfig) -> float | None:
        job: Any = HydraConfig.get()
        texts = list(job.overrides.task)
        found = composition(tree, texts, job)
        folder = job_folder(self.folder, texts, self.swept, found.config)
        words = [text for text in as_typed(texts) if text.split("=")[0] in self.swept]
        place = f"[{job.job.num + 1}/{self.total}]"
        line = " ".join([place, *(words or [str(found.config.get("name"))])])
        done = read_result(folder)
        if done.get("status") == "finished" and done.get("config_hash") == spec.config_hash(found.config):
            _say(f"{line}: done already")
            return objective(done)
        rest = remaining(self.folder, self.total, self.parallel)
        _say(f"{line} ({rest})" if rest else line)
        with spec.trust(user_modules=True):
            try:
                return objective(run(self.composer.with_stages(found), self.composer, folder))
            except Exception as error:
                record_failure(folder, found.config, as_typed(texts), error)
                _say(f"{place} failed: {type(error).__name__}: {error}")
                return None


def _say(text: str) -> None:
    """One line in one write: jobs of other processes write here too."""
    sys.stdout.write(" ".join(text.split()) + "\n")
    sys.stdout.flush()
