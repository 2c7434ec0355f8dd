"""Who teaches a student in one fit: found, trained, cached, or the stage before."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from kdlab.errors import UserError
from kdlab.experiment import parts
from kdlab.experiment.schema import Experiment, TeacherSpec
from kdlab.experiment.store import Recipe, obtain
from kdlab.methods import Training
from kdlab.models import load_weights, weights_hash
from kdlab.tasks import Classification
from kdlab.teachers import CachedTeacher, FrozenTeacher, Manifest, Teacher, dtype_for, write_cache

log = logging.getLogger("kdlab")


@dataclass
class Trained:
    """A trained network that can teach."""

    net: nn.Module
    trained_on: str
    seconds: float | None = None
    """Of its training; None for a checkpoint from elsewhere."""
    fresh: bool = False


@dataclass
class Lesson:
    """A teacher ready to teach, and what is known of it."""

    teacher: Teacher
    source: Trained
    cache_seconds: float = 0.0


def find_teacher(
    experiment: Experiment,
    data: Any,
    training: Training,
    previous: Trained | None,
    names: Mapping[str, str],
) -> Trained | None:
    """The experiment's teacher as a trained network; None where it has none.

    Raises:
        UserError: if its checkpoint does not load, or it has another number of classes than the data.
    """
    spec = experiment.teacher
    if previous is not None or spec is None or spec.net is None:
        return previous
    if spec.checkpoint is not None:
        net = parts.network(spec.net, data, spec.seed, "teacher.net")
        said = load_weights(net, spec.checkpoint, spec.mapping, key="teacher.checkpoint")
        log.info("teacher: %s", said)
        return Trained(net, f"elsewhere (checkpoint {Path(spec.checkpoint).name})")
    config = parts.teacher_data(experiment.data, spec.data)
    own = own_data(experiment, "teacher")
    same_classes(own, data)
    recipe = Recipe(spec.net, config, spec.epochs, spec.seed, spec.optimizer, spec.scheduler, experiment.trainer)
    name = names.get("teacher", "teacher")
    kept = obtain("teacher", recipe, Path(experiment.output), training, name, experiment.logger, own)
    return Trained(kept.net, kept.trained_on, kept.seconds, kept.fresh)


def own_data(experiment: Experiment, owner: str) -> Any:
    """The data on which a teacher, or what the student starts from, is trained.

    Raises:
        UserError: what the data refuse, or if no row has a label.
    """
    spec = getattr(experiment, owner)
    with parts.of(owner):
        data = parts.data(parts.teacher_data(experiment.data, spec.data), spec.seed)
    if data.counts["labelled"] == 0:
        raise UserError(f"{owner}.data.labels: 0, and it learns from labels; accepted: above 0, or null")
    return data


def same_classes(teacher: Any, student: Any) -> None:
    """Refuse a teacher of other classes, or of the same in another order."""
    if list(teacher.class_names) != list(student.class_names):
        raise UserError(
            f"teacher.data: {teacher.num_classes} classes {_few(teacher.class_names)}, and data has "
            f"{student.num_classes}: {_few(student.class_names)}; accepted: the same classes in the same order"
        )


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def give_lesson(
    source: Trained,
    spec: TeacherSpec | None,
    data: Any,
    task: Classification,
    layers: list[str],
    training: Training,
    output: Path,
) -> Lesson:
    """Freeze a trained network into a teacher; from its cache where that is exact, else live, and say why."""
    live = FrozenTeacher(source.net, task, layers)
    asked = spec.cache if spec is not None else "auto"
    why_not = why_not_cached(asked, data, layers)
    if why_not:
        log.info("%s; no cache, %s", live.describe(), why_not)
        return Lesson(live, source)
    started = time.monotonic()
    manifest = describe_cache(source.net, data)
    folder = output / "cache" / manifest.key if asked == "auto" else Path(asked)
    if asked == "auto" and not (folder / "manifest.json").exists():
        data.place(training.device)
        source.net.to(training.device)
        with tqdm(total=1, desc="teacher cache", unit="row", leave=False, disable=None) as bar:

            def report(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            write_cache(folder, manifest, live, data.sequential, report)
    cached = CachedTeacher(folder, manifest)
    log.info(cached.describe())
    return Lesson(cached, source, time.monotonic() - started)


def why_not_cached(asked: str, data: Any, layers: list[str]) -> str:
    """Why a teacher answers live; empty where a cache is exact.

    Raises:
        UserError: if a certain cache is asked for, and cannot be used or is not there.
    """
    if asked == "off":
        return "as teacher.cache=off asks"
    reasons = []
    if layers:
        reasons.append(f"the loss looks at its layers ({', '.join(layers)})")
    if data.views is None:
        reasons.append(data.unlimited)
    if reasons and asked != "auto":
        raise UserError(f"teacher.cache: {asked}, and {' and '.join(reasons)}; accepted: auto or off")
    if asked != "auto" and not (Path(asked) / "manifest.json").is_file():
        raise UserError(f"teacher.cache: {asked} holds no manifest.json; accepted: auto, off, or the folder of a cache")
    return " and ".join(f"since {reason}" for reason in reasons)


def describe_cache(net: nn.Module, data: Any) -> Manifest:
    """What a cache of ``net`` on ``data`` holds."""
    rows = {"train": (data.counts["train"], data.views or 1)}
    rows.update({split: (data.counts[split], 1) for split in ("val", "test") if data.counts[split]})
    # the input normalisation is no part of a state dict, but it is of what the teacher says
    state = {**net.state_dict(), **dict(net.named_buffers())}
    return Manifest(
        teacher=weights_hash(state),
        data=data.fingerprint,
        transform=data.transform,
        classes=data.num_classes,
        rows=rows,
        dtype=dtype_for(rows, data.num_classes),
    )


def pretrained_start(experiment: Experiment, data: Any, training: Training, names: Mapping[str, str]) -> Any:
    """A function that gives a student the weights of ``pretrained``, with its own head where classes differ."""
    spec = experiment.pretrained
    if spec is None:
        raise UserError(
            "init: pretrained, and the experiment has no pretrained; accepted: pretrained=trained, or fresh"
        )

    def give(student: nn.Module) -> None:
        if spec.checkpoint is not None:
            said = load_weights(student, spec.checkpoint, spec.mapping, key="pretrained.checkpoint", head=False)
            log.info("pretrained: %s", said)
            return
        config = parts.teacher_data(experiment.data, spec.data)
        recipe = Recipe(
            experiment.student, config, spec.epochs, spec.seed, spec.optimizer, spec.scheduler, experiment.trainer
        )
        name = names.get("student", "student")
        kept = obtain("pretrained", recipe, Path(experiment.output), training, name, experiment.logger)
        load_weights(student, kept.folder / "model_finetuned.pt", key="pretrained", head=False)
        log.info("pretrained: on %s; a new head for %d classes", kept.trained_on, data.num_classes)

    return give


def without_teacher(experiment: Experiment, data: Any) -> Recipe | None:
    """The baseline: the same student, data, seed and number of steps, learning from the labels alone.

    Where only some rows have labels, its batches hold labelled rows only.
    """
    if data.counts["labelled"] == 0:
        return None
    config = dict(experiment.data)
    if data.counts["labelled"] < data.counts["train"] and "ratio" in config:
        config["ratio"] = 0
    return Recipe(
        experiment.student,
        config,
        experiment.epochs,
        experiment.seed,
        experiment.optimizer,
        experiment.scheduler,
        experiment.trainer,
        _label_terms(experiment),
    )


def _label_terms(experiment: Experiment) -> dict[str, Any]:
    """What the experiment's own loss says about labels, such as label smoothing; schedules of alpha left out."""
    terms = parts.objective(experiment.loss).terms
    return {name: experiment.loss["terms"][name] for name, term in terms.items() if term.role == "label"}


def of_all_stages(experiments: list[Experiment]) -> Experiment:
    """An experiment as long as all stages together, for a baseline of the same budget."""
    return replace(experiments[-1], epochs=sum(e.epochs for e in experiments))
