"""GPT-2s of some sizes with random weights and random tokens, and the training steps that language.py compares."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from kdlab.errors import UserError
from kdlab.functional import Batch, Outputs, Projected, SequenceBatch, dense
from kdlab.losses import KL, CrossEntropy, Objective
from kdlab.models import CausalLM
from kdlab.tasks import LanguageModeling
from kdlab.teachers import FrozenTeacher, Teacher, TokenCache, TokenManifest, write_tokens

Shape = tuple[int, int, int]
"""Layers, heads, width."""


@dataclass(frozen=True)
class Size:
    """A teacher, a student of about a quarter of its parameters, and what a step reads."""

    teacher: Shape
    student: Shape
    batch: int
    context: int
    new_tokens: int
    """That are written in a measurement of generation."""


SIZES = (
    Size((6, 6, 192), (6, 4, 56), 16, 128, 64),
    Size((12, 12, 768), (6, 6, 384), 16, 1024, 256),  # GPT-2
    Size((24, 16, 1024), (12, 10, 640), 16, 1024, 256),  # GPT-2 medium
    Size((36, 20, 1280), (18, 12, 768), 16, 1024, 256),  # GPT-2 large
)
"""Teachers of 12, 124, 355 and 774 million parameters with 50,257 tokens."""

KINDS = {
    "ce": "cross-entropy",
    "ce, dense": "cross-entropy, all logits at once",
    "kd": "distillation, live teacher",
    "kd, dense": "distillation, live teacher, all logits at once",
    "kd, top-k": "distillation, cached top-k",
    "kd, sampled": "distillation, cached draws",
}
LIGER = {
    "ce, liger": "cross-entropy, Liger's fused kernel",
    "kd, liger": "distillation, live teacher, Liger's fused kernels (JSD at its KL end, and cross-entropy)",
    "kd, liger torch": "distillation, live teacher, Liger's chunked loss in PyTorch",
}
CACHED = {"kd, top-k": "topk", "kd, sampled": "sampled"}


def size_of(parameters: float) -> Size:
    """The smallest size whose teacher has about so many parameters, or more, with 50,257 tokens.

    Raises:
        UserError: if none is as large.
    """
    for size in SIZES:
        if count(size.teacher, 50257, size.context) >= 0.95 * parameters:
            return size
    largest = count(SIZES[-1].teacher, 50257, SIZES[-1].context)
    raise UserError(f"teacher-parameters: {parameters:.3g}; accepted: up to {largest:.3g}")


def count(shape: Shape, classes: int, context: int) -> int:
    """Parameters of a GPT-2, whose output matrix is that of its input."""
    layers, _, width = shape
    return layers * (12 * width + 13) * width + (classes + context + 2) * width


def gpt(shape: Shape, classes: int, context: int) -> CausalLM:
    """A GPT-2 with random weights and without dropout."""
    layers, heads, width = shape
    settings = {"n_layer": layers, "n_head": heads, "n_embd": width}
    settings |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    torch.manual_seed(0)
    return CausalLM("gpt2", settings, None, classes, context, classes - 1, classes - 1, attention="sdpa")


class Bench:
    """Student, teacher, optimizer and batches; networks are made when they are first asked for.

    Args:
        size: of the networks; ``batch`` and ``context`` of the batches.
        classes: of the vocabulary.
        device: where everything happens.
        bf16: whether under autocast.
        chunk: rows whose logits exist at once.
        k: classes of a cache, a token.
        folder: of the caches.
    """

    def __init__(
        self, size: Size, classes: int, device: torch.device, bf16: bool, chunk: int, k: int, folder: Path
    ) -> None:
        self.size, self.classes, self.device, self.bf16, self.folder = size, classes, device, bf16, folder
        self.task = LanguageModeling(classes)
        self.alone = Objective({"ce": CrossEntropy()}, 1.0, chunk_rows=chunk)
        self.both = Objective({"ce": CrossEntropy(), "kl": KL()}, 1.0, 0.5, chunk_rows=chunk)
        self.least = self.batch(1, 4, -1)
        """Of four tokens: what a step holds apart from what it reads."""
        self.full = self.batch(size.batch, size.context, 0)
        self._manifests = {form: TokenManifest("random", "random", classes, k, form) for form in ("topk", "sampled")}
        self._told: dict[str, Teacher] = {}

    def batch(self, lines: int, width: int, number: int) -> Batch:
        """Random tokens; all positions count."""
        draw = torch.Generator().manual_seed(number + 2)
        ids = torch.randint(self.classes, (lines, width + 1), generator=draw)
        rows = lines * width
        return SequenceBatch(
            {"input_ids": ids[:, :-1].contiguous(), "position_ids": torch.arange(width).expand(lines, width)},
            ids[:, 1:].flatten(),
            torch.stack([torch.arange(lines) + 1000 * (number + 1), torch.zeros(lines).long()], 1),
            weight=torch.ones(rows),
            segment=torch.full((rows,), 3),
            loss_mask=torch.ones(lines, width, dtype=torch.bool),
        ).to(self.device)

    @cached_property
    def student(self) -> CausalLM:
        return gpt(self.size.student, self.classes, self.size.context).to(self.device).train()

    @cached_property
    def teacher(self) -> FrozenTeacher:
        return FrozenTeacher(gpt(self.size.teacher, self.classes, self.size.context).to(self.device), self.task)

    @cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.student.parameters(), lr=1e-4)

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def clock(self) -> float:
        """Seconds, once the device has done what it was told."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def step(self, kind: str, batch: Batch | None = None) -> Tensor:
        """One optimizer step."""
        batch = self.full if batch is None else batch
        self.optimizer.zero_grad()
        with self.autocast():
            loss = self._liger(kind, batch) if kind in LIGER else self._loss(kind, batch)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def _loss(self, kind: str, batch: Batch) -> Tensor:
        told = None
        if kind.startswith("kd"):
            told = (self.cached(CACHED[kind]) if kind in CACHED else self.teacher)(batch)
        found = self.task.outputs(self.student, batch)
        if kind.endswith("dense"):
            found = Outputs(dense(found.logits))
            told = None if told is None else Outputs(dense(told.logits))
        return (self.alone if told is None else self.both)(found, told, batch).total

    def _liger(self, kind: str, batch: Batch) -> Tensor:
        """The same losses by Liger: matrices of bf16 under autocast, their gradients summed in float32, as kdlab's."""
        told = self._halved(self.teacher(batch).logits) if kind.startswith("kd") else ()
        found = self._halved(self.task.outputs(self.student, batch).logits)
        targets = batch.targets
        if kind == "kd, liger torch":
            from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

            fused = LigerFusedLinearJSDLoss(beta=0.0, compiled=self.device.type == "cuda")
            return fused(*found, *told, targets)
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, LigerFusedLinearJSD

        hard = LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)(found[1], found[0], targets)
        if not told:
            return hard
        soft = LigerFusedLinearJSD(jsd_beta=0.0, accum_dtype=torch.float32)(*found, *told, targets)
        return 0.5 * hard + 0.5 * soft

    def _halved(self, logits: Projected) -> tuple[Tensor, Tensor]:
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        return logits.hidden.to(dtype), logits.weight.to(dtype)

    # ---- caches

    def write(self, form: str) -> float:
        """Store what the teacher says of both batches; the seconds that took."""
        start = self.clock()
        with self.autocast():
            batches = [self.least, self.full]
            write_tokens(self.folder / form, self._manifests[form], self.teacher, lambda _: batches)
        return self.clock() - start

    def again(self, form: str) -> float:
        """The seconds that storing takes from the start."""
        for path in (self.folder / form).iterdir():
            path.unlink()
        self._told.pop(form, None)
        return self.write(form)

    def cached(self, form: str) -> TokenCache:
        """The reader of what :meth:`write` stored."""
        if form not in self._told:
            self._told[form] = TokenCache(self.folder / form, self._manifests[form]).to(self.device)
        return self._told[form]  # type: ignore[return-value]


def liger_kinds(device: torch.device) -> tuple[dict[str, str], str]:
    """Which of Liger's losses can run here, and why others cannot."""
    try:
        import liger_kernel.chunked_loss  # noqa: F401
    except ImportError:
        return {}, "Liger: not installed (pip install liger-kernel); not compared"
    if device.type != "cuda":
        name = "kd, liger torch"
        return {
            name: LIGER[name]
        }, "Liger: its kernels need CUDA; its chunked loss in PyTorch is compared, not compiled"
    return dict(LIGER), ""


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())
