"""What each method must do, and what must be the same whatever a run is split into or started from."""

import math

import pytest
import torch

from helpers.tiny import MLP, QUIET, checkpoint, curve, farthest, newest, result, same, train, weights
from kdlab.cli.main import main
from kdlab.inference.predict import load_model
from kdlab.models import head_of

ALONE = ("student=mlp", "teacher=none", "method=finetune", "loss=ce")
"""Labels alone, on the digits."""

SYNTHETIC = ("experiment=kd_mlp", "teacher.epochs=1", "epochs=2", "baseline=false", "logger=none")
SEMI = ("experiment=semi_resnet", "student=mlp", "teacher=mlp", "teacher.epochs=3", "epochs=2", "baseline=false")


# ---- seeds, order, splits


def test_the_same_seed_gives_the_same_bits_and_another_another(place):
    words = (*MLP, "epochs=2", "student.dropout=0.2", "data.augment=[{crop: {padding: 1}}]", "baseline=false")
    first, second = (train(place, f"same_{i}", *words) for i in (1, 2))
    other = train(place, "same_other", *words, "seed=1")
    assert first != second and same(weights(first), weights(second))
    assert farthest(weights(first), weights(other)) > 1e-3
    assert result(first)["config_hash"] == result(second)["config_hash"] != result(other)["config_hash"]
    assert result(first)["models"]["teacher"]["test"] == result(other)["models"]["teacher"]["test"], (
        "it has its own seed"
    )


@pytest.mark.parametrize("words", [[], ["data.labels=300"], ["data.labels=300", "data.unlabelled_ratio=3"]])
def test_micro_batches_change_nothing(place, words):
    """Summed in another order, and no more; whatever share of each micro-batch has labels."""
    runs = [train(place, f"parts_{n}", *SYNTHETIC, "loss.alpha=0.4", *words, f"trainer.accumulate={n}") for n in (1, 4)]
    assert result(runs[0])["steps"] == result(runs[1])["steps"] == 2 * 22
    assert farthest(weights(runs[0]), weights(runs[1])) < 1e-5
    for name in ("train/loss", "train/ce", "train/kl"):
        assert curve(runs[0], name) == pytest.approx(curve(runs[1], name), abs=1e-5)
        assert len(curve(runs[0], name)) == 44


def baselines(place, seed):
    """The kept baselines of a seed."""
    found = (place / "baselines").glob("mlp-*/config.yaml")
    return [path.parent for path in found if f"\nseed: {seed}\n" in path.read_text()]


def test_a_baseline_has_the_same_budget_and_no_teacher(place):
    run = train(place, "budget", *MLP, "epochs=2", "seed=11")
    (kept,) = [
        f for f in (place / "baselines").glob("mlp-*") if f.is_dir() and "seed: 11" in (f / "config.yaml").read_text()
    ]
    assert checkpoint(kept)["global_step"] == result(run)["steps"] == checkpoint(run)["global_step"]
    alone = train(place, "budget_alone", *ALONE, "epochs=2", "seed=11", "baseline=false")
    assert same(weights(kept, "model_finetuned.pt"), weights(alone, "model_finetuned.pt"))
    assert result(run)["models"]["baseline"]["test"]["acc"] == result(alone)["models"]["student"]["test"]["acc"]


# ---- selection


def test_without_validation_the_last_epoch_counts(place):
    run = train(place, "no_val", *MLP, "epochs=3", "data.val=0", "baseline=false")
    found = result(run)
    assert found["best_epoch"] == 2 and found["objective"] is None and found["epochs"] == 3
    assert "val" not in found["models"]["student"] and "test" in found["models"]["student"]
    held = {key.removeprefix("student."): value for key, value in checkpoint(run)["state_dict"].items()}
    assert same(weights(run), held) and not curve(run, "val/acc")


