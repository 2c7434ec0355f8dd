"""What a diagnosis is of, from counting to the files that it leaves: what ``diagnose`` and the end of a run share."""

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
    """Networks that were asked about the same examples."""

    run: Path
    name: str
    """Of the experiment."""
    data: DataModule
    """The data module."""
    config: Mapping[str, Any]
    """Of the data, which knows the names of a table's columns."""
    split: str
    logits: Mapping[str, Tensor]
    """Role → (N, C), in the order of the split, on the CPU."""
    targets: Tensor
    """(N,) class ids."""

    @property
    def title(self) -> str:
        """What was asked, in a line."""
        classes = len(self.data.class_names)
        return f"{self.name}: {len(self.targets)} {self.split} examples of {self.data.name}, {classes} classes"

    def count(self, slices: Mapping[str, Sequence[str]] | None = None) -> dict[str, Any]:
        """Everything that is counted, with where it is from; ``notes`` is for the caller to fill."""
        found = diagnosis.diagnose(self.logits, self.targets, self.data.class_names, slices)
        return {"format": diagnosis.FORMAT, "run": str(self.run), "split": self.split, "notes": [], **found}

    def write(self, counted: Mapping[str, Any], out: Path, command: str, pictures: bool = True) -> list[str]:
        """Write ``diagnosis.json``, and with ``pictures`` the page and what is drawn for it.

        Args:
            counted: what :meth:`count` gave.
            out: the folder.
            command: what was typed, for the page.
            pictures: else the counts alone.

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
