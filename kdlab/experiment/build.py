"""Construction of what an experiment names: data, networks, objective, method."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

from kdlab.batch_transforms import BatchTransform
from kdlab.config import builder
from kdlab.config.trust import allowed
from kdlab.data import DataModule
from kdlab.errors import UserError, within
from kdlab.experiment.schema import Experiment
from kdlab.functional import hash_seed, seed_all
from kdlab.losses import Objective
from kdlab.methods import Method
from kdlab.models import LayerSubset, LoadWeights, NetworkStep, TeacherHead
from kdlab.models.transforms.auxiliary import Auxiliary
from kdlab.models.transforms.steps import ORIGINS, repeated
from kdlab.models.weights.affordable import build_affordable
from kdlab.runs.curves import CurvesFile
from kdlab.runs.tensorboard_layout import Layout
from kdlab.system.names import check_names, check_output
from kdlab.tasks import Task
from kdlab.teachers import Teacher
from kdlab.training import TrainerConfig
from kdlab.training.checkpoints import read_checkpoint

log = logging.getLogger("kdlab")

STARTS: Mapping[str, type[NetworkStep]] = {"layer_subset": LayerSubset, "teacher_head": TeacherHead}
"""Map of ``init`` → the step that it stands for, beside those that load all weights."""

RESET_FOR_TEACHER = {"labels": None, "fraction": None, "unlabelled_ratio": None, "pairing": None, "views": None}
"""Settings that a teacher's data do not take from the student's by default.

A teacher sees every label, in new views, and rows as they come.
"""


def data(config: Mapping[str, Any], seed: int) -> DataModule:
    """Build a data module; ``seed`` is that of the order and of augmentation.

    The last three (a student's, its teacher's, and of what it starts from) are kept: a check, the run after it, and
    the jobs of a sweep read the same files once.
    """
    text = json.dumps(config, sort_keys=True, default=str)
    return _data(text, seed, str(Path.cwd()), allowed())


@lru_cache(maxsize=3)
def _data(text: str, seed: int, folder: str, allowed: object) -> Any:
    return builder.build(json.loads(text), "data", slot="data", offer={"seed": seed})


def teacher_data(config: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return the student's data with every label, overridden by ``over``."""
    whole = {k: RESET_FOR_TEACHER.get(k, v) for k, v in config.items()}
    if over.get("labels") is not None and "unlabelled_ratio" in whole:
        whole["unlabelled_ratio"] = (
            0  # it learns from labels alone, as the baseline does: no rows without one in its batches
        )
    return {**whole, **over}


def network(
    config: Mapping[str, Any], data: DataModule, seed: int, key: str, offers: Mapping[str, Any] | None = None
) -> nn.Module:
    """Build a network for the classes and inputs of ``data``; its first weights are a function of ``seed``.

    Args:
        config: mapping of the network.
        data: data module that the network is for.
        seed: seed of its first weights.
        key: config key of ``config``, for messages.
        offers: keyword arguments that its constructor may take; None is what ``data`` offer.

    Raises:
        UserError: if it takes pictures and the data are a table, or what its constructor refuses.
    """
    takes, offers = builder.parameters(config, key, slot="network"), data.network_kwargs if offers is None else offers
    if "vocab_size" in takes and "vocab_size" not in offers:
        raise _unlike(key, config, "sequences of tokens", data, "a network for pictures or tables")
    if "vocab_size" in offers and "vocab_size" not in takes and takes & {"num_classes", "in_channels"}:
        raise _unlike(key, config, "rows of classes", data, "a language model, such as gpt_tiny, or your own")
    if "in_features" in offers and "in_channels" in takes and "in_features" not in takes:
        raise _unlike(key, config, "pictures", data, "mlp, or your own")
    least = offers.get("vocab_size", 0)
    if isinstance(given := config.get("vocab_size"), int) and given < least:
        raise UserError(f"{key}.vocab_size", f"{given}, and data ({data.name}) has {least} tokens", "null, or more")

    def build() -> nn.Module:
        seed_all(hash_seed(seed, 0x6E6574))
        return builder.build(config, key, slot="network", offer=offers)

    net = build_affordable(build, key, trains=key == "student")
    data.check_reads(net, key)
    return net


