"""What Hydra runs: the one experiment of a command, or one job of a sweep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from kdlab.cli.hydra.compose import Composer, Composition, as_typed, composition
from kdlab.cli.hydra.sweep import job_folder, objective, read_any, remaining
from kdlab.config import builder
from kdlab.errors import Busy
from kdlab.plain_text import one_line
from kdlab.runs.folder import record_failure, tidy
from kdlab.system.terminal import say
from kdlab.system.termination import Terminated, exit_as_failure

if TYPE_CHECKING:
    from kdlab.cli.hydra.launcher import PoolLauncher
    from kdlab.cli.hydra.workers import Outcome


@dataclass
class Single:
    """Runs an experiment that is composed already; an error is kept, for Hydra would print it its own way."""

    composition: Composition
    composer: Composer
    chosen: Path | None = None
    """The folder that the user named; None for one that kdlab names."""
    before_writing: Callable[[], None] | None = None
    """See :func:`kdlab.experiment.run`."""
    error: Exception | None = None

    def __call__(self, _: DictConfig) -> None:
        """Run, and keep the error."""
        try:
            run(self.composition, self.composer, None, chosen=self.chosen, before_writing=self.before_writing)
        except Exception as error:
            self.error = error


def run(found: Composition, composer: Composer, folder: Path | None, **more: Any) -> dict[str, Any]:
    """Hand a composed experiment over to the code that runs it; returns its result."""
    from kdlab import experiment

    return experiment.run(
        found.config,
        folder=folder,
        overrides=as_typed(found.overrides),
        stages={name: stage.config for name, stage in found.stages.items()},
        choices=found.choices(composer.options.groups),
        **more,
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
    last: frozenset[int] = frozenset()
    """The numbers of jobs that failed before: they run after the others, which they might keep from running."""
    launcher: PoolLauncher | None = None
    """What runs the jobs; None for a launcher that Hydra finds by its name."""

    def __call__(self, tree: DictConfig) -> float | None:
        """Run one job, or skip it where it is done."""
        found, folder, line = self._which(tree)
        rest = remaining(self.folder, self.total, self.parallel)
        settled = run_or_skip(found, self.composer, folder, f"{line} ({rest})" if rest else line)
        return None if settled is None else objective(settled)

    def failed(self, given: Callable[[], DictConfig], number: int, outcome: Outcome) -> float | None:
        """Record the failure of a job that could not do so itself, as its process has died.

        Args:
            given: what the job was called with, to be composed; that may be what fails.
            number: of the job, from 0.
            outcome: says why.

        Returns:
            What the job would have returned, if it had written its result by then; else None.
        """
        try:
            found, folder, line = self._which(given())
        except Exception:
            _say(f"[{number + 1}/{self.total}] failed: {outcome.error}")
            return None
        settled = note_end(found, folder, line, outcome)
        return None if settled is None else objective(settled)

    def _which(self, tree: DictConfig) -> tuple[Composition, Path, str]:
        """Return a job's composition, its folder, and the line that says which job it is."""
        job: Any = HydraConfig.get()
        texts = list(job.overrides.task)
        found = composition(tree, texts, job)
        folder = job_folder(self.folder, texts, self.swept, found.config)
        words = [text for text in as_typed(texts) if text.split("=")[0] in self.swept]
        line = " ".join([f"[{job.job.num + 1}/{self.total}]", *(words or [str(found.config.get("name"))])])
        return found, folder, line


def run_or_skip(found: Composition, composer: Composer, folder: Path, line: str) -> dict[str, Any] | None:
    """Run one of several runs, unless it is done: a failure is recorded, and one line said.

    Args:
        found: the run, its stages not yet composed.
        composer: composes them.
        folder: of the run.
        line: says which it is.

    Returns:
        Its result; None if it failed, or is another process's.
    """
    if (done := finished(found, folder)) is not None:
        tidy(folder)
        _say(f"{line}: done already")
        return done
    _say(line)
    with builder.trust(user_modules=True):
        try:
            return run(composer.with_stages(found), composer, folder)
        except Busy:
            _say("  running in another process; left to it")
        except (KeyboardInterrupt, Terminated):
            raise
        except SystemExit as end:
            _failed(found, folder, line, exit_as_failure(end))
        except BaseException as error:  # others' code may raise anything
            _failed(found, folder, line, error)
    return None


def note_end(found: Composition, folder: Path, line: str, outcome: Outcome) -> dict[str, Any] | None:
    """Record the failure of a run whose process has died; returns its result, if it had been written by then."""
    if (done := finished(found, folder)) is not None:
        return done
    assert outcome.error is not None
    if outcome.again:
        _say(f"{line} stopped: {outcome.error}; it runs again, alone, after the others")
    else:
        _failed(found, folder, line, outcome.error)
    return None


def finished(found: Composition, folder: Path) -> dict[str, Any] | None:
    """The result of a run that is done, with this very configuration; else None."""
    done = read_any(folder)
    same = done.get("status") == "finished" and done.get("config_hash") == builder.config_hash(found.config)
    return done if same else None


def _failed(found: Composition, folder: Path, line: str, error: BaseException) -> None:
    from kdlab.cli.hydra.workers import Crash

    said = str(error) if isinstance(error, Crash) else f"{type(error).__name__}: {error}"
    _say(f"{line} failed: {said}")
    try:
        record_failure(folder, found.config, as_typed(found.overrides), error)
    except OSError as why:  # a full disk, say
        _say(f"  that could not be recorded in {folder}: {why}")


def _say(text: str) -> None:
    """One line in one write: jobs of other processes write here too."""
    indent = text[: len(text) - len(text.lstrip())]
    say(indent + one_line(text))
