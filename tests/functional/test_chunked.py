"""Losses in chunks of rows: the values and gradients of dense logits, in every form, precision and split."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from helpers.vocabulary_cases import CLASSES, ROWS, TARGETS, WEIGHT, WIDTH, batch, draw, head, same, step, terms
from kdlab.errors import UserError
from kdlab.functional import Outputs, Projected, SequenceBatch, Sparse, StepTotals, chunked, dense, kl
from kdlab.losses import (
    DKD,
    KL,
    CrossEntropy,
    Hint,
    LearnedTemperature,
    LogitMSE,
    Objective,
    StandardizedTemperature,
    Term,
    objective,
)

INF = math.inf
torch.set_num_threads(1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("form", ["projected", "dense", "sparse"])
@pytest.mark.parametrize("chunk", [1, 4, 13, 64])
def test_chunks_give_the_values_and_gradients_of_dense_logits(chunk, form, bias, dtype, tolerance):
    ours, theirs = head(0, bias=bias, dtype=dtype), head(5, bias=bias, dtype=dtype, width=4)
    full = F.linear(*theirs).detach()
    teacher = {"projected": Projected(*theirs), "dense": full, "sparse": Sparse.of(full, CLASSES)}[form]
    rows = batch(weight=WEIGHT)
    expected = step(Objective(terms(), 3.0, 0.6), F.linear(*ours), full, rows, ours)
    found = step(Objective(terms(), 3.0, 0.6, chunk_rows=chunk), Projected(*ours), teacher, rows, ours)
    same(found, expected, tolerance if dtype == torch.float64 else 3e-6 if chunk == 64 else tolerance)
    assert all(p.grad is None for p in theirs)  # a teacher learns nothing


def test_a_dense_student_beside_a_projected_teacher():
    ours, theirs = head(0), head(5)
    logits = F.linear(*ours).detach().requires_grad_()
    expected = step(Objective(terms(), 3.0, 0.6), logits, F.linear(*theirs).detach(), batch(), [logits])
    found = step(Objective(terms(), 3.0, 0.6, chunk_rows=5), logits, Projected(*theirs), batch(), [logits])
    same(found, expected, 1e-10)


@pytest.mark.parametrize("teacher", ["dense", "sparse", None])
def test_many_dense_logits_are_compared_in_chunks(monkeypatch, teacher):
    """Where a model's logits are no product of hidden states and a matrix: soft caps, scaling, adapters."""
    logits, seen = F.linear(*head(0)).detach().requires_grad_(), []
    full = F.linear(*head(5)).detach()
    given = {"dense": full, "sparse": Sparse.of(full, 4), None: None}[teacher]

    class Spy(CrossEntropy):
        def forward(self, student, teacher, batch):
            seen.append((tuple(student.logits.shape), None if teacher is None else tuple(teacher.logits.shape)))
            return super().forward(student, teacher, batch)

    def run(rows=5):
        seen.clear()
        every = Objective({"spy": Spy(), **terms()}, LearnedTemperature(3.0), 0.6, chunk_rows=rows).double()
        learned = [logits] if teacher is None else [logits, *every.parameters()]
        return step(every, logits, given, batch(weight=WEIGHT), learned)

    def shapes(*rows):
        return [((n, CLASSES), None if teacher is None else (n, CLASSES)) for n in rows]

    expected = run()
    assert seen == shapes(ROWS), "few numbers are compared at once"
    monkeypatch.setattr(objective, "AT_ONCE", ROWS * CLASSES)
    run()
    assert seen == shapes(ROWS)
    monkeypatch.setattr(objective, "AT_ONCE", ROWS * CLASSES - 1)
    same(run(), expected, 1e-10)
    assert seen == shapes(5, 5, 3)
    same(run(1), expected, 1e-10)
    assert seen == shapes(*[1] * ROWS), "an eighth of the numbers is one row"


def test_chunks_grow_where_classes_are_few(monkeypatch):
    every, fixed, width = Objective({"kl": KL()}), Objective({"kl": KL()}, chunk_rows=4), 8
    monkeypatch.setattr(objective, "AT_ONCE", 2048 * width)
    projected = Projected(torch.zeros(1, 2), torch.zeros(width, 2))
    assert every._rows_at_once(torch.zeros(2048, width), torch.zeros(2048, width)) == 0
    assert every._rows_at_once(torch.zeros(2049, width), None) == 256
    assert every._rows_at_once(torch.zeros(8, width), torch.zeros(2049, 4 * width)) == 128
    assert every._rows_at_once(torch.zeros(1, width), projected) == 256
    assert fixed._rows_at_once(torch.zeros(2049, width), None) == 4
    assert fixed._rows_at_once(torch.zeros(1, width), projected) == 4


