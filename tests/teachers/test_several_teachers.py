"""Several teachers: how they are weighed, found, cached and reported, and what is refused."""

import math

import numpy as np
import pytest
import torch

from helpers.tiny import QUIET, curve, mistake, result, same, train, weights
from kdlab.cli.main import main
from kdlab.errors import UserError
from kdlab.experiment.schema import TeacherSpec
from kdlab.functional import Batch, Outputs, Projected
from kdlab.losses import CrossEntropy, MultiTeacherKL, Objective
from kdlab.teachers import EnsembleTeacher, Teacher
from kdlab.teachers import teacher as teachers

ROWS, C, K = 6, 5, 3
DIGITS = ("experiment=several_teachers", "student=mlp", "teacher=mlp", "teacher.epochs=1", "epochs=1", "baseline=false")


class Says(Teacher):
    """Answers with given logits."""

    def __init__(self, logits):
        self.logits = logits

    def __call__(self, batch, split="train"):
        return None if self.logits is None else Outputs(self.logits)


def logits(seed, scale=3.0, dtype=torch.float64):
    return scale * torch.randn(ROWS, C, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def batch(targets=(0, 1, -100, 3, 4, -100)):
    return Batch(torch.zeros(len(targets), 1), torch.as_tensor(targets, dtype=torch.int64))


def probabilities(z):
    z = np.asarray(z, np.float64)
    return np.exp(z - z.max(-1, keepdims=True)) / np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True)


# ---- weighed by confidence


def by_hand(members, targets):
    """CA-MKD's weights (K, rows), from the formula; a row without a label by each member's entropy."""
    p = [probabilities(z) for z in members]
    out = np.zeros((len(p), ROWS))
    for i, y in enumerate(targets):
        lost = np.array([-(q[i] * np.log(q[i])).sum() if y < 0 else -math.log(q[i, y]) for q in p])
        share = np.exp(lost) / np.exp(lost).sum()
        out[:, i] = (1 - share) / (len(p) - 1)
    return out


@pytest.mark.parametrize("at_once", [1, C * K * 4, 10**6])
@pytest.mark.parametrize("projected", [False, True])
def test_confidence_weighs_by_the_published_formula(monkeypatch, at_once, projected):
    monkeypatch.setattr(teachers, "AT_ONCE", at_once)
    members = [logits(n) for n in range(K)]
    given = [Projected(z, torch.eye(C, dtype=z.dtype)) for z in members] if projected else members
    rows = batch()
    out = EnsembleTeacher([Says(z) for z in given], weighting="confidence")(rows).logits
    w = by_hand(members, rows.targets.tolist())
    np.testing.assert_allclose(w.sum(0), 1)
    expected = sum(w[k][:, None] * probabilities(members[k]) for k in range(K))
    np.testing.assert_allclose(out.exp().numpy(), expected, rtol=1e-6)


def test_confidence_reads_labels_in_training_only():
    """What is measured on validation and test must not know the labels it is measured by."""
    ensemble = EnsembleTeacher([Says(logits(n)) for n in range(K)], weighting="confidence")
    blind = ensemble(batch([-100] * ROWS)).logits
    for split in ("val", "test", "ood"):
        assert torch.equal(ensemble(batch(), split).logits, blind)
    assert not torch.equal(ensemble(batch()).logits, blind)


def test_confidence_with_soft_labels_extreme_members_and_one_member():
    rows = batch()
    hard = torch.nn.functional.one_hot(rows.targets.clamp(min=0), C).float() * rows.labelled[:, None]
    ensemble = EnsembleTeacher([Says(logits(n)) for n in range(K)], weighting="confidence")
    soft = Batch(rows.inputs, hard)
    torch.testing.assert_close(ensemble(soft).logits, ensemble(rows).logits)
    sure = torch.full((ROWS, C), -torch.inf, dtype=torch.float32)
    sure[:, 0] = 0.0  # as wrong as can be of every other class
    out = EnsembleTeacher([Says(sure), Says(logits(0, dtype=torch.float16))], weighting="confidence")(rows).logits
    assert out.dtype == torch.float32 and bool(out.isfinite().all())
    torch.testing.assert_close(out[1].exp(), logits(0, dtype=torch.float16)[1].float().softmax(-1))
    alone = EnsembleTeacher([Says(logits(0))], weighting="confidence")(rows).logits
    torch.testing.assert_close(alone, logits(0).log_softmax(-1))
    silent = EnsembleTeacher([Says(None), Says(logits(0))], weighting="confidence")(rows).logits
    torch.testing.assert_close(silent, alone)
    assert EnsembleTeacher([Says(None)], weighting="confidence")(rows) is None
    none = EnsembleTeacher([Says(logits(n)[:0]) for n in range(2)], weighting="confidence")(batch([]))
    assert none.logits.shape == (0, C)


