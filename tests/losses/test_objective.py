"""The objective: roles and alpha, schedules, exactness under every split, errors."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from kdlab.errors import UserError
from kdlab.functional import Batch, Outputs, StepTotals
from kdlab.losses import (
    DKD,
    KL,
    AttentionTransfer,
    CrossEntropy,
    Hint,
    LabelTerm,
    LearnedTemperature,
    LogitMSE,
    Objective,
    Temperature,
    Term,
)

torch.set_num_threads(1)
C = 5


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Norms(Term):
    """A scalar term: a mean over the rows it saw, with the batch's weights."""

    needs_teacher = False

    def forward(self, student, teacher, batch):
        norms = student.logits.square().sum(-1)
        weight = torch.ones_like(norms) if batch.weight is None else batch.weight
        return (weight * norms).sum() / weight.sum()


class LabelledNorms(LabelTerm):
    """A scalar term over the labelled rows."""

    def forward(self, student, teacher, batch):
        kept = student.logits.square().sum(-1)[batch.labelled]
        return kept.mean() if len(kept) else student.logits.sum() * 0


class Fixed(Term):
    """Answers with what it was given."""

    def __init__(self, answer, needs_teacher=False, role="other", rows="all", **given):
        super().__init__(**given)
        self.answer, self.needs_teacher, self.role, self.rows = answer, needs_teacher, role, rows

    def forward(self, student, teacher, batch):
        return self.answer + 0 * student.logits.sum(-1) if self.answer.ndim else self.answer


def outputs(rows=8, seed=0, dtype=torch.float64):
    s = draw(rows, C, seed=seed).to(dtype).requires_grad_()
    return Outputs(s), Outputs(draw(rows, C, seed=seed + 1).to(dtype))


def simple(rows=4, targets=None, **more):
    targets = torch.arange(rows) % C if targets is None else torch.as_tensor(targets)
    return Batch(torch.zeros(rows, 1), targets, **more)


# ---- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_alpha_weighs_distillation(alpha):
    value = torch.tensor([1.0])
    roles = {"label": Fixed(value, role="label", weight=2), "soft": Fixed(value, True, "soft", weight=3)}
    objective = Objective({**roles, "other": Fixed(value, True, weight=5)}, alpha=alpha)
    assert objective.weights() == pytest.approx([2 * (1 - alpha), 3 * alpha, 5])
    assert objective.weights(has_teacher=False) == [2, 0, 5]
    student, teacher = outputs(1)
    losses = objective(student, teacher, simple(1))
    assert losses.total.item() == pytest.approx(2 * (1 - alpha) + 3 * alpha + 5)
    assert losses.values.tolist() == [1, 1, 1]  # the curves are unweighted, and shown at weight 0 too
    assert objective(student, None, simple(1)).total.item() == 2  # labels alone, with nothing of alpha left
    assert objective(student, None, simple(1)).values.tolist() == [1, 0, 0]


def test_a_recipe_without_alpha_weighs_each_term_as_it_says():
    objective = Objective({"ce": CrossEntropy(), "dkd": DKD(weight=0.5), "kl": KL(weight=3)})
    assert objective.weights() == [1, 0.5, 3] == objective.weights(False)


def test_alpha_weighs_the_real_terms():
    student, teacher = outputs(4)
    batch = simple(4)
    ce, kl = CrossEntropy()(student, teacher, batch).mean(), KL(temperature=4)(student, teacher, batch).mean()
    objective = Objective({"ce": CrossEntropy(), "kl": KL()}, temperature=4, alpha=0.9)
    assert objective(student, teacher, batch).total.item() == pytest.approx(float((0.1 * ce + 0.9 * kl).detach()))
    assert objective(student, None, batch).total.item() == pytest.approx(float(ce.detach()))


def test_schedules_follow_progress():
    objective = Objective(
        {"ce": CrossEntropy(), "kl": KL(weight={"start": 0, "end": 10}), "own": KL(temperature={"start": 2, "end": 1})},
        temperature={"start": 8, "end": 4},
        alpha={"start": 0.0, "end": 1.0, "shape": "cosine"},
    )
    student, teacher = outputs(4)
    for progress in (0.0, 0.25, 1.0):
        objective.progress = progress
        assert objective.progress == progress
        alpha, now = (1 - math.cos(math.pi * progress)) / 2, 8 - 4 * progress
        assert objective.weights() == pytest.approx([1 - alpha, alpha * 10 * progress, alpha])
        assert objective.temperature.now == now
        parts = [KL(temperature=now), KL(temperature=2 - progress)]
        expected = [float(term(student, teacher, simple()).mean().detach()) for term in parts]
        assert objective(student, teacher, simple()).values[1:].tolist() == pytest.approx(expected, rel=1e-5)


