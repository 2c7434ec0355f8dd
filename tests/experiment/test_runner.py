"""Every shipped experiment trains, and what a run says and leaves behind is what the contracts promise."""

import json
import math

import pytest
import torch

from helpers.tiny import FEW, MLP, QUIET, checkpoint, curve, farthest, result, same, train, weights, write_cifar
from helpers.tiny_text import write_gpt2, write_reasoning, write_shakespeare, write_speech, write_wikitext
from kdlab.cli.hydra.compose import composer
from kdlab.config import options as config_options
from kdlab.experiment import Experiment, build
from kdlab.inference.predict import load_model
from kdlab.models import weights_hash
from kdlab.teachers import FrozenTeacher

ALL = sorted(path.stem for path in (config_options.shipped() / "experiment").glob("[!_]*.yaml"))
EXPERIMENTS = [name for name in ALL if not name.startswith("cifar100_")]  # those train in test_cifar_pairs.py
ONE = ("epochs=1", "data.fraction=0.1")

SHALLOW = ("student.settings.n_layer=1",)
PAIR = (*SHALLOW, "teacher.net.settings.n_layer=1", "teacher.epochs=1")
SUMS = (*SHALLOW, "data.train=100", "data.val=10", "data.test=10")
SOUND = ("student.settings.encoder_layers=1", "student.settings.decoder_layers=1", "data.join=1", "data.mels=12")

SMALL = {
    "born_again": [*ONE, "method.generations=2"],
    "born_again_start": [*ONE, "teacher.epochs=1", "teacher.data.fraction=0.1", "method.generations=2"],
    "data_free": [*FEW],
    "ema": [*ONE],
    "finetune_resnet": ["epochs=1", "data.fraction=0.2", "pretrained.epochs=1", "pretrained.data.fraction=0.1"],
    "distilgpt2_wikitext": [
        *("epochs=1", "student.settings={n_layer: 2, n_head: 2, n_embd: 16}"),
        *("teacher.net.settings={}", "data.context=32", "data.batch_size=4"),
    ],
    "fitnets_two_stage": [
        *FEW,
        "stages={hint: ['+loss.terms.ce.weight=0'], kd: ['loss=[hinton]', 'init=previous']}",
    ],
    "fixmatch": [*ONE, "data.labels=20"],
    "kd_cifar10": ["epochs=1", "teacher.epochs=1", "data.views=2", "data.val=10", "data.batch_size=25"],
    "kd_mlp": ["epochs=2", "teacher.epochs=1"],
    "kd_resnet": [*FEW],
    "kd_two_stage": [*FEW, "stages={soft: ['loss.alpha=1'], labels: ['loss.alpha=0', 'init=previous']}"],
    "lm_domain": [*PAIR, "epochs=1"],
    "lm_shakespeare": [*PAIR, "epochs=1"],
    "lm_shakespeare_two_stage": [*PAIR],
    "reasoning_arithmetic": [*PAIR, *SUMS, "epochs=1"],
    "reasoning_arithmetic_answers": [*SUMS, "epochs=1"],
    "reasoning_arithmetic_on_policy": [
        *(*PAIR, *SUMS, "data.batch_size=20"),
        "stages={soft: ['epochs=1'], "
        "own: ['batch_transform=on_policy', 'loss=[reverse_kl]', 'init=previous', 'epochs=1']}",
    ],
    "reasoning_cqa": [*SHALLOW, "epochs=1", "data.vocab=300", "task.new_tokens=8"],
    "reasoning_svamp": [*SHALLOW, "epochs=1", "data.vocab=300", "task.new_tokens=8"],
    "whisper_digits": [
        *SOUND,
        *(word.replace("student.", "teacher.net.") for word in SOUND[:2]),
        "teacher.epochs=1",
        "epochs=1",
    ],
    "noisy_student": [*ONE, "data.labels=20"],
    "ps_kd": ["data.fraction=0.1", "epochs=2"],
    "robust_kd": [
        *(*ONE, "task.attack.steps=2", "batch_transform.steps=2"),
        "stages={robust: ['method=finetune', 'loss=ce', 'batch_transform=attack', 'batch_transform.steps=2'], "
        "student: ['teacher=previous']}",
    ],
    "semi_resnet": [*FEW, "data.labels=20"],
    "several_tasks": [*FEW],
    "several_teachers": [*FEW],
    "simkd": [*FEW],
    "snapshot": ["data.fraction=0.1", "epochs=2"],
    "teacher_assistant": [*FEW],
}
"""What makes each experiment end in a second or two. A new experiment needs no entry if a plain epoch is short."""

