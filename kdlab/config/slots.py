"""What may stand where in a config: for each part, the classes and functions that build it. Imports no torch.

A part names what builds it by ``_target_``. A name is accepted for what it is, and not for where it lives: a network
is a subclass of ``nn.Module`` from ``kdlab.models`` or ``torch.nn``, a loss term is a ``Term``, a data set is one of a
closed list of functions. Everything else in these packages, such as functions that write files, is refused. In an
argument, the annotation says which part is wanted. The user's own modules may add to every part where they are trusted.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from kdlab.config.annotations import Kind, kinds
from kdlab.config.signatures import Parameter, Signature, SourceModule, derives, signature

__all__ = ["OWN", "SLOTS", "Place", "Slot", "accepts", "accepts_object", "base_class"]

Own = Callable[[str], bool]
"""Whether a module, by its dotted name, is one of the user's own that is trusted."""


@dataclass(frozen=True)
class Slot:
    """A kind of part, and what builds one."""

    what: str
    """The part, in words."""
    base: str = ""
    """Dotted name, where it is defined, of the class that its builders derive from; empty where there is none."""
    aliases: tuple[str, ...] = ()
    """Other dotted names of ``base``."""
    package: str = ""
    """Prefix of the modules of kdlab or torch that define such classes."""
    builders: tuple[str, ...] = ()
    """Functions and classes without ``base`` that build it, by the dotted names of their definitions."""
    public: tuple[str, ...] = ()
    """Prefixes under which a config names it."""

    @property
    def names(self) -> tuple[str, ...]:
        """Every dotted name of ``base``."""
        return (self.base, *self.aliases)


