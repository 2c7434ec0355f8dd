"""A teacher with a tokenizer of its own: which of its answers is held against which of the student's."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from kdlab.errors import UserError
from kdlab.functional import Outputs, Projected, SequenceBatch
from kdlab.losses import ULD, CrossEntropy, Objective
from kdlab.tasks import LanguageModeling
from kdlab.teachers import CrossTokenizerTeacher

torch.set_num_threads(1)


class Characters:
    """a..z and space are 0..26, the end 27."""

    size, eos_id, pad_id = 28, 27, 27
    signs = "abcdefghijklmnopqrstuvwxyz "

    def encode(self, text):
        return [self.signs.index(c) for c in text]

    def decode(self, ids):
        return "".join(self.signs[i] for i in ids)


class Syllables:
    """The end is 0, then pairs of letters that begin with a consonant and end with a vowel, then letters."""

    eos_id = pad_id = 0
    parts = [c + v for c in "bcdfghjklmnpqrstvwxyz" for v in "aeiou"] + list(Characters.signs)
    size = len(parts) + 1

    def encode(self, text):
        return [1 + self.parts.index(p) for p in re.findall(r"[b-df-hj-np-tv-z][aeiou]|.", text)]

    def decode(self, ids):
        return "".join(self.parts[i - 1] for i in ids)


class Reader(nn.Module):
    """Logits that depend on all ids read so far, wherever they stand; keeps what it was fed."""

    def __init__(self, classes, context=None, projected=False):
        super().__init__()
        self.table = nn.Embedding(classes, classes)
        self.projected, self.fed = projected, []
        if context is not None:
            self.context = context

    def forward(self, input_ids, position_ids):
        self.fed.append((input_ids, position_ids))
        hidden = self.table(input_ids).cumsum(1)
        weight = torch.eye(hidden.shape[-1])
        return Projected(hidden, weight) if self.projected else hidden


STUDENT, TEACHER = Characters(), Syllables()


def batch_of(*pairs, eos=True):
    """(prompt, continuation) texts in the student's characters; the rows are the continuations'."""
    each = [(STUDENT.encode(p), STUDENT.encode(p + c) + [27] * eos) for p, c in pairs]
    width = max(len(ids) for _, ids in each) - 1
    ids, targets = torch.full((len(each), width), 27), torch.zeros(len(each), width).long()
    where = torch.zeros(len(each), width, dtype=torch.bool)
    for n, (prompt, all_) in enumerate(each):
        ids[n, : len(all_) - 1], targets[n, : len(all_) - 1] = torch.tensor(all_[:-1]), torch.tensor(all_[1:])
        where[n, len(prompt) - 1 : len(all_) - 1] = True
    inputs = {"input_ids": ids, "position_ids": torch.arange(width).expand(len(each), width)}
    return SequenceBatch(inputs, targets[where], loss_mask=where)


def unlike(**more):
    torch.manual_seed(0)
    net = Reader(TEACHER.size, **more)
    return CrossTokenizerTeacher(net, LanguageModeling(STUDENT.size), TEACHER, STUDENT), net


def spoken(net, prompt, continuation):
    """(n, C) the teacher's logits for each of the tokens of a continuation and the end, one sequence alone."""
    ids = [*TEACHER.encode(prompt), *TEACHER.encode(continuation), TEACHER.eos_id]
    table = net.table.weight.detach()[torch.tensor(ids[:-1])].cumsum(0)
    return table[len(TEACHER.encode(prompt)) - 1 :]


@pytest.mark.parametrize("projected", [False, True])
def test_rows_are_paired_one_by_one(projected):
    teacher, net = unlike(projected=projected)
    pairs = [("abc", "banana"), ("x ", "up"), ("papa", "str")]
    answer = teacher(batch_of(*pairs))
    logits = answer.logits.dense() if projected else answer.logits
    paired, at = answer.heads["paired"], 0
    assert logits.shape == (7 + 3 + 4, TEACHER.size) and not logits.requires_grad
    for (prompt, continuation), tokens in zip(pairs, (4, 3, 4), strict=True):  # ba-na-na-end, u-p-end, s-t-r-end
        rows = len(continuation) + 1
        expected = spoken(net, prompt, continuation)
        assert len(expected) == tokens
        assert paired[at : at + rows].tolist() == [i < tokens for i in range(rows)]
        torch.testing.assert_close(logits[at : at + tokens], expected[:rows])
        at += rows


def test_the_two_pieces_meet_where_the_first_row_predicts():
    """The pieces "ab" and "anana", and not "a-ba-na-na": the teacher is to begin at the same character."""
    teacher, net = unlike()
    answer = teacher(batch_of(("ab", "anana")))
    ids = net.fed[0][0][0].tolist()
    assert ids == TEACHER.encode("a") + TEACHER.encode("b") + TEACHER.encode("anana")
    assert answer.heads["paired"].tolist() == [True] * 4 + [False] * 2


def test_more_tokens_than_the_students_are_left_out():
    teacher = CrossTokenizerTeacher(Reader(STUDENT.size), LanguageModeling(TEACHER.size), STUDENT, TEACHER)
    ids = torch.tensor([TEACHER.encode("papa")])
    inputs = {"input_ids": ids[:, :-1], "position_ids": torch.zeros(1, 1).long()}
    answer = teacher(SequenceBatch(inputs, ids[0, 1:], loss_mask=torch.ones(1, 1, dtype=torch.bool)))
    assert answer.logits.shape == (1, 28) and answer.heads["paired"].tolist() == [True]