def _unlike(key: str, config: Mapping[str, Any], wanted: str, data: DataModule, accepted: str) -> UserError:
    return UserError(key, f"{_of(config)} takes {wanted}, and data ({data.name}) is {data.kind}", accepted)


def task(config: Mapping[str, Any], data: DataModule) -> Task:
    """Build the task of ``data``.

    Raises:
        UserError: if the task reads another kind of data.
    """
    takes, offers = builder.parameters(config, "task", slot="task"), data.network_kwargs
    gives, accepted = f"and data ({data.name}) gives {data.target}", f"task={data.default_task}, or other data"
    for needed in ("num_classes", "vocab_size"):
        if needed in takes and needed not in offers and config.get(needed) is None:
            name = str(config["_target_"]).rpartition(".")[2]
            raise UserError("task", f"{name} wants to know {needed}, {gives}", accepted)
    made: Task = builder.build(config, "task", slot="task", offer=offers)
    if made.target != data.target:
        raise UserError("task", f"{type(made).__name__} reads {made.target}, {gives}", accepted)
    return made


def objective(config: Mapping[str, Any], data: DataModule | None = None) -> Objective:
    """Build the objective of a ``loss`` mapping; for each task of ``data``, where it has several."""
    return builder.build(config, "loss", slot="loss", offer={"tasks": task_weights(data)})


def labels_only(terms: Mapping[str, Any], data: DataModule) -> Objective:
    """Build the objective of teachers and baselines: label terms alone."""
    built = {name: builder.build(term, f"loss.terms.{name}", slot="term") for name, term in terms.items()}
    return Objective(built, tasks=task_weights(data))


def task_weights(data: DataModule | None) -> dict[str, float] | None:
    """Return the weight of each of several tasks; None for one task."""
    tasks = data.tasks if data is not None else None
    return {name: one.weight for name, one in tasks.items()} if tasks else None


def method(
    experiment: Experiment,
    student: nn.Module,
    objective: Objective,
    task: Task,
    teacher: Teacher | None,
    batches: object = None,
    auxiliary: Auxiliary | None = None,
) -> Method:
    """Build the LightningModule of an experiment."""
    scheduler = experiment.scheduler
    try:
        return builder.build(
            experiment.method,
            "method",
            slot="method",
            student=student,
            objective=objective,
            task=task,
            optimizer=make_optimizer(experiment.optimizer),
            scheduler=None if scheduler is None else builder.build(scheduler, "scheduler", slot="scheduler"),
            teacher=teacher,
            seed=experiment.seed,
            batches=batches,
            auxiliary=auxiliary,
        )
    except UserError as error:  # the teacher is an argument of the method, and a key of the root
        raise error.at("teacher") if error.key == "method.teacher" else error from None


def student_steps(experiment: Experiment, repeats: Sequence[Mapping[str, Any]] = ()) -> dict[str, NetworkStep]:
    """Build the steps that a student goes through: what it starts from, then what is configured.

    Args:
        experiment: experiment whose ``init``, ``steps`` and ``adapter`` name the steps.
        repeats: recorded steps of the network whose weights it starts from.

    Returns:
        Config key → step, in order.
    """
    start: dict[str, NetworkStep] = {}
    if experiment.init in ORIGINS:
        start = {**repeated(repeats), "init": LoadWeights(experiment.init)}
    elif experiment.init in STARTS:
        start = {"init": STARTS[experiment.init]()}
    return {**start, **configured_steps(experiment.steps or (), experiment.adapter)}


def configured_steps(steps: Sequence[Mapping[str, Any]], adapter: Mapping[str, Any] | None) -> dict[str, NetworkStep]:
    """Build the steps of a config: those of ``steps``, and the adapter; config key → step, in order."""
    made = {key: builder.build(one, key, slot="step") for key, one in ((f"steps[{n}]", o) for n, o in enumerate(steps))}
    return made if adapter is None else {**made, "adapter": builder.build(adapter, "adapter", slot="step")}


