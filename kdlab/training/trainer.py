"""Trainer settings: hardware, precision, split into micro-batches, progress and saving."""

from __future__ import annotations

import logging
import os
import platform
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch import nn

from kdlab.errors import UserError, unknown
from kdlab.methods.lightning_internals import NoProfiler
from kdlab.models.cost import Example, flops
from kdlab.ranges import positive, whole_number
from kdlab.training.checkpoints import AtomicCheckpoints

log = logging.getLogger("kdlab")

Auto = Literal["auto"]

SMALL = 1e9
"""Floating-point operations of a forward pass over a batch, below which float32 on one thread of a CPU is best.

Measured (benchmarks/RESULTS.md): at 0.3e9 bf16 gains 15-20 %, a second thread 15 %, at 3e9 55 % and 40 %; but where
another process wants the core, a second thread made steps of 0.3e9 ten times slower, and bf16 costs digits of the loss.
"""

WIDE = 256
"""Width of a network's linear layers from which bf16 is worth its casts on a CPU.

Measured on GPT-2s, one thread with AMX: a step in bf16 takes 2.3 of float32's time at width 64, 1.1-1.2 at 128, 0.6 at
256, 0.5 at 512 and 768.
"""

MOST_THREADS = 1024
"""Largest number of threads, more than any CPU has use for; torch would try to start each."""

_PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true")


