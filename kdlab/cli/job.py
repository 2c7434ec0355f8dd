"""What Hydra runs: the one experiment of a command, or one job of a sweep."""

from __future__ import annotations

import os
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from kdlab import spec
from kdlab.cli.compose import Composer, Composition, as_typed, composition
from kdlab.cli.sweep import job_folder, objective, read_any, remaining
from kdlab.errors import Busy
from kdlab.runs.folder import record_failure, tidy


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

    Returns what a search makes better: the student's score on validation data, or None.
    """

    folder: Path
    """Of the sweep."""
    composer: Composer
    swept: tuple[str, ...]
    """The keys that differ between jobs."""
    total: int
    parallel: int = 1
    main_pid: int = field(default_factory=os.getpid)
    """The process of the command, on whatever machine that is."""

    def __call__(self, tree: DictConfig) -> float | None:
        job: Any = HydraConfig.get()
        if "joblib" in str(job.launcher.get("_target_")) and os.getpid() != self.main_pid:
            follow(self.main_pid)
        texts = list(job.overrides.task)
        found = composition(tree, texts, job)
        folder = job_folder(self.folder, texts, self.swept, found.config)
        words = [text for text in as_typed(texts) if text.split("=")[0] in self.swept]
        line = " ".join([f"[{job.job.num + 1}/{self.total}]", *(words or [str(found.config.get("name"))])])
        rest = remaining(self.folder, self.total, self.parallel)
        settled = settle(found, self.composer, folder, f"{line} ({rest})" if rest else line)
        return None if settled is None else objective(settled)


def settle(found: Composition, composer: Composer, folder: Path, line: str) -> dict[str, Any] | None:
    """Run one of several runs, unless it is done: a failure is recorded, and one line said.

    Args:
        found: the run, its stages not yet composed.
        composer: composes them.
        folder: of the run.
        line: says which it is.

    Returns:
        Its result; None if it failed, or is another process's.
    """
    done = read_any(folder)
    if done.get("status") == "finished" and done.get("config_hash") == spec.config_hash(found.config):
        tidy(folder)
        _say(f"{line}: done already")
        return done
    _say(line)
    with spec.trust(user_modules=True):
        try:
            return run(composer.with_stages(found), composer, folder)
        except Busy:
            _say("  running in another process; left to it")
        except Exception as error:
            record_failure(folder, found.config, as_typed(found.overrides), error)
            _say(f"{line} failed: {type(error).__name__}: {error}")
    return None


_FOLLOWED = set[int]()


def follow(pid: int) -> None:
    """End this process once process ``pid`` of this machine is gone: a killed sweep leaves no orphans."""
    if os.name != "posix" or pid in _FOLLOWED:  # elsewhere, signal 0 is no question
        return
    _FOLLOWED.add(pid)
    threading.Thread(target=_wait_for_end, args=(pid,), name="kdlab-follow", daemon=True).start()


def _wait_for_end(pid: int) -> None:
    while True:
        try:
            os.kill(pid, 0)
        except OSError:  # gone, or its number is somebody else's by now
            os._exit(1)
        time.sleep(1)


def _say(text: str) -> None:
    """One line in one write: jobs of other processes write here too."""
    indent = text[: len(text) - len(text.lstrip())]
    sys.stdout.write(indent + " ".join(text.split()) + "\n")
    sys.stdout.flush()
