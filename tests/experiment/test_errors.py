"""Every mistake that a user can make: status 2, one line that names it and what is accepted, and nothing written."""

import json
import shutil
from collections import namedtuple

import numpy as np
import pytest
import torch

from helpers.tiny import MLP, QUIET, mistake, result, train, unsealed, write_cifar
from kdlab.cli.main import main
from kdlab.experiment import preflight
from kdlab.models import CifarResNet, save_weights
from kdlab.runs import folder as folders

HINT = ("loss.terms.hint.student_layer=layer1", "loss.terms.hint.teacher_layer=layer1")

MISTAKES = [
    # groups and keys
    (["student=resnt8"], "student: unknown option 'resnt8'; nearest: resnet8"),
    (["lss=dkd"], "lss: unknown key or group 'lss'; nearest: loss"),
    (["student.widht=3"], "student.widht: unknown key 'widht'; "),
    (["+optimizer.momentumm=0.5"], "optimizer.momentumm: unknown key of torch.optim.SGD 'momentumm'; nearest"),
    (["teacher.data.lables=3"], "teacher.data.lables: unknown key of kdlab.data.digits 'lables'; nearest: labels"),
    # types
    (["seed=one"], "seed: 'one'; accepted: an integer"),
    (["seed=null"], "seed: null; accepted: an integer"),
    (["teacher.seed=null"], "teacher.seed: null; accepted: an integer"),
    (["resume=3"], "resume: 3 is not a run folder (no config.yaml); accepted: a run folder, or auto"),
    (["teacher.checkpoint=3"], "teacher.checkpoint: no file 3"),
    (["loss=[]"], "loss: []; accepted: an option (python -m kdlab list loss shows them); labels alone: loss=ce"),
    (["student=[]"], "student: []; accepted: an option"),
    (["optimizer.lr={a: 1}"], 'optimizer.lr: {"a": 1}; accepted: a number'),
    (["data.batch_size=many"], "data.batch_size: 'many'; accepted: an integer"),
    (["trainer.channels_last=maybe"], "trainer.channels_last: 'maybe'; accepted: "),
    # values of the experiment
    (["epochs=0"], "epochs: 0; accepted: a whole number, at least 1"),
    (["epochs=-3"], "epochs: -3; accepted: a whole number, at least 1"),
    (["teacher.epochs=0"], "teacher.epochs: 0; accepted: a whole number, at least 1"),
    (["pretrained=trained", "pretrained.epochs=0"], "pretrained.epochs: 0; accepted: a whole number, at least 1"),
    (["name="], "name: ''; accepted: the name of a folder inside "),
    (["name=../up"], "name: '../up'; accepted: the name of a folder inside "),
    (["name=."], "name: '.'; accepted: the name of a folder inside "),
    (["name=a/../b"], "name: 'a/../b'; accepted: the name of a folder inside "),
    (["name=' '"], "name: ' '; accepted: the name of a folder inside "),
    (['name="a\nb"'], "name: 'a\\nb'; accepted: the name of a folder inside "),
    (["name=teachers"], "name: 'teachers'; teachers is kept for what runs share; accepted: another name"),
    (["stages={'../../x': [epochs=1]}"], "stages: '../../x'; accepted: a name for each stage (no path, "),
    (["stages={/x: [epochs=1]}"], "stages: '/x'; accepted: a name for each stage"),
    (["stages={a/b: [epochs=1]}"], "stages: 'a/b'; accepted: a name for each stage"),
    (["stages={a: ['hydra.searchpath=[pkg://x]']}"], "stages.a: hydra.searchpath: a setting of Hydra's; accepted "),
    (["stages={a: [+hydra/launcher=basic]}"], "stages.a: hydra/launcher: a setting of Hydra's; accepted "),
    # parts
    (["logger._target_=kdlab.models.save_weights"], "logger._target_: 'kdlab.models.save_weights' may not be built"),
    (["student._target_=torch.nn.init.zeros_"], "student._target_: 'torch.nn.init.zeros_' may not be built here"),
    (["student._target_=kdlab.losses.KL"], "student._target_: 'kdlab.losses.KL' may not be built here; accepted: a n"),
    (["data._target_=kdlab.data.download.fetch"], "data._target_: 'kdlab.data.download.fetch' may not be built here"),
    (["student=resnet8", "student.width=1000000"], "student: a network of "),
    (["init=pretrained"], "init: pretrained, and the experiment has none; accepted: pretrained=trained, or init=fresh"),
    (["init=teacher", "teacher=mlp_teacher"], "init: teacher, which is another architecture than the student"),
    (["experiment=ema", "init=teacher"], "init: teacher, and the experiment has no teacher; accepted: fresh, "),
    # loss and temperature
    (["loss.alpha=1.5"], "loss.alpha: 1.5; accepted: "),
    (["loss.alpha={start: 0, end: -1}"], "loss.alpha: -1; accepted: "),
    (["loss.temperature=0"], "loss.temperature: 0; accepted: a number above 0"),
    (["loss.temperature={start: 4, end: 0}"], "loss.temperature: 0; accepted: a number above 0"),
    (["loss.terms.kl.weight=-1"], "loss.terms.kl.weight: -1; accepted: "),
    (["loss.terms.kl.weight=1e38"], "loss.terms.kl.weight: 1e+38; accepted: between 0 and 1e+12"),
    (["loss.terms.kl.weight=1e-30"], "loss.terms.kl.weight: 1e-30; accepted: 0, or at least 1e-12"),
    (["loss.temperature=1e-30"], "loss.temperature: 1e-30; accepted: 0.01 to 1e+06, which float32"),
    (["loss.temperature=1e30"], "loss.temperature: 1e+30; accepted: 0.01 to 1e+06, which float32"),
    (["loss.temperature={start: 4, end: 1e-30}"], "loss.temperature: 1e-30; accepted: 0.01 to 1e+06"),
    (["temperature=learned", "loss.temperature.high=1e30"], "loss.temperature: 1e+30; accepted: 0.01 to 1e+06"),
    (["loss=tf_kd", "teacher=none", "method=finetune", "loss.terms.tf_kd.temperature=1e-9"], "loss.terms.tf_kd.temp"),
    # nothing to learn from, and what nothing reads
    (["loss.alpha=1", "loss.terms.kl.weight=0"], "loss: nothing to learn from: ce weighs 1 - alpha, and alpha is 1"),
    (
        ["method=semi_supervised_kd", "data.labels=0", "loss=ce"],
        "loss: nothing to learn from: ce counts rows with a label, and data have none; accepted: a loss of which",
    ),
    (["loss=ce", "loss.temperature=3"], "loss.temperature: 3, and no term of the loss softens; accepted: leave it out"),
    (["loss=ce", "temperature=learned"], "temperature: learned, and no term of the loss softens; accepted: leave"),
    (["loss=ce", "+loss.alpha=0.5"], "loss.alpha: 0.5, and no term of the loss has soft targets; accepted: leave it"),
    (["-m", "loss=ce", "loss.temperature=3,4"], "loss.temperature: 4, and no term of the loss softens; accepted"),
    (["pretrained=trained"], "pretrained: trained, and init is fresh, and nothing starts from it; accepted: with init"),
    (["data.views=3"], "data.views: 3, and nothing in data.augment draws, and all views of an example are alike"),
    # sizes
    (["student.width=1000000"], "student: a network of 298,000,133,000,021 numbers, with its gradients, takes 2,168."),
    (["student.width=1000000000000000000000"], "student: kdlab.models.CifarResNet cannot be built with these values"),
    (["teacher.net.width=1000000"], "teacher.net: a network of "),
    (["student=mlp", "student.hidden=[1000000000,1000000000]"], "student: a network of "),
    (["data=synthetic", "student=mlp", "teacher=mlp", "data.n=1000000000000"], "data.n: 1,000,000,000,000 rows of 10"),
    (["trainer.threads=1000000000"], "trainer.threads: 1000000000; accepted: up to 1024, or auto"),
    (["auxiliary=peers", "loss=mutual", "auxiliary.count=1000000"], "auxiliary.count: 1000000; accepted: "),
    (["loss=dkd", "loss.alpha=0.5"], "loss.alpha: the recipes chosen by loss= have no alpha; accepted: "),
    (["loss=[hinton,soft_targets]"], "loss: 'hinton' and 'soft_targets' both fill loss.terms.kl; "),
    (["loss=[hinton,balanced]"], "loss: 'hinton' and 'balanced' both fill loss.terms.kl; "),
    (["loss=fitnets", *HINT, "loss.terms.hint.student_layer=layr2"], "loss.terms.hint.student_layer: unknown"),
    (["loss=fitnets", *HINT, "loss.terms.hint.teacher_layer=layr2"], "loss.terms.hint.teacher_layer: unknown"),
    (["experiment=ema", "loss=[balanced,fitnets]", "loss.terms.hint.student_layer=no"], "loss.terms.hint.stud"),
    # teacher
    (["teacher=none"], "teacher: none, and the loss has terms that need one; accepted: teacher=NAME, or loss=ce"),
    (["teacher=none", "loss=ce"], "teacher: none, and OfflineKD learns from one; accepted: teacher=NAME"),
    (["teacher=previous"], "teacher: previous, and no stage comes before; accepted: teacher=NAME, or a stage before"),
    (["teacher.checkpoint=nowhere.pt"], "teacher.checkpoint: no file nowhere.pt"),
    (["teacher.data.classes=[0,1,2]"], "teacher.data: 3 classes 0, 1, 2, and data has 10: 0, 1, 2, 3, ...; accepted: "),
    (["teacher.data.classes=[1,0,2,3,4,5,6,7,8,9]"], "teacher.data: 10 classes 1, 0, 2, 3, ..., and data has 10"),
    (["teacher.data.labels=0"], "teacher.data.labels: 0, and it learns from labels; accepted: above 0, or null"),
    (["teacher.data.labels=5"], "teacher.data.labels: 5; accepted: 0 (no labels), 10..1200 "),
    (["teacher.optimizer.lr=-1"], "teacher.optimizer: torch.optim.SGD cannot be built with these values (Inv"),
    (["teacher.scheduler.warmup=2"], "teacher.scheduler.warmup: 2; accepted: a number at least 0 and below 1"),
    (["teacher.cache=nowhere"], "teacher.cache: nowhere holds no manifest.json; accepted: auto, off, or the folder"),
    (
        ["teacher.cache=here", "teacher.feature_mib=0", "loss=fitnets", *HINT],
        "teacher.cache: here, and the loss looks at its layers (layer1)",
    ),
    (["teacher.feature_mib=-1"], "teacher.feature_mib: -1; accepted: a number, at least 0"),
    (["teacher.cache=here", "data.augment=[{crop: {padding: 1}}]"], "teacher.cache: here, and data.augment (crop"),
    (["method=finetune"], "method: FineTune learns from labels alone, and the loss has terms that need a teacher"),
    (["init=previous"], "init: previous, and no stage comes before; accepted: "),
    # data
    (["data=synthetic"], "student: CifarResNet takes pictures, and data (synthetic) is a table; accepted: mlp"),
    (["data.labels=5"], "data.labels: 5; accepted: 0 (no labels), 10..1200 "),
    (["data.labels=5000"], "data.labels: 5000; there are 1200 training rows; accepted: "),
    (["data.batch_size=1"], "data.batch_size: 1; accepted: a whole number, at least 2"),
    (["data.batch_size=4", "trainer.accumulate=4"], "data.batch_size: 4 of 1200 rows in 4 parts"),
    (["data.val=1.0"], "data.val: 1.0, which is a share of all 1437 rows; accepted: 1 (one row), or less of them"),
    (["data.eval_batch_size=0"], "data.eval_batch_size: 0; accepted: a whole number, at least 1"),
    (["student=mlp", "teacher=mlp", "student.mean=[]"], "student.mean: an empty list; accepted: a number"),
    (["data.fraction=2"], "data.fraction: 2; accepted: above 0, up to 1, or null"),
    (["data.views=2", "data.augment=[{mixup: {alpha: 0.2}}]"], "data.views: 2; mixup in data.augment mixes"),
    (["data.views=all", "data.augment=[{rotate: {}}]"], "data.augment"),
    (["data.augment=[crp]"], "data.augment: unknown transform 'crp'; nearest: crop"),
    (["data=cifar10", "data.root=nowhere"], "data.root: no cifar-10-batches-py in nowhere; fetch it"),
    (["data=csv", "data.path=nowhere.csv"], "data.path: cannot read nowhere.csv (No such file or directory)"),
    (["data=csv"], "data.path: null; accepted: a CSV file with a header line"),
    (["data=tensors"], "data.inputs: null; accepted: "),
    # method, optimizer, trainer
    (["method=pseudo_labels", "method.threshold=2"], "method.threshold: 2; accepted: a number at least 0 and below 1"),
    (["method=pseudo_labels", "method.labels=firm"], "method.labels: 'firm'; "),
    (["method=finetune", "loss=ce", "method.freeze=[layr1]"], "method.freeze: "),
    (["method=finetune", "loss=ce", "method.patience=0"], "method.patience: 0; accepted: a whole number of epochs"),
    (["experiment=born_again", "method.generations=0"], "method.generations: 0; accepted: a whole number, at least 1"),
    (["experiment=ema", "method.decay=1"], "method.decay: 1; accepted: a number at least 0 and below 1"),
    (["experiment=snapshot", "method.begin=1"], "method.begin: 1; accepted: a number above 0 and below 1"),
    (["optimizer.lr=-1"], "optimizer: torch.optim.SGD cannot be built with these values (Invalid le"),
    (["scheduler=multistep", "scheduler.milestones=[3,1]"], "scheduler.milestones: [3, 1]; accepted: "),
    (["trainer.threads=0"], "trainer.threads: 0; accepted: a whole number, at least 1, or auto"),
    (["trainer.accumulate=0"], "trainer.accumulate: 0; accepted: a whole number, at least 1"),
    (["trainer.clip=0"], "trainer.clip: 0; accepted: a number above 0, or null"),
    (["trainer.save_minutes=0"], "trainer.save_minutes: 0; accepted: a finite number above 0"),
    (["trainer.precision=bf8"], "trainer.precision: unknown value 'bf8'; "),
    # stages and resuming
    (["stages={a: ['epochs=1'], b: ['student=resnt8']}"], "stages.b: student: unknown option 'resnt8'"),
    (["stages={a: ['epochs=1'], b: ['epochs=0']}"], "epochs: 0; accepted: a whole number, at least 1"),
    (["stages={a: ['loss.temprature=2']}"], "stages.a: loss.temprature: unknown key 'temprature'"),
    (["resume=nowhere"], "resume: nowhere is not a run folder (no config.yaml); accepted: a run folder, or auto"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "start"), MISTAKES, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_mistakes(capsys, place, tmp_path, words, start):
    base = (
        []
        if any(word.startswith(("experiment=", "student=", "teacher=")) for word in words)
        else ["teacher=resnet8_w4"]
    )
    said = mistake(capsys, [*QUIET, *base, *words], tmp_path / "out")
    assert said.startswith(start), said
    folder = {path.name for path in place.iterdir()}
    assert not folder & {"outputs", "nowhere"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_gpu_that_is_not_there(capsys, tmp_path):
    said = mistake(capsys, ["trainer=gpu"], tmp_path / "out")
    assert said == "trainer.accelerator: gpu, and torch sees no GPU here; accepted: cpu or auto"


# ---- checkpoints


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """A teacher's file, and everything that can be wrong with one."""
    folder = tmp_path_factory.mktemp("checkpoints")
    net = CifarResNet(depth=8, width=4, num_classes=10, in_channels=1)
    save_weights(net, folder / "good.pt")
    content = (folder / "good.pt").read_bytes()
    (folder / "cut.pt").write_bytes(content[: len(content) // 2])
    (folder / "empty.pt").write_bytes(b"")
    (folder / "page.pt").write_bytes(b"<html>404: not found</html>")
    flipped = bytearray(content)
    flipped[content.index(b"conv1.weight") + 4000] ^= 1
    (folder / "flipped.pt").write_bytes(bytes(flipped))
    torch.save(net, folder / "pickled.pt")
    torch.save({"epoch": 3, "lr": 0.1}, folder / "foreign.pt")
    save_weights(CifarResNet(depth=14, width=4, num_classes=10, in_channels=1), folder / "deeper.pt")
    save_weights(CifarResNet(depth=8, width=8, num_classes=10, in_channels=1), folder / "wider.pt")
    save_weights(CifarResNet(depth=8, width=4, num_classes=7, in_channels=1), folder / "seven.pt")
    broken = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    broken["fc.weight"][0, 0] = float("nan")
    save_weights(broken, folder / "nan.pt")
    return folder


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("cut.pt", "is damaged or cut off: not a whole zip archive"),
        ("empty.pt", "is empty"),
        ("page.pt", "is not a checkpoint; accepted: torch.save files and safetensors"),
        ("flipped.pt", "is damaged: the checksum of "),
        ("pickled.pt", "refused: it wants to run code"),
        ("foreign.pt", "holds no weights: expected tensors, or one of "),
        ("deeper.pt", "does not fit"),
        ("wider.pt", "does not fit CifarResNet: conv1.weight is 8x1x3x3, not 4x1x3x3"),
        ("seven.pt", "has 7 classes, data has 10"),
        ("nan.pt", "holds weights that are not finite, first in fc.weight"),
        ("goood.pt", "no file "),
    ],
)
@pytest.mark.parametrize("key", ["teacher", "pretrained"])
def test_checkpoints(capsys, place, tmp_path, checkpoints, file, says, key):
    if key == "pretrained" and file == "seven.pt":
        return  # another number of classes is what fine-tuning is for, as another test shows
    own = (
        ["teacher=resnet8_w4"]
        if key == "teacher"
        else ["method=finetune", "loss=ce", "pretrained=trained", "init=pretrained"]
    )
    words = [*QUIET, *own, f"{key}.checkpoint={checkpoints / file}"]
    said = mistake(capsys, words, tmp_path / "out")
    assert said.startswith(f"{key}.checkpoint: ") and says in said and str(checkpoints) in said, said


def test_a_good_checkpoint_teaches_untrained_by_us(place, checkpoints):
    words = ("teacher=resnet8_w4", "data.fraction=0.1", "epochs=1", "baseline=false")
    run = train(place, "given_teacher", *words, f"teacher.checkpoint={checkpoints / 'good.pt'}")
    assert result(run)["teacher_trained_on"] == "elsewhere (checkpoint good.pt)"
    assert result(run)["models"]["teacher"]["seconds"] is None


def test_check_finds_a_teacher_that_is_no_better_than_chance(capsys, place, checkpoints):
    words = ["check", *QUIET, "teacher=resnet8_w4", f"teacher.checkpoint={checkpoints / 'good.pt'}", "output=never"]
    assert main(words) == 2
    assert "FAIL  teacher.checkpoint: " in (said := capsys.readouterr().out) and "chance is 10.0%" in said
    assert not (place / "never").exists()


# ---- data that make no sense


def arrays(**changed):
    draw = np.random.default_rng(0)
    made = {"inputs": draw.normal(size=(60, 5)).astype(np.float32), "targets": np.arange(60) % 3}
    return {**made, **changed}


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"inputs": np.full((60, 5), np.nan, np.float32)}, "row 0 has an input that is not finite"),
        ({"inputs": np.where(np.arange(300).reshape(60, 5) == 12, np.inf, 1).astype(np.float32)}, "row 2 has an input"),
        ({"targets": np.arange(60) % 3 - 1}, "has class id -1; accepted: 0..1"),
        ({"class_names": np.array(["a", "b"])}, "has class id 2; accepted: 0..1"),
        ({"targets": np.arange(59) % 3}, "has 60 inputs and 59 targets"),
        ({"inputs": np.zeros((0, 5), np.float32), "targets": np.zeros(0, np.int64)}, "has no rows"),
        (
            {"targets": (np.arange(60) % 3).astype(np.float32)},
            "of torch.float32 and shape (60,); accepted: ",
        ),
        ({"inputs": np.zeros((60, 2, 2, 2, 2), np.float32)}, "shape (60, 2, 2, 2, 2); accepted: "),
        ({"labels": np.arange(60)}, "unknown array 'labels'"),
    ],
)
def test_arrays(capsys, place, tmp_path, changed, says):
    np.savez(tmp_path / "own.npz", **arrays(**changed))
    words = [*QUIET, *MLP, "data=tensors", f"data.inputs={tmp_path / 'own.npz'}"]
    said = mistake(capsys, words, tmp_path / "out")
    assert said.startswith("data.") and says in said, said


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a,target\n", "has no rows below its header"),
        ("", "has no rows below its header"),
        ("a,b,target\n" + "1,2,x\n1,nan,y\n" * 20, "row 2, column 'b': 'nan' is no finite number"),
        ("a,b,target\n" + "1,2,x\n1,dog,y\n" * 20, "row 2, column 'b': 'dog' is no finite number"),
        ("a,b,label\n" + "1,2,x\n1,2,y\n" * 20, "unknown column 'target'"),
        ("a,b,target\n1,2,x\n1,2\n", "row 2 has 2 values, the header 3"),
        ("a,b,target\n" + "1,2,x\n" * 20, "holds 1 different values in 20 rows; accepted: a column of classes"),
    ],
)
def test_tables(capsys, place, tmp_path, text, says):
    (tmp_path / "own.csv").write_text(text)
    said = mistake(capsys, [*QUIET, *MLP, "data=csv", f"data.path={tmp_path / 'own.csv'}"], tmp_path / "out")
    assert said.startswith("data.") and says in said, said


