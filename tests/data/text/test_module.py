"""Data sets of text: corpora and their files, shared tokenizers, and what the rest of kdlab asks of a data module."""

from __future__ import annotations

import ast
import hashlib
import inspect
import logging
import math

import pytest
import torch
import yaml

from helpers.paths import CONF
from kdlab.config import builder
from kdlab.data import TextData, shakespeare, text_files, wikitext
from kdlab.data.download import Remote
from kdlab.data.text import ANSWER, PROMPT, Question, RawText, Sequence, Tokenizer, text_data
from kdlab.data.text.datasets import corpora
from kdlab.errors import UserError

torch.set_num_threads(1)

PROSE = "".join(f"line {number} of the book, no more.\n" for number in range(200))


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(PROSE)
    return path


@pytest.fixture
def wiki(tmp_path):
    folder = tmp_path / "wikitext-2"
    folder.mkdir()
    for number, part in enumerate(("train", "valid", "test")):
        lines = [f" = Title {number} = \n", " \n", *[f" words of {part} {i} <unk> . \n" for i in range(30)]]
        (folder / f"wiki.{part}.tokens").write_text("".join(lines))
    return tmp_path


def tokens_of(data, split):
    """The text that the rows of a split predict."""
    rows = [token for batch in data.ordered_loader(split) for token in batch.targets.tolist()]
    return data.tokenizer.decode(rows)


def asked(*lengths):
    return [
        Sequence.of([([1] * (n - 1), PROMPT), ([2], ANSWER)], question=Question(torch.tensor([n]), str(n)))
        for n in lengths
    ]


def made(train, **options):
    source = RawText("made", Tokenizer.bytes(), {"train": train, "val": asked(3), "test": asked(4)})
    return TextData(source, **options)


# ---- corpora


def test_a_file_is_split_from_its_end(book):
    data = text_files(str(book), val=0.1, test=0.05, context=32, batch_size=4)
    cuts = [len(PROSE) - round(0.05 * len(PROSE)) - round(0.1 * len(PROSE)), len(PROSE) - round(0.05 * len(PROSE))]
    parts = {"train": PROSE[: cuts[0]], "val": PROSE[cuts[0] : cuts[1]], "test": PROSE[cuts[1] :]}
    for split, expected in parts.items():
        assert tokens_of(data, split) == expected[1:]
        assert data.words(split) == len(expected.split())
        assert data.counts[split] == math.ceil((len(expected) - 1) / 32)
    assert data.counts["labelled"] == data.counts["train"] and data.counts["ood"] == 0
    assert data.tokenizer.size == len(set(PROSE)) + 1 and data.name == "book"
    assert data.describe() == f"{data.counts['train']} sequences of book ({cuts[0] - 1} tokens to predict)"


def test_files_are_joined_by_the_end_of_text(tmp_path):
    for name, content in (("a", "first"), ("b", "second"), ("c", "third")):
        (tmp_path / f"{name}.txt").write_text(content)
    options = {"tokenizer": "bytes", "context": 8, "batch_size": 1}
    data = text_files([str(tmp_path / "b.txt"), str(tmp_path / "a.txt")], str(tmp_path / "c.txt"), test=0, **options)
    rows = [token for batch in data.ordered_loader("train") for token in batch.targets.tolist()]
    assert rows == [*b"econd", 256, *b"first"]
    assert tokens_of(data, "val") == "hird" and data.test_dataloader() == []
    pattern = text_files(str(tmp_path / "*.txt"), val=0, test=6, **options)
    assert tokens_of(pattern, "train") == "irstsecon" and tokens_of(pattern, "test") == "third"


def test_lines_end_as_they_do_in_the_file(tmp_path):
    (tmp_path / "dos.txt").write_bytes(b"one\r\ntwo\r\n" * 9)
    data = text_files(str(tmp_path / "dos.txt"), val=0, test=0, batch_size=1)
    assert tokens_of(data, "train") == ("one\r\ntwo\r\n" * 9)[1:]


def test_files_that_are_no_text_are_refused(tmp_path, book):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for path, said in [
        ("nothing.txt", r"data\.path: nothing\.txt: no such file; accepted: a text file, a list"),
        ([], r"data\.path: names no file"),
        (str(tmp_path / "empty.txt"), r"data\.path: .*empty\.txt is empty"),
        (str(tmp_path / "latin.txt"), r"data\.path: .*latin\.txt is no UTF-8 text \(.* at byte 3\)"),
    ]:
        with pytest.raises(UserError, match=said):
            text_files(path)
    with pytest.raises(UserError, match=r"data\.test: takes all of the text"):
        text_files(str(book), test=len(PROSE))
    with pytest.raises(UserError, match=r"data\.val: 1.5 is neither a whole number nor a fraction"):
        text_files(str(book), val=1.5)


