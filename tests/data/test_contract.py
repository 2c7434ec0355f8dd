"""What every data set keeps: a new one that a config may name is tested by being registered."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.tiny import write_cifar
from helpers.tiny_text import write_pairs, write_reasoning, write_rows, write_shakespeare, write_speech, write_wikitext
from kdlab import data
from kdlab.config.slots import SLOTS
from kdlab.data import DataModule
from kdlab.data.contract import Modality
from kdlab.errors import UserError
from kdlab.functional import Batch, SequenceBatch
from kdlab.functional.types import Target

BUILDERS = sorted(name.rpartition(".")[2] for name in SLOTS["data"].builders)
ELSEWHERE = {"cifar100", "fashion_mnist", "mnist", "gsm8k"}
"""Data sets that are read by the code of another one, whose files the test writes."""


def own_pictures(folder: Path, patch: pytest.MonkeyPatch) -> DataModule:
    for number in range(24):
        path = folder / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), number * 9, dtype=np.uint8)).save(path)
    return data.image_folder(root=str(folder), size=8)


def own_tensors(folder: Path, patch: pytest.MonkeyPatch) -> DataModule:
    path = folder / "own.npz"
    np.savez(path, inputs=np.random.default_rng(0).random((40, 5), dtype=np.float32), targets=np.arange(40) % 3)
    return data.tensors(inputs=str(path))


def own_table(folder: Path, patch: pytest.MonkeyPatch) -> DataModule:
    lines = [f"{n},{n % 7},{'yes' if n % 2 else 'no'}" for n in range(40)]
    (folder / "own.csv").write_text("\n".join(["a,b,target", *lines]) + "\n")
    return data.csv(path=str(folder / "own.csv"))


def own_text(folder: Path, patch: pytest.MonkeyPatch) -> DataModule:
    (folder / "own.txt").write_text("to be or not to be that is the question\n" * 60)
    return data.text_files(path=str(folder / "own.txt"), context=16, batch_size=4)


def own_pairs(folder: Path, patch: pytest.MonkeyPatch) -> DataModule:
    return data.pairs(path=str(write_pairs(folder / "own.jsonl")), tokenizer="bytes")


def own_traces(folder: Path, patch: pytest.MonkeyPatch) -> DataModule:
    rows = [{"question": f"{n} + 1?", "reasoning": f"one more than {n}", "answer": str(n + 1)} for n in range(30)]
    return data.traces(path=str(write_rows(folder / "own.jsonl", rows)))


MAKERS: dict[str, Callable[[Path, pytest.MonkeyPatch], DataModule]] = {
    "arithmetic": lambda folder, patch: data.arithmetic(train=40, val=8, test=8),
    "cifar10": lambda folder, patch: data.cifar10(root=str(write_cifar(folder, patch)), val=10),
    "cqa": lambda folder, patch: data.cqa(root=str(write_reasoning(folder)), vocab=300),
    "csv": own_table,
    "digits": lambda folder, patch: data.digits(),
    "image_folder": own_pictures,
    "pairs": own_pairs,
    "shakespeare": lambda folder, patch: data.shakespeare(root=str(write_shakespeare(folder, patch)), context=16),
    "spoken_digits": lambda folder, patch: data.spoken_digits(root=str(write_speech(folder)), mels=12),
    "svamp": lambda folder, patch: data.svamp(root=str(write_reasoning(folder)), vocab=300),
    "synthetic": lambda folder, patch: data.synthetic(),
    "tensors": own_tensors,
    "text_files": own_text,
    "traces": own_traces,
    "wikitext": lambda folder, patch: data.wikitext(root=str(write_wikitext(folder)), name="wikitext-2", context=16),
}


@pytest.fixture(params=BUILDERS)
def module(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataModule:
    if request.param in ELSEWHERE:
        pytest.skip("read by the code of another data set")
    return MAKERS[request.param](tmp_path, monkeypatch)


def values(batch: Batch) -> list[Any]:
    inputs = batch.inputs if isinstance(batch.inputs, dict) else {"inputs": batch.inputs}
    return [*inputs.values(), batch.targets]


def test_it_says_what_it_is(module: DataModule, tmp_path: Path) -> None:
    assert module.modality in get_args(Modality) and module.target in get_args(Target)
    assert module.default_task == DataModule.DEFAULT_TASK[module.target]
    assert module.name and module.kind and module.describe() and "\n" not in module.describe()
    assert len(module.fingerprint) == 64 and module.fingerprint == module.fingerprint
    assert module.counts["train"] > 0 and module.batch_size > 0 and module.rows("train") > 0
    assert module.classified == (module.num_classes > 1) and bool(module.vocab_size) == hasattr(module, "tokenizer")
    described = module.inference_metadata(tmp_path)
    assert json.loads(json.dumps(described, default=str))
    assert module.network_kwargs
    module.check_same_classes(module)


def test_loaders_give_batches_that_repeat(module: DataModule) -> None:
    module.to("cpu")
    loader = module.train_dataloader()
    first, again = (next(iter(loader)) for _ in range(2))
    assert isinstance(first, SequenceBatch if not module.classified else Batch)
    assert first.window is not None and first.window.rows >= first.window.labelled > 0 and first.window.parts == 1
    assert first.example_id is not None and first.example_id.shape[1] == 2
    assert all(torch.equal(a, b) for a, b in zip(values(first), values(again), strict=True))
    if module.classified:
        assert int(first.targets.max()) < module.num_classes
    else:
        assert int(first.loss_mask.sum()) == len(first) and int(first.targets.max()) < module.vocab_size
    seen = sum(len(batch) for batch in module.ordered_loader("train"))
    assert seen == module.rows("train")


def test_a_step_in_parts_is_the_same_step(module: DataModule) -> None:
    module.to("cpu")
    whole = next(iter(module.train_dataloader()))
    module.to("cpu", accumulate=2)
    loader = iter(module.train_dataloader())
    parts = [next(loader), next(loader)]
    assert sum(len(part) for part in parts) == len(whole)
    assert parts[0].window == parts[1].window and parts[0].window.parts == 2
    assert parts[0].window.rows == pytest.approx(whole.window.rows)
    assert torch.equal(torch.cat([part.targets for part in parts]).sort()[0], whole.targets.sort()[0])


def test_a_split_that_is_not_there_is_a_mistake(module: DataModule) -> None:
    module.to("cpu")
    with pytest.raises(UserError):
        module.ordered_loader("nowhere")


def test_every_data_set_is_looked_at() -> None:
    assert set(MAKERS) | ELSEWHERE == set(BUILDERS)
