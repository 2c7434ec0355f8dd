"""Tasks that Hydra runs: the one experiment of a command, or one job of a sweep."""

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
    """Task that runs an experiment composed already; an error is kept, for Hydra would print it its own way."""

    composition: Composition
    composer: Composer
    chosen: Path | None = None
    """The folder that the user named; None for one that kdlab names."""
    before_writing: Callable[[], None] | None = None
    """Function called before anything is written, see :func:`kdlab.experiment.run`."""
    error: Exception | None = None

    def __call__(self, _: DictConfig) -> None:
        """Run, and keep the error."""
        try:
            run(self.composition, self.composer, None, chosen=self.chosen, before_writing=self.before_writing)
        except Exception as error:
            self.error = error


def run(point: Composition, composer: Composer, folder: Path | None, **more: Any) -> dict[str, Any]:
    """Hand a composed experiment over to the code that runs it; returns its result."""
    from kdlab import experiment

    return experiment.run(
        point.config,
        folder=folder,
        overrides=as_typed(point.overrides),
        stages={name: stage.config for name, stage in point.stages.items()},
        choices=point.choices(composer.options.groups),
        **more,
    )


@dataclass(frozen=True)
class Job:
    """Task that runs a job of a sweep, maybe in another process: it skips what is done, and records what fails.

    It returns what a search makes better: the student's score on validation data, or None.
    """

    folder: Path
    """Folder of the sweep."""
    composer: Composer
    swept: tuple[str, ...]
    """Keys that differ between jobs."""
    total: int
    parallel: int = 1
    last: frozenset[int] = frozenset()
    """Numbers of jobs that failed before: they run after the others, which they might keep from running."""
    launcher: PoolLauncher | None = None
    """Launcher of the jobs; None for one that Hydra finds by its name."""

    def __call__(self, tree: DictConfig) -> float | None:
        """Run one job, or skip it where it is done."""
        point, folder, line = self._which(tree)
        rest = remaining(self.folder, self.total, self.parallel)
        settled = run_or_skip(point, self.composer, folder, f"{line} ({rest})" if rest else line)
        return None if settled is None else objective(settled)

    def failed(self, given: Callable[[], DictConfig], number: int, outcome: Outcome) -> float | None:
        """Record the failure of a job that could not do so itself, as its process has died.

        Args:
            given: function that composes what the job was called with; it may be what fails.
            number: number of the job, from 0.
            outcome: end of the job, with the reason.

        Returns:
            What the job would have returned, if it had written its result by then; else None.
        """
        try:
            point, folder, line = self._which(given())
        except Exception:
            _say(f"[{number + 1}/{self.total}] failed: {outcome.error}")
            return None
        settled = note_end(point, folder, line, outcome)
        return None if settled is None else objective(settled)

    def _which(self, tree: DictConfig) -> tuple[Composition, Path, str]:
        """Return a job's composition, its folder, and the line that says which job it is."""
        job: Any = HydraConfig.get()
        texts = list(job.overrides.task)
        point = composition(tree, texts, job)
        folder = job_folder(self.folder, texts, self.swept, point.config)
        words = [text for text in as_typed(texts) if text.split("=")[0] in self.swept]
        line = " ".join([f"[{job.job.num + 1}/{self.total}]", *(words or [str(point.config.get("name"))])])
        return point, folder, line


def run_or_skip(point: Composition, composer: Composer, folder: Path, line: str) -> dict[str, Any] | None:
    """Run one of several runs, unless it is done: a failure is recorded, and one line said.

    Args:
        point: composition of the run, its stages not yet composed.
        composer: composer of its stages.
        folder: folder of the run.
        line: text that says which run it is.

    Returns:
        Its result; None if it failed, or is another process's.
    """
    if (done := finished(point, folder)) is not None:
        tidy(folder)
        _say(f"{line}: done already")
        return done
    _say(line)
    with builder.trust(user_modules=True):
        try:
            return run(composer.with_stages(point), composer, folder)
        except Busy:
            _say("  running in another process; left to it")
        except (KeyboardInterrupt, Terminated):
            raise
        except SystemExit as end:
            _failed(point, folder, line, exit_as_failure(end))
        except BaseException as error:  # others' code may raise anything
            _failed(point, folder, line, error)
    return None


def note_end(point: Composition, folder: Path, line: str, outcome: Outcome) -> dict[str, Any] | None:
    """Record the failure of a run whose process has died; returns its result, if it had been written by then."""
    if (done := finished(point, folder)) is not None:
        return done
    assert outcome.error is not None
    if outcome.again:
        _say(f"{line} stopped: {outcome.error}; it runs again, alone, after the others")
    else:
        _failed(point, folder, line, outcome.error)
    return None


def finished(point: Composition, folder: Path) -> dict[str, Any] | None:
    """Return the result of a run that is done, with this very configuration; else None."""
    done = read_any(folder)
    same = done.get("status") == "finished" and done.get("config_hash") == builder.config_hash(point.config)
    return done if same else None


def _failed(point: Composition, folder: Path, line: str, error: BaseException) -> None:
    from kdlab.cli.hydra.workers import Crash

    reason = str(error) if isinstance(error, Crash) else f"{type(error).__name__}: {error}"
    _say(f"{line} failed: {reason}")
    try:
        record_failure(folder, point.config, as_typed(point.overrides), error)
    except OSError as why:  # a full disk, say
        _say(f"  that could not be recorded in {folder}: {why}")


def _say(text: str) -> None:
    """Print one line in one write: jobs of other processes write here too."""
    indent = text[: len(text) - len(text.lstrip())]
    say(indent + one_line(text))
