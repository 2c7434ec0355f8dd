"""Base class of all methods: the training step, and what every method shares around it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from kdlab.batch_transforms import BatchTransform
from kdlab.errors import RunFailed
from kdlab.functional import Batch, Outputs, Taps, seed_torch
from kdlab.losses import Objective
from kdlab.methods.learning_rate import LearningRate
from kdlab.methods.lightning_internals import QuickModule, set_measures, with_signature
from kdlab.methods.training_warnings import greatest
from kdlab.models import frozen_modules
from kdlab.models.transforms.auxiliary import Auxiliary
from kdlab.tasks import Task
from kdlab.teachers import Teacher

MOST_APART = 2**16
"""Largest number of optimizer steps between two points of a curve; all between are held in memory."""

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


_RANDOM_LAYERS = (nn.modules.dropout._DropoutNd, nn.modules.rnn.RNNBase, nn.MultiheadAttention)


class Method(QuickModule):
    """Student that learns from labels, a teacher, or both; base class of all methods.

    Args:
        student: network to train; what an export contains.
        objective: named terms and their weights.
        task: task that says how a network reads a batch, and what is measured.
        optimizer: function that makes an optimizer of parameters.
        scheduler: course of the learning rate; None keeps it constant.
        teacher: teacher to learn from; None for none.
        seed: seed of dropout and other randomness inside networks, which is a function of (seed, epoch, batch).
        batches: batch transform that replaces the data's sequences, such as by the student's own text; None for the
            data's own.
        auxiliary: network that trains beside the student, and is in no export; None for none.
    """

    weights_file = "student.pt"
    """Name of the deployable weights in the run folder."""

    def __init__(
        self,
        student: nn.Module,
        objective: Objective,
        task: Task,
        optimizer: MakeOptimizer,
        scheduler: LearningRate | None = None,
        teacher: Teacher | None = None,
        seed: int = 0,
        batches: BatchTransform | None = None,
        auxiliary: Auxiliary | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.auxiliary = auxiliary
        self.objective = objective
        self.task = task
        self.teacher = teacher
        self.seed = seed
        self.batches = batches
        self.log_every = 50
        self.channels_last = False
        self._make_optimizer, self._scheduler = optimizer, scheduler
        self._curves: TermAccumulator | None = None
        self.last_curves: dict[str, float] = {}
        """The means of loss and terms that were written last."""
        self.greatest_gradient: Tensor | None = None
        """The greatest absolute value in the student's gradients, of the steps that were looked at."""
        self._random = False

    # ---- training ------------------------------------------------------------------------------------------------

    @override
    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        # kdlab's loaders give batches that are there already; another's move
        return batch if batch.targets.device == device else batch.to(device)

    @with_signature
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Train on one micro-batch: run student and teacher, and return the total loss."""
        if self._random:
            seed_torch(self.seed, self.current_epoch, batch_idx, self.global_rank)
        self.objective.progress = self._progress()
        batch, sequence_curves = self._sequences(self._layout(batch), batch_idx)
        teacher = self.teacher(batch.clean_view()) if self.teacher is not None and self.uses_teacher else None
        batch, extra = self.relabel(batch, teacher)
        student = self.forward_student(batch)
        losses = self.objective(student, teacher, batch)
        parts = batch.window.parts if batch.window is not None else 1
        assert self._curves is not None
        self._curves.add(losses.total.detach(), losses.values, losses.counted, parts, {**sequence_curves, **extra})
        return losses.total

    @cached_property
    def uses_teacher(self) -> bool:
        """Whether training uses the teacher's outputs; with labels alone the teacher only serves for comparison."""
        relabels = type(self).relabel is not Method.relabel
        return self.objective.needs_teacher or self.objective.alpha is not None or relabels

    def forward_student(self, batch: Batch) -> Outputs:
        """Return the student's outputs, with layers that terms use and, in training, those of the auxiliary network."""
        layers = self.objective.student_layers
        if self.auxiliary is None:
            return self.task.outputs(self.student, batch, layers)
        with Taps(self.student, layers) as features:  # their names are the student's
            outputs = self.task.outputs(self.auxiliary, batch)
        outputs.features.update(features)
        return outputs

    @torch.no_grad()
    def dry_forward(self, batch: Batch) -> Outputs:
        """Return the student's training outputs computed in eval mode: no dropout, and no statistics change."""
        self.student.eval()
        if self.auxiliary is not None:
            self.auxiliary.eval().training = True  # itself alone, so that it adds what it adds in training
        outputs = self.forward_student(batch)
        self.train()
        return outputs

    def relabel(self, batch: Batch, teacher: Outputs | None) -> tuple[Batch, dict[str, Tensor]]:
        """Return the batch as the objective should see it, with curves about the change; subclasses override this."""
        return batch, {}

    def prepare(self, batch: Batch, examples: int | None = None) -> None:
        """Let terms make their projectors; call once, before ``fit``, with any batch of the training split.

        Args:
            batch: batch to learn shapes from.
            examples: number of examples in the training split; None where it is unknown.
        """
        self.objective.setup(self.student, self.teacher.net if self.teacher is not None else None, examples)
        with torch.no_grad():
            student = self.dry_forward(batch)
            self.student.eval()
            teacher = self.teacher(batch) if self.teacher is not None else None
            if teacher is None and self.teacher is not None:  # it will be this student, later
                teacher = self.task.outputs(self.student, batch, self.teacher.layers)
        self.objective.prepare(student, teacher)
        self.train()

    def train(self, mode: bool = True) -> Method:
        """Set train mode for what trains; frozen layers keep their BatchNorm statistics and have no dropout."""
        super().train(mode)
        if mode:
            for module in frozen_modules(self.student):
                module.eval()
        return self

    @override
    def on_fit_start(self) -> None:
        if self.channels_last:
            for net in filter(None, (self.student, self.auxiliary)):
                net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.teacher is not None:
            self.teacher.to(self.device)
        # sequence models drop out by functions, which no list of their layers shows
        trained = [*self.student.modules(), *(self.auxiliary.modules() if self.auxiliary is not None else ())]
        self._random = self.task.target != "class" or any(isinstance(m, _RANDOM_LAYERS) for m in trained)

    @override
    def on_train_start(self) -> None:
        self._steps = max(int(self.trainer.estimated_stepping_batches), 1)
        apart = min(self.log_every, self._steps, MOST_APART)
        self._curves = TermAccumulator(self.objective.names, apart * self.trainer.accumulate_grad_batches)

    @override
    def on_train_epoch_start(self) -> None:
        if self.teacher is not None:
            self.teacher.update(self.student, self.current_epoch, self.trainer.max_epochs or 1, step_done=False)

    @override
    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        step = self.trainer.global_step
        if step & (step + 1):  # looks at steps 1, 2, 4, 8, ...: often at first, and hardly ever in the end
            return
        now = greatest([p.grad for p in self.student.parameters() if p.grad is not None])
        if now is not None:
            before = self.greatest_gradient
            self.greatest_gradient = now if before is None else torch.maximum(before, now)

    @override
    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.teacher is not None:  # here, before a checkpoint of this step is saved
            self.teacher.update(self.student, self.current_epoch, self.trainer.max_epochs or 1, step_done=True)

    @override
    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches:
            return
        assert self._curves is not None
        if self._curves.full:
            self.flush_curves()

    def flush_curves(self) -> None:
        """Write the means of the steps since the last call; a term's mean is over the steps that had rows for it.

        Raises:
            RunFailed: if a term was not finite at one of those steps; names the first step and the term.
        """
        assert self._curves is not None
        means = self._curves.take(self.global_step, self.trainer.accumulate_grad_batches, self.trainer.strategy)
        if not means:
            return
        self.last_curves = means
        curves = {f"train/{name}": value for name, value in means.items()}
        curves["train/lr"] = self.trainer.optimizers[0].param_groups[0]["lr"]
        if self.objective.needs_teacher:
            curves["train/temperature"] = self.objective.temperature.now
            if self.objective.alpha is not None:
                curves["train/alpha"] = self.objective.alpha(self.objective.progress)
        curves["epoch"] = self.global_step * (self.trainer.max_epochs or 1) / self._steps
        for logger in self.trainer.loggers:
            logger.log_metrics(curves, self.global_step)

    def _progress(self) -> float:
        return self.global_step / self._steps

    def _sequences(self, batch: Batch, batch_idx: int) -> tuple[Batch, dict[str, Tensor]]:
        """Return the batch to learn from, in which a source may have replaced the sequences, and curves about them."""
        if self.batches is None:
            return batch, {}
        self.batches.progress = self._progress()
        part = batch_idx % self.trainer.accumulate_grad_batches
        return self.batches(batch, self.student, self.teacher, self.task, self.seed, self.global_step, part)

    def _layout(self, batch: Batch) -> Batch:
        if self.channels_last and isinstance(batch.inputs, Tensor) and batch.inputs.ndim == 4:
            batch.inputs = batch.inputs.contiguous(memory_format=torch.channels_last)
        return batch

    # ---- validation ----------------------------------------------------------------------------------------------

    @override
    def on_validation_epoch_start(self) -> None:
        self._measures = self.task.measures()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Count one batch of the validation split; the divergence is always at temperature 1."""
        batch = self._layout(batch)
        teacher = self.teacher(batch, "val") if self.teacher is not None else None
        self._measures.update(self.task.outputs(self.student, batch), teacher, batch)

    @override
    def on_validation_epoch_end(self) -> None:
        if not self._measures.rows:
            return
        measures = {f"val/{name}": value for name, value in self._measures.compute().items()}
        set_measures(self.trainer, measures)
        for logger in self.trainer.loggers:
            logger.log_metrics({**measures, "epoch": self.current_epoch}, self.global_step)

    # ---- optimizer and state -------------------------------------------------------------------------------------

    @override
    def configure_optimizers(self) -> Any:
        trained = [p for p in self.parameters() if p.requires_grad]
        free = [p for p in trained if getattr(p, "no_decay", False)]
        rest = [p for p in trained if not getattr(p, "no_decay", False)]
        groups: list[Any] = [{"params": rest}, {"params": free, "weight_decay": 0.0}] if free else rest
        optimizer = self._make_optimizer(groups)
        if self._scheduler is None:
            return optimizer
        epochs = self.trainer.max_epochs or 1
        steps = max(int(self.trainer.estimated_stepping_batches), 1)
        course = self._scheduler
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: course(step / steps, epochs))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for name in ("teacher", "batches"):
            part = getattr(self, name)
            if part is not None and (state := part.state_dict()):
                checkpoint[name] = state

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.teacher is not None and "teacher" in checkpoint:
            self.teacher.restore(checkpoint["teacher"], self.student)
        if self.batches is not None and "batches" in checkpoint:
            self.batches.load_state_dict(checkpoint["batches"])


class TermAccumulator:
    """Buffer of every step's terms in one tensor, so that a step costs two small copies and no synchronisation.

    A term's mean leaves out the steps in which nothing counted for it, such as those without labels on a student's own
    text; a term without any other step has no mean.

    Args:
        names: names of the terms.
        room: number of micro-batches that it holds before it must be emptied.
    """

    def __init__(self, names: list[str], room: int) -> None:
        self.names = ["loss", *names]
        self.room = room
        self.used = 0
        self._rows: Tensor | None = None
        self._counted: list[tuple[bool, ...]] = []
        self._extra: list[dict[str, Tensor]] = []

    @property
    def full(self) -> bool:
        """Whether there is no room for the next step."""
        return self.used >= self.room

    def add(
        self, total: Tensor, values: Tensor, counted: tuple[bool, ...], parts: int, extra: dict[str, Tensor]
    ) -> None:
        """Add one micro-batch: the scaled total, its share of each term, and which terms its step counts for."""
        if self._rows is None:
            self._rows = torch.zeros(self.room, len(self.names), device=values.device)
        row = self._rows[self.used]
        row[0] = total
        torch.mul(values, parts, out=row[1:])
        self._counted.append(counted)
        if extra:
            self._extra.append(extra)
        self.used += 1

    def take(self, step: int, accumulate: int, strategy: Any) -> dict[str, float]:
        """Return the means since the last call, over all processes, and empty the buffer.

        Raises:
            RunFailed: if a number was not finite, whether it counts or not.
        """
        if self._rows is None or not self.used:
            return {}
        rows = self._rows[: self.used]
        finite = rows.isfinite()
        if not finite.all():
            first = int((~finite).any(1).nonzero()[0])
            terms = [f"{n} = {float(v):g}" for n, v in zip(self.names, rows[first], strict=True) if not v.isfinite()]
            at = step - (self.used - 1 - first) // accumulate
            raise RunFailed(
                f"the loss is not finite at step {at}: {', '.join(terms[1:] or terms)}; try a smaller optimizer.lr, "
                "or trainer.clip=1, and look at the inputs"
            )
        counts = torch.tensor([(True, *counted) for counted in self._counted], device=rows.device).to(rows.dtype)
        both = strategy.reduce(torch.stack([(rows * counts).sum(0), counts.sum(0)]), reduce_op="mean")
        sums = zip(self.names, *both.tolist(), strict=True)
        means = {name: total / steps for name, total, steps in sums if steps}
        for name in self._extra[0] if self._extra else ():
            stacked = torch.stack([e[name] for e in self._extra]).float()
            means[name] = float(stacked.nanmean())
        self.used, self._counted, self._extra = 0, [], []
        return means
