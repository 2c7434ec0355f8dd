"""Every data set as its publisher lays it out, in small; downloads; and everything that can be wrong with a file."""

from __future__ import annotations

import ast
import functools
import gzip
import hashlib
import http.server
import inspect
import io
import os
import pickle
import tarfile
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import kdlab.data as data_sets
from helpers.paths import CONF
from kdlab.config import builder
from kdlab.data import (
    ImageData,
    StreamLoader,
    cifar10,
    cifar100,
    csv,
    digits,
    fashion_mnist,
    image_folder,
    mnist,
    safe_pickle,
    synthetic,
    tensors,
)
from kdlab.data.datasets import cifar
from kdlab.data.datasets import mnist as mnist_files
from kdlab.data.download import Remote, fetch, unpack
from kdlab.errors import UserError

FILES = CONF / "data"


def joined(loader, name="inputs"):
    return torch.cat([getattr(batch, name) for batch in loader])


# ---- digits, and the options of each data set


def test_digits():
    data = digits()
    assert data.counts == {"train": 1200, "labelled": 1200, "val": 237, "test": 360}
    assert (data.num_classes, data.input_shape, data.class_names[3]) == (10, (1, 8, 8), "3")
    pixels = joined(data.ordered_loader("train"))
    assert data.mean == pytest.approx([pixels.mean().item()], rel=1e-5)
    assert data.std == pytest.approx([pixels.std().item()], rel=1e-3)
    assert data.describe() == "1200 labelled rows of digits"
    assert len(data.fingerprint) == 64 and data.fingerprint == digits(seed=5, labels=50).fingerprint


def test_digits_with_other_splits_and_classes():
    assert digits(val=0).counts["train"] == 1437 and digits(val=0).val_dataloader() == []
    assert digits(val=0.1).counts == {"train": 1293, "labelled": 1293, "val": 144, "test": 360}
    high = digits(classes=[9, 5])
    assert high.class_names == ["9", "5"] and high.num_classes == 2
    whole = digits()
    first = whole.ordered_loader("test")
    nines = joined(first)[joined(first, "targets") == 9]
    assert joined(high.ordered_loader("test"))[joined(high.ordered_loader("test"), "targets") == 0].equal(nines)
    assert high.fingerprint != digits(classes=[5, 9]).fingerprint != whole.fingerprint
    assert digits(classes=["9", "5"]).fingerprint == high.fingerprint
    assert high.describe().endswith("rows of digits (classes 9, 5)")


@pytest.fixture
def defaults(monkeypatch, tmp_path):
    """What each argument of a data set function is when it is not given: (name of the function) → {argument: value}."""
    (tmp_path / "table.csv").write_text("a,target\n1,x\n2,y\n")
    given = {
        "csv": {"path": str(tmp_path / "table.csv")},
        "image_folder": {"root": str(write_pictures(tmp_path / "pictures", {"a": 1, "b": 1}))},
        "tensors": {"inputs": torch.zeros(2, 1), "targets": torch.arange(2)},
    }
    for module in (cifar, mnist_files):
        monkeypatch.setattr(module, "_read", lambda *_: None)
    common = {name: p.default for name, p in inspect.signature(ImageData).parameters.items() if name != "source"}
    passed: dict = {}
    monkeypatch.setattr(ImageData, "__init__", lambda self, source, **options: passed.update(options))

    def of(name):
        function = getattr(data_sets, name)
        parameters = inspect.signature(function).parameters.values()
        own = {p.name: p.default for p in parameters if p.kind is not p.VAR_KEYWORD}
        passed.clear()
        function(**given.get(name, {}))
        return own | common | passed

    return of


