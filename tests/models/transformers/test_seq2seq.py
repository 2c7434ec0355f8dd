"""Encoder-decoder networks: transformers' own logits and texts, weights that come back, mistakes that are named."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kdlab.errors import UserError
from kdlab.functional import Projected, Taps
from kdlab.models import Seq2SeqLM, load_weights, save_weights
from kdlab.models.transformers.generation import continuations

VOCAB, EOS, MELS, FRAMES = 50, 0, 12, 40
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "dropout": 0.0,
}
SWITCH = {**T5, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_experts": 2}
UNTIED = {"tie_word_embeddings": False}
CASES = [
    ("t5", T5),
    ("t5", T5 | UNTIED),
    ("mt5", T5),
    ("umt5", T5),
    ("umt5", T5 | UNTIED),
    ("bart", BART),
    ("bart", BART | UNTIED),
    ("marian", BART),
    ("pegasus", BART),
    ("whisper", BART),
    ("whisper", BART | UNTIED),
]
NAMES = [name + ("-untied" if "tie_word_embeddings" in settings else "") for name, settings in CASES]


def network(architecture="t5", settings=None, **more):
    torch.manual_seed(0)
    settings = (BART if architecture in ("bart", "whisper", "marian", "pegasus") else T5) | (settings or {})
    given = {"vocab_size": VOCAB, "context": 16, "eos_id": EOS, "pad_id": EOS, "mels": MELS, "frames": FRAMES}
    net = Seq2SeqLM(architecture, settings, **(given | more)).eval()
    for name, buffer in net.named_buffers():
        if name.endswith("final_logits_bias"):
            buffer.normal_()
    return net


def inputs(net, seed=0):
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCAB, (3, 7), generator=draw)
    ids[:, 0] = EOS
    if net.speech:
        return {"decoder_input_ids": ids, "input_features": torch.randn(3, MELS, FRAMES, generator=draw)}
    mask = (torch.arange(9) < torch.tensor([[9], [5], [7]])).long()
    source = torch.randint(1, VOCAB, (3, 9), generator=draw).masked_fill(mask == 0, EOS)
    return {"decoder_input_ids": ids, "input_ids": source, "attention_mask": mask}


def dense(logits):
    return F.linear(logits.hidden, logits.weight, logits.bias) if isinstance(logits, Projected) else logits


@pytest.mark.parametrize(("architecture", "settings"), CASES, ids=NAMES)
@torch.no_grad()
def test_logits_are_those_of_transformers(architecture, settings):
    net = network(architecture, settings)
    given = inputs(net)
    found = net(**given)
    assert isinstance(found, Projected) and found.hidden.shape == (3, 7, 32)
    wanted = net.net(**given).logits
    assert torch.allclose(dense(found), wanted, atol=1e-6) and wanted.std() > 1e-3


@torch.no_grad()
def test_a_t5_whose_output_matrix_is_its_own():
    net = network("t5", UNTIED)
    net.net.lm_head = nn.Linear(32, VOCAB, bias=False)
    given = inputs(net)
    assert torch.allclose(dense(net(**given)), net.net(**given).logits, atol=1e-6)
    tied = network("t5")
    assert tied._rescales() and not net._rescales()


@torch.no_grad()
def test_an_architecture_that_is_not_known_gives_dense_logits():
    net = network("switch_transformers", SWITCH)
    given = inputs(net)
    found = net(**given)
    assert isinstance(found, torch.Tensor) and torch.allclose(found, net.net(**given).logits, atol=1e-5)


@pytest.mark.parametrize("architecture", ["t5", "bart", "whisper"])
@torch.no_grad()
def test_pads_change_nothing(architecture):
    net = network(architecture)
    given = inputs(net)
    whole = dense(net(**given))
    longer = dict(given)
    longer["decoder_input_ids"] = F.pad(given["decoder_input_ids"], (0, 3), value=EOS)
    if not net.speech:
        longer["input_ids"] = F.pad(given["input_ids"], (0, 4), value=5)
        longer["attention_mask"] = F.pad(given["attention_mask"], (0, 4))
    assert torch.allclose(dense(net(**longer))[:, :7], whole, atol=1e-5)


@pytest.mark.parametrize("architecture", ["t5", "bart", "whisper"])
@torch.no_grad()
def test_a_cache_changes_nothing(architecture):
    net = network(architecture)
    given = inputs(net)
    ids, mask = given.pop("decoder_input_ids"), given.get("attention_mask")
    encoded, past, steps = net.encode(**given), net.cache(), []
    for position in range(7):
        logits, past = net.decode(ids[:, position : position + 1], encoded, mask, past)
        steps.append(dense(logits))
    assert torch.allclose(torch.cat(steps, 1), dense(net(ids, **given)), atol=1e-4)


@pytest.mark.parametrize("architecture", ["t5", "bart", "whisper"])
@torch.no_grad()
def test_greedy_continuations_are_those_of_transformers(architecture):
    net = network(architecture)
    for parameter in net.parameters():  # sharper choices than a fresh network's
        parameter.mul_(2.0)
    given = inputs(net)
    ids, mask = given.pop("decoder_input_ids"), given.get("attention_mask")
    if net.speech:
        source = list(given["input_features"])
    else:
        source = [row[kept.bool()] for row, kept in zip(given["input_ids"], mask, strict=True)]
    prompts = [row[:1] for row in ids]
    found = continuations(net, prompts, new_tokens=8, eos_id=EOS, pad_id=EOS, source=source)
    for row, text in enumerate(found):
        one = {name: value[row : row + 1] for name, value in given.items()}
        written = ids[row : row + 1, :1]
        while written.shape[1] < 9 and (written.shape[1] == 1 or int(written[0, -1]) != EOS):
            chosen = net.net(decoder_input_ids=written, **one).logits[:, -1].argmax(-1)
            written = torch.cat([written, chosen[:, None]], 1)
        assert text.tolist() == written[0, 1:].tolist()


def test_draws_depend_on_their_own_prompt_only():
    net = network("whisper")
    source = list(torch.randn(4, MELS, FRAMES))
    numbers = torch.rand(6, 4, generator=torch.Generator().manual_seed(1))
    options = {"new_tokens": 6, "eos_id": None, "pad_id": EOS, "temperature": 1.0}
    prompts = [torch.tensor([EOS])] * 4
    together = continuations(net, prompts, uniform=lambda i: numbers[i], source=source, **options)
    alone = continuations(net, prompts[:1], uniform=lambda i: numbers[i, 2:3], source=source[2:3], **options)
    assert together[2].tolist() == alone[0].tolist() and len({tuple(text.tolist()) for text in together}) > 1


def test_the_start_token_is_trained_although_it_pads_too():
    """nn.Embedding skips the gradient of its padding row; only the table itself, with a matrix of its own, shows it."""
    net = network("whisper", UNTIED)
    assert net.net.get_output_embeddings().weight is not net.net.model.decoder.embed_tokens.weight
    dense(net(**inputs(net))).square().sum().backward()
    assert net.net.model.decoder.embed_tokens.weight.grad[EOS].any()


@pytest.mark.parametrize("architecture", ["t5", "bart", "whisper"])
def test_weights_come_back_and_shared_ones_are_stored_once(architecture, tmp_path):
    net = network(architecture)
    state = net.state_dict()
    storages = [tensor.data_ptr() for tensor in state.values()]
    assert len(set(storages)) == len(storages)
    save_weights(net, tmp_path / "student.pt")
    torch.manual_seed(7)
    other = Seq2SeqLM(
        architecture, BART if architecture != "t5" else T5, None, VOCAB, 16, EOS, EOS, mels=MELS, frames=FRAMES
    ).eval()
    given = inputs(net)
    with torch.no_grad():
        assert not torch.equal(dense(other(**given)), dense(net(**given)))
        load_weights(other, tmp_path / "student.pt")
        assert torch.equal(dense(other(**given)), dense(net(**given)))


@pytest.mark.parametrize("architecture", ["t5", "bart", "whisper"])
@torch.no_grad()
def test_a_folder_is_read_with_its_weights(architecture, tmp_path):
    net = network(architecture)
    net.net.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    dropout = "dropout_rate" if architecture == "t5" else "dropout"
    read = Seq2SeqLM(name=str(tmp_path), settings={dropout: 0.25}, vocab_size=VOCAB - 5).eval()
    given = inputs(net)
    assert torch.allclose(dense(read(**given)), dense(net(**given)), atol=1e-6)
    assert getattr(read.net.config, dropout) == 0.25 and read.speech == net.speech
    with pytest.raises(UserError, match=f"vocab_size: .* has {VOCAB} tokens, the data 60; accepted"):
        Seq2SeqLM(name=str(tmp_path), vocab_size=60)
    load_weights(read, tmp_path / "model.safetensors")  # transformers' names are understood as well


@pytest.mark.parametrize("architecture", ["t5", "bart", "whisper"])
@torch.no_grad()
def test_layers_are_paths_to_tap(architecture):
    net = network(architecture)
    assert len(net.layers) == 4 and ["encoder" in path.split(".") for path in net.layers] == [True, True, False, False]
    with Taps(net, net.layers) as found:
        net(**inputs(net))
    assert [found[path].shape[-1] for path in net.layers] == [32] * 4 and found[net.layers[-1]].shape[:2] == (3, 7)


def test_sizes_come_from_the_data():
    net = network("whisper")
    config = net.net.config
    assert (config.num_mel_bins, config.max_source_positions, config.max_target_positions) == (MELS, FRAMES // 2, 16)
    assert (config.vocab_size, config.decoder_start_token_id, net.context) == (VOCAB, EOS, 16)
    assert network("whisper", eos_id=None, pad_id=None, mels=None, frames=None).net.config.num_mel_bins == 80
    assert network("t5").context is None and network("bart").context == 16
    assert network("t5", {"vocab_size": 64}).net.config.vocab_size == 64


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"architecture": "gpt2"}, "architecture: unknown architecture 'gpt2'"),
        ({"settings": {"d_modell": 8}}, "settings: unknown setting 'd_modell'; nearest: d_model"),
        ({"settings": {"vocab_size": 40}}, "vocab_size: t5 has 40 tokens, the data 50"),
        ({"vocab_size": None}, "vocab_size: missing"),
        ({"architecture": "longt5", "attention": "sdpa"}, "attention: sdpa; longt5 does not have it"),
        ({"architecture": "whisper", "settings": {"num_mel_bins": 80}}, "mels: whisper reads 80, the data have 12"),
        (
            {"architecture": "whisper", "settings": {"max_source_positions": 50}},
            "frames: whisper reads 100, the data have 40; accepted: the same, which data.seconds=1 makes",
        ),
        ({"architecture": "bart", "settings": {"max_position_embeddings": 8}}, "context: bart has 8 positions"),
        ({"architecture": "bart", "settings": {"decoder_attention_heads": 5}}, "settings: "),
    ],
)
def test_what_does_not_fit_is_named(options, said):
    with pytest.raises(UserError) as error:
        network(**options)
    assert str(error.value).startswith(said) and "\n" not in str(error.value)


def test_a_model_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"name: .*cannot be read .*accepted: a folder with config\.json"):
        Seq2SeqLM(name=str(tmp_path))


def test_data_of_the_other_kind_are_named():
    speech, text = network("whisper"), network("t5")
    with pytest.raises(UserError, match="data: text, and whisper reads speech"):
        speech(**inputs(text))
    with pytest.raises(UserError, match="data: speech, and t5 reads text"):
        text(**inputs(speech))
    with pytest.raises(UserError, match="context: bart has 16 positions, and a source of the data 20 tokens"):
        network("bart")(torch.zeros(1, 2).long(), torch.ones(1, 20).long())
