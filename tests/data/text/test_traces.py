"""Traces: reading, writing and filtering them, comparing answers, and what becomes of them as sequences."""

import json
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdlab.data.text import answers, templates
from kdlab.data.text.datasets.traces import (
    Trace,
    agreeing_ones,
    append_traces,
    read_traces,
    right_ones,
    select,
    traces,
    write_traces,
)
from kdlab.data.text.sequence import ANSWER, PROMPT, REASONING, Question
from kdlab.data.text.templates import Example, Right, Template, learnable, sequences
from kdlab.data.text.tokenizer import Tokenizer
from kdlab.errors import UserError

ONE = Trace("1+1?", "one and one is two", "2", teacher="t", gold="2", group="1", extra={"cost": 3})
TALK = Trace(
    "system: Be brief.\nuser: Hi?",
    None,
    "Ho.",
    messages=({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi?"}),
)


def written(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ---- files


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "t.jsonl"
    odd = Trace("ü {question}\u2028\n", "", None, correct=False)
    write_traces(path, [ONE, TALK])
    append_traces(path, [odd, ONE])
    assert read_traces(path) == [ONE, TALK, odd, ONE]
    assert len(path.read_bytes().splitlines()) >= 4 and path.read_bytes().count(b"\n") == 4
    append_traces(tmp_path / "new.jsonl", [TALK])
    assert read_traces(tmp_path / "new.jsonl") == [TALK]


def test_a_kill_costs_the_last_line_at_most(tmp_path):
    path = tmp_path / "t.jsonl"
    write_traces(path, [ONE, TALK, Trace("x" * 100_000, None, "y")])
    whole = path.read_bytes()
    complete = [len(ONE.line()), len(ONE.line()) + len(TALK.line()), len(whole)]
    for size in (0, 5, complete[0] - 2, complete[0], complete[0] + 1, complete[1], len(whole) - 40_000, len(whole) - 3):
        path.write_bytes(whole[:size])
        survived = sum(size >= end for end in complete)
        assert len(read_traces(path, torn=True)) == survived
        append_traces(path, [TALK])
        assert read_traces(path) == [*[ONE, TALK][:survived], TALK]
    path.write_bytes(whole[: complete[0] + 4])
    with pytest.raises(UserError, match="line 2 is cut off"):
        read_traces(path)
    path.write_bytes(whole[:-1])  # whole but for the line break
    append_traces(path, [ONE])
    assert len(read_traces(path)) == 4


def test_a_conversation_that_ends_in_its_answer(tmp_path):
    talk = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Ho."}]
    (trace,) = read_traces(written(tmp_path / "t.jsonl", {"messages": talk}))
    assert (trace.question, trace.answer) == ("Hi?", "Ho.")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2 is no JSON"),
        ("[1]", "line 2 is a list; accepted: a JSON object"),
        ("[" * 100_000 + "\n", "line 2 is no JSON"),
        ('{"answer": "2"}', "line 2: key 'question' is missing .there are answer.; accepted: text"),
        ('{"question": " "}', "line 2: key 'question' is ' '; accepted: text"),
        ('{"question": "a", "reasoning": ["b"]}', "line 2: key 'reasoning' is a list; accepted: text, or null"),
        ('{"question": "a", "answer": true}', "line 2: key 'answer' is a bool"),
        ('{"question": "a", "correct": "yes"}', "line 2: key 'correct' is 'yes'; accepted: true, false"),
        ('{"messages": []}', "line 2: key 'messages' is no conversation"),
        ('{"messages": [{"role": "user"}]}', "line 2: key 'messages' is no conversation"),
        ('{"question": "a", "messages": [{"role": "user", "content": "a"}]}', "exclude each other"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, said):
    path = tmp_path / "t.jsonl"
    path.write_text('{"question": "fine"}\n' + line + "\n")
    with pytest.raises(UserError, match=said) as caught:
        read_traces(path)
    assert str(caught.value).startswith(f"data.path: {path}, line 2")


def test_bad_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"data.path: cannot read .*nowhere"):
        read_traces(tmp_path / "nowhere")
    path = tmp_path / "t.jsonl"
    path.write_text("\n\n")
    with pytest.raises(UserError, match="is empty"):
        read_traces(path)
    path.write_bytes(b'{"question": "\xff"}\n')
    with pytest.raises(UserError, match="line 1 is no JSON"):
        read_traces(path)


def test_keys_that_look_like_slips_are_named_once(tmp_path, caplog):
    path = tmp_path / "t.jsonl"
    row = {"question": "q", "reasoning": "r", "anwser": "1", "choices": ["a", "b"], "teacher": "t", "Gold": "2"}
    path.write_text((json.dumps(row) + "\n") * 3 + json.dumps({"question": "q", "answer": "1", "answers": []}) + "\n")
    found = read_traces(path)
    assert found[0].answer is None and found[0].extra["anwser"] == "1"
    said = [line for line in caplog.messages if "is kept" in line]
    assert [line.rpartition(": ")[2] for line in said] == [
        "key 'Gold' is kept, and not read as 'gold'", "key 'anwser' is kept, and not read as 'answer'"
    ]  # fmt: skip
    assert all("t.jsonl, line 1: " in line for line in said)


# ---- answers


@given(st.recursive(st.integers(0, 99).map(str), lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner).map(
    lambda parts: f"( {parts[0]} {parts[1]} {parts[2]} )"), max_leaves=8))  # fmt: skip
def test_expressions_come_to_what_python_says(expression):
    exact = " ".join(f"Fraction({part})" if part.isdigit() else part for part in expression.split())
    try:
        expected = Fraction(eval(exact))  # digits, signs and parentheses of our own
    except ZeroDivisionError:
        expected = None
    assert answers.value(expression) == (expected if len(expression) <= 200 else None)


@given(st.text() | st.text("0123456789+-*/(). ,_eEx"))
def test_nothing_that_is_generated_raises(text):
    answers.value(text)
    answers.number(text)
    answers.steps(text)
    answers.operations(text)
    answers.choice(text, ["park", "(a) b", ""])
    answers.named(text, ["park", "(a) b", ""])
    answers.extract(text)
    assert not answers.same_value(text, "1 / 0")


@pytest.mark.parametrize(
    "text",
    ["9**9**9", "1<<9", "10//3", "(" * 150, "1e9", "abs(1)", "4 5", "5(3)", "", "x", "-" * 999 + "1", "1_0", "7%4"],
)
def test_what_is_no_arithmetic_has_no_value(text):
    assert answers.value(text) is None


def test_answers_that_are_the_same():
    assert answers.same_value("(1,200 ÷ 2).", "( 600.0 * 1.0 )") and answers.same_value("0.3333333", "( 1.0 / 3.0 )")
    assert not answers.same_value("0.33", "( 1.0 / 3.0 )")
    assert answers.same_number("$1,000.0 in all", "1000") and not answers.same_number("1000", "none")
    assert (
        answers.number("82-19") == 19 and answers.number("is -26.") == -26 and answers.number("a .5") == Fraction(1, 2)
    )
    assert answers.same_text(" The\nBank.", "the bank") and not answers.same_text("bank", "the bank")


def test_choices():
    options = ["park", "coloring book", "book", "gravity"]
    given = ("b", "(d)", "D.", "[c]", "Book!", "(b) Coloring  Book", "D: gravity.", "a) park")
    expected = ["coloring book", "gravity", "gravity", "book", "book", "coloring book", "gravity", "park"]
    assert [answers.choice(text, options) for text in given] == expected
    unclear = ("e", "z", "c: whatever", "(c) park", "the park", "a park", "a book", "it is not gravity", "b or c", "")
    assert not any(answers.choice(text, options) for text in unclear)
    sentences = ("only gravity does it.", "a park", "a book, or gravity", "c", "nothing")
    assert [answers.named(text, options) for text in sentences] == ["gravity", "park", None, "book", None]
    judge = Right(answers.Choices({"q": ("bridge", "beach", "bridge")}))
    asked = Question(prompt=None, answer="bridge", text="q")
    assert judge(asked, "#### (c)") and judge(asked, "hm #### Bridge") and not judge(asked, "#### b")
    assert not judge(asked, "bridge")  # without the marker there is no answer


def test_the_last_answer_counts():
    assert answers.extract("a #### 1 \n#### 2\nmore") == "2"
    assert answers.extract("a #### 1<|endoftext|> #### 2") == "1"
    assert answers.extract("nothing") is answers.extract("####") is answers.extract("#### \n ") is None


def test_steps():
    assert answers.steps("a = <<48/2=24>>24\nb = 3") == 2 and answers.steps("One. Two! 3.5 three") == 3
    assert answers.operations("( ( -4.0 - 8.0 ) + -5.0 )") == 2


# ---- sequences

TOKENIZER = Tokenizer.bytes()
EXAMPLE = Example("1+1 {question}", "one, two", "2", "II", "g")


def pieces(sequence):
    """The text of each segment of a sequence."""
    return [
        TOKENIZER.decode(sequence.ids[sequence.segments == segment].tolist(), special=True)
        for segment in (PROMPT, REASONING, ANSWER)
    ]


def test_forms():
    (steps,) = sequences([EXAMPLE], TOKENIZER, "steps")
    assert pieces(steps) == ["Q: 1+1 {question}\nA:", " one, two", "\n#### 2<|endoftext|>"]
    (answer,) = sequences([EXAMPLE], TOKENIZER, "answer")
    assert pieces(answer) == ["Q: 1+1 {question}\nA:", "", " #### 2<|endoftext|>"]
    label, rationale = sequences([EXAMPLE], TOKENIZER, "both", rationale_weight=0.3)
    assert pieces(label) == ["[label] Q: 1+1 {question}\nA:", "", " #### 2<|endoftext|>"]
    assert pieces(rationale) == ["[rationale] Q: 1+1 {question}\nA:", " one, two<|endoftext|>", ""]
    assert (label.weight, rationale.weight, steps.weight, steps.question) == (1.0, 0.3, 1.0, None)


@pytest.mark.parametrize("form", templates.FORMS)
def test_a_question_is_asked_as_it_was_answered(form):
    asked, *others = sequences([EXAMPLE], TOKENIZER, form, ask=True)
    question = asked.question
    assert (question.answer, question.group, question.text) == ("II", "g", EXAMPLE.question)
    assert asked.ids[asked.segments == PROMPT].equal(question.prompt)
    assert all(other.question is None for other in others)
    written = TOKENIZER.decode(asked.ids[len(question.prompt) :].tolist(), special=True)
    assert answers.extract(written) == "2"


def test_what_is_not_there_is_not_learned():
    bare, thought, empty = Example("q", None, "2"), Example("q", "r", None), Example("q")
    able = {form: [learnable(one, form) for one in (EXAMPLE, bare, thought, empty)] for form in templates.FORMS}
    assert able == {"steps": [1, 0, 0, 0], "answer": [1, 1, 0, 0], "both": [1, 1, 1, 0]}
    for form, expected in able.items():
        made = [len(sequences([one], TOKENIZER, form)) for one in (EXAMPLE, bare, thought, empty)]
        assert [count > 0 for count in made] == [bool(one) for one in expected]
    (asked,) = sequences([bare, empty], TOKENIZER, "steps", ask=True)  # a question without an answer cannot be judged
    assert pieces(asked)[1:] == ["", " #### 2<|endoftext|>"]


def test_segments_stay_apart_for_merged_tokens():
    merged = Tokenizer.bpe(templates.texts([EXAMPLE] * 3, "steps"), 300)
    (made,) = sequences([EXAMPLE], merged, "steps", template=Template())
    assert merged.decode(made.ids[made.segments == REASONING].tolist()) == " one, two"


# ---- filters


def said(*given, question="q", **more):
    return [Trace(question, f"r{i}", answer, **more) for i, answer in enumerate(given)]


def test_right_ones():
    assert [t.reasoning for t in right_ones(said("2", "3", None, " 2.", gold="2"))] == ["r0", "r3"]
    assert (
        right_ones([Trace("q", None, "5", correct=True, gold="2"), Trace("q", None, "2", correct=False, gold="2")])[
            0
        ].answer
        == "5"
    )
    with pytest.raises(UserError, match="neither 'correct' nor 'gold'"):
        right_ones(said("2"))


def test_agreeing_ones():
    rows = [*said("2", "3", "2.0", None), *said("1", question="alone"), *said("1", "2", question="split")]
    assert [t.reasoning for t in agreeing_ones(rows, answers.same_number)] == ["r0", "r2"]
    assert not agreeing_ones(rows, answers.same_number, agree=0.6)
    assert agreeing_ones(rows[::-1], answers.same_number) == [rows[2], rows[0]]
    tied = said("1", "2", "2", "1")
    assert [t.answer for t in agreeing_ones(tied)] == ["1", "1"]


def test_how_many_are_kept_is_logged(caplog):
    caplog.set_level("INFO", "kdlab")
    assert len(select(said("2", "3", gold="2"), "right")) == 1
    assert "1 of 2 kept (right), 50.0 %" in caplog.text
    with pytest.raises(UserError, match=r"data.keep: right; none of 1"):
        select(said("3", gold="2"), "right")
    with pytest.raises(UserError, match="nearest: right"):
        select([], "rigt")
    with pytest.raises(UserError, match=r"data.agree: 0; accepted"):
        select([], "agreeing", agree=0)


# ---- the data set


def many(path, n=20, each=3):
    rows = [
        {"question": f"q{i:02}", "reasoning": f"r{j}", "answer": str(i + (j == 0)), "gold": str(i)}
        for j in range(each)
        for i in range(n)
    ]
    return str(written(path, *rows))


def test_questions_are_in_one_split_only(tmp_path):
    path = many(tmp_path / "t.jsonl")
    data = traces(path, test=0.25, val=3, keep="right", compare="number", context=64)
    assert data.counts["val"] == 3 and data.counts["test"] == 5 and data.counts["train"] == 2 * 12
    asked = {split: {q.text for q in data.questions(split)} for split in ("val", "test")}
    assert not asked["val"] & asked["test"]
    question = data.questions("test")[0]
    assert question.answer == str(int(question.text[1:]))
    assert data.right(question, f"so #### {question.answer}") and not data.right(question, question.answer)
    again = traces(path, test=0.25, val=3, keep="all", form="both", context=64)
    assert {q.text for q in again.questions("val")} == asked["val"] and again.counts["train"] == 2 * 3 * 12
    other = traces(path, test=0.25, val=3, context=64, split_seed=1)
    assert {q.text for q in other.questions("test")} != asked["test"]


@pytest.mark.parametrize("keep", ["all", "right"])
def test_questions_of_the_test_file_are_not_learned(tmp_path, keep, caplog):
    caplog.set_level("INFO", "kdlab")
    path = many(tmp_path / "t.jsonl")
    other = [{"question": f" q{i:02}\n" if i % 2 else f"q{i:02}", "answer": str(i)} for i in range(15, 25)]
    test = str(written(tmp_path / "test.jsonl", *other))
    data = traces(path, test_path=test, val=5, keep=keep, compare="number", context=64)
    held = {split: {q.text.strip() for q in data.questions(split)} for split in ("val", "test")}
    sequences = data.source(data.tokenizer).splits["train"]
    train = {data.tokenizer.decode(one.ids[one.segments == PROMPT].tolist())[3:6] for one in sequences}
    assert held["test"] == {f"q{i}" for i in range(15, 25)} and len(held["val"]) == 5 and len(train) == 10
    assert train | held["val"] == {f"q{i:02}" for i in range(15)}
    assert caplog.text.count("15 of 60 rows left out of training: the test split asks their questions") == 1
    with pytest.raises(UserError, match=r"data.path: 60 rows, and none is left to train on without .* the test split"):
        traces(path, test_path=path, context=64)


def test_one_question_spaced_differently_is_in_one_split_only(tmp_path):
    rows = [{"question": f"a{' ' * (1 + j)}{i}", "reasoning": "r", "answer": "x"} for i in range(9) for j in range(2)]
    data = traces(str(written(tmp_path / "t.jsonl", *rows)), test=4, val=3, context=64)
    sequences = data.source(data.tokenizer).splits["train"]
    train = {data.tokenizer.decode(one.ids[one.segments == PROMPT].tolist())[3:-3] for one in sequences}
    asked = [q.text for split in ("val", "test") for q in data.questions(split)]
    assert train and not {" ".join(text.split()) for text in train} & {" ".join(text.split()) for text in asked}


def test_traces_without_reasoning(tmp_path):
    rows = [{"question": f"q{i}", "answer": "x", **({"reasoning": "r"} if i % 2 else {})} for i in range(20)]
    path = str(written(tmp_path / "t.jsonl", *rows))
    options = {"test": 2, "val": 0, "context": 64}
    counts = [
        [traces(path, form=form, complete=complete, **options).counts["train"] for form in templates.FORMS]
        for complete in (True, False)
    ]
    (steps, answer, both), (again, lenient, all_of) = counts
    assert steps == answer == again == both / 2 and lenient == 18 and all_of == 18 + steps
    bare = str(written(tmp_path / "bare.jsonl", *({"question": f"q{i}", "answer": "x"} for i in range(20))))
    with pytest.raises(UserError, match=r"data.form: answer; none of 18 .* data.complete=false"):
        traces(bare, form="answer", **options)
    assert traces(bare, form="answer", complete=False, **options).counts["train"] == 18


def test_forms_have_the_same_tokens(tmp_path):
    path = many(tmp_path / "t.jsonl")
    for tokenizer in ("characters", "bpe"):
        steps = traces(path, context=64, tokenizer=tokenizer)
        for form in ("answer", "both"):
            steps.check_same_classes(traces(path, form=form, context=64, tokenizer=tokenizer))


def test_the_longest_answer_counts_its_reasoning(tmp_path):
    path = many(tmp_path / "t.jsonl")
    # " r0" "\n#### 12" and the end of text; a rationale alone ends in no answer
    found = {form: traces(path, form=form, context=64, tokenizer="bytes", val=0).longest() for form in templates.FORMS}
    assert found == {"steps": 3 + 8 + 1, "answer": 8 + 1, "both": 8 + 1}
    data = traces(path, context=64, tokenizer="bytes", val=0)
    assert data.longest("test") == max(len(one) - 7 - 2 for one in data.source(data.tokenizer).splits["test"])
    assert data.longest("val") is data.longest("ood") is None
    with pytest.raises(UserError, match="unknown split"):
        data.longest("tset")


def test_segments_weigh_as_told(tmp_path):
    path = many(tmp_path / "t.jsonl", each=1)
    data = traces(path, test=1, val=0, context=64, segment_weights={"reasoning": 0.5})
    assert "val" not in data.counts or not data.counts["val"]
    batch = next(iter(data.train_dataloader()))
    assert set(batch.segment.tolist()) == {REASONING, ANSWER}
    assert set(batch.weight[batch.segment == REASONING].tolist()) == {0.5}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "step"}, "data.form: unknown form 'step'; nearest: steps"),
        ({"compare": "x"}, "data.compare: unknown comparison 'x'"),
        ({"val": 99}, "data.val: 99; there are 18 rows"),
        ({"rationale_weight": -1}, "data.rationale_weight: -1; accepted"),
        ({"keep": "agreeing"}, "data.keep: agreeing; none of"),
        ({"path": None}, "data.path: null"),
    ],
)
def test_options_that_make_no_sense(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        traces(**{"path": many(tmp_path / "t.jsonl", each=1), "val": 0} | options)


def test_nothing_to_learn(tmp_path):
    path = written(tmp_path / "t.jsonl", *({"question": str(i), "answer": "a"} for i in range(10)))
    with pytest.raises(UserError, match=r"data.form: steps; none of 8 training examples"):
        traces(str(path), test=1, val=1)
