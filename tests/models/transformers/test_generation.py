"""Continuations: against plain loops, and independent of the batch around them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kdlab.errors import UserError
from kdlab.models import CausalLM, continuations
from kdlab.models.transformers import generation
from kdlab.models.transformers.generation import draw, encoder_inputs

SMALL = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
FORMS = {
    "gpt2": {"n_layer": 2, "n_head": 2, "n_embd": 16},
    "llama": {**SMALL, "num_key_value_heads": 1},
    "gemma2": {**SMALL, "num_key_value_heads": 2, "head_dim": 8},
    "bloom": {"n_layer": 2, "hidden_size": 16, "n_head": 2},
}
PROMPTS = [torch.randint(2, 50, (n,), generator=torch.Generator().manual_seed(n)) for n in (3, 7, 1, 16, 12)]
EOS = 1


@pytest.fixture(autouse=True)
def one_thread():
    """Networks this small lose time to a second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def lm(form: str = "gpt2", seed: int = 0) -> CausalLM:
    torch.manual_seed(seed)
    net = CausalLM(form, FORMS[form], vocab_size=50, context=16, eos_id=EOS, pad_id=EOS)
    with torch.no_grad():
        for weight in net.parameters():
            weight.mul_(3)  # so that the next token depends on what came before
    return net


def write(net: nn.Module, prompts: list[Tensor], **given) -> list[list[int]]:
    told = {"new_tokens": 8, "eos_id": EOS, "pad_id": EOS, **given}
    return [row.tolist() for row in continuations(net, prompts, **told)]


def greedy(net: CausalLM, prompt: Tensor, most: int) -> list[int]:
    """By transformers' own full forward pass, one prompt at a time."""
    net.eval()
    text = prompt.tolist()
    while len(text) < len(prompt) + most and len(text) <= 16:
        with torch.no_grad():
            text.append(int(net.net(torch.tensor([text])).logits[0, -1].argmax()))
        if text[-1] == EOS:
            break
    return text[len(prompt) :]


@pytest.mark.parametrize("form", ["gpt2", "llama", "gemma2"])
def test_greedy_is_a_plain_loop(form):
    net = lm(form)
    found = write(net, PROMPTS)
    assert found == [greedy(net, prompt, 8) for prompt in PROMPTS]
    assert [len(row) for row in found][3:] == [1, 5]  # the network has 16 positions; the last token is not read


@pytest.mark.parametrize(("form", "temperature"), [("gpt2", 0.0), *((form, 1.0) for form in FORMS)])
def test_a_continuation_does_not_depend_on_the_batch(form, temperature):
    net, u = lm(form), torch.rand(8, 5, generator=torch.Generator().manual_seed(3))
    given = {"temperature": temperature, "top_p": 0.9, "new_tokens": 6}
    whole = write(net, PROMPTS, uniform=lambda i: u[i], **given)
    alone = [write(net, [p], uniform=lambda i, j=j: u[i, j : j + 1], **given)[0] for j, p in enumerate(PROMPTS)]
    turned = write(net, PROMPTS[::-1], uniform=lambda i: u[i].flip(0), **given)
    assert whole == alone == turned[::-1]
    net.cached = False
    assert write(net, PROMPTS, uniform=lambda i: u[i], **given) == whole


def test_ends_with_the_end_of_text():
    net, prompt = lm(), PROMPTS[0]
    text = greedy(net, prompt, 8)
    end = text[2]
    found = write(net, [prompt, PROMPTS[1]], eos_id=end)
    assert found[0] == text[: text.index(end) + 1]
    assert write(net, [prompt], eos_id=None)[0] == text


def test_lengths_of_their_own():
    net = lm()
    long = write(net, PROMPTS[:3])
    assert write(net, PROMPTS[:3], new_tokens=[1, 8, 3]) == [long[0][:1], long[1], long[2][:3]]


def test_padding_of_the_vocabulary_is_never_written():
    class Padded(nn.Module):
        def forward(self, input_ids: Tensor) -> Tensor:
            return torch.arange(8.0).expand(*input_ids.shape, 8)

    assert write(Padded(), PROMPTS[:1], new_tokens=2) == [[7, 7]]
    assert write(Padded(), PROMPTS[:1], new_tokens=2, classes=5) == [[4, 4]]
    drawn = write(Padded(), PROMPTS[:1], new_tokens=2, classes=5, temperature=1.0, uniform=lambda i: torch.ones(1))
    assert drawn == [[4, 4]]


