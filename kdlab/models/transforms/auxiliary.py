"""What trains beside a student and is left behind when it is deployed: peers, and exits on its inner layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from kdlab.errors import UserError
from kdlab.functional import Outputs, Taps
from kdlab.models.transforms.surgery import head_of
from kdlab.models.vision.blocks import BatchNorm, conv1x1, conv3x3, global_pool


class Auxiliary(nn.Module):
    """Wrapper of a student that answers for it while it trains.

    In train mode the answer is a mapping: ``logits``, the student's own, and what the auxiliary adds, by name. In eval
    mode it is the student's own answer alone. The student is no submodule: parameters, state dict, mode and device of
    the auxiliary are of what is left behind.

    Args:
        student: the network that it is for.
    """

    kind = ""
    """Name that a term of the objective calls it by."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self._student = (student,)

    @property
    def student(self) -> nn.Module:
        """The network that is deployed."""
        return self._student[0]

    def answers(self, *inputs: Any, **named: Any) -> dict[str, Any]:
        """Return ``logits`` and all outputs that are added, whatever the mode."""
        raise TypeError(f"{type(self).__name__} does not say what it adds: define answers")

    @override
    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.answers(*inputs, **named) if self.training else self.student(*inputs, **named)


MOST_PEERS = 100
"""Maximum number of peers: all train in the same step, so that one more costs as much as another student."""


class Peers(Auxiliary):
    """Networks that learn the same task at the same time, each from all others: ``peer1``, ``peer2``, ...

    Zhang et al., *Deep Mutual Learning*, CVPR 2018.

    Args:
        student: the network that is deployed.
        nets: the others, of the same classes.

    Raises:
        UserError: without any, or if one is the student itself.
    """

    kind = "peers"

    def __init__(self, student: nn.Module, nets: Sequence[nn.Module]) -> None:
        super().__init__(student)
        if not nets or any(net is student for net in nets):
            raise UserError("nets", "none, or the student itself", "one network or more beside the student")
        self.nets = nn.ModuleList(nets)

    @override
    def answers(self, *inputs: Any, **named: Any) -> dict[str, Any]:
        outputs = Outputs.of(self.student(*inputs, **named))
        peers = {f"peer{n}": Outputs.of(net(*inputs, **named)).logits for n, net in enumerate(self.nets, start=1)}
        return {"logits": outputs.logits, **outputs.heads, **peers}


def peers(
    student: nn.Module,
    make: Callable[[int], nn.Module],
    net: Annotated[Mapping[str, Any] | None, "network"] = None,
    count: int = 1,
) -> Peers:
    """Build the peers of a configuration.

    Args:
        student: the network that is deployed.
        make: function that builds peer 1, 2, ..., each with first weights of its own.
        net: description of their network; None for that of the student.
        count: number of peers.

    Raises:
        UserError: if there are none.
    """
    if not 1 <= count <= MOST_PEERS:
        raise UserError("count", count, f"a whole number, at least 1 and at most {MOST_PEERS}")
    return Peers(student, [make(n) for n in range(1, count + 1)])


class Exits(Auxiliary):
    """A classifier on each of some inner layers: ``exit1``, ..., and ``feature``, ``exit1_feature``, ...

    An exit on a feature map is a bottleneck (1x1, 3x3 at stride 2, 1x1 convolution), a global pool and a linear layer;
    on a vector, two linear layers. Its feature, before the last of them, is as wide as ``feature``: what the student's
    own head reads. Zhang et al., *Be Your Own Teacher: Improve the Performance of Convolutional Neural Networks via
    Self Distillation*, ICCV 2019.

    Args:
        student: the network that is deployed.
        layers: module paths in it, from shallow to deep; each gives maps (B, C, H, W) or vectors (B, F).
        example: inputs of two rows or more, to learn shapes from.

    Raises:
        UserError: if it has no such layer, or one gives neither maps nor vectors.
    """

    kind = "exits"

    def __init__(self, student: nn.Module, layers: Sequence[str], example: Any) -> None:
        super().__init__(student)
        self.layers = (layers,) if isinstance(layers, str) else tuple(layers)
        if not self.layers:
            raise UserError("layers", "[]", "module paths inside the student, such as [layer1, layer2]")
        self._head = (head_of(student)[1],)
        training = student.training
        student.eval()
        inputs = ((), example) if isinstance(example, Mapping) else ((example,), {})
        with torch.no_grad(), Taps(student, self.layers, "layers") as seen, self._head_reads() as read:
            logits = Outputs.of(student(*inputs[0], **inputs[1])).logits
        student.train(training)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or read[0].ndim != 2:
            raise UserError("student", "its head reads no vectors (B, F)", "a classifier with a linear head")
        width = read[0].shape[1]
        self.features = nn.ModuleList(_to_width(name, seen[name], width) for name in self.layers)
        self.heads = nn.ModuleList(nn.Linear(width, logits.shape[1]) for _ in self.layers)

    @override
    def answers(self, *inputs: Any, **named: Any) -> dict[str, Any]:
        with Taps(self.student, self.layers) as seen, self._head_reads() as read:
            outputs = Outputs.of(self.student(*inputs, **named))
        answers: dict[str, Any] = {"logits": outputs.logits, **outputs.heads, "feature": read[0]}
        for n, name in enumerate(self.layers, start=1):
            feature = self.features[n - 1](seen[name])
            answers |= {f"exit{n}": self.heads[n - 1](feature), f"exit{n}_feature": feature}
        return answers

    @contextmanager
    def _head_reads(self) -> Iterator[list[Tensor]]:
        """Record the input of the student's head."""
        read: list[Tensor] = []
        handle = self._head[0].register_forward_pre_hook(lambda _, given: read.append(given[0]))
        try:
            yield read
        finally:
            handle.remove()


def _to_width(name: str, feature: Tensor, width: int) -> nn.Module:
    """Build the layers from a layer's output to vectors of the width that the student's head reads."""
    inputs = feature.shape[1] if feature.ndim > 1 else 0
    if feature.ndim == 2:
        return nn.Sequential(nn.Linear(inputs, width), nn.ReLU())
    if feature.ndim != 4:
        raise UserError("layers", f"{name} gives {tuple(feature.shape)}", "maps (B, C, H, W) or vectors (B, F)")
    inner = max(inputs, width // 4)
    convolutions = ((conv1x1(inputs, inner), inner), (conv3x3(inner, inner, 2), inner), (conv1x1(inner, width), width))
    blocks = [part for conv, outputs in convolutions for part in (conv, BatchNorm(outputs), nn.ReLU())]
    return nn.Sequential(*blocks, global_pool())
