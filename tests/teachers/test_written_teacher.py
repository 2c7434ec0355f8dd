"""A teacher of which only a cache is known, such as ``kdlab generate`` writes: it teaches, or says what is missing."""

import json

import pytest
import torch

from helpers.tiny import mistake, result, train
from kdlab.data import arithmetic
from kdlab.models import CausalLM
from kdlab.tasks import LanguageModeling
from kdlab.teachers import FrozenTeacher, TokenManifest, write_tokens

SUMS = {"train": 60, "val": 12, "test": 12, "max_steps": 3}
WORDS = [
    "experiment=reasoning_arithmetic",
    "student=gpt_tiny",
    "loss=[soft_targets]",
    "epochs=1",
    "teacher=written",
    *(f"data.{key}={value}" for key, value in SUMS.items()),
]


def cache_of(folder, **data):
    """A cache on the training sums by a fresh network, as one that knows the tokens but not the data."""
    data = arithmetic(**{**SUMS, **data})
    torch.manual_seed(0)
    net = CausalLM("gpt2", {"n_layer": 1, "n_head": 2, "n_embd": 8}, **data.network_kwargs)
    teacher = FrozenTeacher(net, LanguageModeling(data.vocab_size))
    manifest = TokenManifest("a model at a host", data.tokenizer.identity, data.vocab_size, k=4)
    write_tokens(folder, manifest, teacher, data.ordered_loader)
    return folder


def test_a_cache_alone_teaches(place, tmp_path):
    run = train(place, "written", *WORDS, f"teacher.cache={cache_of(tmp_path / 'cache')}")
    found = result(run)
    assert found["models"]["teacher"] is None and "its answers in" in found["teacher_trained_on"]
    points = [json.loads(line) for line in (run / "curves.jsonl").read_text().splitlines()]
    assert all(point["train/kl"] > 0 for point in points if "train/kl" in point)
    assert "kl" not in found["models"]["student"]["test"] and found["models"]["baseline"]["test"]["ppl"] > 1


@pytest.mark.parametrize(
    ("data", "words", "said"),
    [
        ({"train": 50}, [], "lacks 10 of the 60 training sequences of arithmetic"),
        ({"data_seed": 1}, [], "training sequences of arithmetic; accepted: data it was written for"),
        ({}, ["data.tokenizer=bytes"], "(257 tokens); accepted: the data.tokenizer that it was written with"),
        ({}, ["batch_transform=on_policy"], "batch_transform writes sequences that nobody has seen before"),
    ],
)
def test_a_cache_that_does_not_fit(capsys, place, tmp_path, data, words, said):
    cache = cache_of(tmp_path / "cache", **data)
    assert said in mistake(capsys, [*WORDS, *words, f"teacher.cache={cache}", f"output={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()


def test_no_cache_at_all(capsys, place, tmp_path):
    assert "holds no manifest.json" in mistake(capsys, [*WORDS, f"teacher.cache={tmp_path / 'none'}"])