TEACHER_DEFAULTS = {
    *("born_again", "born_again_start", "kd_cifar10", "kd_mlp", "kd_resnet", "kd_two_stage", "semi_resnet"),
    *("fitnets_two_stage", "several_tasks", "several_teachers", "simkd", "teacher_assistant"),
    *("data_free", "noisy_student", "robust_kd"),
    *("distilgpt2_wikitext", "lm_domain", "lm_shakespeare", "lm_shakespeare_two_stage", "reasoning_arithmetic"),
    *("reasoning_arithmetic_on_policy", "whisper_digits"),
}

LABELS_ALONE = {"reasoning_arithmetic_answers", "reasoning_cqa", "reasoning_svamp"}
"""These are the baseline of others, and have none."""

WRITTEN = {name for name in EXPERIMENTS if name.startswith(("lm_", "reasoning_", "distilgpt2", "whisper"))}
"""Language models: perplexity decides."""


def where_from(name, folder, monkeypatch):
    """The words that say where an experiment's data (and network) are, written by the test."""
    if name == "kd_cifar10":
        return [f"data.root={write_cifar(folder, monkeypatch)}"]
    if name.startswith("lm_"):
        outside = [f"data.ood.root={write_wikitext(folder)}"] if name == "lm_domain" else []
        return [f"data.root={write_shakespeare(folder, monkeypatch)}", *outside]
    if name in ("reasoning_svamp", "reasoning_cqa"):
        return [f"data.root={write_reasoning(folder)}"]
    if name == "whisper_digits":
        return [f"data.root={write_speech(folder)}"]
    if name == "distilgpt2_wikitext":
        hub = write_gpt2(folder / "gpt2")
        return [
            f"data.root={write_wikitext(folder, 'wikitext-103')}",
            f"data.tokenizer={hub}",
            f"teacher.net.name={hub}",
        ]
    return []


