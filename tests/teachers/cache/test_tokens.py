"""The cache of tokens: what is read is what the teacher says, in any layout, or an error that says why not."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers.paths import ROOT
from helpers.text_cases import VOCAB, lines_of, padded, sentence, sentences
from kdlab.errors import UserError
from kdlab.functional import Batch, Outputs, Projected, Sampled, SequenceBatch, Sparse
from kdlab.losses import KL, CrossEntropy, Objective, ReverseKL
from kdlab.teachers import Teacher, TokenCache, TokenManifest, TokenWriter, tail_mass, write_tokens
from kdlab.teachers.cache import token_files as files
from kdlab.teachers.cache.sequences import sequence_key, sequences

torch.set_num_threads(1)
ALL = sentences()
MANIFEST = TokenManifest(teacher="abc", data="def", classes=VOCAB, k=4)
WEIGHT = torch.randn(VOCAB, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
PLACES = torch.randn(64, VOCAB, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


class Said(Teacher):
    """Logits of a row from the token there and its place in its sentence."""

    def __init__(self, dtype=torch.float32, projected=False, scale=1.0):
        self.dtype, self.projected, self.scale, self.calls = dtype, projected, scale, 0

    def __call__(self, batch, split="train"):
        self.calls += 1
        ids, place = batch.inputs["input_ids"], batch.inputs["position_ids"]
        hidden = (self.scale * (WEIGHT[ids] + PLACES[place, :6]))[batch.loss_mask].to(self.dtype)
        found = Projected(hidden, WEIGHT.to(self.dtype))
        return Outputs(found if self.projected else found.dense())


def in_pairs(chosen=ALL):
    return lambda split: (padded(chosen[i : i + 2]) for i in range(0, len(chosen), 2))


def made(folder, manifest=MANIFEST, teacher=None, batches=None):
    write_tokens(folder, manifest, teacher or Said(), batches or in_pairs())
    return TokenCache(folder, manifest)


LAYOUTS = {
    "padded": padded(ALL),
    "turned round": padded(ALL[::-1], width=20, pad=3),
    "packed": lines_of([ALL[:3], ALL[3:7], ALL[7:]]),
    "packed and turned round": lines_of([ALL[::-1]]),
    "some": padded(ALL[2:5]),
    "no positions": padded(ALL, positions=False),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("projected", [False, True])
def test_the_most_probable_classes_in_every_layout(tmp_path, layout, projected):
    cache = made(tmp_path / "c", replace(MANIFEST, dtype="float32"), Said(projected=projected))
    batch = LAYOUTS[layout]
    found = cache(batch).logits
    assert isinstance(found, Sparse) and found.shape == (len(batch), VOCAB)
    placed = batch if "position_ids" in batch.inputs else LAYOUTS["padded"]
    expected = Said()(placed).logits.log_softmax(-1)
    top = expected.topk(4)
    assert torch.equal(found.ids.long(), top.indices)
    torch.testing.assert_close(found.log_probs, top.values, rtol=1e-6, atol=1e-6)
    ascending = Said(torch.float64)(placed).logits.softmax(-1).sort(-1).values
    torch.testing.assert_close(found.tail.double(), ascending[:, :-4].sum(-1).log(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_half_precision_on_disk(tmp_path, dtype):
    cache = made(tmp_path / "c", teacher=Said(dtype))
    found = cache(padded(ALL)).logits
    expected = Sparse.of(Said(dtype)(padded(ALL)).logits, 4)
    assert found.log_probs.dtype == torch.float32
    torch.testing.assert_close(found.log_probs.double(), expected.log_probs.double(), rtol=2**-11, atol=1e-7)


def test_the_whole_vocabulary_is_exact(tmp_path):
    """Every divergence, and its gradient, to the bit."""
    cache = made(tmp_path / "c", replace(MANIFEST, k=VOCAB, dtype="float32"))
    batch = LAYOUTS["packed"]
    live = Said()(batch)
    assert torch.equal(cache(batch).logits, live.logits)
    grads = []
    for teacher in (live, cache(batch)):
        student = torch.randn(len(batch), VOCAB, generator=torch.Generator().manual_seed(3)).requires_grad_()
        objective = Objective({"ce": CrossEntropy(), "kl": KL(), "reverse": ReverseKL()}, temperature=2.0)
        objective(Outputs(student), teacher, batch).total.backward()
        grads.append(student.grad)
    assert torch.equal(*grads)
    half = made(tmp_path / "half", replace(MANIFEST, k=VOCAB))
    torch.testing.assert_close(half(batch).logits, live.logits, rtol=2**-11, atol=1e-7)
    assert tail_mass(cache) == 0


def test_draws_belong_to_the_sequence(tmp_path):
    manifest = replace(MANIFEST, form="sampled", k=400, seed=3, dtype="float32")
    cache = made(tmp_path / "c", manifest)
    batch = padded(ALL)
    found = cache(batch).logits
    assert isinstance(found, Sampled) and found.ids.shape == (len(batch), 400)
    p = Said()(batch).logits.double().softmax(-1)
    share = torch.zeros_like(p).scatter_add_(1, found.ids.long(), found.weights.double())
    assert (share - p).abs().max() < 5 * math.sqrt(0.25 / 400)
    torch.testing.assert_close(found.entropy.double(), -(p * p.log()).sum(-1), rtol=1e-5, atol=1e-6)
    again = made(tmp_path / "d", manifest, batches=lambda split: [lines_of([ALL[::-1]])])(batch).logits
    assert torch.equal(again.ids, found.ids)
    other = made(tmp_path / "e", replace(manifest, seed=4))(batch).logits
    assert not torch.equal(other.ids, found.ids)
    student = Outputs(torch.randn(len(batch), VOCAB))
    exact = KL()(student, Said()(batch), batch)
    assert (KL()(student, cache(batch), batch) - exact).abs().mean() < 0.1 * exact.mean()


def test_a_masked_class_has_no_mass(tmp_path):
    class Masked(Said):
        def __call__(self, batch, split="train"):
            logits = super().__call__(batch).logits
            logits[:, 2:] = -torch.inf
            return Outputs(logits)

    cache = made(tmp_path / "c", teacher=Masked())
    found = cache(padded(ALL)).logits
    assert found.log_probs.isfinite().all() and found.tail.isfinite().all()
    assert (found.log_probs.exp()[:, 2:] == 0).all() and (found.tail.exp() == 0).all()
    student = torch.zeros(len(found), VOCAB, requires_grad=True)
    KL()(Outputs(student), Outputs(found), padded(ALL)).sum().backward()
    assert student.grad.isfinite().all()
    assert tail_mass(cache) == 0


def test_tail_mass(tmp_path):
    expected = 1 - Said()(padded(ALL)).logits.double().softmax(-1).topk(4).values.sum(-1).mean()
    assert tail_mass(made(tmp_path / "c")) == pytest.approx(float(expected), rel=1e-5)
    with pytest.raises(UserError, match="accepted: topk"):
        tail_mass(made(tmp_path / "d", replace(MANIFEST, form="sampled", seed=1)))


def test_the_same_sentence_is_stored_once_and_asked_once(tmp_path):
    teacher = Said()
    cache = made(tmp_path / "c", teacher=teacher, batches=lambda split: [padded([*ALL, *ALL]), padded(ALL)])
    assert teacher.calls == 1 and len(cache) == len(padded(ALL))
    twice = padded([ALL[1], ALL[1]])
    found = cache(twice).logits.ids
    assert torch.equal(found[: len(found) // 2], found[len(found) // 2 :])


def test_an_empty_batch(tmp_path):
    nothing = padded([(ALL[0][0], torch.zeros_like(ALL[0][1]))])
    for k in (4, VOCAB):
        found = made(tmp_path / str(k), replace(MANIFEST, k=k), batches=lambda split: [nothing, padded(ALL)])(nothing)
        assert found.logits.shape == (0, VOCAB)


# ---- keys ------------------------------------------------------------------------------------------------------------


def test_keys_are_a_hash_of_the_tokens():
    found = sequences(lines_of([ALL[:2], ALL[2:3]], pad=5))
    assert [(s.line, s.start) for s in found] == [(0, 0), (0, len(ALL[0][0]) - 1), (1, 0)]
    for stretch, (ids, weight) in zip(found, ALL, strict=False):
        assert stretch.key == sequence_key(ids[:-1].numpy()) and len(stretch.key) == 16
        assert torch.equal(torch.from_numpy(stretch.positions).long(), weight[1:].nonzero()[:, 0])
    assert len({sequence_key(np.array(ids)) for ids in ([1, 2], [2, 1], [1, 2, 0], [258, 0])}) == 4


@pytest.mark.parametrize("kind", ["text", "sound"])
def test_encoder_inputs_belong_to_the_key(kind):
    def keys(source, mask, answer=(4, 5, 6)):
        name = "input_ids" if kind == "text" else "input_features"
        ids = torch.tensor([answer])
        inputs = {name: source, "attention_mask": mask, "decoder_input_ids": ids}
        batch = SequenceBatch(inputs, ids[0], loss_mask=torch.ones_like(ids, dtype=torch.bool))
        return [s.key for s in sequences(batch)]

    source = torch.tensor([[7, 8, 9, 0]]) if kind == "text" else torch.randn(1, 3, 4)
    mask = torch.tensor([[1, 1, 1, 0]])
    more = torch.cat([source, source[..., :2]], -1)
    assert keys(source, mask) == keys(more, torch.tensor([[1, 1, 1, 0, 0, 0]]))
    assert keys(source, mask) != keys(source + 1, mask)
    assert keys(source, mask) != keys(source, torch.ones_like(mask))
    assert keys(source, mask) != keys(source, mask, (4, 5, 7))
    coarse = torch.tensor([[1, 1]])
    assert keys(source, coarse) != keys(source + 1, coarse)


def test_two_keys_that_begin_alike(tmp_path, monkeypatch):
    """Half a key in common is no reason to take one sequence for another."""
    monkeypatch.setattr("kdlab.teachers.cache.sequences.sequence_key", lambda ids, source=b"": bytes(8) + _rest(ids))
    cache = made(tmp_path / "c", replace(MANIFEST, dtype="float32"))
    expected = Sparse.of(Said()(padded(ALL)).logits, 4)
    assert torch.equal(cache(padded(ALL)).logits.ids.long(), expected.ids)
    with pytest.raises(UserError, match="no such sequence"):
        cache(padded([sentence(8, 99)]))


def _rest(ids):
    return sequence_key(ids)[:8]


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_an_unknown_sequence(tmp_path):
    cache = made(tmp_path / "c")
    strange = sentence(8, 99)
    with pytest.raises(UserError, match=r"no such sequence \(1 of 3 in this batch.*accepted: .*live teacher") as caught:
        cache(padded([ALL[0], strange, ALL[1]]))
    assert str(strange[0][:7].tolist()) in str(caught.value)
    with pytest.raises(UserError, match="no such sequence"):
        cache(lines_of([ALL[:2]], positions=False))  # two sentences taken for one


def test_other_rows_of_a_known_sequence(tmp_path):
    cache = made(tmp_path / "c")
    ids, weight = ALL[2]
    for change in ([7], [7, 8]):
        less = weight.clone()
        less[change] = 0
        with pytest.raises(UserError, match="accepted: the segment weights it was written with"):
            cache(padded([(ids, less)]))
    moved = weight.clone()
    moved[4], moved[8] = 1, 0  # as many, elsewhere
    with pytest.raises(UserError, match="or others, count"):
        cache(padded([(ids, moved)]))


@pytest.mark.parametrize(
    ("entry", "value", "said"),
    [
        ("teacher", "xyz", "teacher is 'abc' in the cache and 'xyz' here"),
        ("k", 5, "k is 4 in the cache and 5 here"),
        ("data", "other", "data is 'def'"),
        ("splits", ("train", "val"), r"splits is \['train'\]"),
    ],
)
def test_a_manifest_that_differs(tmp_path, entry, value, said):
    made(tmp_path / "c")
    for use in (lambda m: TokenCache(tmp_path / "c", m), lambda m: write_tokens(tmp_path / "c", m, Said(), in_pairs())):
        with pytest.raises(UserError, match=said):
            use(replace(MANIFEST, **{entry: value}))
    assert replace(MANIFEST, **{entry: value}).key != MANIFEST.key
    made(tmp_path / "c")  # neither the lock nor the cache has suffered


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"form": "best"}, "teacher.cache.form: 'best'; accepted: topk, sampled"),
        ({"k": 0}, "teacher.cache.k: 0; accepted: from 1 to 23"),
        ({"k": 24}, "teacher.cache.k: 24"),
        ({"dtype": "int8"}, "teacher.cache.dtype: 'int8'"),
        ({"classes": 1}, "teacher.cache.classes: 1"),
    ],
)
def test_a_manifest_that_cannot_be(given, said):
    with pytest.raises(UserError, match=said):
        replace(MANIFEST, **given)


@pytest.mark.parametrize("form", ["topk", "sampled", "whole"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite(tmp_path, bad, form):
    class Broken(Said):
        def __call__(self, batch, split="train"):
            logits = super().__call__(batch).logits
            logits[3, 1] = bad
            return Outputs(logits)

    manifest = replace(MANIFEST, **({"k": VOCAB} if form == "whole" else {"form": form}))
    with pytest.raises(UserError, match="not finite"):
        write_tokens(tmp_path / "c", manifest, Broken(), in_pairs())
    with pytest.raises(UserError, match="not complete"):
        TokenCache(tmp_path / "c", manifest)


def test_logits_too_large_for_half_precision(tmp_path):
    with pytest.raises(UserError, match="not finite as float16"):
        write_tokens(tmp_path / "c", replace(MANIFEST, k=VOCAB), Said(scale=1e6), in_pairs())
    made(tmp_path / "d", teacher=Said(scale=1e6))  # logarithms of probabilities end where float16 does


def test_a_teacher_of_another_vocabulary(tmp_path):
    with pytest.raises(UserError, match="logits of 23 classes; accepted: 24"):
        write_tokens(tmp_path / "c", replace(MANIFEST, classes=24), Said(), in_pairs())


def test_a_full_disk_and_going_on(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage(2**30, 2**30, 2**24 - 1))
    with pytest.raises(UserError, match="MiB free; accepted: more room, a smaller k"):
        write_tokens(tmp_path / "c", MANIFEST, Said(), in_pairs())
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"needs .* more"):
        write_tokens(tmp_path / "c", MANIFEST, Said(), in_pairs(), rows=10**15)
    assert len(made(tmp_path / "c")) == len(padded(ALL))


def test_no_text(tmp_path):
    with pytest.raises(UserError, match="without token ids"):
        made(tmp_path / "c")(Batch(torch.zeros(2, 3), torch.zeros(2)))


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("classes", "most"), [(50257, 133), (151936, 197)])
def test_bytes_a_token(tmp_path, classes, most):
    manifest = TokenManifest(teacher="a", data="b", classes=classes, k=32)
    draw = np.random.default_rng(0)
    record = np.zeros((), manifest.record)
    assert record.itemsize < most
    with TokenWriter(tmp_path / "c", manifest) as writer:
        for _ in range(80):
            ids = np.sort(draw.permutation(classes)[:32])[None].repeat(128, 0)
            logs = np.log(draw.dirichlet(np.ones(33), 128))[:, :32]
            writer.append(draw.integers(0, classes, 129), np.arange(128), ids, logs)
    size = sum(file.stat().st_size for file in (tmp_path / "c").iterdir())
    tokens = 80 * 128
    assert len(TokenCache(tmp_path / "c", manifest)) == tokens
    assert size / tokens <= min(most, 200)
    assert f"{size // tokens} bytes a token" in TokenCache(tmp_path / "c", manifest).describe()


def test_large_ids_survive(tmp_path):
    for classes in (65536, 65537, 200000):
        manifest = TokenManifest(teacher="a", data="b", classes=classes, k=2)
        with TokenWriter(tmp_path / str(classes), manifest) as writer:
            writer.append([1, 2], [0], [[classes - 1, 0]], [[-0.5, -1.0]])
        batch = padded([(torch.tensor([1, 2]), torch.ones(2))])
        assert TokenCache(tmp_path / str(classes), manifest)(batch).logits.ids.tolist() == [[classes - 1, 0]]


def test_reading_is_fast(tmp_path):
    manifest = TokenManifest(teacher="a", data="b", classes=50257, k=32)
    draw = torch.Generator().manual_seed(0)
    chosen = [(torch.randint(0, 50257, (257,), generator=draw), torch.ones(257)) for _ in range(64)]
    ids = np.arange(32)[None].repeat(256, 0)
    with TokenWriter(tmp_path / "c", manifest) as writer:
        for tokens, _ in chosen:
            writer.append(tokens, np.arange(256), ids, np.full((256, 32), -4.0))
    cache, batch = TokenCache(tmp_path / "c", manifest), padded(chosen[:16])
    assert len(batch) == 4096
    times = []
    for _ in range(30):
        started = time.perf_counter()
        cache(batch)
        times.append(time.perf_counter() - started)
    assert min(times) < 2e-3, min(times)  # below 1 ms on an idle core


def test_a_torn_tail_is_cut_off_at_any_byte(tmp_path):
    whole = made(tmp_path / "whole")
    expected = whole(padded(ALL)).logits
    rows, index = ((tmp_path / "whole" / name).read_bytes() for name in ("rows.bin", "index.bin"))
    size = MANIFEST.record.itemsize
    for cut_rows, cut_index in [
        (0, 0),
        (1, 0),
        (size * 3 + 5, 0),
        (0, 36),
        (0, 37),
        (7, 31),
        (0, 3),
        (len(rows), 0),
        (0, 288),
    ]:
        folder = tmp_path / f"{cut_rows}-{cut_index}"
        folder.mkdir()
        (folder / "writing.json").write_bytes((tmp_path / "whole" / "manifest.json").read_bytes())
        (folder / "rows.bin").write_bytes(rows[: len(rows) - cut_rows])
        (folder / "index.bin").write_bytes(index[: len(index) - cut_index] + bytes(40 if cut_index else 0))
        teacher = Said()
        found = made(folder, teacher=teacher)(padded(ALL)).logits
        assert torch.equal(found.ids, expected.ids) and torch.equal(found.log_probs, expected.log_probs)
        assert teacher.calls <= (4 if cut_rows == len(rows) or cut_index == 288 else 1)
        assert (folder / "rows.bin").stat().st_size == len(rows)


def test_an_interruption_keeps_what_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "FLUSH_BYTES", 1)
    expected = made(tmp_path / "whole")(padded(ALL)).logits

    def broken(split):
        yield from list(in_pairs()(split))[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_tokens(tmp_path / "c", MANIFEST, Said(), broken)
    with pytest.raises(UserError, match="is not complete; accepted: write it to its end"):
        TokenCache(tmp_path / "c", MANIFEST)
    teacher, seen = Said(), []
    write_tokens(tmp_path / "c", MANIFEST, teacher, in_pairs(), lambda done, total: seen.append((done, total)), 50)
    assert teacher.calls == 1 and seen[-1] == (len(padded(ALL)), 50) and len(seen) == 4
    assert torch.equal(TokenCache(tmp_path / "c", MANIFEST)(padded(ALL)).logits.log_probs, expected.log_probs)
    write_tokens(tmp_path / "c", MANIFEST, teacher, broken)  # complete: nobody is asked
    assert teacher.calls == 1


KILLED = """
import sys, time
import numpy as np
from pathlib import Path
from kdlab.teachers.cache import token_files as files
files.FLUSH_BYTES = 1
manifest = files.TokenManifest(teacher="abc", data="def", classes=23, k=4)
with files.TokenWriter(Path(sys.argv[1]), manifest) as writer:
    for number in range(10**6):
        tokens = [number // 500, number % 500]
        writer.append(tokens, [0, 1], [[0, 1, 2, 3]] * 2, [[-1.0 - number / 64, -2, -3, -4]] * 2)
        if number == 20:
            print("going", flush=True)
"""


def test_a_killed_writer(tmp_path):
    folder = tmp_path / "c"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", KILLED, str(folder)], stdout=subprocess.PIPE, env=env) as process:
        assert process.stdout.readline().strip() == b"going"
        os.kill(process.pid, signal.SIGKILL)
    with TokenWriter(folder, MANIFEST) as writer:  # its lock went with it
        number = len(writer)
        assert number >= 20 and writer.rows == 2 * number
    cache = TokenCache(folder, MANIFEST)
    for n in (0, number - 1):
        batch = padded([(torch.tensor([n // 500, n % 500, 0]), torch.ones(3))])
        assert cache(batch).logits.log_probs[0, 0].item() == pytest.approx(-1.0 - n / 64, rel=1e-3)


def test_a_damaged_cache_is_refused(tmp_path):
    for name in ("rows.bin", "index.bin"):
        cache = made(tmp_path / name)
        del cache
        file = tmp_path / name / name
        file.write_bytes(file.read_bytes()[:-1])
        with pytest.raises(UserError, match=rf"{name} is damaged, or of another cache"):
            TokenCache(tmp_path / name, MANIFEST)
        (tmp_path / name / "manifest.json").write_text(json.dumps(MANIFEST.plain()))  # of an earlier version
        with pytest.raises(UserError, match="damaged; accepted: remove it"):
            TokenCache(tmp_path / name, MANIFEST)
    with pytest.raises(UserError, match=r"no readable manifest\.json"):
        TokenCache(tmp_path / "none", MANIFEST)


@pytest.mark.parametrize("k", [4, VOCAB], ids=["top 4", "all"])
def test_flipped_bytes_are_found(tmp_path, k, monkeypatch):
    manifest = replace(MANIFEST, k=k)
    before = made(tmp_path / "c", manifest)(padded(ALL)).logits
    for name in ("rows.bin", "index.bin"):
        file = tmp_path / "c" / name
        whole = file.read_bytes()
        for at in range(0, len(whole), max(1, len(whole) // 50)):
            file.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
            with pytest.raises(UserError, match=rf"{name} is damaged, or of another cache"):
                TokenCache(tmp_path / "c", manifest)
            with pytest.raises(UserError, match=rf"{name} is damaged, or of another cache"):  # and not grown
                TokenWriter(tmp_path / "c", manifest)
        file.write_bytes(whole)
    again = TokenCache(tmp_path / "c", manifest)(padded(ALL)).logits
    values = [getattr(one, "log_probs", one) for one in (before, again)]
    assert torch.equal(*values)
    file = tmp_path / "c" / "rows.bin"
    content = bytearray(file.read_bytes())
    content[manifest.record.itemsize - 9] ^= 0x10
    file.write_bytes(content)
    monkeypatch.setattr("kdlab.teachers.cache.tokens.check_files", lambda *_: None)
    blind = TokenCache(tmp_path / "c", manifest)(padded(ALL)).logits
    assert not torch.equal(values[0], getattr(blind, "log_probs", blind))  # what the check is for


@pytest.mark.parametrize("names", [["rows.bin"], ["index.bin"], ["rows.bin", "index.bin"]], ids=" and ".join)
def test_whole_files_of_another_teacher_are_found(tmp_path, names):
    made(tmp_path / "c")
    made(tmp_path / "other", batches=in_pairs(ALL[::-1]), teacher=Said(scale=2.0))
    for name in names:
        shutil.copy(tmp_path / "other" / name, tmp_path / "c" / name)
    with pytest.raises(UserError, match=rf"{names[0]} is damaged, or of another cache"):
        TokenCache(tmp_path / "c", MANIFEST)


def test_what_was_damaged_before_a_cache_is_complete_is_not_gone_on_from(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "FLUSH_BYTES", 1)

    def broken(split):
        yield from list(in_pairs()(split))[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_tokens(tmp_path / "c", MANIFEST, Said(), broken)
    rows = tmp_path / "c" / "rows.bin"
    whole = rows.read_bytes()
    rows.write_bytes(whole[:50] + bytes([whole[50] ^ 1]) + whole[51:])
    with pytest.raises(UserError, match=r"rows\.bin is damaged in its sequence 0; accepted: .*remove the folder"):
        TokenWriter(tmp_path / "c", MANIFEST)
    rows.write_bytes(whole)
    with TokenWriter(tmp_path / "c", MANIFEST) as writer:
        assert len(writer) == 6


def test_a_cache_of_an_earlier_version_is_read_and_grown(tmp_path):
    expected = made(tmp_path / "whole")(padded(ALL)).logits
    made(tmp_path / "c", batches=in_pairs(ALL[:4]))
    (tmp_path / "c" / "checks.bin").unlink()
    (tmp_path / "c" / "manifest.json").write_text(json.dumps(MANIFEST.plain()))
    assert len(TokenCache(tmp_path / "c", MANIFEST)._index) == 4
    assert TokenManifest.read(tmp_path / "c") == MANIFEST
    (tmp_path / "c" / "manifest.json").rename(tmp_path / "c" / "writing.json")
    found = made(tmp_path / "c")(padded(ALL)).logits
    assert torch.equal(found.log_probs, expected.log_probs) and not (tmp_path / "c" / "checks.bin").exists()
    assert set(json.loads((tmp_path / "c" / "manifest.json").read_text())["files"]) == {"rows.bin", "index.bin"}
    assert TokenManifest.read(tmp_path / "c") == MANIFEST


# ---- the writer ------------------------------------------------------------------------------------------------------


def test_what_an_endpoint_says(tmp_path):
    """Fewer classes than k, no tail, added in two sittings; read back in a batch."""
    ids, weight = ALL[0]
    rows = weight[1:].nonzero()[:, 0].tolist()
    logs = [[-0.25, -2.0, -4.0, -math.inf]] * len(rows)
    with TokenWriter(tmp_path / "c", MANIFEST) as writer:
        writer.append(ids, rows, [[5, 6, 7, 8]] * len(rows), logs)
        assert writer.complete is False
    with TokenWriter(tmp_path / "c", MANIFEST) as writer:
        assert writer.complete and len(writer) == 1
        ids2, weight2 = ALL[1]
        rows2 = weight2[1:].nonzero()[:, 0].tolist()
        writer.append(ids2, rows2, [[1, 2, 3, 4]] * len(rows2), [[-3.0] * 4] * len(rows2), [-0.5] * len(rows2))
        writer.append(ids2, rows2, [[9, 8, 7, 6]] * len(rows2), [[-1.0] * 4] * len(rows2))  # the first stays
    found = TokenCache(tmp_path / "c", MANIFEST)(padded(ALL[:2])).logits
    assert found.ids.tolist() == [[5, 6, 7, 8]] * len(rows) + [[1, 2, 3, 4]] * len(rows2)
    left = math.log(1 - math.exp(-0.25) - math.exp(-2) - math.exp(-4))
    assert found.tail.tolist() == pytest.approx([left] * len(rows) + [-0.5] * len(rows2), rel=1e-6)
    assert found.log_probs[0].exp().tolist() == pytest.approx(
        [math.exp(-0.25), math.exp(-2), math.exp(-4), 0], rel=1e-3
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ids": [[1, 2, 3]]}, r"ids \(1, 3\)"),
        ({"ids": [[1, 2, 3, 3]]}, "each once a row"),
        ({"ids": [[1, 2, 3, VOCAB]]}, "below 23"),
        ({"ids": [[-1, 2, 3, 4]]}, "below 23"),
        ({"log_probs": [[-1, -2, -3, 0.5]]}, "a log-probability of 0.5"),
        ({"log_probs": [[-1, -2, -3, math.nan]]}, "a log-probability of nan"),
        ({"rows": [3]}, "ascending, below 3"),
        ({"rows": [-1]}, "ascending, below 3"),
    ],
)
def test_what_an_endpoint_cannot_say(tmp_path, change, said):
    given = {"sequence_ids": [7, 8, 9], "rows": [1], "ids": [[1, 2, 3, 4]], "log_probs": [[-1, -2, -3, -4]]}
    with TokenWriter(tmp_path / "c", MANIFEST) as writer:
        with pytest.raises(UserError, match=said):
            writer.append(**given | change)
        assert len(writer) == 0
        writer.append(**given)
