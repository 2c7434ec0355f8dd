"""What an experiment's configuration holds: the signatures that configs are bound to. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class PretrainedSpec:
    """What the student starts from with ``init=pretrained``: its own architecture, trained first, once, and kept.

    Its data are the experiment's, with ``data`` laid over them; unless that says otherwise it sees every label.
    """

    checkpoint: str | None = None
    """A file with its weights; None trains it."""
    mapping: dict | str | None = None
    """How the checkpoint's key names become the network's; None finds out."""
    data: dict = field(default_factory=dict)
    epochs: int = 30
    seed: int = 0
    optimizer: dict = field(default_factory=dict)
    scheduler: dict | None = None


@dataclass
class TeacherSpec(PretrainedSpec):
    """Who teaches: likewise a network with a checkpoint, or one that is trained first."""

    net: dict | None = None
    """The network; None for the student of the stage before, or for what is in ``cache`` alone."""
    cache: str = "auto"
    """``auto`` where it is exact, ``off``, or the folder of a cache."""
    top_k: int | None = None
    """Of sequences: cache the k most probable tokens of each position and the mass of all others."""
    draws: int | None = None
    """Of sequences: cache so many tokens of each position, drawn from the teacher's distribution."""

    @property
    def written(self) -> bool:
        """Whether all that is known of it is a cache, such as ``kdlab generate`` writes."""
        return self.net is None and self.cache not in ("auto", "off")

    @property
    def previous(self) -> bool:
        """Whether it is the student of the stage before."""
        return self.net is None and not self.written


@dataclass
class Experiment:
    """The root of the configuration."""

    name: str
    """Of the experiment; its runs are in ``output/name``."""
    task: dict
    data: dict
    student: dict
    loss: dict
    method: dict
    optimizer: dict
    trainer: dict
    teacher: TeacherSpec | None = None
    pretrained: PretrainedSpec | None = None
    scheduler: dict | None = None
    logger: dict | None = None
    source: dict | None = None
    """What puts other sequences in the place of the data's: the student's own text, or the teacher's."""
    adapter: dict | None = None
    """What trains in the place of the student's own weights, such as LoRA; merged into them at the end."""
    seed: int = 0
    """Of the student: its first weights, the order of examples, augmentation."""
    epochs: int = 30
    init: Literal["fresh", "previous", "teacher", "cut", "pretrained"] = "fresh"
    """What the student starts from: random weights, the stage before, its teacher, every second layer of its teacher
    (``cut``), or ``pretrained``."""
    baseline: bool = True
    """Also train the same student without its teacher."""
    stages: dict = field(default_factory=dict)
    """name → overrides: fits in sequence, each composed on top of the experiment."""
    resume: str | None = None
    """A run folder to go on in, or ``auto`` for the newest one of this configuration, if there is any."""
    output: str = "outputs"

    @property
    def method_name(self) -> str:
        """The class of the method, such as ``OfflineKD``."""
        return str(self.method.get("_target_", "")).rpartition(".")[2]

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Experiment:
        """From a plain, checked mapping."""
        values = dict(config)
        for name, spec in (("teacher", TeacherSpec), ("pretrained", PretrainedSpec)):
            if isinstance(values.get(name), Mapping):
                values[name] = spec(**values[name])
        return cls(**values)