def test_a_terms_own_temperature_stays_and_t_squared_comes_once():
    shared, own = KL(), KL(temperature=2)
    learned = LearnedTemperature(start=3.0)
    third = KL(temperature=learned)
    objective = Objective({"shared": shared, "own": own, "third": third, "mse": LogitMSE()}, temperature=6)
    assert shared.temperature is objective.temperature and shared.temperature.now == 6
    assert own.temperature.now == 2 and third.temperature is learned
    student, teacher = outputs(4)
    values = objective(student, teacher, simple()).values
    s, t = student.logits.detach().numpy(), teacher.logits.numpy()
    for got, now in zip(values.tolist(), (6, 2, 3), strict=False):
        q, p = (np.exp(z / now) / np.exp(z / now).sum(-1, keepdims=True) for z in (s, t))
        assert got == pytest.approx(now**2 * (p * np.log(p / q)).sum(-1).mean(), rel=1e-5)
    assert values[3].item() == pytest.approx(((s - t) ** 2).mean(), rel=1e-5)
    assert Objective({"kl": KL()}, temperature=Temperature(5)).temperature.now == 5


# ---- exact under splits ----------------------------------------------------------------------------------------------


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(3, 4, dtype=torch.float64), nn.Linear(4, C, dtype=torch.float64)

    def forward(self, x):
        feature = self.body(x).tanh()
        return Outputs(self.head(feature), {"body": feature})


HARD = torch.tensor([1, -100, 0, -100, -100, 4, 2, -100])
SOFT = torch.softmax(draw(8, C, seed=9), -1) * (HARD >= 0)[:, None]
SPLITS = {
    "4x2": [0, 2, 4, 6, 8],
    "halves": [0, 4, 8],
    "ragged": [0, 1, 6, 8],  # the first part has one labelled row, the second two, the third one
    "single rows": list(range(9)),
    "a part without labels": [0, 3, 5, 8],
}


