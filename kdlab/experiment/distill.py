"""``kdlab.distill``: the same parts in plain Python, with a user's networks and loaders, and no configuration."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from kdlab.config import builder
from kdlab.config.options import shipped
from kdlab.errors import UserError, unknown
from kdlab.experiment.model_store import LABELS
from kdlab.functional import Batch, Schedule, SequenceBatch, seed_all
from kdlab.losses import CrossEntropy, Objective, Temperature, Term
from kdlab.methods import FineTune, LearningRate, OfflineKD
from kdlab.models.transforms.auxiliary import Auxiliary
from kdlab.ranges import whole_number
from kdlab.system.files import read_yaml
from kdlab.tasks import Classification, LanguageModeling, Task
from kdlab.teachers import FrozenTeacher, Teacher
from kdlab.training import TrainerConfig, evaluate, fit

Loss = str | Sequence[str] | Mapping[str, Term] | Objective


@dataclass(frozen=True)
class Distilled:
    """Result of :func:`distill`."""

    student: nn.Module
    """Student that was passed in, holding the weights of its best epoch, in eval mode."""
    best_epoch: int
    """Number of the best epoch, counted from 0; the last one without validation."""
    val: dict[str, float]
    """Measures of the student on the validation loader: ``acc``, ``ce``, ``kl`` at temperature 1, ``agreement``, ..."""
    teacher_val: dict[str, float]
    """Measures of the teacher on the validation loader."""
    seconds: float


def distill(
    student: nn.Module,
    teacher: nn.Module | Teacher | None,
    train_loader: Iterable,
    val_loader: Iterable | None = None,
    loss: Loss = "hinton",
    temperature: float | Mapping | Schedule | Temperature | None = None,
    alpha: float | Mapping | Schedule | None = None,
    epochs: int = 30,
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
    scheduler: LearningRate | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    trainer: Mapping[str, Any] | None = None,
    auxiliary: Auxiliary | None = None,
) -> Distilled:
    """Train ``student`` to imitate ``teacher``, in place.

    Args:
        student: network that takes a batch of inputs and returns logits (B, C); for sequences, see
            :class:`~kdlab.functional.Batch`, it takes the inputs as keywords and returns logits of all positions.
        teacher: trained network with the same interface; it stays in eval mode and without gradients. Or a
            :class:`~kdlab.teachers.Teacher`, which answers in a way of its own. None trains by ``loss`` if no term of
            it needs one (``"mutual"``, ``"label_smoothing"``), else on labels alone.
        train_loader: iterable with a length that can be iterated again, of ``(inputs, targets)`` pairs or
            :class:`~kdlab.functional.Batch` es; targets are class ids, -100 for a row without a label.
        val_loader: iterable of the same kind; None keeps the last epoch.
        loss: name of a recipe of ``conf/loss`` such as ``"dkd"``, several of them, named terms, or an objective.
        temperature: value for soft targets: a number, a schedule ``{"start": 8, "end": 1, "shape": "cosine"}`` or a
            :class:`~kdlab.losses.Temperature`; None takes 4.
        alpha: share of distillation in [0, 1], a number or a schedule, for recipes that have one.
        epochs: number of epochs, at least 1.
        optimizer: function that makes an optimizer of parameters; None is SGD with Nesterov momentum at 0.05.
        scheduler: course of the learning rate; None is half a cosine down to 0.
        seed: seed of dropout and of projectors' first weights. The order of examples is the loader's.
        folder: folder of the checkpoints; a fit that finds one there goes on from it. None keeps nothing.
        trainer: arguments of :class:`~kdlab.training.TrainerConfig`, such as ``{"accelerator": "cpu"}``.
        auxiliary: network that trains beside the student, for a loss that uses it, such as
            ``kdlab.models.transforms.auxiliary.Peers(student, [another_network])`` for ``loss="mutual"`` or
            ``Exits(student, ["layer1", "layer2"], inputs)`` for ``loss="byot"``.

    Raises:
        UserError: if something does not fit together, in one line.

    Example:
        >>> kdlab.distill(student, teacher, train_loader, val_loader, loss="dkd", epochs=30)  # doctest: +SKIP
    """
    whole_number("epochs", epochs)
    if teacher is student:
        raise UserError("teacher", "is the student itself", "another network, such as a copy of it")
    if teacher is None and alpha is not None:
        raise UserError("alpha", f"{alpha}, and there is no teacher to distil from", "None")
    objective = _objective(loss, temperature, alpha)
    _beside(auxiliary, student, objective)
    if teacher is None and objective.needs_teacher and auxiliary is not None:
        raise UserError("teacher", "None, and the loss has terms that need one", "a teacher, or a loss without")
    if teacher is None and objective.needs_teacher:
        objective = _objective({}, temperature, alpha)
    try:
        training = TrainerConfig(**(trainer or {}))
    except TypeError as error:
        raise UserError("trainer", error, "arguments of kdlab.training.TrainerConfig") from None
    data = _Loaders(train_loader, val_loader, training)
    task = _task(teacher if isinstance(teacher, nn.Module) else student, data, training.device)
    taught = FrozenTeacher(teacher, task, objective.teacher_layers) if isinstance(teacher, nn.Module) else teacher
    seed_all(seed)
    parts: dict[str, Any] = {
        "student": student,
        "objective": objective,
        "task": task,
        "optimizer": optimizer or _sgd,
        "scheduler": scheduler or LearningRate("cosine"),
        "seed": seed,
        "auxiliary": auxiliary,
    }
    method = FineTune(**parts) if taught is None else OfflineKD(**parts, teacher=taught)
    with tempfile.TemporaryDirectory() if folder is None else nullcontext(folder) as place:
        fitted = fit(method, data, training, Path(place), epochs)
    measures: dict[str, dict[str, float]] = {"student": {}, "teacher": {}}
    if val_loader is not None:
        device = training.device
        student.to(device)
        for name, one in (("student", student), ("teacher", teacher)):
            if one is not None:
                answers = _answers(task, one) if isinstance(one, nn.Module) else one
                measures[name] = evaluate(task, answers, data.val_dataloader(), device, taught, "val")
    return Distilled(student.eval(), fitted.best_epoch, measures["student"], measures["teacher"], fitted.seconds)


def recipe(names: str | Sequence[str]) -> dict[str, Any]:
    """Return the ``loss`` mapping of one or more recipes in ``conf/loss``.

    Raises:
        UserError: for a name that is not there, or two recipes that fill the same term.
    """
    folder = shipped() / "loss"
    merged: dict[str, Any] = {"terms": {}}
    for name in [names] if isinstance(names, str) else names:
        path = folder / f"{name}.yaml"
        if not path.is_file():
            raise unknown("loss", name, [p.stem for p in folder.glob("[!_]*.yaml")], "recipe")
        config = read_yaml(path)
        doubled = set(merged["terms"]) & set(config.get("terms", {}))
        if doubled:
            raise UserError("loss", f"{name} fills the term {min(doubled)!r} again", "one recipe for each term")
        merged["terms"].update(config.pop("terms", {}))
        merged.update(config)
    return merged


def _objective(
    loss: Loss, temperature: float | Mapping | Schedule | Temperature | None, alpha: float | Mapping | Schedule | None
) -> Objective:
    if isinstance(loss, Objective):
        if temperature is not None or alpha is not None:
            raise UserError("temperature, alpha", "the objective has its own", "None beside an objective")
        return loss
    terms: dict[str, Term] = {"ce": CrossEntropy()}
    if isinstance(loss, Mapping):
        terms.update(loss)
    else:
        config = recipe(loss)
        if alpha is not None and "alpha" not in config:
            raise UserError("alpha", f"{alpha}, and the recipe {loss!r} has none", "None")
        alpha = config.get("alpha") if alpha is None else alpha
        for name, term in config["terms"].items():
            whole = {**LABELS.get(name, {}), **term}  # some change how labels count
            terms[name] = builder.build(whole, f"loss.terms.{name}", slot="term")
    return Objective(terms, 4.0 if temperature is None else temperature, alpha)


def _beside(auxiliary: Auxiliary | None, student: nn.Module, objective: Objective) -> None:
    """Refuse an auxiliary network that does not belong to the student or to the loss, and a loss that lacks its own.

    Raises:
        UserError: naming the term.
    """
    there = "" if auxiliary is None else auxiliary.kind
    if auxiliary is not None and auxiliary.student is not student:
        raise UserError("auxiliary", "stands beside another network", "one that was made for this student")
    wanted = {str(term.auxiliary): name for name, term in objective.terms.items() if term.auxiliary}
    for kind, name in wanted.items():
        if kind != there:
            made = "Peers(student, [network])" if kind == "peers" else "Exits(student, layers, inputs)"
            raise UserError(
                "auxiliary",
                f"{there or None}, and loss.terms.{name} looks at {kind}",
                f"kdlab.models.transforms.auxiliary.{made}, or another loss",
            )
    if there and there not in wanted:
        raise UserError("auxiliary", f"{there}, and no term of the loss looks at it", "None, or another loss")


def _sgd(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)


def _answers(task: Task, net: nn.Module) -> Any:
    net.eval()
    return lambda batch, split: task.outputs(net, batch)


def _task(net: nn.Module, data: _Loaders, device: torch.device) -> Task:
    """Return the task of the first batch, with the number of classes of the network's logits."""
    training = net.training
    net.to(device).eval()
    batch = next(iter(data.train)).to(device)
    with torch.no_grad():
        shape = tuple(Classification(2).outputs(net, batch).logits.shape)
    net.train(training)
    wanted = "(B, C)" if not isinstance(batch, SequenceBatch) else "(B, T, C)"
    if len(shape) != wanted.count(",") + 1 or shape[-1] < 2:
        raise UserError("teacher", f"returns logits of shape {shape}", f"{wanted} with C at least 2")
    return Classification(shape[-1]) if not isinstance(batch, SequenceBatch) else LanguageModeling(shape[-1])


