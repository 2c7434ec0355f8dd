"""Curves of a run as one JSON object a line, which anyone can read without a library."""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from typing_extensions import override

from kdlab.errors import CannotWrite, UserError
from kdlab.runs.read import is_point
from kdlab.system.files import Unreadable, atomic_write, open_to_append, read_json_lines

log = logging.getLogger("kdlab")


class CurvesFile(Logger):
    """Logger that appends every point of every curve to ``curves.jsonl``.

    Args:
        path: path of the file; points after ``from_step``, left by a run that was killed, are dropped.
        from_step: number of optimizer steps done in the checkpoint that training goes on from.
    """

    def __init__(self, path: Path, from_step: int = 0) -> None:
        super().__init__()
        self.path = path
        self._drop_after(from_step)
        self._file = os.fdopen(open_to_append(path), "a", encoding="utf-8", buffering=1)

    @override
    @property
    def name(self) -> str:
        return "curves"

    @override
    @property
    def version(self) -> str:
        return ""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The open file; there is no object of another library."""
        return self._file

    @rank_zero_only
    def log_hyperparams(self, params: object, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the hyperparameters stand in ``config.yaml``."""

    @override
    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        point: dict[str, Any] = {"step": step}
        for name, value in metrics.items():
            number = float(value)
            point[name] = round(number, 7) if math.isfinite(number) else None
        try:
            self._file.write(json.dumps(point) + "\n")
        except OSError as error:
            raise CannotWrite(self.path, error) from error

    @override
    @rank_zero_only
    def finalize(self, status: str) -> None:
        self._file.flush()

    def _drop_after(self, step: int) -> None:
        """Keep the points up to ``step``; lines that hold none, such as one torn by a kill, are dropped and counted."""
        if not self.path.exists():
            return
        dropped = 0
        try:
            with atomic_write(self.path) as file:
                for point in read_json_lines(self.path):
                    if point is None or not is_point(point):
                        dropped += 1
                    elif point["step"] <= step:
                        file.write(json.dumps(point).encode() + b"\n")
        except Unreadable as error:
            raise UserError("resume", f"{self.path}: {error}", "without it (remove it)") from None
        if dropped:
            what = "1 line holds" if dropped == 1 else f"{dropped} lines hold"
            log.warning("%s: %s no point of a curve, left out", self.path, what)
