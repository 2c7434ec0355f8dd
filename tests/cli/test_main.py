"""The command line: help, verbs, composing, and every mistake in one line before anything is written."""

import json

import pytest
import yaml

import kdlab.experiment
from kdlab.cli.main import main
from kdlab.cli.verbs import doctor, names
from kdlab.config import options
from kdlab.errors import RunFailed, UserError
from kdlab.system.termination import Terminated


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """Every command runs in an empty folder, where nothing may be left by a mistake."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.fixture
def calls(monkeypatch):
    """Experiments that are recorded instead of run."""
    made = []
    # into its namespace: asking for the old value first would import torch
    monkeypatch.setitem(vars(kdlab.experiment), "preflight", lambda config, deep=False: [])
    monkeypatch.setitem(vars(kdlab.experiment), "run", lambda config, **more: made.append((config, more)) or {})
    return made


def composed(capsys, *words):
    assert main(["--cfg", "job", *words]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def mistake(capsys, workplace, *words):
    """The one line that a mistake prints."""
    before = set(workplace.rglob("*"))
    assert main(list(words)) == 2
    said = capsys.readouterr().err
    assert said.startswith("kdlab: error: ") and said.count("\n") == 1, said
    assert set(workplace.rglob("*")) == before
    return said.removeprefix("kdlab: error: ").rstrip()


# ---- help and list


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["experiment=kd_resnet", "--help"]])
def test_help_lists_verbs_groups_and_options(capsys, words):
    assert main(words) == 0
    text = capsys.readouterr().out
    for name in (*names(), "kd_resnet", "resnet8_w4", "hinton", "temperature", "teacher.checkpoint=FILE"):
        assert name in text
    assert len(text.splitlines()) < 90 and max(map(len, text.splitlines())) <= 120


def test_every_verb_has_help(capsys):
    for verb in names():
        with pytest.raises(SystemExit) as stop:
            main([verb, "--help"])
        assert stop.value.code == 0
        assert f"kdlab {verb}" in capsys.readouterr().out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"kdlab {kdlab.__version__}"


def test_every_option_says_what_it_is():
    found = options.read([options.shipped()])
    silent = [f"{group}/{name}" for group, shown in found.groups.items() for name, said in shown.items() if not said]
    assert not silent


def test_list(capsys):
    assert main(["list"]) == 0
    text = capsys.readouterr().out
    assert "hinton" in text and "previous" in text and "kd_resnet" in text
    assert main(["list", "loss"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("loss\n") and "hinton" in text and "kd_resnet" not in text


def test_list_layers(capsys):
    assert main(["list", "layers", "teacher=none"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "student: kdlab.models.CifarResNet"
    assert any(line.split() == ["layer2", "Sequential", "8", "x", "4", "x", "4"] for line in lines)


# ---- composing


def test_experiments_win_over_the_root_and_users_over_experiments(capsys):
    assert composed(capsys, "experiment=kd_resnet")["name"] == "kd_resnet"
    assert composed(capsys, "experiment=kd_resnet", "name=mine")["name"] == "mine"


def test_student_and_teacher_are_any_network(capsys):
    config = composed(capsys, "student=resnet14", "student.width=8", "teacher=wrn_16_2")
    assert config["student"]["depth"] == 14 and config["student"]["width"] == 8
    assert config["teacher"]["net"]["_target_"] == "kdlab.models.WideResNet"
    assert config["teacher"]["optimizer"]["_target_"] == "torch.optim.SGD" and config["teacher"]["cache"] == "auto"
    assert composed(capsys, "teacher=none")["teacher"] is None
    assert composed(capsys, "teacher=previous")["teacher"]["net"] is None
    assert (
        composed(capsys, "optimizer@teacher.optimizer=adam")["teacher"]["optimizer"]["_target_"] == "torch.optim.Adam"
    )


def test_swapping_an_option_carries_nothing_over(capsys):
    config = composed(capsys, "experiment=kd_resnet", "loss=dkd", "student=vgg8", "optimizer=adam")
    assert "alpha" not in config["loss"] and set(config["loss"]["terms"]) == {"ce", "dkd"}
    assert "width" not in config["student"] or config["student"]["_target_"] == "kdlab.models.VGG"
    assert "momentum" not in config["optimizer"]


def test_recipes_add_up(capsys):
    one, listed = composed(capsys, "loss=dkd"), composed(capsys, "loss=[dkd]")
    assert one == listed
    assert set(composed(capsys, "loss=[hinton,fitnets]")["loss"]["terms"]) == {"ce", "kl", "hint"}


def test_open_mappings_take_any_key_of_their_data(capsys):
    assert composed(capsys, "teacher.data.labels=100")["teacher"]["data"] == {"labels": 100}
    assert composed(capsys, "teacher.data.seed=3")["teacher"]["data"] == {"seed": 3}
    config = composed(capsys, "pretrained=trained", "pretrained.data.classes=[0,1]")
    assert config["pretrained"]["data"] == {"classes": [0, 1]}


def test_cfg_package_resolve_and_hydra(capsys):
    assert main(["--cfg", "job", "-p", "loss", "--resolve"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["temperature"] == 4.0
    assert main(["--cfg", "hydra"]) == 0
    assert "launcher" in yaml.safe_load(capsys.readouterr().out)["hydra"]


def test_cfg_shows_a_wrong_config_and_says_what_is_wrong(capsys):
    assert main(["--cfg", "job", "epochs=many"]) == 2
    shown = capsys.readouterr()
    assert yaml.safe_load(shown.out)["epochs"] == "many" and shown.err.startswith("kdlab: error: epochs: ")


def test_a_users_own_options_come_first(capsys, workplace):
    (workplace / "conf" / "model").mkdir(parents=True)
    (workplace / "own_parts_cli.py").write_text(
        "from torch import nn\n"
        "class Tiny(nn.Module):\n"
        "    def __init__(self, num_classes: int, hidden: int = 4):\n"
        "        super().__init__()\n"
    )
    file = workplace / "conf" / "model" / "tiny.yaml"
    file.write_text("# my own\n_target_: own_parts_cli.Tiny\nhidden: 8\n")
    config = composed(capsys, "student=tiny", "teacher=tiny", "student.hidden=16")
    assert config["student"] == {"_target_": "own_parts_cli.Tiny", "hidden": 16}
    assert config["teacher"]["net"]["hidden"] == 8
    file.write_text("# my own\n_target_: own_parts_cli.Tiny\nhiden: 8\n")
    said = mistake(capsys, workplace, "student=tiny")
    assert said.startswith("student.hiden: unknown key of own_parts_cli.Tiny 'hiden'; nearest: hidden;")


def test_another_config_folder(capsys, workplace):
    (workplace / "more" / "experiment").mkdir(parents=True)
    (workplace / "more" / "experiment" / "mine.yaml").write_text("# @package _global_\nname: mine\nseed: 7\n")
    assert composed(capsys, "--config-dir", "more", "experiment=mine")["seed"] == 7


def test_a_key_misspelt_in_a_file_is_found(capsys, workplace):
    folder = workplace / "conf" / "experiment"
    folder.mkdir(parents=True)
    (folder / "wrong.yaml").write_text("# @package _global_\nname: wrong\nloss:\n  temprature: 3\n")
    said = mistake(capsys, workplace, "experiment=wrong")
    assert said.startswith("loss.temprature: unknown key of kdlab.losses.Objective 'temprature'; nearest: temperature")


# ---- mistakes

MISTAKES = [
    (["student=resnt8"], "student: unknown option 'resnt8'; nearest: resnet8"),
    (["teacher=resnet21"], "teacher: unknown option 'resnet21'; nearest: resnet"),
    (["experiment=kd_resnt"], "experiment: unknown option 'kd_resnt'; nearest: kd_resnet"),
    (["loss=[hinton,fitnet]"], "loss: unknown option 'fitnet'; nearest: fitnets"),
    (["optimizer@teacher.optimizer=adm"], "optimizer: unknown option 'adm'; nearest: adam"),
    (["temperature=3"], "temperature: unknown option '3'; accepted: "),
    (["studnt=resnet8"], "studnt: unknown key or group 'studnt'; nearest: student"),
    (["sede=1"], "sede: unknown key or group 'sede'; nearest: seed"),
    (["student.widht=3"], "student.widht: unknown key 'widht'; nearest: width; accepted: "),
    (["loss.temprature=3"], "loss.temprature: unknown key 'temprature'; nearest: temperature; accepted: "),
    (["loss.terms.kl.wieght=2"], "loss.terms.kl.wieght: unknown key 'wieght'; nearest: weight"),
    (
        ["+loss.terms.kl.wieght=2"],
        "loss.terms.kl.wieght: unknown key of kdlab.losses.KL 'wieght'; nearest: weight",
    ),
    (["optimizer.dampening=0"], "optimizer.dampening: unknown key 'dampening'; accepted: "),
    (["teacher=none", "teacher.epochs=3"], "teacher.epochs: "),
    (["loss=dkd", "loss.alpha=0.5"], "loss.alpha: the recipes chosen by loss= have no alpha; accepted: "),
    (["loss=[hinton,hinton]"], "loss: 'hinton' is chosen twice; accepted: each recipe once"),
    (["epochs=many"], "epochs: 'many'; accepted: an integer"),
    (["loss.alpha=much"], "loss.alpha: 'much'; accepted: a number"),
    (["init=fersh"], "init: 'fersh'; nearest: fresh; accepted: fresh, previous"),
    (["loss.temperature={start:8,ed:1}"], "loss.temperature.ed: unknown key of "),
    (
        ["teacher.data.labls=5"],
        "teacher.data.labls: unknown key of kdlab.data.digits 'labls'; nearest: labels",
    ),
    (["student._target_=torch.load"], "student._target_: 'torch.load' may not be built here; accepted: "),
    (["student._target_=kdlab.models.CifarResnet"], "student._target_: no class or function"),
    (["student.width=???"], "student.width: "),
    (["student.width=${nothing}"], "student.width: Interpolation key 'nothing' not found"),
    (["+seed=3"], "seed: exists already; accepted: seed=value, without the +"),
    (["~student"], "student: missing; accepted: student=OPTION"),
    (["~nothing"], "Could not delete"),
    (["loss.temperature=1,2"], "loss.temperature: '1,2' is several values; accepted: one value, a list"),
    (["student=resnet8,resnet14"], "student: 'resnet8,resnet14' is several values"),
    (["loss.alpha=[1"], "'loss.alpha=[1': cannot be read"),
    (["seed=1", "oops"], "'oops': not an override; accepted: "),
    (["stages.a=3"], "stages.a: 3; accepted: a list of overrides"),
    (["stages.a=[loss.alpha]"], "stages.a: 'loss.alpha': cannot be read"),
    (["stages.a=['loss.alhpa=1']"], "stages.a: loss.alhpa: unknown key 'alhpa'; nearest: alpha"),
    (["stages.a=['student=resnt8']"], "stages.a: student: unknown option 'resnt8'"),
    (["stages.a=['loss.alpha=x']"], "stages.a: loss.alpha: 'x'; accepted: a number"),
    (["seed=1", "--nonsense"], "unrecognized arguments: --nonsense"),
    (["--config-dir", "nowhere", "seed=1"], "--config-dir: no folder 'nowhere'"),
    (["hydra/launcher=foo"], "hydra/launcher: unknown launcher option 'foo'; accepted: basic"),
    (["hydra.foo=1"], "hydra.foo: not a setting of Hydra's"),
    (["chekc", "seed=1"], "kdlab: unknown verb 'chekc'; nearest: check"),
    (["list", "losss"], "list: unknown group 'losss'; nearest: loss"),
    (["check", "student=resnt8"], "student: unknown option 'resnt8'; nearest: resnet8"),
    (["predict", "nowhere", "nothing"], "predict: no such file or folder 'nowhere'"),
    (["predict"], "the following arguments are required"),
    (["-m", "loss.temperature=1,2", "student=resnet8,resnt14"], "student: unknown option 'resnt14'"),
    (["-m", "loss.temperature=1,cold"], "loss.temperature: 'cold'; accepted: a number"),
    (
        ["-m", "seed=range(0,3)", "loss.alpha=0.5,{start:1,end:0,shape:cosin}"],
        "loss.alpha.shape: 'cosin'; nearest",
    ),
    (["-m", "loss.alpha=interval(0,1)"], "loss.alpha: 'interval(0,1)'; accepted: choices a,b"),
    (["-m", "hydra/sweeper=optuna", "loss.alpha=interval(1,0)"], "loss.alpha: interval(1,0); accepted"),
    (
        ["-m", "hydra/sweeper=optuna", "student.width=interval(2,8)"],
        "student.width: 4.292; accepted: an integer",
    ),
    (["trainer.strategy=ddp"], "trainer.strategy: unknown key 'strategy'"),
    (["teacher=null"], "teacher: unknown option 'null'; accepted: distilgpt2_cut"),
    (["=3"], "'=3': no key before the '='"),
    (["optimizer.lr=nan"], "optimizer.lr: NaN; accepted: a finite number"),
    (["epochs=1e40"], "epochs: 1e+40; accepted: an integer"),
    (["-m", "--cfg", "job", "seed=0,1"], "--cfg shows one point of a sweep; accepted: one value a key"),
    (["-m", "resume=X", "seed=0,1"], "resume: a sweep goes on by itself; accepted: leave it out"),
    (
        ["-m", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=0", "seed=0,1"],
        "hydra.sweeper.n_trials: 0; accepted: an integer of at least 1",
    ),
    (["check"], "the following arguments are required: OVERRIDE"),
    (["predict", "--top", "0", "run", "x.png"], "predict: --top 0; accepted: at least 1"),
    (["list", "data", "extra", "words"], "list: 'extra' is one word too many"),
]


@pytest.mark.parametrize(("words", "start"), MISTAKES, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_mistakes(capsys, workplace, calls, words, start):
    assert mistake(capsys, workplace, *words).startswith(start)
    assert not calls


def test_an_experiment_without_its_package_line(capsys, workplace):
    path = workplace / "conf" / "experiment" / "nopkg.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("# mine\ndefaults: [kd_resnet, _self_]\nname: mine\n")
    said = mistake(capsys, workplace, "experiment=nopkg")
    assert said == f"experiment: {path} does not start with '# @package _global_'"


def test_odd_files_among_the_options_break_nothing(capsys, workplace):
    (workplace / "conf" / "model" / "folder.yaml").mkdir(parents=True)
    (workplace / "conf" / "model" / "odd.yaml").write_bytes(b"# \xff\xfe\n")
    assert main(["list", "student"]) == 0
    text = capsys.readouterr().out
    assert "odd" in text and "\n  folder" not in text and "resnet8" in text


def test_two_recipes_for_one_term(capsys, workplace):
    folder = workplace / "conf" / "loss"
    folder.mkdir(parents=True)
    (folder / "sharp.yaml").write_text(
        "# @package loss\n# another kl\nterms:\n  kl:\n    _target_: kdlab.losses.KL\n    temperature: 1.0\n"
    )
    said = mistake(capsys, workplace, "loss=[hinton,sharp]")
    assert said == "loss: 'hinton' and 'sharp' both fill loss.terms.kl; accepted: one of them"


def test_a_logger_that_is_not_installed(capsys, workplace, monkeypatch):
    from kdlab.runs import loggers

    monkeypatch.setitem(loggers.NEEDS, "wandb", "no_such_package_here")
    assert "needs a package that is not installed (pip install no_such_package_here)" in mistake(
        capsys, workplace, "logger=wandb"
    )


def test_what_a_constructor_refuses_stops_a_sweep_before_it_begins(capsys, workplace, monkeypatch, calls):
    def preflight(config, deep=False):
        raise UserError(f"loss.alpha: {config['loss']['alpha']}; accepted: between 0 and 1")

    monkeypatch.setitem(vars(kdlab.experiment), "preflight", preflight)
    assert mistake(capsys, workplace, "-m", "loss.alpha=2,3") == "loss.alpha: 2; accepted: between 0 and 1"
    assert not calls


# ---- a single run


def test_run_gets_a_plain_config_its_overrides_stages_and_choices(workplace, calls, capsys):
    words = ["experiment=kd_two_stage", "teacher.data.labels=100", "hydra.verbose=false"]
    assert main(words) == 0
    ((config, more),) = calls
    assert json.loads(json.dumps(config)) == config and config["name"] == "kd_two_stage"
    assert more["folder"] is None
    assert more["overrides"] == ["experiment=kd_two_stage", "teacher.data.labels=100"]
    assert [stage["loss"]["alpha"] for stage in more["stages"].values()] == [1, 0]
    assert list(more["stages"]) == ["soft", "labels"]
    assert more["choices"]["student"] == "resnet8_w4" and more["choices"]["loss"] == "hinton"
    assert more["choices"]["experiment"] == "kd_two_stage"
    assert not list(workplace.iterdir()), "hydra left something behind"
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err == ""


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("data.root: none"), 2, "kdlab: error: data.root: none"),
        (RunFailed("loss is not finite at step 3: kl; resume=auto"), 1, "kdlab: error: loss is not finite"),
        (ZeroDivisionError("division by zero"), 1, "kdlab: error: ZeroDivisionError: division by zero"),
        (KeyboardInterrupt(), 130, "kdlab: interrupted"),
        (Terminated(), 143, "kdlab: terminated; the same command with resume=auto goes on"),
        (SystemExit(0), 1, "kdlab: error: SystemExit(0): code that the run uses asked to end the process"),
        (SystemExit(143), 1, "kdlab: error: SystemExit(143): code that the run uses asked"),
    ],
)
def test_exit_statuses(monkeypatch, calls, capsys, error, status, line):
    def run(config, **more):
        raise error

    monkeypatch.setitem(vars(kdlab.experiment), "run", run)
    assert main(["experiment=kd_resnet"]) == status
    said = capsys.readouterr().err
    assert said.startswith(line) and said.count("\n") == 1


# ---- verbs


def test_check_prints_each_finding(monkeypatch, calls, capsys):
    class Finding:
        def __init__(self, name, ok, text):
            self.name, self.ok, self.text = name, ok, text

    found = [Finding("data", True, "1200 rows"), Finding("teacher", False, "teacher: worse than chance")]
    monkeypatch.setitem(vars(kdlab.experiment), "preflight", lambda config, deep=False: found if deep else [])
    assert main(["check", "experiment=kd_resnet"]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:3] == ["ok    data: 1200 rows", "FAIL  teacher: worse than chance"]
    assert lines[-1] == "1 problem(s)"
    found.pop()
    assert main(["check", "-m", "experiment=kd_resnet", "seed=0,1,2", "loss.alpha=0.1,0.9"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("ok    config: 6 job(s)") and lines[-1] == "ready"
    assert sum(line == "ok    data: 1200 rows" for line in lines) == 2, "seeds do not need checks of their own"
    assert not calls


def test_check_knows_how_long_runs_took(calls, capsys, workplace):
    folder = workplace / "outputs" / "kd_resnet" / "run"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(
        json.dumps({"status": "finished", "config_hash": "", "models": {}, "seconds": {"total": 20.0}})
    )
    assert main(["check", "-m", "experiment=kd_resnet", "seed=0,1,2"]) == 0
    assert "time  about 60 s for 3 job(s): 1 before took 20 s each" in capsys.readouterr().out


def test_doctor_finds_a_package_that_does_not_fit(monkeypatch, capsys, workplace):
    (workplace / "torchvision").mkdir()
    (workplace / "torchvision" / "__init__.py").write_text("raise RuntimeError('operator nms does not exist')\n")
    monkeypatch.setenv("PYTHONPATH", str(workplace))
    monkeypatch.setattr(doctor, "_ASK_TORCH", 'print(\'{"threads": 2, "built_for": null, "mps": false, "gpus": []}\')')
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "FAIL  torchvision" in text and "operator nms does not exist" in text and "pip uninstall" in text
    assert text.rstrip().endswith("1 broken")


def test_doctor_reads_the_processor(tmp_path):
    info = tmp_path / "cpuinfo"
    info.write_text("processor : 0\nflags\t\t: fpu avx2 avx512f avx512_bf16 amx_bf16\n")
    assert doctor.cpu_features(info) == ["AMX-BF16", "AVX512-BF16", "AVX512", "AVX2"]
    assert doctor.cpu_features(tmp_path / "none") == []
