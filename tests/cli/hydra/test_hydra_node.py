"""Hydra's own flags and settings: each is honoured, or refused with the way, and no stray folder is ever made."""

import _thread
import contextlib
import json
import os
import signal
import sys
from pathlib import Path

import pytest

import kdlab.experiment
from helpers.tiny import MLP, QUIET, mistake, result
from kdlab.cli.hydra import hydra_node
from kdlab.cli.main import main
from kdlab.errors import UserError
from kdlab.runs import chosen_folder
from kdlab.runs import folder as folders


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def calls(monkeypatch):
    """Experiments that are recorded instead of run."""
    made = []
    monkeypatch.setitem(vars(kdlab.experiment), "preflight", lambda config, deep=False: [])
    monkeypatch.setitem(vars(kdlab.experiment), "run", lambda config, **more: made.append((config, more)) or {})
    return made


REFUSED = [
    (["hydra.job.chdir=true"], "hydra.job.chdir: true; accepted: false: "),
    (["hydra.verbose=true"], "hydra.verbose: true; accepted: false: "),
    (["hydra.verbose=[hydra]"], 'hydra.verbose: ["hydra"]; accepted: false: '),
    (["hydra.output_subdir=.hydra"], 'hydra.output_subdir: ".hydra"; accepted: null: '),
    (["hydra.searchpath=[file:///etc]"], 'hydra.searchpath: ["file:///etc"]; accepted: --config-dir DIR'),
    (["hydra.job.name=mine"], "hydra.job.name: mine, and no folder of Hydra's says ${hydra.job.name}; accepted: name="),
    (["hydra.job.num=3"], "hydra.job.num: Hydra sets it; accepted: leave it out"),
    (["hydra.runtime.cwd=x"], "hydra.runtime.cwd: Hydra sets it; accepted: leave it out"),
    (["hydra.help.header=x"], "hydra.help.header: has no use here; accepted: leave it out"),
    (["hydra.mode=TWICE"], "hydra.mode: TWICE; Invalid value 'TWICE', expected one of [RUN, MULTIRUN]"),
    (["+hydra.foo=1"], "hydra.foo: not a setting of Hydra's; accepted: those of --cfg hydra"),
    (["hydra/job_logging=default"], "hydra/job_logging: default; accepted: none: kdlab writes its own log"),
    (["hydra/hydra_logging=default"], "hydra/hydra_logging: default; accepted: none: kdlab writes its own log"),
    (["hydra.job_logging.root.level=DEBUG"], "hydra.job_logging: has no use here; accepted: leave it out"),
    (["hydra.job.env_copy=[NO_SUCH]"], "hydra.job.env_copy: NO_SUCH is not in the environment"),
    (["hydra.run.dir="], "hydra.run.dir: ''; accepted: a folder"),
    (["hydra.run.dir=null"], "hydra.run.dir: null; accepted: a value"),
    (["hydra.run.dir=${no_such}"], "hydra.run.dir: ${no_such}: cannot be resolved (Interpolation key 'no_such' not"),
    (["hydra.sweep.dir=x"], "hydra.sweep.dir: and this is one run; accepted: hydra.run.dir=DIR, or -m"),
    (["hydra.sweep.subdir=x"], "hydra.sweep.subdir: x; accepted: leave it out: a job's folder is named by"),
    (["-m", "seed=0,1", "hydra.run.dir=x"], "hydra.run.dir: and this is a sweep; accepted: hydra.sweep.dir=DIR"),
    (["-m", "seed=0,1", "hydra.sweep.subdir=x"], "hydra.sweep.subdir: x; accepted: leave it out"),
    (["-m", "seed=0,1", "hydra.sweep.dir=x/${seed}"], "hydra.sweep.dir: x/0 and x/1; accepted: one folder for all"),
    (["-cp", "conf"], "--config-path: not a flag of kdlab's; accepted: --config-dir DIR"),
    (["--config-name=x"], "--config-name: not a flag of kdlab's; accepted: a file ./conf/experiment/NAME.yaml"),
    (["--experimental-rerun", "x"], "--experimental-rerun: not a flag of kdlab's; accepted: the same command with"),
    (["--resolve"], "--resolve: says how --cfg prints, and there is none; accepted: with --cfg job"),
    (["-p", "loss"], "--package: says how --cfg prints, and there is none; accepted: with --cfg job"),
    (["-r", "-m"], "--run and --multirun; accepted: one of them"),
    (["-r", "hydra.mode=MULTIRUN"], "--run: and hydra.mode is MULTIRUN; accepted: one of them"),
    (["-r", "-c", "job"], "--run and --cfg; accepted: one of them"),
    (["-i", "seed=3"], "--info: 'seed=3'; accepted: all, config, defaults"),
    (["stages={a: [hydra.run.dir=x]}"], "stages.a: hydra.run.dir: a setting of Hydra's; accepted here: keys of"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "start"), REFUSED, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_settings_that_would_do_nothing_are_refused(capsys, workplace, calls, words, start):
    said = mistake(capsys, ["experiment=kd_mlp", *words])
    assert said.startswith(start), said
    assert not calls and not list(workplace.iterdir())


@pytest.mark.parametrize(
    "words",
    [
        ["hydra.job.chdir=false"],
        ["hydra.output_subdir=null"],
        ["hydra/job_logging=disabled", "hydra/hydra_logging=none"],
        ["hydra.searchpath=[]"],
        ["hydra.mode=RUN", "-r"],
    ],
)
def test_settings_that_ask_for_what_is_done_anyway_are_fine(workplace, calls, words):
    assert main(["experiment=kd_mlp", *words]) == 0
    assert len(calls) == 1 and not list(workplace.iterdir())


def test_help_of_hydras_settings_names_each(capsys):
    assert main(["experiment=kd_mlp", "--hydra-help"]) == 0
    text = capsys.readouterr().out
    for name in ("-cp", "hydra.run.dir", "hydra.sweep.subdir", "hydra.job.chdir"):
        assert name in text
    for one in hydra_node.REFUSED:
        assert one.key in text
    assert max(map(len, text.splitlines())) <= 120


def test_version_is_found_anywhere(capsys, workplace):
    assert main(["experiment=kd_mlp", "--version"]) == 0
    assert capsys.readouterr().out.strip() == f"kdlab {kdlab.__version__}"


# ---- the folder of a run


def test_the_folder_of_a_run_resolves_as_hydra_does_it(workplace, calls):
    folder = "a/${hydra.job.name}/${name}_${seed}/${hydra:runtime.choices.experiment}/${hydra.job.override_dirname}"
    words = ["hydra.job.config.override_dirname.exclude_keys=[experiment]", "seed=3", "epochs=2"]
    assert main(["experiment=kd_mlp", f"hydra.run.dir={folder}", *words]) == 0
    ((_, more),) = calls
    assert more["chosen"] == Path("a/kd_mlp/kd_mlp_3/kd_mlp/epochs=2,seed=3") and more["folder"] is None
    assert not list(workplace.iterdir()), "only the run itself makes its folder"
    assert main(["experiment=kd_mlp", "hydra.run.dir=${now:%Y}/${hydra.job.name}", "hydra.job.name=j"]) == 0
    assert calls[-1][1]["chosen"].name == "j" and calls[-1][1]["chosen"].parent.name.isdigit()


def test_folders_of_a_users_own_file(workplace, calls, capsys):
    (workplace / "conf" / "experiment").mkdir(parents=True)
    file = workplace / "conf" / "experiment" / "mine.yaml"
    text = (
        "# @package _global_\n# mine\ndefaults: [kd_mlp, _self_]\nname: mine\nhydra:\n"
        "  run: {dir: 'logs/${name}/one'}\n  sweep: {dir: 'logs/${name}/many', subdir: '${hydra.job.num}'}\n"
        "  job: {env_set: {MINE_TOO: '${seed}'}}\n"
    )
    file.write_text(text)
    assert main(["experiment=mine"]) == 0
    assert calls[-1][1]["chosen"] == Path("logs/mine/one")
    assert main(["-m", "experiment=mine", "seed=0,1"]) == 1  # the recorded runs leave no result
    assert {more["folder"].parent for _, more in calls[1:]} == {Path("logs/mine/many")}
    file.write_text(text.replace("job: {", "job: {chdir: true, "))
    assert mistake(capsys, ["experiment=mine"]).startswith("hydra.job.chdir: true; accepted: false")
    file.write_text(text + "  mode: MULTIRUN\n  sweeper: {params: {seed: '5,6,7'}}\n  output_subdir: null\n")
    capsys.readouterr()
    assert main(["experiment=mine", "hydra.sweep.dir=other"]) == 1
    assert "sweep of 3 jobs in other" in capsys.readouterr().out


def test_environment_of_a_run(workplace, calls, monkeypatch):
    seen = []
    look = lambda config, **more: seen.append(os.environ.get("OF_A_TEST")) or {}  # noqa: E731
    monkeypatch.setitem(vars(kdlab.experiment), "run", look)
    assert main(["experiment=kd_mlp", "+hydra.job.env_set.OF_A_TEST='a \"${name}\"'"]) == 0
    assert seen == ['a "kd_mlp"'] and "OF_A_TEST" not in os.environ


def test_a_run_in_a_chosen_folder(capsys, place, tmp_path):
    run, output = tmp_path / "here" / "run", tmp_path / "out"
    words = [*QUIET, *MLP, "epochs=1", "baseline=false", f"output={output}", f"hydra.run.dir={run}"]
    assert main(words) == 0
    assert result(run)["status"] == "finished" and [p.name for p in (tmp_path / "here").iterdir()] == ["run"]
    assert {p.name for p in output.iterdir()} <= {"teachers", "cache"}
    before = (run / "result.json").read_bytes()
    assert main(words) == 0 and main([*words, "resume=auto"]) == 0  # shown, not run again
    assert (run / "result.json").read_bytes() == before
    assert mistake(capsys, [*words, "seed=4"]) == (
        f"hydra.run.dir: {run} has another configuration: seed is 0 there and 4 here; accepted: another folder"
    )
    (run / "result.json").unlink()
    assert "holds an unfinished run of this configuration; accepted: resume=auto" in mistake(capsys, words)
    assert main([*words, "resume=auto"]) == 0
    assert result(run)["models"]["student"]["test"] == json.loads(before)["models"]["student"]["test"]
    assert "hydra.run.dir: " in mistake(capsys, [*words, f"resume={tmp_path}"])


def test_what_a_chosen_folder_may_hold(tmp_path):
    config = {"name": "x", "output": str(tmp_path / "out"), "resume": None, "seed": 0}
    folder = tmp_path / "run"
    assert chosen_folder.check(folder, config) == ""
    folder.mkdir()
    (folder / ".lock").touch()  # of one that ended at once
    assert chosen_folder.check(folder, config) == ""
    (folder / "notes.txt").touch()
    with pytest.raises(UserError, match=r"run holds other files \(notes.txt\); accepted: a new folder"):
        chosen_folder.check(folder, config)
    with pytest.raises(UserError, match="is a file"):
        chosen_folder.check(folder / "notes.txt", config)
    with pytest.raises(UserError, match="is output, where teachers and caches lie"):
        chosen_folder.check(tmp_path / "out", config)
    (folder / "notes.txt").unlink()
    with chosen_folder.still_free(folder, config):
        folders.write_config(folder, {**config, "seed": 1}, [])
    with pytest.raises(UserError, match="another configuration: seed is 1"), chosen_folder.still_free(folder, config):
        raise AssertionError("not reached")


# ---- the folder of a sweep


def test_a_sweep_in_a_chosen_folder(capsys, workplace, calls):
    words = ["experiment=kd_mlp", "hydra.sweep.dir=mine/sweep"]
    assert main([*words, "hydra.mode=MULTIRUN", "seed=0,1"]) == 1
    assert {more["folder"].parent for _, more in calls} == {Path("mine/sweep")} and len(calls) == 2
    assert {p.name for p in workplace.iterdir()} == {"mine"}
    assert (workplace / "mine" / "sweep" / "sweep.yaml").is_file()
    capsys.readouterr()
    assert main(["-m", *reversed(words), "seed=0,1"]) == 1 and len(calls) == 4, "the same sweep goes on"
    said = mistake(capsys, ["-m", *words, "seed=0,1,2"])
    assert said.startswith("hydra.sweep.dir: mine/sweep holds another sweep (experiment=kd_mlp seed=0,1); accepted")
    said = mistake(capsys, ["-m", "experiment=kd_mlp", "hydra.sweep.dir=mine", "seed=0,1"])
    assert said.startswith("hydra.sweep.dir: mine holds other files (sweep); accepted: a new folder")


# ---- Ctrl-C


def test_ctrl_c_while_arguments_are_parsed(monkeypatch, capsys):
    """The parser's own clearing up raises something else then."""

    def parse(self, *args, **more):
        try:
            raise KeyboardInterrupt
        finally:
            object().save_nargs  # noqa: B018

    monkeypatch.setattr("argparse.ArgumentParser.parse_intermixed_args", parse)
    assert main(["experiment=kd_mlp"]) == 130
    assert capsys.readouterr().err.startswith("kdlab: interrupted; ")


def test_ctrl_c_that_an_import_swallowed(monkeypatch, capsys):
    def dispatch(argv):
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        raise ImportError("numpy could not be imported")

    monkeypatch.setattr("kdlab.cli.main._dispatch", dispatch)
    assert main([]) == 130
    assert capsys.readouterr().err.startswith("kdlab: interrupted; ")
    monkeypatch.setattr("kdlab.cli.main._dispatch", lambda argv: 1 / 0)  # nobody pressed anything
    assert main([]) == 1


def test_ctrl_c_that_python_dropped_is_raised_again(monkeypatch):
    again = []
    monkeypatch.setattr(_thread, "interrupt_main", lambda: again.append(1))

    class Dropping:
        def __del__(self):
            raise KeyboardInterrupt

    def dispatch(argv):
        found = Dropping()
        del found
        for _ in range(100):
            if again:
                return 0
            signal.sigtimedwait([], 0.01)
        return 3

    monkeypatch.setattr("kdlab.cli.main._dispatch", dispatch)
    before = sys.unraisablehook
    assert main([]) == 0
    assert sys.unraisablehook is before
