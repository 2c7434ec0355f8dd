"""The networks: published sizes, shapes of their layers, small images, normalisation, option files."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import kdlab.models as models
from helpers.options import option as option_file
from helpers.paths import CONF
from kdlab.errors import UserError
from kdlab.models.vision.blocks import channel_shuffle
from kdlab.models.vision.resnet import PadShortcut

FILES = CONF / "model"
ELSEWHERE = ("vocab_size", "/model@")
"""What the options of networks that other files test have in them: test_language_models, test_seq2seq, test_simkd."""
OPTIONS = sorted(path.stem for path in FILES.glob("*.yaml") if not any(word in path.read_text() for word in ELSEWHERE))
"""Of pictures and tables."""
IMAGE_OPTIONS = [name for name in OPTIONS if name not in ("mlp_teacher", "mlp_student")]

# Exact counts, and the millions that the distillation benchmark's papers print for CIFAR-100.
PUBLISHED = {
    "resnet8": (83_892, "0.08"),
    "resnet14": (181_108, "0.18"),
    "resnet20": (278_324, "0.28"),
    "resnet32": (472_756, "0.47"),
    "resnet44": (667_188, "0.67"),
    "resnet56": (861_620, "0.86"),
    "resnet110": (1_736_564, "1.74"),
    "resnet8x4": (1_233_540, "1.23"),
    "resnet32x4": (7_433_860, "7.43"),
    "wrn_16_1": (180_916, "0.18"),
    "wrn_16_2": (703_284, "0.70"),
    "wrn_40_1": (569_780, "0.57"),
    "wrn_40_2": (2_255_156, "2.26"),
    "vgg8": (3_965_028, "3.97"),
    "vgg11": (9_277_284, "9.28"),
    "vgg13": (9_462_180, "9.46"),
    "mobilenetv2": (812_836, "0.81"),
    "shufflenetv1": (949_258, "0.95"),
    "shufflenetv2": (1_355_528, "1.36"),
    "resnet50": (23_705_252, "23.71"),
}


def build(name: str, **given: object) -> nn.Module:
    """The network of an option file, with what the code would supply."""
    spec = option_file("model", name)
    cls = getattr(models, spec.pop("_target_").removeprefix("kdlab.models."))
    return cls(**{**spec, **given})


def capture(net: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The output of every module in one forward pass, by dotted name."""
    out: dict[str, torch.Tensor] = {}
    handles = [
        module.register_forward_hook(lambda _m, _a, y, name=name: out.__setitem__(name, y))
        for name, module in net.named_modules()
    ]
    net(x)
    for handle in handles:
        handle.remove()
    return out


@pytest.mark.parametrize("option", PUBLISHED)
def test_published_size(option: str) -> None:
    exact, printed = PUBLISHED[option]
    with torch.device("meta"):
        net = build(option, num_classes=100)
    assert models.parameters(net) == exact
    assert f"{exact / 1e6:.2f}" == printed


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)])
def test_option_a_sizes_of_the_resnet_paper(depth: int, millions: float) -> None:
    with torch.device("meta"):
        count = models.parameters(models.CifarResNet(depth, shortcut="A"))
    assert count == pytest.approx(millions * 1e6, rel=0.02)
    # Without shortcut parameters the size follows from the depth alone: convolutions, BatchNorm, classifier.
    n = (depth - 2) // 6
    convolutions = 27 * 16 + 9 * (2 * n * 16**2 + (2 * n - 1) * (32**2 + 64**2) + 16 * 32 + 32 * 64)
    assert count == convolutions + 2 * (16 + 2 * n * (16 + 32 + 64)) + 650


def test_option_files_name_real_networks() -> None:
    assert set(PUBLISHED) < set(OPTIONS)
    for option in OPTIONS:
        first = (FILES / f"{option}.yaml").read_text().splitlines()[0]
        found = re.search(r": ([\d,]+) parameters \((\d+) classes, (colour|grey|\d+ numbers)\)$", first)
        assert first.startswith("# ") and found, option
        channels = {"colour": 3, "grey": 1}.get(found[3]) or int(found[3].split()[0])
        with torch.device("meta"):
            net = build(option, num_classes=int(found[2]), in_channels=channels)
        assert models.parameters(net) == int(found[1].replace(",", "")), option


def test_every_argument_but_those_of_the_data_can_be_overridden() -> None:
    import inspect

    supplied = {"num_classes", "in_channels", "image_size"}
    for name in OPTIONS:
        spec = option_file("model", name)
        cls = getattr(models, spec.pop("_target_").removeprefix("kdlab.models."))
        assert set(spec) == set(inspect.signature(cls).parameters) - supplied, name


