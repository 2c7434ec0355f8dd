"""The teacher's cache: what is read is what the teacher says, or an error that says why not."""

from __future__ import annotations

import json
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from kdlab.errors import UserError
from kdlab.functional import Batch, Outputs
from kdlab.losses import KL, SRRL, AttentionTransfer, CrossEntropy, Hint, Objective
from kdlab.system import integrity
from kdlab.system.files import file_hash
from kdlab.tasks import Classification
from kdlab.teachers import Arrays, CachedTeacher, FrozenTeacher, Manifest, check_manifest, dtype_for, write_cache

torch.set_num_threads(1)
C = 4
ROWS = {"train": (6, 2), "val": (5, 1)}
MANIFEST = Manifest(teacher="abc", data="def", transform="shift", classes=C, rows=ROWS)
INPUTS = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))


class Counting(FrozenTeacher):
    calls = 0

    def __call__(self, batch, split="train"):
        self.calls += 1
        return super().__call__(batch, split)


def live(seed=0, scale=1.0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, C))
    with torch.no_grad():
        net[2].weight.mul_(scale)
    return Counting(net, Classification(C))


def shown(examples, views):
    """A batch of (example, view) pairs; the view shifts the input."""
    key = torch.stack([torch.as_tensor(examples), torch.as_tensor(views)], 1)
    return Batch(INPUTS[key[:, 0]] + key[:, 1:].float(), key[:, 0] % C, key)


def batches(split, view):
    count = ROWS[split][0]
    for start in range(0, count, 4):
        rows = torch.arange(start, min(start + 4, count))
        yield shown(rows, torch.full_like(rows, view))


def made(folder, manifest=MANIFEST, teacher=None):
    teacher = teacher or live()
    write_cache(folder, manifest, teacher, batches)
    return teacher


def left_behind(folder: Path):
    return sorted(p.name for p in folder.parent.iterdir() if not p.name.endswith(".lock"))


@pytest.mark.parametrize("on_device", [0, 2**30], ids=["memory-mapped", "on the device"])
def test_a_cache_says_what_the_teacher_says(tmp_path, on_device):
    done = []
    teacher = live()
    write_cache(tmp_path / "c", MANIFEST, teacher, batches, lambda *at: done.append(at))
    assert done == [(4, 17), (6, 17), (10, 17), (12, 17), (16, 17), (17, 17)]
    cached = CachedTeacher(Arrays(tmp_path / "c", MANIFEST, on_device)).to(torch.device("cpu"))
    assert bool(cached.logits.held) == bool(on_device)
    for examples, views in (([5, 0, 3, 3], [1, 0, 0, 1]), ([2], [1])):
        asked = shown(examples, views)
        torch.testing.assert_close(cached(asked).logits, teacher(asked).logits, rtol=1e-5, atol=1e-6)
    asked = shown([4, 1], [0, 0])
    torch.testing.assert_close(cached(asked, "val").logits, teacher(asked).logits, rtol=1e-5, atol=1e-6)
    assert cached(asked).logits.dtype == torch.float32 and not cached(asked).logits.requires_grad
    assert "2 views" in cached.describe() and left_behind(tmp_path / "c") == ["c"]


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_memory_mapped_and_device_mode_agree(tmp_path, dtype, views):
    manifest = replace(MANIFEST, dtype=dtype, rows={"train": (6, views)})
    made(tmp_path / "c", manifest)
    asked = shown([5, 0, 3], [views - 1, 0, 0])
    mapped, held = (CachedTeacher(Arrays(tmp_path / "c", manifest, size))(asked).logits for size in (0, 2**30))
    assert torch.equal(mapped, held) and mapped.dtype == torch.float32


@pytest.mark.parametrize("on_device", [0, 2**30])
@pytest.mark.parametrize("asked", [([0], [2]), ([6], [0])], ids=["view", "example"])
def test_what_is_not_in_the_cache_is_never_another_example(tmp_path, on_device, asked):
    made(tmp_path / "c")
    key = torch.tensor([[asked[0][0], asked[1][0]]])
    with pytest.raises(IndexError):
        CachedTeacher(Arrays(tmp_path / "c", MANIFEST, on_device))(Batch(torch.zeros(1, 3), torch.zeros(1).long(), key))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 2e-3)])
