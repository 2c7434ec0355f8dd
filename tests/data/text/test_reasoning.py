"""SVAMP, CommonsenseQA and GSM8K as published, from small files with their layout."""

import json

import pytest

from kdlab.data.text.datasets.reasoning import cqa, gsm8k, svamp
from kdlab.data.text.sequence import ANSWER, REASONING
from kdlab.errors import UserError


def put(folder, name, rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def sum_row(i, said=None, reasoning=None):
    right = f"({i} + 2)"
    return {
        "question": f"Ann has {i} and gets 2. How many?",
        "answer": f"( {i}.0 + 2.0 )",
        "teacher_reasoning": reasoning or f"She has {i} + 2 = {i + 2}.",
        "teacher_answer": right if said is None else said,
    }


@pytest.fixture
def sums(tmp_path):
    """Six right rows, two wrong ones (one by a reasoning that comes to something else), one without an answer."""
    odd = [sum_row(20, "(20 * 2)", "So 20 * 2 = 40."), sum_row(21, "(21 - 2)"), sum_row(22) | {"teacher_answer": None}]
    put(tmp_path / "reasoning", "svamp_train.jsonl", [*(sum_row(i) for i in range(6)), *odd])
    put(tmp_path / "reasoning", "svamp_test.jsonl", [sum_row(30), sum_row(31) | {"teacher_reasoning": None}])
    return str(tmp_path)


@pytest.fixture
def choices(tmp_path):
    def row(i, said="bank", reasoning="It must be a place for money. Of the above choices, only bank is one."):
        return {
            "question": f"Where is money {i}?",
            "choices": ["bank", "river", "bed"],
            "answer": "bank",
            "teacher_reasoning": reasoning,
            "teacher_answer": said,
        }

    rows = [row(0), row(1), row(2, "river"), row(3, "river", "It must be wet. Only the river is wet."), row(4, None)]
    put(tmp_path, "cqa_train.jsonl", rows)
    put(tmp_path, "cqa_test.jsonl", [row(9)])
    return str(tmp_path)


def spoken(data, split="train"):
    """(prompt, reasoning, answer) of every sequence, as text."""
    return [
        tuple(data.tokenizer.decode(one.ids[one.segments == part].tolist()) for part in (0, REASONING, ANSWER))
        for one in data.source(data.tokenizer).splits[split]
    ]


@pytest.mark.parametrize(("keep", "count"), [("all", 8), ("right", 6), ("agreeing", 7)])
def test_svamp_keeps_what_is_wanted(sums, keep, count, caplog):
    caplog.set_level("INFO", "kdlab")
    data = svamp(sums, keep=keep, val=0, tokenizer="bytes")
    assert data.counts["train"] == count and data.counts["test"] == 2
    assert (f"{count} of 9 kept ({keep})" in caplog.text) == (keep != "all")


def test_svamp_forms_and_labels(sums):
    gold = spoken(svamp(sums, val=0, tokenizer="bytes"))
    taught = spoken(svamp(sums, val=0, tokenizer="bytes", labels="teacher"))
    question = "Q: Ann has 20 and gets 2. How many?\nA:"
    assert gold[6] == (question, " So 20 * 2 = 40.", "\n#### ( 20.0 + 2.0 )")
    assert taught[6] == (question, " So 20 * 2 = 40.", "\n#### (20 * 2)")
    lenient = {"val": 0, "tokenizer": "bytes", "complete": False}
    assert len(spoken(svamp(sums, form="answer", **lenient))) == 9
    assert len(spoken(svamp(sums, form="answer", labels="teacher", **lenient))) == 8
    both = svamp(sums, form="both", rationale_weight=0.5, **lenient)
    assert len(spoken(both)) == 8 * 2 + 1
    assert sorted({one.weight for one in both.source(both.tokenizer).splits["train"]}) == [0.5, 1.0]
    assert both.questions("test")[0].prompt.tolist() == both.tokenizer.encode(
        "[label] Q: Ann has 30 and gets 2. How many?\nA:"
    )


@pytest.mark.parametrize("load", [svamp, cqa])
def test_forms_learn_the_same_questions_with_the_same_tokens(load, sums, choices, caplog):
    caplog.set_level("INFO", "kdlab")
    root, there = (sums, 9) if load is svamp else (choices, 5)
    data = {form: load(root, form=form, val=0) for form in ("steps", "answer", "both")}
    asked = {form: [prompt.partition("Q: ")[2] for prompt, *_ in spoken(one)] for form, one in data.items()}
    assert len(asked["steps"]) == there - 1 and asked["answer"] == asked["steps"]
    assert asked["both"][::2] == asked["both"][1::2] == asked["steps"]
    said = f"{load.__name__}: {there - 1} of {there} training examples have reasoning and answer, and are learned"
    assert caplog.text.count(said) == 3
    assert f"{2 * (there - 1)} sequences of {there - 1} examples; twice data.batch_size" in caplog.text
    for tokenizer in ("bpe", "characters", "bytes"):
        steps = load(root, val=0, tokenizer=tokenizer)
        for form in ("answer", "both"):
            steps.check_same_classes(load(root, form=form, val=0, tokenizer=tokenizer))


def test_what_is_incomplete_is_learned_on_demand(sums, caplog):
    caplog.set_level("INFO", "kdlab")
    data = [svamp(sums, form=form, val=0, complete=False, labels="teacher") for form in ("answer", "steps", "both")]
    assert [one.counts["train"] for one in data] == [8, 8, 16]
    assert len({one.tokenizer.fingerprint for one in data}) == 1
    assert "8 of 9 training examples have an answer, and are learned" in caplog.text
    with pytest.raises(UserError, match=r"data.complete: 1; accepted: true or false"):
        svamp(sums, complete=1)


def test_svamp_answers_are_judged_by_value(sums):
    data = svamp(sums, val=3, tokenizer="bytes")
    assert data.counts["val"] == 3
    question = data.questions("test")[0]
    assert (question.answer, question.group) == ("( 30.0 + 2.0 )", "1")
    assert data.right(question, "x\n#### (2 + 30)") and data.right(question, "#### 32<|endoftext|>")
    assert not any(data.right(question, text) for text in ("32", "#### 33", "#### 32 / 0", "#### thirty", ""))
    # a question whose teacher gave no reasoning is asked all the same
    assert spoken(data, "test")[1][1:] == ("", " #### ( 31.0 + 2.0 )")


def test_validation_is_drawn_once_and_never_filtered(sums):
    asked = [
        [q.text for q in svamp(sums, val=3, keep=keep, tokenizer="bytes").questions("val")] for keep in ("all", "right")
    ]
    assert asked[0] == asked[1]
    train = {prompt for prompt, *_ in spoken(svamp(sums, val=3, tokenizer="bytes"))}
    assert not any(text in prompt for text in asked[0] for prompt in train)


@pytest.mark.parametrize(("keep", "count"), [("all", 4), ("right", 2), ("agreeing", 3)])
def test_cqa(choices, keep, count):
    data = cqa(choices, keep=keep, val=0, tokenizer="bytes")
    assert data.counts["train"] == count
    assert spoken(data)[0][0] == "Q: Where is money 0?\nChoices: (a) bank (b) river (c) bed\nA:"
    (question,) = data.questions("test")
    assert all(data.right(question, f"hm\n#### {text}") for text in ("Bank.", "(a)", "a.", "(a) bank"))
    wrong = ("river", "bank or bed", "the bank", "not a bank", "a: it is wet", "(b) bank", "(b)", "abc")
    assert not any(data.right(question, f"#### {text}") for text in wrong)


@pytest.fixture
def worked(tmp_path):
    row = {"question": "Two and 4?", "answer": "It is 2+4 = $<<2+4=6>>6.\nTwice is <<6*200=1200>>1200.\n#### 1,200"}
    put(tmp_path, "train.jsonl", [row | {"question": f"{i}"} for i in range(10)])
    put(tmp_path, "test.jsonl", [row])
    return str(tmp_path)


def test_gsm8k(worked):
    data = gsm8k(worked, val=2, tokenizer="bytes")
    assert {split: data.counts[split] for split in ("train", "val", "test")} == {"train": 8, "val": 2, "test": 1}
    assert spoken(data)[0][1:] == (" It is 2+4 = $6.\nTwice is 1200.", "\n#### 1,200")
    assert "<<2+4=6>>" in spoken(gsm8k(worked, calculator=True, tokenizer="bytes"))[0][1]
    (question,) = data.questions("test")
    assert question.group == "2" and data.right(question, "#### $1200.00") and not data.right(question, "#### 12")


def test_defaults_have_room(worked):
    data = gsm8k(worked)
    assert data.context == 512 and 257 <= data.vocab_size <= 4000


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"answer": None}, r"svamp_train.jsonl, line 1: key 'answer' is None; accepted: text"),
        ({"teacher_answer": {}}, r"line 1: key 'teacher_answer' is a dict; accepted: text, or null"),
        ({"question": 3.5}, None),
    ],
)
def test_bad_rows_are_named(tmp_path, change, said):
    for split in ("train", "test"):
        put(tmp_path, f"svamp_{split}.jsonl", [sum_row(1) | change, sum_row(2)])
    if said is None:
        assert svamp(str(tmp_path), val=0, tokenizer="bytes").counts["train"] == 2
        return
    with pytest.raises(UserError, match=said):
        svamp(str(tmp_path), val=0)


def test_mistakes_are_named(tmp_path, sums, choices, worked):
    with pytest.raises(UserError, match=r"data.root: no svamp_train.jsonl in .*nowhere"):
        svamp(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"data.labels: unknown choice 'golden'; nearest: gold"):
        svamp(sums, labels="golden")
    with pytest.raises(UserError, match=r"data.keep: unknown choice 'some'"):
        cqa(choices, keep="some")
    with pytest.raises(UserError, match=r"data.calculator: 1; accepted"):
        gsm8k(worked, calculator=1)
    put(tmp_path, "cqa_test.jsonl", [{"question": "q", "answer": "a", "choices": ["b", "c"]}])
    with pytest.raises(UserError, match=r"cqa_test.jsonl, line 1, key 'answer': unknown choice 'a'; .*accepted: b, c"):
        cqa(choices)
    put(tmp_path, "test.jsonl", [{"question": "q", "answer": "42"}])
    with pytest.raises(UserError, match=r"test.jsonl, line 1: key 'answer' has no number after '####'"):
        gsm8k(worked)
