"""Schema of an experiment's configuration: the signatures that configs are bound to. Imports no torch.

``Annotated[dict, "network"]`` says which part of :data:`kdlab.config.slots.SLOTS` a mapping describes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, Literal, Self, TypedDict

from kdlab.config import builder
from kdlab.errors import UserError, unknown

ROOT = "kdlab.experiment.schema.Experiment"
"""Owner of a whole configuration."""

TEACHER = "kdlab.experiment.schema.TeacherSpec"
"""Owner of a teacher, and of each of several."""


@dataclass
class PretrainedSpec:
    """Network that the student starts from with ``init=pretrained``: its own architecture, trained first and kept.

    Its data are the experiment's, with ``data`` laid over them; unless that says otherwise it sees every label.
    """

    checkpoint: str | None = None
    """File with its weights, or the folder of a run; None trains it."""
    mapping: dict | str | None = None
    """Rules by which the checkpoint's key names become the network's; None finds them."""
    weights: str | None = None
    """Weights to take of several in the checkpoint: ``plain``, ``ema`` (their average), or the name of one.

    None takes the plain ones, or an average where there are no others.
    """
    data: Annotated[dict, "data"] = field(default_factory=dict)
    epochs: int = 30
    seed: int = 0
    optimizer: Annotated[dict, "optimizer"] = field(default_factory=dict)
    scheduler: Annotated[dict | None, "scheduler"] = None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Build the specification from a plain mapping, its values as the annotations want them."""
        return cls(**builder.bind(values, target=f"{__name__}.{cls.__name__}"))


class Member(TypedDict, total=False):
    """Keys in which one of several teachers differs; nothing is built of them before they override those of all."""

    checkpoint: str | None
    mapping: dict | str | None
    weights: str | None
    data: Annotated[dict, "data"]
    epochs: int
    seed: int
    optimizer: Annotated[dict, "optimizer"]
    scheduler: Annotated[dict | None, "scheduler"]
    net: Annotated[dict | None, "network"]
    cache: str
    feature_mib: float


TeacherKind = Literal["trained", "loaded", "previous", "cached", "several"]
"""Kind of a teacher.

A network that is trained first, one from a checkpoint, the student of the stage before, a cache alone (such as
``kdlab generate`` writes), or several.
"""


@dataclass
class TeacherSpec(PretrainedSpec):
    """Teacher: a network with a checkpoint or one that is trained first, the stage before, a cache, or several."""

    net: Annotated[dict | None, "network"] = None
    """Network; None for the student of the stage before, or for what is in ``cache`` alone."""
    cache: str = "auto"
    """Cache of its answers: ``auto`` where it is exact, ``off``, or the folder of a cache."""
    top_k: int | None = None
    """Number k of most probable tokens cached for each position of a sequence, with the mass of all others."""
    draws: int | None = None
    """Number of tokens cached for each position of a sequence, drawn from the teacher's distribution."""
    feature_mib: float = 1024
    """Largest cache, in MiB, of the layers on training rows that the loss uses; 0 never caches them."""
    members: list[Member] | None = None
    """Several teachers instead of one: what each differs in from the keys above, such as ``[{seed: 1}, {seed: 2}]``."""
    weighting: Literal["mean", "confidence", "learned", "tasks"] = "mean"
    """Weighting of the members.

    All alike, by how well each knows a row's label, by weights that the loss trains; or each for the task that its
    ``data.label`` names (without members, one for each of the data's tasks).
    """

    @property
    def kind(self) -> TeacherKind:
        """Kind of the teacher, which says where it comes from."""
        if self.members is not None:
            return "several"
        if self.net is not None:
            return "trained" if self.checkpoint is None else "loaded"
        return "previous" if self.cache in ("auto", "off") else "cached"

    @property
    def each(self) -> list[TeacherSpec]:
        """Members, each with the keys of all overridden by its own; this teacher alone where it has none.

        Raises:
            UserError: of no members at all, of members without a network, or of what a member cannot have.
        """
        if self.members is None:
            return [self]
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return [TeacherSpec.of(values) for values in merge_members(own)]


NOT_OF_ONE = ("members", "weighting", "top_k", "draws")
"""Keys of a teacher that no single one of several has."""