def test_rows_in_the_middle_that_do_not_count():
    teacher, _net = unlike()
    full = batch_of(("a", "xyzxyz"))
    answer = teacher(full)
    kept = torch.tensor([True, True, False, False, True, True, True])
    where = full.loss_mask.clone()
    where[full.loss_mask] = kept
    part = teacher(SequenceBatch(full.inputs, full.targets[kept], loss_mask=where))
    torch.testing.assert_close(part.logits, answer.logits[kept])
    assert part.heads["paired"].all()


def test_packed_sequences_are_read_apart():
    teacher, _ = unlike()
    one, two = batch_of(("abc", "banana")), batch_of(("x ", "up"))
    ids = torch.cat([one.inputs["input_ids"], two.inputs["input_ids"]], 1)
    places = torch.cat([one.inputs["position_ids"], two.inputs["position_ids"]], 1)
    where = torch.cat([one.loss_mask, two.loss_mask], 1)
    packed = SequenceBatch(
        {"input_ids": ids, "position_ids": places}, torch.cat([one.targets, two.targets]), loss_mask=where
    )
    found, expected = teacher(packed), teacher(batch_of(("abc", "banana"), ("x ", "up")))
    torch.testing.assert_close(found.logits, expected.logits)
    assert torch.equal(found.heads["paired"], expected.heads["paired"])


def test_ends_are_translated():
    teacher, net = unlike()
    ids = [27, *STUDENT.encode("ab"), 27, *STUDENT.encode("ba")]
    inputs = {"input_ids": torch.tensor([ids]), "position_ids": torch.arange(len(ids))[None]}
    where = torch.zeros(1, len(ids), dtype=torch.bool)
    where[0, 3:] = True
    teacher(SequenceBatch(inputs, torch.tensor([1, 0, 27]), loss_mask=where))
    assert net.fed[0][0][0].tolist() == [0, *TEACHER.encode("ab"), 0, *TEACHER.encode("ba")]


def test_a_teacher_that_reads_less():
    """Its context ends before the text does: the rows beyond have no partner."""
    teacher, net = unlike(context=4)
    answer = teacher(batch_of(("abc", "xyzxyz")))
    assert net.fed[0][0].shape == (1, 4)
    assert answer.heads["paired"].tolist() == [True, True] + [False] * 5
    teacher(batch_of(("abcdefghi", "xy")))  # not even the prompt fits
    assert not teacher(batch_of(("bcdfgh", "xy"))).heads["paired"].any()


def test_no_rows_and_no_text():
    teacher, _ = unlike()
    batch = batch_of(("a", "b"))
    empty = SequenceBatch(batch.inputs, batch.targets[:0], loss_mask=torch.zeros_like(batch.loss_mask))
    answer = teacher(empty)
    assert answer.logits.shape == (0, TEACHER.size) and answer.heads["paired"].shape == (0,)


def test_an_encoder_decoder_is_refused():
    ids = torch.zeros(1, 2).long()
    with pytest.raises(UserError, match=r"accepted: the student's tokenizer, or the teacher's text .*data=traces"):
        unlike()[0](SequenceBatch({"input_ids": ids, "decoder_input_ids": ids}, ids[0], loss_mask=ids == 0))


def test_real_tokenizers():
    tokenizers = pytest.importorskip("kdlab.data.text.tokenizer")
    texts = ["the cat sat on the mat, the cat ate the rat", "naïve café"]
    own, other = tokenizers.Tokenizer.characters(texts), tokenizers.Tokenizer.bpe(texts, 270)
    teacher = CrossTokenizerTeacher(Reader(other.size), LanguageModeling(own.size), other, own)
    for text in texts:
        ids = torch.tensor([[*own.encode(text), own.eos_id]])
        inputs = {"input_ids": ids[:, :-1], "position_ids": torch.arange(ids.shape[1] - 1)[None]}
        answer = teacher(
            SequenceBatch(inputs, ids[0, 1:], loss_mask=torch.ones_like(inputs["input_ids"], dtype=torch.bool))
        )
        count = len(other.encode(text[:1])) + len(other.encode(text[1:]))
        tokens = min(count, ids.shape[1] - 1)
        assert answer.logits.shape == (ids.shape[1] - 1, other.size)
        assert int(answer.heads["paired"].sum()) == tokens
        assert other.decode(teacher.net.fed[-1][0][0].tolist()) == text
    assert f"{other.size} tokens, the student's has {own.size}" in teacher.describe()


def test_a_student_learns_from_it():
    teacher, _ = unlike()
    batch = batch_of(("abc", "banana"), ("x ", "up"))
    student = torch.randn(len(batch), STUDENT.size, requires_grad=True)
    objective = Objective({"ce": CrossEntropy(), "uld": ULD(weight=1.5)})
    answer = teacher(batch)
    losses = objective(Outputs(student), answer, batch)
    each = ULD()(Outputs(student), answer, batch)
    assert (each[~answer.heads["paired"]] == 0).all() and (each[answer.heads["paired"]] > 0).all()
    assert losses.values[1].item() == pytest.approx(float(each.detach().mean()), rel=1e-5)
    losses.total.backward()
    assert student.grad.isfinite().all()
