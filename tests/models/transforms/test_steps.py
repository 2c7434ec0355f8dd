"""Steps: what a network goes through, recorded so that a fresh one can go through it again."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from helpers.tiny import MLP, result, train, weights
from kdlab.cli.main import main
from kdlab.config import builder
from kdlab.errors import UserError
from kdlab.inference.predict import load_model
from kdlab.models import (
    MLP as Perceptron,
)
from kdlab.models import (
    Freeze,
    LoadWeights,
    LoRA,
    NetworkStep,
    ReplaceHead,
    StepContext,
    TeacherHead,
)
from kdlab.models.transforms.steps import apply_steps, describe_steps, finish_steps, read_steps, repeated, replay_steps

PRUNE = '''
"""Pruning of a perceptron's hidden units: a step of a user's own."""

import torch
from torch import nn

from kdlab.models import NetworkStep


class PruneUnits(NetworkStep):
    """Keep the hidden units with the largest incoming weights."""

    def __init__(self, keep: int, units: list | None = None) -> None:
        self.keep, self.units = keep, units

    def before(self, net, context):
        if self.units is None:
            self.units = net.layer1[0].weight.norm(dim=1).argsort(descending=True)[: self.keep].sort().values.tolist()
        return self.replay(net)

    def replay(self, net):
        first, second = net.layer1[0], net.fc
        narrow = nn.Linear(first.in_features, len(self.units))
        after = nn.Linear(len(self.units), second.out_features)
        with torch.no_grad():
            narrow.weight.copy_(first.weight[self.units])
            narrow.bias.copy_(first.bias[self.units])
            after.weight.copy_(second.weight[:, self.units])
            after.bias.copy_(second.bias)
        net.layer1[0], net.fc = narrow, after
        return net

    def describe(self):
        return {**super().describe(), "keep": self.keep, "units": self.units}
'''


@pytest.fixture
def pruning(place, monkeypatch):
    """The name of a module of the user's with a step that prunes."""
    (place / "own_pruning.py").write_text(PRUNE)
    return "own_pruning.PruneUnits"


def net(hidden=(6,), seed=0):
    torch.manual_seed(seed)
    return Perceptron(hidden=list(hidden), num_classes=3, in_features=4)


def test_a_step_describes_itself_and_can_be_built_again():
    for step in (LoadWeights("teacher"), TeacherHead(), ReplaceHead(5), Freeze(["layer1"]), LoRA(2, targets=["fc"])):
        described = json.loads(json.dumps(step.describe()))
        (again,) = read_steps([described])
        assert type(again) is type(step) and again.describe() == described


def test_weights_are_loaded_and_what_is_not_there_is_named():
    teacher, student = net(seed=1), net(seed=2)
    apply_steps(student, {"init": LoadWeights("teacher")}, StepContext(teacher=teacher))
    assert torch.equal(student.fc.weight, teacher.fc.weight)
    with pytest.raises(UserError, match=r"^init: previous, and the experiment has no previous"):
        apply_steps(student, {"init": LoadWeights("previous")}, StepContext())
    with pytest.raises(UserError, match=r"^init: teacher, which is another architecture than the student"):
        apply_steps(net((5,)), {"init": LoadWeights("teacher")}, StepContext(teacher=teacher))
    with pytest.raises(UserError, match=r"^origin: unknown value 'nowhere'"):
        LoadWeights("nowhere")


def test_a_new_head_is_drawn_by_the_seed_and_repeated_without_data():
    one, two = (apply_steps(net(), {"h": ReplaceHead(7)}, StepContext(seed=s)) for s in (3, 3))
    assert torch.equal(one.fc.weight, two.fc.weight) and one.fc.out_features == 7
    assert replay_steps(net(), describe_steps({"h": ReplaceHead(7)})).fc.out_features == 7


def test_steps_finish_in_the_opposite_order_and_the_weights_are_written_anew(tmp_path):
    order = []

    class Noted(NetworkStep):
        def __init__(self, name):
            self.name = name

        def after(self, net, context):
            order.append((self.name, context.folder))
            return nn.Sequential(net)

    file = tmp_path / "student.pt"
    done = finish_steps(net(), {"a": Noted("a"), "b": Noted("b"), "c": Freeze("backbone")}, StepContext(), file)
    assert order == [("b", tmp_path), ("a", tmp_path)] and isinstance(done, nn.Sequential)
    assert set(torch.load(file, weights_only=True)) == set(done.state_dict())
    file.unlink()
    plain = net()
    assert finish_steps(plain, {"c": Freeze("backbone")}, StepContext(), file) is plain and not file.exists()


