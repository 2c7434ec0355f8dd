"""What Hydra runs: the one experiment of a command, or one job of a sweep."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from kdlab import spec
from kdlab.cli.compose import Composer, Composition, typed
from kdlab.cli.sweep import duration, job_folder, objective, read_result
from kdlab.cli.validate import choices


@dataclass
class Single:
    """Runs an experiment that is composed already; an error is kept, for Hydra would print it its own way."""

    composition: Composition
    composer: Composer
    error: Exception | None = None

    def __call__(self, _: DictConfig) -> None:
        from kdlab import experiment

        found = self.composition
        try:
            experiment.run(
                found.config,
                folder=None,
                overrides=[typed(text) for text in found.overrides],
                stages=found.stages,
                choices=choices(found.overrides, self.composer),
            )
        except Exception as error:
            self.error = error


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
        job = HydraConfig.get()
        texts = list(job.overrides.task)
        config: dict[str, Any] = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)  # type: ignore
        folder = job_folder(self.folder, texts, self.swept, config)
        own = [typed(text) for text in texts]
        line = f"[{job.job.num + 1}/{self.total}] {' '.join(self._differs(own)) or config.get('name')}"
        done = read_result(folder)
        if done.get("status") == "finished" and done.get("config_hash") == spec.config_hash(config):
            print(f"{line}: done already", flush=True)
            return objective(done)
        print(line + self._remaining(), flush=True)
        with spec.trust(user_modules=True):
            return self._run(config, folder, own, texts)

    def _run(
        self, config: dict[str, Any], folder: Path, own: list[str], texts: Sequence[str]
    ) -> float | None:
        from kdlab import experiment
        from kdlab.runs.folder import record_failure

        try:
            result = experiment.run(
                config,
                folder=folder,
                overrides=own,
                stages=self.composer.stages(config, texts),
                choices=choices(texts, self.composer),
            )
            return objective(result)
        except Exception as error:
            record_failure(folder, config, own, error)
            print(f"  failed: {' '.join(f'{type(error).__name__}: {error}'.split())}", flush=True)
            return None

    def _differs(self, own: Sequence[str]) -> list[str]:
        return [text for text in own if text.lstrip("+").split("=")[0] in self.swept]

    def _remaining(self) -> str:
        """An estimate from the jobs of this sweep that are done, wherever they ran."""
        spent = []
        for path in self.folder.glob("*/result.json"):
            try:
                spent.append(float(json.loads(path.read_text())["seconds"]["total"]))
            except (OSError, ValueError, KeyError, TypeError):
                continue
        left = self.total - len(spent)
        if not spent or left < 1:
            return ""
        return f" (about {duration(sum(spent) / len(spent) * left / self.parallel)} left)"