def auxiliary(experiment: Experiment, student: nn.Module, data: DataModule) -> Auxiliary | None:
    """Build the network that trains beside the student; its first weights are a function of the experiment's seed.

    Raises:
        UserError: if the data are no rows, or what its constructor refuses.
    """
    config = experiment.auxiliary
    if config is None:
        return None
    if not data.classified:
        raise UserError(
            "auxiliary", f"{_of(config)} stands beside a classifier, and data ({data.name}) is text", "auxiliary=none"
        )
    given = {name: value for name, value in config.items() if name != "net"}  # which is built for these classes below

    def make(number: int) -> nn.Module:
        net, key = (config["net"], "auxiliary.net") if config.get("net") else (experiment.student, "student")
        return network(net, data, hash_seed(experiment.seed, 0x70656572, number), key)

    example = next(iter(data.ordered_loader("train", batch_size=2))).to("cpu").inputs
    seed_all(hash_seed(experiment.seed, 0x636F6D70))
    offer = {"make": make, "example": example}
    return builder.build(given, "auxiliary", slot="auxiliary", offer=offer, student=student)


def _of(config: Mapping[str, Any]) -> str:
    return str(config["_target_"]).rpartition(".")[2]


def batch_transform(config: Mapping[str, Any] | None, data: DataModule) -> BatchTransform | None:
    """Build the transform that replaces the data's rows or sequences; None for the data's own."""
    if config is None:
        return None
    return builder.build(config, "batch_transform", slot="batch_transform", offer={**data.network_kwargs, "data": data})


def make_optimizer(config: Mapping[str, Any]) -> Any:
    """Return a function from parameters to an optimizer."""
    return partial(_optimizer, dict(config))


def _optimizer(config: Mapping[str, Any], params: list) -> torch.optim.Optimizer:
    return builder.build(config, "optimizer", slot="optimizer", params=params)


def trainer(config: Mapping[str, Any]) -> TrainerConfig:
    """Build the trainer settings of a ``trainer`` mapping."""
    return builder.build(config, "trainer", slot="trainer")


def dry_run(experiment: Experiment) -> None:
    """Build what needs no data, so that a value out of range is reported before anything is written.

    Raises:
        UserError: what a constructor refuses.
    """
    check_names("name", experiment.name, f"the name of a folder inside {check_output(experiment.output)}")
    objective(experiment.loss)
    trainer(experiment.trainer)
    _recipe(experiment)
    for owner in ("teacher", "pretrained"):
        recipe = getattr(experiment, owner)
        if recipe is not None and recipe.weights and not recipe.checkpoint and not getattr(recipe, "members", None):
            raise UserError(f"{owner}.weights", f"{recipe.weights}, and {owner}.checkpoint names no file", "null")
        if recipe is not None and recipe.optimizer:  # a stage before that teaches has none
            with within(owner):
                _recipe(recipe)


def _recipe(recipe: Any) -> None:
    """Build the optimizer and scheduler of an experiment, a teacher or a pretrained network."""
    if isinstance(recipe.epochs, bool) or not isinstance(recipe.epochs, int) or recipe.epochs < 1:
        raise UserError("epochs", f"{recipe.epochs!r}", "a whole number, at least 1")
    if recipe.scheduler is not None:
        builder.build(recipe.scheduler, "scheduler", slot="scheduler")
    _optimizer(recipe.optimizer, [nn.Parameter(torch.zeros(1))])


def loggers(config: Mapping[str, Any] | None, folder: Path, name: str) -> list:
    """Build the Lightning loggers of one fit: always ``curves.jsonl``, and the configured one."""
    last = folder / "checkpoints" / "last.ckpt"
    done = int(read_checkpoint(last)["global_step"]) if last.exists() else 0
    made: list = [CurvesFile(folder / "curves.jsonl", done)]
    if config is not None:
        built = builder.build(config, "logger", slot="logger", folder=folder, name=name)
        if isinstance(built, TensorBoardLogger):
            made.append(Layout(built))
        if built is not None:
            made.append(built)
    return made
