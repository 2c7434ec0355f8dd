"""Tokenizers: exact both ways, the same each time, and careful with files that someone else wrote."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlab.data.text import tokenizer as module
from kdlab.data.text.tokenizer import END, Tokenizer
from kdlab.errors import UserError

ODD = "a b\r\n\r\n  c\t\u00e9e\u0301 \U0001f600 \u202e\x00 it's 12,345 <|endoftext|>\n\n"
CORPUS = "the cat sat on the mat. the dog sat on the log.\nthat cat, that dog!\n" * 20
UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.fixture(scope="module")
def kinds():
    return {"bytes": Tokenizer.bytes(), "bpe": Tokenizer.bpe([CORPUS], 300)}


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
@settings(max_examples=60, deadline=None)
@given(text=UNICODE)
def test_any_text_comes_back(kinds, kind, text):
    assert kinds[kind].decode(kinds[kind].encode(text)) == text


@settings(max_examples=40, deadline=None)
@given(text=UNICODE)
def test_any_text_of_known_characters_comes_back(text):
    made = Tokenizer.characters([text, ODD])
    assert made.decode(made.encode(text + ODD)) == text + ODD
    assert len(made.encode(text)) == len(text)


def test_characters_are_numbered_by_code_point():
    made = Tokenizer.characters(["banana", "cab\n"])
    assert made.encode("abc\nn") == [1, 2, 3, 0, 4]
    assert made.size == 6 and made.eos_id == made.pad_id == 5
    assert made.vocabulary() == {"\n": 0, "a": 1, "b": 2, "c": 3, "n": 4, END: 5}


def test_bytes_are_their_own_ids(kinds):
    assert kinds["bytes"].encode(ODD) == list(ODD.encode("utf-8"))
    assert kinds["bytes"].size == 257 and kinds["bytes"].eos_id == 256


def test_bpe_merges_the_most_frequent_pair_first(kinds):
    counts = Counter()
    for word in CORPUS.replace("\n", "\n ").split(" "):
        counts.update(pairwise(word))
    made = Tokenizer.bpe([CORPUS], 258)
    new = set(made.vocabulary()) - set(Tokenizer.bytes().vocabulary())
    assert new == {"".join(counts.most_common(1)[0][0])} == {"at"}
    assert len(kinds["bpe"].encode(CORPUS)) < 0.7 * len(CORPUS)


def test_bpe_is_the_same_each_time_and_in_any_order():
    parts = [CORPUS[:300], CORPUS[300:900], "zebra zebra zebra"]
    first, again = Tokenizer.bpe(parts, 290), Tokenizer.bpe(parts[::-1], 290)
    assert first.inner.to_str() == again.inner.to_str() and first.fingerprint == again.fingerprint
    assert first.size <= 290


def test_long_texts_are_tokenised_in_parts_without_a_trace(kinds, monkeypatch):
    whole = [kinds[kind].encode(CORPUS) for kind in kinds]
    monkeypatch.setattr(module, "_CHUNK", 100)
    assert len(list(module._chunks(CORPUS))) > 5
    assert "".join(module._chunks(CORPUS)) == CORPUS
    assert [kinds[kind].encode(CORPUS) for kind in kinds] == whole


def test_the_end_of_text_is_no_text(kinds):
    for made in kinds.values():
        assert made.eos_id not in made.encode(f"a{END}b")
        assert made.encode(f"a{END}", special=True)[-1] == made.eos_id
        ids = [*made.encode("a"), made.eos_id]
        assert made.decode(ids) == "a" and made.decode(ids, special=True) == f"a{END}"


def test_an_unknown_character_is_named():
    with pytest.raises(UserError, match="'z' is not among the 2 known characters"):
        Tokenizer.characters(["ab"]).encode("abz")
    for made in (Tokenizer.characters(["ab"]), Tokenizer.bytes()):
        with pytest.raises(UserError, match="half of a surrogate pair"):
            made.encode("a\ud800")


def test_saved_tokenizers_come_back(kinds, tmp_path):
    for kind, made in {**kinds, "characters": Tokenizer.characters([CORPUS])}.items():
        assert made.save(tmp_path / kind).name == "tokenizer.json"
        for where in (tmp_path / kind, tmp_path / kind / "tokenizer.json"):
            back = Tokenizer.load(where)
            assert back.fingerprint == made.fingerprint
            assert (back.size, back.eos_id, back.pad_id) == (made.size, made.eos_id, made.pad_id)
            assert back.encode(CORPUS) == made.encode(CORPUS) and back.decode(back.encode(CORPUS)) == CORPUS


def test_transformers_reads_what_is_saved(kinds, tmp_path):
    transformers = pytest.importorskip("transformers")
    kinds["bpe"].save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.encode(CORPUS) == kinds["bpe"].encode(CORPUS)
    assert theirs.eos_token == END and theirs.pad_token_id == kinds["bpe"].pad_id


@pytest.mark.parametrize(("names"), [("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")])
def test_both_layouts_of_gpt2_are_read(kinds, tmp_path, names):
    content = json.loads(kinds["bpe"].inner.to_str())["model"]
    (tmp_path / names[0]).write_text(json.dumps(content["vocab"]))
    lines = [" ".join(pair) for pair in content["merges"]]
    (tmp_path / names[1]).write_text("\n".join(["#version: 0.2", *lines, ""]))
    back = Tokenizer.load(tmp_path)
    assert back.encode(ODD + CORPUS) == kinds["bpe"].encode(ODD + CORPUS)
    assert back.eos_id == kinds["bpe"].eos_id and back.decode([*back.encode(ODD), back.eos_id]) == ODD


def test_special_tokens_are_found(tmp_path):
    from tokenizers import Tokenizer as Inner
    from tokenizers import models

    inner = Inner(models.WordLevel({"<pad>": 0, "</s>": 1, "a": 7}, unk_token="a"))
    inner.save(str(tmp_path / "tokenizer.json"))
    made = Tokenizer.load(tmp_path)
    assert (made.eos_id, made.pad_id, made.size) == (1, 0, 8)
    settings = {"eos_token": {"content": "a"}, "pad_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert Tokenizer.load(tmp_path).eos_id == 7
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "b"}))
    with pytest.raises(UserError, match="no token 'b' that ends a text"):
        Tokenizer.load(tmp_path)


DAMAGE = {
    "tokenizer.json": [b"", b"{", b"[1]", b'{"version": "1.0"}', b"\xff\xfe", b"[" * 100_000],
    "encoder.json": [b"", b"[]", b"{}", b'{"a": "b"}', b'{"a": -1}', b'{"a": 0}'],
    "vocab.bpe": [b"a", b"a b c\n", b"a b\n", b"\xff"],
}


@pytest.mark.parametrize(("name", "content"), [(name, one) for name, all_ in DAMAGE.items() for one in all_])
def test_damaged_files_are_refused_in_one_line(tmp_path, name, content):
    (tmp_path / "encoder.json").write_text(json.dumps({END: 0, "a": 1, "b": 2}))
    (tmp_path / "vocab.bpe").write_text("")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=r"^data\.tokenizer: ") as error:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(error.value)


def test_what_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds no tokenizer; accepted: a folder with tokenizer\.json, or vocab\.json"):
        Tokenizer.load(tmp_path)
    with pytest.raises(UserError, match="no such file or folder; accepted: characters, bytes, bpe"):
        Tokenizer.load(tmp_path / "nothing")


def test_the_hub_is_asked_for_a_name(monkeypatch, tmp_path, kinds):
    import huggingface_hub

    kinds["bpe"].save(tmp_path)
    asked = []

    def download(name, file, local_files_only=False):
        asked.append((name, file))
        if name != "org/model":
            raise OSError("offline\nno network")
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert Tokenizer.load("org/model").fingerprint == kinds["bpe"].fingerprint
    assert asked == [("org/model", "tokenizer.json"), ("org/model", "tokenizer_config.json")]
    with pytest.raises(UserError, match=r"gpt9: cannot be had from the hub \(offline\); accepted"):
        Tokenizer.load("gpt9")


def test_what_the_config_says():
    def texts():
        return ["abc"]

    assert Tokenizer.of("characters", texts).size == 4
    assert Tokenizer.of("bytes", texts).size == 257
    assert Tokenizer.of("bpe", lambda: [CORPUS], 270).size == 270
    made = Tokenizer.bytes()
    assert Tokenizer.of(made, texts) is made
    for spec, vocab, said in [
        ("bytes", 300, r"data\.vocab: 300; bytes says itself"),
        ("bpe", 256, r"data\.vocab: 256; accepted: a whole number, at least 257"),
        (None, None, r"data\.tokenizer: None; accepted: characters, bytes, bpe"),
    ]:
        with pytest.raises(UserError, match=said):
            Tokenizer.of(spec, texts, vocab)