def test_labels_alone_and_terms_of_weight_zero():
    ours, theirs = head(0), head(5)
    for teacher in (None, Projected(*theirs)):
        other = None if teacher is None else teacher.dense().detach()
        expected = step(Objective(terms(), 3.0, 1.0), F.linear(*ours), other, batch(), ours)
        found = step(Objective(terms(), 3.0, 1.0, chunk_rows=4), Projected(*ours), teacher, batch(), ours)
        same(found, expected, 1e-10)
    nothing = Objective({"kl": KL(weight=0)}, chunk_rows=4)
    total, values, grads = step(nothing, Projected(*ours), Projected(*theirs), batch(), ours)
    assert total == 0 and values[0] > 0 and all((g == 0).all() for g in grads)
    total, _, grads = step(Objective({"kl": KL()}), Projected(*ours), None, batch(), ours)
    assert total == 0 and all((g == 0).all() for g in grads)


def test_only_what_trains_gets_a_gradient():
    ours, theirs = head(0), head(5)
    ours[1].requires_grad_(False)  # a frozen output layer
    expected = step(Objective(terms()), F.linear(*ours), F.linear(*theirs).detach(), batch(), [ours[0], ours[2]])
    found = step(Objective(terms(), chunk_rows=4), Projected(*ours), Projected(*theirs), batch(), [ours[0], ours[2]])
    same(found, expected, 1e-10)
    assert ours[1].grad is None
    with torch.no_grad():
        losses = Objective(terms())(Outputs(Projected(*ours)), Outputs(Projected(*theirs)), batch())
    assert not losses.total.requires_grad
    torch.testing.assert_close(losses.total, expected[0])


