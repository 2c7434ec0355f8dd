"""Building what an experiment names: data, networks, objective, method."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

from kdlab import spec
from kdlab.errors import UserError
from kdlab.experiment.schema import Experiment
from kdlab.functional import mix, seed_all
from kdlab.losses import Objective
from kdlab.methods import Method, Training
from kdlab.methods.checkpoints import read_checkpoint
from kdlab.runs.curves import CurvesFile
from kdlab.runs.tensorboard import add_layout
from kdlab.tasks import Classification
from kdlab.teachers import Teacher

log = logging.getLogger("kdlab")

OF_ALL_ROWS = {"labels": None, "fraction": None, "ratio": None, "views": None}
"""What a teacher's data do not take over from the student's, unless told to: it sees every label, in new views."""


def data(config: Mapping[str, Any], seed: int) -> Any:
    """A data module; ``seed`` is that of the order and of augmentation.

    The last three (a student's, its teacher's, and of what it starts from) are kept: a check, the run after it, and
    the jobs of a sweep read the same files once.
    """
    text = json.dumps(config, sort_keys=True, default=str)
    return _data(text, seed, str(Path.cwd()))


@lru_cache(maxsize=3)
def _data(text: str, seed: int, folder: str) -> Any:
    return spec.build(json.loads(text), "data", offer={"seed": seed})


def teacher_data(config: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """The student's data with every label, and ``over`` laid on top."""
    whole = {k: OF_ALL_ROWS.get(k, v) for k, v in config.items()}
    if over.get("labels") is not None and "ratio" in whole:
        whole["ratio"] = 0  # it learns from labels alone, as the baseline does: no rows without one in its batches
    return {**whole, **over}


def network(config: Mapping[str, Any], data: Any, seed: int, key: str) -> nn.Module:
    """A network for the classes and inputs of ``data``; its first weights are a function of ``seed``.

    Raises:
        UserError: if it takes pictures and the data are a table, or what its constructor refuses.
    """
    takes = spec.signature(str(config.get("_target_"))).parameters
    if len(data.input_shape) == 1 and "in_channels" in takes and "in_features" not in takes:
        name = str(config["_target_"]).rpartition(".")[2]
        raise UserError(f"{key}: {name} takes pictures, and data ({data.name}) is a table; accepted: mlp, or your own")
    seed_all(mix(seed, 0x6E6574))
    return spec.build(config, key, offer=offers(data))


def offers(data: Any) -> dict[str, Any]:
    """What code knows and a network's constructor may want."""
    shape = data.input_shape
    known: dict[str, Any] = {"num_classes": data.num_classes, "mean": data.mean, "std": data.std}
    if len(shape) == 3:
        known.update(in_channels=shape[0], image_size=list(shape[1:]))
    else:
        known.update(in_features=shape[0])
    return known


def objective(config: Mapping[str, Any]) -> Objective:
    """The objective of a ``loss`` mapping."""
    return spec.build(config, "loss")


def labels_only(terms: Mapping[str, Any]) -> Objective:
    """The objective of teachers and baselines: label terms alone."""
    return Objective({name: spec.build(term, f"loss.terms.{name}") for name, term in terms.items()})


def method(
    experiment: Experiment, student: nn.Module, objective: Objective, task: Classification, teacher: Teacher | None
) -> Method:
    """The LightningModule of an experiment."""
    scheduler = experiment.scheduler
    try:
        return spec.build(
            experiment.method,
            "method",
            student=student,
            objective=objective,
            task=task,
            optimizer=make_optimizer(experiment.optimizer),
            scheduler=None if scheduler is None else spec.build(scheduler, "scheduler"),
            teacher=teacher,
            seed=experiment.seed,
        )
    except UserError as error:  # the teacher is an argument of the method, and a key of the root
        raise UserError(str(error).removeprefix("method.") if "method.teacher:" in str(error) else str(error)) from None


def make_optimizer(config: Mapping[str, Any]) -> Any:
    """A function from parameters to an optimizer."""
    return partial(_optimizer, dict(config))


def _optimizer(config: Mapping[str, Any], params: list) -> torch.optim.Optimizer:
    try:
        return spec.build(config, "optimizer", params=params)
    except UserError:
        raise
    except ValueError as error:  # torch's own, such as "Invalid learning rate: -1"
        raise UserError(f"optimizer: {error}; accepted: what {config['_target_']} takes") from None


def training(config: Mapping[str, Any]) -> Training:
    """How training runs, of a ``trainer`` mapping."""
    return spec.build(config, "trainer")


def start(
    student: nn.Module, init: str, *, previous: nn.Module | None, teacher: nn.Module | None, pretrained: Any
) -> None:
    """Give a fresh student its first weights, in place.

    Raises:
        UserError: if what ``init`` names is not there, or is another architecture.
    """
    if init == "pretrained":
        pretrained(student)
        return
    source = {"previous": previous, "teacher": teacher}.get(init)
    if source is None:
        if init in ("fresh", "previous"):  # nothing before the first stage: it starts fresh
            return
        raise UserError(f"init: {init}, and the experiment has no {init}; accepted: fresh, previous, pretrained")
    try:
        student.load_state_dict(source.state_dict())
    except RuntimeError:
        raise UserError(
            f"init: {init}, which is another architecture than the student; accepted: the same network, or init=fresh"
        ) from None


def dry_run(experiment: Experiment) -> None:
    """Build what needs no data, so that a value out of range is said before anything is written.

    Raises:
        UserError: what a constructor refuses.
    """
    path = Path(experiment.name)
    if not experiment.name or path.is_absolute() or ".." in path.parts:
        raise UserError(f"name: {experiment.name!r}; accepted: the name of a folder inside {experiment.output}")
    objective(experiment.loss)
    training(experiment.trainer)
    _recipe(experiment)
    for owner in ("teacher", "pretrained"):
        recipe = getattr(experiment, owner)
        if recipe is not None and recipe.optimizer:  # a stage before that teaches has none
            with of(owner):
                _recipe(recipe)


def _recipe(recipe: Any) -> None:
    """Build the optimizer and scheduler of an experiment, a teacher or a pretrained network."""
    if isinstance(recipe.epochs, bool) or not isinstance(recipe.epochs, int) or recipe.epochs < 1:
        raise UserError(f"epochs: {recipe.epochs!r}; accepted: a whole number, at least 1")
    if recipe.scheduler is not None:
        spec.build(recipe.scheduler, "scheduler")
    _optimizer(recipe.optimizer, [nn.Parameter(torch.zeros(1))])


@contextmanager
def of(owner: str) -> Iterator[None]:
    """Lead a mistake with the key of the part that it is in: ``teacher.`` before ``data.labels: ...``."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{owner}.{error}") from None


def loggers(config: Mapping[str, Any] | None, folder: Path, name: str) -> list:
    """Lightning loggers for one fit: always ``curves.jsonl``, and the configured one."""
    last = folder / "checkpoints" / "last.ckpt"
    done = int(read_checkpoint(last)["global_step"]) if last.exists() else 0
    found: list = [CurvesFile(folder / "curves.jsonl", done)]
    if config is not None:
        built = spec.build(config, "logger", folder=folder, name=name)
        if built is not None:
            found.append(built)
        if isinstance(built, TensorBoardLogger):
            add_layout(built.experiment)
    return found
