"""Steps that make a network what is trained and deployed: load weights, take layers, replace heads, attach adapters.

A network is built from its config, and goes through a list of steps. A step may change the architecture before training
(``before``), finish after it (``after``), and describes itself so that the change can be repeated on a fresh network,
without data and without other networks (``describe``, ``replay``). ``model.json`` records the list; whoever rebuilds
the network (``predict``, ``diagnose``, a later run that starts from it) builds it from its config, replays the steps,
loads the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kdlab.config import builder
from kdlab.errors import UserError, unknown
from kdlab.functional import Batch, hash_seed, seed_all
from kdlab.models.transforms.layer_subset import Layers, cut
from kdlab.models.transforms.lora import attach_lora, merge, save_adapter
from kdlab.models.transforms.simkd import reuse_teacher_head
from kdlab.models.transforms.surgery import freeze, replace_head
from kdlab.models.weights.checkpoint import save_weights
from kdlab.ranges import share, whole_number

TARGET = "_target_"
"""Key of a described step that names its class."""


def _no_batches() -> Iterable[Batch]:
    return ()


@dataclass(frozen=True)
class StepContext:
    """Context of a step: what it may look at beside the network that it changes."""

    previous: nn.Module | None = None
    """Network of the stage before."""
    teacher: nn.Module | None = None
    """Teacher's network; None where there is none, or several."""
    pretrained: Callable[[nn.Module], None] | None = None
    """Function that loads the weights of ``pretrained`` into a network, in place."""
    seed: int = 0
    """Seed of what a step draws at random."""
    batches: Callable[[], Iterable[Batch]] = field(default=_no_batches)
    """Function that returns training batches, for steps that measure activations."""
    folder: Path | None = None
    """Folder of the deployable weights, for files that a step keeps beside them; None before training."""


class NetworkStep:
    """A change to a network: the base of all steps, which changes nothing."""

    def before(self, net: nn.Module, context: StepContext) -> nn.Module:
        """Change the network before it trains, in place or by another one.

        Args:
            net: network in its first state.
            context: further objects that may be looked at.

        Returns:
            The network that trains.

        Raises:
            UserError: if the network cannot be changed so.
        """
        return net

    def after(self, net: nn.Module, context: StepContext) -> nn.Module:
        """Change the trained network into what is deployed; the steps finish in the opposite order."""
        return net

    def replay(self, net: nn.Module) -> nn.Module:
        """Bring a fresh network into the architecture that the deployed weights are of; values do not matter."""
        return net

    def describe(self) -> dict[str, Any]:
        """Return the step as a mapping of plain values that builds it again, ready for ``replay``.

        The keys beside ``_target_`` are arguments of the constructor. Steps of kdlab go by the name that
        ``kdlab.models`` exports, so that a recorded network outlives a move of the file.
        """
        module = type(self).__module__
        owner = "kdlab.models" if module.startswith("kdlab.models.") else module
        return {TARGET: f"{owner}.{type(self).__qualname__}"}


ORIGINS = ("previous", "teacher", "pretrained")
"""Origins that weights can be loaded from."""


class LoadWeights(NetworkStep):
    """Weights of another network of the same architecture: of the stage before, of the teacher, or pretrained ones.

    Args:
        origin: one of :data:`ORIGINS`.

    Raises:
        UserError: for another origin.
    """

    def __init__(self, origin: str) -> None:
        if origin not in ORIGINS:
            raise unknown("origin", origin, ORIGINS)
        self.origin = origin

    def before(self, net: nn.Module, context: StepContext) -> nn.Module:
        """Load the weights, in place (see base class)."""
        given = getattr(context, self.origin)
        if given is None:
            raise UserError(
                "init", f"{self.origin}, and the experiment has no {self.origin}", "fresh, previous, pretrained"
            )
        if self.origin == "pretrained":
            given(net)
            return net
        try:
            net.load_state_dict(given.state_dict())
        except RuntimeError:
            raise UserError(
                "init",
                f"{self.origin}, which is another architecture than the student",
                "the same network, or init=fresh",
            ) from None
        return net

    def describe(self) -> dict[str, Any]:
        """Return the origin (see base class)."""
        return {**super().describe(), "origin": self.origin}


