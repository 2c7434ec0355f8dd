"""The twelve pairs of the distillation benchmark on CIFAR-100: the recipe by its numbers, and a few steps of each."""

import json
import math
import re
from functools import lru_cache

import pytest
import torch

from helpers.tiny import curve, result, train, write_cifar
from kdlab.cli.hydra.compose import composer
from kdlab.cli.validate import validate
from kdlab.config import builder
from kdlab.config import options as config_options
from kdlab.data.datasets import cifar
from kdlab.data.order import Order
from kdlab.experiment import build
from kdlab.models import cost

PAIRS = {
    ("resnet56", "resnet20"): (69.06, 70.66, 71.97),
    ("resnet110", "resnet32"): (71.14, 73.08, 74.11),
    ("resnet110", "resnet20"): (69.06, 70.67, 71.06),
    ("resnet32x4", "resnet8x4"): (72.50, 73.33, 76.32),
    ("wrn_40_2", "wrn_16_2"): (73.26, 74.92, 76.23),
    ("wrn_40_2", "wrn_40_1"): (71.98, 73.54, 74.81),
    ("vgg13", "vgg8"): (70.36, 72.98, 74.68),
    ("vgg13", "mobilenetv2"): (64.60, 67.37, 69.71),
    ("resnet50", "mobilenetv2"): (64.60, 67.35, 70.35),
    ("resnet32x4", "shufflenetv1"): (70.50, 74.07, 76.45),
    ("resnet32x4", "shufflenetv2"): (71.82, 74.45, 77.07),
    ("wrn_40_2", "shufflenetv1"): (70.50, 74.83, 76.70),
}
"""(teacher, student) → published top-1 of the student alone, by KD and by DKD."""

PARAMETERS = {
    "resnet20": 278_324,
    "resnet32": 472_756,
    "resnet56": 861_620,
    "resnet110": 1_736_564,
    "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860,
    "wrn_16_2": 703_284,
    "wrn_40_1": 569_780,
    "wrn_40_2": 2_255_156,
    "vgg8": 3_965_028,
    "vgg13": 9_462_180,
    "mobilenetv2": 812_836,
    "shufflenetv1": 949_258,
    "shufflenetv2": 1_355_528,
    "resnet50": 23_705_252,
}
"""Of the benchmark's networks with 100 classes."""

SMALL = ("mobilenetv2", "shufflenetv1", "shufflenetv2")
"""Students that train at a learning rate of 0.01."""


def name_of(pair):
    return f"cifar100_{pair[0]}_{pair[1]}"


def composed(*words):
    with composer() as found:
        composition = found.compose(list(words))
        validate(composition, found)
        return composition.config


class Colour:
    """What data of CIFAR-100 say to a network."""

    name, target, kind = "CIFAR-100", "class", "pictures"

    def check_reads(self, net, key):
        """Any network for pictures may read them."""

    @property
    def network_kwargs(self):
        return {"num_classes": 100, "in_channels": 3, "image_size": (32, 32), "mean": [0.5] * 3, "std": [0.25] * 3}


@lru_cache
def size_of(network):
    """Parameters of a network, which several pairs share."""
    return cost.parameters(build.network(json.loads(network), Colour(), 0, "student"))


def test_there_is_an_experiment_for_each_pair_and_no_other():
    files = (config_options.shipped() / "experiment").glob("cifar100_*.yaml")
    assert {path.stem for path in files} == {name_of(pair) for pair in PAIRS}


@pytest.mark.parametrize("pair", PAIRS, ids=name_of)
def test_a_pair_is_the_published_recipe(pair):
    config = composed(f"experiment={name_of(pair)}")
    data, plain = config["data"], {"_target_": "torch.optim.SGD", "momentum": 0.9, "weight_decay": 5e-4}
    assert config["optimizer"] == {**plain, "lr": 0.01 if pair[1] in SMALL else 0.05}
    assert config["teacher"]["optimizer"] == {**plain, "lr": 0.05}
    assert config["teacher"]["scheduler"] == config["scheduler"] and config["scheduler"]["shape"] == "multistep"
    assert config["epochs"] == config["teacher"]["epochs"] == 240
    assert (data["batch_size"], data["val"], data["augment"]) == (64, 0, ["crop", "flip"])
    objective = build.objective(config["loss"])
    assert dict(zip(objective.names, objective.weights(), strict=True)) == pytest.approx({"ce": 0.1, "kl": 0.9})
    assert objective.temperature.now == 4
    for network, key in zip((config["teacher"]["net"], config["student"]), pair, strict=True):
        assert size_of(json.dumps(network)) == PARAMETERS[key]