def test_loss_and_gradient_of_a_cached_teacher(tmp_path, dtype, tolerance):
    """float16 keeps logits of size 10 to about 5e-3, and the loss and its gradient to 2e-3 of the live teacher's."""
    manifest = replace(MANIFEST, dtype=dtype)
    teacher = made(tmp_path / "c", manifest, live(scale=8.0))
    cached = CachedTeacher(Arrays(tmp_path / "c", manifest))
    asked = shown([0, 1, 2, 3, 4, 5], [0, 1, 0, 1, 0, 1])
    objective = Objective({"ce": CrossEntropy(), "kl": KL()}, temperature=4, alpha=0.9)
    found = []
    for who in (teacher, cached):
        s = torch.randn(6, C, generator=torch.Generator().manual_seed(1)).requires_grad_()
        loss = objective(Outputs(s), who(asked), asked).total
        loss.backward()
        found.append((loss.detach(), s.grad))
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= tolerance * a.norm()


# ---- features --------------------------------------------------------------------------------------------------------

MAPS = torch.randn(6, 1, 5, 5, generator=torch.Generator().manual_seed(3))
INSIDE = Manifest("abc", "def", "shift", 0, {"train": (6, 2)}, layers={"0": (3, 5, 5), "3": (3,)})
"""Of a feature map, and of the vectors that the classifier reads."""


def convolutions(seed=0, width=3):
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, C)
    )
    return Counting(net, Classification(C), ["0", "3"])


def pictures(examples, views):
    rows = shown(examples, views)
    return Batch(
        MAPS[rows.example_id[:, 0]] + rows.example_id[:, 1].float()[:, None, None, None], rows.targets, rows.example_id
    )


def all_pictures(split, view):
    for batch in batches(split, view):
        yield pictures(batch.example_id[:, 0], batch.example_id[:, 1])


def with_features(folder, dtype="float32", on_device=2**30, teacher=None):
    """The live teacher, and the same from caches of its logits and features."""
    teacher = teacher or convolutions()
    manifests = replace(MANIFEST, dtype=dtype), replace(INSIDE, dtype=dtype)
    for manifest in manifests:
        write_cache(folder / manifest.key, manifest, teacher, all_pictures)
    return teacher, CachedTeacher(*(Arrays(folder / m.key, m, on_device) for m in manifests), teacher.net)


@pytest.mark.parametrize("on_device", [0, 2**30], ids=["memory-mapped", "on the device"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float16", 2e-3)])
def test_features_are_the_teachers_for_training_rows_alone(tmp_path, dtype, tolerance, on_device):
    teacher, cached = with_features(tmp_path, dtype, on_device)
    cached.to(torch.device("cpu"))
    assert cached.layers == ("0", "3") and bool(cached.inside.held) == bool(on_device)
    before = teacher.calls
    for examples, views in (([5, 0, 3, 3], [1, 0, 0, 1]), ([2], [1])):
        asked = pictures(examples, views)
        found = cached(asked)
        assert teacher.calls == before
        expected = FrozenTeacher.__call__(teacher, asked)
        assert found.features.keys() == expected.features.keys() == {"0", "3"}
        for name, feature in found.features.items():
            assert feature.dtype == torch.float32 and not feature.requires_grad
            torch.testing.assert_close(feature, expected.features[name], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(found.logits, expected.logits, rtol=tolerance, atol=tolerance)
    assert cached(pictures([4, 1], [0, 0]), "val").features == {}
    assert cached.describe().count("2 views") == 2 and "features of 0, 3" in cached.describe()


@pytest.mark.parametrize("on_device", [0, 2**30])
@pytest.mark.parametrize("asked", [[0, 2], [6, 0], [1, -1]], ids=["view", "example", "clean"])
def test_features_that_are_not_there_are_never_another_example_s(tmp_path, on_device, asked):
    _, cached = with_features(tmp_path, on_device=on_device)
    with pytest.raises(IndexError):
        cached(Batch(torch.zeros(1, 1, 5, 5), torch.zeros(1).long(), torch.tensor([asked])))


TERMS = {"hint": lambda: Hint(["0", "3"], ["0", "3"]), "at": lambda: AttentionTransfer("0", "0")}
TERMS["srrl"] = lambda: SRRL("3", "3", relu=False)


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 5e-3)])
def test_loss_and_gradient_by_cached_features(tmp_path, name, dtype, tolerance):
    teacher, cached = with_features(tmp_path, dtype)
    student = convolutions(seed=1, width=2).net
    asked = pictures([0, 1, 2, 3, 4, 5], [0, 1, 0, 1, 0, 1])
    found = []
    for who in (teacher, cached):
        student.train().requires_grad_().zero_grad()
        objective = Objective({"ce": CrossEntropy(), "kl": KL(), name: TERMS[name]()}, temperature=4, alpha=0.9)
        torch.manual_seed(0)
        objective.setup(student, who.net)
        said = Classification(C).outputs(student, asked, objective.student_layers)
        objective.prepare(said, who(asked))
        losses = objective(said, who(asked), asked)
        losses.total.backward()
        weights = [p for p in (*student.parameters(), *objective.parameters()) if p.grad is not None]
        found.append((losses.values, *(p.grad.clone() for p in weights)))
    assert len(found[0]) > len(list(student.parameters()))
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= tolerance * a.norm() + 1e-7


