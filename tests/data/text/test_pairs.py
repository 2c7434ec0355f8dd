"""Pairs of texts: files, splits, what encoder and decoder are given."""

from __future__ import annotations

import json

import pytest
import torch

from kdlab.data import pairs
from kdlab.errors import UserError
from kdlab.functional.rng import permutation

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
    assert data.counts == {"train": 32, "labelled": 32, "val": 4, "test": 4, "ood": 0}
    found = [pair for split in ("train", "val", "test") for pair in texts(data, split)]
    assert sorted(found) == sorted((word, word[::-1]) for word in WORDS)
    assert texts(pairs(file, seed=5), "test") == texts(data, "test") != texts(pairs(file, split_seed=5), "test")
    assert pairs(file, val=0, test=0).counts["train"] == 40


def test_files_of_their_own(file, tmp_path):
    other = write(tmp_path / "test.jsonl", [("ab 1", "1 ba"), ("c 2", "2 c")])
    data = pairs(file, test_path=other, val=0)
    assert data.counts == {"train": 40, "labelled": 40, "val": 0, "test": 2, "ood": 0}
    assert texts(data, "test") == [("ab 1", "1 ba"), ("c 2", "2 c")] and data.words("test") == 4


def test_a_batch_is_source_and_shifted_target(file):
    data = pairs(file, prefix="abc ", batch_size=4)
    batch = next(iter(data.ordered_loader("test")))
    eos, decode = data.tokenizer.eos_id, data.tokenizer.decode
    ids, mask, target = (batch.inputs[name] for name in ("input_ids", "attention_mask", "decoder_input_ids"))
    start = 0
    for row, question in enumerate(data.questions("test")):
        read = ids[row][mask[row].bool()].tolist()
        assert read[-1] == eos and decode(read[:-1]) == "abc " + question.text.removeprefix("abc ")
        count = int(batch.loss_mask[row].sum())
        predicted = batch.targets[start : start + count].tolist()
        assert predicted == [*data.tokenizer.encode(question.answer), eos]
        assert target[row, 0] == eos and target[row, 1:count].tolist() == predicted[:-1]
        assert torch.equal(question.source, ids[row][mask[row].bool()].int()) and question.prompt.tolist() == [eos]
        start += count
    assert start == len(batch.targets) and data.target == "text"


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
        ('{"source": "a", "target": "b"}\n{"source": "a"', "line 2: no JSON"),
        ('{"source": "a", "target": "b"}\n\n{"source": "a", "answer": "b"}', "line 3: source, answer; accepted"),
        ("[1, 2]", "line 1: a list; accepted"),
        ('{"source": "a", "target": 4}', "line 1: source and target must be texts"),
        ('{"source": "a", "target": "b"}\n{"source": " ", "target": "b"}', "line 2: source is empty; accepted: a text"),
        ('{"source": "a", "target": ""}', "line 1: target is empty; accepted: a text"),
        ('{"sorce": "a", "target": "b"}', "data.source names another key (nearest: sorce)"),
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


@pytest.mark.parametrize(
    ("content", "options", "said"),
    [
        ("sorce\ttarget\na\tb\n", {}, "line 1 (data.source): unknown column 'source'; nearest: sorce"),
        ("source\ttraget\na\tb\n", {}, "line 1 (data.target): unknown column 'target'; nearest: traget"),
        ("sorce\ttraget\na\tb\n", {}, "line 1 (data.source): unknown column 'source'; nearest: sorce"),
        ("Source\tTarget\na\tb\n", {}, "line 1 (data.source): unknown column 'source'; nearest: Source"),
        (
            "en\tde\na\tb\n",
            {"source": "en", "target": "dee"},
            "line 1 (data.target): unknown column 'dee'; nearest: de",
        ),
        ("en\tde\na\tb\n", {"source": "question"}, "line 1 (data.source): unknown column 'question'"),
        ("source\ttarget\tsource\na\tb\tc\n", {}, "line 1: two columns are named 'source'"),
        ("source\ttarget\na\t \n", {}, "line 2: target is empty"),
        ("a\tb\n", {"source": "x", "target": "x"}, "data.target: x, which is data.source too"),
    ],
)
def test_columns_that_are_not_there_are_named(tmp_path, content, options, said):
    path = tmp_path / "t.tsv"
    path.write_text(content)
    with pytest.raises(UserError) as error:
        pairs(str(path), **options)
    assert said in str(error.value)