@pytest.mark.parametrize("pair", PAIRS, ids=name_of)
def test_a_pair_says_what_was_published(pair):
    text = (config_options.shipped() / "experiment" / f"{name_of(pair)}.yaml").read_text()
    said = re.search(r"student alone ([\d.]+), KD ([\d.]+),\n# DKD ([\d.]+)", text)
    assert said and tuple(map(float, said.groups())) == PAIRS[pair]
    assert "Has not been run to its end here" in text


# ---- the course of the learning rate


def test_the_learning_rate_falls_after_150_180_and_210_of_240_epochs():
    """By counting: 50,000 rows in batches of 64 are 782 steps an epoch, the last of 16 rows."""
    config = composed("experiment=cifar100_resnet56_resnet20")
    steps = math.ceil(cifar.CIFAR100.train_rows / config["data"]["batch_size"])
    assert steps == 782 and Order(torch.zeros(50_000, dtype=torch.int64), 64).steps == steps
    course = builder.build(config["scheduler"], "scheduler", slot="scheduler")
    lr = [0.05 * course(step / (240 * steps), 240) for step in range(240 * steps)]
    expected = [0.05 * 0.1 ** sum(epoch >= drop for drop in (150, 180, 210)) for epoch in range(240)]
    for epoch in range(240):  # the first and the last step of every epoch
        assert lr[epoch * steps] == pytest.approx(expected[epoch])
        assert lr[(epoch + 1) * steps - 1] == pytest.approx(expected[epoch])
    assert [round(x, 9) for x in dict.fromkeys(lr)] == [0.05, 0.005, 0.0005, 0.00005]


@pytest.fixture
def pictures(place, monkeypatch):
    """Twenty random pictures where the publisher's files would be."""
    folder = place / "cifar"
    write_cifar(folder, monkeypatch, rows=20)
    return f"data.root={folder}"


def test_a_shorter_run_keeps_the_shape(place, pictures):
    small = ("student=resnet8_w4", "teacher=resnet8_w4", "teacher.epochs=1", "baseline=false", "data.batch_size=10")
    run = train(place, "short", "experiment=cifar100_resnet56_resnet20", pictures, *small, "epochs=8")
    # after a step, the curve shows the rate of the next
    expected = [0.05] * 10 + [0.005] * 2 + [0.0005] * 2 + [0.00005]
    assert curve(run, "train/lr")[: len(expected)] == pytest.approx([*expected[1:], expected[-1]])


NARROW = {
    "resnet110": ["teacher.net.depth=56"],
    "resnet32x4": ["teacher.net.width=8"],
    "resnet50": ["teacher.net.width=4"],
    "vgg13": ["teacher.net.width=4"],
}
"""Large teachers take seconds a step; here they are only to fit. Their real size is counted above."""


@pytest.mark.parametrize("pair", PAIRS, ids=name_of)
def test_a_pair_trains_and_the_last_epoch_counts(place, pictures, pair):
    words = ("teacher.epochs=1", "epochs=1", "baseline=false", "data.batch_size=10", "data.eval_batch_size=20")
    run = train(place, name_of(pair), f"experiment={name_of(pair)}", pictures, *words, *NARROW.get(pair[0], []))
    found = result(run)
    assert found["steps"] == 2 and found["best_epoch"] == 0 and "val" not in found["models"]["student"]
    assert len(curve(run, "train/kl")) == 2 and all(math.isfinite(x) for x in curve(run, "train/kl"))
    assert 0 <= found["models"]["teacher"]["test"]["acc"] <= 1 and found["models"]["baseline"] is None
