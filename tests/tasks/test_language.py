"""Language modelling: rows, vocabularies, every measure against NumPy, and what is generated against plain loops."""

from __future__ import annotations

import itertools
import logging
import math
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from kdlab.data import arithmetic
from kdlab.errors import UserError
from kdlab.functional import SEGMENTS, Batch, Outputs, Projected, Sampled, SequenceBatch, Sparse
from kdlab.models.transformers.causal_lm import CausalLM
from kdlab.tasks import LanguageModeling, TextToText, TokenMeasures, generation, pass_at_k, tokens_per_second
from kdlab.tasks.generation import Answers

torch.set_num_threads(1)

EOS = 9
CONTEXT = 24


def draw(*shape, seed=0, scale=2.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def whole(high, *shape, seed=0):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def gpt(vocab=10, seed=0, width=16, sharp=1.0):
    torch.manual_seed(seed)
    settings = {"n_layer": 1, "n_head": 2, "n_embd": width, "resid_pdrop": 0.1}
    net = CausalLM(settings=settings, vocab_size=vocab, context=CONTEXT, eos_id=EOS, pad_id=EOS)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.3 * sharp)
    return net.eval()


class Dense(nn.Module):
    """The same network, with all logits made."""

    def __init__(self, net):
        super().__init__()
        self.inner = net

    def forward(self, **inputs):
        return SimpleNamespace(logits=self.inner(**inputs).dense())


def text_batch(lengths=(7, 4, 9), vocab=10, first=2):
    """Right-padded sequences whose rows begin at position ``first``."""
    width = max(lengths)
    where = torch.tensor([[first <= t < n for t in range(width)] for n in lengths])
    ids = whole(vocab, len(lengths), width)
    rows = int(where.sum())
    inputs = {"input_ids": ids, "position_ids": torch.arange(width).expand_as(ids)}
    return SequenceBatch(inputs, whole(vocab, rows, seed=1), weight=torch.ones(rows), loss_mask=where)


# ---- rows and vocabularies


def test_outputs_hold_the_rows_alone():
    net, batch, task = gpt(), text_batch(), LanguageModeling(10)
    layers = ("net.transformer.h.0", "net.transformer.ln_f")
    found = task.outputs(net, batch, layers)
    full = net(**batch.inputs).dense()
    expected = torch.stack([full[b, t] for b in range(3) for t in range(9) if batch.loss_mask[b, t]])
    assert isinstance(found.logits, Projected)
    torch.testing.assert_close(found.logits.dense(), expected)
    assert {name: tuple(value.shape) for name, value in found.features.items()} == dict.fromkeys(layers, (14, 16))
    torch.testing.assert_close(found.logits.hidden, found.features["net.transformer.ln_f"])
    torch.testing.assert_close(task.outputs(Dense(net), batch).logits, expected)


def test_wider_networks_are_cut_to_the_shared_ids_with_one_line_each(caplog):
    net, other, batch, task = gpt(16), gpt(16, seed=1), text_batch(), LanguageModeling(10)
    with caplog.at_level(logging.INFO, "kdlab"):
        found = [task.outputs(each, batch).logits for each in (net, net, other, Dense(other))]
    assert [line.getMessage() for line in caplog.records] == [
        f"{name}: 16 outputs, cut to the 10 shared ids and renormalised" for name in ("CausalLM", "CausalLM", "Dense")
    ]
    assert {tuple(logits.shape) for logits in found} == {(14, 10)}
    torch.testing.assert_close(found[0].dense(), net(**batch.inputs)[batch.loss_mask].dense()[:, :10])
    torch.testing.assert_close(found[2].dense(), found[3])


def test_a_network_of_another_vocabulary_is_refused_with_the_alternatives():
    with pytest.raises(UserError, match=r"has 10 outputs and the vocabulary 12 ids.*text.*data=traces.*loss=uld"):
        LanguageModeling(12).outputs(gpt(10), text_batch())