@pytest.mark.parametrize("folder", ["", "tinyshakespeare", "lm/tinyshakespeare"])
def test_shakespeare_is_found_and_checked(tmp_path, monkeypatch, folder):
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    path = tmp_path / folder / "input.txt"
    path.write_text(PROSE)
    with pytest.raises(UserError, match="is not the publisher's file"):
        shakespeare(str(tmp_path))
    checksum = "sha256:" + hashlib.sha256(PROSE.encode()).hexdigest()
    monkeypatch.setattr(corpora, "SHAKESPEARE", Remote("https://example.org/input.txt", checksum))
    data = shakespeare(str(tmp_path), context=16, batch_size=4)
    twentieth = round(0.05 * len(PROSE))
    assert tokens_of(data, "test") == PROSE[-twentieth + 1 :]
    assert tokens_of(data, "val") == PROSE[-2 * twentieth + 1 : -twentieth]


def test_shakespeare_is_fetched_when_asked_to(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"data\.root: no tinyshakespeare/input\.txt .* data\.download=true"):
        shakespeare(str(tmp_path / "data"))
    published = tmp_path / "input.txt"
    published.write_text(PROSE)
    checksum = "sha256:" + hashlib.sha256(PROSE.encode()).hexdigest()
    monkeypatch.setattr(corpora, "SHAKESPEARE", Remote(published.as_uri(), checksum))
    data = shakespeare(str(tmp_path / "data"), download=True, context=16, batch_size=4)
    assert (tmp_path / "data" / "tinyshakespeare" / "input.txt").is_file()
    assert data.fingerprint == shakespeare(str(tmp_path / "data"), context=16, batch_size=4).fingerprint


def test_words_of_wikitext_count_ends_of_lines(wiki):
    data = wikitext(str(wiki), "wikitext-2", tokenizer="bytes", context=64, batch_size=4)
    lines = (wiki / "wikitext-2" / "wiki.test.tokens").read_text().splitlines()
    # as the publisher's own reader has it: the words of each line, and <eos>
    assert data.words("test") == sum(len([*line.split(), "<eos>"]) for line in lines)
    assert tokens_of(data, "val") == (wiki / "wikitext-2" / "wiki.valid.tokens").read_text()[1:]
    assert wikitext(str(wiki / "wikitext-2"), "wikitext-2", tokenizer="bytes").counts["test"] > 0


def test_wikitext_without_its_training_file(wiki):
    folder = wiki / "wikitext-2"
    valid = (folder / "wiki.valid.tokens").read_text()
    for part in ("valid", "test"):
        (folder / f"wiki.{part}.tokens").rename(folder / f"{part}.txt")
    (folder / "wiki.train.tokens").unlink()
    with pytest.raises(UserError, match=r"has no training file of wikitext-2; put wiki.train.tokens there, or take"):
        wikitext(str(wiki), "wikitext-2")
    data = wikitext(str(wiki), "wikitext-2", train="valid", context=32, batch_size=4)
    assert tokens_of(data, "train") + tokens_of(data, "val")[-5:] == valid[1 : -round(0.1 * len(valid))] + valid[-5:]
    for options, said in [
        ({"name": "wikitext-3"}, r"data\.name: unknown value 'wikitext-3'; nearest: wikitext"),
        ({"name": "wikitext-2", "train": "test"}, "data.train: unknown file 'test'"),
        ({"name": "wikitext-103"}, r"data\.root: no wikitext-103 in"),
    ]:
        with pytest.raises(UserError, match=said):
            wikitext(str(wiki), **options)


# ---- one tokenizer for several corpora


@pytest.mark.parametrize("tokenizer", [{}, {"tokenizer": "bpe", "vocab": 270}])
def test_a_general_teacher_and_a_narrow_student_share_a_tokenizer(book, wiki, tokenizer):
    size = {"context": 32, "batch_size": 4}
    general = wikitext(str(wiki), "wikitext-2", **size)
    student = text_files(str(book), ood=general, **size, **tokenizer)
    teacher = text_files(str(book), mix=[general], **size, **tokenizer)
    student.check_same_classes(teacher)
    assert student.tokenizer.fingerprint == teacher.tokenizer.fingerprint
    assert student.vocab_size == teacher.vocab_size > text_files(str(book), **size).vocab_size
    assert tokens_of(student, "ood") == tokens_of(general, "test")
    assert student.words("ood") == general.words("test")
    assert sum(len(batch.example_id) for batch in student.ood_dataloader()) == student.counts["ood"]
    alone = text_files(str(book), **size, tokenizer=student.tokenizer)
    assert tokens_of(teacher, "train") == tokens_of(alone, "train") + tokens_of(general, "train")
    assert teacher.name == "book + wikitext-2" and teacher.words("train") is None
    assert student.fingerprint != alone.fingerprint


