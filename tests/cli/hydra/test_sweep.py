"""Sweeps: one folder found again, what is done skipped, failures recorded, a table at the end; searches too.

The experiment is a stand-in that scores a config by arithmetic, so these tests are about the sweep alone.
"""

import json
import os
from pathlib import Path

import pytest
import yaml

import kdlab.experiment
from helpers.standing_in import ran, the_sweep
from kdlab.cli.hydra.sweep import duration, job_folder, sweep_folder
from kdlab.cli.main import main
from kdlab.config import builder

pytestmark = pytest.mark.usefixtures("workplace")

GRID = ["-m", "experiment=kd_resnet", "loss.temperature=1,2,4", "loss.alpha=0.1,0.5"]


def test_a_grid_runs_every_combination_and_ends_with_a_ranked_table(workplace, capsys):
    assert main(GRID) == 0
    folder = the_sweep(workplace)
    jobs = sorted(path.name for path in folder.iterdir() if path.is_dir())
    assert len(jobs) == 6 and len(ran(workplace)) == 6
    assert jobs[0].startswith("loss.alpha=0.1,loss.temperature=1-") and len(jobs[0].rpartition("-")[2]) == 6
    record = yaml.safe_load((folder / "sweep.yaml").read_text())
    assert record["overrides"] == GRID[1:] and sorted(record["jobs"]) == jobs
    assert {path.name for path in folder.iterdir()} == {*jobs, "sweep.yaml"}, "hydra left something behind"
    text = capsys.readouterr().out
    assert "[1/6] loss.temperature=1 loss.alpha=0.1\n" in text
    assert "[2/6] loss.temperature=1 loss.alpha=0.5 (about 2 min left)" in text
    table = text[text.index("[6/6]") :]
    best, worst = table.index("88.00"), table.index("82.00")  # test accuracies at (4, 0.5) and (1, 0.1)
    assert best < worst or "89.00" in table
    assert "python -m kdlab compare" in table and str(folder.relative_to(workplace)) in text


def test_the_same_sweep_again_skips_what_is_done(workplace, capsys):
    assert main(["-m", "experiment=kd_resnet", "loss.temperature=1,2", "loss.alpha=0.1"]) == 0
    assert main(["-m", "loss.alpha=0.1", "experiment=kd_resnet", "loss.temperature=1,2"]) == 0
    assert len(ran(workplace)) == 2 and "done already" in capsys.readouterr().out
    assert main(["-m", "experiment=kd_resnet", "loss.temperature=1,2", "loss.alpha=0.1", "seed=1"]) == 0
    assert len(ran(workplace)) == 4, "another sweep"


def test_an_interrupted_sweep_goes_on_in_the_same_folders(workplace, capsys):
    words = ["-m", "experiment=kd_resnet", "loss.temperature=1,66,2"]
    assert main(words) == 130
    first = ran(workplace)
    assert [call["overrides"][-1] for call in first] == ["loss.temperature=1", "loss.temperature=66"]
    assert main(words) == 130
    again = ran(workplace)[2:]
    assert [call["folder"] for call in again] == [first[1]["folder"]], "the unfinished job gets its folder back"


def test_a_failing_job_is_recorded_and_the_rest_go_on(workplace, capsys):
    words = ["-m", "experiment=kd_resnet", "loss.temperature=13,1,2"]
    assert main(words) == 1
    results = [json.loads(p.read_text()) for p in the_sweep(workplace).glob("*/result.json")]
    assert sorted(r["status"] for r in results) == ["failed", "finished", "finished"]
    (failed,) = (r for r in results if r["status"] == "failed")
    assert failed["error"] == "loss is not finite at step 3: kl" and failed["settings"]["loss.temperature"] == 13
    shown = capsys.readouterr()
    assert "[1/3] loss.temperature=13 failed: RunFailed: loss is not finite" in shown.out
    assert "1 of 3 jobs did not finish" in shown.err and shown.err.count("\n") == 1
    (workplace / "mended").touch()
    assert main(words) == 0
    assert len(ran(workplace)) == 4, "only the failed one ran again"


def test_a_job_that_runs_elsewhere_is_no_failure(workplace, monkeypatch, capsys):
    from kdlab.errors import Busy

    def run(config, *, folder=None, **more):
        raise Busy(f"resume: {folder} is in use by another process")

    monkeypatch.setitem(vars(kdlab.experiment), "run", run)
    assert main(["-m", "experiment=kd_resnet", "seed=0,1"]) == 1
    assert capsys.readouterr().out.count("\n  running in another process; left to it\n") == 2
    assert not list(the_sweep(workplace).glob("*/result.json"))


def test_seeds_are_averaged(workplace, capsys):
    assert main(["-m", "experiment=kd_resnet", "loss.alpha=0.1,0.5", "seed=range(0,3)"]) == 0
    assert len(ran(workplace)) == 6
    text = capsys.readouterr().out
    assert "±" in text[text.index("[6/6]") :]