class _Batches:
    """Wrapper of a user's loader that yields batches, with the attributes that a fit needs."""

    def __init__(self, loader: Iterable, key: str) -> None:
        if not hasattr(loader, "__len__"):
            raise UserError(key, f"{type(loader).__name__} has no length", "a loader with a length")
        self.loader, self.key = loader, key
        self.skip = 0
        self.sampler = getattr(loader, "sampler", None)
        self.batch_sampler = None

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Batch]:
        skip, self.skip = self.skip, 0
        for i, item in enumerate(self.loader):
            if i >= skip:
                yield item if isinstance(item, Batch) else _batch(item, self.key)


def _batch(item: object, key: str) -> Batch:
    if not isinstance(item, list | tuple) or len(item) != 2:
        raise UserError(key, f"gives {type(item).__name__}", "(inputs, targets) pairs, or Batches")
    inputs, targets = item
    if not isinstance(targets, Tensor) or targets.ndim not in (1, 2):
        what = f"shape {tuple(targets.shape)}" if isinstance(targets, Tensor) else type(targets).__name__
        raise UserError(key, f"targets of {what}", "batches of class ids (B,) or of soft targets (B, C)")
    return Batch(inputs, targets if targets.is_floating_point() else targets.long())


class _Loaders(SimpleNamespace):
    """Data module of two loaders."""

    def __init__(self, train: Iterable, val: Iterable | None, training: TrainerConfig) -> None:
        if training.accumulate > 1:
            raise UserError("trainer.accumulate", "a loader's batch is one optimizer step here", "1")
        self.train = _Batches(train, "train_loader")
        self.val = None if val is None else _Batches(val, "val_loader")
        if not len(self.train):
            raise UserError("train_loader", "is empty", "at least one batch")
        self.counts = {"val": len(self.val) if self.val is not None else 0}
        self.batch_size = len(next(iter(self.train)))
        self.has_questions = False

    def to(self, device: torch.device, *, accumulate: int = 1) -> None:
        """Do nothing: Lightning moves each batch."""

    def train_dataloader(self) -> _Batches:
        return self.train

    def val_dataloader(self) -> _Batches:
        assert self.val is not None
        return self.val