@pytest.mark.parametrize("path", sorted(FILES.glob("*.yaml")), ids=lambda p: p.stem)
def test_config_names_every_argument_with_its_default(path, defaults):
    text = path.read_text()
    assert text.startswith("# ")
    config = yaml.safe_load(text)
    if "defaults" in config:
        return  # a variant of another option
    target = config.pop("_target_")
    if "tokenizer" in builder.signature(target).parameters:
        return  # text: tests/test_text_data.py
    expected = defaults(target.removeprefix("kdlab.data."))
    assert list(config) == list(expected)
    assert set(config) == set(builder.signature(target).parameters) and not builder.signature(target).open
    own = {"digits_low": {"classes"}, "digits_high": {"classes"}, "cifar10": {"augment"}, "cifar100": {"augment"}}
    for name, value in config.items():
        if name == "root":
            assert value == f"${{oc.env:KDLAB_DATA,data}}/{expected[name].removeprefix('data/')}"
        elif name not in own.get(path.stem, ()):
            assert value == expected[name], name


def test_common_arguments_are_those_of_image_data():
    mine, theirs = builder.signature("kdlab.data.module.Common"), builder.signature("kdlab.data.ImageData")
    types = {name: ast.unparse(p.annotation) for name, p in theirs.parameters.items() if name != "source"}
    assert {name: ast.unparse(p.annotation) for name, p in mine.parameters.items()} == types


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": 1201}, r"data\.labels: 1201; there are 1200 training rows; accepted: 0 .*10\.\.1200"),
        ({"labels": 9}, r"data\.labels: 9; accepted: 0 \(no labels\), 10\.\.1200"),
        ({"labels": -1}, r"data\.labels: -1"),
        ({"labels": 0.5}, r"data\.labels: 0\.5 is no whole number"),
        ({"val": 1438}, r"data\.val: 1438; there are 1437 rows"),
        ({"val": 1437}, r"class '0' of digits has no training row left .* data\.val"),
        ({"val": -1}, r"data\.val: -1"),
        ({"val": "many"}, r"data\.val: 'many' is no number"),
        ({"val": 10.5}, r"data\.val: 10\.5 is neither"),
        ({"fraction": 0}, r"data\.fraction: 0; accepted: above 0"),
        ({"fraction": 2}, r"data\.fraction: 2"),
        ({"fraction": 0.002}, r"class '.' of digits has no training row left"),
        ({"unlabelled_ratio": -1}, r"data\.unlabelled_ratio: -1"),
        ({"classes": [3, 12]}, r"data\.classes: unknown class 12; accepted: 0\.\.9"),
        ({"classes": ["3", "eight"]}, r"data\.classes: unknown class 'eight'"),
        ({"classes": [3, 3]}, r"data\.classes: .*two or more different"),
        ({"classes": [3]}, r"data\.classes: .*two or more different"),
        ({"batch_size": 1}, r"data\.batch_size: 1; accepted: a whole number, at least 2"),
        ({"batch_size": 32.0}, r"data\.batch_size: 32\.0"),
        ({"eval_batch_size": -3}, r"data\.eval_batch_size: -3"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(UserError, match=message):
        digits(**options)


def test_synthetic_is_balanced_noisy_and_stable():
    data = synthetic()
    assert data.counts == {"train": 1360, "labelled": 1360, "val": 240, "test": 400}
    assert data.input_shape == (10,) and len(data.mean) == 10
    assert data.fingerprint == synthetic().fingerprint != synthetic(data_seed=1).fingerprint
    assert (joined(data.ordered_loader("train"), "targets").float().mean() - 0.5).abs() < 0.1
    assert synthetic(num_classes=5, n=500).num_classes == 5
    for options, message in (({"n": 3}, "data.n: 3"), ({"noise": -1}, "data.noise"), ({"features": 0}, "features")):
        with pytest.raises(UserError, match=message):
            synthetic(**options)


# ---- CIFAR


def cifar_rows(rows, seed, label="labels", classes=10):
    draw = np.random.default_rng(seed)
    return {"data": draw.integers(0, 256, (rows, 3072), np.uint8), label: [i % classes for i in range(rows)]}


def write_pickle(path, content, protocol=4):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol=protocol))


