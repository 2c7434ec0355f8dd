"""From a run folder alone: a language model goes on with a text as its network does, token by token."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from helpers.tiny import mistake
from kdlab.cli.main import main
from kdlab.data.text.tokenizer import Tokenizer
from kdlab.errors import UserError
from kdlab.functional import dense
from kdlab.inference.generate_text import complete, read_text
from kdlab.models import CausalLM
from kdlab.models.weights.checkpoint import save_weights
from kdlab.runs import folder as folders

CONTEXT = 24
SETTINGS = {"n_layer": 1, "n_head": 2, "n_embd": 16}


def write_run(folder: Path, target: str = "kdlab.models.CausalLM") -> tuple[CausalLM, Tokenizer]:
    """A run folder as training leaves it, its network and its tokenizer."""
    folder.mkdir()
    tokenizer = Tokenizer.characters(["abcdefgh ijkl\n"])
    tokenizer.save(folder)
    offers = {"vocab_size": tokenizer.size, "context": CONTEXT, "eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
    torch.manual_seed(0)
    net = CausalLM("gpt2", SETTINGS, **offers).eval()
    for parameter in net.parameters():  # an untrained network would say one token for ever
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.7)
    save_weights(net.state_dict(), folder / "student.pt")
    described = {
        "network": {"_target_": target, "architecture": "gpt2", "settings": SETTINGS},
        "arguments": offers,
        "weights": "student.pt",
        "kind": "text",
        "tokenizer": "tokenizer.json",
        "context": CONTEXT,
    }
    (folder / "model.json").write_text(json.dumps(described))
    folders.sign(folder)
    return net, tokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        place = tmp_path_factory.mktemp("texts")
        patch.setenv("XDG_STATE_HOME", str(place / "state"))
        yield place / "run", *write_run(place / "run")


@torch.no_grad()
def by_hand(net, tokenizer, text, new_tokens):
    """Greedy decoding, reading everything again for each token."""
    ids = tokenizer.encode(text)
    start = len(ids)
    while len(ids) < start + new_tokens:
        logits = dense(net(input_ids=torch.tensor([ids])))
        ids.append(int(logits[0, -1, : tokenizer.size].argmax()))
        if ids[-1] == tokenizer.eos_id:
            break
    return tokenizer.decode(ids[start:])


def test_it_goes_on_as_the_network_does(made):
    run, net, tokenizer = made
    texts = ["ab", "hijack d"[:4], "a b c d e"]
    found = complete(run, texts, new_tokens=12)
    assert [one.text for one in found] == [by_hand(net, tokenizer, text, 12) for text in texts]
    assert [(one.source, one.prompt, one.sample) for one in found] == [(text, text, 0) for text in texts]
    assert len({one.text for one in found}) > 1


def test_samples_repeat_and_depend_on_the_seed(made):
    run, *_ = made
    first = complete(run, ["ab", "cd"], new_tokens=10, temperature=1.5, samples=3)
    assert [(one.source, one.sample) for one in first] == [(t, n) for t in ("ab", "cd") for n in range(3)]
    assert first == complete(run, ["ab", "cd"], new_tokens=10, temperature=1.5, samples=3)
    assert len({one.text for one in first[:3]}) > 1
    assert first[:1] == complete(run, ["ab"], new_tokens=10, temperature=1.5)  # whatever else is asked
    assert first != complete(run, ["ab", "cd"], new_tokens=10, temperature=1.5, samples=3, seed=1)


def test_of_a_long_text_the_end_is_read(made, caplog):
    run, net, tokenizer = made
    text = "abcd efgh " * 5
    room = CONTEXT + 1 - 10
    with caplog.at_level("WARNING", logger="kdlab"):
        (found,) = complete(run, [text], new_tokens=10)
    assert found.text == by_hand(net, tokenizer, text[-room:], 10) and found.prompt == text
    assert f"{room} of a text's {len(text)} tokens" in caplog.text
    (short,) = complete(run, ["ab"])  # of a small context no more than half is written unless asked for
    assert short.text == by_hand(net, tokenizer, "ab", CONTEXT // 2)


def test_a_file_is_read_and_any_other_word_is_text(tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text("dürfen wir\n", encoding="utf-8")
    assert read_text(str(file)) == "dürfen wir"
    assert read_text("a file.py") == "a file.py" and read_text("a\nb.txt") == "a\nb.txt"
    assert read_text("x" * 5000) == "x" * 5000 and read_text("a\0b") == "a\0b"  # what no file can be called
    other = tmp_path / "prompt.md"
    other.write_text("# one\n")
    assert read_text(str(other)) == "# one"
    (tmp_path / "empty.txt").write_text("\n")
    for nothing, says in (("", "the text is empty"), (str(tmp_path / "empty.txt"), r"empty\.txt is empty; accepted")):
        with pytest.raises(UserError, match=says):
            read_text(nothing)
    with pytest.raises(UserError, match=r"nothing\.txt: cannot be read .*accepted: a \.txt file"):
        read_text(str(tmp_path / "nothing.txt"))


def test_on_the_command_line(made, capsys, tmp_path):
    run, net, tokenizer = made
    assert main(["predict", str(run), "abc", "--new-tokens", "8"]) == 0
    assert capsys.readouterr().out == f"abc{by_hand(net, tokenizer, 'abc', 8)}\n"
    (tmp_path / "p.txt").write_text("fed\n")
    words = ["abc", str(tmp_path / "p.txt"), "--temperature", "1", "--samples", "2", "--new-tokens", "4"]
    assert main(["predict", str(run), *words]) == 0
    said = capsys.readouterr().out
    assert said.startswith("abc (1):\nabc") and "\n\nabc (2):\nabc" in said
    assert f"\n\n{tmp_path / 'p.txt'} (2):\nfed" in said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["abc", "--samples", "2"], "--samples 2; accepted: 1 at temperature 0"),
        (["abc", "--samples", "0"], "--samples 0; accepted: at least 1"),
        (["abc", "--temperature=-1"], "--temperature -1; accepted: 0 or more"),
        (["abc", "--new-tokens", "0"], "--new-tokens 0; accepted: at least 1"),
        (["abc", "--new-tokens", "25"], "--new-tokens 25; accepted: 1 to 24, the model's context"),
        (["abc", "--top", "2"], "--top 2, and "),
        ([""], "the text is empty; accepted: "),
        (["abcé"], "'é' is not among the 14 known characters; accepted: text without it"),
    ],
)
def test_mistakes_are_one_line(made, capsys, words, says):
    assert says in mistake(capsys, ["predict", str(made[0]), *words])


def test_a_damaged_or_foreign_folder(made, capsys, tmp_path):
    run = made[0]
    for name in ("model.json", "student.pt"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    assert "tokenizer.json: does not exist" in mistake(capsys, ["predict", str(tmp_path), "abc"])
    described = json.loads((run / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps(described | {"tokenizer": "../../tokenizer.json"}))
    assert f"{tmp_path / 'tokenizer.json'}: does not exist" in mistake(capsys, ["predict", str(tmp_path), "abc"])
    (tmp_path / "model.json").write_text(json.dumps(described | {"network": {"_target_": "os.system"}}))
    assert "os.system" in mistake(capsys, ["predict", str(tmp_path), "abc"])
    (tmp_path / "model.json").write_text(json.dumps({"tokenizer": "tokenizer.json"}))
    assert "damaged or of another program" in mistake(capsys, ["predict", str(tmp_path), str(tmp_path)])
