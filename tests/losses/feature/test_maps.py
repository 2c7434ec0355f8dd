"""Terms on feature maps against their papers' formulas in float64, written another way: value, gradient, edges."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from helpers.tiny import FEW, curve, train, weights
from kdlab.errors import UserError
from kdlab.functional import (
    Batch,
    Outputs,
    boundary_distance,
    factor_distance,
    fsp_matrix,
    gaussian_nll,
    negative_mean,
    partial_l2,
    polynomial_mmd,
)
from kdlab.losses import FSP, NST, OFD, VID, ActivationBoundary, CrossEntropy, FactorTransfer, LayerTerm, Objective
from kdlab.models import CifarResNet
from kdlab.models.vision.blocks import BatchNorm

torch.set_num_threads(1)

ROWS = 3
OURS, THEIRS = [(4, 6, 6), (5, 2, 2)], [(6, 12, 12), (7, 4, 4)]
"""Two pairs: a grid of more positions than channels, and one of less; the teacher's come down to them."""


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def outputs(maps, name, rows=ROWS):
    return Outputs(torch.zeros(rows, 2), {f"{name}{n}": feature for n, feature in enumerate(maps)})


def batch(rows=ROWS, label=0):
    return Batch(torch.zeros(rows, 1), torch.full((rows,), label))


