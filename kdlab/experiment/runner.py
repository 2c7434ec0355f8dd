"""Run of one experiment, from its configuration to its run folder."""

from __future__ import annotations

import logging
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import lightning
import torch

import kdlab
from kdlab.config import builder
from kdlab.errors import NOT_WRITABLE, Busy, CannotWrite, RunFailed, UserError
from kdlab.experiment.assembly import Assembly, assemble
from kdlab.experiment.checks import assemble_checked
from kdlab.experiment.continuing import copy_state, first_part, with_start
from kdlab.experiment.error_overlap import PredictionRecorder, drawable, redraw, report
from kdlab.experiment.evaluation import measure_all
from kdlab.experiment.model_store import write_model
from kdlab.experiment.schema import Experiment
from kdlab.experiment.stage import Stage, check_stages, fit_stage, with_generations
from kdlab.experiment.teacher import TrainedModel
from kdlab.experiment.teacher_cache import MEASURED
from kdlab.plain_text import one_line
from kdlab.report import table
from kdlab.runs import chosen_folder
from kdlab.runs import folder as folders
from kdlab.runs.read import DIAGNOSIS, RESULT, Run, mapping
from kdlab.system import integrity
from kdlab.system.files import atomic_write, make_folder, open_to_append
from kdlab.system.names import check_name
from kdlab.system.terminal import LineFormatter, say
from kdlab.system.termination import Terminated, exit_on_sigterm

log = logging.getLogger("kdlab")

NAMED = ("task", "student", "teacher", "data", "loss", "method", "batch_transform", "adapter", "auxiliary")
"""Groups whose chosen option a table names, instead of their content."""


