"""Terms by which networks teach themselves and each other, against the papers' formulas in float64."""

import copy

import numpy as np
import pytest
import torch

from helpers.tiny import curve, train
from kdlab.errors import UserError
from kdlab.functional import Batch, Outputs
from kdlab.losses import CSKD, DLB, ExitsCE, ExitsHint, ExitsKL, MutualKL, Objective, PeersCE

ROWS, CLASSES, WIDTH = 6, 5, 4
TARGETS = torch.tensor([0, 3, -100, 4, 1, 3])
PARTNER = torch.tensor([1, 0, -1, 4, 3, -1])


def drawn(*names, dtype=torch.float64):
    """Student logits, and heads of these names, with gradients."""
    generator = torch.Generator().manual_seed(7)
    made = {}
    for name in ("logits", *names):
        width = WIDTH if "feature" in name else CLASSES
        made[name] = (3 * torch.randn(ROWS, width, generator=generator, dtype=torch.float64)).to(dtype)
        made[name].requires_grad_(True)
    return made


def outputs(made):
    return Outputs(made["logits"], heads={k: v for k, v in made.items() if k != "logits"})


def batch(**more):
    return Batch(torch.zeros(ROWS, 1), TARGETS, **more)


def softmax(z, t):
    e = np.exp(z / t - (z / t).max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def np_kl(teacher, student, t):
    p, q = softmax(teacher, t), softmax(student, t)
    return t * t * (p * (np.log(p) - np.log(q))).sum(-1)


def np_ce(z):
    known = TARGETS.numpy() >= 0
    picked = softmax(z, 1)[np.arange(ROWS), TARGETS.clamp(min=0).numpy()]
    return np.where(known, -np.log(picked), 0.0)


PEERS, EXITS = ("peer1", "peer2"), ("feature", "exit1", "exit1_feature", "exit2", "exit2_feature")


def ref_mutual(z, fixed):
    names = ("logits", *PEERS)
    return sum(np_kl(fixed[b], z[a], 2.0) / 2 for a in names for b in names if a != b)


def ref_partner(z, fixed):
    other = PARTNER.clamp(min=0).numpy()
    return np.where(PARTNER.numpy() >= 0, np_kl(fixed["logits"][other], z["logits"], 4.0), 0.0)


CASES = {
    "peers": (PeersCE(), PEERS, lambda z, fixed: np_ce(z["peer1"]) + np_ce(z["peer2"])),
    "mutual": (MutualKL(temperature=2.0), PEERS, ref_mutual),
    "exits": (ExitsCE(), EXITS, lambda z, fixed: np_ce(z["exit1"]) + np_ce(z["exit2"])),
    "exits_kl": (
        ExitsKL(temperature=3.0),
        EXITS,
        lambda z, fixed: sum(np_kl(fixed["logits"], z[name], 3.0) for name in ("exit1", "exit2")),
    ),
    "exits_hint": (
        ExitsHint(),
        EXITS,
        lambda z, fixed: sum(((z[f"exit{n}_feature"] - fixed["feature"]) ** 2).mean(-1) for n in (1, 2)),
    ),
    "partner": (CSKD(temperature=4.0), (), ref_partner),
}
"""Term, the heads it needs, and its reference: of outputs that move, and of the same as fixed targets."""


def said(term, made, **more):
    """What a term says of rows that it counts; 0 for the others, as the objective has it."""
    value = term(outputs(made), None, batch(partner=PARTNER, **more))
    counts = {"labelled": TARGETS >= 0, "all": TARGETS == TARGETS, "partnered": PARTNER >= 0}[term.rows]
    return torch.where(counts, value, 0.0)


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_are_the_formulas(name):
    term, heads, reference = CASES[name]
    made = drawn(*heads)
    value = said(term, made)
    fixed = {k: v.detach().numpy() for k, v in made.items()}
    assert np.allclose(value.detach().numpy(), reference(fixed, fixed), atol=1e-12)
    weights = torch.linspace(0.5, 2, ROWS, dtype=torch.float64)
    (value * weights).sum().backward()
    step = 1e-6
    for key, tensor in made.items():
        found = np.zeros(tensor.shape) if tensor.grad is None else tensor.grad.numpy()
        for at in np.ndindex(*tensor.shape):
            ends = []
            for sign in (1, -1):
                moved = {k: v.copy() for k, v in fixed.items()}
                moved[key][at] += sign * step
                ends.append((reference(moved, fixed) * weights.numpy()).sum())
            assert found[at] == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=1e-6), (key, at)


@pytest.mark.parametrize("name", ["mutual", "exits_kl", "exits_hint", "partner"])
def test_equals_agree(name):
    term, heads, _ = CASES[name]
    made = drawn(*heads)
    one = made["logits"].detach()[:1].expand(ROWS, -1)
    same = {k: made["feature"].detach() if "feature" in k else one for k in made}
    assert said(term, same).abs().max() < 1e-12


@pytest.mark.parametrize("kind", [MutualKL, ExitsKL, CSKD])
def test_a_great_temperature_leaves_the_gradient_its_size(kind):
    grads = []
    for t in (50.0, 500.0):
        made = drawn(*PEERS, *EXITS)
        said(kind(temperature=t), made).sum().backward()
        grads.append(torch.cat([v.grad.flatten() for v in made.values() if v.grad is not None]))
    assert float((grads[0] - grads[1]).norm() / grads[1].norm()) < 0.05 and float(grads[1].norm()) > 0.1


