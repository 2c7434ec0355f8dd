"""Layout of a run's Custom Scalars tab, written once it is known which curves the run has."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from typing_extensions import override

from kdlab.runs.tensorboard import add_layout


class Layout(Logger):
    """Logger that collects the names of a run's curves, and writes the layout that shows them, once.

    That is with the first point of training after a validation, when every curve has had its first point, or where
    training ends before that.

    Args:
        board: the run's TensorBoard logger; it comes after this one among the trainer's loggers, since it closes its
            file when training ends.
    """

    def __init__(self, board: TensorBoardLogger) -> None:
        super().__init__()
        self.board = board
        self.curves: set[str] = set()
        self.written = False

    @override
    @property
    def name(self) -> str:
        return "layout"

    @override
    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: object, *args: Any, **kwargs: Any) -> None:
        """Do nothing: hyperparameters are no curves."""

    @override
    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if self.written:
            return
        validated = any(name.startswith("val/") for name in self.curves)
        self.curves.update(metrics)
        if validated and any(name.startswith("train/") for name in metrics):
            self._write()

    @override
    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self.curves and not self.written:
            self._write()

    def _write(self) -> None:
        self.written = True
        add_layout(self.board.experiment, self.curves)
