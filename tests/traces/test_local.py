"""Traces with log-probabilities, and those of models on this machine."""

import json
from pathlib import Path

import numpy as np
import pytest

from helpers.serving import KEY, chat, generate, traces
from kdlab.cli.main import main
from kdlab.traces.prompts import Job, Prompt, PromptTemplate

pytestmark = pytest.mark.usefixtures("trace_folder")

# ---- log-probabilities


def scored_answer(tokenizer, ids, k, top_p=None):
    """Token by token as an endpoint reports it, with the distribution of a fixed table."""
    import torch

    rows = []
    for token in ids:
        logits = torch.randn(tokenizer.size, generator=torch.Generator().manual_seed(token)).log_softmax(-1)
        top = logits.topk(k)
        named = [(int(i), float(v)) for i, v in zip(top.indices, top.values, strict=True)]
        rows.append((token, named))
    return rows


def as_logprobs(pieces, rows):
    def piece(token):
        raw = pieces.bytes[token]
        return {"token": raw.decode("utf-8", "replace"), "bytes": list(raw)}

    return {
        "content": [
            {**piece(token), "logprob": -0.5, "top_logprobs": [{**piece(i), "logprob": v} for i, v in top]}
            for token, top in rows
        ]
    }


def small_tokenizer(folder):
    from kdlab.data.text.tokenizer import Tokenizer

    texts = ["Q: 2 + 3?\nA: 2 + 3 = 5\n#### 5", " 4 + 3 = 7 \n#### 7 é", "héhé so so many"] * 3
    made = Tokenizer.bpe(texts, 300)
    made.save(folder)
    return made


def test_log_probabilities_reach_the_cache_where_tokens_agree(serve, capsys, trace_folder):
    from kdlab.data.text.templates import Example, sequences
    from kdlab.teachers.cache.sequences import sequence_key
    from kdlab.teachers.cache.token_files import TokenManifest, read_index
    from kdlab.traces.scores import Pieces

    tokenizer = small_tokenizer(trace_folder / "tok")
    pieces = Pieces(tokenizer)
    assert pieces.find(" é".encode()) == tokenizer.encode(" é")[0] or len(tokenizer.encode(" é")) > 1
    asked = {}

    def scored(handler, body, number):
        first = int(body["messages"][-1]["content"].split()[0])
        text = f"{first} + 3 = {first + 3}\n#### {first + 3}"
        # reasoning and answer apart, as training has them; no space before the first token
        ids = [*tokenizer.encode(text.partition("\n")[0]), *tokenizer.encode("\n" + text.partition("\n")[2])]
        rows = scored_answer(tokenizer, ids, 4)
        if first == 6:  # the endpoint's tokens are others than training's
            rows = [(t, top) for char in text for t, top in scored_answer(tokenizer, tokenizer.encode(char), 4)]
        asked[first] = rows
        assert body["logprobs"] is True and body["top_logprobs"] == 4
        handler.send(200, chat(text, logprobs=as_logprobs(pieces, rows)))

    server = serve(scored)
    words = ["--logprobs", "4", "--tokenizer", str(trace_folder / "tok")]
    assert generate(server, *words) == 0
    shown = capsys.readouterr().out
    assert "log-probabilities of 2 of 3 traces" in shown
    assert {row["id"]: row["scored"] for row in traces()} == {"q2": True, "q4": True, "q6": False}
    assert [row["id"] for row in traces("out.jsonl.filtered.jsonl") if not row["scored"]] == []

    folder = Path("out.jsonl.tokens")
    plain = json.loads((folder / "manifest.json").read_text())
    manifest = TokenManifest.read(folder)
    assert manifest.classes == tokenizer.size and manifest.k == 4 and KEY not in json.dumps(plain)
    index = read_index(folder, manifest.record)
    records = np.fromfile(folder / "rows.bin", manifest.record)
    (sequence,) = sequences([Example("2 + 3?", "2 + 3 = 5", "5")], tokenizer)
    key = sequence_key(sequence.ids.numpy()[:-1])
    (entry,) = [e for e in index if e["key"].tobytes() == key]
    own = records[entry["start"] : entry["start"] + entry["rows"]]
    assert len(own) == int((sequence.segments != 0).sum()) == len(asked[2]) + 1
    for record, (_, top) in list(zip(own, asked[2], strict=False))[1:]:
        assert record["ids"].tolist() == [i for i, _ in top]
        assert record["values"] == pytest.approx([v for _, v in top], abs=2e-3)
        assert np.exp(record["rest"]) == pytest.approx(1 - sum(np.exp(v) for _, v in top), abs=1e-5)
    assert own[-1]["ids"][0] == tokenizer.eos_id and own[-1]["values"][0] == 0 and np.exp(own[-1]["rest"]) == 0
    # the first row's candidates have got the space that training has there
    spaced = [(b" " + pieces.bytes[i], v) for i, v in asked[2][0][1]]
    known = {pieces.bytes.index(piece): v for piece, v in spaced if piece in pieces.bytes}
    kept = {int(i): float(v) for i, v in zip(own[0]["ids"], own[0]["values"], strict=True) if v > -1000}
    assert kept == pytest.approx(known, abs=2e-3)