@pytest.fixture
def small_cifar(monkeypatch, tmp_path):
    monkeypatch.setattr(cifar, "CIFAR10", replace(cifar.CIFAR10, train_rows=100, test_rows=30))
    monkeypatch.setattr(cifar, "CIFAR100", replace(cifar.CIFAR100, train_rows=60, test_rows=30))
    folder = tmp_path / "cifar-10-batches-py"
    for number in range(1, 6):
        write_pickle(folder / f"data_batch_{number}", cifar_rows(20, number), protocol=2 if number == 1 else 4)
    write_pickle(folder / "test_batch", cifar_rows(30, 9))
    write_pickle(folder / "batches.meta", {"label_names": list("abcdefghij")})
    fine = {**cifar_rows(60, 1, "fine_labels", 6), "coarse_labels": [i % 2 for i in range(60)]}
    folder = tmp_path / "cifar-100-python"
    write_pickle(folder / "train", fine)
    write_pickle(folder / "test", {key: value[:30] for key, value in fine.items()})
    write_pickle(folder / "meta", {"fine_label_names": list("uvwxyz"), "coarse_label_names": ["even", "odd"]})
    return tmp_path


def test_cifar_reads_the_publishers_layout(small_cifar):
    data = cifar10(str(small_cifar), val=20, batch_size=16)
    assert data.counts == {"train": 80, "labelled": 80, "val": 20, "test": 30}
    assert data.input_shape == (3, 32, 32) and data.class_names == list("abcdefghij")
    assert joined(data.val_dataloader(), "targets").bincount().tolist() == [2] * 10
    whole = cifar10(str(small_cifar / "cifar-10-batches-py"), val=0)
    raw = np.concatenate([cifar_rows(20, number)["data"] for number in range(1, 6)]).reshape(-1, 3, 32, 32)
    assert joined(whole.ordered_loader("train")).equal(torch.from_numpy(raw) / 255)
    assert whole.mean == pytest.approx((raw / 255).mean((0, 2, 3)).tolist())
    assert whole.std == pytest.approx((raw / 255).std((0, 2, 3)).tolist())
    fine = cifar100(str(small_cifar), val=0)
    assert fine.num_classes == 6 and cifar100(str(small_cifar), label="coarse", val=0).class_names == ["even", "odd"]
    with pytest.raises(UserError, match=r"data\.label: unknown label 'course'; nearest: coarse"):
        cifar100(str(small_cifar), label="course")


def test_python_2_pickles_are_read(tmp_path):
    # what Python 2 wrote: its str type (opcode U), and an array built from such bytes
    array = np.arange(6, dtype=np.uint8).reshape(2, 3)
    head = b"\x80\x02}q\x00(U\x04dataq\x01"
    new = pickle.dumps(array, protocol=2)[2:-1].replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    (tmp_path / "old").write_bytes(head + new + b"U\x06labelsq\xf0]q\xf1(K\x01K\x00eu.")
    content = safe_pickle.load(tmp_path / "old", "data.root")
    assert np.array_equal(content["data"], array) and content["labels"] == [1, 0]


@pytest.mark.parametrize("protocol", range(2, 6))
def test_arrays_and_containers_pass(tmp_path, protocol):
    content = {"a": [np.arange(3), np.float32(2.5)], b"b": (1, None, "x", b"y"), "c": np.zeros((2, 2), order="F")}
    write_pickle(tmp_path / "file", content, protocol)
    back = safe_pickle.load(tmp_path / "file", "data.root")
    assert np.array_equal(back["a"][0], content["a"][0]) and back["a"][1] == 2.5 and back[b"b"] == content[b"b"]


class Payload:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    victim = tmp_path / "victim"
    payloads = {
        "posix.system": Payload(os.system, f"touch {victim}"),
        "builtins.eval": Payload(eval, f"open({str(victim)!r}, 'w')"),
        "builtins.getattr": Payload(getattr, "x", "upper"),
        "numpy.save": Payload(np.save, str(victim), np.zeros(1)),
        "pathlib": Path("x"),
        "functools.partial": functools.partial(print),
    }
    for name, payload in payloads.items():
        write_pickle(tmp_path / "bad", {"data": payload})
        with pytest.raises(UserError, match=rf"data\.root: .*bad is refused: it wants {name}.*accepted") as caught:
            safe_pickle.load(tmp_path / "bad", "data.root")
        assert "\n" not in str(caught.value)
    assert not victim.exists() and not Path(f"{victim}.npy").exists()