def test_mappings_options_and_teacher_data_can_be_swept(workplace):
    words = [
        "-m", "experiment=kd_resnet", "loss.temperature=2,{start:8,end:1,shape:cosine}",
        "teacher.data.labels=100,200",
    ]  # fmt: skip
    assert main(words) == 0
    calls = ran(workplace)
    assert len(calls) == 4 and len({call["folder"] for call in calls}) == 4
    assert all(Path(call["folder"]).name.isprintable() and "+" not in call["folder"] for call in calls)
    assert {o for c in calls for o in c["overrides"] if o.startswith("teacher")} == {
        "teacher.data.labels=100", "teacher.data.labels=200",
    }  # fmt: skip


def test_stages_are_composed_for_every_job(workplace):
    assert main(["-m", "experiment=kd_two_stage", "seed=0,1"]) == 0
    assert [call["stages"] for call in ran(workplace)] == [["soft", "labels"]] * 2


def test_a_file_may_hold_the_sweep(workplace):
    folder = workplace / "conf" / "experiment"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(
        "# @package _global_\n# a sweep in a file\ndefaults: [kd_resnet, _self_]\nname: mine\n"
        "hydra:\n  sweeper:\n    params:\n      loss.alpha: 0.1,0.9\n"
    )
    assert main(["-m", "experiment=mine", "seed=0,1"]) == 0
    assert len(ran(workplace)) == 4 and len(list(the_sweep(workplace, "mine").glob("*/result.json"))) == 4


def test_a_value_refused_in_one_point_stops_the_sweep_before_it_starts(workplace, monkeypatch, capsys):
    from kdlab.errors import UserError

    seen = []

    def preflight(config, deep=False):
        seen.append(config["loss"]["alpha"])
        if config["loss"]["alpha"] > 1:
            raise UserError(f"loss.alpha: {config['loss']['alpha']}; accepted: between 0 and 1")

    monkeypatch.setitem(vars(kdlab.experiment), "preflight", preflight)
    assert main(["-m", "experiment=kd_resnet", "loss.alpha=0.1,0.5,2", "seed=0,1"]) == 2
    assert seen == [0.1, 0.5, 2], "every distinct config once, whatever its seed"
    assert not ran(workplace) and not (workplace / "outputs").exists()


def test_globs_and_deletions_can_be_in_a_sweep(workplace):
    assert main(["-m", "experiment=kd_resnet", "student=glob(resnet8*,exclude=*x4)", "~logger"]) == 0
    calls = ran(workplace)
    assert {Path(c["folder"]).name.rpartition("-")[0] for c in calls} == {
        "student=resnet8",
        "student=resnet8_w4",
    }


def test_one_point_is_a_sweep_too(workplace):
    assert main(["-m", "experiment=kd_resnet"]) == 0
    assert len(ran(workplace)) == 1


# ---- in parallel