@pytest.mark.parametrize("targets", [HARD, SOFT], ids=["hard", "soft"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("split", SPLITS)
def test_gradients_do_not_depend_on_the_split(split, weighted, targets):
    torch.manual_seed(0)
    student = Student()
    x, teacher = draw(8, 3), Outputs(draw(8, C, seed=1), {"t": draw(8, 6, seed=2)})
    weight = torch.tensor([1.0, 0.5, 2.0, 0.0, 3.0, 0.25, 1.0, 1.0], dtype=torch.float64) if weighted else None
    terms = {"ce": CrossEntropy(0.1, weight=0.7), "kl": KL(), "dkd": DKD(weight=0.1), "hint": Hint("body", "t")}
    objective = Objective({**terms, "scalar": Norms(weight=0.01)}, temperature=3, alpha=0.6)
    objective.prepare(student(x), teacher)
    objective.double()
    whole = Batch(x, targets, weight=weight)
    window = whole.count()
    trained = [*student.parameters(), *objective.parameters()]

    def run(edges):
        for p in trained:
            p.grad = None
        values, total = torch.zeros(len(objective.names)), 0.0
        parts = len(edges) - 1
        for a, b in itertools.pairwise(edges):
            if weight is not None and not weight[a:b].sum():
                continue  # Norms has no mean over nothing; such a part adds nothing
            part = Batch(x[a:b], targets[a:b], weight=None if weight is None else weight[a:b])
            part.window = replace_parts(window, parts)
            said = Outputs(teacher.logits[a:b], {"t": teacher.features["t"][a:b]})
            losses = objective(student(part.inputs), said, part)
            (losses.total / parts).backward()  # as Lightning's accumulation does
            values += losses.values
            total += float(losses.total.detach()) / parts
        return values, total, [p.grad.clone() for p in trained]

    (values, total, grads), (one_values, one_total, one_grads) = run(SPLITS[split]), run([0, 8])
    assert total == pytest.approx(one_total, rel=1e-9)
    torch.testing.assert_close(values, one_values, rtol=1e-5, atol=1e-6)
    for got, expected in zip(grads, one_grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)

    # and the whole is the weighted mean that the formula says
    w = torch.ones(8, dtype=torch.float64) if weight is None else weight
    said, labelled = student(x), whole.labelled
    rows = {n: t(said, teacher, whole).detach() for n, t in objective.terms.items() if n != "scalar"}
    means = {n: (w * v)[labelled].sum() / w[labelled].sum() for n, v in rows.items() if n in ("ce", "dkd")}
    means |= {n: (w * v).sum() / w.sum() for n, v in rows.items() if n in ("kl", "hint")}
    means["scalar"] = (w * said.logits.detach().square().sum(-1)).sum() / w.sum()
    factors = {"ce": 0.4 * 0.7, "kl": 0.6, "dkd": 0.1, "hint": 1.0, "scalar": 0.01}
    assert one_total == pytest.approx(float(sum(factors[n] * means[n] for n in factors)), rel=1e-6)
    assert one_values.tolist() == pytest.approx([float(means[n]) for n in objective.names], rel=1e-4)


def replace_parts(window, parts):
    return StepTotals(window.labelled, window.rows, parts)


def test_a_scalar_term_over_labelled_rows_counts_by_labelled_rows():
    objective = Objective({"n": LabelledNorms()})
    student, _ = outputs(8)
    batch = simple(8, HARD)
    whole = objective(student, None, batch).values
    shares = torch.zeros(1)
    for a, b in itertools.pairwise(SPLITS["ragged"]):
        part = simple(b - a, HARD[a:b], window=batch.count())
        shares += objective(Outputs(student.logits[a:b]), None, part).values
    torch.testing.assert_close(shares, whole)


def test_rows_that_a_filter_drops_stay_in_the_count():
    student, teacher = outputs(4)
    keep = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    batch = replace(simple(4), weight=keep, window=StepTotals(4.0, 4.0))
    value = KL()(student, teacher, batch)[0] / 4
    assert Objective({"kl": KL()})(student, teacher, batch).total.item() == pytest.approx(float(value.detach()))


# ---- edges -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("targets", [torch.full((3,), -100), torch.zeros(3, C)], ids=["hard", "soft"])
def test_without_a_label_nothing_is_learned_from_labels(targets, smoothing):
    student, teacher = outputs(3)
    objective = Objective({"ce": CrossEntropy(smoothing), "dkd": DKD()})
    losses = objective(student, teacher, simple(3, targets))
    losses.total.backward()
    assert losses.total.item() == 0 and losses.values.tolist() == [0, 0]
    assert (student.logits.grad == 0).all()


def test_an_unlabelled_row_of_infinite_loss_is_left_out():
    objective = Objective({"f": Fixed(torch.tensor([2.0, math.inf, math.nan, 4.0]), role="label", rows="labelled")})
    student, _ = outputs(4)
    assert objective(student, None, simple(4, [0, -100, -100, 1])).total.item() == 3


def test_weights_of_zero_keep_the_graph_even_with_masked_classes():
    s = torch.tensor([[1.0, 2.0, -math.inf]], requires_grad=True)
    batch = simple(1)
    for terms, teacher in (({"ce": CrossEntropy()}, Outputs(s.detach())), ({"kl": KL()}, None)):
        s.grad = None
        losses = Objective(terms, alpha=1.0)(Outputs(s), teacher, batch)
        losses.total.backward()
        assert losses.total.item() == 0 and (s.grad == 0).all() and losses.values.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    student, teacher = outputs(8, dtype=dtype)
    batch = simple(8, HARD)
    objective = Objective({"ce": CrossEntropy(), "kl": KL(), "dkd": DKD()}, temperature=4, alpha=0.5)
    losses = objective(student, teacher, batch)
    assert losses.total.dtype == losses.values.dtype == torch.float32
    wide = objective(Outputs(student.logits.float()), Outputs(teacher.logits.float()), batch)
    torch.testing.assert_close(losses.total, wide.total, rtol=1e-6, atol=1e-6)
    losses.total.backward()
    assert student.logits.grad.dtype == dtype and student.logits.grad.isfinite().all()


@pytest.mark.parametrize(
    "make",
    [
        CrossEntropy,
        lambda: KL(temperature=4),
        LogitMSE,
        DKD,
        lambda: Hint("f", "f"),
        lambda: AttentionTransfer("f", "f", weight=1000),
    ],
    ids=["ce", "kl", "mse", "dkd", "hint", "at"],
)
def test_steps_lower_the_objective(make):
    torch.manual_seed(0)
    body, head = nn.Conv2d(2, 3, 3, padding=1), nn.Linear(3, C)
    x = draw(16, 2, 4, 4).float()
    teacher = Outputs(draw(16, C, seed=1).float(), {"f": draw(16, 6, 2, 2, seed=2).float()})
    batch = Batch(x, torch.arange(16) % C)

    def student():
        f = body(x).tanh()
        return Outputs(head(f.mean((2, 3))), {"f": f})

    objective = Objective({"term": make()})
    objective.prepare(student(), teacher)
    optimizer = torch.optim.SGD([*body.parameters(), *head.parameters(), *objective.parameters()], lr=0.02)
    course = []
    for _ in range(6):
        optimizer.zero_grad()
        losses = objective(student(), teacher, batch)
        losses.total.backward()
        optimizer.step()
        course.append(losses.total.item())
    assert all(later < earlier for earlier, later in itertools.pairwise(course)), course


# ---- layers and state ------------------------------------------------------------------------------------------------


def test_projectors_belong_to_the_objective_once_prepared():
    objective = Objective({"ce": CrossEntropy(), "one": Hint("a", "b"), "two": Hint("a", "c")})
    assert objective.student_layers == ["a"] and objective.teacher_layers == ["b", "c"]
    assert objective.needs_teacher and not Objective({"ce": CrossEntropy()}).needs_teacher
    assert list(objective.parameters()) == []
    student = Outputs(torch.zeros(2, C), {"a": torch.zeros(2, 3)})
    objective.prepare(student, None)
    assert list(objective.parameters()) == []
    objective.prepare(student, Outputs(torch.zeros(2, C), {"b": torch.zeros(2, 4), "c": torch.zeros(2, 7)}))
    assert [tuple(p.shape) for p in objective.parameters()] == [(4, 3), (4,), (7, 3), (7,)]
    twin = copy.deepcopy(objective)
    twin.load_state_dict(objective.state_dict())
    assert twin.terms["one"].projectors[0] is not objective.terms["one"].projectors[0]
    with pytest.raises(UserError, match=r"loss\.terms\.one\.student_layer: no output of layer 'a'"):
        Objective({"one": Hint("a", "b")}).prepare(Outputs(torch.zeros(2, C)), Outputs(torch.zeros(2, C)))


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, C + 1), (4, 1), (C,), (3, C)])
def test_teacher_and_student_of_other_shapes(shape):
    student, _ = outputs(4)
    with pytest.raises(UserError, match="same number of classes") as caught:
        Objective({"ce": CrossEntropy()})(student, Outputs(torch.zeros(shape)), simple(4))
    assert str((4, C)) in str(caught.value) and str(shape) in str(caught.value)