def test_the_config_can_name_another_data_set(book, wiki):
    outside = {"_target_": "kdlab.data.wikitext", "root": str(wiki), "name": "wikitext-2"}
    mapping = {"_target_": "kdlab.data.text_files", "path": str(book), "ood": outside, "context": 16}
    builder.check(mapping, "data", slot="data")
    data = builder.build(mapping, "data", slot="data")
    assert data.context == 16 and data.counts["ood"] > 0
    with pytest.raises(UserError, match=r"data\.contxt: unknown"):
        builder.check({**mapping, "contxt": 3}, "data", slot="data")
    with pytest.raises(UserError, match=r"data\.ood: int; accepted: a data set of text"):
        text_files(str(book), ood=3)


def test_a_tokenizer_can_be_made_of_further_files(book, tmp_path):
    (tmp_path / "more.txt").write_text("\u00e9\u00fc")
    data = text_files(str(book), tokenizer_from=str(tmp_path / "more.txt"))
    assert data.tokenizer.decode(data.tokenizer.encode("\u00e9\u00fc")) == "\u00e9\u00fc"
    with pytest.raises(UserError, match=r"data\.tokenizer_from: nothing\.txt: no such file"):
        text_files(str(book), tokenizer_from=["nothing.txt"])


def test_bpe_learns_from_training_text_alone(tmp_path):
    (tmp_path / "a.txt").write_text("abcd " * 50 + "wxyz " * 50)
    data = text_files(str(tmp_path / "a.txt"), val=0, test=250, tokenizer="bpe", vocab=264, batch_size=2)
    known = data.tokenizer.vocabulary()
    assert "abcd" in known and "wxyz" not in known
    assert tokens_of(data, "test") == ("wxyz " * 50)[1:]


def test_unlike_tokenizers_are_refused(book):
    data = text_files(str(book))
    with pytest.raises(UserError, match=r"teacher\.data: its tokenizer \(257 tokens\) is not that of data \(2\d tok"):
        data.check_same_classes(text_files(str(book), tokenizer="bytes"))
    data.check_same_classes(text_files(str(book), val=0, context=7))


# ---- the module


def test_long_sequences_are_refused_or_left_out(caplog):
    with pytest.raises(
        UserError, match=r"data\.context: 5; 2 of 4 train sequences of made are longer; accepted: at le"
    ):
        made(asked(4, 7, 6, 9), context=5)
    with caplog.at_level(logging.WARNING):
        data = made(asked(4, 7, 6, 9), context=5, drop_long=True)
    assert data.counts["train"] == 2 and "2 of 4 training sequences are longer" in caplog.text
    assert [question.answer for question in data.questions("train")] == ["4", "6"]
    with pytest.raises(UserError, match=r"1 of 1 test sequences of made are longer; accepted: at least 3$"):
        made(asked(3), context=2, drop_long=True)


def test_a_fraction_is_a_choice_by_the_split_seed():
    whole = made(asked(*range(3, 43)), context=64)
    data = [made(asked(*range(3, 43)), context=64, fraction=0.25, split_seed=seed) for seed in (0, 0, 1)]
    assert [one.counts["train"] for one in data] == [10] * 3 and data[0].counts["test"] == 1
    assert data[0].fingerprint == data[1].fingerprint != data[2].fingerprint != whole.fingerprint
    lengths = [one.loss_mask.sum(1) for one in data[0].ordered_loader("train")]
    assert all((row == 1).all() for row in lengths)
    shown = [len(row) for batch in data[0].ordered_loader("train", batch_size=1) for row in batch.inputs["input_ids"]]
    assert [question.answer for question in data[0].questions("train")] == [str(length + 1) for length in shown]