def test_a_network_that_answers_other_positions_is_refused():
    class Short(nn.Module):
        def forward(self, input_ids, position_ids):
            return torch.zeros(len(input_ids), 1, 10)

    with pytest.raises(UserError, match=r"Short answers with logits of shape \(3, 1, 10\)"):
        LanguageModeling(10).outputs(Short(), text_batch())


# ---- measures


def log_softmax(z):
    z = np.asarray(z, dtype=np.float64)
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def reference(logits, targets, weight, segment, teacher=None):
    p, y, w, segment = log_softmax(logits), targets.numpy(), weight.double().numpy(), segment.numpy()
    known = y >= 0
    nats = -p[np.arange(len(y)), np.where(known, y, 0)]
    right = np.asarray(logits).argmax(-1) == y

    def mean(values, at):
        return (values * w)[at].sum() / w[at].sum()

    found = {"ce": mean(nats, known), "acc": mean(right, known)}
    found["ppl"] = math.exp(found["ce"])
    found |= {f"ce/{SEGMENTS[s]}": mean(nats, known & (segment == s)) for s in set(segment[known].tolist())}
    if teacher is not None:
        q = log_softmax(teacher)
        found["kl"] = mean((np.exp(q) * (q - p)).sum(-1), w > 0)
        found["agreement"] = mean(np.asarray(logits).argmax(-1) == np.asarray(teacher).argmax(-1), w > 0)
    return found


@dataclass
class Case:
    hidden: torch.Tensor
    matrix: torch.Tensor
    teacher_hidden: torch.Tensor
    batch: Batch

    @property
    def logits(self):
        return self.hidden @ self.matrix.T

    @property
    def teacher(self):
        return self.teacher_hidden @ self.matrix.T


@pytest.fixture
def case():
    rows = 1300  # more than two chunks
    targets = whole(11, rows)
    targets[::13] = -100
    segment = 1 + whole(2, rows, seed=3)
    batch = SequenceBatch(
        torch.zeros(1),
        targets,
        weight=0.5 + draw(rows).abs(),
        segment=segment,
        loss_mask=torch.ones(1, rows, dtype=torch.bool),
    )
    return Case(draw(rows, 5, seed=4, scale=1.0), draw(11, 5, seed=5), draw(rows, 5, seed=6, scale=1.0), batch)


def measured(student, teacher, batch, sizes=(600, 1, 699), **options):
    measures, at = TokenMeasures(**options), 0
    for size in sizes:
        rows = slice(at, at + size)
        said = None if teacher is None else Outputs(teacher[rows])
        measures.update(Outputs(student[rows]), said, batch.part(rows))
        at += size
    assert at == measures.rows == len(batch)
    return measures.compute()


@pytest.mark.parametrize("form", ["dense", "projected", "sparse"])
def test_measures_are_what_their_definitions_say(case, form):
    student = case.logits if form == "dense" else Projected(case.hidden, case.matrix)
    teacher = {
        "dense": case.teacher,
        "projected": Projected(case.teacher_hidden, case.matrix),
        "sparse": Sparse.of(case.teacher, 11),
    }[form]
    expected = reference(case.logits, case.batch.targets, case.batch.weight, case.batch.segment, case.teacher)
    found = measured(student, teacher, case.batch)
    if form == "sparse":  # of all ids, which makes it the whole divergence
        found["kl"] = found.pop("kl_top11")
    assert found == pytest.approx(expected, rel=2e-5)
    alone = {name: value for name, value in expected.items() if name not in ("kl", "agreement")}
    assert measured(student, None, case.batch) == pytest.approx(alone, rel=2e-5)


def test_a_sparse_teacher_agrees_by_its_first_id_and_never_diverges_more(case):
    full = measured(case.logits, case.teacher, case.batch)
    few = measured(case.logits, Sparse.of(case.teacher, 3), case.batch)
    assert few["agreement"] == pytest.approx(full["agreement"])
    assert 0 < few["kl_top3"] < full["kl"] and "kl" not in few


def test_a_teacher_of_sampled_ids_has_no_divergence(case):
    drawn = Sampled.of(case.teacher, 4, generator=torch.Generator().manual_seed(0))
    assert {"kl", "agreement"}.isdisjoint(measured(case.logits, drawn, case.batch))