@pytest.mark.parametrize(("dtype", "bias"), [("float32", float("nan")), ("float16", 1e5)])
def test_features_that_are_not_finite_as_stored(tmp_path, dtype, bias):
    teacher = convolutions()
    teacher.net[0].bias.data[0] = bias
    with pytest.raises(
        UserError, match=r"teacher: its features \(0\) are not finite for a row of the train split"
    ) as said:
        write_cache(tmp_path / "c", replace(INSIDE, dtype=dtype), teacher, all_pictures)
    assert left_behind(tmp_path / "c") == [] and ("cache=off" in str(said.value)) == (dtype == "float16")


def test_a_cache_of_features_is_another_than_one_of_logits(tmp_path):
    with_features(tmp_path)
    assert "layers" not in MANIFEST.plain(), "caches made before there were features stay what they are"
    assert INSIDE.arrays() == {"train-0": (6, 2, 3, 5, 5), "train-3": (6, 2, 3)}
    assert INSIDE.bytes == 6 * 2 * (75 + 3) * 4
    assert sorted(p.name for p in (tmp_path / INSIDE.key).iterdir()) == ["manifest.json", "train-0.npy", "train-3.npy"]
    with pytest.raises(UserError, match="classes is 0 in the cache and 4 here"):
        Arrays(tmp_path / INSIDE.key, MANIFEST)
    with pytest.raises(UserError, match=r"layers is .* in the cache and .* here"):
        Arrays(tmp_path / INSIDE.key, replace(INSIDE, layers={"0": (3, 5, 5)}))
    (tmp_path / INSIDE.key / "train-3.npy").unlink()
    with pytest.raises(UserError, match=r"train-3\.npy cannot be read"):
        Arrays(tmp_path / INSIDE.key, INSIDE)


# ---- writing ---------------------------------------------------------------------------------------------------------


def test_a_second_writer_waits_and_finds_it_done(tmp_path):
    teachers, errors = [live(), live()], []

    def work(teacher):
        try:
            made(tmp_path / "c", teacher=teacher)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(t,)) for t in teachers]
    for t in threads:
        t.start()
    for t in threads:
        t.join(timeout=60)
    assert not errors and not any(t.is_alive() for t in threads)
    assert sorted(t.calls for t in teachers) == [0, 6]
    check_manifest(tmp_path / "c", MANIFEST)
    stamp = (tmp_path / "c" / "train.npy").stat().st_mtime_ns
    assert made(tmp_path / "c").calls == 0 and (tmp_path / "c" / "train.npy").stat().st_mtime_ns == stamp


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, OSError])
def test_an_interrupted_write_leaves_nothing(tmp_path, error):
    teacher = live()

    def breaks(split, view):
        yield from batches(split, view)
        if split == "train" and view == 1:
            raise error

    with pytest.raises(error):
        write_cache(tmp_path / "c", MANIFEST, teacher, breaks)
    assert left_behind(tmp_path / "c") == []
    made(tmp_path / "c")  # and the next one is not in its way
    assert left_behind(tmp_path / "c") == ["c"]


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=MANIFEST.bytes))
    teacher = live()
    with pytest.raises(UserError, match=r"teacher\.cache: needs 0 MiB.*free; accepted: more room"):
        made(tmp_path / "c", teacher=teacher)
    assert teacher.calls == 0 and left_behind(tmp_path / "c") == []