def test_a_table_without_a_header_is_said_to_be_one(tmp_path):
    path = tmp_path / "t.tsv"
    path.write_text("\ufeffquestion\tanswer\r\n" + "".join(f"q{i}\ta{i}\r\n" for i in range(9)))
    data = pairs(str(path), val=0, test=0)
    assert data.counts["train"] == 10 and "has no header with source and target" in data.notes[0]
    named = pairs(str(path), source="question", target="answer", val=0, test=0)
    assert named.counts["train"] == 9 and named.notes == () and texts(named, "train")[0] == ("q0", "a0")


@pytest.mark.parametrize("repeats", [2, 3, 7])
def test_pairs_of_one_source_stay_in_one_split(tmp_path, repeats):
    rows = [(f"{word[:4]}  {i}", f"{word} {n}") for n in range(repeats) for i, word in enumerate(WORDS)]
    path = write(tmp_path / "train.jsonl", [(a if i % 2 else a.replace("  ", " "), b) for i, (a, b) in enumerate(rows)])
    data = pairs(path)
    sides = {split: {" ".join(text.split()) for text, _ in texts(data, split)} for split in ("train", "val", "test")}
    assert not sides["train"] & sides["test"] and not sides["train"] & sides["val"] and not sides["val"] & sides["test"]
    assert sum(data.counts[split] for split in sides) == len(rows) and all(sides.values())
    assert abs(data.counts["test"] - len(rows) / 10) < repeats and f"{len(rows) - 40} of {len(rows)}" in data.notes[0]
    assert texts(pairs(path, seed=3), "test") == texts(data, "test") != texts(pairs(path, split_seed=3), "test")


def test_pairs_without_repeats_are_divided_as_ever(file):
    """By the numbers that the rows have always been drawn with."""
    data = pairs(file)
    test = sorted(permutation(40, 0, "split", "test")[:4].tolist())
    rest = [n for n in range(40) if n not in test]
    val = [rest[n] for n in sorted(permutation(36, 0, "split", "val")[:4].tolist())]
    assert [text for text, _ in texts(data, "test")] == [WORDS[n] for n in test]
    assert [text for text, _ in texts(data, "val")] == [WORDS[n] for n in val] and data.notes == ()


def test_files_that_share_a_source_are_refused(file, tmp_path):
    other = write(tmp_path / "test.jsonl", [("new", "wen"), (WORDS[5].replace(" ", "  "), "x"), (WORDS[7], "y")])
    with pytest.raises(UserError) as error:
        pairs(file, test_path=other)
    assert str(error.value).startswith(
        f"data.test_path: 2 of 3 pairs of {other} have a source of data.path, such as line 2"
    )
    assert f"(line 6 of {file}); accepted: other sources" in str(error.value)
    with pytest.raises(UserError, match=r"data\.val_path: 2 of 3 pairs .* of data\.path, "):
        pairs(file, val_path=other, test=0)
    new = write(tmp_path / "old.jsonl", [("old", "dlo")])
    with pytest.raises(UserError, match=r"data\.test_path: 1 of 3 pairs .* of data\.val_path"):
        pairs(new, val_path=write(tmp_path / "val.jsonl", [(WORDS[5], "x")]), test_path=other)
    one = write(tmp_path / "one.jsonl", [("same", str(i)) for i in range(20)])
    with pytest.raises(UserError, match=r"data\.test: all 20 pairs have one source, 'same'; accepted: 0"):
        pairs(one)
    assert pairs(one, val=0, test=0).counts["train"] == 20