def _functions(module: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{module}.{name}" for name in names)


SLOTS: Mapping[str, Slot] = {
    "network": Slot(
        "a network",
        base="torch.nn.modules.module.Module",
        aliases=("torch.nn.Module", "torch.nn.modules.Module"),
        package="kdlab.models.",
        public=("kdlab.models.", "torch.nn."),
    ),
    "loss": Slot("an objective", base="kdlab.losses.objective.Objective", package="kdlab.losses."),
    "term": Slot("a loss term", base="kdlab.losses.term.Term", package="kdlab.losses."),
    "temperature": Slot("a temperature", base="kdlab.losses.temperature.Temperature", package="kdlab.losses."),
    "schedule": Slot("a schedule", builders=("kdlab.functional.schedule.Schedule",), public=("kdlab.functional.",)),
    "task": Slot("a task", base="kdlab.tasks.task.Task", package="kdlab.tasks."),
    "method": Slot("a method", base="kdlab.methods.method.Method", package="kdlab.methods."),
    "trainer": Slot("a trainer", base="kdlab.training.trainer.TrainerConfig", package="kdlab.training."),
    "scheduler": Slot("a scheduler", base="kdlab.methods.learning_rate.LearningRate", package="kdlab.methods."),
    "optimizer": Slot(
        "an optimizer",
        base="torch.optim.optimizer.Optimizer",
        aliases=("torch.optim.Optimizer",),
        package="torch.optim.",
    ),
    "auxiliary": Slot(
        "an auxiliary network",
        base="kdlab.models.transforms.auxiliary.Auxiliary",
        package="kdlab.models.",
        builders=("kdlab.models.transforms.auxiliary.peers",),
    ),
    "step": Slot("a network step", base="kdlab.models.transforms.steps.NetworkStep", package="kdlab.models."),
    "batch_transform": Slot(
        "a batch transform",
        base="kdlab.batch_transforms.base.BatchTransform",
        package="kdlab.batch_transforms.",
    ),
    "data": Slot(
        "a data set",
        builders=(
            *_functions("kdlab.data.datasets.cifar", "cifar10", "cifar100"),
            "kdlab.data.datasets.digits.digits",
            "kdlab.data.datasets.image_folder.image_folder",
            *_functions("kdlab.data.datasets.mnist", "fashion_mnist", "mnist"),
            "kdlab.data.datasets.table.csv",
            "kdlab.data.datasets.synthetic.synthetic",
            "kdlab.data.datasets.tensors.tensors",
            "kdlab.data.text.datasets.arithmetic.arithmetic",
            *_functions("kdlab.data.text.datasets.corpora", "shakespeare", "text_files", "wikitext"),
            "kdlab.data.text.datasets.pairs.pairs",
            *_functions("kdlab.data.text.datasets.reasoning", "cqa", "gsm8k", "svamp"),
            "kdlab.data.audio.speech.spoken_digits",
            "kdlab.data.text.datasets.traces.traces",
        ),
        public=("kdlab.data.",),
    ),
    "logger": Slot(
        "a logger",
        builders=_functions("kdlab.runs.loggers", "tensorboard", "csv", "wandb", "mlflow", "none"),
        public=("kdlab.runs.loggers.",),
    ),
}
"""Part of a config → its builders; a test holds every name against the real classes and functions."""

TORCH_LAYERS = "torch.nn.modules."
"""Prefix of torch's layers; what else is in ``torch.nn`` (parallel, quantised, utilities) is no part."""

OWN = Slot("an object of your own")
"""An argument of the user's own class or function: what any part may be, and whatever the user's modules hold."""


# ---- what a target is


def accepts(slot: Slot, owner: Signature, own: Own) -> bool:
    """Return whether the class or function of a signature may build the part, as far as its source says."""
    if slot is OWN:
        return _is_own(owner, own) or any(accepts(one, owner, own) for one in SLOTS.values())
    defined, node = owner.defined, owner.definition
    if defined in slot.builders:
        return True
    if not isinstance(node, ast.ClassDef):
        return _is_own(owner, own)
    if not (_is_own(owner, own) or _in_package(slot, defined)):
        return False
    assert owner.scope is not None
    return not slot.base or derives(owner.scope, node, slot.names) is not False


def accepts_object(slot: Slot, found: Any, own: Own) -> bool:
    """Return whether an imported class or function may build the part, as :func:`accepts` does for its source."""
    if slot is OWN:
        return own(found.__module__) or any(accepts_object(one, found, own) for one in SLOTS.values())
    defined = f"{found.__module__}.{found.__qualname__}"
    if defined in slot.builders:
        return True
    if not inspect.isclass(found):
        return own(found.__module__)
    if not (own(found.__module__) or _in_package(slot, defined)):
        return False
    return not slot.base or issubclass(found, base_class(slot))


def base_class(slot: Slot) -> type:
    """Import the class that ``slot.base`` names."""
    module, _, name = slot.base.rpartition(".")
    return getattr(importlib.import_module(module), name)


def named(slots: Iterable[Slot], target: str) -> bool:
    """Return whether a dotted name lies in a package of kdlab or torch where one of these parts is looked for."""
    for slot in slots:
        if slot is OWN and named(SLOTS.values(), target):
            return True
        if target.startswith(slot.public or slot.package or "\0"):
            return True
    return False


def described(slots: Iterable[Slot]) -> str:
    """Describe these parts and the packages that hold them: ``a network of kdlab.models or torch.nn``."""
    parts = []
    for slot in slots:
        where = [prefix.removesuffix(".") for prefix in slot.public or ((slot.package,) if slot.package else ())]
        parts.append(f"{slot.what} of {' or '.join(where)}" if where else slot.what)
    return ", ".join(parts)


def _is_own(owner: Signature, own: Own) -> bool:
    return owner.scope is not None and own(owner.scope.name)


def _in_package(slot: Slot, defined: str) -> bool:
    """Return whether kdlab or torch define such parts in the module of a dotted name."""
    if not slot.package:
        return False
    return defined.startswith(slot.package) or (slot is SLOTS["network"] and defined.startswith(TORCH_LAYERS))


# ---- what an argument wants


@dataclass(frozen=True)
class Place:
    """Place of a value: the alternatives that its annotation gives, and whether the user's own code takes it."""

    kinds: tuple[Kind, ...] = ()
    own: bool = False

    @classmethod
    def of(cls, parameter: Parameter | None, own: Own) -> Place:
        """Return the place of an argument; None is one that is passed on to something unknown."""
        if parameter is None:
            return cls()
        return cls(tuple(kinds(parameter.annotation, parameter.scope)), own(parameter.scope.name))

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The parts that may be built here."""
        if self.own:
            return (OWN,)
        slots: dict[str, Slot] = {}
        for kind in self.kinds:
            slots |= {one.what: one for one in _slots_of(kind)}
        return tuple(slots.values())

    def inside(self, name: str | None = None) -> Place:
        """Return the place of an element: of a list (without a name), or of a plain mapping by its key."""
        if self.own:
            return self
        return replace(self, kinds=tuple(one for kind in self.kinds for one in _inside(kind, name)))

    @property
    def wants_network(self) -> bool:
        """Whether the annotation is an ``nn.Module``."""
        return any(kind.label == "Module" for kind in self.kinds)


def _slots_of(kind: Kind) -> list[Slot]:
    if kind.slot:
        return [SLOTS[kind.slot]]
    if kind.name == "fields":
        defined = f"{kind.scope.name}.{kind.label}"
        return [slot for slot in SLOTS.values() if defined in slot.builders]
    if kind.name != "other":
        return []
    if isinstance(kind.definition, ast.ClassDef):
        return [s for s in SLOTS.values() if s.base and _is_a(kind.scope, kind.definition, s.names)]
    return [SLOTS["network"]] if kind.label == "Module" else []


def _is_a(scope: SourceModule, node: ast.ClassDef, names: tuple[str, ...]) -> bool:
    return f"{scope.name}.{node.name}" in names or derives(scope, node, names) is True


def _inside(kind: Kind, name: str | None) -> list[Kind]:
    if kind.slot:
        return [kind]  # a plain list or mapping of such parts, or of what they are made of
    if name is None and kind.name == "list" and kind.inner:
        return [one for node in kind.inner for one in kinds(node, kind.scope)]
    if name is not None and kind.name == "mapping" and len(kind.inner) > 1:
        return kinds(kind.inner[1], kind.scope)
    if name is not None and kind.name == "fields":
        parameter = signature(f"{kind.scope.name}.{kind.label}").parameters.get(name)
        return kinds(parameter.annotation, parameter.scope) if parameter else []
    return []
