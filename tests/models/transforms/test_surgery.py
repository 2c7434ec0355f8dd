"""Heads replaced, parts frozen."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from kdlab.errors import UserError
from kdlab.models import (
    MLP,
    CifarResNet,
    WideResNet,
    freeze,
    frozen_modules,
    head_of,
    keep_frozen_eval,
    layer_names,
    replace_head,
    weights_hash,
)


def net_() -> CifarResNet:
    torch.manual_seed(0)
    return CifarResNet(8, width=4)


def train(net: nn.Module, steps: int = 3) -> None:
    """Steps as a loop takes them that knows nothing of frozen parts."""
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        net.train()
        loss = nn.functional.cross_entropy(net(torch.rand(8, 3, 8, 8)), torch.arange(8))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def changed(net: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {k for k, v in net.state_dict().items() if not torch.equal(v, before[k])}


def test_head_of() -> None:
    net = net_()
    assert head_of(net) == ("fc", net.fc)
    fully_convolutional = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 1), nn.Flatten())
    assert head_of(fully_convolutional)[0] == "2"
    with pytest.raises(UserError, match="no linear or convolutional layer"):
        head_of(nn.Sequential(nn.ReLU()))


def test_replace_head() -> None:
    net = net_()
    old, body = net.fc, {k: v.clone() for k, v in net.state_dict().items() if not k.startswith("fc.")}
    new = replace_head(net, 3)
    assert net.fc is new is not old and (new.in_features, new.out_features) == (16, 3)
    assert net.eval()(torch.rand(2, 3, 8, 8)).shape == (2, 3)
    assert all(torch.equal(net.state_dict()[k], v) for k, v in body.items())
    nested = nn.Sequential(
        nn.Flatten(), nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 2, bias=False, dtype=torch.float64))
    )
    head = replace_head(nested, 6)
    assert head.bias is None and head.weight.dtype == torch.float64 and nested[1][1] is head
    conv = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 5, 3, padding=1))
    replace_head(conv, 2)
    assert conv(torch.rand(1, 3, 4, 4)).shape == (1, 2, 4, 4)


def test_replace_head_errors() -> None:
    with pytest.raises(UserError, match="num_classes: 0"):
        replace_head(net_(), 0)
    with pytest.raises(UserError, match="single layer"):
        replace_head(nn.Linear(3, 2), 2)


def test_batchnorm_alone_would_drift() -> None:
    net = net_()
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name.startswith("fc."))
    before = copy.deepcopy(net.state_dict())
    train(net)
    assert any("running_mean" in name for name in changed(net, before))


def test_frozen_backbone_does_not_move() -> None:
    net = net_()
    frozen = freeze(net, "backbone")
    assert "bn1.weight" in frozen and not any(name.startswith("fc.") for name in frozen)
    before = copy.deepcopy(net.state_dict())
    train(net)
    assert changed(net, before) == {"fc.weight", "fc.bias"}


def test_frozen_layers_and_the_rest() -> None:
    net = net_()
    freeze(net, ["conv1", "bn1", "layer1"])
    before = copy.deepcopy(net.state_dict())
    train(net)
    moved = changed(net, before)
    assert not any(name.startswith(("conv1", "bn1", "layer1.")) for name in moved)
    assert {"layer2.0.conv1.weight", "layer2.0.bn1.running_mean", "fc.weight"} <= moved
    freeze(net, "layer2")
    assert net.layer1[0].bn1 in frozen_modules(net) and net.layer2[0].bn1 in frozen_modules(net)


def test_frozen_dropout_is_off_and_a_copy_stays_frozen() -> None:
    net = WideResNet(10, widen=1, dropout=0.5)
    freeze(net, "backbone")
    other = copy.deepcopy(net)
    x = torch.rand(2, 3, 8, 8)
    for each in (net, other):
        each.train()
        assert torch.equal(each(x), each(x))
        assert not each.layer1[0].dropout.training and each.training
    net.train()
    assert net.bn1.training
    keep_frozen_eval(net)
    assert not net.bn1.training


def test_a_container_of_the_head_freezes_but_for_the_head() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 2)))
    assert freeze(net, "backbone") == ["1.0.weight", "1.0.bias"]
    net.train()
    net(torch.rand(1, 4))
    assert not net[1][1].training and net[1][2].training


def test_freeze_all_nothing_and_unknown() -> None:
    net = net_()
    assert freeze(net, None) == [] and all(p.requires_grad for p in net.parameters())
    assert not frozen_modules(net) and not net._forward_pre_hooks
    with pytest.raises(UserError, match="freeze: unknown layer 'layer11'; nearest: layer1"):
        freeze(net, ["layer11"])
    assert all(p.requires_grad for p in net.parameters())
    assert len(freeze(net, "all")) == len(list(net.parameters()))
    before = weights_hash(net)
    net.train()
    net(torch.rand(4, 3, 8, 8))
    assert weights_hash(net) == before


def test_prefixes_end_at_dots() -> None:
    net = MLP(hidden=[4] * 11, in_features=4)
    frozen = freeze(net, "layer1")
    assert frozen == ["layer1.0.weight", "layer1.0.bias"]
    assert {"layer1", "layer11", "layer11.0", "fc"} <= set(layer_names(net)) and "" not in layer_names(net)