def test_logits_exist_a_chunk_at_a_time(case, monkeypatch):
    made = []
    original = Projected.dense
    monkeypatch.setattr(Projected, "dense", lambda self: made.append(len(self)) or original(self))
    measured(Projected(case.hidden, case.matrix), Projected(case.teacher_hidden, case.matrix), case.batch, (1300,))
    assert max(made) == 512 and sum(made) == 2 * 1300


def test_one_segment_is_not_listed_and_words_give_their_perplexity():
    batch = Batch(torch.zeros(1), torch.zeros(20, dtype=torch.long))
    found = measured(torch.zeros(20, 4), None, batch, (20,), words=5)
    assert found == pytest.approx({"ce": math.log(4), "ppl": 4.0, "acc": 1.0, "ppl_word": 4.0**4})


def test_a_hopeless_network_has_infinite_perplexity_and_no_label_has_none():
    targets = torch.zeros(3, dtype=torch.long)
    logits = torch.tensor([[0.0, 1e4]]).expand(3, 2)
    found = measured(logits, None, Batch(torch.zeros(1), targets), (3,))
    assert found["ppl"] == math.inf and found["ce"] == pytest.approx(1e4)
    found = measured(logits, logits, Batch(torch.zeros(1), targets - 100), (3,))
    assert math.isnan(found["ppl"]) and found["kl"] == 0.0 and found["agreement"] == 1.0


# ---- options