class LayerSubset(NetworkStep):
    """Some of the teacher's layers, as in DistilBERT: see :func:`~kdlab.models.cut`.

    Args:
        layers: the teacher's blocks to take, in order, or {path of a stack: blocks}; None spaces them evenly.
    """

    def __init__(self, layers: Layers | None = None) -> None:
        self.layers = layers

    def before(self, net: nn.Module, context: StepContext) -> nn.Module:
        """Copy embeddings, blocks and head from the teacher, in place (see base class)."""
        self.layers = cut(net, _teacher(context, "layer_subset"), self.layers)
        return net

    def describe(self) -> dict[str, Any]:
        """Return the teacher's blocks that were taken (see base class)."""
        return {**super().describe(), "layers": self.layers}


class TeacherHead(NetworkStep):
    """A copy of the teacher's classifier, frozen: see :func:`~kdlab.models.reuse_teacher_head` (SimKD)."""

    def before(self, net: nn.Module, context: StepContext) -> nn.Module:
        """Copy the classifier, in place (see base class)."""
        reuse_teacher_head(net, _teacher(context, "teacher_head"))
        return net


class ReplaceHead(NetworkStep):
    """A fresh classifier for another number of classes: see :func:`~kdlab.models.replace_head`.

    Args:
        num_classes: outputs of the new classifier, at least 1.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes

    def before(self, net: nn.Module, context: StepContext) -> nn.Module:
        """Replace the classifier, in place (see base class)."""
        seed_all(hash_seed(context.seed, 0x68656164))
        return self.replay(net)

    def replay(self, net: nn.Module) -> nn.Module:
        """Replace the classifier, in place (see base class)."""
        replace_head(net, self.num_classes)
        return net

    def describe(self) -> dict[str, Any]:
        """Return the number of classes (see base class)."""
        return {**super().describe(), "num_classes": self.num_classes}


class Freeze(NetworkStep):
    """Parts that keep their weights: see :func:`~kdlab.models.freeze`.

    Args:
        layers: ``backbone`` (all but the head), or module paths.
    """

    def __init__(self, layers: str | Sequence[str]) -> None:
        self.layers = layers

    def before(self, net: nn.Module, context: StepContext) -> nn.Module:
        """Freeze the parts, in place (see base class)."""
        freeze(net, self.layers)
        return net

    def describe(self) -> dict[str, Any]:
        """Return the frozen parts (see base class)."""
        return {**super().describe(), "layers": self.layers if isinstance(self.layers, str) else list(self.layers)}


class LoRA(NetworkStep):
    """Low-rank adapters that train in the place of the network's own weights, and are merged at the end.

    Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*, ICLR 2022; see
    :func:`~kdlab.models.transforms.lora.attach_lora`.

    Args:
        rank: rank of the adapters, at least 1.
        alpha: scale; alpha / rank multiplies the adapters.
        dropout: dropout of what the adapters read, in [0, 1).
        targets: layers by their paths or the ends of them; None is peft's choice, or every linear layer.
    """

    def __init__(
        self, rank: int = 8, alpha: float = 16, dropout: float = 0.0, targets: Sequence[str] | None = None
    ) -> None:
        whole_number("rank", rank)
        share("dropout", dropout, one=False)
        self.rank, self.alpha, self.dropout, self.targets = rank, alpha, dropout, targets

    def before(self, net: nn.Module, context: StepContext) -> nn.Module:
        """Attach the adapters, in place (see base class)."""
        seed_all(hash_seed(context.seed, 0x6C6F7261))
        attach_lora(net, self.rank, self.alpha, self.dropout, self.targets)
        return net

    def after(self, net: nn.Module, context: StepContext) -> nn.Module:
        """Keep the adapters in ``adapter/`` beside the weights, and merge them into the network (see base class)."""
        if context.folder is not None:
            save_adapter(net, context.folder / "adapter")
        merge(net)
        return net

    def describe(self) -> dict[str, Any]:
        """Return the arguments (see base class)."""
        targets = None if self.targets is None else list(self.targets)
        own = {"rank": self.rank, "alpha": self.alpha, "dropout": self.dropout, "targets": targets}
        return {**super().describe(), **own}


class Repeated(NetworkStep):
    """A step that an earlier network went through, repeated on a fresh one that is to hold its weights.

    Args:
        step: the step, as it was described.
    """

    def __init__(self, step: NetworkStep) -> None:
        self.step = step

    def before(self, net: nn.Module, context: StepContext) -> nn.Module:
        """Repeat the change without data (see base class)."""
        return self.step.replay(net)

    def replay(self, net: nn.Module) -> nn.Module:
        """Repeat the change without data (see base class)."""
        return self.step.replay(net)

    def describe(self) -> dict[str, Any]:
        """Return the description of the step itself (see base class)."""
        return self.step.describe()


def apply_steps(net: nn.Module, steps: Mapping[str, NetworkStep], context: StepContext) -> nn.Module:
    """Let every step change a network before it trains, in order.

    Args:
        net: network in its first state.
        steps: config key of each step, for messages → the step.
        context: further objects that steps may look at.

    Returns:
        The network that trains.

    Raises:
        UserError: what a step refuses.
    """
    for key, step in steps.items():
        try:
            net = step.before(net, context)
        except UserError as error:
            raise error.under(key) if error.key in vars(step) else error from None
    return net


def finish_steps(net: nn.Module, steps: Mapping[str, NetworkStep], context: StepContext, weights: Path) -> nn.Module:
    """Let every step finish a trained network, the last one first, and write its weights anew where one does.

    Args:
        net: trained network.
        steps: steps that it went through.
        context: further objects that steps may look at; ``folder`` is that of the weights.
        weights: file of the deployable weights.

    Returns:
        The network that is deployed.
    """
    finishing = [step for step in steps.values() if type(step).after is not NetworkStep.after]
    for step in reversed(finishing):
        net = step.after(net, replace(context, folder=weights.parent))
    if finishing:
        save_weights(net, weights)
    return net


def describe_steps(steps: Mapping[str, NetworkStep]) -> list[dict[str, Any]]:
    """Return what ``model.json`` records: each step as plain values, in order."""
    return [step.describe() for step in steps.values()]


def read_steps(described: Sequence[Mapping[str, Any]]) -> list[NetworkStep]:
    """Build the steps that ``model.json`` records.

    Raises:
        UserError: for what is no step, or may not be built here.
    """
    return [builder.build(step, f"steps[{n}]", slot="step") for n, step in enumerate(described)]


def replay_steps(net: nn.Module, described: Sequence[Mapping[str, Any]]) -> nn.Module:
    """Bring a network, fresh from its config, into the architecture that its weights are of.

    Raises:
        UserError: as :func:`read_steps`.
    """
    for step in read_steps(described):
        net = step.replay(net)
    return net


def repeated(described: Sequence[Mapping[str, Any]]) -> dict[str, NetworkStep]:
    """Return the recorded steps of an earlier network that change its architecture, ready to be applied to another."""
    steps = [step for step in read_steps(described) if type(step).replay is not NetworkStep.replay]
    return {f"repeated[{n}]": Repeated(step) for n, step in enumerate(steps)}


def first_weights(net: nn.Module) -> dict[str, Tensor]:
    """Return a copy of a network's state dict on the CPU."""
    return {name: value.detach().cpu().clone() for name, value in net.state_dict().items()}


def _teacher(context: StepContext, init: str) -> nn.Module:
    if context.teacher is None:
        raise UserError("init", f"{init}, and the experiment has no teacher", "fresh, previous, pretrained")
    return context.teacher