def test_an_output_matrix_shared_with_the_embedding():
    table, ids = nn.Embedding(CLASSES, WIDTH, dtype=torch.float64), torch.arange(ROWS) % CLASSES
    teacher = draw(ROWS, CLASSES, seed=7)

    def gradient(form):
        table.weight.grad = None
        Objective(terms(), chunk_rows=4)(Outputs(form(table(ids).tanh())), Outputs(teacher), batch()).total.backward()
        return table.weight.grad

    expected = gradient(lambda h: F.linear(h, table.weight))
    torch.testing.assert_close(gradient(lambda h: Projected(h, table.weight)), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("make", [lambda: LearnedTemperature(3.0), lambda: StandardizedTemperature(2.0)])
def test_temperatures_of_all_kinds(make):
    ours, theirs = head(0), head(5)
    results = []
    for s, t in ((F.linear(*ours), F.linear(*theirs).detach()), (Projected(*ours), Projected(*theirs))):
        objective = Objective({"ce": CrossEntropy(), "kl": KL(), "mse": LogitMSE(), "dkd": DKD()}, make(), 0.5, 4)
        objective.progress = 0.5
        results.append(step(objective.double(), s, t, batch(), [*ours, *objective.parameters()]))
    same(results[1], results[0], 1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_multiplies_in_half_precision_as_the_dense_form_does(dtype):
    ours, theirs = head(0, dtype=torch.float32), head(5, dtype=torch.float32)

    def run(form):
        with torch.autocast("cpu", dtype=dtype):
            return step(Objective(terms(), 3.0, 0.6, chunk_rows=4), form(*ours), form(*theirs), batch(), ours)

    chunks, whole = run(Projected), run(F.linear)
    exact = step(Objective(terms(), 3.0, 0.6), F.linear(*ours), F.linear(*theirs), batch(), ours)
    same(chunks[:2], whole[:2], 1e-6)  # the logits are the same to the bit
    assert all(g.dtype == torch.float32 for g in chunks[2])
    for a, b, c in zip(chunks[2], whole[2], exact[2], strict=True):  # both round, about as much
        assert (a - c).norm() <= 2 * (b - c).norm() + 1e-6


def test_half_precision_gradients_survive_small_weights():
    hidden, weight = draw(8, WIDTH).half().requires_grad_(), draw(CLASSES, WIDTH, seed=1).half().requires_grad_()
    teacher, rows = draw(8, CLASSES, seed=2).half(), batch(TARGETS[:8], window=StepTotals(1e7, 1e7))
    losses = Objective({"kl": KL()}, chunk_rows=3)(Outputs(Projected(hidden, weight)), Outputs(teacher), rows)
    (losses.total * 1e7).backward()  # each row weighs 1e-7, which half precision rounds to nothing
    exact = torch.autograd.functional.jacobian(lambda w: kl(hidden.double() @ w.T, teacher).sum(), weight.double())
    torch.testing.assert_close(weight.grad.double(), exact, rtol=2e-2, atol=2e-2)


SPLITS = {"halves": [0, 6, 13], "ragged": [0, 1, 9, 13], "single rows": list(range(14))}


@pytest.mark.parametrize("form", ["projected", "dense", "sparse"])
@pytest.mark.parametrize("split", SPLITS)
def test_gradients_do_not_depend_on_the_split(split, form):
    ours, theirs = head(0), head(5)
    full = F.linear(*theirs).detach()
    teacher = {"projected": Projected(*theirs).detach(), "dense": full, "sparse": Sparse.of(full, 4)}[form]
    whole = batch(weight=WEIGHT)
    objective = Objective(terms(), 3.0, 0.6, chunk_rows=3)

    def run(edges):
        for p in ours:
            p.grad = None
        values, parts = torch.zeros(len(objective.names)), len(edges) - 1
        for a, b in itertools.pairwise(edges):
            part = batch(TARGETS[a:b], weight=WEIGHT[a:b], window=whole.count()._replace(parts=parts))
            losses = objective(Outputs(Projected(*ours)[a:b]), Outputs(teacher[a:b]), part)
            (losses.total / parts).backward()
            values += losses.values
        return values, [p.grad.clone() for p in ours]

    (values, grads), (one_values, one_grads) = run(SPLITS[split]), run([0, 13])
    torch.testing.assert_close(values, one_values, rtol=1e-5, atol=1e-6)
    same([grads], [one_grads], 1e-10)


def test_terms_that_see_all_rows_run_beside_the_chunks():
    ours, theirs = head(0), head(5)
    t = Outputs(F.linear(*theirs).detach(), {"t": draw(ROWS, 3, seed=9)})
    objective = Objective({"ce": CrossEntropy(), "hint": Hint("s", "t"), "kl": KL()}, 2.0, chunk_rows=4)
    results = []
    for logits in (F.linear, Projected):
        s = Outputs(logits(*ours), {"s": ours[0]})
        objective.prepare(s, t)
        objective.double()
        ours[0].grad = None
        losses = objective(s, t, batch())
        losses.total.backward()
        results.append([losses.total.detach(), losses.values, ours[0].grad])
    same(results[1], results[0], 1e-10)


def test_rows_without_a_label_may_be_infinite():
    class Log(Term):
        rowwise, rows, needs_teacher = True, "labelled", False

        def forward(self, student, teacher, batch):
            return torch.where(batch.targets < 0, -INF, dense(student.logits).sum(-1))

    ours = head(0)
    expected = F.linear(*ours).sum(-1)[TARGETS >= 0].mean().detach()
    total, values, grads = step(Objective({"log": Log()}, chunk_rows=4), Projected(*ours), None, batch(), ours)
    assert total == pytest.approx(expected.item()) and values.isfinite().all()
    assert all(g.isfinite().all() for g in grads)


def test_the_function_alone_returns_values_without_and_a_sum_with_gradient():
    ours, teacher, weights = head(0), draw(ROWS, CLASSES, seed=3), draw(1, ROWS, seed=4)
    total, values = chunked(lambda s, t, at: kl(s, t)[None], Projected(*ours), teacher, weights, 4)
    expected = kl(F.linear(*ours), teacher)
    torch.testing.assert_close(values[0], expected.detach(), rtol=1e-12, atol=1e-12)
    assert not values.requires_grad and total.requires_grad
    torch.testing.assert_close(total, (expected * weights[0]).sum(), rtol=1e-12, atol=1e-12)
    total.backward(retain_graph=True)
    first = ours[1].grad.clone()
    total.backward()
    torch.testing.assert_close(ours[1].grad, 2 * first)
    empty = chunked(lambda s, t, at: kl(s, t)[None], Projected(*ours)[:0], teacher[:0], weights[:, :0], 4)
    assert empty[0] == 0 and empty[1].shape == (1, 0)


def test_chunks_hold_no_more_rows_than_told():
    seen = []

    class Spy(Term):
        rowwise, needs_teacher = True, True

        def forward(self, student, teacher, batch):
            seen.append((tuple(student.logits.shape), tuple(teacher.logits.shape), len(batch.targets)))
            return student.logits.sum(-1) * batch.segment

    rows = SequenceBatch(
        torch.zeros(ROWS, 1), TARGETS, segment=torch.arange(ROWS), loss_mask=torch.ones(1, ROWS, dtype=torch.bool)
    )
    Objective({"spy": Spy()}, chunk_rows=5)(Outputs(Projected(*head(0))), Outputs(Projected(*head(5))), rows)
    assert [n for *_, n in seen] == [5, 5, 3] and all(s == t == (n, CLASSES) for s, t, n in seen)


def test_a_term_outside_an_objective_takes_projected_logits_too():
    ours, theirs = head(0), head(5)
    for term in (CrossEntropy(), KL(temperature=2), DKD(), LogitMSE()):
        expected = term(Outputs(F.linear(*ours)), Outputs(F.linear(*theirs)), batch())
        torch.testing.assert_close(term(Outputs(Projected(*ours)), Outputs(Projected(*theirs)), batch()), expected)


def test_a_row_term_that_answers_in_another_shape_is_refused():
    class Wrong(Term):
        rowwise, needs_teacher = True, False

        def forward(self, student, teacher, batch):
            return student.logits.sum(-1, keepdim=True)

    with pytest.raises(ValueError, match=r"Wrong returned \(4, 1\); accepted: one value per row, \(4,\)"):
        Objective({"w": Wrong()}, chunk_rows=4)(Outputs(Projected(*head(0))), None, batch())


def test_a_chunk_has_rows():
    with pytest.raises(UserError, match=r"loss\.chunk_rows: 0; accepted"):
        Objective({"kl": KL()}, chunk_rows=0)