@pytest.mark.parametrize("answer", [torch.zeros(4, 1), torch.zeros(1), torch.zeros(4, 4), torch.zeros(3)])
def test_a_term_that_does_not_answer_per_row_is_refused(answer):
    class Wrong(Term):
        needs_teacher = False

        def forward(self, student, teacher, batch):
            return answer

    student, _ = outputs(4)
    with pytest.raises(ValueError, match=r"Wrong returned .*one value per row"):
        Objective({"w": Wrong()})(student, None, simple(4))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Objective({}), "loss.terms: none"),
        (lambda: Objective({"ce": "kl"}), "loss.terms.ce: str"),
        (lambda: Objective({"ce": nn.Linear(1, 1)}), "loss.terms.ce: Linear"),
        (lambda: Objective({"a.b": KL()}), "loss.terms.a.b: "),
        (lambda: Objective({"values": KL()}), "loss.terms.values: "),
        (lambda: Objective({"kl": KL()}, alpha=1.5), "loss.alpha: 1.5; accepted: between 0 and 1"),
        (lambda: Objective({"kl": KL()}, alpha=-0.1), "loss.alpha: -0.1"),
        (lambda: Objective({"kl": KL()}, alpha=math.nan), "loss.alpha: nan"),
        (lambda: Objective({"kl": KL()}, alpha=math.inf), "loss.alpha: inf"),
        (lambda: Objective({"kl": KL()}, alpha=True), "loss.alpha: True"),
        (lambda: Objective({"kl": KL()}, alpha={"start": 0, "end": 2}), "loss.alpha: 2"),
        (lambda: Objective({"kl": KL()}, temperature=0), "loss.temperature: 0"),
        (lambda: Objective({"kl": KL()}, temperature="4"), "loss.temperature: '4'"),
        (lambda: Objective({"kl": KL()}, temperature={"start": 4}), "loss.temperature: {'start': 4}"),
        (lambda: Objective({"kl": KL(weight={"start": 1, "end": -1})}), "weight: -1"),
    ],
)
def test_mistakes_are_one_line_with_key_value_and_what_is_accepted(make, says):
    with pytest.raises(UserError) as caught:
        make()
    message = str(caught.value)
    assert message.startswith(says) and "\n" not in message and ("accepted" in message or "needs" in message)


def test_terms_meet_the_networks_and_a_mistake_names_its_term():
    seen = []

    class Meets(CrossEntropy):
        def setup(self, student, teacher, examples):
            seen.append((student, teacher, examples))
            if teacher is None:
                raise UserError("teacher", "none", "one")

    student, teacher = torch.nn.Linear(1, 2), torch.nn.Linear(2, 2)
    objective = Objective({"one": Meets()})
    objective.setup(student, teacher, 7)
    assert seen == [(student, teacher, 7)]
    with pytest.raises(UserError, match=r"^loss\.terms\.one\.teacher: none"):
        objective.setup(student, None, 7)