class Counter(nn.Module):
    """Says the sum of all it has read, modulo 10: causal, and the user's own."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.dropout = form, nn.Dropout(0.5)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> object:
        assert not self.training and not torch.is_grad_enabled()
        assert torch.equal(position_ids, torch.arange(input_ids.shape[1]).expand_as(input_ids))
        logits = nn.functional.one_hot(input_ids.cumsum(1) % 10, 10).float()
        return logits if self.form == "tensor" else {"logits": logits}


@pytest.mark.parametrize("form", ["tensor", "mapping"])
def test_any_network_will_do(form):
    net = Counter(form).train()
    net.dropout.eval()
    assert write(net, [torch.tensor([2, 3]), torch.tensor([7])], new_tokens=3, eos_id=None) == [[5, 0, 0], [7, 4, 8]]
    assert net.training and not net.dropout.training  # each module has its own mode back
    plain = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10))
    assert len(write(plain, [torch.tensor([2])], eos_id=None)[0]) == 8


class Echo(nn.Module):
    """An encoder-decoder: writes its source, then 0."""

    def forward(self, decoder_input_ids: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        text = torch.cat([input_ids * attention_mask, torch.zeros_like(decoder_input_ids)], 1)
        return nn.functional.one_hot(text[:, : decoder_input_ids.shape[1]], 10).float()


def test_a_source_is_read():
    start, source = torch.tensor([9]), [torch.tensor([3, 4, 5]), torch.tensor([6])]
    assert write(Echo(), [start, start], source=source, eos_id=0) == [[3, 4, 5, 0], [6, 0]]
    given = encoder_inputs(source, 9, torch.device("cpu"))
    assert given["input_ids"].tolist() == [[3, 4, 5], [6, 9, 9]]
    assert given["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert encoder_inputs([torch.rand(4, 6)] * 2, 0, torch.device("cpu"))["input_features"].shape == (2, 4, 6)


def test_draws_follow_the_distribution():
    chances = torch.tensor([0.0, 0.5, 0.0, 0.25, 0.25, 0.0], dtype=torch.float64)
    u = torch.tensor([0.0, 0.499, 0.5, 0.749, 0.75, 0.999, 1.0], dtype=torch.float64)
    assert draw(chances.expand(7, 6), u).tolist() == [1, 1, 3, 3, 4, 4, 4]


def test_whole_numbers_cumulate_alike_and_draw_the_same(monkeypatch):
    """What GPUs do in place of a cumulative sum of floating-point numbers."""
    drawn = torch.Generator().manual_seed(0)
    chances = (torch.randn(64, 3000, generator=drawn, dtype=torch.float64) * 4).softmax(-1)
    chances[:, ::3] = 0
    u = torch.rand(64, generator=drawn).double()
    exactly = generation._cumulated_exactly(chances)
    torch.testing.assert_close(exactly, chances.cumsum(-1), rtol=0, atol=1e-12)
    assert (exactly.diff() >= 0).all() and (exactly.diff()[:, 2::3] == 0).all()
    turned = generation._cumulated_exactly(chances.flip(-1))
    assert (exactly[:, -1:] - exactly)[:, :-1].flip(-1).equal(turned[:, :-1])  # in whichever order
    expected = [draw(chances, u), draw(generation._nucleus(chances, 0.8), u)]
    monkeypatch.setattr(generation, "_cumulated", generation._cumulated_exactly)
    for found, each in zip([draw(chances, u), draw(generation._nucleus(chances, 0.8), u)], expected, strict=True):
        assert found.equal(each) and (chances.gather(1, found[:, None]) > 0).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_drawing_on_a_gpu_is_deterministic():
    chances = torch.randn(8, 50_000, generator=torch.Generator().manual_seed(0)).double().softmax(-1)
    u = torch.rand(8, generator=torch.Generator().manual_seed(1)).double()
    expected = draw(generation._nucleus(chances, 0.9), u)
    torch.use_deterministic_algorithms(True)
    try:
        found = [draw(generation._nucleus(chances.cuda(), 0.9), u.cuda()) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(each.cpu().equal(expected) for each in found)


@pytest.mark.parametrize(("top_p", "allowed"), [(0.49, {3}), (0.51, {3, 1}), (0.79, {3, 1}), (0.81, {0, 1, 3})])
def test_top_p_is_the_fewest_that_reach_it(top_p, allowed):
    chances = torch.tensor([0.15, 0.3, 0.05, 0.5]).double()

    class Fixed(nn.Module):
        def forward(self, input_ids: Tensor) -> Tensor:
            return chances.log().expand(*input_ids.shape, 4)

    prompts = [torch.tensor([0])] * 1000
    u = (torch.arange(1000) + 0.5) / 1000
    given = {"new_tokens": 1, "eos_id": None, "temperature": 1.0, "top_p": top_p, "uniform": lambda i: u}
    found = torch.tensor([row[0] for row in write(Fixed(), prompts, **given)])
    assert set(found.tolist()) == allowed
    kept = sum(float(chances[i]) for i in allowed)
    for i in allowed:
        assert (found == i).float().mean().item() == pytest.approx(float(chances[i]) / kept, abs=2e-3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompts": [torch.tensor([], dtype=torch.int64)]}, "prompt: empty"),
        ({"prompts": [torch.ones(17).long()]}, "prompt: 17 tokens; accepted: at most 16"),
        ({"new_tokens": 0}, "new_tokens"),
        ({"temperature": 1.0}, "uniform: missing"),
        ({"temperature": -1.0}, "temperature: -1.0"),
        ({"top_p": 0.0}, "top_p: 0.0"),
        ({"source": []}, "source: 0 for 1 prompts"),
    ],
)
def test_mistakes_are_one_line(given, message):
    with pytest.raises(UserError, match=message):
        write(lm(), **{"prompts": PROMPTS[:1], **given})
    assert continuations(lm(), [], new_tokens=3, eos_id=1, pad_id=1) == []
