"""What a network costs."""

from __future__ import annotations

import torch
from torch import nn

from kdlab.models import MLP, CifarResNet, flops, freeze, latency_ms, parameters, size_bytes


def test_sizes() -> None:
    net = MLP(hidden=[20], num_classes=2, in_channels=10)
    freeze(net, "backbone")
    assert parameters(net) == 262
    assert size_bytes(net) == size_bytes(net.state_dict()) == 262 * 4
    assert size_bytes(net.half()) == 262 * 2
    bn = nn.BatchNorm1d(3)
    assert size_bytes(bn) == 4 * 3 * 4 + 8


def test_flops_count_two_per_multiply_add_of_one_example() -> None:
    assert flops(MLP(hidden=[20], num_classes=2, in_channels=10), torch.rand(5, 10)) == 2 * (10 * 20 + 20 * 2)
    conv = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(8 * 36, 4))
    assert flops(conv, torch.rand(2, 3, 6, 6)) == 2 * (36 * 8 * 27 + 8 * 36 * 4)


def test_flops_of_resnet20() -> None:
    stem, first = 27 * 16 * 32**2, 6 * 9 * 16**2 * 32**2
    second = 9 * (16 * 32 + 5 * 32**2) * 16**2
    third = 9 * (32 * 64 + 5 * 64**2) * 8**2
    net = CifarResNet(20, shortcut="A")
    assert flops(net, torch.rand(1, 3, 32, 32)) == 2 * (stem + first + second + third + 64 * 10)


def test_latency_restores_threads_and_modes() -> None:
    net = CifarResNet(8, width=4).train()
    net.layer1.eval()
    before, running = torch.get_num_threads(), net.bn1.running_mean.clone()
    milliseconds = latency_ms(net, torch.rand(4, 3, 8, 8), n=5)
    assert 0 < milliseconds < 1000
    assert torch.get_num_threads() == before
    assert net.training and net.layer2[0].training and not net.layer1[0].training
    assert torch.equal(net.bn1.running_mean, running)


def test_keyword_inputs() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return self.fc(a + b)

    example = {"a": torch.rand(4, 3), "b": torch.rand(4, 3)}
    assert flops(Sum(), example) == 12
    assert latency_ms(Sum(), example, n=3) > 0