def test_a_mistake_in_a_step_names_its_key():
    with pytest.raises(UserError, match=r"^adapter\.targets: unknown layer 'no_such'"):
        apply_steps(net(), {"adapter": LoRA(targets=["no_such"])}, StepContext())
    with pytest.raises(UserError, match=r"^steps\[0\]\.rank: 0; accepted"):
        read_steps([{"_target_": "kdlab.models.LoRA", "rank": 0}])
    with pytest.raises(UserError, match=r"^steps\[0\]\._target_: 'torch\.load' may not be built here"):
        read_steps([{"_target_": "torch.load"}])


def test_only_steps_that_change_the_architecture_are_repeated():
    steps = describe_steps({"a": LoadWeights("teacher"), "b": ReplaceHead(7), "c": LoRA(2)})
    assert [type(one.step) for one in repeated(steps).values()] == [ReplaceHead]


# ---- in a run


def test_a_pruned_student_is_rebuilt_from_its_folder_alone(place, pruning, capsys):
    keep = f"steps=[{{_target_: {pruning}, keep: 20}}]"
    words = (*MLP, "student.hidden=[48]", "teacher.net.hidden=[48]", "init=teacher", "epochs=1")
    run = train(place, "pruned", *words, keep)
    described = json.loads((run / "model.json").read_text())
    load, prune = described["steps"]
    assert load == {"_target_": "kdlab.models.LoadWeights", "origin": "teacher"}
    assert prune["_target_"] == pruning and len(prune["units"]) == 20
    assert weights(run)["layer1.0.weight"].shape[0] == 20
    with builder.trust(user_modules=True):
        rebuilt, _ = load_model(run, trust=True)
    assert rebuilt.layer1[0].out_features == 20 and torch.equal(
        rebuilt.layer1[0].weight, weights(run)["layer1.0.weight"]
    )

    # its baseline has the same steps without a teacher
    measured = result(run)["models"]
    assert measured["student"]["parameters"] == measured["baseline"]["parameters"]
    baseline = json.loads((place / measured["baseline"]["folder"] / "model.json").read_text())
    assert [step["_target_"] for step in baseline["steps"]] == [pruning]

    # diagnose finds student, teacher and baseline by what the result records
    capsys.readouterr()
    assert main(["diagnose", str(run), "--trust"]) == 0
    assert "not rebuilt" not in capsys.readouterr().out
    assert Path(measured["teacher"]["folder"]).parts[-2] == "teachers"


def test_a_later_run_starts_from_a_pruned_one_and_is_taught_by_it(place, pruning):
    keep = f"steps=[{{_target_: {pruning}, keep: 12}}]"
    alone = (
        "experiment=kd_resnet",
        "student=mlp",
        "student.hidden=[48]",
        "teacher=none",
        "method=finetune",
        "loss=ce",
        "epochs=1",
        "baseline=false",
    )
    first = train(place, "pruned_first", *alone, keep)
    again = train(
        place, "pruned_again", *alone, "init=pretrained", "pretrained=trained", f"pretrained.checkpoint={first}"
    )
    assert weights(again, "model_finetuned.pt")["layer1.0.weight"].shape[0] == 12
    assert json.loads((again / "model.json").read_text())["steps"][0]["_target_"] == pruning
    words = (*MLP, "teacher.net.hidden=[48]", f"teacher.checkpoint={first}", "epochs=1", "baseline=false")
    taught = train(place, "taught_by_pruned", *words)
    assert result(taught)["models"]["teacher"]["parameters"] == result(first)["models"]["student"]["parameters"]


def test_a_stage_goes_on_from_a_pruned_stage(place, pruning):
    stages = f"stages={{small: ['steps=[{{_target_: {pruning}, keep: 9}}]'], rest: [init=previous]}}"
    run = train(place, "pruned_stages", *MLP, "student.hidden=[32]", "epochs=1", stages)
    assert weights(run)["layer1.0.weight"].shape[0] == 9
    with builder.trust(user_modules=True):
        assert load_model(run, trust=True)[0].layer1[0].out_features == 9