def test_sequences_where_nothing_counts_are_left_out():
    silent = Sequence.of([([1, 2, 3], PROMPT)])
    assert made([silent, *asked(3, 4), silent]).counts["train"] == 2
    assert made([silent, *asked(3)], segment_weights={"prompt": 0.1}).counts["train"] == 2
    with pytest.raises(UserError, match=r"no token of made \(train\) counts"):
        made([silent])
    for weights, said in [
        ({"anwser": 1}, r"data\.segment_weights: unknown segment 'anwser'; nearest: answer"),
        ({"answer": -1}, r"data\.segment_weights\.answer: -1; accepted: a number from 0 on"),
        ({"text": 0, "answer": 0, "reasoning": 0}, r"data\.segment_weights: all are 0"),
    ]:
        with pytest.raises(UserError, match=said):
            made(asked(3), segment_weights=weights)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"context": 0}, r"data\.context: 0; accepted: a whole number, at least 1"),
        ({"batch_size": 1.5}, r"data\.batch_size: 1\.5"),
        ({"eval_stride": 129}, r"data\.eval_stride: 129; accepted: 1\.\.128"),
        ({"fraction": 0}, r"data\.fraction: 0; accepted: above 0, up to 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, said):
    with pytest.raises(UserError, match=said):
        made(asked(3), **options)


def test_sequences_that_make_no_sense_are_refused():
    for train, said in [
        ([], r"data: made \(train\) has no sequences"),
        ([Sequence(torch.tensor([1, 257]), torch.tensor([0, 1]))], r"has token ids 1\.\.257; accepted: 0\.\.256"),
        ([Sequence(torch.tensor([1, 2]), torch.tensor([0]))], "sequence 0 has 2 tokens and 1 segments"),
        ([*asked(3), Sequence.of([([1], 0)], source=torch.tensor([1]))], "sequence 1 has an encoder input, unlike"),
    ]:
        with pytest.raises(UserError, match=said):
            made(train)


def test_the_fingerprint_is_of_the_content():
    base = made(asked(3, 4))
    assert base.fingerprint == made(asked(3, 4), batch_size=2, seed=5, pack=True).fingerprint
    others = [
        made(asked(3, 5)),
        made(asked(4, 3)),
        made(asked(3, 4), segment_weights={"answer": 2}),
        TextData(RawText("made", Tokenizer.bytes(), {"train": asked(3, 4), "test": asked(4)})),
        TextData(
            RawText("made", Tokenizer.bpe(["ab"], 257), {"train": asked(3, 4), "val": asked(3), "test": asked(4)})
        ),
    ]
    assert len({base.fingerprint, *(other.fingerprint for other in others)}) == len(others) + 1


def test_what_networks_and_run_folders_are_told(book, tmp_path):
    data = text_files(str(book), context=16)
    offers = {"vocab_size": data.tokenizer.size, "context": 16, "eos_id": data.tokenizer.eos_id}
    assert data.network_kwargs == {**offers, "pad_id": data.tokenizer.pad_id}
    assert data.inference_metadata(tmp_path / "run") == {"tokenizer": "tokenizer.json", **data.network_kwargs}
    assert Tokenizer.load(tmp_path / "run").fingerprint == data.tokenizer.fingerprint
    assert (data.views, data.uncacheable_reason, data.target, data.kind) == (1, None, "next_token", "text")


def test_questions_know_what_is_right():
    data = made(asked(3, 4))
    question = data.questions("test")[0]
    assert data.right(question, " 4\n") and not data.right(question, "3")
    assert [one.answer for one in data.questions("train")] == ["3", "4"] and data.words("test") is None


def test_splits_and_views_that_are_not_there_are_refused():
    data = made(asked(3, 4))
    for arguments, said in [
        (("tset",), "split: unknown split 'tset'; nearest: test"),
        (("ood",), "split: ood; made has no ood sequences here"),
        (("train", 1), "view: 1; accepted: 0"),
    ]:
        with pytest.raises(UserError, match=said):
            data.ordered_loader(*arguments)
    with pytest.raises(UserError, match="unknown split"):
        data.questions("tset")


# ---- configs

FILES = CONF / "data"
SET_BY_DATA = {"tokenizer", "vocab", "context", "batch_size", "eval_batch_size", "ood", "mix", "segment_weights"}


@pytest.mark.parametrize("path", sorted(FILES.glob("*.yaml")), ids=lambda path: path.stem)
def test_config_of_text_names_the_arguments_with_their_defaults(path):
    config = yaml.safe_load(path.read_text())
    target = config.pop("_target_", "kdlab.data.ImageData")
    known = builder.signature(target)
    if "tokenizer" not in known.parameters or "defaults" in config:
        return
    assert path.read_text().startswith("# ") and not known.open
    assert set(known.parameters) - {"pack", "eval_stride"} <= set(config) <= set(known.parameters)
    found = [*inspect.signature(TextData).parameters.values(), *inspect.signature(text_data).parameters.values()]
    for parameter in found:
        if parameter.default is not parameter.empty and parameter.name in set(config) - SET_BY_DATA:
            assert config[parameter.name] == parameter.default, parameter.name


def test_common_arguments_are_those_of_text_data():
    mine, theirs = builder.signature("kdlab.data.text.build.TextCommon"), builder.signature("kdlab.data.text_data")
    own = {"read", "texts", "alphabet"}
    types = {name: ast.unparse(p.annotation) for name, p in theirs.parameters.items() if name not in own}
    assert {name: ast.unparse(p.annotation) for name, p in mine.parameters.items()} == types