@pytest.mark.parametrize("option", IMAGE_OPTIONS)
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 32)])
def test_forward_and_backward(option: str, channels: int, size: int) -> None:
    torch.manual_seed(0)
    size_argument = {"image_size": size} if option.startswith(("mlp", "vgg")) else {}
    net = build(option, num_classes=7, in_channels=channels, **size_argument)
    logits = net(torch.rand(3, channels, size, size))
    assert logits.shape == (3, 7) and logits.isfinite().all()
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, 3, 6])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


TAPS = {
    "resnet20": {"layer1": (16, 16, 16), "layer2": (32, 8, 8), "layer3": (64, 4, 4), "pool": (64,)},
    "resnet8x4": {"layer1": (64, 16, 16), "layer2": (128, 8, 8), "layer3": (256, 4, 4), "pool": (256,)},
    "resnet20_a": {"layer3.2.preact": (64, 4, 4), "layer3": (64, 4, 4)},
    "wrn_16_2": {"layer1": (32, 16, 16), "layer2": (64, 8, 8), "layer3": (128, 4, 4), "pool": (128,)},
    "vgg8": {
        "layer1": (64, 16, 16), "layer2": (128, 8, 8), "layer3": (256, 4, 4), "layer4": (512, 2, 2),
        "layer5": (512, 2, 2), "pool": (512,),
    },
    "mobilenetv2": {
        "layer2": (12, 8, 8), "layer3": (16, 4, 4), "layer5": (48, 2, 2), "layer7": (160, 1, 1),
        "conv2": (1280, 1, 1), "pool": (1280,),
    },
    "shufflenetv1": {"layer1": (240, 8, 8), "layer2": (480, 4, 4), "layer3": (960, 2, 2), "pool": (960,)},
    "shufflenetv2": {"layer1": (116, 8, 8), "layer2": (232, 4, 4), "layer3": (464, 2, 2), "pool": (1024,)},
    "resnet50": {
        "layer1": (256, 16, 16), "layer2": (512, 8, 8), "layer3": (1024, 4, 4), "layer4": (2048, 2, 2),
        "pool": (2048,),
    },
}  # fmt: skip


@pytest.mark.parametrize("option", TAPS)
def test_documented_layers(option: str) -> None:
    net = build(option, num_classes=5).eval()
    seen = capture(net, torch.rand(2, 3, 16, 16))
    assert {name: tuple(seen[name].shape[1:]) for name in TAPS[option]} == TAPS[option]
    assert torch.equal(seen["fc"], seen[""])


def test_activations_leave_tapped_outputs_alone() -> None:
    net = models.CifarResNet(8, width=4).train()
    before: dict[str, torch.Tensor] = {}
    for name in ("bn1", "layer1.0.bn2", "layer1.0.preact"):
        net.get_submodule(name).register_forward_hook(lambda _m, _a, y, n=name: before.update({n: y.clone()}))
    after = capture(net, torch.rand(4, 3, 8, 8))
    for name, value in before.items():
        assert torch.equal(value, after[name]) and (value < 0).any()
    assert torch.equal(after["layer1.0"], after["layer1.0.preact"].relu())


