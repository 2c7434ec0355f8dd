"""Hidden states by direction, and sorted probabilities of unlike vocabularies, against numbers worked out otherwise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import yaml

from helpers.paths import CONF
from helpers.text_cases import VOCAB, padded, sentences, tiny_gpt2
from kdlab.config.builder import build
from kdlab.errors import UserError
from kdlab.functional import Batch, Outputs, Projected, SequenceBatch, Sparse
from kdlab.losses import KL, ULD, CrossEntropy, HiddenCosine, Objective, ReverseKL
from kdlab.tasks import LanguageModeling

torch.set_num_threads(1)
FILES = CONF / "loss"


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows(count, **more):
    return Batch(torch.zeros(count, 1), torch.zeros(count, dtype=torch.int64), **more)


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


# ---- ULD -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("s", "t"), [(7, 7), (5, 9), (9, 5)])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_uld_by_hand(s, t, temperature):
    a, b = draw(4, s), draw(4, t, seed=1)
    expected = []
    for p, q in zip(softmax(a.numpy() / temperature), softmax(b.numpy() / temperature), strict=True):
        p, q = sorted(p, reverse=True), sorted(q, reverse=True)
        longest = max(len(p), len(q))
        p, q = p + [0.0] * (longest - len(p)), q + [0.0] * (longest - len(q))
        expected.append(temperature * sum(abs(x - y) for x, y in zip(p, q, strict=True)))
    found = ULD(temperature=temperature)(Outputs(a), Outputs(b), rows(4))
    assert found.tolist() == pytest.approx(expected, rel=1e-12)


def test_uld_looks_at_no_names():
    a = draw(3, 8).requires_grad_()
    shuffled = a.detach()[:, torch.randperm(8)]
    assert ULD()(Outputs(a), Outputs(shuffled), rows(3)).abs().max() < 1e-12
    assert torch.autograd.gradcheck(lambda z: ULD()(Outputs(z), Outputs(draw(3, 11, seed=4)), rows(3)), (a,))


def test_uld_leaves_out_rows_without_a_partner():
    a, b = draw(3, 5).requires_grad_(), draw(3, 6, seed=1)
    b[1] = torch.nan
    paired = torch.tensor([True, False, True])
    value = ULD()(Outputs(a), Outputs(b, heads={"paired": paired}), rows(3))
    assert value[1] == 0 and (value[paired] > 0).all()
    b[1] = 0
    ULD()(Outputs(a), Outputs(b, heads={"paired": paired}), rows(3)).sum().backward()
    assert (a.grad[1] == 0).all() and (a.grad[0] != 0).any()


def test_uld_in_chunks_is_the_same():
    hidden, weight = draw(13, 4).requires_grad_(), draw(9, 4, seed=1).requires_grad_()
    teacher, paired = draw(13, 6, seed=2), torch.arange(13) % 3 != 0
    found = []
    for chunked in (False, True):
        student = Projected(hidden, weight)
        objective = Objective({"ce": CrossEntropy(), "uld": ULD(weight=1.5)}, chunk_rows=4)
        answer = Outputs(teacher, heads={"paired": paired, "other": torch.zeros(2)})
        losses = objective(Outputs(student if chunked else student.dense()), answer, rows(13))
        found.append([losses.total, losses.values, *torch.autograd.grad(losses.total, [hidden, weight])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_uld_needs_all_probabilities():
    with pytest.raises(UserError, match="accepted by this loss: logits of all classes"):
        ULD()(Outputs(draw(3, 8)), Outputs(Sparse.of(draw(3, 8), 2)), rows(3))


# ---- unlike vocabularies ---------------------------------------------------------------------------------------------


def test_other_classes_are_refused_where_a_term_compares_them():
    student, teacher = Outputs(draw(4, 5).requires_grad_()), Outputs(draw(4, 7))
    objective = Objective({"ce": CrossEntropy(), "uld": ULD()})
    assert objective.vocabulary_agnostic
    assert objective(student, teacher, rows(4)).total.isfinite()
    mixed = Objective({"ce": CrossEntropy(), "uld": ULD(), "reverse": ReverseKL(weight=0.0)})
    assert not mixed.vocabulary_agnostic
    with pytest.raises(UserError) as caught:
        mixed(student, teacher, rows(4))
    for word in ("(4, 5)", "(4, 7)", "loss.terms.reverse", "the teacher's text", "data=traces", "loss=uld"):
        assert word in str(caught.value)
    with pytest.raises(UserError, match=r"\(3, 7\)"):
        objective(student, Outputs(draw(3, 7)), rows(4))


# ---- hidden states ---------------------------------------------------------------------------------------------------


def features(student, teacher):
    return Outputs(torch.zeros(1), {"a": student}), Outputs(torch.zeros(1), {"b": teacher})


def test_cosine_by_hand():
    s, t = draw(4, 6), draw(4, 6, seed=1)
    found = HiddenCosine("a", "b")(*features(s, t), rows(4))
    expected = [
        1 - float(x @ y) / float(np.sqrt(x @ x) * np.sqrt(y @ y)) for x, y in zip(s.numpy(), t.numpy(), strict=True)
    ]
    assert found.tolist() == pytest.approx(expected, rel=1e-12)
    assert HiddenCosine("a", "b")(*features(s, 3 * s), rows(4)).abs().max() < 1e-12
    assert HiddenCosine("a", "b")(*features(s, -s), rows(4)).tolist() == pytest.approx([2.0] * 4)
    half = HiddenCosine("a", "b")(*features(s.bfloat16(), t.bfloat16()), rows(4))
    assert half.dtype == torch.float32 and (half - found).abs().max() < 0.02


def test_cosine_of_positions_is_that_of_rows():
    where = torch.tensor([[True, False, True], [False, True, True]])
    s, t = draw(2, 3, 6), draw(2, 3, 6, seed=1)
    batch = SequenceBatch(torch.zeros(4, 1), torch.zeros(4, dtype=torch.int64), loss_mask=where)
    found = HiddenCosine("a", "b")(*features(s, t), batch)
    torch.testing.assert_close(found, HiddenCosine("a", "b")(*features(s[where], t[where]), batch))
    for shapes in [(2, 4, 6), (3, 6), (4, 6, 2, 2)]:
        with pytest.raises(UserError, match="accepted: one hidden state for each of the 4 rows"):
            HiddenCosine("a", "b")(*features(draw(*shapes), draw(*shapes)), batch)


def test_cosine_of_other_widths_trains_a_projector():
    term = HiddenCosine("a", "b")
    s, t = draw(4, 6).float().requires_grad_(), draw(4, 9).float()
    with pytest.raises(UserError, match="call prepare"):
        term(*features(s, t), rows(4))
    term.prepare(*features(s, t))
    made = term.projectors["0"]
    term.prepare(*features(s, t))
    assert term.projectors["0"] is made and made.weight.shape == (9, 6)
    term(*features(s, t), rows(4)).sum().backward()
    assert made.weight.grad.abs().sum() > 0 and s.grad.abs().sum() > 0
    same = HiddenCosine("a", "b")
    same.prepare(*features(s, s))
    assert not same.projectors
    with pytest.raises(UserError, match="accepted: hidden states"):
        HiddenCosine("a", "b").prepare(*features(draw(2, 3, 4, 4), draw(2, 3, 4, 4)))


# ---- recipes ---------------------------------------------------------------------------------------------------------


def recipe(name):
    terms = yaml.safe_load((FILES / f"{name}.yaml").read_text())["terms"]
    terms["ce"] = {"_target_": "kdlab.losses.CrossEntropy", **terms.get("ce", {})}
    return {key: build(spec, slot="term") for key, spec in terms.items()}


def test_distilgpt2_as_published():
    """5 · T² KL at T = 2, 2 · cross-entropy, 1 · cosine of the last hidden states, written out."""
    objective = Objective(recipe("distilgpt2"), temperature=7.0)
    assert dict(zip(objective.names, objective.weights(), strict=True)) == {"ce": 2.0, "kl": 5.0, "cosine": 1.0}
    student, teacher = tiny_gpt2(0), tiny_gpt2(1)
    batch, task = padded(sentences()), LanguageModeling(VOCAB)
    said = [task.outputs(net, batch, objective.student_layers) for net in (student, teacher)]
    found = objective(said[0], said[1].detach(), batch).total
    z, u = (each.logits.dense() for each in said)
    h, g = (net.net.transformer(**batch.inputs).last_hidden_state[batch.loss_mask] for net in (student, teacher))
    q, p = (z / 2).log_softmax(-1), (u / 2).log_softmax(-1)
    each = 5 * 4 * (p.exp() * (p - q)).sum(-1) - 2 * z.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
    each = each + 1 - (h * g).sum(-1) / (h.norm(dim=-1) * g.norm(dim=-1))
    assert found.item() == pytest.approx(float((each * batch.weight).sum().detach() / batch.weight.sum()), rel=1e-9)


def test_the_other_recipes():
    uld = recipe("uld")
    assert isinstance(uld["uld"], ULD) and Objective(uld, temperature=4.0).weights() == [1.5, 1.0]
    assert uld["uld"].temperature.now == 1 and Objective(uld).vocabulary_agnostic
    cosine = Objective(recipe("hidden_cosine"))
    assert cosine.student_layers == ["net.transformer.ln_f"] == cosine.teacher_layers
    assert not Objective({"kl": KL()}).vocabulary_agnostic