class Teacher(nn.Module):
    """Layers ``b0`` and ``b1``, each behind a BatchNorm."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        for n, (channels, *_) in enumerate(THEIRS):
            norm = nn.BatchNorm2d(channels)
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
            self.add_module(f"norm{n}", norm)
            self.add_module(f"b{n}", nn.Identity())


MAKE = {cls.__name__: cls for cls in (FSP, NST, ActivationBoundary, FactorTransfer, VID, OFD)}


def made(name, **more):
    """A term on both pairs, prepared, with the maps of both sides."""
    torch.manual_seed(1)
    ours = [random(ROWS, *shape, seed=n) for n, shape in enumerate(OURS)]
    theirs = [random(ROWS, *shape, seed=10 + n) for n, shape in enumerate(THEIRS)]
    term = MAKE[name](["a0", "a1"], ["b0", "b1"], **more)
    term.setup(nn.Identity(), Teacher(), 100)
    term.prepare(outputs(ours, "a"), outputs(theirs, "b"))
    return term, ours, theirs


def value(term, ours, theirs):
    return term(outputs(ours, "a", len(ours[0])), outputs(theirs, "b", len(ours[0])), batch(len(ours[0])))


# ---- the papers' formulas, on float64 arrays -------------------------------------------------------------------------


def array(tensor):
    return tensor.detach().double().numpy()


def coarse(x, side):
    k = x.shape[2] // side
    return x.reshape(*x.shape[:2], side, k, side, k).mean((3, 5))


def conv(x, layer):
    """A convolution, as a sum over the offsets of its kernel."""
    kernel, bias = array(layer.weight), 0 if layer.bias is None else array(layer.bias)[:, None, None]
    reach = kernel.shape[2] // 2
    padded = np.pad(x, ((0, 0), (0, 0), (reach, reach), (reach, reach)))
    high, wide = x.shape[2:]
    offsets = itertools.product(range(2 * reach + 1), repeat=2)
    return bias + sum(
        np.einsum("oc,bchw->bohw", kernel[:, :, i, j], padded[:, :, i : i + high, j : j + wide]) for i, j in offsets
    )


def through(x, layers):
    """A stack of convolutions, BatchNorms in training and activations."""
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            x = conv(x, layer)
        elif isinstance(layer, BatchNorm):
            mean, var = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
            x = (x - mean) / np.sqrt(var + layer.eps) * array(layer.weight)[:, None, None]
            x = x + array(layer.bias)[:, None, None]
        else:
            x = np.where(x > 0, x, getattr(layer, "negative_slope", 0.0) * x)
    return x


def matched(ours, theirs):
    """The pairs, the teacher's on the student's grid."""
    return [(s, coarse(t, s.shape[2])) for s, t in zip(ours, theirs, strict=True)]


def paper_fsp(term, ours, theirs):
    ours = [conv(s, p) for s, p in zip(ours, term.projectors, strict=True)]

    def matrix(a, b):
        side = min(a.shape[2], b.shape[2])
        return np.einsum("bihw,bjhw->bij", coarse(a, side), coarse(b, side)) / side**2

    return ((matrix(*ours) - matrix(*theirs)) ** 2).mean((1, 2))


def paper_mmd(s, t):
    def kernel(x, y):
        return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y)) ** 2

    found = []
    for rows in zip(s, t, strict=True):
        a, b = (x.reshape(len(x), -1) for x in rows)
        within = sum(np.mean([kernel(x, y) for x in m for y in m]) for m in (a, b))
        found.append(within - 2 * np.mean([kernel(x, y) for x in b for y in a]))
    return np.array(found)


def paper_nst(term, ours, theirs):
    return sum(paper_mmd(s, t) for s, t in matched(ours, theirs))


def paper_ab(term, ours, theirs):
    total = 0.0
    for (s, t), connector, share in zip(matched(ours, theirs), term.connectors, (0.5, 1.0), strict=True):
        s, active = through(s, connector), (t > 0).astype(float)
        hinge = active * np.maximum(term.margin - s, 0) + (1 - active) * np.maximum(term.margin + s, 0)
        total = total + share * np.linalg.norm(hinge.reshape(ROWS, -1), axis=1) ** 2
    return total


def paper_margin(shift, scale):
    z, scale = shift / abs(scale), abs(scale)
    return shift - scale * math.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) / (0.5 * math.erfc(z / math.sqrt(2)))


def paper_ofd(term, ours, theirs):
    total, net = 0.0, Teacher()
    for n, (s, t) in enumerate(matched(ours, theirs)):
        norm = getattr(net, f"norm{n}")
        margins = [paper_margin(b, g) for b, g in zip(norm.bias.tolist(), norm.weight.tolist(), strict=True)]
        s, t = through(s, term.connectors[n]), np.maximum(t, np.array(margins)[:, None, None])
        counts = (s > t) | (t > 0)
        total = total + (counts * (t - s) ** 2).sum((1, 2, 3)) / (2, 1)[n]
    return total


def paper_factor(term, ours, theirs, factors=None):
    """``factors`` holds those that the student is compared with, where the teacher's are not to move."""
    total = 0.0
    for n, (s, t) in enumerate(matched(ours, theirs)):
        factor = through(t, term.encoders[n])
        again = through(factor, term.decoders[n])
        a, b = through(s, term.translators[n]).reshape(ROWS, -1), factor.reshape(ROWS, -1)
        a, b = (x / np.sqrt((x**2).sum(1, keepdims=True)) for x in (a, b))
        total = total + np.abs(a - b).mean(1) + term.reconstruction * ((again - t) ** 2).mean((1, 2, 3))
    return total


def paper_vid(term, ours, theirs):
    total = 0.0
    for n, (s, t) in enumerate(matched(ours, theirs)):
        sigma2 = np.log1p(np.exp(array(term.scales[n])))[:, None, None] + 1e-5
        mu = through(s, term.regressors[n])
        total = total + (np.log(np.sqrt(sigma2)) + (t - mu) ** 2 / (2 * sigma2)).mean((1, 2, 3))
    return total


PAPER = {
    "FSP": paper_fsp,
    "NST": paper_nst,
    "ActivationBoundary": paper_ab,
    "FactorTransfer": paper_factor,
    "VID": paper_vid,
    "OFD": paper_ofd,
}
EACH = pytest.mark.parametrize("name", list(MAKE))