@pytest.mark.parametrize(("dtype", "bias"), [("float32", float("nan")), ("float32", float("inf")), ("float16", 1e5)])
def test_a_teacher_that_is_not_finite_as_stored(tmp_path, dtype, bias):
    teacher = live()
    teacher.net[2].bias.data[0] = bias
    with pytest.raises(UserError, match="teacher: its logits are not finite for a row of the train split"):
        made(tmp_path / "c", replace(MANIFEST, dtype=dtype), teacher)
    assert left_behind(tmp_path / "c") == []


def test_examples_that_were_never_shown_are_not_cached_as_zeros(tmp_path):
    def short(split, view):
        yield next(iter(batches(split, view)))  # a loader that drops its last batch

    with pytest.raises(UserError, match="4 of 6 examples of the train split"):
        write_cache(tmp_path / "c", MANIFEST, live(), short)
    assert left_behind(tmp_path / "c") == []


# ---- reading what is not as it should be -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("teacher", "xyz"),
        ("data", "other data"),
        ("transform", "flip"),
        ("classes", 9),
        ("dtype", "float16"),
        ("rows", {"train": (6, 3), "val": (5, 1)}),
    ],
)
def test_a_mismatch_names_the_entry_and_both_values(tmp_path, name, other):
    made(tmp_path / "c")
    wanted = replace(MANIFEST, **{name: other})
    with pytest.raises(UserError) as caught:
        CachedTeacher(Arrays(tmp_path / "c", wanted))
    message = str(caught.value)
    found = MANIFEST.plain()[name]
    assert f"{name} is {found!r} in the cache and {wanted.plain()[name]!r} here" in message and "\n" not in message


def test_damaged_arrays(tmp_path):
    made(tmp_path / "c")
    path = tmp_path / "c" / "train.npy"
    whole = path.read_bytes()
    other_dtype, other_shape = np.zeros((6, 2, C), "float64"), np.zeros((6, 1, C), "float32")
    for damage in (
        lambda: path.write_bytes(whole[:-10]),
        lambda: path.write_bytes(b""),
        lambda: path.write_bytes(b"not an array"),
        lambda: np.save(path, other_shape),
        lambda: np.save(path, other_dtype),
        path.unlink,
    ):
        damage()
        for on_device in (0, 2**30):
            with pytest.raises(UserError, match=r"teacher\.cache: .*train\.npy") as caught:
                CachedTeacher(Arrays(tmp_path / "c", MANIFEST, on_device))
            assert "\n" not in str(caught.value)


def answers(folder, manifest=MANIFEST):
    return CachedTeacher(Arrays(folder, manifest))(shown([0, 1, 2, 3, 4, 5], [0, 1] * 3)).logits


def test_every_flipped_byte_of_an_array_is_found(tmp_path, monkeypatch):
    made(tmp_path / "c")
    before = answers(tmp_path / "c")
    for path in sorted((tmp_path / "c").glob("*.npy")):
        whole = path.read_bytes()
        for at in [*range(0, 128, 5), *range(128, len(whole))]:  # the header, and every number
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
            with pytest.raises(UserError, match=rf"{path.name} is damaged, or of another cache") as caught:
                Arrays(tmp_path / "c", MANIFEST)
            assert f"remove the folder {tmp_path / 'c'}: it is made again" in str(caught.value)
        path.write_bytes(whole)
    assert torch.equal(answers(tmp_path / "c"), before)
    path.write_bytes(whole)
    path = tmp_path / "c" / "train.npy"
    path.write_bytes(path.read_bytes()[:-2] + b"\x20" + path.read_bytes()[-1:])
    monkeypatch.setattr("kdlab.teachers.cache.rows.check_manifest_files", lambda *_: None)
    assert not torch.equal(answers(tmp_path / "c"), before)  # what the check is for


