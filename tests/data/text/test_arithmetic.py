"""Generated sums: right by an independent check, balanced, never twice, and a function of their seed and place."""

import re
from collections import Counter

import pytest

from kdlab.data.text.datasets.arithmetic import arithmetic, chain
from kdlab.data.text.sequence import ANSWER, REASONING
from kdlab.errors import UserError

SMALL = {"train": 60, "val": 10, "test": 20}


def check(question, reasoning, answer):
    """By Python's own arithmetic: the question comes to the answer, and every step is true and follows."""
    assert re.fullmatch(r"[0-9+\-*()]+", question)
    assert eval(question) == int(answer)
    written = [step.split("=") for step in reasoning.split(";")]
    operations = re.findall(r"[-+*]\d+", question)
    assert len(written) == len(operations)
    running = re.match(r"\(*(\d+)", question)[1]
    for (left, result), operation in zip(written, operations, strict=True):
        assert left == running + operation and eval(left) == int(result)
        running = result
    assert running == answer


@pytest.mark.parametrize("operations", [("add",), ("sub", "add"), ("add", "sub", "mul"), ("mul",)])
def test_every_step_is_right(operations):
    drawn = [chain(1 + i % 6, 0, "test", i, operations=operations, largest=30, limit=400) for i in range(300)]
    made = [one for one in drawn if one is not None]
    assert len(made) > 250
    for one in made:
        check(one.question, one.reasoning, one.answer)
        numbers = [int(n) for n in re.findall(r"\d+", one.reasoning)]
        assert max(numbers) <= 400 and one.gold == one.answer
        assert set(re.findall(r"[-+*]", one.question)) <= {{"add": "+", "sub": "-", "mul": "*"}[o] for o in operations}
    assert {one.group for one in made} == set("123456")
    assert chain(3, 0, "a", operations=operations, limit=99) == chain(3, 0, "a", operations=operations, limit=99)


def test_operands_keep_to_their_limits():
    for i in range(100):
        one = chain(4, i, largest=9, limit=20)
        assert max(int(n) for n in re.findall(r"[-+](\d+)", one.question)) <= 9
        assert max(int(n) for n in re.findall(r"=(\d+)", one.reasoning)) <= 20
    assert chain(5, 0, operations=("add",), largest=9, limit=3) is None


def test_splits_are_balanced_and_disjoint():
    data = arithmetic(**SMALL)
    assert {split: data.counts[split] for split in SMALL} == SMALL
    questions = {split: data.questions(split) for split in ("val", "test")}
    assert Counter(q.group for q in questions["test"]) == {str(steps): 4 for steps in range(2, 7)}
    train = {
        data.tokenizer.decode(s.ids.tolist()).partition(":")[0] for s in data.source(data.tokenizer).splits["train"]
    }
    asked = [q.text for split in questions.values() for q in split]
    assert len(train) == 60 and len(set(asked)) == 30 and not train & set(asked)


def test_no_overlap_even_where_few_questions_exist():
    options = {"operations": ["add"], "min_steps": 1, "max_steps": 1, "limit": 9, "largest": 9}
    data = arithmetic(**options, train=30, val=5, test=5)  # of 45 that there are
    texts = [
        data.tokenizer.decode(s.ids.tolist())
        for sequences in data.source(data.tokenizer).splits.values()
        for s in sequences
    ]
    assert len(set(texts)) == 40
    with pytest.raises(UserError, match=r"data.train: 60; after \d+ no new question of 1 steps"):
        arithmetic(**options, train=60, val=5, test=5)


def test_evaluation_does_not_depend_on_training():
    def texts(**options):
        data = arithmetic(**SMALL | options)
        return [q.text for q in data.questions("test")]

    assert texts() == texts(train=90) == texts(form="answer") == texts(val=0) == texts(seed=3, split_seed=4)
    assert texts()[:10] == texts(test=10) and texts() != texts(data_seed=1)


@pytest.mark.parametrize("form", ["steps", "answer", "both"])
def test_what_is_written_is_judged(form):
    data = arithmetic(**SMALL, form=form, context=100)
    sequences = [s for s in data.source(data.tokenizer).splits["test"] if s.question]
    assert len(sequences) == 20
    for one in sequences:
        question = one.question
        written = data.tokenizer.decode(one.ids[len(question.prompt) :].tolist())
        assert data.right(question, written)
        assert not data.right(question, written + "0") and not data.right(question, written.replace(">", ""))
        assert (REASONING in one.segments) == (form == "steps") and one.segments[-1] == ANSWER
        if form == "steps":
            check(question.text, written.partition(">")[0], question.answer)


def test_lengths_fit_the_context():
    data = arithmetic(largest=99, train=300, val=0, test=50)
    assert max(len(s) for s in data.source(data.tokenizer).splits["train"]) <= 80 < data.context


def test_other_operations_outside():
    outside = arithmetic(operations=["add", "sub", "mul"], data_seed=5, **SMALL)
    data = arithmetic(**SMALL, ood=outside)
    asked = data.questions("ood")
    assert len(asked) == 20 and any("*" in q.text for q in asked)
    assert data.right(asked[0], f">{asked[0].answer}")
    # whatever is trained on, the tokens are the same
    assert arithmetic(**SMALL).tokenizer.fingerprint == outside.tokenizer.fingerprint == data.tokenizer.fingerprint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"operations": ["ad"]}, r"data.operations: unknown operation 'ad'; nearest: add"),
        ({"operations": []}, r"data.operations: \[\]; accepted: a list"),
        ({"operations": "add"}, r"data.operations: 'add'; accepted: a list"),
        ({"operations": ["add", "add"]}, r"data.operations"),
        ({"min_steps": 0}, r"data.min_steps: 0; accepted: a whole number, at least 1"),
        ({"max_steps": 1}, r"data.max_steps: 1; accepted: a whole number, at least 2"),
        ({"train": 0}, r"data.train: 0"),
        ({"form": "all"}, r"data.form: unknown form 'all'"),
        ({"context": 20}, r"data.context: 20"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(UserError, match=message):
        arithmetic(**SMALL | options)