@EACH
def test_value_and_gradient_are_the_papers(name):
    term, ours, theirs = made(name)
    assert isinstance(term, LayerTerm) and term.role == "other" and term.rows == "all"
    if name == "OFD":  # the teacher comes down to the student's grid before its margin
        theirs[1] = theirs[1] + 0.5
    expected = PAPER[name](term, [array(s) for s in ours], [array(t) for t in theirs])
    np.testing.assert_allclose(array(value(term, ours, theirs)), expected, rtol=2e-4, atol=1e-6)

    term = term.double()
    ours, theirs = [s.double().requires_grad_() for s in ours], [t.double() for t in theirs]
    found = value(term, ours, theirs)
    assert found.shape == (ROWS,)
    np.testing.assert_allclose(array(found), expected, rtol=1e-6)
    found.sum().backward()
    for n, s in enumerate(ours):  # along random directions, against differences of the paper's formula
        direction = array(random(*s.shape, seed=20 + n))
        ends = []
        for step in (1e-6, -1e-6):
            moved = [array(x) + (step * direction if k == n else 0.0) for k, x in enumerate(ours)]
            ends.append(PAPER[name](term, moved, [array(t) for t in theirs]).sum())
        slope = (ends[0] - ends[1]) / 2e-6
        assert (array(s.grad) * direction).sum() == pytest.approx(slope, rel=1e-5, abs=1e-7)


@EACH
def test_half_precision_and_autocast(name):
    term, ours, theirs = made(name)
    expected = value(term, ours, theirs)
    for dtype in (torch.float16, torch.bfloat16):
        half = [s.to(dtype).requires_grad_() for s in ours]
        found = value(term, half, [t.to(dtype) for t in theirs])
        found.sum().backward()
        assert found.dtype == torch.float32 and half[0].grad.dtype == dtype and half[0].grad.isfinite().all()
        torch.testing.assert_close(found, expected, rtol=3e-2, atol=3e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = value(term, ours, theirs)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, expected, rtol=3e-2, atol=3e-2)


def test_products_stay_exact_under_autocast():
    s, t = random(2, 4, 6, 6), random(2, 6, 6, 6, seed=1)
    expected = polynomial_mmd(s, t), fsp_matrix(s, t)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = polynomial_mmd(s, t), fsp_matrix(s, t)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    large = fsp_matrix(100 * s.half(), 100 * t.half())  # products of halves would overflow
    torch.testing.assert_close(large, 1e4 * expected[1], rtol=1e-2, atol=20.0)


@EACH
def test_what_a_term_makes_trains_and_is_made_once(name):
    term, ours, theirs = made(name)
    value(term, [s.requires_grad_() for s in ours], theirs).sum().backward()
    trained = dict(term.named_parameters())
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in trained.values())
    assert bool(trained) == (name != "NST")
    kept = {key: tensor.clone() for key, tensor in term.state_dict().items()}
    term.setup(nn.Identity(), Teacher(), 100)
    term.prepare(outputs(ours, "a"), outputs([t + 1 for t in theirs], "b"))
    assert all(p is trained[key] for key, p in term.named_parameters())
    assert all(torch.equal(tensor, kept[key]) for key, tensor in term.state_dict().items())
    again, *_ = made(name)  # as a resumed run does
    again.load_state_dict(term.state_dict())
    assert not any("norm0" in key or key.startswith("teacher") for key in kept)


@EACH
def test_rows_without_a_label_count_and_dead_channels_are_finite(name):
    term, ours, theirs = made(name)
    plain = value(term, ours, theirs)
    for targets in (torch.full((ROWS,), -100), torch.zeros(ROWS, 2)):
        unlabelled = Batch(torch.zeros(ROWS, 1), targets)
        found = term(outputs(ours, "a"), outputs(theirs, "b"), unlabelled)
        torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-6)
    dead = [torch.zeros_like(s).requires_grad_() for s in ours]
    found = value(term, dead, [torch.zeros_like(t) for t in theirs])
    found.sum().backward()
    assert found.isfinite().all() and all(s.grad.isfinite().all() for s in dead)


