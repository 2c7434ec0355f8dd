"""What a model says of one input."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Prediction:
    """Class and probabilities that the model gives one input, for one task."""

    source: str
    label: str
    probabilities: dict[str, float]
    """Map of class → probability, most probable first."""
    task: str = ""
    """Name of the task, where the network has several; empty where it has one."""
    file: str = ""
    """File that the input is in."""
    row: int = 1
    """Row number of the input in the file, from 1."""
    given: str | None = None
    """Class that the file gives the input, "" where its row has none; None where the file does not say."""