def test_early_stopping_stops_and_keeps_the_best(place):
    words = (*ALONE, "epochs=9", "method.patience=2", "optimizer.lr=0", "data.fraction=0.2", "baseline=false")
    run = train(place, "patience", *words)
    found, scores = result(run), curve(run, "val/acc")
    assert found["epochs"] == len(scores) == 3 and found["best_epoch"] == 0
    assert found["steps"] == 4 * len(scores) == checkpoint(run)["global_step"]
    assert found["objective"] == pytest.approx(max(scores), abs=1e-6)
    (run / "result.json").unlink()  # killed after training, before it was measured
    again = result(train(place, "patience", *words, "resume=auto"))
    for key in ("epochs", "steps", "best_epoch", "objective"):
        assert again[key] == found[key]
    assert len(curve(run, "val/acc")) == 3, "it went on after it had stopped"


# ---- fine-tuning


def test_what_is_frozen_stays_bit_identical(place):
    words = ("experiment=finetune_resnet", "student=resnet8_w4", "pretrained.epochs=1", "epochs=2", "baseline=false")
    run = train(place, "frozen", *words, "optimizer.lr=0.05")
    (start,) = [f for f in place.glob("pretrained/resnet8_w4-*") if f.is_dir()]
    before, after = weights(start, "model_finetuned.pt"), weights(run, "model_finetuned.pt")
    frozen = [key for key in after if key.split(".")[0] in ("conv1", "bn1", "layer1")]
    assert len(frozen) > 10 and any("running_mean" in key for key in frozen)
    assert all(torch.equal(before[key], after[key]) for key in frozen)
    moved = [key for key in after if key not in frozen and before[key].shape == after[key].shape]
    assert all(not torch.equal(before[key], after[key]) for key in moved if "weight" in key or "running" in key)
    assert before["fc.weight"].shape == after["fc.weight"].shape == (5, 16)
    named = load_model(run)[1]["classes"], load_model(start)[1]["classes"]
    assert named == (["5", "6", "7", "8", "9"], ["0", "1", "2", "3", "4"])


def test_a_head_for_another_number_of_classes(place):
    words = ("student=resnet8_w4", "teacher=none", "loss=ce", "method=finetune_head", "pretrained=digits_low")
    data = ("data.classes=[5,6,7]", "data.fraction=0.3", "init=pretrained", "pretrained.epochs=1", "epochs=2")
    run = train(place, "head", *words, *data, "baseline=false")
    (start,) = [f for f in (place / "pretrained").glob("resnet8_w4-*") if f.is_dir() and trained_on_part(f)]
    before, after = weights(start, "model_finetuned.pt"), weights(run, "model_finetuned.pt")
    name = head_of(load_model(run)[0])[0]
    assert after[f"{name}.weight"].shape == (3, 16) and before[f"{name}.weight"].shape == (5, 16)
    assert all(torch.equal(before[key], after[key]) for key in after if not key.startswith(f"{name}."))


def trained_on_part(folder):
    return result(folder)["trained_on"].endswith("(classes 0, 1, 2, 3, 4)") and result(folder)["epochs"] == 1


# ---- semi-supervised


@pytest.mark.parametrize(
    "words", [["method.labels=soft"], ["method.labels=hard"], ["method.labels=hard", "method.threshold=0.9"]]
)
def test_pseudo_labels_have_curves(place, words):
    run = train(place, "semi", *SEMI, *words)
    share, right = curve(run, "train/pseudo_coverage"), curve(run, "train/pseudo_acc")
    assert len(share) == len(right) == result(run)["steps"] == 38
    assert all(0 <= value <= 1 for value in share) and all(v is None or 0 <= v <= 1 for v in right)
    known = [value for value in right if value is not None]
    assert sum(known) / len(known) > 0.5
    if "method.threshold=0.9" in words:
        assert 0 < sum(share) / len(share) < 1
    else:
        assert share == [1.0] * 38
    assert all(map(math.isfinite, curve(run, "train/loss")))


