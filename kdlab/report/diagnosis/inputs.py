"""Inputs of a diagnosis, and the files that it leaves: shared by ``diagnose`` and the end of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from kdlab.data import DataModule, ImageData
from kdlab.report.diagnosis import diagnosis, examples, report
from kdlab.report.diagnosis import pictures as drawing
from kdlab.runs.folder import write_text
from kdlab.runs.read import DIAGNOSIS

COUNTS = "diagnosis.json"


@dataclass(frozen=True)
class DiagnosisInputs:
    """Outputs of several networks for the same examples, with the run and data that they belong to."""

    run: Path
    name: str
    """Name of the experiment."""
    data: DataModule
    """The data module."""
    config: Mapping[str, Any]
    """Configuration of the data, which has the names of a table's columns."""
    split: str
    logits: Mapping[str, Tensor]
    """Map of role → (N, C), in the order of the split, on the CPU."""
    targets: Tensor
    """Class ids, (N,)."""

    @property
    def title(self) -> str:
        """Title in a line: experiment, number of examples, split, data and classes."""
        classes = len(self.data.class_names)
        return f"{self.name}: {len(self.targets)} {self.split} examples of {self.data.name}, {classes} classes"

    def count(self, slices: Mapping[str, Sequence[str]] | None = None) -> dict[str, Any]:
        """Return all counts with the run and split that they are from; ``notes`` is for the caller to fill."""
        counts = diagnosis.diagnose(self.logits, self.targets, self.data.class_names, slices)
        return {"format": diagnosis.FORMAT, "run": str(self.run), "split": self.split, "notes": [], **counts}

    def write(self, counted: Mapping[str, Any], out: Path, command: str, pictures: bool = True) -> list[str]:
        """Write ``diagnosis.json``, and with ``pictures`` the page and its pictures.

        Args:
            counted: result of :meth:`count`.
            out: folder of the files.
            command: command that was typed, for the page.
            pictures: whether to write page and pictures beside the counts.

        Returns:
            The names of the files.

        Raises:
            OSError: where they cannot be written.
        """
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / COUNTS, json.dumps(counted, ensure_ascii=False) + "\n")
        if not pictures:
            return [COUNTS]
        most = drawing.COLUMNS * drawing.ROWS
        most_confident_errors = diagnosis.most_confident_errors(self.logits, self.targets, most)
        shown = examples.shown(
            most_confident_errors, counted, self.logits, cast(ImageData, self.data), self.split, self.config
        )
        drawn = drawing.draw(counted, shown, self.title, out)
        title = f"Diagnosis of {self.run.resolve().name}"
        report.write_page(out / DIAGNOSIS, counted, shown, drawn, title, command)
        return [DIAGNOSIS, COUNTS, *(picture.path.name for picture in drawn)]
