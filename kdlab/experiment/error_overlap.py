"""Overlap of the student's errors with its teacher's: counted at the end of every run, drawn for a single run."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdlab.errors import RunFailed
from kdlab.experiment.reload import rebuild
from kdlab.experiment.stage import Stage
from kdlab.functional import NO_LABEL
from kdlab.report.diagnosis.diagnosis import kinds
from kdlab.report.table import shorten
from kdlab.tasks import ClassMeasures, Measures

log = logging.getLogger("kdlab")

Keep = Callable[[str, Measures], None]
"""Function that receives a split, and the measures that have counted it."""

LARGEST = 2**24
"""Largest number of one network's logits that are held for pictures (64 MiB); of more, ``diagnose`` draws."""


class PredictionRecorder:
    """Recorder of the predictions of student, teacher and baseline while they are measured.

    It records nothing of tasks other than classification.

    Args:
        split: split whose examples are recorded.
        whole: whether to hold the logits, which show how sure a network is; else only the most probable class is held.
    """

    def __init__(self, split: str, whole: bool = False) -> None:
        self.split, self.whole = split, whole
        self.targets: Tensor | None = None
        self.first: dict[str, Tensor] = {}
        self.logits: dict[str, Tensor] = {}

    def of(self, role: str) -> Keep:
        """Return the function that receives one network's measures."""
        return partial(self._keep, role)

    def _keep(self, role: str, split: str, measures: Measures) -> None:
        if split != self.split or not isinstance(measures, ClassMeasures):
            return
        logits, targets = measures.seen()
        if self.targets is not None and not torch.equal(targets, self.targets):
            return  # it was measured on other examples, which do not compare
        self.targets, self.first[role] = targets, logits.argmax(-1)
        if self.whole and logits.numel() <= LARGEST:
            self.logits[role] = logits

    @property
    def taught(self) -> bool:
        """Whether a teacher was recorded, and a student beside it."""
        return {"student", "teacher"} <= self.first.keys()

    def errors(self) -> dict[str, dict[str, Any]]:
        """Return role → its errors, as they stand in ``result.json``; nothing where there was no teacher.

        A number for each of :data:`~kdlab.report.diagnosis.diagnosis.KINDS`. Rows without a label do not count.
        """
        if not self.taught or self.targets is None:
            return {}
        known = self.targets != NO_LABEL
        targets, teacher = self.targets[known], self.first["teacher"][known]
        errors: dict[str, dict[str, Any]] = {}
        for role in ("student", "baseline"):
            if role in self.first:
                masks = kinds(self.first[role][known], teacher, targets)
                counts = {kind: int(mask.sum()) for kind, mask in masks.items()}
                errors[role] = {"split": self.split, "examples": len(targets), **counts}
        return errors


def drawable(heard: PredictionRecorder) -> bool:
    """Return whether there is a diagnosis to draw.

    That needs a teacher, a label of every row (else it is neither right nor wrong), and logits that were held.
    """
    return _compared(heard) and "student" in heard.logits


def _compared(heard: PredictionRecorder) -> bool:
    return heard.taught and heard.targets is not None and not bool(torch.eq(heard.targets, NO_LABEL).any())


def report(folder: Path, heard: PredictionRecorder, stage: Stage, overrides: Sequence[str]) -> None:
    """Write the diagnosis into a finished run's folder, as ``diagnose`` would, from the recorded predictions.

    Any error here is only logged: the run has been measured already.

    Args:
        folder: folder of the run.
        heard: predictions recorded while it was measured.
        stage: last stage of the run.
        overrides: overrides that the user typed.
    """
    if not _compared(heard):
        return
    if not drawable(heard):
        log.info(
            "diagnosis: not drawn, since logits of so many rows and classes were not held; %s draws it", _again(folder)
        )
        return
    assert heard.targets is not None
    try:
        from kdlab.report.diagnosis.inputs import DiagnosisInputs  # draws, and with it comes what only drawing needs

        experiment = stage.experiment
        logits, targets = heard.logits, heard.targets
        case = DiagnosisInputs(folder, experiment.name, stage.data, experiment.data, heard.split, logits, targets)
        case.write(case.count(), folder, shlex.join(["python", "-m", "kdlab", *overrides]))
    except Exception as error:
        log.warning("diagnosis: not drawn (%s: %s); %s draws it", type(error).__name__, error, _again(folder))


def redraw(folder: Path, stages: Mapping[str, Mapping[str, Any]] | None, overrides: Sequence[str]) -> None:
    """Write the diagnosis of a run that was killed between its result and its diagnosis, with its networks run again.

    Args:
        folder: folder of the finished run.
        stages: composed configuration of each stage, if it has some.
        overrides: overrides that the user typed.
    """
    log.info("diagnosis: the run ended before it was drawn; drawing it")
    try:
        from kdlab.report.diagnosis.inputs import DiagnosisInputs

        rebuilt = rebuild(folder, stages=stages or None, trust=True)
        split = "test" if rebuilt.data.counts.get("test") else "val"
        logits, targets = rebuilt.answers(split, "cuda" if torch.cuda.is_available() else "cpu")
        if "teacher" not in logits:
            raise RunFailed("; ".join(rebuilt.notes))
        case = DiagnosisInputs(
            folder, rebuilt.experiment.name, rebuilt.data, rebuilt.experiment.data, split, logits, targets
        )
        counted = case.count() | {"notes": rebuilt.notes}
        case.write(counted, folder, shlex.join(["python", "-m", "kdlab", *overrides]))
    except Exception as error:
        log.warning("diagnosis: not drawn (%s: %s); %s draws it", type(error).__name__, error, _again(folder))


def _again(folder: Path) -> str:
    return f"python -m kdlab diagnose {shlex.quote(str(shorten(folder)))}"
