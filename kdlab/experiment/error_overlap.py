"""What a student inherited of its teacher's errors: counted at the end of every run, drawn where it is the only one."""

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
from kdlab.experiment.stage import Stage
from kdlab.functional import NO_LABEL
from kdlab.report.diagnosis.diagnosis import kinds
from kdlab.report.table import shorten
from kdlab.tasks import ClassMeasures, Measures

log = logging.getLogger("kdlab")

Keep = Callable[[str, Measures], None]
"""Gets a split, and the measures that have counted it."""

LARGEST = 2**24
"""Numbers of one network's logits that are held for pictures (64 MiB); where there are more, ``diagnose`` draws."""


class PredictionRecorder:
    """What student, teacher and baseline said while they were measured, so that nobody asks them again.

    Of tasks other than classification it hears nothing.

    Args:
        split: of whose examples.
        whole: hold the logits, which show how sure a network is; else only the class that each names first.
    """

    def __init__(self, split: str, whole: bool = False) -> None:
        self.split, self.whole = split, whole
        self.targets: Tensor | None = None
        self.first: dict[str, Tensor] = {}
        self.logits: dict[str, Tensor] = {}

    def of(self, role: str) -> Keep:
        """What to tell of one network's measures."""
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
        """Whether a teacher was heard, and a student beside it."""
        return {"student", "teacher"} <= self.first.keys()

    def errors(self) -> dict[str, dict[str, Any]]:
        """Role → its errors, as they stand in ``result.json``; nothing where nobody taught.

        A number for each of :data:`~kdlab.report.diagnosis.diagnosis.KINDS`. Rows without a label do not count.
        """
        if not self.taught or self.targets is None:
            return {}
        known = self.targets != NO_LABEL
        targets, teacher = self.targets[known], self.first["teacher"][known]
        found: dict[str, dict[str, Any]] = {}
        for role in ("student", "baseline"):
            if role in self.first:
                masks = kinds(self.first[role][known], teacher, targets)
                counts = {kind: int(mask.sum()) for kind, mask in masks.items()}
                found[role] = {"split": self.split, "examples": len(targets), **counts}
        return found


def drawable(heard: PredictionRecorder) -> bool:
    """Whether there is a diagnosis to draw.

    Somebody taught, every row has a label (else it is neither right nor wrong), and the logits were held.
    """
    return _compared(heard) and "student" in heard.logits


def _compared(heard: PredictionRecorder) -> bool:
    return heard.taught and heard.targets is not None and not bool(torch.eq(heard.targets, NO_LABEL).any())


def report(folder: Path, heard: PredictionRecorder, stage: Stage, overrides: Sequence[str]) -> None:
    """Write what ``diagnose`` would into a finished run's folder, from what was heard already.

    Whatever goes wrong here is a line in the log: the run has been measured, and is none the worse for it.

    Args:
        folder: of the run.
        heard: at its measuring.
        stage: the last one.
        overrides: what the user typed.
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
    """As :func:`report`, for a run that was killed between its result and its diagnosis: its networks are asked again.

    Args:
        folder: of the finished run.
        stages: the composed configuration of each stage, if it has some.
        overrides: what the user typed.
    """
    log.info("diagnosis: the run ended before it was drawn; drawing it")
    try:
        from kdlab.experiment.reload import rebuild  # which knows how experiments run, and so builds on this module
        from kdlab.report.diagnosis.inputs import DiagnosisInputs

        found = rebuild(folder, stages=stages or None, trust=True)
        split = "test" if found.data.counts.get("test") else "val"
        logits, targets = found.answers(split, "cuda" if torch.cuda.is_available() else "cpu")
        if "teacher" not in logits:
            raise RunFailed("; ".join(found.notes))
        case = DiagnosisInputs(folder, found.experiment.name, found.data, found.experiment.data, split, logits, targets)
        counted = case.count() | {"notes": found.notes}
        case.write(counted, folder, shlex.join(["python", "-m", "kdlab", *overrides]))
    except Exception as error:
        log.warning("diagnosis: not drawn (%s: %s); %s draws it", type(error).__name__, error, _again(folder))


def _again(folder: Path) -> str:
    return f"python -m kdlab diagnose {shlex.quote(str(shorten(folder)))}"
