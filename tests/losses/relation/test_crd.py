"""CRD against its formula in float64, its memory, its draws, and a resume to the same bits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from helpers.tiny import FEW, checkpoint, curve, result, same, train, weights
from kdlab.errors import UserError
from kdlab.functional import Batch, Outputs, noise_contrast
from kdlab.losses import CRD, Objective
from kdlab.losses.relation.crd import UNKNOWN
from kdlab.models.vision.resnet import CifarResNet
from kdlab.training import checkpoints

torch.set_num_threads(1)
EXAMPLES = 12
KEYS = [0, 5, 2, 11]


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def outputs(s, t):
    return Outputs(torch.zeros(len(s), 2), {"a": s}), Outputs(torch.zeros(len(s), 2), {"b": t})


def batch(keys, targets=None):
    keys = torch.as_tensor(list(keys))
    targets = torch.arange(len(keys)) % 3 if targets is None else torch.as_tensor(targets)
    return Batch(torch.zeros(len(keys), 1), targets, torch.stack([keys, torch.zeros_like(keys)], 1))


def made(s, t, examples=EXAMPLES, **options):
    torch.manual_seed(0)
    term = CRD("a", "b", **{"negatives": 7, "dim": 5, "temperature": 0.5, **options})
    term.setup(torch.nn.Identity(), None, examples)
    term.prepare(*outputs(s, t))
    return term


def unit(x):
    return x / np.sqrt((x**2).sum(-1, keepdims=True))


def embedded(term, which, x):
    weight, bias = (p.detach().double().numpy() for p in term.maps[which].parameters())
    return unit(x @ weight.T + bias)


def paper(term, s, t, memory_s, memory_t, key, index, z):
    """Both directions of the loss, (rows,), pair by pair."""
    s, t = embedded(term, "student", s), embedded(term, "teacher", t)
    values = []
    for i in range(len(s)):
        total = 0.0
        for anchor, memory, norm in ((s[i], memory_t, z[0]), (t[i], memory_s, z[1])):
            noise_share = index.shape[1] / EXAMPLES

            def h(score, norm=norm, noise_share=noise_share):
                e = math.exp(score / term.temperature) / norm
                return e / (e + noise_share)

            total -= math.log(h(anchor @ memory[key[i]]))
            total -= sum(math.log(1 - h(anchor @ memory[j])) for j in index[i])
        values.append(total)
    return np.array(values)


def first_z(term, s, t, memory_s, memory_t, index):
    s, t = embedded(term, "student", s), embedded(term, "teacher", t)

    def mean(anchors, memory):
        scores = [
            math.exp(a @ memory[j] / term.temperature) for a, row in zip(anchors, index, strict=True) for j in row
        ]
        return sum(scores) / len(scores) * EXAMPLES

    return mean(s, memory_t), mean(t, memory_s)


@pytest.mark.parametrize("negatives", [1, 7, 100])
def test_the_papers_formula_and_its_gradient(negatives):
    s, t, rows = noise(4, 3).requires_grad_(), noise(4, 6, seed=1), batch(KEYS)
    term = made(s, t, negatives=negatives)
    memories = [m.double().numpy() for m in (term.student_memory, term.teacher_memory)]
    known = term.classes.index_copy(0, rows.example_id[:, 0], rows.targets)
    index = term._draw(0, rows.example_id[:, 0], known)[0].numpy()
    assert index.shape == (4, min(negatives, EXAMPLES - 1))
    wide_s, wide_t = s.detach().double().numpy(), t.double().numpy()
    z = first_z(term, wide_s, wide_t, *memories, index)
    got = term(*outputs(s, t), rows)
    np.testing.assert_allclose(got.detach().numpy(), paper(term, wide_s, wide_t, *memories, KEYS, index, z), rtol=2e-5)
    np.testing.assert_allclose(term.log_z.exp().numpy(), z, rtol=1e-5)
    got.sum().backward()
    grad, step = np.zeros_like(wide_s), 1e-6
    for at in np.ndindex(*wide_s.shape):
        up, down = wide_s.copy(), wide_s.copy()
        up[at] += step
        down[at] -= step
        gap = paper(term, up, wide_t, *memories, KEYS, index, z) - paper(term, down, wide_t, *memories, KEYS, index, z)
        grad[at] = gap.sum() / (2 * step)
    np.testing.assert_allclose(s.grad.numpy(), grad, rtol=1e-3, atol=1e-5)
    assert all(p.grad.abs().sum() > 0 for p in term.parameters())
    again = term(*outputs(s, t), rows)  # another step: other draws, the same Z
    index = term._draw(1, rows.example_id[:, 0], known)[0].numpy()
    moved = [m.double().numpy() for m in _memories_before(term, s, t, rows)]
    np.testing.assert_allclose(again.detach().numpy(), paper(term, wide_s, wide_t, *moved, KEYS, index, z), rtol=2e-5)


def _memories_before(term, s, t, rows):
    """The memories as one step left them, made anew."""
    fresh = made(s.detach(), t, negatives=term.negatives)
    fresh.maps.load_state_dict(term.maps.state_dict())
    fresh(*outputs(s.detach(), t), rows)
    return fresh.student_memory, fresh.teacher_memory


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_the_memory_moves_towards_what_was_seen(momentum):
    s, t, rows = noise(3, 3), noise(3, 6, seed=1), batch([7, 0, 7])  # two views of one example: the later counts
    term = made(s, t, momentum=momentum)
    before = [m.double().numpy().copy() for m in (term.student_memory, term.teacher_memory)]
    np.testing.assert_allclose(np.linalg.norm(before[0], axis=1), 1, rtol=1e-6)
    term(*outputs(s, t), rows)
    for old, new, which, x in zip(
        before, (term.student_memory, term.teacher_memory), ("student", "teacher"), (s, t), strict=True
    ):
        seen, new = embedded(term, which, x.double().numpy()), new.double().numpy()
        np.testing.assert_allclose(new[7], unit(momentum * old[7] + (1 - momentum) * seen[2]), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(new[0], unit(momentum * old[0] + (1 - momentum) * seen[1]), rtol=1e-4, atol=1e-6)
        others = [i for i in range(EXAMPLES) if i not in (0, 7)]
        assert (new[others] == old[others]).all()


@pytest.mark.parametrize("look", ["eval", "no_grad"])
def test_a_look_changes_nothing(look):
    s, t = noise(3, 3), noise(3, 6)
    term = made(s, t)
    before = {k: v.clone() for k, v in term.state_dict().items()}
    if look == "eval":
        term.eval()(*outputs(s, t), batch([0, 1, 2]))
    else:
        with torch.no_grad():
            term(*outputs(s, t), batch([0, 1, 2]))
    assert same(term.state_dict(), before)
    term.train()(*outputs(s, t), batch([0, 1, 2]))
    assert int(term.step) == 1 and term.classes.tolist() == [0, 1, 2] + [UNKNOWN] * 9


def test_draws_are_even_over_other_classes_and_a_function_of_seed_and_step():
    s = noise(4, 3)
    classes = torch.tensor([0, 1, 2, 0, 1, 2, 0, UNKNOWN, 1, UNKNOWN, 0, 2])
    key = torch.tensor([0, 4, 7, 11])
    term = made(s, s)
    term.negatives = EXAMPLES - 1
    count = torch.zeros(4, EXAMPLES)
    for step in range(600):
        index, drawn = term._draw(step, key, classes)
        assert drawn.all() and torch.equal(index, term._draw(step, key, classes)[0])
        count += torch.nn.functional.one_hot(index, EXAMPLES).sum(1)
    for row, example in enumerate(key.tolist()):
        own = classes[example]
        allowed = torch.arange(EXAMPLES) != example if own == UNKNOWN else classes != own
        assert (count[row][~allowed] == 0).all()
        expected = 600 * (EXAMPLES - 1) / int(allowed.sum())
        assert ((count[row][allowed] - expected).abs() < 5 * expected**0.5).all()
    assert not torch.equal(term._draw(0, key, classes)[0], term._draw(1, key, classes)[0])
    other = made(s, s, seed=1, negatives=11)
    assert not torch.equal(term._draw(0, key, classes)[0], other._draw(0, key, classes)[0])
    assert not torch.equal(term.student_memory, other.student_memory)


def test_both_ways_to_score_agree():
    s, t = noise(3, 4), noise(3, 4, seed=1)
    few, many = made(s, t, examples=50, negatives=2, dim=5), made(s, t, examples=50, negatives=20, dim=5)
    index = torch.randint(50, (3, 20), generator=torch.Generator().manual_seed(0))
    drawn = torch.tensor([[True], [True], [False]])
    anchors = noise(3, 5)
    dense = many._scores(anchors, few.teacher_memory, index, drawn)
    picked = torch.cat(
        [few._scores(anchors, few.teacher_memory, index[:, i : i + 2], drawn) for i in range(0, 20, 2)], 1
    )
    torch.testing.assert_close(dense, picked)
    assert (dense[2] == -math.inf).all()


def test_rows_without_a_label_soft_targets_one_row_and_one_class():
    s, t = noise(4, 3).requires_grad_(), noise(4, 6)
    soft = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    for targets in (torch.full((4,), -100), soft, torch.zeros(4, dtype=torch.int64)):
        term = made(s, t, examples=4)  # where all are of one class, nothing is left to draw
        for _ in range(2):
            got = term(*outputs(s, t), batch([0, 1, 2, 3], targets))
            assert got.shape == (4,) and got.isfinite().all()
            (grad,) = torch.autograd.grad(got.sum(), s)
            assert grad.isfinite().all()
        assert term.log_z.isfinite().all()
        if targets is soft:
            assert term.classes.tolist() == [0, 1, UNKNOWN, 2]
    one = made(s, t)(*outputs(s[:1], t[:1]), batch([3]))
    assert one.shape == (1,) and one.isfinite().all()
    zero = torch.zeros(2, 3, requires_grad=True)
    term = made(zero, t[:2])
    torch.nn.init.zeros_(term.maps["student"].bias)
    term(*outputs(zero, t[:2]), batch([0, 1])).sum().backward()
    assert zero.grad.isfinite().all() and zero.grad.abs().max() < 100


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast(dtype):
    s, t, rows = noise(4, 3).to(dtype), noise(4, 2, 2, 2).to(dtype), batch([0, 1, 2, 3])
    expected = made(s, t)(*outputs(s.float(), t.float()), rows)
    torch.testing.assert_close(made(s, t)(*outputs(s, t), rows), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(made(s, t)(*outputs(s, t), rows), expected)


def test_noise_contrast_is_least_where_pairs_are_told_apart():
    c = torch.tensor(2.0)
    assert noise_contrast(torch.tensor([90.0]), torch.tensor([[-90.0, -math.inf]]), c).abs().max() < 1e-6
    even = noise_contrast(torch.tensor([2.0]), torch.tensor([[2.0, 2.0]]), c)
    assert even.item() == pytest.approx(3 * math.log(2), rel=1e-6)


def test_prepare_twice_keeps_maps_and_memory_and_a_checkpoint_holds_both():
    s, t = noise(4, 3), noise(4, 6)
    term = made(s, t)
    objective = Objective({"crd": term})
    objective(*outputs(s, t), batch([0, 1, 2, 3]))
    held = {k: v.clone() for k, v in objective.state_dict().items()}
    assert {k.removeprefix("terms.crd.") for k in held} == {
        "student_memory", "teacher_memory", "classes", "log_z", "step",
        "maps.student.weight", "maps.student.bias", "maps.teacher.weight", "maps.teacher.bias",
    }  # fmt: skip
    objective.setup(torch.nn.Identity(), None, EXAMPLES)
    objective.prepare(*outputs(s, t))
    assert same(objective.state_dict(), held)
    other = Objective({"crd": made(s, t, seed=0)})
    other.load_state_dict(held)
    for step in range(3):
        rows = batch([step, 4 + step, 8, 9])
        assert torch.equal(other(*outputs(s, t), rows).total, objective(*outputs(s, t), rows).total)
    assert same(other.state_dict(), objective.state_dict())


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (lambda s, t: CRD("a", "b", negatives=0), "negatives: 0"),
        (lambda s, t: CRD("a", "b", dim=1.5), "dim: 1.5"),
        (lambda s, t: CRD("a", "b", temperature=0), "temperature: 0"),
        (lambda s, t: CRD("a", "b", momentum=1.0), "momentum: 1.0"),
        (lambda s, t: CRD(["a", "a"], ["b", "b"]), "student_layer, teacher_layer: 2 pairs"),
        (lambda s, t: made(s, t, examples=None), "examples: None"),
        (lambda s, t: made(s, t, examples=1), "examples: 1"),
        (lambda s, t: CRD("a", "b")(*outputs(s, t), batch([0, 1])), "prepare"),
        (lambda s, t: made(s, t)(*outputs(s, t), batch([0, EXAMPLES])), "key: example 12 of 12"),
        (lambda s, t: made(s, t)(*outputs(s, t), Batch(s, torch.tensor([0, 1]))), "key: None"),
        (
            lambda s, t: made(s, t)(*outputs(s, t), Batch(s, torch.zeros(3), batch([0, 1]).example_id)),
            "key: 2 for 3 rows",
        ),
    ],
)
def test_mistakes_are_one_line(act, says):
    with pytest.raises(UserError) as caught:
        act(noise(2, 3), noise(2, 4))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_steps_tell_examples_apart():
    t = noise(EXAMPLES, 6, seed=1)
    net = torch.nn.Linear(4, 3)
    x = noise(EXAMPLES, 4)
    term = made(net(x), t, negatives=11)
    optimizer = torch.optim.SGD([*net.parameters(), *term.parameters()], lr=0.1)
    found = []
    for _ in range(60):
        loss = term(*outputs(net(x), t), batch(range(EXAMPLES))).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    assert np.mean(found[-5:]) < 0.9 * np.mean(found[:5]), found


# ---- training --------------------------------------------------------------------------------------------------------

RECIPE = ("experiment=kd_resnet", "loss=crd", "baseline=false", "optimizer.lr=0.02", *FEW)


def test_interrupted_and_resumed_it_ends_with_the_same_weights_and_memory(place, monkeypatch):
    words = (*RECIPE, "epochs=2")
    whole = train(place, "crd_whole", *words)
    state = checkpoint(whole)["state_dict"]
    memory, seen, step = (state[f"objective.terms.crd.{name}"] for name in ("student_memory", "classes", "step"))
    assert memory.shape == (len(seen), 128) and (seen >= 0).all() and int(step) == result(whole)["steps"]
    points = curve(whole, "train/crd")
    assert np.isfinite(points).all()
    assert weights(whole).keys() == CifarResNet(8, 4, in_channels=1).state_dict().keys(), "the maps are not exported"

    plain = checkpoints.Saver.on_train_epoch_end

    def fail(self, trainer, module):
        plain(self, trainer, module)
        if trainer.current_epoch == 0 and trainer.max_epochs == 2:
            raise RuntimeError("the machine is gone")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints.Saver, "on_train_epoch_end", fail)
        half = train(place, "crd_half", *words, status=1)
    assert not same(checkpoint(half)["state_dict"], state)
    again = train(place, "crd_half", *words, f"resume={half}")
    assert again == half
    assert same(checkpoint(again)["state_dict"], state)
    assert same(weights(again), weights(whole))
    assert curve(again, "train/crd") == curve(whole, "train/crd")
