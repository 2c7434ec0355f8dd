"""Text to read while a language model trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger
from typing_extensions import override

from kdlab.data import DataModule
from kdlab.system.files import write_text


class Samples(pl.Callback):
    """Callback that writes the student's outputs for a few validation examples to TensorBoard, and to a file.

    Args:
        data: the data module.
        file: the Markdown file that holds the latest ones.
        every: number of epochs from one time to the next.
    """

    def __init__(self, data: DataModule, file: Path, every: int = 1) -> None:
        self.data, self.file, self.every = data, file, every

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        last = trainer.current_epoch + 1 == trainer.max_epochs
        if not trainer.is_global_zero or not (last or trainer.current_epoch % self.every == 0):
            return
        text = pl_module.task.samples(pl_module.student, self.data, "val", pl_module.device)
        if not text:
            return
        write_text(self.file, text + "\n")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("val/samples", text, trainer.global_step)
