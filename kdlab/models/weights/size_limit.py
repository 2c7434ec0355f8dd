"""A limit on how large a network may grow while it is built from a description that somebody else may have written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.parameter import is_lazy

from kdlab.errors import UserError

TIMES_FILE = 16
"""Number of bytes of parameters that one byte of a weights file may stand for: float64 in place of 4 bits."""

ALWAYS = 64 * 2**20
"""Number of bytes of parameters that any description may ask for."""

MODULES_ALWAYS = 2_000
"""Number of layers that any description may ask for."""

LEAST_OF_FILE = 32
"""Bytes of a weights file for each layer beyond these; the smallest tensor takes some hundreds."""


@contextmanager
def no_larger_than(weights: Path) -> Iterator[None]:
    """Stop building a network that grows far beyond what its file of weights can hold.

    Layers announce their parameters and parts as they are made, before they fill them with numbers, so that a size
    that does not fit into memory is noticed before it takes any.

    Args:
        weights: the file that is to be loaded into the network.

    Raises:
        UserError: once the network is larger.
    """
    held = weights.stat().st_size if weights.is_file() else 0
    limit, most = ALWAYS + TIMES_FILE * held, MODULES_ALWAYS + held // LEAST_OF_FILE
    size = {"bytes": 0, "modules": 0}

    def add_tensor(owner: nn.Module, name: str, tensor: Any) -> None:
        if tensor is None or is_lazy(tensor):
            return
        size["bytes"] += tensor.numel() * tensor.element_size()
        if size["bytes"] > limit:
            raise UserError(
                "network",
                (
                    f"has more than {limit / 2**20:,.0f} MiB of parameters, and its weights are a "
                    f"file of {held / 2**20:,.1f} MiB"
                ),
                "the network that these weights are of",
            )

    def add_module(owner: nn.Module, name: str, part: object) -> None:
        size["modules"] += 1
        if size["modules"] > most:
            raise UserError(
                "network",
                (f"has more than {most:,} layers, and its weights are a file of {held / 2**20:,.1f} MiB"),
                "the network that these weights are of",
            )

    with ExitStack() as hooks:
        for register, hook in (
            (torch_module.register_module_parameter_registration_hook, add_tensor),
            (torch_module.register_module_buffer_registration_hook, add_tensor),
            (torch_module.register_module_module_registration_hook, add_module),
        ):
            hooks.callback(register(hook).remove)  # type: ignore[operator]
        yield