def test_a_teacher_of_another_data_set(capsys, place, tmp_path, monkeypatch):
    root = write_cifar(tmp_path, monkeypatch)
    words = [*QUIET, "experiment=kd_cifar10", "data=cifar100", f"data.root={root}", "data.val=10", "data.label=coarse"]
    save_weights(CifarResNet(depth=56, num_classes=10, shortcut="A"), tmp_path / "ten.pt")
    said = mistake(capsys, [*words, f"teacher.checkpoint={tmp_path / 'ten.pt'}"], tmp_path / "out")
    assert said.startswith("teacher.checkpoint: has 10 classes, data has 5 (")


# ---- places


def test_a_full_disk_before_anything_is_written(capsys, place, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 100, 100))
    said = mistake(capsys, [*QUIET, *MLP], tmp_path / "out")
    assert said.startswith(f"output: {tmp_path} has 0 MiB free, and a run writes about ") and "accepted: " in said


def test_an_output_that_cannot_be_written_to(capsys, place, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    for output in (tmp_path / "file", tmp_path / "file" / "inside"):
        capsys.readouterr()
        assert main([*QUIET, *MLP, f"output={output}"]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"kdlab: error: output: {output}: ") and said.count("\n") == 1, said
        assert "accepted: a folder that can be written to" in said


# ---- what a config must not build


@pytest.mark.parametrize(
    "target", ["os.system", "torch.load", "builtins.eval", "torch.hub.load", "kdlab.models.os.system"]
)
def test_a_users_config_cannot_name_just_anything(capsys, place, tmp_path, monkeypatch, target):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "model" / "evil.yaml").write_text(f"# harmless\n_target_: {target}\ncommand: touch pwned\n")
    for words in (["student=evil"], ["teacher=evil"]):
        said = mistake(capsys, [*QUIET, *words], tmp_path / "out")
        assert "_target_: " in said and repr(target) in said and "accepted: " in said, said
    assert not (tmp_path / "pwned").exists()


