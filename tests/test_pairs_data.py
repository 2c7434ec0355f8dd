"""Pairs of texts: files, splits, what encoder and decoder are given."""

from __future__ import annotations

import json

import pytest
import torch

from kdlab.data import pairs
from kdlab.errors import UserError

WORDS = [f"{'abcde'[i % 5] * (i % 3 + 1)} {i}" for i in range(40)]


def write(path, rows):
    path.write_text("".join(json.dumps({"source": a, "target": b}) + "\n" for a, b in rows))
    return str(path)


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "train.jsonl", [(word, word[::-1]) for word in WORDS])


def texts(data, split):
    return [(question.text, question.answer) for question in data.questions(split)]


def test_splits_are_taken_from_train_and_do_not_overlap(file):
    data = pairs(file)
    assert data.counts == {"train": 32, "labelled": 32, "val": 4, "test": 4, "outside": 0}
    found = [pair for split in ("train", "val", "test") for pair in texts(data, split)]
    assert sorted(found) == sorted((word, word[::-1]) for word in WORDS)
    assert texts(pairs(file, seed=5), "test") == texts(data, "test") != texts(pairs(file, split_seed=5), "test")
    assert pairs(file, val=0, test=0).counts["train"] == 40


def test_files_of_their_own(file, tmp_path):
    other = write(tmp_path / "test.jsonl", [("ab 1", "1 ba"), ("c 2", "2 c")])
    data = pairs(file, test_path=other, val=0)
    assert data.counts == {"train": 40, "labelled": 40, "val": 0, "test": 2, "outside": 0}
    assert texts(data, "test") == [("ab 1", "1 ba"), ("c 2", "2 c")] and data.words("test") == 4


def test_a_batch_is_source_and_shifted_target(file):
    data = pairs(file, prefix="abc ", batch_size=4)
    batch = next(iter(data.sequential("test")))
    eos, decode = data.tokenizer.eos_id, data.tokenizer.decode
    ids, mask, target = (batch.inputs[name] for name in ("input_ids", "attention_mask", "decoder_input_ids"))
    start = 0
    for row, question in enumerate(data.questions("test")):
        read = ids[row][mask[row].bool()].tolist()
        assert read[-1] == eos and decode(read[:-1]) == "abc " + question.text.removeprefix("abc ")
        count = int(batch.where[row].sum())
        predicted = batch.targets[start : start + count].tolist()
        assert predicted == [*data.tokenizer.encode(question.answer), eos]
        assert target[row, 0] == eos and target[row, 1:count].tolist() == predicted[:-1]
        assert torch.equal(question.source, ids[row][mask[row].bool()].int()) and question.prompt.tolist() == [eos]
        start += count
    assert start == len(batch.targets) and data.gives == "pairs"


def test_a_table_with_and_without_header(tmp_path):
    rows = [(f"q{i}", f"a{i}") for i in range(10)]
    plain, named = tmp_path / "plain.tsv", tmp_path / "named.tsv"
    plain.write_text("".join(f"{a}\t{b}\r\n" for a, b in rows) + "\n")
    named.write_text("id\tanswer\tquestion\n" + "".join(f"7\t{b}\t{a}\n" for a, b in rows))
    assert texts(pairs(str(plain), val=0, test=0), "train") == rows
    assert texts(pairs(str(named), source="question", target="answer", val=0, test=0), "train") == rows


def test_characters_that_look_like_line_ends_stay_inside(tmp_path):
    rows = [("a\u2028b", "c\x85d")] * 3
    path = tmp_path / "odd.jsonl"
    path.write_text("".join(json.dumps({"source": a, "target": b}, ensure_ascii=False) + "\n" for a, b in rows))
    assert texts(pairs(str(path), val=0, test=0), "train") == rows


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is empty"),
        ('{"source": "a", "target": "b"}\n{"source": "a"', "line 2 is no JSON"),
        ('{"source": "a", "target": "b"}\n\n{"source": "a", "answer": "b"}', "line 3: source, answer; accepted"),
        ("[1, 2]", "line 1: a list; accepted"),
        ('{"source": "a", "target": 4}', "line 1: source and target must be texts"),
    ],
)
def test_lines_that_are_no_pairs_are_named(tmp_path, content, said):
    path = tmp_path / "train.jsonl"
    path.write_text(content)
    with pytest.raises(UserError) as error:
        pairs(str(path))
    assert str(error.value).startswith(f"data.path: {path}") and said in str(error.value)
    assert "\n" not in str(error.value)


def test_other_mistakes_are_named(file, tmp_path):
    with pytest.raises(UserError, match=r"data\.path: null; accepted"):
        pairs()
    with pytest.raises(UserError, match=r"data\.val_path: cannot read .*nowhere.* accepted"):
        pairs(file, val_path=str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(UserError, match=r"data\.test: 5 beside data\.test_path"):
        pairs(file, test_path=file, test=5)
    table = tmp_path / "three.tsv"
    table.write_text("a\tb\nc\td\te\n")
    with pytest.raises(UserError, match=r"line 2: 3 columns; accepted: 2"):
        pairs(str(table))
    table.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"is no UTF-8 text"):
        pairs(str(table))
    table.write_text("source\ttarget\n")
    with pytest.raises(UserError, match=r"a header and no pairs"):
        pairs(str(table))