def test_odd_log_probabilities_are_left_out(serve, capsys, trace_folder):
    small_tokenizer(trace_folder / "tok")
    odd = [
        None,
        {"content": [{"token": "2"}]},
        {"content": [{"token": "2", "top_logprobs": [{"token": "2", "logprob": "high"}]}]},
        {"content": [{"token": "2", "top_logprobs": [{"token": "2", "logprob": 3.0}]}]},
        {"content": [{"token": "2", "bytes": [300], "top_logprobs": []}]},
        {"content": []},
        [1, 2],
    ]
    Path("q.jsonl").write_text("".join(json.dumps({"question": f"{i} + 3?"}) + "\n" for i in range(len(odd))))
    server = serve(lambda h, b, n: h.send(200, chat(logprobs=odd[n])))
    assert generate(server, "--logprobs", "2", "--tokenizer", str(trace_folder / "tok")) == 1
    shown = capsys.readouterr()
    assert f"log-probabilities of 0 of {len(odd)} traces" in shown.out
    assert f"warning: log-probabilities of 0 of {len(odd)} traces were stored" in shown.err
    # nothing is left to ask: that is no failure
    assert generate(server, "--logprobs", "2", "--tokenizer", str(trace_folder / "tok")) == 0


def test_a_tokenizer_of_bytes_needs_no_file(serve, capsys):
    def scored(handler, body, number):
        text = "five\n#### 5"
        named = [{"token": c, "logprob": -0.1, "top_logprobs": [{"token": c, "logprob": -0.1}]} for c in text]
        handler.send(200, chat(text, logprobs={"content": named}))

    assert generate(serve(scored), "--logprobs", "1", "--tokenizer", "bytes") in (0, 1)
    assert json.loads(Path("out.jsonl.tokens/manifest.json").read_text())["classes"] == 257