def merge_members(teacher: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the keys of each member of a teacher: those of all overridden by its own; mappings inside key by key.

    A mapping of another ``_target_`` stands for itself: what one network is told means nothing to another.

    Raises:
        UserError: if there are no members, they have no network, or a member names a key that it cannot have.
    """
    members = teacher["members"]
    if not members:
        raise UserError("teacher.members", "an empty list", "a mapping each, such as [{seed: 1}, {seed: 2}], or null")
    for key in ("top_k", "draws"):
        if teacher.get(key) is not None:
            raise UserError(f"teacher.{key}", f"{teacher[key]}, and teacher.members are several", "null")
    beneath = {key: value for key, value in teacher.items() if key not in NOT_OF_ONE}
    known = [f.name for f in fields(TeacherSpec) if f.name not in NOT_OF_ONE]
    merged = []
    for n, member in enumerate(members):
        for key in member:
            if key not in known:
                raise unknown(f"teacher.members[{n}].{key}", str(key), known, "key of a teacher")
        merged.append({**beneath, **{key: _over(beneath.get(key), value) for key, value in member.items()}})
        if merged[-1].get("net") is None:
            raise UserError(f"teacher.members[{n}].net", "none", "a network, or teacher=NAME for all members")
    return merged


def _over(beneath: object, value: object) -> Any:
    if not isinstance(beneath, Mapping) or not isinstance(value, Mapping):
        return value
    if value.get("_target_", beneath.get("_target_")) != beneath.get("_target_"):
        return dict(value)
    return {**beneath, **{key: _over(beneath.get(key), inner) for key, inner in value.items()}}


@dataclass
class Experiment:
    """Root of the configuration."""

    name: str
    """Name of the experiment; its runs are in ``output/name``."""
    task: Annotated[dict, "task"]
    data: Annotated[dict, "data"]
    student: Annotated[dict, "network"]
    loss: Annotated[dict, "loss"]
    method: Annotated[dict, "method"]
    optimizer: Annotated[dict, "optimizer"]
    trainer: Annotated[dict, "trainer"]
    teacher: TeacherSpec | None = None
    pretrained: PretrainedSpec | None = None
    scheduler: Annotated[dict | None, "scheduler"] = None
    logger: Annotated[dict | None, "logger"] = None
    batch_transform: Annotated[dict | None, "batch_transform"] = None
    """Transform that replaces the data's batches, such as by the student's own text, or the teacher's."""
    steps: Annotated[list | None, "step"] = None
    """Changes to the student after ``init`` and before ``adapter``, in order: mappings with ``_target_``."""
    adapter: Annotated[dict | None, "step"] = None
    """Step that trains in the place of the student's own weights, such as LoRA; merged into them at the end."""
    auxiliary: Annotated[dict | None, "auxiliary"] = None
    """Network that trains beside the student and is left behind: peers, or exits on its inner layers."""
    seed: int = 0
    """Seed of the student: its first weights, the order of examples, augmentation."""
    epochs: int = 30
    init: Literal["fresh", "previous", "teacher", "layer_subset", "teacher_head", "pretrained"] = "fresh"
    """Start of the student.

    Random weights, the stage before, its teacher, every second layer of its teacher (``layer_subset``), random weights
    but for the head (``teacher_head``) of its teacher, which stays as it is, or ``pretrained``.
    """
    baseline: bool = True
    """Whether to train the same student without its teacher too."""
    stages: dict = field(default_factory=dict)
    """Map of name → overrides: fits in sequence, each composed on top of the experiment."""
    resume: str | None = None
    """Run folder to go on in, or ``auto`` for the newest one of this configuration, if there is any."""
    output: str = "outputs"
    continued_from: dict | None = None
    """Run whose last state this one starts from: its folder (``run``), its ``epochs``, and the hash of that ``state``.

    Set by ``resume=RUN`` with more epochs, and never typed.
    """

    @property
    def method_name(self) -> str:
        """Class of the method, such as ``OfflineKD``."""
        return str(self.method.get("_target_", "")).rpartition(".")[2]

    @property
    def self_teacher(self) -> str | None:
        """Kind of self-teacher, see :class:`~kdlab.methods.SelfDistillation`; None for other methods."""
        return self.method.get("self_teacher")

    @property
    def teaches_itself(self) -> bool:
        """Whether the student has no other teacher: it learns from its past, or from peers or exits of its own."""
        return self.past_teaches or self.self_teacher == "none"

    @property
    def past_teaches(self) -> bool:
        """Whether the student of earlier steps is the teacher."""
        return self.self_teacher in ("ema", "snapshot")

    @property
    def names_previous(self) -> bool:
        """Whether the teacher is ``previous``: the student of the stage before."""
        return self.teacher is not None and self.teacher.kind == "previous"

    @property
    def previous_teaches(self) -> bool:
        """Whether the fit before is the teacher: born-again generations, and ``teacher=previous``."""
        return self.self_teacher == "previous" or self.names_previous

    @property
    def goes_on(self) -> bool:
        """Whether the fit before is the teacher, or what the student starts from."""
        return self.init == "previous" or self.previous_teaches

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Experiment:
        """Build the experiment from a plain, checked mapping."""
        values = builder.bind(config, target=f"{__name__}.Experiment")
        for name, kind in (("teacher", TeacherSpec), ("pretrained", PretrainedSpec)):
            if isinstance(values.get(name), Mapping):
                values[name] = kind.of(values[name])
        made = cls(**values)
        if made.teacher is not None and made.teacher.weighting == "tasks" and made.teacher.members is None:
            made.teacher = replace(made.teacher, members=[{"data": {"label": name}} for name in made.labels])
        return made

    @property
    def labels(self) -> list[str]:
        """Labels that the data are asked for, each of which is to have a teacher of its own.

        Raises:
            UserError: if they are not several.
        """
        label = self.data.get("label") or self.data.get("target")
        if not isinstance(label, list | tuple | Mapping) or len(label) < 2:
            raise UserError(
                "teacher.weighting", f"tasks, and data.label is {label!r}", "mean, or data with several labels"
            )
        return [str(name) for name in label]
