"""Fits, each in its own folder: begun, resumed or already done; and the evaluation of the result."""

from __future__ import annotations

import logging
import signal
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor

from kdlab.data import DataModule, TrainingData
from kdlab.errors import RunFailed, UserError
from kdlab.functional import Batch, finite, hash_seed, seed_all
from kdlab.methods.lightning_internals import batches_done, epochs_done
from kdlab.methods.method import Method
from kdlab.methods.training_warnings import no_use, nothing_learned, trace
from kdlab.models import read_state, save_weights
from kdlab.models.cost import first_row
from kdlab.system.files import make_folder
from kdlab.training.checkpoints import CURE, Saver, read_checkpoint
from kdlab.training.gradient_stats import Gradients
from kdlab.training.progress import Progress
from kdlab.training.samples import Samples
from kdlab.training.trainer import TrainerConfig

log = logging.getLogger("kdlab")


@dataclass
class FitResult:
    """Result of a fit: the weights, the best epoch and its measures."""

    weights: Path
    """Deployable weights: the student at its best epoch."""
    best_epoch: int
    """Number of the best epoch, counted from 0."""
    epochs: int
    steps: int
    seconds: float
    """Total training time in seconds, over all resumed runs."""
    hardware: dict[str, Any]
    measures: dict[str, float]
    """Measures of the best epoch on the validation split."""
    warnings: list[str] = field(default_factory=list)
    """Reasons why its measures mean little, such as that nothing was learned."""


def fit(
    method: Method,
    data: TrainingData,
    training: TrainerConfig,
    folder: Path,
    epochs: int,
    loggers: list | None = None,
    name: str = "student",
    continued: bool = False,
) -> FitResult:
    """Train ``method.student``, and leave it holding the weights of its best epoch.

    If ``folder`` holds ``checkpoints/last.ckpt``, training goes on from there, to the same weights as if it had never
    stopped.

    Args:
        method: method to train.
        data: data module; it is placed on the compute device here.
        training: settings of hardware, precision and saving.
        folder: folder that gets ``checkpoints/`` and the deployable weights.
        epochs: number of epochs, at least 1.
        loggers: Lightning loggers for the curves.
        name: name of the network that is trained, for the progress bar.
        continued: whether the checkpoint may be of a fit with other settings of optimizer and scheduler; this one's
            count.

    Raises:
        UserError: if the training split is empty, or the checkpoint is damaged or of another network.
        RunFailed: if the loss stops being finite, or the disk is full.
    """
    last = folder / "checkpoints" / "last.ckpt"
    resume = last if last.exists() else None
    loader, example = _place(method, data, training, folder)
    hardware = _adapt(method, example, data.batch_size, training, name)
    saver = Saver(
        folder / "checkpoints",
        method.task.score,
        training.save_minutes,
        getattr(method, "patience", None),
        method.task.greater,
        method.seed,
    )
    callbacks = [saver, *_callbacks(data, training, folder, epochs, name, bool(loggers))]
    if resume is not None:
        log.info("%s: going on from %s", name, resume)
        callbacks += [_SkipDone(loader), *([_OwnSettings()] if continued else [])]
    with _quiet_lightning():
        trainer = training.trainer(folder, epochs, hardware["precision"], callbacks, loggers or [])

    before = trace(method.student)
    if resume is None or not _finished(resume, saver, epochs):
        validation = data.val_dataloader() if data.counts["val"] else None
        with _quiet_lightning():
            _run(trainer, method, loader, validation, resume)
    steps = int(trainer.global_step) or _steps_of(resume)
    if not steps:
        raise RunFailed(f"{name}: no optimizer step was made; look at data.batch_size and epochs")
    idle = _nothing_learned(method, before, steps) if resume is None else None  # else the first weights are not known

    weights = _keep_best(method, saver, folder, example, f"{name}: its outputs are not finite after step {steps}")
    warned = [f"{name}: {why}" for why in (idle, no_use(saver.best_measures, method.task)) if why]
    for warning in warned:
        log.warning(warning)
    seconds = saver.seconds or saver.resumed_seconds
    return FitResult(weights, saver.best_epoch, saver.epochs, steps, seconds, hardware, saver.best_measures, warned)


def _place(method: Method, data: TrainingData, training: TrainerConfig, folder: Path) -> tuple[Any, Batch]:
    """Make the folder, move data, networks and terms to the device; return the loader, and its first batch."""
    method.log_every = training.log_every
    folder.mkdir(parents=True, exist_ok=True)
    make_folder(folder / "checkpoints")
    data.to(training.device, accumulate=training.accumulate)
    loader = data.train_dataloader()
    if not len(loader):
        raise UserError("data", "the training split gives no batch", "at least 2 rows, and a batch_size below it")
    example = first_batch(loader).to(training.device)
    method.to(training.device)
    if method.teacher is not None:
        method.teacher.to(training.device)
    seed_all(hash_seed(method.seed, 0x7465726D))  # what terms make, such as projectors
    method.prepare(example, data.counts.get("train"))
    return loader, example