class TrainerConfig:
    """Settings that change how a run is computed, not what: hardware, split, progress, saving.

    A run is one process on one device; ``CUDA_VISIBLE_DEVICES`` chooses among GPUs, and a sweep may run several.

    Args:
        accelerator: device type: ``auto`` (a GPU where there is one), ``cpu``, ``gpu``, ``cuda`` or ``mps``.
        precision: numeric precision: ``auto`` takes bf16 where the hardware has it and the network is large enough to
            gain (a GPU that supports it; on a CPU, AMX or AVX512-BF16), or one of Lightning's names such as
            ``32-true``.
        channels_last: memory layout of images; ``auto`` follows bf16 on CPU and is on for GPUs.
        threads: number of threads of torch on the CPU; ``auto`` is one where a step is little work, else all cores.
        accumulate: number of micro-batches of one optimizer step; ``data.batch_size`` is the rows of the whole step.
        clip: largest gradient norm; None does not clip.
        log_every: optimizer steps between points of the training curves.
        gradients: number of optimizer steps between points of the curves of each weighted term's gradient norm and of
            the cosine of each pair (:class:`~kdlab.training.gradient_stats.Gradients`); None measures none, and costs
            nothing.
        validate_every: epochs between validations.
        save_minutes: minutes between checkpoints inside an epoch; one is always saved at an epoch's end.
        progress: style of the progress display: ``auto`` (a bar on a terminal, else lines), ``bar``, ``lines`` or
            ``none``.
        deterministic: whether to ask torch for deterministic kernels on a GPU too.
    """

    def __init__(
        self,
        accelerator: str = "auto",
        precision: str = "auto",
        channels_last: bool | Literal["auto"] = "auto",
        threads: int | Literal["auto"] = "auto",
        accumulate: int = 1,
        clip: float | None = None,
        log_every: int = 50,
        gradients: int | None = None,
        validate_every: int = 1,
        save_minutes: float = 10.0,
        progress: Literal["auto", "bar", "lines", "none"] = "auto",
        deterministic: bool = False,
    ) -> None:
        if accelerator not in ("auto", "cpu", "gpu", "cuda", "mps"):
            raise unknown("trainer.accelerator", accelerator, ("auto", "cpu", "gpu", "cuda", "mps"))
        if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
            raise UserError("trainer.accelerator", f"{accelerator}, and torch sees no GPU here", "cpu or auto")
        if precision not in _PRECISIONS:
            raise unknown("trainer.precision", precision, _PRECISIONS)
        if progress not in ("auto", "bar", "lines", "none"):
            raise unknown("trainer.progress", progress, ("auto", "bar", "lines", "none"))
        for name, value in (("accumulate", accumulate), ("log_every", log_every), ("validate_every", validate_every)):
            whole_number(f"trainer.{name}", value)
        if gradients is not None and (isinstance(gradients, bool) or not isinstance(gradients, int) or gradients < 1):
            raise UserError("trainer.gradients", f"{gradients!r}", "a whole number of steps, at least 1, or null")
        if isinstance(threads, int) and threads < 1:
            raise UserError("trainer.threads", f"{threads!r}", "a whole number, at least 1, or auto")
        if isinstance(threads, int) and threads > MOST_THREADS:
            raise UserError("trainer.threads", threads, f"up to {MOST_THREADS}, or auto")
        if clip is not None and not clip > 0:
            raise UserError("trainer.clip", clip, "a number above 0, or null")
        positive("trainer.save_minutes", save_minutes)
        self.accelerator, self.precision = accelerator, precision
        self.channels_last, self.threads = channels_last, threads
        self.accumulate, self.clip, self.log_every = accumulate, clip, log_every
        self.gradients = gradients
        self.validate_every, self.save_minutes, self.progress = validate_every, save_minutes, progress
        self.deterministic = deterministic

    @property
    def on_gpu(self) -> bool:
        """Whether training runs on a CUDA device."""
        return self.accelerator in ("gpu", "cuda") or (self.accelerator == "auto" and torch.cuda.is_available())

    @property
    def device(self) -> torch.device:
        """Device that this process computes on before Lightning has placed anything."""
        if self.on_gpu:
            return torch.device("cuda", 0)
        mps = self.accelerator == "mps" or (self.accelerator == "auto" and torch.backends.mps.is_available())
        return torch.device("mps" if mps else "cpu")

    def adapt(self, net: nn.Module, example: Example, batch_size: int) -> dict[str, Any]:
        """Choose precision, layout and threads for a network, and set the threads.

        Args:
            net: network that will train.
            example: one row of inputs.
            batch_size: number of rows of a step.

        Returns:
            ``precision``, ``channels_last``, ``threads``, ``device`` and ``name``, as chosen.
        """
        convolutions = any(isinstance(m, nn.Conv2d) for m in net.modules())
        work = flops(net, example) * max(batch_size // self.accumulate, 1)
        precision = self.precision
        if precision == "auto":
            gains = self.on_gpu or (work >= SMALL and (convolutions or _width(net) >= WIDE))
            precision = "bf16-mixed" if self._has_bf16() and gains else "32-true"
        layout = self.channels_last
        if layout == "auto":
            layout = convolutions and (self.on_gpu or precision.startswith("bf16"))
        threads = self.threads
        if threads == "auto":
            limit = int(os.environ.get("KDLAB_THREADS", usable_cores()))
            threads = limit if self.on_gpu or work >= SMALL else 1  # a sweep can use the other core for another job
        torch.set_num_threads(int(threads))
        return {
            "device": self.device.type,
            "name": torch.cuda.get_device_name() if self.on_gpu else _cpu_name(),
            "precision": precision,
            "channels_last": bool(layout),
            "threads": int(threads),
        }

    def trainer(
        self, folder: Path, epochs: int, precision: str, callbacks: list[pl.Callback], loggers: list
    ) -> pl.Trainer:
        """Return Lightning's Trainer for one fit: one process, whatever the environment says of a cluster.

        Lightning would take a SLURM job for its own: save a checkpoint without what kdlab resumes from, put the job
        into the queue again, and load that checkpoint where the job begins once more.
        """
        alone = LightningEnvironment()
        alone.set_global_rank(0)  # the rank that logs; a cluster's variables may have said another
        return pl.Trainer(
            accelerator=self.accelerator,
            devices=1,
            precision=precision,  # type: ignore[arg-type]
            max_epochs=epochs,
            accumulate_grad_batches=self.accumulate,
            gradient_clip_val=self.clip,
            check_val_every_n_epoch=self.validate_every,
            log_every_n_steps=self.log_every,
            callbacks=callbacks,
            logger=loggers or False,
            plugins=[AtomicCheckpoints(), alone],
            profiler=NoProfiler(),
            # where Lightning looks for its own checkpoints of cluster jobs: none of kdlab's folders may hold one
            default_root_dir=folder / "checkpoints",
            enable_progress_bar=False,
            enable_checkpointing=True,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            deterministic=self.deterministic,
        )

    def _has_bf16(self) -> bool:
        if self.on_gpu:
            return torch.cuda.is_bf16_supported(including_emulation=False)
        return cpu_has_bf16()


def usable_cores() -> int:
    """Return the number of cores that this process may use, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_has_bf16() -> bool:
    """Return whether this CPU multiplies bf16 in hardware: AMX tiles or AVX512-BF16."""
    has = [getattr(torch.cpu, f"_is_{name}_supported", lambda: False)() for name in ("amx_tile", "avx512_bf16")]
    return any(has)


def _width(net: nn.Module) -> int:
    """Return the width of the widest matrix: the smaller of its two sides."""
    return max((min(p.shape) for p in net.parameters() if p.ndim == 2), default=0)


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
