"""Capture the output of layers by their dotted names, without touching the network for longer than the call."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from kdlab.errors import unknown


class Taps:
    """Collector of the outputs of ``layers`` of ``net`` while open; the hooks are gone afterwards.

    A network that is copied or exported between two calls therefore carries no hook of ours.

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    >>> with Taps(net, ["0"]) as seen:
    ...     _ = net(__import__("torch").zeros(1, 2))
    >>> seen["0"].shape
    torch.Size([1, 3])
    """

    def __init__(self, net: nn.Module, layers: Iterable[str], key: str = "layer") -> None:
        self.layers = tuple(dict.fromkeys(layers))
        modules = dict(net.named_modules())
        for name in self.layers:
            if not name or name not in modules:
                raise unknown(key, name, [n for n in modules if n], "layer")
        self._modules = [(name, modules[name]) for name in self.layers]
        self.outputs: dict[str, Tensor] = {}
        self._handles: list = []

    def __enter__(self) -> dict[str, Tensor]:
        self.outputs = {}
        for name, module in self._modules:
            self._handles.append(module.register_forward_hook(self._store(name)))
        return self.outputs

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _store(self, name: str) -> Callable[[nn.Module, tuple, Any], None]:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            value: Any = output[0] if isinstance(output, tuple) else output
            if not isinstance(value, Tensor):
                value = value.last_hidden_state
            self.outputs[name] = value

        return hook