def _adapt(method: Method, example: Batch, batch_size: int, training: TrainerConfig, name: str) -> dict[str, Any]:
    """Choose precision, layout and threads for the student, log them, and return what ``result.json`` records."""
    hardware = training.adapt(method.student, first_row(example.inputs), batch_size)
    method.channels_last = hardware["channels_last"]
    layout = ", channels last" if hardware["channels_last"] else ""
    log.info(
        "%s: on %s (%s), %s%s, %d thread%s",
        *(name, hardware["device"], hardware["name"], hardware["precision"], layout, hardware["threads"]),
        "s" * (hardware["threads"] != 1),
    )
    return hardware


def _callbacks(
    data: TrainingData, training: TrainerConfig, folder: Path, epochs: int, name: str, logged: bool
) -> list[pl.Callback]:
    """Return the callbacks beside the one that saves; only those wanted, as each costs every step six calls."""
    callbacks: list[pl.Callback] = []
    if training.progress != "none":
        callbacks.append(Progress(name, training.progress, training.log_every))
    if data.counts["val"] and data.has_questions:
        callbacks.append(Samples(cast(DataModule, data), folder / "samples.md", every=max(1, epochs // 10)))
    if training.gradients is not None and logged:
        callbacks.append(Gradients(training.gradients))
    return callbacks


def _nothing_learned(method: Method, before: Tensor, steps: int) -> str | None:
    """Return why the student learned nothing, in words; None where it learned."""
    pull = method.greatest_gradient
    unchanged = torch.equal(before, trace(method.student))
    return nothing_learned(unchanged, None if pull is None else float(pull), method.last_curves, steps)


def _keep_best(method: Method, saver: Saver, folder: Path, example: Batch, broken: str) -> Path:
    """Give the student the weights of its best epoch, check its outputs, and write the weights.

    Raises:
        RunFailed: with the text of ``broken``, if its outputs are not finite.
    """
    saver.check_best()
    best = read_state(folder / "checkpoints" / "best.pt")
    method.student.load_state_dict(best)
    method.student.to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
    with torch.no_grad():  # without validation nobody has looked at what the last step made
        outputs = method.task.outputs(method.student, example)
        if not all(finite(one) for one in (outputs.logits, *outputs.heads.values())):
            raise RunFailed(f"{broken}; {CURE}")
    weights = folder / method.weights_file
    save_weights(best, weights)
    return weights


def _run(trainer: Any, method: Method, loader: Any, validation: Any, resume: Path | None) -> None:
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit(method, train_dataloaders=loader, val_dataloaders=validation, ckpt_path=resume, weights_only=True)
    except RuntimeError as error:
        if resume is not None and "Error(s) in loading state_dict" in str(error):
            raise UserError("resume", f"{resume} holds another network than the one configured") from None
        raise
    except SystemExit as end:
        if not isinstance(end.__context__, KeyboardInterrupt):
            raise
        # Lightning turns Ctrl-C into status 1, and leaves the next one ignored
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, on_interrupt)
        raise KeyboardInterrupt from None


def _finished(checkpoint: Path, saver: Saver, epochs: int) -> bool:
    """Return whether a checkpoint has nothing left to train: Lightning would make zero steps, or go on after a stop."""
    state = read_checkpoint(checkpoint)
    mine = state["callbacks"].get(saver.state_key)
    if mine is None:
        raise UserError("resume", f"{checkpoint} was not written by kdlab", "checkpoints/last.ckpt of a run")
    saver.check_seed(mine)
    if not (mine["stopped"] or epochs_done(state) >= epochs):
        return False
    saver.load_state_dict(mine)
    return True


def _steps_of(checkpoint: Path | None) -> int:
    return int(read_checkpoint(checkpoint)["global_step"]) if checkpoint else 0


class _SkipDone(pl.Callback):
    """Callback that skips the micro-batches that the checkpoint has seen, after a resume inside an epoch.

    Lightning restores its counters and starts the loader anew; the order is a function of (seed, epoch), so leaving
    out the first ones continues the epoch.
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        done = batches_done(trainer)
        self.loader.skip = done if done < trainer.num_training_batches else 0


class _OwnSettings(pl.Callback):
    """Callback that replaces the optimizer settings of a checkpoint by the configured ones."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._groups: list[dict[str, Any]] = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # made already, and not yet overwritten by the checkpoint
        self._groups = [
            {key: value for key, value in group.items() if key != "params"}
            for optimizer in trainer.optimizers
            for group in optimizer.param_groups
        ]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        for group, own in zip(groups, self._groups, strict=True):
            group.update(own)
            group["initial_lr"] = own.get("initial_lr", own["lr"])
        for config in trainer.lr_scheduler_configs:
            course: Any = config.scheduler
            course.last_epoch = trainer.global_step
            course.base_lrs = [group["initial_lr"] for group in course.optimizer.param_groups]
            for group, base, factor in zip(groups, course.base_lrs, course.lr_lambdas, strict=True):
                group["lr"] = base * factor(course.last_epoch)


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Hide Lightning's start-up lines and hints, which repeat those of kdlab."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "lightning")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def first_batch(loader: Iterable[Batch]) -> Batch:
    """Return the first batch, to learn shapes from."""
    return next(iter(loader))