def test_mlp_takes_flat_rows_and_images() -> None:
    teacher = build("mlp_teacher", num_classes=2, in_channels=10)
    assert teacher(torch.rand(4, 10)).shape == (4, 2)
    assert models.parameters(teacher) == 10 * 20 + 20 + 20 * 2 + 2
    assert capture(teacher, torch.rand(4, 10))["layer1"].shape == (4, 20)
    images = models.MLP(hidden=[6, 5], num_classes=3, in_channels=2, image_size=(4, 3), dropout=0.5)
    assert images(torch.rand(1, 2, 4, 3)).shape == (1, 3)
    assert models.MLP(hidden=[], in_features=7)(torch.rand(2, 7)).shape == (2, 10)
    with pytest.raises(UserError, match="has 11 numbers, the network was built for 10"):
        teacher(torch.rand(4, 11))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: models.CifarResNet(21), r"depth: 21 is not 6n\+2"),
        (lambda: models.CifarResNet(20, shortcut="C"), "shortcut: unknown value 'C'.*accepted: A, B"),
        (lambda: models.CifarResNet(20, width=0), "width: 0"),
        (lambda: models.WideResNet(20), r"depth: 20 is not 6n\+4"),
        (lambda: models.WideResNet(16, dropout=1.0), "dropout: 1.0"),
        (lambda: models.VGG(9), "depth: unknown value '9'.*accepted: 11, 13, 8"),
        (lambda: models.VGG(8, image_size=(8, 4)), "image_size: 4 is too small for VGG.*at least 8"),
        (lambda: models.VGG(8)(torch.rand(2, 3, 4, 4)), "image_size: 4 is too small"),
        (lambda: models.MobileNetV2(width=0.01), "width: 0.01 is too small"),
        (lambda: models.ShuffleNetV1(groups=5), "groups: unknown value '5'"),
        (lambda: models.ShuffleNetV2(width=3), "width: unknown value '3'"),
        (lambda: models.BottleneckResNet(51), "depth: unknown value '51'"),
        (lambda: models.MLP(hidden=[4, 0]), r"hidden: \[4, 0\]"),
        (lambda: models.CifarResNet(8, mean=[0.5, 0.5]), "mean: 2 numbers for 3 channels; give 1 or 3"),
        (lambda: models.CifarResNet(8, std=[0.5, 0.0, 1.0]), "std: .* is not positive"),
        (
            lambda: models.CifarResNet(8, mean="imagnet"),
            "mean: unknown data set 'imagnet'; nearest: imagenet",
        ),
    ],
)
def test_user_errors_are_one_line(make, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_vgg_halves_large_images_once_more() -> None:
    net = models.VGG(8, width=4, image_size=64).eval()
    assert capture(net, torch.rand(1, 3, 64, 64))["layer5"].shape[2:] == (4, 4)


def test_normalize() -> None:
    x = torch.rand(2, 3, 4, 4)
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.25, 2.0]
    normalised = models.Normalize(mean, std, 3)(x)
    for c in range(3):
        torch.testing.assert_close(normalised[:, c], (x[:, c] - mean[c]) / std[c])
    assert models.Normalize()(x) is x
    torch.testing.assert_close(models.Normalize(0.5, 0.5)(x), x * 2 - 1)
    torch.testing.assert_close(models.Normalize(mean, std)(x[:, :, 0, 0]), normalised[:, :, 0, 0])
    bytes_ = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    torch.testing.assert_close(models.Normalize(mean, std)(bytes_), models.Normalize(mean, std)(bytes_ / 255))


def test_normalisation_is_no_part_of_the_weights() -> None:
    plain, normal = (
        models.CifarResNet(8, width=4),
        models.CifarResNet(8, width=4, mean="cifar10", std="cifar10"),
    )
    assert plain.state_dict().keys() == normal.state_dict().keys()
    normal.load_state_dict(plain.state_dict())
    x = torch.rand(2, 3, 8, 8)
    mean, std = normal.normalize.mean.view(1, 3, 1, 1), normal.normalize.std.view(1, 3, 1, 1)
    torch.testing.assert_close(normal.eval()(x), plain.eval()((x - mean) / std))
    assert normal.to(torch.float64).normalize.mean.dtype == torch.float64


def test_option_a_shortcut() -> None:
    x = torch.rand(2, 4, 5, 5)
    out = PadShortcut(4, 8, stride=2)(x)
    assert out.shape == (2, 8, 3, 3)
    assert torch.equal(out[:, 2:6], x[:, :, ::2, ::2]) and not out[:, [0, 1, 6, 7]].any()
    assert PadShortcut(4, 7, stride=1)(x).shape == (2, 7, 5, 5)


def test_channel_shuffle() -> None:
    x = torch.arange(6.0).view(1, 6, 1, 1)
    assert channel_shuffle(x, 2).flatten().tolist() == [0, 3, 1, 4, 2, 5]


def test_same_seed_same_network_and_he_initialisation() -> None:
    torch.manual_seed(3)
    first = models.CifarResNet(20)
    torch.manual_seed(3)
    assert models.weights_hash(first) == models.weights_hash(models.CifarResNet(20))
    weight = first.layer3[1].conv1.weight
    assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)


@pytest.mark.parametrize("option", ["resnet8", "wrn_16_1", "vgg8", "mobilenetv2", "shufflenetv1", "shufflenetv2"])
def test_no_layer_hides_a_method_and_half_precision_works(option: str) -> None:
    net = build(option)
    for name, _ in net.named_children():
        assert not hasattr(nn.Module, name), name
    assert net.bfloat16().eval()(torch.rand(2, 3, 8, 8).bfloat16()).dtype == torch.bfloat16