def test_a_users_module_that_breaks_when_imported(capsys, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "broken_parts.py").write_text("import nothing_like_it\ndef net(num_classes: int):\n    return None\n")
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "model" / "broken.yaml").write_text("# my own\n_target_: broken_parts.net\n")
    said = mistake(capsys, [*QUIET, "student=broken"], tmp_path / "out")
    assert said.startswith("student._target_: importing 'broken_parts.net' failed: ModuleNotFoundError")


def test_preflight_in_python_is_the_same(place, tmp_path):
    with pytest.raises(ValueError, match=r"^epochs: 0; accepted"):
        preflight({**_plain_config(), "epochs": 0})
    assert [finding.ok for finding in preflight({**_plain_config(), "epochs": 0}, deep=True)] == [False]
    assert all(finding.ok for finding in preflight(_plain_config(), deep=True))


def _plain_config():
    from kdlab.cli.hydra.compose import composer

    with composer() as found:
        return found.compose([*QUIET, *MLP]).config


# ---- predict


@pytest.fixture
def stranger(place, tmp_path, monkeypatch):
    """A run folder as it comes from somebody else: it names a module of theirs, and its signature is not ours."""
    run = train(place, "of_a_stranger", *MLP, "epochs=1", "baseline=false", "resume=auto")
    copy = tmp_path / "theirs"
    shutil.copytree(run, copy)
    described = json.loads((copy / "model.json").read_text())
    described["network"] = {"_target_": "their_parts.Net"}
    (copy / "model.json").write_text(json.dumps(described))
    unsealed(copy)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "their_parts.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom kdlab.models import MLP\n"
        "def Net(num_classes: int, mean: list = None, std: list = None):\n"
        "    return MLP([64, 64], num_classes=num_classes, in_features=64, mean=mean, std=std)\n"
    )
    np.save(tmp_path / "row.npy", np.zeros((1, 8, 8), np.float32))
    return copy


