"""The shipped configuration: every option composes, experiments stay neutral, swapping carries nothing over."""

import shutil

import pytest
import yaml
from omegaconf import OmegaConf

from helpers.tiny import mistake
from kdlab.cli.hydra.compose import TEACHER_DEFAULTS, composer
from kdlab.cli.main import main
from kdlab.cli.validate import validate
from kdlab.config import options as config_options
from kdlab.config.builder import flatten
from kdlab.experiment import Experiment, build

SHIPPED = config_options.shipped()
OPTIONS = config_options.read([SHIPPED])
GROUPS = {group: OPTIONS.of(group) for group in OPTIONS.groups if group not in ("experiment", "model")}
EXPERIMENTS = sorted(path.stem for path in (SHIPPED / "experiment").glob("[!_]*.yaml"))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def composed(*words):
    """A config, composed and bound to its signatures."""
    with composer() as found:
        composition = found.compose(list(words))
        validate(composition, found)
        return composition.config


def choices(number):
    """The ``number``-th option of every group, counted around; those that go together only with others by hand."""
    chosen = {group: names[number % len(names)] for group, names in GROUPS.items()}
    if not all(shutil.which(name) for name in ("wandb", "mlflow")) and chosen["logger"] in ("wandb", "mlflow"):
        chosen["logger"] = "csv"
    if "classes" not in file("data", chosen["data"]):  # a text has none to choose from
        chosen["pretrained"] = "none"
    words = [f"{group}={name}" for group, name in chosen.items() if (group, name) != ("teacher", "none")]
    return words + [NEEDED[word] for word in words if word in NEEDED]


NEEDED = {
    "data=text": "data.path=x.txt",
    "data=traces": "data.path=x.jsonl",
    "data=pairs": "data.path=x.jsonl",
    "student=hf_causal": "student.name=x",
    "teacher=hf_causal": "teacher.net.name=x",
    "teacher=written": "teacher.cache=x",
}
"""What some options must be told."""


@pytest.mark.parametrize("number", range(max(map(len, GROUPS.values()))))
def test_every_option_of_every_group_composes_validates_and_builds(number):
    words = choices(number)
    config = composed(*words)
    for word in words:
        group, _, name = word.partition("=")
        place = {"temperature": "loss", "teacher": "teacher.net"}.get(group, group)
        for key, value in flatten(file(group, name)).items():
            if name != "none" and value not in (None, {}, "???") and "${" not in str(value):
                assert flatten(config)[f"{place}.{key}"] == value, word
    experiment = Experiment.of({**config, "trainer": {**config["trainer"], "accelerator": "cpu"}})
    build.dry_run(experiment)
    objective = build.objective(experiment.loss)
    assert objective.names[0] == "ce" and all(weight >= 0 for weight in objective.weights())


def test_the_sum_of_all_choices_is_every_option():
    seen = {word for number in range(max(map(len, GROUPS.values()))) for word in choices(number)}
    left = {f"{group}={name}" for group, names in GROUPS.items() for name in names} - seen
    assert left <= {"logger=wandb", "logger=mlflow", "teacher=none"}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_and_validates(name):
    config = composed(f"experiment={name}")
    assert config["name"] == name and isinstance(config["stages"], dict)
    assert config["baseline"] is True and config["seed"] == 0


# ---- experiments stay neutral


def file(group, name):
    """What an option's own file says, with the options of its group that it builds on."""
    folder = SHIPPED / ("model" if group in ("student", "teacher") else group)
    if not (folder / f"{name}.yaml").exists():
        return {}
    raw = OmegaConf.to_container(OmegaConf.load(folder / f"{name}.yaml"), resolve=False)
    before = [file(group, other) for other in raw.pop("defaults", []) if other != "_self_"]
    config = OmegaConf.merge(*before, OmegaConf.create(raw))
    return OmegaConf.to_container(config, resolve=False)


def keys_of_every_option(group):
    """Keys that all options of a group have, and so survive a swap."""
    if group == "teacher":  # how it is come by stays, whatever network it is
        return set(TEACHER_DEFAULTS)
    found = [set(flatten(file(group, name))) for name in GROUPS[group] if name != "none"]
    return set.intersection(*found) - {"_target_"}


def foreign_keys(text):
    """The keys of an experiment file that belong to an option, and so would be carried over by a swap."""
    content = {key: value for key, value in yaml.safe_load(text).items() if key not in ("defaults", "stages")}
    root = yaml.safe_load((SHIPPED / "config.yaml").read_text())
    neutral = set(root) - {"defaults", *GROUPS}
    split = [(key, *key.split(".", 1)) for key in flatten(content)]
    return [
        key
        for key, group, *inner in split
        if group not in neutral and not (group in GROUPS and inner and _of_every(group, inner[0]))
    ]


