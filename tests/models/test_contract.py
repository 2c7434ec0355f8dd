"""What every network of ``conf/model`` keeps: a new option file is tested by being there."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.options import option
from helpers.paths import CONF
from kdlab.config import builder
from kdlab.functional import Outputs, Taps, dense
from kdlab.models import flops, head_of, layer_names, load_weights, parameters, save_weights

NEEDS_A_NAME = {"gpt2", "gpt2_config", "hf_causal", "hf_seq2seq"}
"""Options that load a model of the hub or a folder."""

NETWORKS = sorted(path.stem for path in (CONF / "model").glob("[!_]*.yaml") if path.stem not in NEEDS_A_NAME)
LARGE = {
    "distilgpt2_cut",
    "gpt_bpe_student",
    "gpt_bpe_teacher",
    "resnet50",
    "resnet110",
    "resnet44",
    "resnet56",
    "resnet56_a",
    "wrn_40_1",
    "wrn_40_2",
    "resnet32x4",
    "vgg11",
    "vgg13",
}
"""Networks that differ from others in their size alone, which costs a test seconds."""

PICTURES = {"num_classes": 5, "in_channels": 3, "image_size": [16, 16], "mean": 0.5, "std": 0.25}
TABLE = {"num_classes": 5, "in_features": 7}
TEXT = {"vocab_size": 40, "context": 12, "eos_id": 1, "pad_id": 1}
SPEECH = {**TEXT, "mels": 20, "frames": 40}


def kind(config: dict[str, Any]) -> str:
    """What a network reads, by what its constructor takes."""
    takes = builder.parameters(config, "student", slot="network")
    if "frames" in takes and config.get("architecture") == "whisper":
        return "speech"
    if "vocab_size" in takes:
        return "pairs" if "Seq2Seq" in config["_target_"] else "text"
    return "pictures" if "in_channels" in takes else "table"


def made(name: str) -> tuple[nn.Module, dict[str, Tensor] | Tensor]:
    """A network, and two examples that it reads."""
    config = option("model", name)
    form = kind(config)
    offer = {"pictures": PICTURES, "table": TABLE, "text": TEXT, "pairs": TEXT, "speech": SPEECH}[form]
    if form == "pictures":
        config |= {} if name != "heads" else {"tasks": {"one": 5, "two": 3}}
    torch.manual_seed(0)
    net = builder.build(config, "student", slot="network", offer=offer)
    torch.manual_seed(1)
    ids = torch.randint(2, 40, (2, 6))
    inputs: dict[str, Tensor] | Tensor = {
        "pictures": torch.rand(2, 3, 16, 16),
        "table": torch.rand(2, config.get("in_features") or 7),
        "text": {"input_ids": ids},
        "pairs": {"input_ids": ids, "decoder_input_ids": ids[:, :4]},
        "speech": {"input_features": torch.randn(2, 20, 40), "decoder_input_ids": ids[:, :4]},
    }[form]
    return net, inputs


def answer(net: nn.Module, inputs: dict[str, Tensor] | Tensor) -> Tensor:
    """Dense logits."""
    return dense(Outputs.of(net(**inputs) if isinstance(inputs, dict) else net(inputs)).logits)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LARGE else name for name in NETWORKS]
)
def test_a_network_keeps_what_kdlab_relies_on(name, tmp_path):
    net, inputs = made(name)
    net.eval()
    with torch.no_grad():
        logits = answer(net, inputs)
        assert logits.shape[0] == 2 and logits.isfinite().all()
        assert torch.equal(logits, answer(net, inputs)), "in evaluation mode, the same answers"
    assert parameters(net) == sum(p.numel() for p in net.parameters()) and flops(net, inputs) > 0

    path, head = head_of(net)
    assert path in layer_names(net) and head.weight.shape[0] in (logits.shape[-1], 3, 40)
    inner = [name for name in layer_names(net) if not list(net.get_submodule(name).children())]
    with Taps(net, inner[:3]) as features, torch.no_grad():
        answer(net, inputs)
    assert features

    save_weights(net, tmp_path / "weights.pt")
    torch.manual_seed(2)
    again, _ = made(name)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
        load_weights(again, tmp_path / "weights.pt")
        assert torch.equal(answer(again.eval(), inputs), logits), "saved and loaded, the same function"


@pytest.mark.parametrize("name", sorted(set(NETWORKS) - LARGE))
def test_a_network_learns_from_every_weight(name):
    net, inputs = made(name)
    net.train()
    found = Outputs.of(net(**inputs) if isinstance(inputs, dict) else net(inputs))
    for logits in (found.logits, *found.heads.values()):
        dense(logits).float().log_softmax(-1)[..., 0].sum().backward(retain_graph=True)
    without = [n for n, p in net.named_parameters() if p.requires_grad and p.grad is None]
    assert not [n for n in without if "wte" not in n and "embed" not in n], without


def test_every_option_is_looked_at_or_needs_a_name():
    assert set(NETWORKS) | NEEDS_A_NAME == {path.stem for path in (CONF / "model").glob("[!_]*.yaml")}