def test_a_strangers_run_needs_trust(capsys, stranger, tmp_path):
    said = mistake(capsys, ["predict", str(stranger), str(tmp_path / "row.npy")])
    assert said.startswith(
        f"{stranger}/model.json: network._target_: 'their_parts.Net' may not be built here; accepted: "
    )
    assert said.endswith("(--trust builds those of a folder made elsewhere)")
    assert not (tmp_path / "ran").exists()
    assert not folders.is_mine(stranger)
    assert main(["predict", str(stranger), str(tmp_path / "row.npy"), "--trust"]) == 0
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda run, d: {**d, "network": {"_target_": "os.system"}}, "network._target_: 'os.system' may not be built"),
        (lambda run, d: [1, 2], "model.json: damaged or of another program"),
        (
            lambda run, d: {k: v for k, v in d.items() if k != "input_shape"},
            "model.json: damaged or of another program",
        ),
        (lambda run, d: {**d, "classes": ["a"]}, "model.json: "),
        (lambda run, d: (run / "student.pt").unlink() or d, "no file "),
        (lambda run, d: (run / "student.pt").write_bytes(b"PK") and d, "is damaged or cut off"),
    ],
)
def test_predict_from_a_folder_that_is_damaged(capsys, stranger, place, tmp_path, change, says):
    shutil.copytree(next((place / "of_a_stranger").iterdir()), tmp_path / "run")
    run = tmp_path / "run"
    described = json.loads((run / "model.json").read_text())
    (run / "model.json").write_text(json.dumps(change(run, described)))
    unsealed(run)
    said = mistake(capsys, ["predict", str(run), str(tmp_path / "row.npy")])
    assert says in said and str(run) in said, said