@pytest.mark.parametrize("name", ["FSP", "NST", "VID"])  # the others hold a BatchNorm
def test_a_row_is_measured_alone(name):
    term, ours, theirs = made(name)
    whole = value(term, ours, theirs)
    for i in range(ROWS):
        alone = value(term, [s[i : i + 1] for s in ours], [t[i : i + 1] for t in theirs])
        torch.testing.assert_close(alone, whole[i : i + 1], rtol=1e-4, atol=1e-6)


# ---- known minima ----------------------------------------------------------------------------------------------------


def test_equal_networks_are_the_minimum():
    maps = [random(2, 4, 4, 4), random(2, 6, 4, 4, seed=1), random(2, 8, 1, 1, seed=2)]
    fsp = FSP(["a0", "a1", "a2"], ["b0", "b1", "b2"])
    fsp.prepare(outputs(maps, "a"), outputs(maps, "b"))
    assert not list(fsp.parameters())  # of equal widths, the paper's form
    assert value(fsp, maps, maps).abs().max() == 0
    assert value(fsp, [1.1 * m for m in maps], maps).min() > 0
    nst = NST(["a0", "a1"], ["b0", "b1"])
    for scale in (1.0, 3.0):  # each channel's map has unit length
        assert value(nst, [scale * m for m in maps[:2]], maps[:2]).abs().max() < 1e-6
    permuted = maps[1][:, torch.randperm(6)]  # which channel responds does not matter
    assert polynomial_mmd(permuted, maps[1]).abs().max() < 1e-6
    doubled = torch.cat([maps[1], maps[1]], 1)
    assert polynomial_mmd(doubled, maps[1]).abs().max() < 1e-6 < polynomial_mmd(maps[0], maps[1]).min()


def test_distances_are_zero_where_they_should_be():
    t = random(2, 3, 4, 4)
    assert boundary_distance(2 * t.sign(), t, margin=2.0).abs().max() == 0
    assert boundary_distance(1.9 * t.sign(), t, margin=2.0).min() > 0
    assert partial_l2(t, t).abs().max() == 0
    below = torch.where(t <= 0, t - 5, t)
    assert partial_l2(below, t).abs().max() == 0 and partial_l2(t, below).min() > 0
    assert factor_distance(3 * t, t).abs().max() < 1e-7 < factor_distance(-t, t).min()
    variance = torch.tensor([0.5, 1.0, 2.0])
    torch.testing.assert_close(gaussian_nll(t, variance, t), torch.zeros(2), rtol=0, atol=1e-7)  # the logs cancel
    best = gaussian_nll(t, torch.full((3,), 0.25), t + 0.5)  # least where the variance is the squared error
    for other in (0.2, 0.3):
        assert (gaussian_nll(t, torch.full((3,), other), t + 0.5) > best).all()


@pytest.mark.parametrize("deviation", [0.3, -2.0])
@pytest.mark.parametrize("z", [-6.0, -1.0, 0.0, 0.7, 3.0, 7.0])
def test_the_margin_is_the_mean_of_what_is_negative(z, deviation):
    mean, scale = z * abs(deviation), abs(deviation)
    x = np.linspace(min(mean, 0.0) - 12 * scale, 0.0, 400_001)
    log_density = -((x - mean) ** 2) / (2 * scale**2)
    density = np.exp(log_density - log_density.max())
    expected = (x * density).sum() / density.sum()
    found = negative_mean(torch.tensor([mean], dtype=torch.float64), torch.tensor([deviation], dtype=torch.float64))
    assert found.item() == pytest.approx(expected, rel=1e-3)


def test_margins_at_the_ends():
    mean = torch.tensor([5.0, 1e6, -1.0, 0.0, 1.0, 1e3])
    found = negative_mean(mean, torch.tensor([0.1, 1.0, 0.0, 0.0, 0.0, 0.05]))
    assert found.isfinite().all() and (found <= 0).all() and found.dtype == torch.float32
    assert found[0].item() == pytest.approx(-0.1 / 50, rel=1e-2) and found[1].item() == pytest.approx(-1e-6, rel=1e-3)
    assert found[2] == -1 and found[3:5].abs().max() < 1e-10


