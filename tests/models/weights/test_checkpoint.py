"""Weights from and to files: published layouts, round trips, and everything that can be wrong with a file."""

from __future__ import annotations

import json
import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import kdlab.models.weights.checkpoint as checkpoint
from kdlab.errors import UserError
from kdlab.models import (
    MLP,
    VGG,
    BottleneckResNet,
    CifarResNet,
    MobileNetV2,
    ShuffleNetV1,
    ShuffleNetV2,
    WideResNet,
    load_weights,
    read_state,
    save_weights,
    weights_hash,
)


def net_(seed: int = 0, **given) -> CifarResNet:
    torch.manual_seed(seed)
    return CifarResNet(8, **{"width": 4, **given})


def rename(net: nn.Module, *rules: tuple[str, str]) -> dict[str, Tensor]:
    """The network's weights under other names."""
    state = {}
    for name, tensor in net.state_dict().items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        state[name] = tensor.clone()
    return state


def assert_same(first: nn.Module, second: nn.Module) -> None:
    assert weights_hash(first) == weights_hash(second)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "net.pt"


# ------------------------------------------------------------------------------------------- what loads


@pytest.mark.parametrize("name", ["net.pt", "net.pth", "net.safetensors"])
def test_round_trip(tmp_path: Path, name: str) -> None:
    net = net_().to(memory_format=torch.channels_last)
    net.layer1.requires_grad_(False)
    save_weights(net, tmp_path / name)
    state = read_state(tmp_path / name)
    assert all(v.is_contiguous() and not v.requires_grad for v in state.values())
    other = net_(1)
    note = load_weights(other, tmp_path / name)
    assert_same(net, other)
    assert note == f"{len(state)} tensors from {tmp_path / name}"


def test_option_a_layout_of_the_published_cifar10_weights(path: Path) -> None:
    # module.* under state_dict beside an accuracy, the legacy file format, no step counters, linear for fc.
    net = net_(shortcut="A")
    state = {f"module.{k}": v for k, v in rename(net, (r"^fc\.", "linear.")).items() if "num_batches" not in k}
    torch.save(
        {"state_dict": state, "best_prec1": 91.7},
        path.with_suffix(".th"),
        _use_new_zipfile_serialization=False,
    )
    other = net_(1, shortcut="A")
    note = load_weights(other, path.with_suffix(".th"))
    assert_same(net, other)
    assert "module." in note and "\n" not in note


@pytest.mark.parametrize(
    ("make", "rules"),
    [
        (lambda: CifarResNet(8, width=4), [(r"\.shortcut\.", ".downsample.")]),
        (lambda: BottleneckResNet(50, width=4), [(r"^fc\.", "linear.")]),
        (
            lambda: WideResNet(16, widen=1),
            [(r"^layer(\d)\.", r"block\1.layer."), (r"\.shortcut\.", ".convShortcut.")],
        ),
        (
            lambda: VGG(13, width=4),
            [*[(rf"^layer{i + 1}\.", f"block{i}.") for i in range(5)], (r"^fc\.", "classifier.")],
        ),
        (
            lambda: MobileNetV2(0.25),
            [*[(rf"^layer{i + 1}\.", f"blocks.{i}.") for i in range(7)], (r"^fc\.", "classifier.0.")],
        ),
        (lambda: ShuffleNetV1(2), [(r"^fc\.", "linear.")]),
        (lambda: ShuffleNetV2(0.5), [(r"^fc\.", "linear.")]),
    ],
)
def test_layouts_of_the_distillation_benchmark(path: Path, make, rules) -> None:
    net, other = make(), make()
    state = rename(net, *rules)
    assert state.keys() != net.state_dict().keys()
    torch.save({"epoch": 240, "model": state, "optimizer": {"param_groups": []}, "best_acc": 73.0}, path)
    load_weights(other, path)
    assert_same(net, other)


@pytest.mark.parametrize("wrapper", checkpoint.WRAPPERS)
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.module.", "student._orig_mod."])
def test_wrappers_and_prefixes(path: Path, wrapper: str, prefix: str) -> None:
    net, other = net_(), net_(1)
    torch.save({wrapper: {prefix + k: v for k, v in net.state_dict().items()}, "epoch": 3}, path)
    load_weights(other, path)
    assert_same(net, other)


def test_a_network_with_a_prefix_of_its_own(path: Path) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = net_()

    net, other = Wrapped(), Wrapped()
    nn.init.ones_(net.model.fc.weight)
    save_weights({f"module.{k}": v for k, v in net.state_dict().items()}, path)
    load_weights(other, path)
    assert_same(net, other)


