"""Causal language models against transformers' own logits, and their weights from and to files."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
import yaml
from torch import Tensor, nn

from helpers.paths import CONF
from kdlab.config import builder
from kdlab.errors import UserError
from kdlab.functional import Projected, Taps
from kdlab.models import CausalLM, freeze, head_of, load_weights, parameters, read_state, save_weights, weights_hash

FILES = CONF / "model"
GPT = {"n_layer": 2, "n_head": 2, "n_embd": 16, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
LLAMA = {
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
}
FORMS = {
    "gpt2": GPT,
    "llama": LLAMA,
    "llama-tied": {**LLAMA, "tie_word_embeddings": True},
    "qwen3": {**LLAMA, "head_dim": 8},
    "gpt_neox": {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"},
    "phi": {**LLAMA},  # its output layer has a bias
    "gemma2": {**LLAMA, "head_dim": 8, "final_logit_softcapping": 0.5},
    "granite": {**LLAMA, "logits_scaling": 8.0},
    "cohere": LLAMA,
    "bloom": {"n_layer": 2, "hidden_size": 16, "n_head": 2},
}
DENSE = {"gemma2", "granite", "cohere"}


def lm(form: str = "gpt2", seed: int = 0, **given) -> CausalLM:
    torch.manual_seed(seed)
    told = {"vocab_size": 40, "context": 16, "eos_id": 1, "pad_id": 1, "settings": FORMS[form], **given}
    return CausalLM(form.removesuffix("-tied"), **told)


def ids(rows: int = 2, length: int = 7) -> Tensor:
    return torch.randint(0, 40, (rows, length), generator=torch.Generator().manual_seed(1))


def full(logits) -> Tensor:
    return logits.dense() if isinstance(logits, Projected) else logits


@pytest.mark.parametrize("form", FORMS)
def test_logits_are_those_of_transformers(form):
    net = lm(form).eval()
    with torch.no_grad():
        for weight in net.parameters():
            weight.mul_(4)  # far from zero, where a soft cap would be the identity
        found, expected = net(ids()), net.net(ids()).logits
        placed = net(ids(), position_ids=torch.arange(7).expand(2, 7))
    assert isinstance(found, Tensor) == (form in DENSE)
    torch.testing.assert_close(full(found), expected)
    torch.testing.assert_close(full(placed), expected)
    assert found.shape == (2, 7, 40) and net.context == (None if form == "bloom" else 16)


@pytest.mark.parametrize("form", ["gpt2", "llama", "gemma2"])
def test_packed_sequences_do_not_see_each_other(form):
    net = lm(form).eval()
    one, two = ids(1, 4), ids(1, 6)
    with torch.no_grad():
        packed = full(net(torch.cat([one, two], 1), torch.cat([torch.arange(4), torch.arange(6)])[None]))
        torch.testing.assert_close(packed[:, :4], full(net(one)), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(packed[:, 4:], full(net(two)), rtol=1e-4, atol=1e-5)


def test_packing_needs_position_ids():
    with pytest.raises(UserError, match=r"data.pack: true; bloom has no position ids"):
        lm("bloom")(ids(1, 4), torch.tensor([[0, 1, 0, 1]]))


def test_pads_on_the_right_change_nothing_before_them():
    net = lm().eval()
    padded = nn.functional.pad(ids(), (0, 5), value=1)
    torch.testing.assert_close(full(net(padded))[:, :7], full(net(ids())))


def test_steps_with_a_cache_are_one_pass():
    net = lm("llama").eval()
    text, past, found = ids(2, 6), None, []
    for i in range(6):
        logits, past = net.step(text[:, i : i + 1], torch.ones(2, i + 1).long(), torch.full((2, 1), i), past)
        found.append(logits)
    torch.testing.assert_close(torch.stack(found, 1), full(net(text)), rtol=1e-4, atol=1e-5)


def test_gradients_reach_the_shared_matrix_from_both_ends():
    net, twin = lm().train(), lm().train()
    full(net(ids())).square().mean().backward()
    twin.net(ids()).logits.square().mean().backward()
    for (name, mine), theirs in zip(net.net.named_parameters(), twin.net.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=name)


@pytest.mark.parametrize("form", ["llama", "gemma2"])
def test_the_end_of_text_trains_though_it_pads(form):
    """nn.Embedding gives its padding_idx no gradient."""
    net = lm(form).train()
    full(net(torch.tensor([[1, 5, 6]])))[0, 2, 3].backward()
    assert net.net.get_input_embeddings().weight.grad[1].abs().sum() > 0


def test_layers_can_be_tapped():
    net = lm()
    assert net.layers == ["net.transformer.h.0", "net.transformer.h.1"]
    with Taps(net, net.layers) as seen:
        out = net(ids())
    assert [tuple(seen[name].shape) for name in net.layers] == [(2, 7, 16)] * 2
    torch.testing.assert_close(net.net.transformer.ln_f(seen[net.layers[-1]]), out.hidden)


# ---- weights


@pytest.mark.parametrize("form", ["gpt2", "llama", "llama-tied"])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_weights_make_the_round_trip(form, suffix, tmp_path):
    net, other = lm(form), lm(form, seed=1)
    save_weights(net, tmp_path / f"w.{suffix}")
    assert weights_hash(net) != weights_hash(other)
    load_weights(other, tmp_path / f"w.{suffix}")
    assert weights_hash(net) == weights_hash(other)
    torch.testing.assert_close(full(other(ids())), full(net(ids())), rtol=0, atol=0)
    stored = sum(t.numel() for t in read_state(tmp_path / f"w.{suffix}").values())
    assert stored == parameters(net) == sum(p.numel() for p in net.net.parameters())


def test_shared_weights_stay_shared():
    net = lm()
    state = {k: v + 1 for k, v in net.state_dict().items()}
    assert "net.lm_head.weight" not in state
    twin = copy.deepcopy(net)
    outer = nn.ModuleDict({"student": twin})  # as a LightningModule holds it
    outer.load_state_dict({f"student.{k}": v for k, v in state.items()})
    assert list(outer.state_dict()) == [f"student.{k}" for k in state]
    assert twin.net.lm_head.weight is twin.net.transformer.wte.weight
    torch.testing.assert_close(twin.net.lm_head.weight, state["net.transformer.wte.weight"])
    with pytest.raises(RuntimeError, match="Missing key"):
        net.load_state_dict({k: v for k, v in state.items() if "wte" not in k})


@pytest.mark.parametrize("form", ["gpt2", "llama", "llama-tied", "gpt_neox"])
def test_files_of_transformers_load(form, tmp_path):
    net = lm(form)
    torch.save(net.net.state_dict(), tmp_path / "whole.bin")  # with tied weights twice
    net.net.save_pretrained(tmp_path)
    body = net.net.base_model_prefix
    bare = {k.removeprefix(f"{body}."): v for k, v in net.net.state_dict().items()}
    files = ["whole.bin", "model.safetensors"]
    if form == "gpt2":  # the hub's has no prefix, and buffers of older releases
        del bare["lm_head.weight"]
        torch.save({**bare, "h.0.attn.bias": torch.ones(1, 1, 16, 16)}, tmp_path / "bare.bin")
        files.append("bare.bin")
    for file in files:
        other = lm(form, seed=1)
        load_weights(other, tmp_path / file)
        assert weights_hash(other) == weights_hash(net), file


def test_a_folder_is_read(tmp_path):
    net = lm("llama-tied")
    net.net.save_pretrained(tmp_path)
    read = CausalLM(name=str(tmp_path), settings={"attention_dropout": 0.25}, vocab_size=38, context=12, eos_id=1)
    assert weights_hash(read) == weights_hash(net) and read.context == 16 and read.tokenizer_name == str(tmp_path)
    assert read.net.config.attention_dropout == 0.25 and not hasattr(net.net.config, "n_layer")
    for given, message in [
        ({"vocab_size": 41}, "vocab_size: .* has 40 tokens, the data 41"),
        ({"context": 17}, "context: .* has 16 positions, the data 17"),
        ({"settings": {"atention_dropout": 0.1}}, "unknown setting 'atention_dropout'; nearest: attention_dropout"),
    ]:
        with pytest.raises(UserError, match=message):
            CausalLM(name=str(tmp_path), **given)


def test_a_model_that_brings_code_is_refused(tmp_path):
    lm().net.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    auto = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "evil", "auto_map": auto}))
    with pytest.raises(UserError, match="cannot be read"):
        CausalLM(name=str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_pickled_weights_run_nothing(tmp_path):
    lm().net.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    code = f"cos\nsystem\n(S'touch {tmp_path / 'ran'}'\ntR.".encode()
    (tmp_path / "pytorch_model.bin").write_bytes(code)
    with pytest.raises(UserError, match="cannot be read"):
        CausalLM(name=str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_without_a_network_it_says_so_at_once(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"^name: nobody/nothing cannot be read \(.*needs a network\)$"):
        CausalLM(name="nobody/nothing")


def test_backbone_leaves_the_output_matrix():
    net = lm()
    assert head_of(net) == ("net.lm_head", net.net.lm_head)
    frozen = freeze(net, "backbone")
    assert [n for n, p in net.named_parameters() if p.requires_grad] == ["net.transformer.wte.weight"]
    assert "net.transformer.h.0.attn.c_attn.weight" in frozen
    net = lm("llama")
    freeze(net, "backbone")
    assert [n for n, p in net.named_parameters() if p.requires_grad] == ["net.lm_head.weight"]


# ---- mistakes and configs


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"architecture": "gpt-2"}, "architecture: unknown architecture 'gpt-2'; nearest: gpt2"),
        ({"settings": {"n_layr": 3}}, "settings: unknown setting 'n_layr'; nearest: n_layer"),
        ({"settings": {"n_embd": 30, "n_head": 4}}, "gpt2 refuses them: .*divisible"),
        ({"settings": {"n_layer": "x"}}, "gpt2 refuses them: .*expected int"),
        ({"architecture": "gemma2", "settings": FORMS["gemma2"], "attention": "sdpa"}, "attention: sdpa; gemma2"),
        (
            {"architecture": "bert", "settings": {"num_hidden_layers": 1, "hidden_size": 12}},
            "bert reads what follows",
        ),
        ({"vocab_size": None}, "vocab_size: missing"),
    ],
)
def test_mistakes_are_one_line(given, message):
    with pytest.raises(UserError, match=message) as caught:
        CausalLM(**{"vocab_size": 40, **given})
    assert "\n" not in str(caught.value)


def test_without_transformers_it_says_how_to_get_it(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'kdlab\[text\]'"):
        CausalLM(vocab_size=40)


def test_settings_win_and_take_either_name():
    net = lm(settings={**GPT, "n_positions": 8}, context=8)
    assert net.context == 8 and net.net.config.n_positions == 8
    assert lm(settings={"num_hidden_layers": 1, "hidden_size": 8, "n_head": 2}).net.config.n_layer == 1


@pytest.mark.parametrize(
    ("name", "vocab_size", "count"),
    [
        ("gpt_tiny", 66, 31_680),
        ("gpt_chars_teacher", 66, 818_176),
        ("gpt_chars_student", 66, 212_480),
        ("gpt_arith_teacher", 22, 1_204_992),
        ("gpt_arith_student", 22, 307_584),
        ("gpt_bpe_teacher", 2048, 3_087_360),
        ("gpt_bpe_student", 2048, 768_288),
        ("llama_tiny", 66, 734_592),
    ],
)
def test_options_have_the_size_they_say(name, vocab_size, count):
    text = (FILES / f"{name}.yaml").read_text()
    offer = {"vocab_size": vocab_size, "context": 96 if "arith" in name else 128, "eos_id": 0, "pad_id": 0}
    net = builder.build(yaml.safe_load(text), "student", slot="network", offer=offer)
    assert parameters(net) == count and f"{count:,}" in text.splitlines()[0]


@pytest.mark.parametrize(("name", "count"), [("gpt2_config", 124_439_808), ("distilgpt2_cut", 81_912_576)])
def test_options_of_published_size(name, count):
    text = (FILES / f"{name}.yaml").read_text()
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        net = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **yaml.safe_load(text)["settings"]))
    assert parameters(net) == count and f"{count:,}" in text.splitlines()[0]


def test_importing_the_networks_loads_no_text_libraries():
    code = (
        "import sys, kdlab.models\n"
        "heavy = {'transformers', 'peft', 'tokenizers', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=FILES.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