def run(
    config: Mapping[str, Any],
    *,
    folder: Path | None = None,
    chosen: Path | None = None,
    overrides: Sequence[str] = (),
    stages: Mapping[str, Mapping[str, Any]] | None = None,
    choices: Mapping[str, str] | None = None,
    before_writing: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Run one experiment and write its run folder.

    Args:
        config: configuration, resolved and plain, checked against :class:`~kdlab.experiment.schema.Experiment`.
        folder: folder to run in (a job of a sweep); None claims a new one, or the one that ``resume`` names.
        chosen: folder that the user named for this one run; refused if it holds anything else.
        overrides: overrides that the user typed.
        stages: composed configuration of each stage, by name.
        choices: map of group → chosen option, for names in tables and folders.
        before_writing: function called once the experiment is known to fit together; it may raise.

    Returns:
        The content of ``result.json``.

    Raises:
        UserError: before anything is written, if the configuration cannot run.
    """
    config = with_start(config)
    parts = _assemble(config, stages)
    if before_writing is not None:
        before_writing()
    experiment, in_sweep = Experiment.of(config), folder is not None
    folder, note = (folder, "") if folder is not None else _folder_for(experiment, config, chosen)
    if in_sweep or chosen is not None:
        folders.make_job_folder(folder)
    folders.check_links(folder)
    known = folders.read_result(folder)
    if known is not None and known.get("config_hash") == builder.config_hash(config):
        if not in_sweep:
            _complete(known, folder, stages, overrides)
        _show(known, folder, in_sweep)
        return known
    with _held(folder, chosen, config, quiet=in_sweep):
        if note:
            log.info(note)
        (folder / RESULT).unlink(missing_ok=True)  # of a failure, or damaged: its hashes are not those of what follows
        folders.write_config(folder, config, overrides, stages)
        copy_state(experiment, folder)
        started, clock = folders.now(), time.monotonic()
        done = _fit_stages(parts, folder, choices or {})
        last = list(done.values())[-1]
        heard = PredictionRecorder("test" if last.data.counts.get("test") else "val", whole=not in_sweep)
        models, seconds = measure_all(done, choices or {}, heard)
        result = _result(config, overrides, choices or {}, done, models)
        result["seconds"] = {"total": time.monotonic() - clock, **seconds}
        result["started"], result["finished"] = started, folders.now()
        result["diagnosis"] = DIAGNOSIS if not in_sweep and drawable(heard) else None
        _log_hparams(folder, result)
        result = folders.write_result(folder, result)
        if not in_sweep:
            report(folder, heard, last, overrides)
    _show(result, folder, in_sweep)
    return result


def _assemble(config: Mapping[str, Any], stages: Mapping[str, Mapping[str, Any]] | None) -> dict[str, Assembly]:
    """Assemble every stage of an experiment (for one fit, the one without a name), and check the parts.

    Raises:
        UserError: the first thing that is wrong.
    """
    for name in stages or {}:
        check_name("stages", name, "a name for each stage")
    plan = {name: Experiment.of(stage) for name, stage in (stages or {"": config}).items()}
    parts = {name: assemble_checked(stage) for name, stage in plan.items()}
    _check_first(next(iter(plan.values())))
    check_stages(plan)
    return parts


@contextmanager
def _held(folder: Path, chosen: Path | None, config: Mapping[str, Any], quiet: bool) -> Iterator[None]:
    """Hold a run folder: no other run writes into it, its log is kept, and the end of the run is logged."""
    still_free = chosen_folder.still_free(chosen, config)
    with (
        folders.held(folder),
        still_free,
        _logging(folder, quiet),
        exit_on_sigterm(),
        _writing_into(folder),
    ):
        try:
            yield
        except RunFailed as error:
            raise RunFailed(f"{error} (to go on in it: resume={folder})") from error


def _check_first(experiment: Experiment) -> None:
    if experiment.init == "previous" and experiment.method.get("generations", 1) == 1:
        raise UserError("init", "previous, and no stage comes before", "fresh, teacher, pretrained, or a stage before")
    if experiment.names_previous:
        raise UserError("teacher", "previous, and no stage comes before", "teacher=NAME, or a stage before this")


def _complete(
    known: Mapping[str, Any],
    folder: Path,
    stages: Mapping[str, Mapping[str, Any]] | None,
    overrides: Sequence[str],
) -> None:
    """Finish what a process killed after its result left undone: remove temporary files, draw the diagnosis.

    A file that is no longer what the run wrote is logged.
    """
    for path in integrity.changed(folder, known):
        log.warning(
            "%s is not the file that this run wrote (it is damaged, edited, or of another run); without %s, the same "
            "command writes it again from the run's checkpoints",
            *(path, folder / RESULT),
        )
    try:
        with folders.held(folder):
            if known.get("diagnosis") and not (folder / DIAGNOSIS).exists():
                with _logging(folder, quiet=False), exit_on_sigterm():
                    redraw(folder, stages, overrides)
    except (Busy, OSError):
        pass  # another process is at it, or the folder can only be read


def _show(result: Mapping[str, Any], folder: Path, in_sweep: bool) -> None:
    """Show the table of a run; in a sweep, whose end shows one table of all jobs, a line."""
    if not in_sweep:
        table.show("\n" + table.run_table(result, folder=folder))
        return
    shown = Run(folder, dict(result))
    score = mapping(result.get("score"))
    name, form = str(score.get("name")), ".2%" if score.get("greater") else ".4g"
    scores = [(split, shown.number("student", split, name)) for split in MEASURED]
    text = ", ".join(f"{split} {one_line(name)} {value:{form}}" for split, value in scores if value is not None)
    say(f"  {one_line(folder.name)}: {text}, {result['seconds']['total']:.1f} s")


def _folder_for(experiment: Experiment, config: Mapping[str, Any], chosen: Path | None) -> tuple[Path, str]:
    """Return the folder to run in, and a line about it for the log."""
    output = Path(experiment.output)
    if chosen is not None:
        note = chosen_folder.check(chosen, config)
        return chosen_folder.make(chosen), note
    if experiment.resume is not None:
        # a run that starts from another one's state is found by its own configuration
        started_elsewhere = experiment.continued_from is not None
        resume = "auto" if started_elsewhere and not _is_run_of(config) else experiment.resume
        resumed = folders.to_resume(resume, output, experiment.name, config)
        if resumed is not None:
            return resumed, f"going on in {resumed}"
    note = "" if experiment.resume != "auto" else "resume=auto: no run of this configuration; a new one"
    return folders.claim(output, experiment.name, config), note


def _is_run_of(config: Mapping[str, Any]) -> bool:
    """Return whether ``resume`` names a run of this very configuration."""
    return builder.config_hash(folders.read_config(Path(str(config["resume"])))) == builder.config_hash(config)


def _fit_stages(plan: Mapping[str, Assembly], folder: Path, choices: Mapping[str, str]) -> dict[str, Stage]:
    """Fit every stage in turn; the generations of born-again networks are stages too."""
    done: dict[str, Stage] = {}
    previous: TrainedModel | None = None
    for name, experiment in with_generations({name: parts.experiment for name, parts in plan.items()}):
        place = make_folder(make_folder(folder / "stages") / name) if name else folder
        # generations have seeds of their own
        parts = plan[name] if name in plan else assemble(experiment)
        done[name] = fit_stage(parts, place, previous, choices, name or "student")
        previous = done[name].as_teacher
    last = list(done.values())[-1]
    if len(done) > 1:  # what an export or `predict` looks for lies at the top
        with atomic_write(folder / "student.pt") as file:
            file.write(last.fitted.weights.read_bytes())
        write_model(folder, last.experiment.student, last.data, "student.pt", last.steps)
    return done


def _result(
    config: Mapping[str, Any],
    overrides: Sequence[str],
    choices: Mapping[str, str],
    done: Mapping[str, Stage],
    models: dict[str, Any],
) -> dict[str, Any]:
    last = list(done.values())[-1]
    named = {group: choices[group] for group in NAMED if group in choices}
    return {
        "format": folders.FORMAT,
        "status": "finished",
        "error": None,
        "name": str(config["name"]),
        "method": last.experiment.method_name,
        "config_hash": builder.config_hash(config),
        "seed": config["seed"],
        "overrides": list(overrides),
        "settings": {**folders.settings(config), **named},
        "models": {role: models.get(role) for role in ("student", "teacher", "baseline")} | models,
        "score": {"name": last.task.score, "greater": last.task.greater},
        "objective": _score(models["student"], last.task.score),
        "best_epoch": last.fitted.best_epoch,
        "epochs": sum(stage.fitted.epochs for stage in done.values()),
        "steps": sum(stage.fitted.steps for stage in done.values()),
        "warnings": [warning for stage in done.values() for warning in stage.fitted.warnings],
        "data": last.data.describe(),
        "teacher_trained_on": last.lesson.source.trained_on if last.lesson else None,
        "hardware": last.fitted.hardware,
        "versions": versions(),
        "commit": _commit(),
        "continued_from": first_part(config),
    }


def _score(model: Mapping[str, Any], measure: str) -> float | None:
    return model.get("val", {}).get(measure)


def versions() -> dict[str, str]:
    """Return the versions of the software that decides a result."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "kdlab": kdlab.__version__,
    }


