"""Gradients of language models are the same however a step is laid out: split, padded, packed, in chunks, sparse."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from itertools import islice

import pytest
import torch

from helpers.paths import ROOT
from helpers.split_process import bag_of_words, objective, step, window
from helpers.text_cases import VOCAB, lines_of, padded, sentences, tiny_gpt2
from kdlab.data.text.module import TextData
from kdlab.data.text.sequence import RawText, Sequence
from kdlab.data.text.tokenizer import Tokenizer
from kdlab.functional import SEGMENTS, Outputs, Projected, Sparse
from kdlab.tasks import LanguageModeling
from kdlab.teachers import FrozenTeacher, TokenCache, TokenManifest, write_tokens

torch.set_num_threads(1)
ALL = sentences()
FORMS = ("dense", "chunked", "sparse", "chunked and sparse")


@pytest.fixture(scope="module")
def nets():
    return tiny_gpt2(0), tiny_gpt2(1, width=12).requires_grad_(False)


def answers(student, teacher, batch, form):
    """The outputs of both at the rows, in one of the forms."""
    ours = student(**batch.inputs)[batch.loss_mask]
    with torch.no_grad():
        theirs = teacher(**batch.inputs)[batch.loss_mask]
    if "sparse" in form:
        theirs = Sparse.of(theirs.dense(), VOCAB)
    elif form == "dense":
        theirs = theirs.dense()
    return Outputs(ours if "chunked" in form else ours.dense()), Outputs(theirs)


def backward(student, teacher, batches, whole, form="dense", share=1.0):
    """Accumulate over ``batches`` as a trainer does, which divides each loss by their number."""
    compare = objective()
    values = 0.0
    for batch in batches:
        batch = replace(batch, window=whole)
        losses = compare(*answers(student, teacher, batch, form), batch)
        (losses.total * share / len(batches)).backward()
        values = values + losses.values.double()
    return values


def gradients(student):
    found = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad(set_to_none=True)
    return found


def agree(found, expected, tolerance=1e-10):
    assert found.keys() == expected.keys() and len(found) > 10
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= tolerance * (1 + value.abs().max()), name


@pytest.fixture(scope="module")
def reference(nets):
    """The whole step's gradient, written out: weighted means over all tokens, sentence by sentence."""
    student, teacher = nets
    total = sum(weight[1:].sum() for _, weight in ALL)
    loss = 0.0
    for ids, weight in ALL:
        at = weight[1:] > 0
        z = student(input_ids=ids[None, :-1]).dense()[0][at]
        with torch.no_grad():
            u = teacher(input_ids=ids[None, :-1]).dense()[0][at]
        q, p = z.log_softmax(-1), u.log_softmax(-1)
        q2, p2 = (z / 2).log_softmax(-1), (u / 2).log_softmax(-1)
        ce = -q.gather(1, ids[1:][at][:, None])[:, 0]
        each = 0.4 * 0.5 * ce + 0.6 * (p.exp() * (p - q)).sum(1) + 0.6 * 0.7 * 4 * (q2.exp() * (q2 - p2)).sum(1)
        loss = loss + (weight[1:][at] * each).sum() / total
    loss.backward()
    found = gradients(student)
    assert max(float(g.abs().max()) for g in found.values()) > 1e-2
    return found


@pytest.mark.parametrize("form", FORMS)
def test_one_batch_of_eight(nets, reference, form):
    backward(*nets, [padded(ALL)], window(ALL, 1), form)
    agree(gradients(nets[0]), reference)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_accumulation(nets, reference, form, size):
    """Every micro-batch is padded to its own longest sentence."""
    batches = [padded(ALL[i : i + size]) for i in range(0, 8, size)]
    values = backward(*nets, batches, window(ALL, len(batches)), form)
    agree(gradients(nets[0]), reference)
    whole = backward(*nets, [padded(ALL)], window(ALL, 1), form)
    nets[0].zero_grad(set_to_none=True)
    torch.testing.assert_close(values, whole, rtol=1e-6, atol=0)  # the curves are float32


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "lines",
    [
        [[0, 1, 2], [3, 4], [5, 6, 7]],
        [[7, 6, 5, 4, 3, 2, 1, 0]],
        [[1], [0, 3], [2, 4, 5, 6, 7]],
    ],
)
def test_packed(nets, reference, form, lines):
    packed = lines_of([[ALL[i] for i in line] for line in lines])
    backward(*nets, [packed], window(ALL, 1), form)
    agree(gradients(nets[0]), reference)


def test_more_padding_of_any_token(nets, reference):
    backward(*nets, [padded(ALL, width=20, pad=VOCAB - 1)], window(ALL, 1))
    agree(gradients(nets[0]), reference)


@pytest.mark.parametrize("form", FORMS)
def test_two_processes_that_accumulate_and_pack(nets, reference, form):
    """Each rank's share is divided by the ranks, as DDP does; the ranks hold unlike numbers of tokens."""
    ranks = [[padded(ALL[:2]), lines_of([ALL[2:4]])], [lines_of([ALL[4:6], ALL[6:7]]), padded(ALL[7:])]]
    counts = [sum(len(b) for b in batches) for batches in ranks]
    assert counts[0] != counts[1]
    for batches in ranks:
        backward(*nets, batches, window(ALL, 4), form, share=1 / 2)
    agree(gradients(nets[0]), reference)