@pytest.mark.parametrize("name", CASES)
def test_half_precision_is_finite_and_close(name):
    term, heads, _ = CASES[name]
    exact = said(term, drawn(*heads))
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16):
            value = said(term, drawn(*heads, dtype=dtype))
        assert value.dtype == torch.float32 and value.isfinite().all()
        assert torch.allclose(value.double(), exact, rtol=0.1, atol=0.1)


def test_soft_targets_are_targets():
    made = drawn(*PEERS, *EXITS)
    hard = Batch(torch.zeros(ROWS, 1), TARGETS.clamp(min=0))
    soft = Batch(torch.zeros(ROWS, 1), torch.nn.functional.one_hot(hard.targets, CLASSES).double())
    for term in (PeersCE(), ExitsCE()):
        assert torch.allclose(term(outputs(made), None, hard), term(outputs(made), None, soft))


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (PeersCE(), "auxiliary=peers"),
        (MutualKL(), "auxiliary=peers"),
        (ExitsKL(), "auxiliary=exits"),
        (ExitsHint(), "auxiliary=exits"),
        (CSKD(), "data.pairing=same_class"),
        (DLB(), "Batch.example_id"),
    ],
)
def test_what_is_missing_is_said(term, message):
    with pytest.raises(UserError, match=message):
        term(outputs(drawn()), None, batch())


# ---- the step before


def step_of(examples, seed):
    logits = 3 * torch.randn(len(examples), CLASSES, generator=torch.Generator().manual_seed(seed))
    keys = torch.tensor([[example, 0] for example in examples])
    return logits.requires_grad_(True), Batch(
        torch.zeros(len(examples), 1), torch.zeros(len(examples)).long(), example_id=keys
    )


def test_a_row_agrees_with_what_was_said_of_it_a_step_before():
    term = DLB(temperature=3.0)
    first, shown = step_of([7, 8, 9, 4], 0)
    value = term(Outputs(first), None, shown)
    assert (value == 0).all()
    value.sum().backward()
    second, shown = step_of([9, 4, 1, 2], 1)
    value = term(Outputs(second), None, shown)
    then = first.detach().double().numpy()[[2, 3]]
    expected = np_kl(then, second.detach().double().numpy()[:2], 3.0)
    assert np.allclose(value.detach().numpy()[:2], expected, rtol=1e-5) and (value[2:] == 0).all()
    value.sum().backward()
    assert second.grad[:2].abs().sum() > 0 and second.grad[2:].abs().sum() == 0
    third, shown = step_of([7, 8, 1, 2], 2)  # 7 and 8 are two steps ago
    value = term(Outputs(third), None, shown)
    assert (value[:2] == 0).all() and (value[2:] > 0).all()


def test_its_memory_goes_with_a_checkpoint_and_holds_one_step_however_split():
    whole, split = DLB(), DLB()
    for n, examples in enumerate(([1, 2, 3, 4], [3, 4, 5, 6], [5, 6, 7, 8])):
        logits, shown = step_of(examples, n)
        once = whole(Outputs(logits), None, shown)
        twice = []
        for rows in (slice(0, 2), slice(2, 4)):
            window = shown.count()._replace(parts=2)
            part = Batch(shown.inputs[rows], shown.targets[rows], example_id=shown.example_id[rows], window=window)
            twice.append(split(Outputs(logits[rows]), None, part))
        assert torch.allclose(once, torch.cat(twice))
        fresh = DLB()
        fresh.load_state_dict(copy.deepcopy(whole.state_dict()))
        whole = fresh
    assert whole.examples.tolist() == split.examples.tolist() == [5, 6, 7, 8]


def test_a_look_at_it_changes_nothing_and_its_first_step_stands_a_masked_class():
    term = DLB()
    logits, shown = step_of([1, 2], 0)
    masked = logits.detach().index_fill(1, torch.tensor([0]), -torch.inf).requires_grad_(True)
    with torch.no_grad():
        term(Outputs(logits), None, shown)
    term.eval()(Outputs(logits), None, shown)
    assert not len(term.examples)
    value = term.train()(Outputs(masked), None, shown)
    value.sum().backward()
    assert (value == 0).all() and (masked.grad == 0).all() and term.examples.tolist() == [1, 2]


def test_partners_count_alone():
    made = drawn()
    objective = Objective({"class_wise": CSKD(temperature=4.0)})
    found = objective(outputs(made), None, batch(partner=PARTNER))
    fixed = {k: v.detach().numpy() for k, v in made.items()}
    assert float(found.total.detach()) == pytest.approx(ref_partner(fixed, fixed).sum() / 4)


@pytest.mark.parametrize(
    ("name", "term"), [("mutual", "mutual"), ("be_your_own_teacher", "exits_kl"), ("cs_kd", "class_wise")]
)
def test_its_curve_falls(place, name, term):
    words = ("student=mlp", "baseline=false", "epochs=6", "data.fraction=0.3", "optimizer.lr=0.05")
    found = curve(train(place, f"falls_{name}", f"experiment={name}", *words), f"train/{term}")
    assert np.isfinite(found).all() and np.mean(found[-5:]) < max(found)