def numbers(value, path=""):
    """Every number inside a result, with its place."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from numbers(inner, f"{path}.{key}")
    elif isinstance(value, float | int) and not isinstance(value, bool):
        yield path, value


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_trains_and_leaves_its_record(place, tmp_path, monkeypatch, capsys, name):
    words = [*SMALL.get(name, ONE), *where_from(name, tmp_path, monkeypatch)]
    run = train(place, f"all_{name}", f"experiment={name}", *words)
    found = result(run)
    assert found["format"] == 1 and found["status"] == "finished" and found["error"] is None
    for key in ("name", "method", "config_hash", "seed", "overrides", "settings", "models", "objective", "best_epoch"):
        assert key in found
    for key in ("epochs", "steps", "seconds", "data", "hardware", "versions", "commit", "started", "finished"):
        assert key in found
    assert set(found["versions"]) == {"python", "torch", "lightning", "kdlab"}
    assert set(found["seconds"]) == {"total", "teacher", "cache", "student", "baseline"}
    infinite = [place for place, number in numbers(found) if not math.isfinite(number)]
    assert not infinite
    student, teacher, baseline = (found["models"][role] for role in ("student", "teacher", "baseline"))
    assert (teacher is not None) == (name in TEACHER_DEFAULTS) == bool(found["teacher_trained_on"])
    for model in filter(None, (student, teacher, baseline)):
        assert {"parameters", "bytes", "flops", "latency_ms", "seconds", "val", "test"} <= set(model)
        assert 0 <= model["test"]["acc"] <= 1 and model["latency_ms"] > 0 and model["bytes"] >= 4 * model["parameters"]
        if name in WRITTEN:
            assert model["test"]["ppl"] == pytest.approx(math.exp(model["test"]["ce"])) and model["tokens_per_s"] > 0
            assert ("em" in model["test"]) == name.startswith(("reasoning_", "whisper"))
    assert (baseline is None) == (name in LABELS_ALONE)
    assert baseline is None or baseline["parameters"] == student["parameters"]
    if teacher is not None:
        assert 0 <= student["test"]["agreement"] <= 1 and student["test"]["kl"] >= 0
        assert "agreement" not in teacher["test"]
    score = "ppl" if name in WRITTEN else "acc"
    assert found["score"] == {"name": score, "greater": score == "acc"}
    assert found["objective"] == student["val"][score] and found["best_epoch"] >= 0 and found["steps"] > 0
    assert math.isfinite(curve(run if (run / "curves.jsonl").exists() else run / last_stage(run), "train/loss")[0])
    for file in ("config.yaml", "overrides.yaml", "run.log", "model.json", "signature"):
        assert (run / file).stat().st_size > 0
    net, described = load_model(run)
    untaught = name in ("finetune_resnet", "fixmatch", *LABELS_ALONE)
    deployed = "model_finetuned.pt" if untaught else "student.pt"
    assert described["weights"] == deployed and same(net.state_dict(), weights(run, deployed))
    shown = capsys.readouterr().out
    assert "\nstudent " in shown and ("\nteacher " in shown) == (teacher is not None) and "run folder: " in shown


def last_stage(run):
    """The folder of the stage that ended last, inside a run."""
    stages = list((run / "stages").iterdir())
    return max(stages, key=lambda stage: (stage / "curves.jsonl").stat().st_mtime_ns).relative_to(run)


# ---- what the curves say


def test_the_curves_are_the_terms_and_the_loss_their_weighted_sum(place):
    run = train(place, "curves", *MLP, "epochs=2", "baseline=false", "loss.alpha=0.3", "loss.temperature=2")
    points = [json.loads(line) for line in (run / "curves.jsonl").read_text().splitlines()]
    training = [point for point in points if "train/loss" in point]
    assert [point["step"] for point in training] == list(range(1, 39)) and len(training) == result(run)["steps"]
    for point in training:
        assert point["train/loss"] == pytest.approx(0.7 * point["train/ce"] + 0.3 * point["train/kl"], rel=1e-4)
        assert point["train/temperature"] == 2 and point["train/alpha"] == 0.3
    validation = [point for point in points if "val/acc" in point]
    assert len(validation) == 2
    for point in validation:
        assert {"val/kl", "val/ce", "val/acc", "val/agreement"} <= set(point)
    best = validation[result(run)["best_epoch"]]
    assert best["val/acc"] == pytest.approx(result(run)["models"]["student"]["val"]["acc"], abs=1e-6)
    assert best["val/acc"] == max(point["val/acc"] for point in validation)


def test_val_kl_is_at_temperature_1_whatever_the_temperature(place):
    """With alpha 0 the temperature changes no weight, so the measured divergence must not change either."""
    found = [
        result(train(place, f"t{t}", *MLP, "epochs=1", "baseline=false", "loss.alpha=0", f"loss.temperature={t}"))
        for t in (1, 8)
    ]
    assert found[0]["models"]["student"]["val"] == found[1]["models"]["student"]["val"]


def test_a_cached_teacher_gives_the_live_ones_loss(place):
    words = (*MLP, "epochs=1", "baseline=false", "data.augment=[{crop: {padding: 1}}]", "data.views=3")
    runs = [train(place, f"cache_{cache}", *words, f"teacher.cache={cache}") for cache in ("auto", "off")]
    cached, live = (curve(run, "train/kl") for run in runs)
    assert len(cached) == 19 and cached == pytest.approx(live, abs=1e-5)
    assert farthest(weights(runs[0]), weights(runs[1])) < 1e-4
    assert "cached teacher: " in (runs[0] / "run.log").read_text() and "3 views" in (runs[0] / "run.log").read_text()
    assert "no cache, as teacher.cache=off asks" in (runs[1] / "run.log").read_text()


HINT = ("loss.terms.hint.student_layer=layer1", "loss.terms.hint.teacher_layer=layer1")


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["data.augment=[{crop: {padding: 1}}]"], "shows a new view of every example each time; set data.views"),
        (["data.augment=[{mixup: {alpha: 0.2}}]"], "mixes rows"),
        (["loss=fitnets", *HINT, "teacher.feature_mib=0"], "since the loss looks at its layers (layer1)"),
    ],
)
def test_a_live_teacher_says_why(place, words, why):
    run = train(place, "live", *MLP, "epochs=1", "baseline=false", *words)
    assert (
        "live teacher: one forward pass a step; no cache, since" in (log := (run / "run.log").read_text())
        and why in log
    )
    assert all(map(math.isfinite, curve(run, "train/loss")))


# ---- the teacher


def test_a_fit_leaves_its_teacher_as_it_was(place, monkeypatch):
    seen = []
    plain = FrozenTeacher.__init__

    def watched(self, net, *more):
        plain(self, net, *more)
        seen.append((net, weights_hash(net), {name: b.clone() for name, b in net.named_buffers()}))

    monkeypatch.setattr(FrozenTeacher, "__init__", watched)
    run = train(place, "still", "experiment=kd_resnet", *FEW, "baseline=false", "teacher.cache=off")
    assert len(seen) >= 2
    for net, before, buffers in seen:
        assert weights_hash(net) == before and not any(p.requires_grad for p in net.parameters())
        assert all(torch.equal(buffer, buffers[name]) for name, buffer in net.named_buffers())
        assert not any(module.training for module in net.modules())
    held = checkpoint(run)
    assert all(key.startswith("student.") for key in held["state_dict"])
    assert len(held["optimizer_states"][0]["param_groups"][0]["params"]) == len(list(load_model(run)[0].parameters()))
    assert "teacher" not in held and not any("teacher" in key for key in weights(run))


@pytest.mark.parametrize("name", ["ema", "snapshot"])
def test_a_moving_teacher_is_resumable_and_never_exported(place, name):
    run = train(place, f"moving_{name}", f"experiment={name}", "student=mlp", "epochs=2", "baseline=false")
    held = checkpoint(run)
    assert held["teacher"] and all(key.startswith("student.") for key in held["state_dict"])
    assert weights(run).keys() == load_model(run)[0].state_dict().keys()
    agreed = curve(run, "val/agreement")
    assert len(agreed) == {"ema": 2, "snapshot": 1}[name] and 0 < agreed[-1] <= 1


@pytest.mark.parametrize("name", ["ema", "snapshot"])
def test_a_moving_teacher_shows_its_layers(place, name):
    layers = ["loss.terms.hint.student_layer=layer1", "loss.terms.hint.teacher_layer=layer1"]
    words = (f"experiment={name}", "student=mlp", "epochs=2", "baseline=false", "loss=[balanced,fitnets]", *layers)
    run = train(place, f"layers_{name}", *words)
    assert curve(run, "train/hint")[-1] > 0
    assert not any("terms" in key for key in weights(run))


def test_a_teacher_of_few_labels(place):
    words = ("experiment=semi_resnet", "student=mlp", "teacher=mlp", "teacher.epochs=1", "epochs=1", "baseline=false")
    few = result(train(place, "few", *words, "teacher.data.labels=100", "teacher.data.unlabelled_ratio=0"))
    full = result(train(place, "full", *words))
    assert few["teacher_trained_on"] == "100 labelled and 1100 unlabelled rows of digits"
    assert full["teacher_trained_on"] == "1200 labelled rows of digits"
    assert full["data"] == few["data"] == "100 labelled and 1100 unlabelled rows of digits"


def test_labels_and_a_teacher_that_is_only_measured(place):
    run = train(place, "measured", *MLP, "loss=ce", "epochs=1")
    found = result(run)["models"]
    assert "agreement" in found["student"]["test"] and found["teacher"] is not None
    assert found["student"]["test"]["acc"] == found["baseline"]["test"]["acc"], "nothing but labels taught it"


@pytest.mark.parametrize("words", [["method=finetune", "loss=ce"], ["method=ema", "loss=balanced"]])
def test_no_teacher_is_trained_that_nobody_asks(place, tmp_path, words):
    run = train(tmp_path, "alone", *MLP, "epochs=1", "baseline=false", *words)
    assert not (tmp_path / "teachers").exists() and result(run)["models"]["teacher"] is None
    assert "without the teacher that is configured" in (run / "run.log").read_text()


def test_the_teacher_comes_from_the_store(place, capsys):
    for name in ("first", "second"):
        run = train(place, name, *MLP, "epochs=1", "teacher.seed=77", "loss.temperature=3")
    assert result(run)["seconds"]["teacher"] == 0 and result(run)["seconds"]["baseline"] == 0
    assert result(run)["models"]["teacher"]["seconds"] > 0


# ---- what is exported


def test_files_load_safely_and_strictly(place):
    run = train(place, "files", "experiment=kd_resnet", *FEW, "baseline=false", "resume=auto")
    torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    with composer() as found:
        experiment = Experiment.of(found.compose(["experiment=kd_resnet", *QUIET, *FEW]).config)
    data = build.data(experiment.data, 0)
    fresh = build.network(experiment.student, data, 123, "student")
    before = weights_hash(fresh)
    assert not fresh.load_state_dict(weights(run), strict=True).missing_keys
    assert weights_hash(fresh) != before and all(bool(t.isfinite().all()) for t in weights(run).values())
    assert same(weights(run), weights(run / "checkpoints", "best.pt"))