def test_mapping(path: Path, tmp_path: Path) -> None:
    net = net_()
    state = rename(net, (r"^layer(\d)\.0\.", r"stages.\1."), (r"^fc\.", "head."), (r"^conv1\.", "stem."))
    torch.save({**state, "ema.decay": torch.tensor(0.9)}, path)
    mapping = {r"stages\.(\d)\.": r"layer\1.0.", "stem.": "conv1.", "head.": "fc.", "ema": None}
    (tmp_path / "map.yaml").write_text("".join(f"'{k}': {json.dumps(v)}\n" for k, v in mapping.items()))
    (tmp_path / "map.json").write_text(json.dumps(mapping))
    for given in (mapping, tmp_path / "map.yaml", str(tmp_path / "map.json")):
        other = net_(1)
        load_weights(other, path, mapping=given)
        assert_same(net, other)


def test_half_precision_files_and_one_classifier_name(path: Path) -> None:
    net, other = net_(), net_(1)
    save_weights(
        {k: v.half() if v.is_floating_point() else v for k, v in rename(net, ("^fc", "head.out")).items()},
        path,
    )
    assert "head.out read as fc" in load_weights(other, path)
    torch.testing.assert_close(other.fc.weight, net.fc.weight, rtol=1e-3, atol=1e-3)
    assert other.fc.weight.dtype == torch.float32


def test_without_the_head(path: Path) -> None:
    net, other = net_(num_classes=100), net_(1, num_classes=3)
    save_weights(net, path)
    fresh = other.fc.weight.clone()
    load_weights(other, path, head=False)
    assert torch.equal(other.fc.weight, fresh) and torch.equal(other.conv1.weight, net.conv1.weight)


# ------------------------------------------------------------------------------------------- what is refused


def refused(net: nn.Module, path: object, **given) -> str:
    """The one line that loading is refused with; the network must be as before."""
    before = weights_hash(net)
    with pytest.raises(UserError) as caught:
        load_weights(net, path, key="teacher.checkpoint", **given)
    assert weights_hash(net) == before
    message = str(caught.value)
    assert "\n" not in message and message.startswith("teacher.")
    return message


def test_missing_file_and_folder(path: Path) -> None:
    save_weights(net_(), path)
    assert re.search(r"checkpoint: no file \S+nett.pt; nearest: net.pt$", refused(net_(), path.with_name("nett.pt")))
    assert "cannot read" in refused(net_(), path.parent)
    assert refused(net_(), path.parent / "no" / "folder.pt").endswith("folder.pt")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.99])
def test_cut_off(path: Path, legacy: bool, share: float) -> None:
    torch.save(net_().state_dict(), path, _use_new_zipfile_serialization=not legacy)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    assert re.search("is empty|damaged|cut off", refused(net_(), path))


def test_cut_off_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    save_weights(net_(), path)
    path.write_bytes(path.read_bytes()[:-100])
    assert "damaged or cut off" in refused(net_(), path)


@pytest.mark.parametrize("name", ["net.pt", "net.safetensors"])
def test_one_flipped_bit(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    net = net_()
    save_weights(net, path)
    data = bytearray(path.read_bytes())
    at = data.index(net.layer3[0].conv2.weight.detach().numpy().tobytes()) + 1000
    data[at] ^= 1
    path.write_bytes(data)
    assert re.search("is damaged: .*checksum.* is wrong", refused(net_(), path))


@pytest.mark.parametrize("at", [30, 200, -30, -200])
def test_damaged_frame(path: Path, at: int) -> None:
    save_weights(net_(), path)
    data = bytearray(path.read_bytes())
    data[at : at + 8] = b"\xff" * 8
    path.write_bytes(data)
    assert "damaged" in refused(net_(), path)


def test_flipped_folder_mark(path: Path) -> None:
    # torch.load fills such a tensor with whatever is in memory, and no checksum covers the mark.
    save_weights(net_(), path)
    data = bytearray(path.read_bytes())
    entry = data.rindex(b"PK\x01\x02", 0, data.rindex(b"/data/8"))
    data[entry + 38] ^= 0x10
    path.write_bytes(data)
    assert "data/8 is marked as a folder" in refused(net_(), path)


class Payload:
    def __reduce__(self):
        return os.mkdir, (Payload.folder,)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_code_is_refused_and_not_run(path: Path, form: str) -> None:
    Payload.folder = str(path.parent / "ran")
    if form == "pickle":
        path.write_bytes(pickle.dumps({"state_dict": Payload()}))
    else:
        torch.save({"state_dict": Payload()}, path, _use_new_zipfile_serialization=form == "zip")
    message = refused(net_(), path)
    assert not (path.parent / "ran").exists()
    assert (
        re.search(r"refused: it wants to run code \(\w+\.mkdir\)", message) if form != "pickle" else "net.pt" in message
    )


def test_whole_module_is_refused(path: Path) -> None:
    torch.save(net_(), path)
    assert re.search(r"refused: it wants to run code \(\S*CifarResNet\)", refused(net_(), path))


@pytest.mark.parametrize("content", [b"hello, this is text", b"\x89PNG\r\n\x1a\n" + b"\0" * 50, b"PK\x03\x04 no zip"])
def test_foreign_file(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    assert re.search("is not a checkpoint|not a whole zip", refused(net_(), path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"epoch": 3, "loss": 0.1},
            "holds no weights: expected tensors, or one of state_dict.*; found epoch, loss",
        ),
        ({}, "found nothing"),
        ([1, 2], "holds no weights but a list"),
        (torch.zeros(3), "holds no weights but a Tensor"),
    ],
)
def test_no_weights_inside(path: Path, content: object, message: str) -> None:
    torch.save(content, path)
    assert re.search(message, refused(net_(), path))


