"""One experiment, from its configuration to its run folder."""

from __future__ import annotations

import logging
import platform
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import nn

import kdlab
from kdlab import spec
from kdlab.errors import UserError
from kdlab.experiment import parts
from kdlab.experiment.preflight import preflight
from kdlab.experiment.schema import Experiment
from kdlab.experiment.store import obtain, write_model
from kdlab.experiment.teaching import (
    Lesson,
    Trained,
    find_teacher,
    give_lesson,
    of_all_stages,
    pretrained_start,
    without_teacher,
)
from kdlab.losses import Objective
from kdlab.methods import Fitted, Training, evaluate, fit
from kdlab.methods.checkpoints import exit_on_sigterm
from kdlab.models import measure
from kdlab.runs import folder as folders
from kdlab.runs import table
from kdlab.tasks import Classification
from kdlab.teachers import EnsembleTeacher, FrozenTeacher

log = logging.getLogger("kdlab")


@dataclass
class Stage:
    """One fit of an experiment, done."""

    experiment: Experiment
    data: Any
    task: Classification
    training: Training
    student: nn.Module
    lesson: Lesson | None
    fitted: Fitted

    @property
    def as_teacher(self) -> Trained:
        """Its student, for the stage after."""
        return Trained(self.student, self.data.describe(), self.fitted.seconds)


