"""Progress that reads well on a terminal and in a log file."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

import lightning.pytorch as pl
from tqdm import tqdm
from typing_extensions import override

from kdlab.plain_text import one_line

log = logging.getLogger("kdlab")


class Progress(pl.Callback):
    """Callback that shows progress: a bar on a terminal, else a line for an epoch every few seconds, and at the end.

    An epoch that takes long has lines of its own, for the step that it is at.

    Args:
        name: name of the network that is trained, such as ``teacher``.
        style: form: ``bar``, ``lines``, ``none``, or ``auto`` (a bar where standard error is a terminal).
        every: number of steps between updates of the bar.
        seconds: number of seconds between lines for epochs.
        silence: number of seconds without a line after which the step gets one.
    """

    def __init__(
        self, name: str, style: str = "auto", every: int = 50, seconds: float = 10.0, silence: float = 60.0
    ) -> None:
        self.name, self.every, self.seconds, self.silence = one_line(name), every, seconds, silence
        self.style = ("bar" if sys.stderr.isatty() else "lines") if style == "auto" else style
        self._bar: tqdm | None = None
        self._last = 0.0
        self._steps = 0
        self._line = ""

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._last = time.monotonic()
        self._steps = int(trainer.estimated_stepping_batches)
        if self.style == "bar" and trainer.is_global_zero:
            self._bar = tqdm(total=self._steps, initial=trainer.global_step, desc=self.name, unit="step", leave=False)

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._bar is not None and (batch_idx + 1) % (self.every * trainer.accumulate_grad_batches) == 0:
            self._bar.update(trainer.global_step - self._bar.n)
        elif self.style == "lines" and time.monotonic() - self._last > self.silence:
            self._last = time.monotonic()
            if trainer.is_global_zero:
                log.info("%s: step %d of %d", self.name, trainer.global_step, self._steps)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        measures = trainer.callback_metrics
        shown = {n: f"{float(measures[f'val/{n}']):.4f}" for n in ("acc", "ppl", "ce", "kl") if f"val/{n}" in measures}
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(trainer.global_step - self._bar.n)
        scores = "  ".join(f"val/{name} {value}" for name, value in shown.items())
        self._line = f"{self.name}: epoch {trainer.current_epoch + 1} of {trainer.max_epochs}  {scores}"
        if self.style == "lines" and self._due():
            self._say(trainer)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._close()
        self._say(trainer)

    def _say(self, trainer: pl.Trainer) -> None:
        if self._line and trainer.is_global_zero:
            log.info(self._line)
        self._line = ""

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        self._close()

    def _due(self) -> bool:
        if time.monotonic() - self._last < self.seconds:
            return False
        self._last = time.monotonic()
        return True

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