@pytest.mark.slow
def test_joblib_runs_jobs_in_processes_of_their_own(workplace, elsewhere):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    (workplace / "conf" / "model").mkdir(parents=True)
    (workplace / "conf" / "model" / "tiny.yaml").write_text("# mine\n_target_: own_parts_sweep.Tiny\nhidden: 8\n")
    (workplace / "own_parts_sweep.py").write_text(
        "from torch import nn\nclass Tiny(nn.Module):\n    def __init__(self, hidden: int): ...\n"
    )
    words = ["-m", "experiment=kd_two_stage", "student=tiny", "loss.temperature=1,13,2,4",
             "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]  # fmt: skip
    done = elsewhere(*words)
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("\n") == 1 and "1 of 4 jobs did not finish" in done.stderr, done.stderr
    calls = ran(workplace)
    assert len(calls) == 4 and len({call["pid"] for call in calls}) == 2
    assert all(call["stages"] == ["soft", "labels"] for call in calls)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert {call["threads"] for call in calls} == {str(max(1, cores // 2))}
    (workplace / "mended").touch()
    serial = [word for word in words if not word.startswith("hydra")]
    done = elsewhere(*serial)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert len(ran(workplace)) == 5, "a serial launcher goes on where the parallel one stopped"


# ---- searched

SEARCH = ["-m", "experiment=kd_resnet", "hydra/sweeper=optuna", "loss.temperature=interval(1,10)",
          "loss.alpha=interval(0,1)"]  # fmt: skip


def test_optuna_searches_and_goes_on(workplace, capsys):
    pytest.importorskip("optuna")
    assert main([*SEARCH, "hydra.sweeper.startup=4", "hydra.sweeper.n_trials=8"]) == 0
    folder = the_sweep(workplace)
    assert len(ran(workplace)) == 8 and (folder / "study.log").exists()
    record = yaml.safe_load((folder / "sweep.yaml").read_text())
    assert len(record["jobs"]) == 8 and record["overrides"] == [SEARCH[1], *SEARCH[3:]]
    assert "[8/8]" in capsys.readouterr().out
    assert main([*SEARCH, "hydra.sweeper.startup=4", "hydra.sweeper.n_trials=10"]) == 0
    calls = ran(workplace)
    assert len(calls) == 10 and len({call["folder"] for call in calls}) == 10, "two more, at new points"
    scores = [json.loads((Path(c["folder"]) / "result.json").read_text())["objective"] for c in calls]
    assert max(scores) > 0.85


@pytest.mark.slow
def test_a_search_in_parallel(workplace, elsewhere):
    pytest.importorskip("optuna")
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    parallel = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweeper.n_trials=4"]
    done = elsewhere(*SEARCH, *parallel)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "2 at a time" in done.stdout
    calls = ran(workplace)
    assert len(calls) == 4 and len({call["pid"] for call in calls}) == 2


def test_every_choice_of_a_search_is_checked_before(workplace, capsys):
    pytest.importorskip("optuna")
    words = ["-m", "experiment=kd_resnet", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=3"]
    assert main([*words, "loss=hinton,dkd", "loss.alpha=0.5"]) == 2, "each choice is checked before"
    assert "loss.alpha" in capsys.readouterr().err and not (workplace / "outputs").exists()


def test_a_seeded_search_repeats(workplace):
    pytest.importorskip("optuna")
    points = []
    for output in ("a", "b"):
        assert main([*SEARCH, "hydra.sweeper.n_trials=3", f"output={output}"]) == 0
        points.append([call["overrides"][-2:] for call in ran(workplace)[-3:]])
    assert points[0] == points[1]


def test_a_failing_trial_is_told_and_the_search_goes_on(workplace, capsys):
    optuna = pytest.importorskip("optuna")
    words = [
        "-m",
        "experiment=kd_resnet",
        "hydra/sweeper=optuna",
        "loss.temperature=13,4",
        "hydra.sweeper.n_trials=6",
    ]
    assert main(words) == 1
    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(the_sweep(workplace) / "study.log"))
    )
    said = capsys.readouterr().err
    assert said.endswith("1 of 2 jobs failed; more trials: hydra.sweeper.n_trials=7\n"), said
    states = [trial.state.name for trial in optuna.load_study(study_name="kdlab", storage=storage).trials]
    assert len(states) == 6 and {"FAIL", "COMPLETE"} == set(states)


def test_an_interrupted_search_runs_its_last_point_again(workplace):
    pytest.importorskip("optuna")
    words = ["-m", "experiment=kd_resnet", "hydra/sweeper=optuna", "loss.temperature=66",
             "seed=int(interval(0,50))", "hydra.sweeper.n_trials=2"]  # fmt: skip
    assert main(words) == 130
    assert main(words) == 130
    first, second = ran(workplace)
    assert first["folder"] == second["folder"]


def test_what_is_drawn_from():
    optuna = pytest.importorskip("optuna")
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from kdlab.cli.hydra.optuna_sweeper import distribution
    from kdlab.errors import UserError

    def drawn(text):
        return distribution(OverridesParser.create().parse_override(text))

    kinds = optuna.distributions
    assert drawn("a=interval(1,10)") == kinds.FloatDistribution(1, 10)
    assert drawn("a=tag(log,interval(0.001,0.1))") == kinds.FloatDistribution(0.001, 0.1, log=True)
    assert drawn("a=int(interval(1,10))") == kinds.IntDistribution(1, 10)
    assert drawn("a=range(2,9,3)") == kinds.IntDistribution(2, 8, step=3)
    assert drawn("a=x,3,true,{b:1}") == kinds.CategoricalDistribution(["x", 3, True, "{b:1}"])
    with pytest.raises(UserError, match=r"a: interval\(0,1\); accepted: .* low above 0"):
        drawn("a=tag(log,interval(0,1))")


# ---- names


def test_sweep_folders_are_found_again():
    config = {"name": "kd", "output": "outputs"}
    one = sweep_folder(config, ["experiment=kd", "seed=0,1", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"])
    assert one == sweep_folder(config, ["seed=0,1", "experiment=kd", "resume=auto"])
    assert one != sweep_folder(config, ["seed=0,2", "experiment=kd"])
    assert one != sweep_folder(config, ["experiment=kd", "seed=0,1"], searched=True)
    assert one.parent == Path("outputs/kd") and len(one.name) == len("sweep-") + 8


def test_job_folders_are_short_safe_and_distinct():
    config = {"seed": 0, "loss": {"temperature": {"start": 8, "end": 1}}}
    texts = [
        "experiment=kd",
        "loss.temperature={start:8,end:1}",
        "++teacher.data.labels=100",
        "data.root=/x/y z",
    ]
    swept = ["loss.temperature", "teacher.data.labels", "data.root"]
    name = job_folder(Path("s"), texts, swept, config).name
    assert (
        name
        == "data.root=_x_y_z,loss.temperature=_start_8,end_1_,teacher.data.labels=100-"
        + builder.config_hash(config)[:6]
    )
    long = job_folder(Path("s"), ["loss=[" + "a" * 300 + "]"], ["loss"], config).name
    assert len(long) < 110
    assert job_folder(Path("s"), texts, swept, {**config, "seed": 1}).name != name


def test_durations():
    assert [duration(s) for s in (4, 89, 600, 7200)] == ["4 s", "89 s", "10 min", "2.0 h"]
