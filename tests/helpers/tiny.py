"""Experiments small enough for a test: real runs through the command line, in this process, in seconds."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdlab.cli.main import main
from kdlab.data.datasets import cifar
from kdlab.experiment import error_overlap
from kdlab.training import checkpoints

QUIET = ("trainer=cpu", "trainer.progress=none", "trainer.log_every=1", "logger=none")
"""One thread's worth of output and hardware; every step is a point of the curves."""

FEW = ("data.fraction=0.1", "teacher.data.fraction=0.1", "teacher.epochs=1", "epochs=1")
"""120 training digits and two steps an epoch, for teacher and student."""

MLP = ("experiment=kd_resnet", "student=mlp", "teacher=mlp", "teacher.epochs=1")
"""The digits by perceptrons without BatchNorm: a run in about a second."""

OFTEN = ("trainer.save_minutes=0.00001", "baseline=false")
"""A checkpoint after every step, so that a kill lands inside an epoch."""


@pytest.fixture
def place(tmp_path_factory, monkeypatch) -> Iterator[Path]:
    """The output folder that all tests of a session share, so that each teacher and baseline is trained once."""
    folder = tmp_path_factory.getbasetemp() / "tiny"
    folder.mkdir(exist_ok=True)
    monkeypatch.setenv("KDLAB_THREADS", "1")
    monkeypatch.setenv("XDG_STATE_HOME", str(folder / "state"))
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    # what every run draws at its end would cost the tests more than their training
    for draws in ("report", "redraw"):
        monkeypatch.setattr(import_module("kdlab.experiment.runner"), draws, lambda *_: None)
    yield folder


@pytest.fixture
def drawing(place, monkeypatch) -> Path:
    """As ``place``, where runs draw what their students inherited."""
    for draws in ("report", "redraw"):
        monkeypatch.setattr(import_module("kdlab.experiment.runner"), draws, getattr(error_overlap, draws))
    return place


def train(place: Path, name: str, *words: str, status: int = 0) -> Path:
    """Run an experiment under a name of its own; returns its newest folder."""
    assert main([*QUIET, *words, f"output={place}", f"name={name}"]) == status
    return newest(place, name)


def newest(place: Path, name: str) -> Path:
    """The newest run folder of a name."""
    return max((place / name).iterdir(), key=lambda folder: folder.stat().st_mtime_ns)


def result(run: Path) -> dict[str, Any]:
    """The ``result.json`` of a finished run."""
    return json.loads((run / "result.json").read_text())


def weights(run: Path, file: str = "student.pt") -> dict[str, torch.Tensor]:
    """A run's deployable weights."""
    return torch.load(run / file, weights_only=True)


def checkpoint(run: Path) -> dict[str, Any]:
    """A run's last checkpoint."""
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def steps(run):
    """The optimizer steps in the last checkpoint; it is replaced as a whole, so it can be read at any moment."""
    try:
        return int(checkpoint(run)["global_step"])
    except (FileNotFoundError, NotADirectoryError):
        return 0


def curve(run: Path, name: str) -> list[float]:
    """The points of one curve, in order."""
    points = [json.loads(line) for line in (run / "curves.jsonl").read_text().splitlines()]
    return [point[name] for point in points if name in point]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two state dicts hold the same bits."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def farthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The greatest difference between two state dicts."""
    assert a.keys() == b.keys()
    return max(float((a[key].double() - b[key].double()).abs().max()) for key in a)


def stop_and_go(place: Path, monkeypatch, name: str, words: Sequence[str], at: int) -> Path:
    """Run whole, and once more but stopped after step ``at`` and resumed: the same bits. Returns the second run."""
    whole = train(place, f"{name}_whole", *words)
    plain = checkpoints.Saver.on_train_batch_end

    def hook(self, trainer, *args):
        plain(self, trainer, *args)
        if trainer.global_step == at:
            raise RuntimeError("the machine is gone")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints.Saver, "on_train_batch_end", hook)
        run = train(place, f"{name}_again", *words, status=1)
    assert checkpoint(run)["global_step"] == at < result(whole)["steps"]
    again = train(place, f"{name}_again", *words, f"resume={run}")
    assert again == run and same(weights(again), weights(whole))
    assert same(checkpoint(again)["state_dict"], checkpoint(whole)["state_dict"])
    assert curve(again, "train/loss") == curve(whole, "train/loss")
    return again


def mistake(capsys, words: list[str], output: Path | None = None) -> str:
    """The one line that a user's mistake prints, without its prefix; nothing may be written to ``output``."""
    capsys.readouterr()
    if output is not None:
        assert not output.exists()
        words = [*words, f"output={output}"]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("kdlab: error: ") and said.count("\n") == 1, said
    assert output is None or not output.exists(), list(output.rglob("*"))
    return said.removeprefix("kdlab: error: ").rstrip()


def write_cifar(folder: Path, monkeypatch, rows: int = 60) -> Path:
    """A few random pictures in the publisher's python layout of CIFAR-10 and CIFAR-100."""
    monkeypatch.setattr(cifar, "CIFAR10", replace(cifar.CIFAR10, train_rows=rows, test_rows=20))
    monkeypatch.setattr(cifar, "CIFAR100", replace(cifar.CIFAR100, train_rows=rows, test_rows=20))

    def pictures(number: int, seed: int, classes: int = 10) -> dict[str, Any]:
        pixels = np.random.default_rng(seed).integers(0, 256, (number, 3072), dtype=np.uint8)
        return {"data": pixels, "labels": [i % classes for i in range(number)]}

    ten, hundred = folder / "cifar-10-batches-py", folder / "cifar-100-python"
    for target in (ten, hundred):
        target.mkdir(parents=True, exist_ok=True)
    for number in range(1, 6):
        (ten / f"data_batch_{number}").write_bytes(pickle.dumps(pictures(rows // 5, number)))
    (ten / "test_batch").write_bytes(pickle.dumps(pictures(20, 9)))
    (ten / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {i}" for i in range(10)]}))
    for split, number in (("train", rows), ("test", 20)):
        held = pictures(number, number, 10)
        held["fine_labels"] = held.pop("labels")
        held["coarse_labels"] = [i % 5 for i in range(number)]
        (hundred / split).write_bytes(pickle.dumps(held))
    names = {"fine_label_names": [f"fine {i}" for i in range(10)], "coarse_label_names": [f"c{i}" for i in range(5)]}
    (hundred / "meta").write_bytes(pickle.dumps(names))
    return folder


def unsealed(run: Path) -> Path:
    """The run, its hashes left out: they would find any damage, and whoever makes a folder can leave them out."""
    content = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps({k: v for k, v in content.items() if k not in ("files", "checksum")}))
    return run