def test_a_whole_array_of_another_teacher_is_found(tmp_path):
    for name in ("train", "val"):
        made(tmp_path / name)
        made(tmp_path / f"{name}_other", teacher=live(seed=1))
        shutil.copy(tmp_path / f"{name}_other" / f"{name}.npy", tmp_path / name)
        with pytest.raises(UserError, match=rf"{name}\.npy is damaged, or of another cache"):
            Arrays(tmp_path / name, MANIFEST)


def test_features_have_hashes_too(tmp_path):
    with_features(tmp_path)
    said = [json.loads(path.read_text()) for path in tmp_path.rglob("manifest.json")]
    layers = [one for one in said if "layers" in one]
    assert len(layers) == 1 and set(layers[0]["files"]) == {f"train-{name}.npy" for name in layers[0]["layers"]}


def test_a_cache_of_an_earlier_version_is_read_and_told_of(tmp_path, caplog):
    made(tmp_path / "c")
    before = answers(tmp_path / "c")
    (tmp_path / "c" / "manifest.json").write_text(json.dumps(MANIFEST.plain()))
    with caplog.at_level("INFO", logger="kdlab"):
        assert torch.equal(answers(tmp_path / "c"), before)
    assert f"{tmp_path / 'c'} carries no hashes" in caplog.text
    path = tmp_path / "c" / "train.npy"
    whole = path.read_bytes()
    for at in range(128):  # whatever numpy's parser makes of a header, it is one line
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x08]) + whole[at + 1 :])
        try:
            Arrays(tmp_path / "c", MANIFEST)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)


def test_a_hash_is_computed_once_a_process(tmp_path, monkeypatch):
    made(tmp_path / "c")
    read = []
    monkeypatch.setattr(integrity, "file_hash", lambda path: read.append(path.name) or file_hash(path))
    for _ in range(3):
        Arrays(tmp_path / "c", MANIFEST)
    assert read == []  # known since it was written
    monkeypatch.setattr(integrity, "_KNOWN", {})
    for _ in range(3):
        Arrays(tmp_path / "c", MANIFEST)
    assert sorted(read) == ["train.npy", "val.npy"]
    os.utime(tmp_path / "c" / "val.npy")
    Arrays(tmp_path / "c", MANIFEST)
    assert sorted(read) == ["train.npy", "val.npy", "val.npy"]


@pytest.mark.parametrize("text", [None, "", "{", "[1]", "\xff"])
def test_a_damaged_manifest(tmp_path, text):
    made(tmp_path / "c")
    path = tmp_path / "c" / "manifest.json"
    path.unlink() if text is None else path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"no readable manifest\.json"):
        check_manifest(tmp_path / "c", MANIFEST)


# ---- the manifest ----------------------------------------------------------------------------------------------------


def test_the_manifest_survives_json_and_gives_a_key_of_all_it_says(tmp_path):
    made(tmp_path / "c")
    said = json.loads((tmp_path / "c" / "manifest.json").read_text())
    files = {name: file_hash(tmp_path / "c" / name) for name in ("train.npy", "val.npy")}
    assert said == {**MANIFEST.plain(), "files": files} and "files" not in MANIFEST.plain()
    assert MANIFEST.bytes == (6 * 2 + 5) * C * 4 and replace(MANIFEST, dtype="float16").bytes == 17 * C * 2
    others = [
        replace(MANIFEST, **{k: v})
        for k, v in (("teacher", "x"), ("data", "x"), ("transform", ""), ("dtype", "float16"))
    ]
    assert len({m.key for m in [MANIFEST, *others]}) == 5 and replace(MANIFEST).key == MANIFEST.key


def test_dtype_for():
    assert dtype_for({"train": (50_000, 1), "val": (5_000, 1)}, 100) == "float32"
    assert dtype_for({"train": (50_000, 20)}, 100) == "float16"
    assert dtype_for({"train": (2**26, 1)}, 1) == "float32" and dtype_for({"train": (2**26 + 1, 1)}, 1) == "float16"