def test_members_are_shown_where_a_term_weighs_them():
    members = [logits(n) for n in range(K)]
    out = EnsembleTeacher([Says(z) for z in members], show=True)(batch())
    assert list(out.heads) == ["member_0", "member_1", "member_2"]
    assert all(torch.equal(out.heads[f"member_{n}"], z) for n, z in enumerate(members))
    assert torch.equal(out.logits, EnsembleTeacher([Says(z) for z in members])(batch()).logits)


@pytest.mark.parametrize(
    "words", [{"weighting": "best"}, {"weighting": "confidence", "weights": [1.0, 2.0]}, {"weights": [0.0, 0.0]}]
)
def test_wrong_weighing_is_refused(words):
    with pytest.raises(UserError, match=r"teacher\.weight(ing|s): .*accepted: "):
        EnsembleTeacher([Says(None), Says(None)], **words)


# ---- weighed by the loss


def term_with(weights=None, bias=None, **words):
    """A term that has seen its members, with weights of its own."""
    term = MultiTeacherKL(**words).double()
    term.prepare(Outputs(logits(9)), told())
    term.double()
    with torch.no_grad():
        if bias is not None:
            term.bias.copy_(bias)
        if weights is not None:
            term.matrix.copy_(weights)
    return term


def told(dtype=torch.float64, scale=3.0):
    members = [logits(n, scale, dtype) for n in range(K)]
    return Outputs(torch.stack(members).mean(0), heads={f"member_{n}": z for n, z in enumerate(members)})


def reference(student, members, targets, matrix, bias, t, supervision, fed=None):
    """The term, row by row, from its formula; ``fed`` are the student's logits that the weights see."""
    out = np.zeros(ROWS)
    fed = student if fed is None else fed
    for i in range(ROWS):
        a = (fed[i] - fed[i].mean()) / np.sqrt(fed[i].var() + 1e-5)
        w = probabilities(matrix @ a + bias)
        mixed = sum(w[k] * probabilities(members[k][i] / t) for k in range(K))
        own = probabilities(student[i] / t)
        out[i] = t * t * (mixed * (np.log(mixed) - np.log(own))).sum()
        if targets[i] >= 0:
            out[i] -= supervision * math.log(sum(w[k] * probabilities(members[k][i])[targets[i]] for k in range(K)))
    return out


def slope(function, at, eps=1e-6):
    """The gradient of a number by central differences."""
    out = np.zeros_like(at)
    for index in np.ndindex(at.shape):
        up, down = at.copy(), at.copy()
        up[index] += eps
        down[index] -= eps
        out[index] = (function(up) - function(down)) / (2 * eps)
    return out