def _of_every(group, key):
    known = keys_of_every_option(group)
    return key in known or (group == "teacher" and key.split(".")[0] in known)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_selects_options_and_sets_neutral_keys_only(name):
    text = (SHIPPED / "experiment" / f"{name}.yaml").read_text()
    assert foreign_keys(text) == []
    assert text.startswith("# @package _global_\n# ") and f"#   python -m kdlab experiment={name}" in text
    chosen = [key for entry in yaml.safe_load(text).get("defaults", []) if isinstance(entry, dict) for key in entry]
    groups = [key.removeprefix("override /").split("@")[0] for key in chosen]
    assert all(key.startswith("override /") for key in chosen) and set(groups) <= set(GROUPS)


def test_the_rule_finds_a_key_that_belongs_to_an_option():
    head = "# @package _global_\nname: x\nepochs: 3\n"
    assert foreign_keys(head + "loss:\n  alpha: 0.5\n") == ["loss.alpha"]
    assert foreign_keys(head + "student:\n  width: 8\n") == ["student.width"]
    assert foreign_keys(head + "method: born_again\n") == ["method"]
    assert foreign_keys(head + "data:\n  batch_size: 8\noptimizer:\n  lr: 0.1\n") == []
    assert foreign_keys(head + "data:\n  root: here\n") == ["data.root"]


# ---- swapping carries nothing over


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_swapped_options_are_as_their_files_say(experiment):
    # stages that set loss.alpha are refused with dkd, which has none
    loss = "logit_mse" if experiment.endswith("two_stage") else "dkd"
    swap = {"student": "vgg8", "loss": loss, "optimizer": "adamw", "temperature": "standardized"}
    config = composed(f"experiment={experiment}", *(f"{group}={name}" for group, name in swap.items()))
    assert config["student"] == file("student", "vgg8")
    assert config["optimizer"] == file("optimizer", "adamw")
    recipe = file("loss", loss)
    assert config["loss"]["terms"] == {"ce": {"_target_": "kdlab.losses.CrossEntropy"}, **recipe["terms"]}
    assert ("alpha" in config["loss"]) == ("alpha" in recipe)
    assert config["loss"]["temperature"] == file("temperature", "standardized")["temperature"]


def test_a_stage_that_sets_alpha_refuses_a_recipe_without_one(capsys):
    said = mistake(capsys, ["--cfg", "job", "experiment=kd_two_stage", "loss=dkd"])
    assert said.startswith("stages.soft: loss.alpha: the recipes chosen by loss= have no alpha")


def test_the_teacher_keeps_its_own_recipe():
    config = composed("experiment=kd_resnet", "optimizer=adamw", "scheduler=constant", "epochs=7", "seed=3")
    assert config["teacher"]["optimizer"]["_target_"] == "torch.optim.SGD"
    assert config["teacher"]["scheduler"]["shape"] == "cosine"
    assert config["teacher"]["epochs"] == 30 and config["teacher"]["seed"] == 0


# ---- what temperature and alpha mean


def objective_of(*words):
    return build.objective(composed("experiment=kd_resnet", *words)["loss"])


def test_alpha_weighs_distillation_and_labels_get_the_rest():
    config = composed("experiment=kd_resnet", "loss.alpha=0.3", "loss.temperature=7")
    assert config["loss"]["alpha"] == 0.3 and config["loss"]["temperature"] == 7
    objective = build.objective(config["loss"])
    weights = dict(zip(objective.names, objective.weights(), strict=True))
    assert weights == pytest.approx({"ce": 0.7, "kl": 0.3})
    assert objective.temperature.now == 7
    assert dict(zip(objective.names, objective.weights(has_teacher=False), strict=True))["ce"] == 1


def test_two_stage_training_as_a_schedule():
    objective = objective_of("loss=soft_then_hard")
    seen = []
    for progress in (0.0, 0.6, 0.7, 1.0):
        objective.progress = progress
        seen.append(dict(zip(objective.names, objective.weights(), strict=True)))
    assert [w["kl"] for w in seen] == [1, 1, 0, 0] and [w["ce"] for w in seen] == [0, 0, 1, 1]


def test_two_stage_training_as_stages():
    with composer() as found:
        composition = found.compose(["experiment=kd_two_stage", "loss.temperature=3"])
    soft, labels = composition.stages["soft"].config, composition.stages["labels"].config
    assert (soft["loss"]["alpha"], soft["epochs"], soft["init"]) == (1, 20, "fresh")
    assert (labels["loss"]["alpha"], labels["epochs"], labels["init"]) == (0, 10, "previous")
    assert soft["loss"]["temperature"] == labels["loss"]["temperature"] == 3


def test_a_temperature_anneals_over_training():
    objective = objective_of("temperature=annealed")
    seen = []
    for progress in (0.0, 0.5, 1.0):
        objective.progress = progress
        seen.append(objective.temperature.now)
    assert seen == pytest.approx([8, 4.5, 1])


def test_what_is_shown_is_what_runs(capsys):
    assert main(["--cfg", "job", "experiment=kd_mlp"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown == composed("experiment=kd_mlp")
    assert shown["loss"]["alpha"] == 1 and shown["loss"]["temperature"] == 4 and shown["epochs"] == 100
    assert (shown["student"]["hidden"], shown["teacher"]["net"]["hidden"]) == ([10], [20])