def test_damaged_and_foreign_cifar_files(small_cifar):
    folder = small_cifar / "cifar-10-batches-py"
    batch = folder / "data_batch_3"
    good = batch.read_bytes()
    cases = [
        (good[: len(good) // 2], "truncated, damaged or no pickle"),
        (b"", "truncated, damaged or no pickle"),
        (b"not a pickle at all", "truncated, damaged or no pickle"),
        (pickle.dumps([1, 2]), "holds a list"),
        (pickle.dumps({"data": 1}), r"has no 'labels'; it holds data"),
        (pickle.dumps({"data": np.zeros((20, 10), np.uint8), "labels": [0] * 20}), "accepted: uint8 rows of 3072"),
        (pickle.dumps(cifar_rows(19, 3)), "has 19 pictures and 19 labels; the publisher's has 20"),
        (pickle.dumps({**cifar_rows(20, 3), "labels": [11] * 20}), r"class id 11; accepted: 0\.\.9"),
    ]
    for content, message in cases:
        batch.write_bytes(content)
        with pytest.raises(UserError, match=message):
            cifar10(str(small_cifar), val=0)
    batch.unlink()
    with pytest.raises(UserError, match=r"data_batch_3 is missing; .*data\.download=true"):
        cifar10(str(small_cifar), val=0)
    with pytest.raises(UserError, match=r"data\.root: no cifar-10-batches-py in .*data\.download=true.*https://"):
        cifar10(str(small_cifar / "nowhere"))


# ---- downloads


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A local publisher: (its folder, its address, the paths it was asked for). Names with ``cut`` break off."""
    monkeypatch.setenv("no_proxy", "*")
    root, asked = tmp_path / "server", []
    root.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(root))

        def do_GET(self):
            asked.append(self.path)
            if "cut" not in self.path:
                super().do_GET()
                return
            content = (root / self.path[1:]).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        yield root, f"http://127.0.0.1:{httpd.server_address[1]}", asked
        httpd.shutdown()


def remote(server, name, content):
    (server[0] / name).write_bytes(content)
    return Remote(f"{server[1]}/{name}", "sha256:" + hashlib.sha256(content).hexdigest())


def test_fetch_is_checked_and_happens_once(server, tmp_path):
    there = remote(server, "file.bin", os.urandom(3_000_000))
    for _ in range(2):
        path = fetch(there, tmp_path / "here")
        assert path.read_bytes() == (server[0] / "file.bin").read_bytes()
    assert server[2] == ["/file.bin"]
    assert sorted(p.name for p in path.parent.iterdir()) == ["file.bin", "file.bin.lock"]
    path.write_bytes(b"something else")
    with pytest.raises(UserError, match=r"is there with checksum sha256:.* remove the file"):
        fetch(there, tmp_path / "here")


def test_fetch_keeps_nothing_that_is_wrong(server, tmp_path):
    content = os.urandom(100_000)
    right = remote(server, "file.bin", content)
    with pytest.raises(UserError, match=r"has checksum sha256:.*, the publisher's is sha256:00; nothing was kept"):
        fetch(Remote(right.url, "sha256:00"), tmp_path / "a")
    with pytest.raises(UserError, match="broke off after 50000 of 100000 bytes"):
        fetch(remote(server, "cut.bin", content), tmp_path / "a")
    with pytest.raises(UserError, match=r"data\.download: cannot fetch .*none\.bin \(Not Found|File not found"):
        fetch(Remote(f"{server[1]}/none.bin", right.checksum), tmp_path / "a")
    with pytest.raises(UserError, match=r"cannot fetch http://127\.0\.0\.1:9/x .*put it into"):
        fetch(Remote("http://127.0.0.1:9/x", right.checksum), tmp_path / "a")
    assert not [p for p in (tmp_path / "a").iterdir() if p.suffix != ".lock"]


def tar_of(folder, path):
    with tarfile.open(path, "w:gz") as tar:
        tar.add(folder, folder.name)
    return path.read_bytes()


def test_cifar_is_fetched_unpacked_and_read(server, small_cifar, monkeypatch, tmp_path):
    content = tar_of(small_cifar / "cifar-10-batches-py", tmp_path / "archive.tar.gz")
    there = remote(server, "cifar-10-python.tar.gz", content)
    monkeypatch.setattr(cifar, "CIFAR10", replace(cifar.CIFAR10, remote=there))
    fresh = tmp_path / "fresh"
    assert cifar10(str(fresh), download=True, val=0).counts["train"] == 100
    assert cifar10(str(fresh), val=0).fingerprint == cifar10(str(small_cifar), val=0).fingerprint
    assert server[2] == ["/cifar-10-python.tar.gz"]
    only_archive = tmp_path / "archive"
    only_archive.mkdir()
    (only_archive / "cifar-10-python.tar.gz").write_bytes(content)
    assert cifar10(str(only_archive), val=0).counts["train"] == 100


def test_archives_that_are_damaged_or_climb_out(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "file").write_bytes(os.urandom(50_000))
    content = tar_of(tmp_path / "inner", tmp_path / "whole.tar.gz")
    (tmp_path / "cut.tar.gz").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="truncated, damaged or no tar archive"):
        unpack(tmp_path / "cut.tar.gz", "other", "data.root")
    with pytest.raises(UserError, match="holds no folder other"):
        unpack(tmp_path / "whole.tar.gz", "other", "data.root")
    with tarfile.open(tmp_path / "evil.tar.gz", "w:gz") as tar:
        member = tarfile.TarInfo("../escaped")
        member.size = 1
        tar.addfile(member, io.BytesIO(b"x"))
    with pytest.raises(UserError, match="truncated, damaged"):
        unpack(tmp_path / "evil.tar.gz", "evil", "data.root")
    assert not (tmp_path.parent / "escaped").exists() and not (tmp_path / "escaped").exists()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


# ---- idx


def idx_bytes(array):
    return bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


@pytest.fixture
def small_mnist(monkeypatch, tmp_path):
    arrays = {}
    for part, rows in (("train", 40), ("t10k", 20)):
        draw = np.random.default_rng(rows)
        arrays[f"{part}-images-idx3-ubyte"] = draw.integers(0, 256, (rows, 28, 28), np.uint8)
        arrays[f"{part}-labels-idx1-ubyte"] = (np.arange(rows) % 10).astype(np.uint8)
    for name in ("MNIST", "FASHION_MNIST"):
        monkeypatch.setattr(mnist_files, name, replace(getattr(mnist_files, name), rows=(40, 20)))
    root = tmp_path / "mnist"
    root.mkdir()
    for number, (name, array) in enumerate(arrays.items()):
        if number % 2:
            (root / name).write_bytes(idx_bytes(array))
        else:
            (root / f"{name}.gz").write_bytes(gzip.compress(idx_bytes(array)))
    return root, arrays


def test_mnist_reads_plain_and_compressed_files(small_mnist):
    root, arrays = small_mnist
    data = mnist(str(root), val=10)
    assert data.counts == {"train": 30, "labelled": 30, "val": 10, "test": 20} and data.input_shape == (1, 28, 28)
    expected = torch.from_numpy(arrays["t10k-images-idx3-ubyte"])[:, None] / 255
    assert joined(data.test_dataloader()).equal(expected)
    assert fashion_mnist(str(root), val=0).class_names[9] == "Ankle boot"


def test_mnist_is_fetched_file_by_file(small_mnist, server, monkeypatch, tmp_path):
    _, arrays = small_mnist
    checksums = [remote(server, f"{n}.gz", gzip.compress(idx_bytes(a))).checksum for n, a in arrays.items()]
    monkeypatch.setattr(mnist_files, "MNIST", replace(mnist_files.MNIST, base=server[1], checksums=tuple(checksums)))
    assert mnist(str(tmp_path / "new"), download=True, val=0).counts["train"] == 40
    assert len(server[2]) == 4


def test_damaged_and_foreign_idx_files(small_mnist):
    root, _ = small_mnist
    labels, images = root / "train-labels-idx1-ubyte", root / "train-images-idx3-ubyte.gz"
    good, good_images = labels.read_bytes(), images.read_bytes()
    for content, message in (
        (good[:-5], "holds 35 values, its header says 40"),
        (good + b"x", "holds 41 values"),
        (b"\x89PNG....", "is no idx file of bytes"),
        (b"", "is no idx file of bytes"),
        (idx_bytes(np.zeros(39, np.uint8)), "have 40 pictures and 39 labels; the publisher's have 40"),
        (idx_bytes(np.full(40, 10, np.uint8)), r"class id 10; accepted: 0\.\.9"),
        (idx_bytes(np.zeros((40, 2), np.uint8)), "accepted: pictures of 28 x 28"),
    ):
        labels.write_bytes(content)
        with pytest.raises(UserError, match=message):
            mnist(str(root), val=0)
    labels.write_bytes(good)
    images.write_bytes(good_images[: len(good_images) // 2])
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte\.gz is truncated or damaged"):
        mnist(str(root), val=0)
    images.unlink()
    with pytest.raises(UserError, match=r"no train-images-idx3-ubyte .*data\.download=true"):
        mnist(str(root))


# ---- image folders


def write_pictures(root, counts, size=(20, 14), mode="RGB"):
    draw = np.random.default_rng(0)
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = draw.integers(0, 256, (size[1], size[0], 3), np.uint8)
            Image.fromarray(pixels).convert(mode).save(root / folder / f"{number:02}.png")
    return root


def test_image_folder_with_and_without_splits(tmp_path):
    counts = {"train/ant": 12, "train/bee": 10, "val/ant": 3, "val/bee": 2, "test/bee": 4}
    data = image_folder(str(write_pictures(tmp_path / "insects", counts)), size=8)
    assert data.counts == {"train": 22, "labelled": 22, "val": 5, "test": 4}
    assert data.class_names == ["ant", "bee"] and data.input_shape == (3, 8, 8)
    assert data.describe() == "22 labelled rows of insects"
    with pytest.raises(UserError, match=r"data\.val: 3; insects has 5 validation rows of its own"):
        image_folder(str(tmp_path / "insects"), size=8, val=3)
    assert image_folder(str(tmp_path / "insects"), size=8, val=0).counts["val"] == 0
    write_pictures(tmp_path / "flat", {"a": 30, "b": 20}, mode="L")
    flat = image_folder(str(tmp_path / "flat"), size=8, channels=1, test=10, val=0.1)
    assert flat.counts == {"train": 36, "labelled": 36, "val": 4, "test": 10} and flat.input_shape == (1, 8, 8)


def test_pictures_are_cropped_to_the_middle_square(tmp_path):
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 200
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for name in "ab":
        for number in range(5):
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    assert (joined(image_folder(str(tmp_path), size=10).ordered_loader("train")) == 200 / 255).all()


@pytest.mark.parametrize("options", [{}, {"augment": ["crop", "trivial"]}, {"augment": ["flip", "cutmix"]}])
@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_batches_are_those_from_memory(tmp_path, options, workers):
    root = str(write_pictures(tmp_path / "set", {"a": 30, "b": 25}))
    options = {"size": 8, "batch_size": 16, "val": 0, "labels": 20, **options}
    kept, streamed = image_folder(root, **options), image_folder(root, memory=0, workers=workers, **options)
    assert isinstance(streamed.train_dataloader(), StreamLoader)
    assert streamed.mean == pytest.approx(kept.mean) and streamed.std == pytest.approx(kept.std)
    one, other = kept.train_dataloader(), streamed.train_dataloader()
    for epoch, skip in ((0, 0), (1, 0), (1, 2)):
        for loader in (one, other):
            loader.sampler.set_epoch(epoch)
            loader.skip = skip
        pairs = list(zip(one, other, strict=True))
        assert len(pairs) == len(one) - skip
        for batch, again in pairs:
            assert batch.inputs.equal(again.inputs) and batch.targets.equal(again.targets)
            assert batch.window == again.window
    assert joined(streamed.ordered_loader("test")).equal(joined(kept.ordered_loader("test")))


def test_streaming_draws_nothing_from_the_global_generator(tmp_path):
    data = image_folder(str(write_pictures(tmp_path, {"a": 6, "b": 6})), size=8, memory=0, workers=1, batch_size=4)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(data.train_dataloader())
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize("workers", [None, 0, 1])
def test_a_picture_that_cannot_be_decoded_is_named(tmp_path, workers):
    write_pictures(tmp_path, {"a": 12, "b": 12})
    broken = tmp_path / "b" / "03.png"
    broken.write_bytes(broken.read_bytes()[:60])
    streaming = {} if workers is None else {"memory": 0, "workers": workers}
    with pytest.raises(UserError, match=r"data\.root: .*b/03\.png is no picture") as caught:
        data = image_folder(str(tmp_path), size=8, **streaming)
        for split in ("train", "val", "test"):
            list(data.ordered_loader(split))
    assert "Traceback" not in str(caught.value)


def test_mistakes_in_image_folders(tmp_path):
    with pytest.raises(UserError, match=r"data\.root: there is no folder .*nowhere"):
        image_folder(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no sub-folders"):
        image_folder(str(tmp_path / "empty"))
    (tmp_path / "empty" / "a").mkdir()
    with pytest.raises(UserError, match=r"empty/a has no pictures; accepted: files that end in \.png"):
        image_folder(str(tmp_path / "empty"))
    root = write_pictures(tmp_path / "set", {"train/cat": 9, "train/dog": 9, "test/cta": 2})
    with pytest.raises(UserError, match=r"unknown class folder 'cta'; nearest: cat"):
        image_folder(str(root))
    with pytest.raises(UserError, match=r"data\.test: 3; .*test is there"):
        image_folder(str(root), test=3)
    for options in ({"size": 0}, {"channels": 2}, {"workers": -1}):
        with pytest.raises(UserError, match=rf"data\.{next(iter(options))}: "):
            image_folder(str(write_pictures(tmp_path / "ok", {"a": 9, "b": 9})), **options)


# ---- tensors and tables


def test_tensors_from_every_kind_of_file(tmp_path):
    inputs, targets = torch.randint(0, 256, (50, 1, 6, 6), dtype=torch.uint8), torch.arange(50) % 5
    torch.save({"inputs": inputs, "targets": targets}, tmp_path / "set.pt")
    np.savez(tmp_path / "set.npz", inputs=inputs.numpy(), targets=targets.numpy())
    np.save(tmp_path / "x.npy", inputs[:, 0].numpy())
    np.save(tmp_path / "y.npy", targets.numpy())
    made = tensors(inputs, targets)
    assert made.counts == {"train": 41, "labelled": 41, "val": 4, "test": 5} and made.input_shape == (1, 6, 6)
    read = [
        tensors(str(tmp_path / "set.pt")),
        tensors(str(tmp_path / "set.npz")),
        tensors(str(tmp_path / "x.npy"), str(tmp_path / "y.npy")),
    ]
    assert {data.fingerprint for data in read} == {made.fingerprint} and read[0].name == "set"
    np.savez(tmp_path / "split.npz", inputs=inputs, targets=targets, test_inputs=inputs[:7], test_targets=targets[:7])
    own = tensors(str(tmp_path / "split.npz"), val=0, class_names=list("abcde"))
    assert own.counts["test"] == 7 and own.counts["train"] == 50 and own.class_names == list("abcde")


def test_mistakes_in_tensors(tmp_path):
    inputs, targets = torch.rand(20, 3), torch.arange(20) % 2
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04broken")
    (tmp_path / "what.txt").write_text("x")
    np.savez(tmp_path / "odd.npz", input=inputs, targets=targets)
    torch.save({"inputs": Payload(print, "x")}, tmp_path / "evil.pt")
    nan = inputs.clone()
    nan[4, 1] = torch.nan
    for arguments, message in (
        ((), r"data\.inputs: null"),
        ((inputs,), r"data\.targets: there are no targets"),
        ((str(tmp_path / "none.pt"),), r"data\.inputs: there is no file .*none\.pt"),
        ((str(tmp_path / "cut.npz"),), "truncated, damaged"),
        ((str(tmp_path / "evil.pt"),), "holds more than plain tensors"),
        ((str(tmp_path / "what.txt"),), r"of no known kind; accepted: \.pt"),
        ((str(tmp_path / "odd.npz"),), r"unknown array 'input'; nearest: inputs"),
        ((nan, targets), r"row 4 has an input that is not finite"),
        ((inputs, targets[:19]), r"has 20 inputs and 19 targets"),
        ((inputs, targets.float()), r"data\.targets: targets of torch\.float32"),
        ((inputs, targets - 1), r"class id -1"),
        ((inputs[:0], targets[:0]), r"has no rows"),
        ((inputs[:, 0], targets), r"data\.inputs: shape \(20,\)"),
        ((torch.randint(0, 9, (20, 1, 4, 4)), targets), r"pictures of torch\.int64; accepted: uint8"),
    ):
        with pytest.raises(UserError, match=message):
            tensors(*arguments)
    with pytest.raises(UserError, match=r"class id 1; accepted: 0\.\.0"):
        tensors(inputs, targets, class_names=["one"])


def test_csv(tmp_path):
    rows = [f"{i},{i * 0.5},{'odd' if i % 2 else 'even'},{i % 3}" for i in range(60)]
    (tmp_path / "t.csv").write_text("\n".join(["a,b,kind,c", *rows, ""]))
    data = csv(str(tmp_path / "t.csv"), target="kind", val=6, test=0.2)
    assert data.counts == {"train": 42, "labelled": 42, "val": 6, "test": 12}
    assert data.class_names == ["even", "odd"] and data.input_shape == (3,) and data.name == "t"
    inputs = joined(data.ordered_loader("train"))
    assert data.mean == pytest.approx(inputs.mean(0).tolist()) and data.std == pytest.approx(
        inputs.std(0, unbiased=False).tolist(), rel=1e-5
    )
    numbers = csv(str(tmp_path / "t.csv"), target="c", columns=["b"], test_path=str(tmp_path / "t.csv"))
    assert numbers.input_shape == (1,) and numbers.counts["test"] == 60 and numbers.class_names == ["0", "1", "2"]
    for options, message in (
        ({"target": "kynd"}, r"data\.target: unknown column 'kynd'; nearest: kind"),
        ({"target": "kind", "columns": ["bb"]}, r"data\.columns: unknown column 'bb'"),
        ({"target": "c"}, r"row 1, column 'kind': 'even' is no finite number; .*data\.columns"),
        ({"target": "a", "columns": ["b"]}, r"data\.target: column 'a' .* 60 different values"),
        ({"target": "kind", "delimiter": ";"}, r"data\.target: unknown column 'kind'"),
    ):
        with pytest.raises(UserError, match=message):
            csv(str(tmp_path / "t.csv"), **options)
    for content, message in (
        ("a,kind\n1,x\n2\n", "row 2 has 1 values, the header 2"),
        ("a,kind\n1,x\nnan,y\n", "row 2, column 'a': 'nan' is no finite number"),
        ("a,kind\n", "no rows below its header"),
        ("a,kind\n1,x\n2,x\n", "holds 1 different values"),
    ):
        (tmp_path / "bad.csv").write_text(content)
        with pytest.raises(UserError, match=message):
            csv(str(tmp_path / "bad.csv"), target="kind")
    with pytest.raises(UserError, match=r"data\.path: cannot read .*none\.csv"):
        csv(str(tmp_path / "none.csv"))
    with pytest.raises(UserError, match=r"data\.path: null"):
        csv()


# ---- with Lightning


def test_lightning_is_told_the_epoch_and_takes_empty_validation():
    from lightning.pytorch import LightningModule, Trainer

    class Watch(LightningModule):
        def __init__(self):
            super().__init__()
            self.layer, self.seen = torch.nn.Linear(64, 10), []

        def training_step(self, batch, index):
            self.seen.append(batch.example_id[:, 0].clone())
            return torch.nn.functional.cross_entropy(self.layer(batch.inputs.flatten(1)), batch.targets)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    data, model = digits(batch_size=256, val=0), Watch()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    Trainer(max_epochs=2, accelerator="cpu", enable_model_summary=False, **quiet).fit(model, datamodule=data)
    for epoch in range(2):
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        assert torch.cat(model.seen[epoch * 6 : epoch * 6 + 6]).equal(joined(loader, "example_id")[:, 0])