# ---- each one's own --------------------------------------------------------------------------------------------------


def test_overhaul_finds_the_norm_before_a_response():
    net = CifarResNet(14, width=4)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight)
            nn.init.normal_(module.bias)
    for layer, norm in (("layer2.1.preact", net.layer2[1].bn2), ("layer1.0.bn1", net.layer1[0].bn1)):
        term = OFD("a0", layer)
        term.setup(net, net, None)
        maps = random(ROWS, norm.num_features, 2, 2)
        theirs = Outputs(torch.zeros(ROWS, 2), {layer: maps})
        term.prepare(outputs([maps], "a"), theirs)
        torch.testing.assert_close(term.margin0, negative_mean(norm.bias.detach(), norm.weight.detach()))
        assert not {id(p) for p in term.parameters()} & {id(p) for p in net.parameters()}
    for layer in ("layer1", "layer1.0.conv1", "pool", "nothing"):
        with pytest.raises(UserError, match=f"teacher_layer: {layer} follows no BatchNorm.*margin=batch"):
            OFD("a0", layer).setup(net, net, None)


def test_overhaul_without_a_norm_takes_the_first_batch():
    ours, theirs = [random(ROWS, *OURS[0])], [random(ROWS, *THEIRS[0], seed=1)]
    theirs[0][:, 0] = theirs[0][:, 0].abs()
    term = OFD("a0", "b0", margin="batch")
    term.setup(nn.Identity(), None, None)
    term.prepare(outputs(ours, "a"), outputs(theirs, "b"))
    expected = [x[x < 0].mean().item() if (x < 0).any() else 0.0 for x in theirs[0].transpose(0, 1)]
    assert term.margin0.tolist() == pytest.approx(expected, rel=1e-5)
    unmet = OFD("a0", "b0")
    with pytest.raises(UserError, match="margin: norm, and the teacher's inside was not seen; accepted: margin=batch"):
        unmet.prepare(outputs(ours, "a"), outputs(theirs, "b"))
    narrow = OFD("a0", "b1")
    narrow.setup(nn.Identity(), Teacher(), None)
    with pytest.raises(UserError, match="b1 has 6 channels, and the BatchNorm before it 7; accepted"):
        narrow.prepare(outputs(ours, "a"), Outputs(torch.zeros(ROWS, 2), {"b1": theirs[0]}))


def test_the_paraphraser_learns_from_the_teacher_alone_and_first():
    term, ours, theirs = made("FactorTransfer", begin=0.25)
    objective = Objective({"ce": CrossEntropy(), "factor": term})
    for progress, follows in ((0.0, False), (0.2, False), (0.25, True), (1.0, True)):
        objective.progress = progress
        term.zero_grad()
        mine = [s.clone().requires_grad_() for s in ours]
        found = value(term, mine, theirs)
        found.sum().backward()
        assert all((s.grad is not None) == follows for s in mine)
        assert all((p.grad is not None) == follows for p in term.translators.parameters())
        before = [p.grad.clone() for p in term.encoders.parameters()]
        assert all(g.any() for g in before)
        if follows:  # the student says nothing to the paraphraser
            term.zero_grad()
            value(term, [s + 1 for s in ours], theirs).sum().backward()
            after = [p.grad for p in term.encoders.parameters()]
            torch.testing.assert_close(before, after)
    assert {e[3].weight.shape[0] for e in term.encoders} == {3, 4}  # half of 6 and of 7 channels


