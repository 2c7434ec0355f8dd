"""Changing a network in place: another classifier, frozen parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from kdlab.errors import UserError, unknown

_FROZEN = "_kdlab_frozen"

Head = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
"""Layers that can be a classifier."""


def layer_names(net: nn.Module) -> list[str]:
    """Return the dotted names of all modules inside ``net``, which can be tapped, and which ``freeze`` takes."""
    return [name for name, _ in net.named_modules() if name]


def head_of(net: nn.Module) -> tuple[str, Head]:
    """Return the classifier with its dotted name: the last linear or convolutional layer.

    Raises:
        UserError: ``net`` has neither.
    """
    layers = [(name, module) for name, module in net.named_modules() if isinstance(module, Head)]
    if not layers:
        raise UserError(type(net).__name__, "has no linear or convolutional layer that could be its head")
    return layers[-1]


def classifiers_of(net: nn.Module) -> list[str]:
    """Return the dotted names of a network's classifiers: those that it declares, or its head.

    Raises:
        UserError: as :func:`head_of`.
    """
    return list(getattr(net, "classifiers", ())) or [head_of(net)[0]]


def replace_head(net: nn.Module, num_classes: int) -> Head:
    """Give ``net`` a fresh classifier for ``num_classes`` classes, in place, with the old one's input width.

    Returns:
        The new layer, on the old one's device and of its type.

    Raises:
        UserError: there is no head, it is the whole network, or ``num_classes`` is below 1.
    """
    if num_classes < 1:
        raise UserError("num_classes", f"{num_classes} must be at least 1")
    name, old = head_of(net)
    if not name:
        raise UserError(type(net).__name__, "is a single layer: nothing would be left of it")
    like: Any = {"bias": old.bias is not None, "device": old.weight.device, "dtype": old.weight.dtype}
    new: Head
    if isinstance(old, nn.Linear):
        new = nn.Linear(old.in_features, num_classes, **like)
    else:
        form: Any = (old.kernel_size, old.stride, old.padding, old.dilation)
        new = type(old)(old.in_channels, num_classes, *form, **like)
    new.train(old.training)
    net.set_submodule(name, new)
    return new


def reorder_classes(net: nn.Module, head: str, order: Sequence[int]) -> bool:
    """Put the classes of a classifier into another order, in place: class i becomes what class ``order[i]`` was.

    Args:
        net: the network.
        head: dotted name of its classifier.
        order: a permutation of its classes.

    Returns:
        Whether there is such a layer with a tensor by class; nothing changes otherwise.
    """
    try:
        module = net.get_submodule(head)
    except AttributeError:
        return False
    tensors = [t for t in (*module.parameters(), *module.buffers()) if t.ndim and t.shape[0] == len(order)]
    with torch.no_grad():
        for tensor in tensors:
            tensor.copy_(tensor[list(order)])
    return bool(tensors)


def freeze(net: nn.Module, spec: str | Sequence[str] | None) -> list[str]:
    """Keep part of ``net`` as it is: no gradients, and its BatchNorm and dropout in evaluation mode for good.

    ``requires_grad=False`` alone lets BatchNorm's statistics drift, and a later ``.train()``, as every
    training loop calls it, would switch ``eval()`` off again. So the frozen modules are marked, and each
    forward pass of ``net`` first puts them back into evaluation mode. Two calls add up.

    Args:
        net: the network, changed in place.
        spec: "backbone" (all but the head and what it shares), "all", a module's name or a list of names (with all they
            contain), or None for nothing.

    Returns:
        The names of the frozen parameters.

    Raises:
        UserError: a name that ``net`` does not have, with the nearest ones.
    """
    if spec is None:
        return []
    inside = _selector(net, spec)
    for name, module in net.named_modules():
        if inside(name):
            setattr(module, _FROZEN, True)
    # a language model's output matrix may be its embedding too: it trains, whichever of its names comes first
    heads = classifiers_of(net) if spec == "backbone" else []
    kept = {id(p) for head in heads for p in net.get_submodule(head).parameters()}
    frozen = [name for name, p in net.named_parameters() if inside(name) and id(p) not in kept]
    for name in frozen:
        net.get_parameter(name).requires_grad_(False)
    if _keep_frozen_eval_hook not in net._forward_pre_hooks.values():
        net.register_forward_pre_hook(_keep_frozen_eval_hook)
    keep_frozen_eval(net)
    return frozen


def frozen_modules(net: nn.Module) -> list[nn.Module]:
    """Return the modules that ``freeze`` marked."""
    return [module for module in net.modules() if getattr(module, _FROZEN, False)]


def keep_frozen_eval(net: nn.Module) -> None:
    """Put what ``freeze`` froze back into evaluation mode.

    A forward pass does so by itself; call this after ``.train()`` where the modes matter before it (compiled
    networks).
    """
    for module in frozen_modules(net):
        if module.training:
            module.training = False


def _keep_frozen_eval_hook(net: nn.Module, _args: Any) -> None:
    keep_frozen_eval(net)


def _selector(net: nn.Module, spec: str | Sequence[str]) -> Callable[[str], bool]:
    """Return a test whether a module or parameter, by its dotted name, is to be frozen."""
    if spec == "all":
        return lambda name: True
    if spec == "backbone":
        heads = classifiers_of(net)
        # A container of a head cannot be frozen as a whole, but what else it holds is.
        return lambda name: not _within(name, heads) and not any(_within(h, [name]) for h in heads) and name != ""
    names = [spec] if isinstance(spec, str) else list(spec)
    known = layer_names(net)
    for name in names:
        if name not in known:
            raise unknown("freeze", name, ["backbone", "all", *known], "layer")
    return lambda name: _within(name, names)


def _within(name: str, parents: Iterable[str]) -> bool:
    return any(name == parent or name.startswith(f"{parent}.") for parent in parents)