def test_other_number_of_classes(path: Path) -> None:
    save_weights(net_(num_classes=100), path)
    message = refused(net_(num_classes=10), path)
    assert message.startswith("teacher.checkpoint: has 100 classes, data has 10")


def test_other_width_channels_and_depth(path: Path) -> None:
    save_weights(net_(), path)
    message = refused(net_(width=8), path)
    assert "conv1.weight is 4x3x3x3, not 8x3x3x3, bn1.weight is 4, not 8" in message and "more" in message
    assert "conv1.weight is 4x3x3x3, not 4x1x3x3" in refused(net_(in_channels=1), path)
    torch.manual_seed(0)
    message = refused(CifarResNet(14, width=4), path)
    assert re.search(r"does not fit CifarResNet; 30 keys missing \(layer1.1.conv1.weight, .*, .*, \.\.\.\)", message)


def test_other_shortcut_says_so(path: Path) -> None:
    save_weights(net_(shortcut="A"), path)
    assert "is one for shortcut=A" in refused(net_(), path)
    save_weights(net_(), path)
    assert "is one for shortcut=B" in refused(net_(shortcut="A"), path)


def test_other_family(path: Path) -> None:
    save_weights(MLP(hidden=[4], in_features=8), path)
    message = refused(net_(), path)
    assert "missing" in message and "2 keys unexpected (layer1.0.weight, layer1.0.bias)" in message
    assert "nearest to the first: layer1.0." in message


def test_not_finite(path: Path) -> None:
    net = net_()
    net.layer2[0].bn1.running_var[1] = float("nan")
    save_weights(net, path)
    assert refused(net_(), path).endswith("not finite, first in layer2.0.bn1.running_var")


def test_quantised_numbers_are_no_weights(path: Path) -> None:
    state = net_().state_dict()
    state["fc.weight"] = (state["fc.weight"] * 100).to(torch.int8)
    save_weights(state, path)
    assert "fc.weight in" in refused(net_(), path)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"(": "x"}, r"teacher.mapping: '\(': 'x' is no regular expression"),
        ({"fc": r"\7"}, "is no regular expression"),
        ({"fc": 3}, "is not {pattern: replacement} of two texts"),
        ({r".*\.": "same."}, "two keys become 'same.weight'"),
        ("nowhere.yaml", "teacher.mapping: cannot read nowhere.yaml"),
        ({"fc.": "head."}, r"2 keys missing \(fc.weight, fc.bias\); 3 keys unexpected|does not fit"),
    ],
)
def test_mapping_errors(path: Path, mapping: object, message: str) -> None:
    save_weights({**net_().state_dict(), "more.scale": torch.ones(2)}, path)
    assert re.search(message, refused(net_(), path, mapping=mapping))


# ------------------------------------------------------------------------------------------- saving, hashing


def test_a_failing_save_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_weights(net_(), path)
    before = path.read_bytes()

    def fail(_state: object, file) -> None:
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_weights(net_(1), path)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["net.pt"]


def test_leftovers_of_killed_saves_go_once_they_are_old(path: Path) -> None:
    old, young = path.with_name(".net.pt.0123abcd.tmp"), path.with_name(".net.pt.4567abcd.tmp")
    old.write_bytes(b"")
    young.write_bytes(b"")
    os.utime(old, (0, 0))
    save_weights(net_(), path)
    assert {p.name for p in path.parent.iterdir()} == {"net.pt", young.name}


def test_a_view_is_saved_without_its_storage(path: Path) -> None:
    save_weights({"weight": torch.zeros(100_000)[:10]}, path)
    assert path.stat().st_size < 5_000
    assert oct(path.stat().st_mode & 0o777) == oct(0o666 & ~current_umask())


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_hash_is_of_names_shapes_types_and_values() -> None:
    state = net_().state_dict()
    assert weights_hash(state) == weights_hash(net_()) == weights_hash(dict(reversed(state.items())))
    assert weights_hash({"a": torch.zeros(2)}) == weights_hash({"a": torch.zeros(4)[::2]})
    different = [
        {"a": torch.zeros(2)},
        {"b": torch.zeros(2)},
        {"a": torch.zeros(2, 1)},
        {"a": torch.ones(2)},
        {"a": torch.zeros(2, dtype=torch.int32)},
        {"a": torch.zeros(2).bfloat16()},
        {"a": torch.tensor(0.0)},
    ]
    assert len({weights_hash(each) for each in different}) == len(different)
