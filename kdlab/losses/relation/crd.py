"""Contrastive representation distillation, and its memory of every training example."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from typing_extensions import override

from kdlab.errors import UserError
from kdlab.functional import Batch, Outputs, Schedule, hash_seed, noise_contrast
from kdlab.functional.relation.relation import unit
from kdlab.losses.feature.layer_term import LayerTerm, project
from kdlab.losses.temperature import check_temperature
from kdlab.ranges import share, whole_number

UNKNOWN = -1
"""Class of an example that has no label, or was not seen yet."""


class CRD(LayerTerm):
    r"""CRD: contrast of the pair of embeddings of one example with pairs with other examples; one value per row.

    .. math::
        -\log h(s_i, \bar t_i) - \sum_{j=1}^{N} \log\big(1 - h(s_i, \bar t_j)\big)
        -\log h(t_i, \bar s_i) - \sum_{j=1}^{N} \log\big(1 - h(t_i, \bar s_j)\big), \qquad
        h(a, b) = \frac{e^{a \cdot b / \tau}}{e^{a \cdot b / \tau} + Z N / M}

    s and t are the networks' features through a linear map each, of unit length; the maps train, and are no part of the
    student. Of each of the M training examples a memory holds both embeddings, :math:`\bar s_i` and :math:`\bar t_i`,
    as a running mean over the epochs; the N negatives are drawn from it. Tian et al., *Contrastive Representation
    Distillation*, ICLR 2020. As in their code both networks are anchors in turn, the positive comes from the memory too
    (before this step's change), and Z (one for each anchor) is fixed at the first step: M times the mean of
    :math:`e^{a \cdot b / \tau}`, here over the negatives.

    Negatives are drawn evenly, with repetition (in their code without, where there are enough), from the examples of
    other classes: the memory learns each example's class as it is seen. Until then, or without a label, an example
    counts as of another class than all others (and one not seen yet is remembered as a random direction). A row without
    a label takes all examples but itself.

    The memory grows by 2·M·``dim`` numbers, is part of checkpoints, and belongs to one process.

    Args:
        student_layer: the layer before the classifier, such as ``pool``.
        teacher_layer: the same layer of the teacher.
        negatives: N, drawn for each row; at most M - 1, beyond which more draws would only repeat.
        dim: width of the embeddings.
        temperature: τ, above 0.
        momentum: share of what is remembered that stays when an example is seen again, in [0, 1).
        seed: seed of the first memory and the draws, which are functions of (seed, steps taken).
        weight: see :class:`~kdlab.losses.Term`.

    Raises:
        UserError: if a value is not as said, or there are several pairs of layers.
    """

    def __init__(
        self,
        student_layer: str,
        teacher_layer: str,
        negatives: int = 16384,
        dim: int = 128,
        temperature: float = 0.07,
        momentum: float = 0.5,
        seed: int = 0,
        weight: float | Mapping | Schedule = 1.0,
    ) -> None:
        super().__init__(student_layer, teacher_layer, weight)
        if len(self.student_layers) > 1:
            raise UserError("student_layer, teacher_layer", f"{len(self.student_layers)} pairs", "one")
        for key, value in (("negatives", negatives), ("dim", dim)):
            whole_number(key, value)
        check_temperature("temperature", temperature)
        share("momentum", momentum, one=False)
        self.negatives, self.dim, self.temperature = negatives, dim, temperature
        self.momentum, self.seed = momentum, seed
        self.maps = nn.ModuleDict()
        self._examples: int | None = None
        self.student_memory: Tensor
        self.teacher_memory: Tensor
        self.classes: Tensor
        self.log_z: Tensor
        self.step: Tensor
        for name in ("student_memory", "teacher_memory", "classes", "log_z", "step"):
            self.register_buffer(name, None)

    @override
    def setup(self, student: nn.Module, teacher: nn.Module | None, examples: int | None) -> None:
        self._examples = examples

    @override
    def prepare(self, student: Outputs, teacher: Outputs | None) -> None:
        if self.maps:
            return
        if self._examples is None or self._examples < 2:
            raise UserError(
                "examples",
                f"{self._examples}",
                ("training data of a known number of examples, at least 2 (the memory of crd holds every one)"),
            )
        ((s, t),) = self.captured(student, teacher)
        device = s.device
        self.maps["student"] = nn.Linear(s.flatten(1).shape[1], self.dim, device=device)
        self.maps["teacher"] = nn.Linear(t.flatten(1).shape[1], self.dim, device=device)
        for number, name in enumerate(("student_memory", "teacher_memory")):
            generator = torch.Generator().manual_seed(hash_seed(self.seed, 0, number))
            first = unit(torch.randn(self._examples, self.dim, generator=generator))
            setattr(self, name, first.to(device))
        self.classes = torch.full((self._examples,), UNKNOWN, device=device)
        self.log_z = torch.zeros(2, device=device)
        self.step = torch.zeros((), dtype=torch.int64, device=device)

    @override
    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        if not self.maps:
            raise UserError("CRD", "call meet and prepare(student, teacher) once before training, to make its memory")
        key = self._examples_of(batch)
        ((student_feature, teacher_feature),) = self.captured(student, teacher)
        with torch.autocast(student_feature.device.type, enabled=False):
            s = unit(project(student_feature.flatten(1), with_=self.maps["student"]))
            t = unit(project(teacher_feature.flatten(1), with_=self.maps["teacher"]))
            classes = self.classes.index_copy(0, key, _classes(batch))
            step = int(self.step)
            index, drawn = self._draw(step, key, classes)
            to_teacher = self._scores(s, self.teacher_memory, index, drawn)
            to_student = self._scores(t, self.student_memory, index, drawn)
            log_z = self.log_z if step else torch.stack([self._normaliser(to_teacher), self._normaliser(to_student)])
            log_noise = log_z + math.log(index.shape[1] / len(classes))
            value = noise_contrast(self._positive(s, self.teacher_memory, key), to_teacher, log_noise[0])
            value = value + noise_contrast(self._positive(t, self.student_memory, key), to_student, log_noise[1])
        if self.training and torch.is_grad_enabled():  # a look at the term changes nothing
            self.classes, self.log_z, self.step = classes, log_z, self.step + 1
            self._remember(key, s.detach(), t.detach())
        return value

    def _examples_of(self, batch: Batch) -> Tensor:
        """Return the number of the example of each row, (rows,)."""
        if batch.example_id is None:
            raise UserError(
                "key",
                "None",
                (
                    "batches that say which example each row is (crd remembers every one); data "
                    "that mixes examples, such as data.augment=[mixup], cannot"
                ),
            )
        key = batch.example_id[:, 0]
        if len(key) != len(batch):
            raise UserError("key", f"{len(key)} for {len(batch)} rows", "data in which a row is an example")
        if len(key) and not 0 <= int(key.min()) <= int(key.max()) < len(self.classes):
            raise UserError(
                "key", f"example {int(key.max())} of {len(self.classes)}", "the data that the memory was made for"
            )
        return key

    def _draw(self, step: int, key: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Draw examples (rows, N) of other classes than each row's; also return whether (rows, 1) there are any."""
        total = len(classes)
        # sorted by class, a row's own class is one block: whatever is drawn from there on is moved behind it
        by_class, order = classes.sort(stable=True)
        own = classes[key]
        first = torch.searchsorted(by_class, own)
        size = torch.searchsorted(by_class, own, right=True) - first
        place = torch.empty_like(order)
        place[order] = torch.arange(total, device=order.device)
        unknown = own == UNKNOWN
        first, size = torch.where(unknown, place[key], first)[:, None], torch.where(unknown, 1, size)[:, None]
        generator = torch.Generator(key.device).manual_seed(hash_seed(self.seed, 1, step))
        shape = (len(key), min(self.negatives, total - 1))
        draws = torch.randint(2**62, shape, generator=generator, device=key.device)
        others = total - size
        at = draws % others.clamp(min=1)
        at = torch.where(at >= first, at + size, at).clamp(max=total - 1)
        return order[at], others > 0

    def _positive(self, anchors: Tensor, memory: Tensor, key: Tensor) -> Tensor:
        """Return the scores (rows,) of anchors with the remembered embeddings of their own examples."""
        # of this step's own pair instead, the maps would send everything one way while the memory is still random
        return (anchors * memory[key]).sum(1) / self.temperature

    def _scores(self, anchors: Tensor, memory: Tensor, index: Tensor, drawn: Tensor) -> Tensor:
        """Return the scores (rows, N) of anchors (rows, dim) with the remembered embeddings of examples ``index``."""
        memory = memory.to(anchors.dtype)
        if index.shape[1] * self.dim > len(memory):  # all scores take less than a copy of all that was drawn
            scores = (anchors @ memory.T).gather(1, index)
        else:
            scores = torch.einsum("bd,bnd->bn", anchors, memory[index])
        return torch.where(drawn, scores / self.temperature, -math.inf)

    def _normaliser(self, scores: Tensor) -> Tensor:
        """Return the logarithm of M times the mean of the scores' exponentials; log M if there is no score at all."""
        scores = scores.detach()
        there = scores.isfinite().sum().clamp(min=1)
        mean = torch.where(scores.isfinite().any(), scores.flatten().logsumexp(0) - there.log(), 0.0)
        return mean + math.log(len(self.classes))

    def _remember(self, key: Tensor, student: Tensor, teacher: Tensor) -> None:
        """Move what is remembered of these examples towards what was seen now; of two views of one, the later."""
        rows = torch.arange(len(key), device=key.device)
        last = torch.full_like(self.classes, -1).scatter_reduce(0, key, rows, "amax")
        rows = rows[last[key] == rows]
        at = key[rows]
        for name, seen in (("student_memory", student), ("teacher_memory", teacher)):
            memory = getattr(self, name)
            new = self.momentum * memory[at] + (1 - self.momentum) * seen[rows].to(memory.dtype)
            # a new tensor: this step's backward still reads the old one
            setattr(self, name, memory.index_copy(0, at, unit(new)))


def _classes(batch: Batch) -> Tensor:
    """Return the class (rows,) of each row; UNKNOWN without a label."""
    targets = batch.targets if batch.targets.ndim == 1 else batch.targets.argmax(1)
    return torch.where(batch.labelled, targets, UNKNOWN)
