"""The curves of a run as one JSON object a line: read by anybody, with no library."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only


class CurvesFile(Logger):
    """Appends every point of every curve to ``curves.jsonl``.

    Args:
        path: the file; points after ``from_step``, left by a run that was killed, are dropped.
        from_step: optimizer steps done in the checkpoint that training goes on from.
    """

    def __init__(self, path: Path, from_step: int = 0) -> None:
        super().__init__()
        self.path = path
        self._drop_after(from_step)
        self._file = path.open("a", encoding="utf-8", buffering=1)

    @property
    def name(self) -> str:
        return "curves"

    @property
    def version(self) -> str:
        return ""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        return self._file

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: they stand in ``config.yaml``."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        point: dict[str, Any] = {"step": step}
        for name, value in metrics.items():
            number = float(value)
            point[name] = round(number, 7) if math.isfinite(number) else None
        self._file.write(json.dumps(point) + "\n")

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self._file.flush()

    def _drop_after(self, step: int) -> None:
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                point = json.loads(line)
            except ValueError:
                continue  # a line torn by a kill
            if (point.get("step") or 0) <= step:
                kept.append(line)
        self.path.write_text("".join(f"{line}\n" for line in kept))