def test_the_deciding_measure():
    assert [
        (LanguageModeling(8, score=s).score, LanguageModeling(8, score=s).greater) for s in ("ppl", "ce", "acc")
    ] == [
        ("ppl", False),
        ("ce", False),
        ("acc", True),
    ]
    assert [LanguageModeling(8, score=s).chance for s in ("ppl", "ce", "acc")] == [8.0, math.log(8), 1 / 8]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "em"}, "task.score: unknown measure 'em'.*acc, ce, ppl"),
        ({"vocab_size": 1}, "task.vocab_size: 1; accepted"),
        ({"new_tokens": 0}, "task.new_tokens: 0; accepted"),
        ({"max_questions": 0}, "task.max_questions: 0; accepted"),
        ({"passes": [0]}, r"task.passes: \[0\]; accepted"),
        ({"passes": [1, 4], "samples": 2}, "task.samples: 2 for pass@4; accepted: at least 4"),
        ({"temperature": 0.0}, "task.temperature: 0.0; accepted"),
        ({"top_p": 0.0}, "task.top_p: 0.0; accepted"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(UserError, match=message):
        LanguageModeling(**{"vocab_size": 10, **options})


# ---- what is generated


class Letters:
    """Ids as letters; the last one ends a text."""

    eos_id = pad_id = EOS

    def decode(self, ids):
        return "".join("abcdefghi|"[i] for i in ids)


@dataclass
class Question:
    prompt: torch.Tensor
    answer: str
    group: str = ""
    text: str = ""
    source: torch.Tensor | None = None


class Quiz:
    tokenizer, context, vocab_size = Letters(), CONTEXT, 10
    counts, has_questions = {"test": 1}, True

    def __init__(self, questions, batch=None):
        self._questions, self._batch = questions, batch

    def questions(self, split):
        return self._questions if split == "test" else []

    def right(self, question, text):
        return text == question.answer

    def ordered_loader(self, split, batch_size=None):
        return [self._batch]


def greedy(net, prompt, most):
    """The most probable token, again and again, without a cache."""
    ids = prompt.tolist()
    with torch.no_grad():
        while len(ids) < len(prompt) + most and (len(ids) == len(prompt) or ids[-1] != EOS):
            ids.append(int(net(input_ids=torch.tensor([ids])).dense()[0, -1, :10].argmax()))
    return ids[len(prompt) :]


def quiz(net, most, count=12):
    """Every third answer is wrong."""
    questions = []
    for number in range(count):
        prompt = whole(9, 1 + number % 4, seed=number)
        written = greedy(net, prompt, most)
        text = Letters().decode([i for i in written if i != EOS])
        questions.append(Question(prompt, text if number % 3 else "?", str(number % 2 * 10 + 2), f"q{number}"))
    return questions, [greedy(net, q.prompt, most) for q in questions]


def test_greedy_answers_are_judged_by_group():
    net = gpt(seed=3)
    questions, expected = quiz(net, 6)
    found = LanguageModeling(10, new_tokens=6, at_once=5).further(net, Quiz(questions), "test", torch.device("cpu"))
    assert list(found) == ["em", "em/2", "em/12", "ended", "new_tokens"]
    ended = [text[-1] == EOS for text in expected]
    right = [number % 3 > 0 and end for number, end in enumerate(ended)]
    assert 1 < sum(right) < sum(ended) < 12
    assert found == pytest.approx(
        {
            "em": sum(right) / 12,
            "em/2": sum(right[::2]) / 6,
            "em/12": sum(right[1::2]) / 6,
            "ended": sum(ended) / 12,
            "new_tokens": np.mean([len(text) for text in expected]),
        }
    )


def test_an_answer_that_was_cut_off_is_wrong():
    ids = [torch.tensor(tokens) for tokens in ([7], [7, EOS], [7, 4, EOS], [7, 4])]
    questions = [Question(torch.tensor([0]), "h") for _ in ids]
    found = Answers.of(questions, ids, Quiz(questions))
    assert found.texts == ["h", "h", "he", "he"] and found.ended == [False, True, True, False]
    assert found.right == [False, True, False, False] and found.measures()["em"] == 1 / 4


@pytest.mark.parametrize(
    ("longest", "room"), [({"train": 4, "test": 2}, 6), ({"train": 3, "test": 5}, 8), ({"test": None}, 22), ({}, 22)]
)
def test_answers_have_room_for_more_than_the_longest_reference(longest, room):
    """Unless told; the context has room for 22 tokens after prompts of 3."""
    net = gpt(seed=3)
    with torch.no_grad():
        net.net.transformer.wte.weight[EOS] = 0.0
        net.net.transformer.wte.weight[0] = 5.0
    data = Quiz([Question(whole(9, 3, seed=n), "") for n in range(3)])
    if longest:
        data.longest = longest.get
    found = LanguageModeling(10, passes=[1]).further(net, data, "test", torch.device("cpu"))
    assert found["ended"] == 0 and found["new_tokens"] == room
    assert LanguageModeling(10, new_tokens=2).further(net, data, "test", torch.device("cpu"))["new_tokens"] == 2


def test_no_reference_is_longer_than_what_may_be_written():
    data = arithmetic(train=40, val=0, test=20, max_steps=6, tokenizer="bytes")
    for split in ("train", "test"):
        references = [len(one) - int((one.segments == 0).sum()) for one in data.source(data.tokenizer).splits[split]]
        assert data.longest(split) == max(references) > 20
    room = LanguageModeling(data.vocab_size).generation._longest(data, "test")
    assert room == math.ceil(1.5 * max(data.longest("train"), data.longest("test")))
    assert LanguageModeling(data.vocab_size, new_tokens=7).generation._longest(data, "test") == 7


def test_a_padded_network_never_writes_an_id_that_is_none():
    net = gpt(16, seed=5)
    with torch.no_grad():
        net.net.transformer.wte.weight[10:] *= 10  # such ids would win
    assert int(net(torch.arange(4)[None]).dense()[0, -1].argmax()) >= 10
    questions, expected = quiz(net, 5, 4)
    answers = LanguageModeling(10, new_tokens=5).generation.answers(net, Quiz(questions), "test", "cpu", 10)
    assert answers.texts == [Letters().decode([i for i in text if i != EOS]) for text in expected]
    assert answers.lengths == [len(text) for text in expected]


def test_answers_end_where_the_context_does():
    net = gpt(seed=3)
    questions = [Question(whole(9, n, seed=n), "") for n in (2, CONTEXT - 2, CONTEXT)]
    with torch.no_grad():
        net.net.transformer.wte.weight[EOS] = 0.0
        net.net.transformer.wte.weight[0] = 5.0
    found = LanguageModeling(10, new_tokens=8).further(net, Quiz(questions), "test", torch.device("cpu"))
    assert found["ended"] == 0.0 and found["new_tokens"] == pytest.approx((8 + 3 + 1) / 3)
    with pytest.raises(UserError, match=r"data\.context: 24 leaves no room after a prompt of 25 tokens"):
        LanguageModeling(10).further(net, Quiz([Question(whole(9, 25), "")]), "test", torch.device("cpu"))


def test_no_questions_no_measures():
    net, task = gpt(), LanguageModeling(10)
    assert task.further(net, Quiz([]), "test", torch.device("cpu")) == {}
    assert task.further(net, SimpleNamespace(has_questions=False), "test", torch.device("cpu")) == {}


def test_asking_fewer_asks_the_same_ones_from_all_over_the_split():
    net = gpt(seed=3)
    questions, _ = quiz(net, 4, 40)
    data, task = Quiz(questions), LanguageModeling(10, new_tokens=4, max_questions=10)
    first, again = (task.generation.answers(net, data, "test", "cpu", 10) for _ in range(2))
    assert [q.text for q in first.questions] == [q.text for q in again.questions]
    places = [int(q.text[1:]) for q in first.questions]
    assert len(places) == 10 and places == sorted(places) and places[0] < 20 < places[-1]


@pytest.mark.parametrize("right", range(6))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(right):
    samples = [True] * right + [False] * (5 - right)
    for k in range(1, 6):
        subsets = list(itertools.combinations(samples, k))
        assert pass_at_k(5, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    with pytest.raises(ValueError, match="accepted: 1 <= k <= samples"):
        pass_at_k(3, 1, 4)


def test_drawn_answers_do_not_depend_on_the_batch(monkeypatch):
    net = gpt(seed=3)
    questions = [Question(whole(9, 2, seed=n), "") for n in range(6)]
    ended = []
    real = Answers.of.__func__

    def noted(cls, *arguments):
        answers = real(cls, *arguments)
        ended.append(answers.ended)
        return answers

    monkeypatch.setattr(Answers, "of", classmethod(noted))

    class First(Quiz):
        texts: list

        def right(self, question, text):
            self.texts.append(text)
            return text[:1] < "e"  # what was cut off is wrong whatever it says

    found, texts = [], []
    for at_once in (3, 64):
        data = First(questions)
        data.texts = []
        task = LanguageModeling(10, new_tokens=5, passes=(1, 2), samples=4, temperature=1.0, at_once=at_once)
        found.append(task.generation.passed(net, data, "test", torch.device("cpu"), 10))
        texts.append(data.texts)
    assert texts[0] == texts[1] and len(set(texts[0])) > 12
    assert ended[0] == ended[1] and 0 < sum(ended[0]) < 24
    right = [text[:1] < "e" and end for text, end in zip(texts[0], ended[0], strict=True)]
    counts = [sum(right[n : n + 4]) for n in range(0, 24, 4)]
    assert (
        found[0]
        == found[1]
        == pytest.approx({f"pass@{k}": np.mean([pass_at_k(4, c, k) for c in counts]) for k in (1, 2)})
    )
    assert found[0]["pass@1"] < found[0]["pass@2"]


def test_samples_are_a_table_that_markup_cannot_break():
    net = gpt(seed=3)
    questions, expected = quiz(net, 4, 3)
    questions[0].text = "a|b\n*c*"
    shown = LanguageModeling(10, new_tokens=4).samples(net, Quiz(questions), "test", torch.device("cpu"))
    lines = shown.splitlines()
    assert lines[:2] == ["| question | answer | written | right |", "| --- | --- | --- | --- |"]
    assert lines[2].startswith("| a\\|b<br>\\*c\\* | ? |") and lines[2].endswith("| no |")
    text = Letters().decode([i for i in expected[1] if i != EOS])
    assert lines[3] == f"| q1 | {text} | {text} | {'yes' if EOS in expected[1] else 'no'} |"


def test_samples_of_plain_text_go_on_from_its_beginning():
    net, batch = gpt(seed=3), text_batch((9, 3, 8), first=0)
    data = Quiz([], batch)
    lines = LanguageModeling(10, new_tokens=3, prompt=4).samples(net, data, "test", torch.device("cpu")).splitlines()
    ids, show = batch.inputs["input_ids"], Letters().decode
    expected = [
        [show(ids[row, :4].tolist()), show(ids[row, 4:7].tolist()), show(greedy(net, ids[row, :4], 3))]
        for row in (0, 2)
    ]
    assert lines[0] == "| text | goes on | written |"
    assert lines[2:] == [f"| {' | '.join(row)} |".replace("|\n", "") for row in map(_escaped, expected)]


def test_plain_text_goes_on_for_64_tokens_unless_told(monkeypatch):
    asked = []

    def write(net, prompts, new_tokens, **options):
        asked.append(new_tokens)
        return [prompt[:1] for prompt in prompts]

    monkeypatch.setattr(generation, "generate", write)
    data = Quiz([], text_batch((9, 8), first=0))
    for options in ({}, {"new_tokens": 3}):
        LanguageModeling(10, prompt=4, **options).samples(gpt(), data, "test", torch.device("cpu"))
    assert asked == [64, 3]


def _escaped(row):
    return [cell.replace("|", "\\|") for cell in row]


def test_tokens_per_second_is_the_median():
    net, ticks = gpt(), iter([0, 100, 0, 2, 0, 4, 0, 1])
    threads = torch.get_num_threads()
    batch = text_batch()
    found = tokens_per_second(net, Quiz([], batch), prompt=4, new_tokens=8, repeats=3, clock=lambda: next(ticks))
    assert found == 4.0 and torch.get_num_threads() == threads


# ---- text to text


class Echo(nn.Module):
    """An encoder-decoder that writes what it reads, then ends."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Embedding(10, 10), nn.Identity()
        self.encoder.weight.data = torch.eye(10)

    def forward(self, decoder_input_ids, input_ids, attention_mask=None):
        read = self.encoder(input_ids)
        steps = decoder_input_ids.shape[1]
        padded = torch.cat([read, torch.eye(10)[EOS].expand(len(read), steps, 10)], 1)
        return self.decoder(padded[:, :steps] * 5)


def test_text_to_text_keeps_the_encoders_positions_to_itself():
    batch = text_batch((5, 3))
    batch.inputs = {"decoder_input_ids": batch.inputs["input_ids"], "input_ids": whole(9, 2, 5)}
    found = TextToText(10).outputs(Echo(), batch, ["encoder", "decoder"])
    assert found.features["encoder"].shape == (2, 5, 10) and found.features["decoder"].shape == (4, 10)
    torch.testing.assert_close(found.features["decoder"], found.logits)


def test_features_of_a_question_get_the_length_that_batches_have():
    class Listener(nn.Module):
        seen: list

        def forward(self, decoder_input_ids, input_features):
            self.seen.append(tuple(input_features.shape))
            assert input_features[0, :, 5:].eq(0).all() and input_features[1].ne(0).all()
            return torch.eye(10)[EOS].expand(*decoder_input_ids.shape, 10)

    net = Listener()
    net.seen = []
    data = Quiz([Question(torch.tensor([EOS]), "", source=torch.ones(3, frames)) for frames in (5, 8)])
    data.network_kwargs = {"frames": 8}
    found = TextToText(10, transcripts=True).further(net, data, "test", torch.device("cpu"))
    assert found == {"em": 1.0, "ended": 1.0, "new_tokens": 1.0} and net.seen == [(2, 3, 8)]


def test_transcripts_have_error_rates():
    questions = [Question(torch.tensor([EOS]), "one two three"), Question(torch.tensor([EOS]), "four")]
    answers = Answers(questions, ["one too three", " four five"], [False] * 2, [True] * 2, [3, 2])
    assert TextToText(10)._texts(answers) == {}
    # words: one substituted, one put in, of four; characters: one substituted, five put in, of seventeen
    expected = {"wer": 2 / 4, "cer": 6 / 17}
    assert TextToText(10, transcripts=True)._texts(answers) == pytest.approx(expected)