def test_a_micro_batch_without_rows(nets, reference):
    empty = padded([(ALL[0][0], torch.zeros_like(ALL[0][1]))])
    assert len(empty) == 0
    for form in FORMS:
        backward(*nets, [padded(ALL[:5]), empty, padded(ALL[5:])], window(ALL, 3), form)
        agree(gradients(nets[0]), reference)


def test_the_mean_of_micro_batch_means_would_be_wrong(nets, reference):
    """What these tests are there to find."""
    batches = [padded(ALL[i : i + 2]) for i in range(0, 8, 2)]
    for batch in batches:
        objective()(*answers(*nets, batch, "dense"), batch).total.div(4).backward()
    found = gradients(nets[0])
    assert max(float((found[n] - g).abs().max()) for n, g in reference.items()) > 1e-3


# ---- the loader ------------------------------------------------------------------------------------------------------


def text(pack):
    """16 sentences of unequal length and weight, 8 a step, from the data module itself."""
    source = RawText("made", Tokenizer.characters("abcdefghijklmnopqrstuv"), {"train": [told(n) for n in range(16)]})
    options = {"context": 24, "batch_size": 8, "pack": pack, "seed": 3}
    return TextData(source, **options, segment_weights={"prompt": 0.0, "reasoning": 0.3, "answer": 1.0})


def told(number):
    draw = torch.Generator().manual_seed(number)
    sizes = [int(torch.randint(least, most, (), generator=draw)) for least, most in ((0, 6), (0, 12), (1, 6))]
    kinds = torch.tensor([SEGMENTS.index(n) for n in ("prompt", "reasoning", "answer")])
    segments = kinds.repeat_interleave(torch.tensor(sizes))
    segments = torch.cat([segments, segments[-1:]])
    ids = torch.randint(0, VOCAB, (len(segments),), generator=draw)
    return Sequence(ids.int(), segments.to(torch.uint8), weight=0.5 + number / 16)


def loaded(nets, form, *, pack, accumulate, world):
    """The gradient of the first step, summed over ranks as DDP does."""
    rows = 0
    for rank in range(world):
        data = text(pack).to("cpu", accumulate, rank, world)
        batches = list(islice(data.train_dataloader(), accumulate))
        assert len(batches) == accumulate
        rows += sum(len(batch) for batch in batches)
        for batch in batches:
            assert batch.window.parts == accumulate * world
            wide = replace(batch, weight=batch.weight.double())
            (objective()(*answers(*nets, wide, form), wide).total / accumulate / world).backward()
    return gradients(nets[0]), rows


@pytest.fixture(scope="module")
def whole(nets):
    return loaded(nets, "dense", pack=False, accumulate=1, world=1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize(("accumulate", "world"), [(1, 1), (4, 1), (1, 2), (2, 2), (8, 1)])
def test_every_layout_of_the_loader(nets, whole, form, pack, accumulate, world):
    found, rows = loaded(nets, form, pack=pack, accumulate=accumulate, world=world)
    assert rows == whole[1]
    agree(found, whole[0], 1e-7)  # weights are float32


def test_a_cache_serves_every_layout(nets, tmp_path):
    """Written padded and one by one, read packed: the gradient is the live teacher's."""
    student, teacher = nets
    live = FrozenTeacher(teacher, LanguageModeling(VOCAB))
    manifest = TokenManifest(teacher="t", data="d", classes=VOCAB, k=VOCAB, dtype="float32")
    for k, most in ((VOCAB, 1e-6), (VOCAB - 1, 1e-5)):  # one class left for the tail: its bucket is the class
        manifest = replace(manifest, k=k)
        write_tokens(tmp_path / str(k), manifest, live, text(False).ordered_loader)
        cache = TokenCache(tmp_path / str(k), manifest)
        batch = next(iter(text(True).train_dataloader()))
        assert len(batch.inputs["input_ids"]) < 8
        found = []
        for said in (live(batch), cache(batch)):
            ours = Outputs(student(**batch.inputs)[batch.loss_mask])
            objective()(ours, said, replace(batch, weight=batch.weight.double())).total.backward()
            found.append(gradients(student))
        agree(*found, most)


# ---- real processes --------------------------------------------------------------------------------------------------


def test_two_real_processes(tmp_path):
    alone = bag_of_words(0)
    step(alone, [padded(ALL)], window(ALL, 1))
    script = ROOT / "tests" / "helpers" / "split_process.py"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(script.parent), str(script.parents[1])])}
    ranks = [subprocess.Popen([sys.executable, script, str(rank), str(tmp_path)], env=env) for rank in range(2)]
    try:
        assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for ours, expected in zip(found, alone.parameters(), strict=True):
            torch.testing.assert_close(ours, expected.grad, rtol=1e-12, atol=1e-14)


def test_projected_rows_are_those_of_where():
    batch = lines_of([ALL[:2], ALL[2:3]])
    hidden = torch.randn(*batch.loss_mask.shape, 4, dtype=torch.float64)
    weight = torch.randn(VOCAB, 4, dtype=torch.float64)
    rows = Projected(hidden, weight)[batch.loss_mask]
    assert rows.shape == (len(batch), VOCAB)
    torch.testing.assert_close(rows.dense(), (hidden @ weight.T)[batch.loss_mask])