def _commit() -> str | None:
    """Return the commit of the working folder, with a plus if it has changes; None outside a repository."""
    try:
        at = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return at.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def _log_hparams(folder: Path, result: Mapping[str, Any]) -> None:
    """Enter the run into TensorBoard's HParams tab."""
    if not list(folder.glob("**/events.out.tfevents.*")):
        return
    from torch.utils.tensorboard import SummaryWriter

    from kdlab.runs.tensorboard import log_result

    with SummaryWriter(str(folder)) as writer:
        log_result(writer, result)


@contextmanager
def _writing_into(folder: Path) -> Iterator[None]:
    """Name the file, or at least the folder, in the error where the disk is full or read-only."""
    try:
        yield
    except OSError as error:
        if error.errno not in NOT_WRITABLE:
            raise
        raise CannotWrite(error.filename or folder, error) from error


class _LogFile(logging.StreamHandler):
    """Handler that writes ``run.log``; a disk without room loses the line, and no error is raised for it."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (of the standard library)
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


@contextmanager
def _logging(folder: Path, quiet: bool) -> Iterator[None]:
    """Send kdlab's log to the run folder, and to standard error unless ``quiet``."""
    stream = os.fdopen(open_to_append(folder / "run.log"), "a", encoding="utf-8", errors="backslashreplace")
    file = _LogFile(stream)
    file.setFormatter(LineFormatter("%(asctime)s %(levelname)s %(message)s"))
    console = logging.StreamHandler()
    console.setFormatter(LineFormatter("%(message)s"))
    console.setLevel(logging.WARNING if quiet else logging.INFO)
    level, log.propagate = log.level, False
    log.setLevel(logging.INFO)
    for handler in (file, console):
        log.addHandler(handler)
    try:
        yield
    except BaseException as error:
        log.removeHandler(console)  # there the command line says it in one line
        if isinstance(error, Terminated):
            log.warning("stopped by SIGTERM; the same command with resume=auto goes on")
        elif not isinstance(error, KeyboardInterrupt):
            log.exception("the run failed")
        raise
    finally:
        for handler in (file, console):
            log.removeHandler(handler)
            handler.close()
        with suppress(OSError):  # what the disk had no room for
            stream.close()
        log.setLevel(level)
        log.propagate = True