# ---- models on this machine


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """A folder as transformers writes it: a GPT-2 of one layer that was taught three sums by heart."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from kdlab.data.text.templates import Example, sequences

    folder = tmp_path_factory.mktemp("model")
    tokenizer = small_tokenizer(folder)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=tokenizer.size + 3, n_positions=64, n_embd=32, n_layer=1, n_head=2,
        bos_token_id=0, eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    net = GPT2LMHeadModel(config)
    rows = sequences([Example(f"{i} + 3?", f"{i} + 3 = {i + 3}", str(i + 3)) for i in (2, 4, 6)], tokenizer)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(150):
        logits = [(net(input_ids=r.ids.long()[None]).logits[0, :-1], r.ids.long()[1:]) for r in rows]
        loss = sum(torch.nn.functional.cross_entropy(found, wanted) for found, wanted in logits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.eval().save_pretrained(folder)
    return folder


def here(model, *words, out="out.jsonl"):
    return main(["generate", "q.jsonl", out, "--model", str(model), "--device", "cpu", "--max-tokens", "40", *words])


def test_a_model_on_this_machine_writes_what_it_learned(tiny_model, capsys):
    assert here(tiny_model, "--logprobs", "5") == 0
    assert "right 3 of 3" in capsys.readouterr().out
    row = traces()[0]
    assert (row["reasoning"], row["answer"], row["finish_reason"], row["scored"]) == ("2 + 3 = 5", "5", "stop", True)

    import torch
    from transformers import GPT2LMHeadModel

    from kdlab.data.text.templates import Example, sequences
    from kdlab.data.text.tokenizer import Tokenizer
    from kdlab.teachers.cache.sequences import sequence_key
    from kdlab.teachers.cache.token_files import TokenManifest, read_index

    tokenizer = Tokenizer.load(tiny_model)
    (sequence,) = sequences([Example("2 + 3?", "2 + 3 = 5", "5")], tokenizer)
    manifest = TokenManifest(str(tiny_model), f"tokens of {tokenizer.fingerprint[:16]}", tokenizer.size, 5)
    index = read_index(Path("out.jsonl.tokens"), manifest.record)
    (entry,) = [e for e in index if e["key"].tobytes() == sequence_key(sequence.ids.numpy()[:-1])]
    records = np.fromfile("out.jsonl.tokens/rows.bin", manifest.record)[entry["start"] :][: entry["rows"]]
    with torch.no_grad():
        logits = GPT2LMHeadModel.from_pretrained(tiny_model)(input_ids=sequence.ids.long()[None]).logits[0]
    first = int((sequence.segments == 0).sum())
    wanted = logits[first - 1 : -1, : tokenizer.size].log_softmax(-1).topk(5)
    assert torch.equal(torch.from_numpy(records["ids"].astype(np.int64)), wanted.indices)
    np.testing.assert_allclose(records["values"], wanted.values.numpy(), atol=2e-2, rtol=1e-3)


def test_samples_depend_on_their_seed_and_not_on_the_batch(tiny_model):
    words = ["--temperature", "1.5", "--samples", "4", "--keep", "agreeing"]
    assert here(tiny_model, *words, "--batch-size", "12") in (0, 1)
    assert here(tiny_model, *words, "--batch-size", "1", out="b.jsonl") in (0, 1)
    texts = [
        {(row["id"], row["sample"]): (row["reasoning"], row["answer"]) for row in traces(path)}
        for path in ("out.jsonl", "b.jsonl")
    ]
    assert texts[0] == texts[1] and len(texts[0]) >= 10 and len(set(texts[0].values())) > 3
    assert here(tiny_model, *words, "--seed", "1", out="c.jsonl") in (0, 1)
    assert {(r["id"], r["sample"]): (r["reasoning"], r["answer"]) for r in traces("c.jsonl")} != texts[0]


def test_prompts_without_room_fail_alone(tiny_model, capsys):
    Path("q.jsonl").write_text(json.dumps({"question": "2 + 3?"}) + "\n" + json.dumps({"question": "so " * 300}))
    assert here(tiny_model) == 1
    assert len(traces()) == 1
    assert "tokens, the context 64" in traces("out.jsonl.failed.jsonl")[0]["error"]


def test_a_chat_template_is_used_where_there_is_one(tiny_model, tmp_path, monkeypatch):
    import shutil

    from kdlab.traces.local import Local, load

    folder = tmp_path / "chatty"
    shutil.copytree(tiny_model, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|endoftext|>{% endfor %}assistant:"
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    local = Local(load(str(folder), "cpu"), PromptTemplate(system="s", template="{question}"))
    ids = local.prompt(Job.of(Prompt("k", "so?"), 0, 0))
    assert ids.count(local.writer.tokenizer.eos_id) == 2
    assert local.writer.tokenizer.decode(ids) == "system: suser: so?assistant:"


def test_messages_need_a_chat_template(tiny_model, capsys, trace_folder):
    Path("q.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}]}))
    assert here(tiny_model) == 2
    assert "has no chat template" in capsys.readouterr().err and not Path("out.jsonl").exists()


def test_a_run_folder_is_a_teacher(tiny_model, tmp_path, capsys):
    import shutil

    import torch

    from kdlab.models.transformers.causal_lm import CausalLM

    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(tiny_model / "tokenizer.json", run)
    shape = {"n_embd": 32, "n_layer": 1, "n_head": 2}
    net = CausalLM(name=str(tiny_model))
    torch.save(net.state_dict(), run / "student.pt")
    network = {"_target_": "kdlab.models.CausalLM", "architecture": "gpt2", "settings": shape}
    arguments = {"vocab_size": net.net.config.vocab_size, "context": 64, "eos_id": 0, "pad_id": 0}
    described = {"network": network, "weights": "student.pt", "arguments": arguments, "tokenizer": "tokenizer.json"}
    (run / "model.json").write_text(json.dumps(described))
    assert here(run) == 0
    assert "right 3 of 3" in capsys.readouterr().out
    (run / "tokenizer.json").unlink()
    assert here(run, out="b.jsonl") == 2
    assert "has no tokenizer.json; accepted: the run of a language model" in capsys.readouterr().err