def test_variances_begin_where_told_and_do_not_decay():
    for variance in (5.0, 0.01, 800.0):
        term, *_ = made("VID", variance=variance)
        for scale in term.scales:
            found = nn.functional.softplus(scale) + VID.LEAST
            torch.testing.assert_close(found, torch.full_like(found, variance), rtol=1e-4, atol=0)
            assert scale.no_decay
    ours, theirs = random(4, 5), random(4, 7, seed=1)  # vectors, such as the penultimate layer
    term = VID("a0", "b0")
    term.prepare(outputs([ours], "a", 4), outputs([theirs], "b", 4))
    x = array(ours)
    for layer in term.regressors[0]:
        x = x @ array(layer.weight).T if isinstance(layer, nn.Linear) else np.maximum(x, 0)
    expected = (0.5 * math.log(5.0) + (array(theirs) - x) ** 2 / 10).mean(1)
    np.testing.assert_allclose(array(value(term, [ours], [theirs])), expected, rtol=1e-4)


@pytest.mark.parametrize("side", ["widen", "keep"])
def test_fsp_of_unlike_widths(side):
    ours, theirs = ([random(ROWS, *shape) for shape in shapes] for shapes in (OURS, THEIRS))
    term = FSP(["a0", "a1"], ["b0", "b1"], widen=side == "widen")
    if side == "widen":
        term.prepare(outputs(ours, "a"), outputs(theirs, "b"))
        assert [tuple(p.weight.shape[:2]) for p in term.projectors] == [(6, 4), (7, 5)]
        return
    with pytest.raises(UserError, match=r"widen: false, and a0 .* has 4 channels, b0 of the teacher 6; accepted"):
        term.prepare(outputs(ours, "a"), outputs(theirs, "b"))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: FSP("a", "b"), "at least two layers"),
        (lambda: ActivationBoundary("a", "b", margin=0), "margin: 0"),
        (lambda: ActivationBoundary("a", "b", margin=math.inf), "margin: inf"),
        (lambda: OFD("a", "b", margin="bacth"), "nearest: batch"),
        (lambda: FactorTransfer("a", "b", rate=0), "rate: 0"),
        (lambda: FactorTransfer("a", "b", begin=1), "begin: 1"),
        (lambda: FactorTransfer("a", "b", reconstruction=math.nan), "reconstruction: nan"),
        (lambda: VID("a", "b", variance=1e-6), "variance: 1e-06"),
        (lambda: VID(["a", "b"], "b"), "2 and 1 layers"),
    ],
)
def test_wrong_values_are_refused(make, says):
    with pytest.raises(UserError) as caught:
        make()
    assert says in str(caught.value) and "accepted" in str(caught.value) and "\n" not in str(caught.value)


@EACH
def test_vectors_are_refused_and_terms_that_were_not_prepared(name):
    layers = (["a0", "a1"], ["b0", "b1"])
    vectors = [random(ROWS, 4), random(ROWS, 5)]
    if name != "VID":
        with pytest.raises(UserError, match="takes feature maps"):
            MAKE[name](*layers).prepare(outputs(vectors, "a"), outputs(vectors, "b"))
    if name != "NST":
        maps = [random(ROWS, *shape) for shape in OURS]
        with pytest.raises(UserError, match="call prepare"):
            value(MAKE[name](*layers), maps, maps)


# ---- training --------------------------------------------------------------------------------------------------------


def test_all_of_them_train_a_student_on_digits(place):
    words = ("experiment=kd_resnet", *FEW, "baseline=false")
    losses = "loss=[attention,fsp,nst,ab,factor,vid,ofd]"
    heard = ("loss.terms.fsp.weight=50", "loss.terms.vid.weight=20")  # eight steps of seven terms: the quiet louder
    run = train(place, "maps", *words, losses, *heard, "optimizer.lr=0.02", "epochs=4")
    for name in ("at", "fsp", "nst", "ab", "factor", "vid", "ofd"):
        points = curve(run, f"train/{name}")
        assert len(points) == 8 and all(map(math.isfinite, points))
        assert np.mean(points[-2:]) < np.mean(points[:2]), name
    plain = train(place, "maps_plain", *words, "loss=logit_mse")
    assert weights(run).keys() == weights(plain).keys()