def run(
    config: Mapping[str, Any],
    *,
    folder: Path | None = None,
    overrides: Sequence[str] = (),
    stages: Mapping[str, Mapping[str, Any]] | None = None,
    choices: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Run one experiment and write its run folder.

    Args:
        config: resolved and plain, checked against :class:`~kdlab.experiment.schema.Experiment`.
        folder: to run in (a job of a sweep); None claims a new one, or the one that ``resume`` names.
        overrides: what the user typed.
        stages: the composed configuration of each stage, by name.
        choices: group → chosen option, for names in tables and folders.

    Returns:
        The content of ``result.json``.

    Raises:
        UserError: before anything is written, if the configuration cannot run.
    """
    plan = {name: Experiment.of(stage) for name, stage in (stages or {}).items()} or {"": Experiment.of(config)}
    for stage in (stages or {"": config}).values():
        preflight(stage)
    _check_first(next(iter(plan.values())))
    experiment = Experiment.of(config)
    in_sweep = folder is not None
    folder = folder or _folder_for(experiment, config)
    folder.mkdir(parents=True, exist_ok=True)
    known = folders.read_result(folder)
    if known is not None and known["config_hash"] == spec.config_hash(config):
        _show(known, folder, in_sweep)
        return known
    with folders.held(folder), _logging(folder, quiet=in_sweep):
        exit_on_sigterm()
        folders.write_config(folder, config, overrides)
        started, clock = folders.now(), time.monotonic()
        done = _fit_stages(plan, folder, choices or {})
        models, seconds = _measure(done, choices or {})
        result = _result(config, overrides, choices or {}, done, models)
        result["seconds"] = {"total": time.monotonic() - clock, **seconds}
        result["started"], result["finished"] = started, folders.now()
        _log_hparams(folder, result)
        folders.write_result(folder, result)
    _show(result, folder, in_sweep)
    return result


def _check_first(experiment: Experiment) -> None:
    if experiment.teacher is not None and experiment.teacher.net is None:
        raise UserError("teacher: previous, and no stage comes before; accepted: teacher=NAME, or a stage before this")


def _show(result: Mapping[str, Any], folder: Path, in_sweep: bool) -> None:
    """The table of a run; in a sweep, whose end shows one table of all jobs, a line."""
    if not in_sweep:
        table.show("\n" + table.run_table(result, folder=folder))
        return
    student = result["models"]["student"]
    scores = [f"{split} acc {student[split]['acc']:.2%}" for split in ("val", "test") if split in student]
    print(f"  {folder.name}: {', '.join(scores)}, {result['seconds']['total']:.1f} s", flush=True)


def _folder_for(experiment: Experiment, config: Mapping[str, Any]) -> Path:
    output = Path(experiment.output)
    if experiment.resume is not None:
        found = folders.to_resume(experiment.resume, output, experiment.name, config)
        if found is not None:
            log.info("going on in %s", found)
            return found
        log.info("resume=auto: no run of this configuration; a new one")
    return folders.claim(output, experiment.name, config)


# ---- training ------------------------------------------------------------------------------------------------------


def _fit_stages(plan: Mapping[str, Experiment], folder: Path, choices: Mapping[str, str]) -> dict[str, Stage]:
    """Fit every stage in turn; the generations of born-again networks are stages too."""
    done: dict[str, Stage] = {}
    previous: Trained | None = None
    for name, experiment in _with_generations(plan):
        place = folder / "stages" / name if name else folder
        done[name] = fit_stage(experiment, place, previous, choices, name or "student")
        previous = done[name].as_teacher
    last = list(done.values())[-1]
    if len(done) > 1:  # what an export or `predict` looks for lies at the top
        (folder / "student.pt").write_bytes(last.fitted.weights.read_bytes())
        write_model(folder, last.experiment.student, last.data, "student.pt")
    return done


def _with_generations(plan: Mapping[str, Experiment]) -> Iterator[tuple[str, Experiment]]:
    for name, experiment in plan.items():
        generations = experiment.method.get("generations", 1)
        if generations == 1:
            yield name, experiment
        for n in range(1, generations + 1) if generations > 1 else ():
            yield f"{name}_generation_{n}".lstrip("_"), experiment


def fit_stage(
    experiment: Experiment, folder: Path, previous: Trained | None, choices: Mapping[str, str], name: str
) -> Stage:
    """One fit: data, teacher, student, objective, method, trainer."""
    training = parts.training(experiment.trainer)
    data = parts.data(experiment.data, experiment.seed)
    task = Classification(data.num_classes)
    objective = parts.objective(experiment.loss)

    from_before = previous if _taught_by_previous(experiment) else None
    taught = _taught(experiment, objective)
    source = lesson = None
    if taught or experiment.init == "teacher":
        source = find_teacher(experiment, data, training, from_before, choices)
    elif experiment.teacher is not None:
        log.info("%s: learns from itself or from labels alone, without the teacher that is configured", name)
    if source is not None and taught:
        layers = objective.teacher_layers
        lesson = give_lesson(source, experiment.teacher, data, task, layers, training, Path(experiment.output))

    student = parts.network(experiment.student, data, experiment.seed, "student")
    parts.start(
        student,
        experiment.init,
        previous=previous.net if previous else None,
        teacher=source.net if source else None,
        pretrained=pretrained_start(experiment, data, training, choices) if experiment.init == "pretrained" else None,
    )
    method = parts.method(
        experiment.method,
        student,
        objective,
        task,
        experiment.optimizer,
        experiment.scheduler,
        lesson.teacher if lesson else None,
        experiment.seed,
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder, experiment.student, data, method.weights_file)
    loggers = parts.loggers(experiment.logger, folder, experiment.name)
    log.info("%s: training %d epochs on %s", name, experiment.epochs, data.describe())
    fitted = fit(method, data, training, folder, experiment.epochs, loggers, name)
    return Stage(experiment, data, task, training, student, lesson, fitted)


def _taught(experiment: Experiment, objective: Objective) -> bool:
    """Whether somebody else teaches: neither labels alone, nor a running average or snapshot of the student."""
    if experiment.method.get("source") in ("ema", "snapshot"):
        return False
    return objective.needs_teacher or not _is_finetune(experiment)


def _taught_by_previous(experiment: Experiment) -> bool:
    """Whether the stage before teaches: born-again generations, and ``teacher=previous``."""
    return experiment.method.get("source") == "previous" or (
        experiment.teacher is not None and experiment.teacher.net is None
    )


# ---- measuring -----------------------------------------------------------------------------------------------------


def _measure(done: Mapping[str, Stage], choices: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, float]]:
    """Every network of the run on validation and test, and what each part took."""
    stages = list(done.values())
    last, first = stages[-1], stages[0]
    lesson = last.lesson
    models = {"student": _model(last, last.student, last.fitted.seconds)}
    if lesson is not None:
        models["teacher"] = _model(last, lesson.source.net, lesson.source.seconds, teacher=True)
    seconds = {
        "teacher": lesson.source.seconds or 0.0 if lesson and lesson.source.fresh else 0.0,
        "cache": sum(stage.lesson.cache_seconds for stage in stages if stage.lesson),
        "student": sum(stage.fitted.seconds for stage in stages),
        "baseline": 0.0,
    }
    for name, stage in list(done.items())[:-1]:
        models[name] = _model(stage, stage.student, stage.fitted.seconds)
    if last.experiment.method.get("source") == "previous" and len(stages) > 1:
        models["ensemble"] = _ensemble(stages)
    if last.experiment.baseline:
        if len(stages) > 1 and first.lesson is None and _same_budget(first.experiment, last.experiment):
            models["baseline"] = next(iter(models[name] for name in done))  # it learned from the labels alone
        elif last.lesson is not None or last.experiment.init != "fresh" or not _is_finetune(last.experiment):
            found, took = _baseline(of_all_stages([s.experiment for s in stages]), last, choices)
            if found:
                models["baseline"], seconds["baseline"] = found, took
    return models, seconds


def _same_budget(first: Experiment, last: Experiment) -> bool:
    keys = ("student", "data", "epochs", "optimizer", "scheduler", "seed")
    return last.init == "fresh" and all(getattr(first, key) == getattr(last, key) for key in keys)


def _is_finetune(experiment: Experiment) -> bool:
    return str(experiment.method.get("_target_", "")).endswith(".FineTune")


def _baseline(experiment: Experiment, last: Stage, choices: Mapping[str, str]) -> tuple[dict[str, Any] | None, float]:
    recipe = without_teacher(experiment, last.data)
    if recipe is None:
        log.info("baseline: none, since no row has a label")
        return None, 0.0
    name = choices.get("student", "student")
    kept = obtain("baseline", recipe, Path(experiment.output), last.training, name, experiment.logger)
    return _model(last, kept.net, kept.seconds), kept.seconds if kept.fresh else 0.0


def _model(stage: Stage, net: nn.Module, seconds: float | None, teacher: bool = False) -> dict[str, Any]:
    """What a table says about one network."""
    net.cpu().eval()
    example = next(iter(stage.data.sequential("test" if stage.data.counts["test"] else "train"))).inputs[:1].cpu()
    told = stage.lesson.teacher if stage.lesson and not teacher else None
    described = {
        "parameters": measure.parameters(net),
        "bytes": measure.size_bytes(net),
        "flops": measure.flops(net, example),
        "latency_ms": measure.latency_ms(net, example),
        "seconds": seconds,
    }
    net.to(stage.training.device)
    return {**described, **_splits(stage, lambda batch, _: stage.task.outputs(net, batch), told)}


def _ensemble(stages: Sequence[Stage]) -> dict[str, Any]:
    last = stages[-1]
    members = EnsembleTeacher([FrozenTeacher(stage.student, last.task) for stage in stages])
    sizes = [_size(stage.student) for stage in stages]
    told = last.lesson.teacher if last.lesson else None
    return {
        "parameters": sum(p for p, _ in sizes),
        "bytes": sum(b for _, b in sizes),
        "flops": None,
        "latency_ms": None,
        "seconds": sum(stage.fitted.seconds for stage in stages),
        **_splits(last, members, told),
    }


def _size(net: nn.Module) -> tuple[int, int]:
    return measure.parameters(net), measure.size_bytes(net)


def _splits(stage: Stage, answers: Any, teacher: Any) -> dict[str, dict[str, float]]:
    stage.data.place(stage.training.device)
    found = {}
    for split in ("val", "test"):
        if stage.data.counts[split]:
            loader = getattr(stage.data, f"{split}_dataloader")()
            found[split] = evaluate(stage.task, answers, loader, stage.training.device, teacher, split)
    return found


# ---- the record ----------------------------------------------------------------------------------------------------


def _result(
    config: Mapping[str, Any],
    overrides: Sequence[str],
    choices: Mapping[str, str],
    done: Mapping[str, Stage],
    models: dict[str, Any],
) -> dict[str, Any]:
    last = list(done.values())[-1]
    named = {group: choices[group] for group in ("student", "teacher", "data", "loss", "method") if group in choices}
    return {
        "format": folders.FORMAT,
        "status": "finished",
        "error": None,
        "name": config["name"],
        "method": str(config["method"].get("_target_", "")).rpartition(".")[2],
        "config_hash": spec.config_hash(config),
        "seed": config["seed"],
        "overrides": list(overrides),
        "settings": {**folders.settings(config), **named},
        "models": {role: models.get(role) for role in ("student", "teacher", "baseline")} | models,
        "objective": _score(models["student"], last.task.score),
        "best_epoch": last.fitted.best_epoch,
        "epochs": sum(stage.fitted.epochs for stage in done.values()),
        "steps": sum(stage.fitted.steps for stage in done.values()),
        "data": last.data.describe(),
        "teacher_trained_on": last.lesson.source.trained_on if last.lesson else None,
        "hardware": last.fitted.hardware,
        "versions": versions(),
        "commit": _commit(),
    }


def _score(model: Mapping[str, Any], measure: str) -> float | None:
    return model.get("val", {}).get(measure)


def versions() -> dict[str, str]:
    """Of what decides a result."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "kdlab": kdlab.__version__,
    }


