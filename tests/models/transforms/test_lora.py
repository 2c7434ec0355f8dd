"""LoRA: what trains, what merging gives back, and folders that peft itself reads."""

from __future__ import annotations

import builtins
import json

import pytest
import torch
from torch import Tensor, nn

from kdlab.errors import UserError
from kdlab.functional import Taps
from kdlab.models import MLP, CausalLM, CifarResNet, attach_lora, load_weights, merge, save_adapter, save_weights

GPT = {"n_layer": 2, "n_head": 2, "n_embd": 16, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
SMALL = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
FORMS = {"gpt2": GPT, "llama": {**SMALL, "num_key_value_heads": 2}, "gpt_neox": SMALL}
IDS = torch.randint(0, 40, (2, 7), generator=torch.Generator().manual_seed(1))


def lm(form: str = "gpt2") -> CausalLM:
    torch.manual_seed(0)
    return CausalLM(form, FORMS[form], vocab_size=40, context=16, eos_id=1)


def logits(net: nn.Module) -> Tensor:
    with torch.no_grad():
        return net.eval()(IDS).dense()


def train(net: nn.Module, forward, steps: int = 3, lr: float = 1.0) -> None:
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        forward(net.train()).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("form", FORMS)
def test_only_the_adapters_train_and_merging_keeps_the_function(form):
    net = lm(form)
    before, names = logits(net), list(net.state_dict())
    base = {name: value.clone() for name, value in net.state_dict().items()}
    trained = attach_lora(net, rank=4, alpha=8)
    assert trained and all("lora_" in name for name in trained)
    torch.testing.assert_close(logits(net), before, rtol=0, atol=0)  # B is zero at first
    train(net, lambda n: n(IDS).dense())
    after = logits(net)
    assert (after - before).abs().max() > 1e-3
    changed = {
        name.replace(".base_layer", ""): value for name, value in net.state_dict().items() if "lora_" not in name
    }
    assert changed.keys() == base.keys() and all(torch.equal(changed[name], base[name]) for name in base)
    merge(net)
    torch.testing.assert_close(logits(net), after, rtol=0, atol=1e-5)
    assert list(net.state_dict()) == names and all(p.requires_grad for p in net.parameters())
    attach_lora(net, rank=2)  # again


def test_scale_and_rank_are_those_of_the_formula():
    net = nn.Sequential(nn.Linear(6, 5))
    weight = net[0].weight.detach().clone()
    attach_lora(net, rank=2, alpha=6, targets=["0"])
    a, b = net[0].lora_A["default"].weight, net[0].lora_B["default"].weight
    assert a.shape == (2, 6) and b.shape == (5, 2)
    with torch.no_grad():
        b.normal_()
    merge(net)
    torch.testing.assert_close(net[0].weight, weight + 3 * b @ a)


def test_layers_keep_their_names():
    net = lm()
    attach_lora(net)
    with Taps(net, net.layers) as seen:
        net(IDS)
    assert list(seen) == ["net.transformer.h.0", "net.transformer.h.1"]


@pytest.mark.parametrize("form", ["gpt2", "llama"])
def test_peft_reads_the_folder(form, tmp_path):
    from peft import PeftModel

    net = lm(form)
    attach_lora(net, rank=4, alpha=8, dropout=0.1)
    train(net, lambda n: n(IDS).dense())
    expected = logits(net)
    save_adapter(net, tmp_path / "adapter")
    assert {p.name for p in (tmp_path / "adapter").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 4
    plain = PeftModel.from_pretrained(lm(form).net, tmp_path / "adapter").eval()
    torch.testing.assert_close(plain(IDS).logits, expected, rtol=0, atol=1e-5)


def test_weights_with_adapters_make_the_round_trip(tmp_path):
    net, other = lm(), lm()
    for one in (net, other):
        attach_lora(one, rank=2)
    train(net, lambda n: n(IDS).dense())
    save_weights(net, tmp_path / "w.pt")
    load_weights(other, tmp_path / "w.pt")
    torch.testing.assert_close(logits(other), logits(net), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("net", "targets", "shape"),
    [
        (MLP((8, 8), in_features=4, num_classes=3), ["layer1.0", "layer2.0"], (5, 4)),
        (CifarResNet(8, width=4), ["conv1", "fc"], (5, 3, 8, 8)),
    ],
    ids=["mlp", "cnn"],
)
def test_plain_networks(net, targets, shape):
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    net.requires_grad_(True)
    keep = next(net.parameters())
    keep.requires_grad_(False)  # frozen before: frozen again after merging
    trained = attach_lora(net, rank=2, targets=targets)
    train(net, lambda n: n(x), lr=0.01)
    expected = net.eval()(x)
    assert all("lora_" in name for name in trained)
    merge(net)
    torch.testing.assert_close(net.eval()(x), expected, rtol=0, atol=1e-5)
    assert [p for p in net.parameters() if not p.requires_grad] == [next(net.parameters())]
    with pytest.raises(UserError, match="targets: missing; accepted: names of layers, such as"):
        attach_lora(net)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rank": 0}, "rank: 0; accepted: a whole number, at least 1"),
        ({"dropout": 1.0}, "dropout: 1.0"),
        ({"targets": ["c_atn"]}, "targets: unknown layer 'c_atn'; nearest: c_attn"),
        ({"targets": []}, r"targets: \[\]"),
        ({"targets": ["wte"]}, "transformer.wte shares its matrix"),
    ],
)
def test_mistakes_are_one_line(given, message):
    with pytest.raises(UserError, match=message):
        attach_lora(lm(), **given)


def test_adapters_are_there_or_not(tmp_path):
    net = lm()
    for call in (merge, lambda n: save_adapter(n, tmp_path)):
        with pytest.raises(UserError, match="no adapters"):
            call(net)
    attach_lora(net, targets=["net.transformer.h.0.attn.c_attn"])
    assert len([n for n, p in net.named_parameters() if p.requires_grad]) == 2
    with pytest.raises(UserError, match="adapters already"):
        attach_lora(net)


def test_without_peft_it_says_how_to_get_it(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "peft":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    net = lm()
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install 'kdlab\[text\]'"):
        attach_lora(net)