def test_confident_pseudo_labels_are_better_ones(place):
    found = {}
    for threshold in (0, 0.9):
        right = curve(
            train(place, "sure", *SEMI, "method.labels=hard", f"method.threshold={threshold}"), "train/pseudo_acc"
        )
        known = [value for value in right if value is not None]
        found[threshold] = sum(known) / len(known)
    assert found[0.9] > found[0]


def test_no_labels_at_all_is_teacher_only_distillation(place):
    run = train(place, "unlabelled", *MLP, "epochs=2", "data.labels=0", "loss.alpha=0.5")
    found = result(run)
    assert found["models"]["baseline"] is None and found["data"] == "1200 unlabelled rows of digits"
    assert curve(run, "train/ce") == [] and min(curve(run, "train/kl")) > 0
    assert curve(run, "train/loss") == pytest.approx([0.5 * value for value in curve(run, "train/kl")], rel=1e-4)
    soft = train(place, "soft_alone", *MLP, "epochs=2", "loss=soft_targets", "baseline=false")
    half = train(place, "half", *MLP, "epochs=2", "data.labels=0", "loss=soft_targets", "baseline=false")
    assert same(weights(soft), weights(half)), "labels that weigh nothing change nothing"
    semi = train(place, "semi_none", *SEMI, "data.labels=0", "loss=soft_targets")
    assert curve(semi, "train/pseudo_coverage") == [1.0] * 38


# ---- generations and stages


def test_generations_learn_from_the_one_before_and_vote(place):
    words = ("experiment=born_again", "student=mlp", "epochs=1", "method.generations=3")
    run = train(place, "generations", *words)
    found = result(run)["models"]
    assert {"generation_1", "generation_2", "ensemble", "student", "teacher", "baseline"} <= set(found)
    assert found["teacher"]["test"] == {k: found["generation_2"]["test"][k] for k in found["teacher"]["test"]}
    assert found["baseline"].pop("errors") and "errors" not in found["generation_1"]
    assert found["baseline"] == found["generation_1"], "the first learned from labels alone, with the same budget"
    assert found["ensemble"]["parameters"] == 3 * found["student"]["parameters"]
    folders = [run / "stages" / f"generation_{n}" for n in (1, 2, 3)]
    assert same(weights(run), weights(folders[2])) and not same(weights(folders[0]), weights(folders[1]))
    alone = train(place, "generation_alone", *ALONE, "epochs=1", "baseline=false")
    assert same(weights(folders[0]), weights(alone, "model_finetuned.pt"))


def test_a_given_teacher_teaches_the_first_generation_only(place):
    words = ("experiment=born_again_start", "student=mlp", "teacher=mlp", "teacher.epochs=1", "epochs=1")
    run = train(place, "started", *words, "method.generations=2", "baseline=false")
    first, second = (run / "stages" / f"generation_{n}" for n in (1, 2))
    assert not same(weights(first), weights(second)), "the second did the same as the first"
    found = result(run)["models"]
    assert found["teacher"]["test"] == {k: found["generation_1"]["test"][k] for k in found["teacher"]["test"]}
    assert result(run)["data"] == "360 labelled rows of digits"


def test_stages_start_from_the_one_before(place):
    words = (
        "experiment=kd_two_stage",
        "student=mlp",
        "teacher=mlp",
        "teacher.epochs=1",
        "optimizer.lr=0.0001",
        "seed=31",
    )
    stages = "stages={soft: ['loss.alpha=1', 'epochs=2'], labels: ['loss.alpha=0', 'epochs=1', 'init=previous']}"
    run = train(place, "stages", *words, stages)
    soft, labels = (run / "stages" / name for name in ("soft", "labels"))
    assert 0 < farthest(weights(soft), weights(labels)) < 0.05, "the second starts where the first ended"
    assert same(weights(run), weights(labels))
    assert curve(soft, "train/alpha") == [1] * 38 and curve(labels, "train/alpha") == [0] * 19
    assert curve(labels, "train/loss") == pytest.approx(curve(labels, "train/ce"))
    assert result(run)["steps"] == 57 and result(run)["epochs"] == 3 and "soft" in result(run)["models"]
    baseline = result(run)["models"]["baseline"]
    kept = baselines(place, seed=31)
    assert len(kept) == 1 and checkpoint(kept[0])["global_step"] == 57
    assert baseline["seconds"] == result(kept[0])["seconds"]