def _commit() -> str | None:
    """The commit of the working folder, with a plus if it has changes; None outside a repository."""
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
def _logging(folder: Path, quiet: bool) -> Iterator[None]:
    """Send kdlab's log to the run folder, and to standard error unless ``quiet``."""
    file = logging.FileHandler(folder / "run.log", encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    console = logging.StreamHandler()
    console.setLevel(logging.WARNING if quiet else logging.INFO)
    level, log.propagate = log.level, False
    log.setLevel(logging.INFO)
    for handler in (file, console):
        log.addHandler(handler)
    try:
        yield
    except Exception:
        log.removeHandler(console)  # there the command line says it in one line
        log.exception("the run failed")
        raise
    finally:
        for handler in (file, console):
            log.removeHandler(handler)
            handler.close()
        log.setLevel(level)
        log.propagate = True


def evaluate_teacher(config: Mapping[str, Any]) -> dict[str, Any]:
    """Measure the configured teacher on validation and test: what ``python -m kdlab evaluate`` shows.

    Raises:
        UserError: if there is no teacher, or its checkpoint does not load.
    """
    experiment = Experiment.of(config)
    if experiment.teacher is None or experiment.teacher.net is None:
        raise UserError("teacher: none; accepted: teacher=NAME, with teacher.checkpoint=FILE to measure a file")
    training = parts.training(experiment.trainer)
    data = parts.data(experiment.data, experiment.seed)
    source = find_teacher(experiment, data, training, None, {})
    assert source is not None
    training.adapt(source.net, next(iter(data.sequential("test"))).inputs[:1], data.batch_size)
    stage = Stage(experiment, data, Classification(data.num_classes), training, source.net, None, None)
    return {**_model(stage, source.net, source.seconds), "trained_on": source.trained_on, "counts": data.counts}
