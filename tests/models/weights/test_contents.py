"""Checkpoints as they are found: averages, several networks, metrics and losses beside one, files in parts."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from kdlab.errors import UserError
from kdlab.models import CifarResNet, load_weights, read_state, save_weights, weights_hash
from kdlab.models.weights.contents import entries_of, words_of

State = dict[str, Tensor]


def net_(seed: int = 0, **given) -> CifarResNet:
    torch.manual_seed(seed)
    return CifarResNet(8, **{"width": 4, **given})


def good() -> State:
    return net_(0).state_dict()


def bad() -> State:
    return {k: v + 1 if v.is_floating_point() else v for k, v in good().items()}


def under(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def load(folder: Path, content: object, **given) -> tuple[str, bool]:
    """What loading says, and whether the good weights were loaded (the bad ones otherwise)."""
    path = folder / "net.pt"
    torch.save(content, path)
    net = net_(9)
    said = load_weights(net, path, key="teacher.checkpoint", **given)
    found = weights_hash(net)
    assert found in (weights_hash(good()), weights_hash(bad())) and "\n" not in said
    return said, found == weights_hash(good())


def refused(folder: Path, content: object, net: nn.Module | None = None, **given) -> str:
    path = folder / "net.pt"
    torch.save(content, path)
    net = net_(9) if net is None else net
    before = weights_hash(net)
    with pytest.raises(UserError) as caught:
        load_weights(net, path, key="teacher.checkpoint", **given)
    assert weights_hash(net) == before and "\n" not in str(caught.value)
    return str(caught.value)


# ---- averages

COUNTED = torch.tensor(9)
BOTH = {
    "timm": {"state_dict": bad(), "state_dict_ema": good(), "epoch": 4},
    "torchvision": {"model": under("module.", bad()), "model_ema": {**under("module.", good()), "n_averaged": COUNTED}},
    "ema_state_dict": {"model_state_dict": bad(), "ema_state_dict": good()},
    "ema_model": {"net": bad(), "ema_model": {"state_dict": good()}},
    "wrapped twice": {"checkpoint": {"model": bad(), "ema": {"module": good()}}},
    "swa": {"state_dict": bad(), "swa_state_dict": good()},
    "callbacks": {
        "pytorch-lightning_version": "2.6",
        "state_dict": under("model.", bad()),
        "callbacks": {"EMACallback{'decay': 0.99}": {"ema_state_dict": under("model.", good())}, "ModelCheckpoint": {}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}],
    },
    "attributes": {**under("model.", bad()), **under("ema.module.", good()), "ema.n_averaged": COUNTED},
    "one state dict": {**under("net.", bad()), **under("net_ema.", good())},
    "lucidrains": {**under("online_model.", bad()), **under("ema_model.", good()), "initted": torch.tensor(1)},
}  # fmt: skip


@pytest.mark.parametrize("name", BOTH)
def test_the_plain_weights_are_taken_and_an_average_is_named(tmp_path, name):
    said, average = load(tmp_path, BOTH[name])
    assert not average and "the file also holds an average of the weights (" in said
    assert said.endswith("which teacher.weights=ema takes")
    said, average = load(tmp_path, BOTH[name], weights="ema")
    assert average and "an average of weights (" in said and "also holds" not in said
    assert load(tmp_path, BOTH[name], weights="plain")[1] is False


@pytest.mark.parametrize("name", ["ema", "ema_state_dict", "model_ema", "emaModel", "shadow", "swa"])
def test_an_average_alone_is_taken(tmp_path, name):
    said, average = load(tmp_path, {name: good(), "step": 5})
    assert average and f"an average of weights ({name})" in said
    message = refused(tmp_path, {name: good(), "step": 5}, weights="plain")
    assert message.startswith("teacher.weights: plain, and ") and f"(it holds {name}); accepted: null" in message


def test_the_model_of_swa_utils(tmp_path):
    averaged = AveragedModel(net_(9))
    averaged.module.load_state_dict(good())
    averaged.n_averaged += 3
    for content in (
        averaged.state_dict(),
        {"state_dict": averaged.state_dict()},
        under("module.", averaged.state_dict()),
    ):
        said, average = load(tmp_path, content)
        assert average and "an average of weights" in said and "1 key ignored (" in said
        assert load(tmp_path, content, weights="ema")[1]


def test_lightnings_average_stands_in_the_place_of_the_weights(tmp_path):
    content = {
        "state_dict": under("model.", good()),
        "current_model_state": under("model.", bad()),
        "averaging_state": {"n_averaged": torch.tensor(7)},
    }
    said, average = load(tmp_path, content)
    assert (
        average and "the weights that are no average (current_model_state), which teacher.weights=plain takes" in said
    )
    assert load(tmp_path, content, weights="plain")[1] is False and load(tmp_path, content, weights="ema")[1]


def test_an_average_of_parameters_alone_goes_with_the_buffers(tmp_path):
    names = {name for name, _ in net_().named_parameters()}
    part = {name: value for name, value in bad().items() if name in names}
    path = tmp_path / "net.pt"
    torch.save({"state_dict": good(), "ema": part}, path)
    net = net_(9)
    said = load_weights(net, path, weights="ema")
    assert torch.equal(net.fc.weight, bad()["fc.weight"]) and torch.equal(
        net.bn1.running_var, good()["bn1.running_var"]
    )
    assert "buffers, which it lacks, of state_dict" in said
    assert "keys missing" in refused(tmp_path, {"ema": part})


def test_two_averages(tmp_path):
    content = {"state_dict": net_(width=8).state_dict(), "ema": good(), "swa": bad()}
    assert "accepted: teacher.weights=ema or teacher.weights=swa" in refused(tmp_path, content)
    assert load(tmp_path, content, weights="ema")[1] and not load(tmp_path, content, weights="swa")[1]


def test_a_list_without_names_is_refused(tmp_path):
    shadow = {"decay": 0.9, "shadow_params": list(good().values())}
    assert "holds an average as a list without names (ema.shadow_params)" in refused(tmp_path, {"ema": shadow})
    assert load(tmp_path, {"state_dict": good(), "ema": shadow})[1]


def test_an_average_that_does_not_fit_is_named(tmp_path):
    said, _ = load(tmp_path, {"state_dict": good(), "state_dict_ema": net_(width=8).state_dict()})
    assert "average" in said
    said, _ = load(tmp_path, {"state_dict": good(), "ema": {k.replace(".", ""): v for k, v in good().items()}})
    assert "the file also holds an average that does not fit (ema)" in said


def test_names_of_weights(tmp_path):
    content = {"generator": good(), "critic": {"weight": torch.zeros(2, 2)}}
    assert "those of generator" in load(tmp_path, content)[0]
    two = {"first": good(), "second": bad()}
    message = refused(tmp_path, two)
    assert (
        "several networks that fit (first, second); accepted: teacher.weights=first or teacher.weights=second"
        in message
    )
    assert load(tmp_path, two, weights="first")[1] and not load(tmp_path, two, weights="second")[1]
    message = refused(tmp_path, two, weights="frist")
    assert (
        "teacher.weights: unknown entry of the file 'frist'; nearest: first; accepted: ema, first, plain, second"
        in message
    )


@pytest.mark.parametrize(
    ("name", "words"),
    [("state_dict_ema", {"state", "dict", "ema"}), ("modelEMA", {"model", "ema"}), ("EMAWeights", {"ema", "weights"})],
)
def test_words_of_a_name(name, words):
    assert words_of(name) == words
    assert "ema" not in words_of("schema") | words_of("semantic.head")


# ---- two networks in one file


@pytest.mark.parametrize("first", ["student.", "model.", "s_net."])
def test_two_networks_in_one_file(tmp_path, first):
    content = {"state_dict": {**under(first, good()), **under("teacher.", bad()), "criterion.weight": torch.ones(3)}}
    message = refused(tmp_path, content)
    assert f"holds 2 networks that fit, with names that begin with {first}, teacher.;" in message
    typed = re.findall(r"teacher\.mapping=\{(.*?): '', (.*?): null\}", message)
    assert typed == [(first, "teacher."), ("teacher.", first)]
    for (own, other), right in zip(typed, (True, False), strict=True):
        said, found = load(tmp_path, content, mapping={own: "", other: None})
        assert found is right and "1 key ignored (criterion.weight)" in said


def test_of_two_networks_the_one_that_fits_by_shape(tmp_path):
    large = net_(width=8).state_dict()
    said, found = load(tmp_path, {**under("student.", good()), **under("teacher.", large)})
    assert found and "those of student" in said
    assert load(tmp_path, {"student": large, "teacher": good()})[1]
    message = refused(tmp_path, {"student": good(), "teacher": bad()})
    assert "accepted: teacher.weights=student or teacher.weights=teacher" in message


# ---- what stands beside a network


@pytest.mark.parametrize(
    "extra",
    [
        ["criterion.weight"],
        ["loss_fn.weight", "loss_fn.bias"],
        ["train_acc.correct", "train_acc.total", "val_metrics.accuracy.tp"],
        ["total_ops", "layer1.0.total_ops", "layer1.0.conv1.total_params"],
    ],
)
@pytest.mark.parametrize("prefix", ["", "model.", "module.net."])
def test_keys_of_losses_metrics_and_profilers(tmp_path, prefix, extra):
    inside = extra[0] == "total_ops"
    content = {**under(prefix, good()), **{(prefix if inside else "") + name: torch.ones(2) for name in extra}}
    said, found = load(tmp_path, content)
    assert found and f"{len(extra)} key" in said and f"ignored ({extra[0]}" in said


def test_keys_that_may_be_layers_are_refused_with_what_to_type(tmp_path):
    message = refused(tmp_path, {**good(), "aux.conv.weight": torch.ones(2), "aux.fc.weight": torch.ones(2)})
    assert "2 keys unexpected (aux.conv.weight, aux.fc.weight)" in message
    assert message.endswith('drop them: "teacher.mapping={aux.: null}"')
    assert load(tmp_path, {**good(), "aux.conv.weight": torch.ones(2)}, mapping={"aux.": None})[1]
    deeper = CifarResNet(14, width=4).state_dict()  # holds all names of the shallower one
    message = refused(tmp_path, deeper)
    assert "unexpected (layer1.1.conv1.weight" in message and "null" not in message
    assert "drop" not in refused(tmp_path, under("model.", deeper))


def test_missing_and_present_step_counters(tmp_path):
    without = {k: v for k, v in good().items() if not k.endswith("num_batches_tracked")}
    content = {**under("model.", without), "criterion.weight": torch.ones(2)}
    path = tmp_path / "net.pt"
    torch.save(content, path)
    net = net_(9)
    load_weights(net, path)
    assert torch.equal(net.fc.weight, good()["fc.weight"])


@pytest.mark.parametrize("part", ["_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."])
def test_wrappers_of_inner_modules(tmp_path, part):
    inner = {re.sub(r"^(layer\d\.)", rf"\1{part}", name): value for name, value in good().items()}
    said, found = load(tmp_path, {"state_dict": under("model.", inner)})
    assert found and f"{part} taken out of names" in said
    assert load(tmp_path, under(part, good()))[1]


def test_settings_and_numbers_that_scripts_store(tmp_path):
    beside = {
        "args": Namespace(lr=0.1, path=tmp_path),
        "best_acc": np.float64(0.9),
        "history": np.arange(3.0),
        "time": datetime.now(),
        "counts": {"seen": np.int64(3)},
    }
    assert load(tmp_path, {"state_dict": good(), **beside})[1]
    message = refused(tmp_path, {"state_dict": Namespace(weight=torch.zeros(2)), **beside})
    assert "holds no weights" in message
    assert "Refused); save the state_dict alone" in refused(tmp_path, {"state_dict": good(), "x": Refused()})


class Refused:
    """Anything else that is no plain value."""


# ---- what cannot be loaded


def test_what_is_split_between_processes(tmp_path):
    flat = {"_fsdp_wrapped_module._flat_param": torch.zeros(9), "_fsdp_wrapped_module.fc._flat_param": torch.zeros(9)}
    assert "FSDP's flattened parameters" in refused(tmp_path, flat)
    empty = {name: torch.zeros(0) for name in good()}
    assert "ZeRO-3" in refused(tmp_path, {"module": empty})
    assert load(tmp_path, {"module": good(), "optimizer": None, "dp_world_size": 1})[1]


def test_an_optimizer_alone(tmp_path):
    optimizer = torch.optim.Adam(net_().parameters())
    net_().fc.weight.sum().backward()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for content in (optimizer.state_dict(), {"optimizer": optimizer.state_dict(), "epoch": 3}):
        assert "holds the state of an optimizer and no weights" in refused(tmp_path, content)


def test_folders(tmp_path):
    def said(folder: Path) -> str:
        with pytest.raises(UserError) as caught:
            load_weights(net_(), folder, key="teacher.checkpoint")
        return str(caught.value)

    (tmp_path / "deepspeed").mkdir()
    (tmp_path / "deepspeed" / "latest").write_text("global_step10")
    assert "zero_to_fp32.py" in said(tmp_path / "deepspeed")
    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp" / ".metadata").write_bytes(b"")
    assert "dcp_to_torch" in said(tmp_path / "dcp")
    (tmp_path / "plain").mkdir()
    save_weights(good(), tmp_path / "plain" / "best.pt")
    assert "cannot read" in said(tmp_path / "plain") and "best.pt" in said(tmp_path / "plain")


# ---- files in parts


def write_parts(folder: Path) -> Path:
    state = list(good().items())
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name, part in zip(names, (state[:20], state[20:]), strict=True):
        save_weights(dict(part), folder / name)
    places = {key: names[n >= 20] for n, (key, _) in enumerate(state)}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


def test_an_index_of_several_files(tmp_path):
    index = write_parts(tmp_path)
    for path in (index, tmp_path):
        net = net_(9)
        load_weights(net, path)
        assert weights_hash(net) == weights_hash(good())
    assert weights_hash(read_state(index)) == weights_hash(good())
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"names model-00002-of-00002\.safetensors, which is not there"):
        load_weights(net_(), index)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": "../b.pt"}}'])
def test_a_damaged_index(tmp_path, content):
    (tmp_path / "x.index.json").write_text(content)
    with pytest.raises(UserError, match=r"^checkpoint: "):
        load_weights(net_(), tmp_path / "x.index.json")


def test_entries_of_what_is_no_checkpoint():
    assert entries_of([1, 2]) == entries_of({"epoch": 3}) == entries_of(torch.zeros(2)) == []
    assert [e.name for e in entries_of({"best_acc": torch.tensor(0.9), "model": good()})] == ["model"]