def test_a_stage_taught_by_the_stage_before(place):
    stages = (
        "stages={labels: ['method=finetune', 'loss=ce', 'teacher=none'], "
        "soft: ['student.hidden=[16]', 'teacher=previous', 'epochs=2']}"
    )
    run = train(place, "by_previous", "student=mlp", "teacher=previous", "epochs=1", stages, "baseline=true")
    found = result(run)["models"]
    assert found["teacher"]["parameters"] == found["labels"]["parameters"] > found["student"]["parameters"]
    assert found["baseline"]["parameters"] == found["student"]["parameters"]
    assert found["teacher"]["test"]["acc"] == found["labels"]["test"]["acc"]


def test_stages_of_unequal_budget_have_a_baseline_of_their_own(place):
    stages = "stages={labels: ['method=finetune', 'loss=ce', 'teacher=none'], soft: ['teacher=previous', 'epochs=2']}"
    run = train(place, "unequal", "student=mlp", "teacher=previous", "epochs=1", "seed=21", stages)
    found = result(run)["models"]
    assert found["baseline"] != found["labels"]
    kept = [
        f for f in (place / "baselines").glob("mlp-*") if f.is_dir() and "seed: 21" in (f / "config.yaml").read_text()
    ]
    assert len(kept) == 1 and checkpoint(kept[0])["global_step"] == result(run)["steps"] == 57


def test_two_stage_training_as_a_schedule(place):
    run = train(place, "scheduled", *MLP, "loss=soft_then_hard", "epochs=3", "baseline=false")
    alpha = curve(run, "train/alpha")
    switch = alpha.index(0)
    assert alpha == [1] * switch + [0] * (57 - switch) and switch == 39
    loss, kl, ce = (curve(run, f"train/{name}") for name in ("loss", "kl", "ce"))
    assert loss == pytest.approx(kl[:switch] + ce[switch:], rel=1e-5)


def test_a_run_says_where_it_went_wrong_and_another_goes_on(place, monkeypatch):
    """The loss of a sweep's job must not take the teacher with it."""
    words = [*QUIET, *MLP, "epochs=1", "optimizer.lr=1e30", f"output={place}", "name=lost"]
    assert main(words) == 1
    assert "RunFailed: the loss is not finite at step 2" in (newest(place, "lost") / "run.log").read_text()
    assert result(train(place, "lost", *MLP, "epochs=1"))["status"] == "finished"


def test_the_baseline_keeps_the_label_term(place):
    words = ("student=mlp", "teacher=mlp", "teacher.epochs=1", "epochs=1", "seed=41")
    plain = result(train(place, "plain_labels", *words))
    smooth = result(train(place, "smooth_labels", *words, "+loss.terms.ce.label_smoothing=0.4"))
    assert plain["models"]["teacher"]["test"]["ce"] == smooth["models"]["teacher"]["test"]["ce"]
    assert plain["models"]["baseline"]["test"]["ce"] != smooth["models"]["baseline"]["test"]["ce"]


def test_a_teacher_of_few_labels_sees_only_labelled_rows(place):
    words = ("experiment=semi_resnet", "student=mlp", "teacher=mlp", "epochs=1", "teacher.epochs=3", "baseline=false")
    fair = result(train(place, "fair_teacher", *words, "teacher.data.labels=100"))
    diluted = result(train(place, "diluted", *words, "teacher.data.labels=100", "teacher.data.unlabelled_ratio=7"))
    assert fair["models"]["teacher"]["val"]["ce"] < diluted["models"]["teacher"]["val"]["ce"]