# ---- text

SUMS = ("experiment=reasoning_arithmetic", "student=gpt_tiny", "teacher=gpt_tiny", "data.train=20", "data.val=4")
DIGITS = ("experiment=kd_mlp",)
TRACES = ("experiment=reasoning_arithmetic", "student=gpt_tiny", "teacher=gpt_tiny")
PROSE = ("experiment=lm_shakespeare", "student=gpt_tiny", "teacher=gpt_tiny", "data=text", "data.path=prose.txt")

TEXT_MISTAKES = [
    # tokens
    ((*SUMS, "data.tokenizer=./nowhere"), "data.tokenizer: "),
    ((*SUMS, "data.tokenizer=bpe", "data.vocab=10"), "data.vocab: 10"),
    ((*SUMS, "teacher.data.tokenizer=bytes"), "teacher.data: its tokenizer (257 tokens) is not that of data ("),
    # room
    ((*SUMS, "data.context=10"), "data.context: 10; "),
    ((*PROSE, "data.context=1"), "student.context: 1, here or in data.context; gpt2 is tried with 2; accepted: at"),
    ((*PROSE, "data.path=other.txt"), "data.path: other.txt has 5 characters, of which data.test=0.05 takes 0"),
    ((*PROSE, "data.path=latin.txt"), "data.path: latin.txt is no UTF-8 text (unexpected end of data at byte 1); acc"),
    ((*SUMS, "student.context=8"), "student.context: 8, and data.context is 96; accepted: "),
    # segments
    ((*SUMS, "data.segment_weights={reasonning: 1}"), "data.segment_weights: unknown segment 'reasonning'; nearest"),
    ((*SUMS, "data.segment_weights={reasoning: 0, answer: 0}"), "data"),
    # sources
    (
        (*SUMS, "batch_transform=sequence_level", "teacher=none", "method=finetune", "loss=ce"),
        "batch_transform: the teacher's text, and there is no teacher; accepted: teacher=NAME, or batch_transform=none",
    ),
    (
        (*SUMS, "batch_transform=on_policy", "data.pack=true"),
        "batch_transform: needs a sequence a row, and data.pack joins several",
    ),
    (
        (*DIGITS, "batch_transform=on_policy"),
        "batch_transform: GeneratedText, and data (synthetic) is no text; accepted: batch_transform=none",
    ),
    ((*SUMS, "batch_transform=on_policy", "batch_transform.fraction=1.5"), "batch_transform.fraction: 1.5; accepted: "),
    # caches
    ((*SUMS, "teacher.top_k=1000"), "teacher.top_k: 1000; accepted: a whole number from 1 to "),
    ((*SUMS, "teacher.draws=5000"), "teacher.draws: 5000; accepted: a whole number from 1 to 4096"),
    ((*SUMS, "teacher.top_k=4", "teacher.draws=4"), "teacher.top_k: 4, and teacher.draws: 4; accepted: one of them"),
    (
        (*SUMS, "teacher.top_k=4", "batch_transform=on_policy"),
        "teacher.top_k: 4, and batch_transform writes sequences that nobody",
    ),
    ((*SUMS, "teacher.top_k=4", "loss=hidden_cosine"), "teacher.top_k: 4, and the loss looks at its layers"),
    ((*DIGITS, "teacher.top_k=4"), "teacher.top_k: 4, and data (synthetic) is no text; accepted: null"),
    ((*SUMS, "teacher.cache=nowhere"), "teacher.cache: nowhere holds no manifest.json; accepted: auto, off, or"),
    # networks
    ((*SUMS, "student=resnet8_w4"), "student: CifarResNet takes rows of classes, and data (arithmetic) is text"),
    ((*SUMS, "student=t5_tiny_student"), "student: Seq2SeqLM takes pairs, and data (arithmetic) gives"),
    (("student=gpt_tiny", "teacher=mlp"), "student: CausalLM takes sequences of tokens, and data (digits) is "),
    ((*SUMS, "student.settings.n_head=5"), "student"),
    ((*SUMS, "student.vocab_size=5"), "student.vocab_size: 5, and data (arithmetic) has "),
    ((*SUMS, "teacher.net.vocab_size=5"), "teacher.net.vocab_size: 5, and data "),
    ((*SUMS, "student=hf_causal", "student.name=no/where"), "student.name: "),
    ((*SUMS, "init=layer_subset", "student.settings.n_layer=4"), "cut: net.transformer.h: the student has 4 blocks"),
    (
        (*SUMS, "init=layer_subset", "teacher=none", "method=finetune", "loss=ce"),
        "init: layer_subset, and the experiment has no teacher",
    ),
    ((*SUMS, "adapter=lora", "adapter.rank=0"), "adapter.rank: 0"),
    ((*SUMS, "adapter=lora", "adapter.targets=[no_such]"), "adapter.targets: "),
    ((*SUMS, "loss=hidden_cosine", "loss.terms.cosine.student_layer=nowhere"), "loss.terms.cosine.student_layer: "),
    # tasks
    ((*SUMS, "task=classification"), "task: Classification wants to know num_classes, and data (arithmetic) "),
    ((*SUMS, "task=text_to_text"), "task: TextToText reads text, and data (arithmetic) gives next_token; accepted: "),
    ((*DIGITS, "task=language_modeling"), "task: LanguageModeling wants to know vocab_size, and data "),
    ((*SUMS, "task.score=em"), "task.score: unknown measure 'em'"),
    # files
    (("experiment=lm_shakespeare", "data.root=nowhere"), "data.root: no tinyshakespeare/input.txt in nowhere; "),
    (("experiment=lm_shakespeare", "data.root=false_one"), "data.root: false_one/input.txt is not the publisher's"),
    (("experiment=distilgpt2_wikitext", "data.root=nowhere"), "data.root: no wikitext-103 in nowhere; accepted: "),
    ((*PROSE, "data.path=nowhere.txt"), "data.path: "),
    ((*PROSE, "data.path=empty.txt"), "data.path: "),
    ((*PROSE, "data.ood={_target_: kdlab.data.digits}"), "data.ood: "),
    ((*TRACES, "data=traces", "data.path=broken.jsonl"), "data.path: broken.jsonl, line 2 is no JSON"),
    ((*TRACES, "data=traces", "data.path=empty.txt"), "data.path: empty.txt is empty; accepted: "),
    ((*TRACES, "data=traces"), "data.path: null"),
    ((*TRACES, "data=traces", "data.path=traces.jsonl", "data.keep=right"), "data.keep: right; "),
]  # fmt: skip


@pytest.mark.parametrize(("words", "start"), TEXT_MISTAKES, ids=lambda value: value[-1] if len(value) < 12 else "")
def test_mistakes_about_text(capsys, place, tmp_path, monkeypatch, words, start):
    (tmp_path / "in" / "false_one").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "in")
    prose = "the king and the queen\n" * 100
    files = {"prose.txt": prose, "other.txt": "café\n", "empty.txt": "", "false_one/input.txt": prose}
    files |= {"broken.jsonl": '{"question": "a", "answer": "b"}\n{"question\n{}\n'}
    files |= {"traces.jsonl": '{"question": "a", "answer": "b"}\n{"question": "c", "answer": "d"}\n' * 9}
    for name, content in files.items():
        (tmp_path / "in" / name).write_text(content)
    (tmp_path / "in" / "latin.txt").write_bytes("né".encode("latin-1"))
    said = mistake(capsys, [*QUIET, *words], tmp_path / "out")
    assert said.startswith(start), said
    hints = ("accepted", "nearest: ", "fetch it", "no UTF-8", "damaged", "refuses them")
    assert any(hint in said for hint in hints), said
    assert {path.name for path in (tmp_path / "in").iterdir()} == {name.split("/")[0] for name in files} | {"latin.txt"}