@pytest.mark.parametrize(
    ("by", "supervision", "t"), [("logits", 1.0, 4.0), ("logits", 0.0, 1.0), ("teacher", 0.5, 2.0)]
)
def test_the_trained_mixture_is_the_formula_in_value_and_gradient(by, supervision, t):
    draw = torch.Generator().manual_seed(3)
    matrix = torch.randn(K, C, generator=draw, dtype=torch.float64) if by == "logits" else None
    bias = torch.randn(K, generator=draw, dtype=torch.float64)
    term = term_with(matrix, bias, by=by, supervision=supervision, temperature=t)
    own, rows = logits(9).requires_grad_(), batch()
    value = term(Outputs(own), told(), rows)
    s, m, b = own.detach().numpy(), np.zeros((K, C)) if matrix is None else matrix.numpy(), bias.numpy()
    members, targets = [logits(n).numpy() for n in range(K)], rows.targets.tolist()
    np.testing.assert_allclose(value.detach().numpy(), reference(s, members, targets, m, b, t, supervision), rtol=1e-9)

    value.sum().backward()
    rest = (members, targets)
    by_student = slope(lambda z: reference(z, *rest, m, b, t, supervision, fed=s).sum(), s)
    by_bias = slope(lambda x: reference(s, *rest, m, x, t, supervision).sum(), b)
    np.testing.assert_allclose(own.grad.numpy(), by_student, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(term.bias.grad.numpy(), by_bias, rtol=1e-5, atol=1e-7)
    if by == "logits":
        by_matrix = slope(lambda x: reference(s, *rest, x, b, t, supervision).sum(), m)
        np.testing.assert_allclose(term.matrix.grad.numpy(), by_matrix, rtol=1e-5, atol=1e-7)


def test_the_mixture_starts_as_the_mean_and_its_least_is_zero():
    term = term_with(supervision=0.0, temperature=1.0)
    mean = EnsembleTeacher([Says(logits(n)) for n in range(K)])(batch()).logits
    torch.testing.assert_close(term.log_weights(logits(9)).exp(), torch.full((ROWS, K), 1 / K, dtype=torch.float64))
    assert float(term(Outputs(mean), told(), batch()).detach().abs().max()) < 1e-6


def test_a_high_temperature_leaves_the_mixture_a_gradient():
    found = []
    for t in (1e4, 1e5):
        own = logits(9).requires_grad_()
        term_with(supervision=0.0, temperature=t)(Outputs(own), told(), batch()).sum().backward()
        found.append(own.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-2, atol=1e-3)
    assert float(found[0].abs().max()) > 0.01


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_mixture_in_half_precision_and_under_autocast(dtype):
    term = MultiTeacherKL(temperature=2.0)
    term.prepare(Outputs(logits(9, dtype=dtype)), told(dtype))
    exact = term_with(temperature=2.0)(Outputs(logits(9)), told(), batch())
    half = told(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = term(Outputs(logits(9, dtype=dtype)), half, batch())
    assert value.dtype == torch.float32 and bool(value.isfinite().all())
    torch.testing.assert_close(value.double(), exact, rtol=0.1, atol=0.1)


def test_the_weights_find_the_teacher_that_is_right_and_are_kept_by_a_second_prepare():
    torch.manual_seed(0)
    targets = torch.randint(0, C, (ROWS,))
    right = 5 * torch.nn.functional.one_hot(targets, C).float()
    seen = Outputs(right, heads={"member_0": logits(0).float(), "member_1": right, "member_2": logits(2).float()})
    objective = Objective({"ce": CrossEntropy(), "several": MultiTeacherKL(by="teacher")}, 4.0, alpha=0.9)
    own = Outputs(torch.zeros(ROWS, C, requires_grad=True))
    objective.prepare(own, seen)
    term = objective.terms["several"]
    assert {name for name, _ in objective.named_parameters()} == {"terms.several.bias"} and term.bias.no_decay
    optimizer = torch.optim.SGD(objective.parameters(), lr=1.0)
    for _ in range(100):
        optimizer.zero_grad()
        objective(own, seen, batch(targets.tolist())).total.backward()
        optimizer.step()
    kept = term.bias.detach().clone()
    objective.prepare(own, seen)
    assert torch.equal(term.bias, kept) and int(kept.argmax()) == 1 and float(kept.softmax(0)[1]) > 0.5


def test_the_mixture_in_chunks_is_the_same_step():
    def step(projected):
        torch.manual_seed(1)
        term = term_with(torch.ones(K, C).cumsum(0), temperature=2.0)
        objective = Objective({"ce": CrossEntropy(), "several": term}, 2.0, alpha=0.5, chunk_rows=2)
        hidden = logits(9).requires_grad_()
        own = Projected(hidden, torch.eye(C, dtype=torch.float64)) if projected else hidden
        losses = objective(Outputs(own), told(), batch())
        losses.total.backward()
        return losses.total.detach(), hidden.grad, term.matrix.grad

    for chunked, whole in zip(step(True), step(False), strict=True):
        torch.testing.assert_close(chunked, whole)


@pytest.mark.parametrize("words", [{"by": "layer"}, {"supervision": -1}, {"supervision": float("nan")}])
def test_a_wrong_mixture_is_refused(words):
    with pytest.raises(UserError, match=f"^{next(iter(words))}: .*accepted: "):
        MultiTeacherKL(**words)


def test_a_teacher_without_members_has_nothing_to_weigh():
    with pytest.raises(UserError, match=r"members: .*accepted: teacher\.weighting=learned"):
        MultiTeacherKL().prepare(Outputs(logits(9)), Outputs(logits(0)))


# ---- what a member is


def test_a_member_is_the_teacher_with_its_own_keys_on_top():
    net = {"_target_": "kdlab.models.CifarResNet", "depth": 20, "width": 16}
    other = {"_target_": "kdlab.models.VGG", "depth": 8}
    spec = TeacherSpec(
        net=net,
        epochs=7,
        data={"labels": 5},
        members=[{"seed": 1}, {"net": {"depth": 14}, "data": {"val": 0.2}}, {"net": other}],
    )
    first, second, third = spec.each
    assert (first.seed, first.epochs, first.net, first.members) == (1, 7, net, None)
    assert second.net == {**net, "depth": 14} and second.data == {"labels": 5, "val": 0.2} and second.seed == 0
    assert third.net == other  # another network: what the first is told means nothing to it
    assert spec.kind == "several" and TeacherSpec(net=net).each == [TeacherSpec(net=net)]


WRONG = {
    "[]": "teacher.members: an empty list",
    "[{seed: 1}, {sede: 2}]": "teacher.members[1].sede: unknown key of a teacher 'sede'; nearest: seed",
    "[{weighting: mean}]": "teacher.members[0].weighting: unknown key of a teacher",
    "[{seed: x}]": "teacher.members[0].seed: 'x'; accepted: an integer",
    "[{net: {hiden: [3]}}]": "teacher.members[0].net.hiden: unknown key of kdlab.models.MLP",
    "[{}, {data: {labls: 3}}]": "teacher.members[1].data.labls: unknown key",
    "[{}, {data: {classes: [0, 1]}}]": "teacher.members[1].data: 2 classes 0, 1, and data has 10",
    "[{}, {net: {num_classes: 7}}]": "teacher.members[1].net: 7 classes, and data has 10",
    "[{}, {checkpoint: nowhere.pt}]": "teacher.members[1].checkpoint: ",
    "[{epochs: 0}, {}]": "teacher.members[0].epochs: 0; accepted",
    "[{optimizer: {lr: -1}}]": "teacher.members[0].optimizer: ",
    "[{cache: nowhere}]": "teacher.members[0].cache: nowhere holds no manifest.json",
    "7": "teacher.members: 7; accepted: a list",
}


@pytest.mark.parametrize("members", WRONG)
def test_a_wrong_member_is_one_line_that_names_it(place, tmp_path, capsys, members):
    said = mistake(capsys, [*QUIET, *DIGITS, f"teacher.members={members}"], tmp_path / "out")
    assert said.startswith(WRONG[members])


CLASH = {
    ("teacher.weighting=learned",): "teacher.weighting: learned, and no term of the loss",
    ("teacher.weighting=confidence", "teacher.members=null"): "teacher.weighting: confidence, and there is one teacher",
    ("loss=several",): "loss.terms.several.members: none that the teacher shows",
    ("loss=[hinton,attention]",): "loss.terms.at: looks at the teacher's layers",
    ("init=teacher",): "init: teacher, and teacher.members are several",
    ("teacher=previous",): "teacher.members[0].net: none; accepted: a network",
    ("teacher.top_k=3",): "teacher.top_k: 3, and teacher.members are several",
    (
        "batch_transform=dafl",
    ): "batch_transform: GeneratedRows makes rows after one network, and teacher.members are several; accepted: ",
    (
        "batch_transform=zskt",
    ): "batch_transform: GeneratedRows makes rows after one network, and teacher.members are several; accepted: ",
    (
        "batch_transform=inversion",
    ): "batch_transform: InvertedRows makes rows after one network, and teacher.members are several",
}


@pytest.mark.parametrize("words", CLASH)
def test_what_several_teachers_cannot_do_is_one_line(place, tmp_path, capsys, words):
    assert mistake(capsys, [*QUIET, *DIGITS, *words], tmp_path / "out").startswith(CLASH[words])


# ---- in experiments


def test_each_member_is_trained_once_and_answers_from_its_own_cache(place, tmp_path):
    words = (*DIGITS, f"output={tmp_path}")
    first = train(tmp_path, "first", *words)
    found, log = result(first), (first / "run.log").read_text()
    assert len([p for p in (tmp_path / "teachers").iterdir() if p.is_dir()]) == 3
    assert len([p for p in (tmp_path / "cache").iterdir() if p.is_dir()]) == 3
    assert log.count("cached teacher: ") == 3 and "ensemble of 3, the mean" in log
    models = found["models"]
    each = [models[f"teacher_{n}"] for n in range(3)]
    for key in ("parameters", "bytes", "latency_ms", "seconds"):
        assert models["teacher"][key] == pytest.approx(sum(one[key] for one in each))
    assert found["seconds"]["teacher"] == pytest.approx(models["teacher"]["seconds"])
    assert len({one["test"]["ce"] for one in each}) == 3 and "agreement" not in models["teacher"]["test"]
    assert models["teacher"]["test"]["ce"] <= max(one["test"]["ce"] for one in each)
    assert 0 <= models["student"]["test"]["agreement"] <= 1 and found["teacher_trained_on"]

    # one of them again, alone, and the rest with another: only what is new is trained
    again = result(train(tmp_path, "again", *words, "teacher.members=[{seed: 1}, {seed: 0}]"))
    assert again["seconds"]["teacher"] == 0 and again["models"]["teacher_0"]["test"] == each[1]["test"]
    alone = result(train(tmp_path, "alone", *words, "teacher.members=null", "teacher.seed=2"))
    assert alone["seconds"]["teacher"] == 0 and alone["models"]["teacher"]["test"] == each[2]["test"]
    assert not same(weights(first), weights(train(tmp_path, "live", *words, "seed=1")))


def test_a_cached_ensemble_gives_the_live_ones_loss(place):
    found = [curve(train(place, f"several_{c}", *DIGITS, f"teacher.cache={c}"), "train/kl") for c in ("auto", "off")]
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_an_ensemble_trains_by_confidence_and_by_learned_weights(place):
    curves = {}
    for weighting, loss in (("confidence", "hinton"), ("learned", "several")):
        words = ("epochs=3", f"teacher.weighting={weighting}", f"loss=[{loss}]")
        run = train(place, f"several_{weighting}", *DIGITS, *words)
        points = curves[weighting] = curve(run, {"hinton": "train/kl", "several": "train/several"}[loss])
        assert all(math.isfinite(x) for x in points) and np.mean(points[-5:]) < np.mean(points[:5])
        plain = train(place, "several_plain", *DIGITS, "method=finetune", "loss=[ce]")
        assert weights(run).keys() == weights(plain, "model_finetuned.pt").keys()
    kept = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert kept["objective.terms.several.matrix"].shape == (3, 10) and bool(kept["objective.terms.several.bias"].any())


def test_members_of_other_depths_and_checkpoints(place, tmp_path):
    before = train(tmp_path, "several_before", *DIGITS, "teacher.members=[{seed: 0}]")
    one = result(before)["models"]
    assert one["teacher"]["test"] == pytest.approx(one["teacher_0"]["test"])
    kept = next((tmp_path / "teachers").glob("*/model_finetuned.pt"))  # the only one there
    hidden = [len(bias) for name, bias in weights(kept.parent, kept.name).items() if name.endswith("bias")][:-1]
    members = f"teacher.members=[{{net: {{hidden: [8]}}}}, {{checkpoint: '{kept}', net: {{hidden: {hidden}}}}}]"
    run = train(place, "several_mixed", *DIGITS, members)
    found = result(run)["models"]
    assert found["teacher_0"]["parameters"] < found["teacher_1"]["parameters"]
    assert f"checkpoint {kept.name}" in result(run)["teacher_trained_on"]


def test_evaluate_measures_an_ensemble(place, capsys):
    run = train(place, "several_seen", *DIGITS)
    capsys.readouterr()
    assert main(["evaluate", *QUIET, *DIGITS, f"output={place}"]) == 0
    said = capsys.readouterr().out
    teacher = result(run)["models"]["teacher"]
    assert f"{teacher['parameters']:,} parameters" in said and f"acc {teacher['test']['acc']:.4f}" in said


def test_the_teacher_assistant_learns_from_the_teacher_and_teaches_the_student(place):
    small = ("data.fraction=0.1", "teacher.data.fraction=0.1", "teacher.epochs=1", "epochs=1", "baseline=false")
    run = train(place, "assistant", "experiment=teacher_assistant", *small)
    models = result(run)["models"]
    assert models["teacher"]["test"] == {k: models["assistant"]["test"][k] for k in models["teacher"]["test"]}
    assert models["student"]["parameters"] < models["assistant"]["parameters"] == models["teacher"]["parameters"]
    assert (run / "stages" / "small" / "student.pt").exists() and same(weights(run), weights(run / "stages" / "small"))
