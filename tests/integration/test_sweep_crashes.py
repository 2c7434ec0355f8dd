"""Jobs that take their process down: they have failed, the others finish, and nothing is left behind.

The experiments are a stand-in; the processes are real.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from helpers.paths import ROOT
from helpers.standing_in import ran, the_sweep
from helpers.tiny import mistake
from kdlab.cli.main import main

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="jobs run in the main process")


HOW = {
    77: "its process ended by itself with status 7",
    78: "its process ended by itself with status 0",
    79: "its process was killed by SIGSEGV (a fault in compiled code)",
    80: "its process was killed by SIGKILL (out of memory?)",
}
"""Temperature at which the stand-in crashes → what is said of it."""

PARALLEL = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")


def results(workplace):
    """Temperature → result of every job that has one."""
    found = [json.loads(path.read_text()) for path in the_sweep(workplace).glob("*/result.json")]
    return {result["settings"]["loss.temperature"]: result for result in found}


def sweep(*temperatures):
    return ["-m", "experiment=kd_resnet", "loss.temperature=" + ",".join(map(str, temperatures))]


@pytest.mark.parametrize("launcher", [(), pytest.param(PARALLEL, marks=pytest.mark.slow)], ids=["serial", "joblib"])
def test_a_crash_of_any_kind_is_one_failure(workplace, elsewhere, launcher):
    done = elsewhere(*sweep(77, 1, 78, 2, 79, 3, 80), *launcher)
    assert done.returncode == 1
    assert done.stderr == "kdlab: error: 4 of 7 jobs did not finish; the same command runs them\n"
    found = results(workplace)
    assert {kind: found[kind]["error"] for kind in HOW} == HOW
    assert all(found[t]["status"] == "finished" for t in (1, 2, 3))
    table = done.stdout[done.stdout.index("failed:\n") :]
    for said in HOW.values():
        assert f"failed: {said}\n" in done.stdout and f": {said}\n" in table
    pids = [call["pid"] for call in ran(workplace)]
    assert len(set(pids)) <= 5 + len(launcher) // 2, "a worker runs more than one job"


@pytest.mark.slow
def test_what_failed_runs_last_the_next_time(workplace, elsewhere):
    assert elsewhere(*sweep(77, 1)).returncode == 1
    record = the_sweep(workplace)
    (done,) = [path for path in record.glob("*/result.json") if "77" not in path.parent.name]
    done.unlink()
    before = len(ran(workplace))
    assert elsewhere(*sweep(77, 1)).returncode == 1
    assert [call["overrides"][-1] for call in ran(workplace)[before:]] == ["loss.temperature=1", "loss.temperature=77"]


@pytest.mark.slow
def test_a_job_killed_beside_others_runs_once_more_alone(workplace, elsewhere):
    done = elsewhere(*sweep(81, 82), *PARALLEL)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "loss.temperature=81 stopped: its process was killed by SIGKILL (out of memory?); it runs again, alone" in (
        done.stdout
    )
    assert [call["overrides"][-1] for call in ran(workplace)].count("loss.temperature=81") == 2


@pytest.mark.slow
def test_a_search_goes_on_after_a_crash(workplace, elsewhere):
    optuna = pytest.importorskip("optuna")
    words = ["-m", "experiment=kd_resnet", "hydra/sweeper=optuna", "loss.temperature=77,4", "seed=int(interval(0,50))"]
    done = elsewhere(*words, "hydra.sweeper.n_trials=6", "hydra.sweeper.seed=1")
    assert done.returncode == 1 and "more trials: hydra.sweeper.n_trials=" in done.stderr, done.stderr
    backend = optuna.storages.journal.JournalFileBackend(str(the_sweep(workplace) / "study.log"))
    study = optuna.load_study(study_name="kdlab", storage=optuna.storages.JournalStorage(backend))
    assert {trial.params["loss.temperature"]: trial.state.name for trial in study.trials} == {77: "FAIL", 4: "COMPLETE"}
    assert len(study.trials) == 6 == len(list(the_sweep(workplace).glob("*/result.json")))


@pytest.mark.slow
def test_a_result_written_before_the_crash_counts(workplace, elsewhere):
    """A process that dies after its job is done, as in the teardown of a library, has not lost it."""
    with (workplace / "stand_in_for_runs.py").open("a") as file:
        file.write(
            "whole = run\n"
            "def run(config, **more):\n"
            "    whole(config, **more)\n"
            "    if config['loss']['temperature'] == 5: os._exit(3)\n"
        )
    done = elsewhere(*sweep(5, 1))
    assert done.returncode == 0 and done.stderr == "", done.stdout
    assert results(workplace)[5]["status"] == "finished"


def test_a_board_goes_on_after_a_crash(workplace, elsewhere):
    (workplace / "conf" / "leaderboard").mkdir(parents=True)
    (workplace / "conf" / "leaderboard" / "mine.yaml").write_text(
        "# a board\nreference: hinton\nrelative_to: hinton\nseeds: [0, 1]\nshared: [experiment=kd_resnet]\n"
        "each: ['seed={seed}']\nrows:\n  crashing: [loss.temperature=77]\n  hinton: []\n"
    )
    for jobs in ("1", "2"):
        done = elsewhere("leaderboard", "mine", "--jobs", jobs, f"output=out{jobs}")
        assert done.returncode == 1, done.stderr
        found = [json.loads(p.read_text()) for p in (workplace / f"out{jobs}" / "leaderboard" / "mine").glob("*/*/r*")]
        assert sorted(one["status"] for one in found) == ["failed", "failed", "finished", "finished"]
        assert all(f"crashing seed={seed} failed: {HOW[77]}\n" in done.stdout for seed in (0, 1))
        assert "2 of 4 runs are missing" in done.stderr


def test_a_crash_while_the_sweep_is_checked_is_said_before_anything_is_written(workplace, elsewhere):
    with (workplace / "stand_in_for_runs.py").open("a") as file:
        file.write("def preflight(config, deep=False): os._exit(9)\n")
    done = elsewhere(*sweep(1, 2))
    assert done.returncode == 1 and done.stderr == "kdlab: error: its process ended by itself with status 9\n"
    assert not (workplace / "outputs").exists()


TERM = """
import os
from kdlab.losses import Term

class Crashing(Term):
    needs_teacher = False

    def __init__(self, how: str = "no", weight: float = 0.0):
        super().__init__(weight)
        self.how = how

    def forward(self, student, teacher, batch):
        if self.how == "exit" and student.logits.requires_grad:
            os._exit(7)
        return student.logits.float().mean(-1)
"""


@pytest.mark.slow
def test_a_users_term_that_crashes_real_training(tmp_path):
    (tmp_path / "conf" / "loss").mkdir(parents=True)
    (tmp_path / "conf" / "loss" / "crashing.yaml").write_text(
        "# @package loss\nterms:\n  crash: {_target_: crashing_term.Crashing, how: 'no'}\n"
    )
    (tmp_path / "crashing_term.py").write_text(TERM)
    words = [
        "-m",
        "experiment=kd_mlp",
        "epochs=1",
        "teacher.epochs=1",
        "baseline=false",
        "logger=none",
        "loss=[soft_targets,crashing]",
        "loss.terms.crash.how=no,exit,never",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "KDLAB_THREADS": "1"}
    environment.pop("KDLAB_IN_PROCESS", None)
    for launcher in ((), PARALLEL):
        name = f"name=a{len(launcher)}"
        done = subprocess.run(
            [sys.executable, "-m", "kdlab", *words, name, *launcher],
            cwd=tmp_path, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 1, done.stderr
        assert done.stderr == "kdlab: error: 1 of 3 jobs did not finish; the same command runs them\n"
        found = [json.loads(path.read_text()) for path in tmp_path.glob(f"outputs/{name[5:]}/*/*/result.json")]
        assert sorted(one["error"] or "" for one in found) == ["", "", HOW[77]]


# ---- code that raises what ends processes


@pytest.mark.slow
@pytest.mark.parametrize("forked", [True, False])
def test_sys_exit_is_a_failure_of_its_job(workplace, elsewhere, capsys, forked):
    if forked:
        status, said = (done := elsewhere(*sweep(55, 1, 56))).returncode, done.stdout
    else:
        status, said = main(sweep(55, 1, 56)), capsys.readouterr().out
    assert status == 1
    found = results(workplace)
    assert found[1]["status"] == "finished"
    assert found[55]["error"].startswith("SystemExit(0): code that the run uses asked to end the process")
    assert found[56]["error"] == "Odd: neither here nor there"
    assert "loss.temperature=55 (" not in said and "loss.temperature=55 failed: RunFailed: SystemExit(0)" in said


@pytest.mark.slow
@pytest.mark.parametrize("code", ["0", "143", "None", "'out of luck'"])
def test_sys_exit_is_a_failure_of_a_single_run(workplace, elsewhere, code):
    with (workplace / "stand_in_for_runs.py").open("a") as file:
        file.write(f"def run(config, **more): raise SystemExit({code})\n")
    done = elsewhere("experiment=kd_resnet")
    assert done.returncode == 1 and done.stderr.startswith(f"kdlab: error: SystemExit({code}): code that the run uses")


@pytest.mark.slow
def test_sys_exit_while_a_sweep_is_checked_is_a_failure(workplace, elsewhere):
    with (workplace / "stand_in_for_runs.py").open("a") as file:
        file.write("def preflight(config, deep=False): raise SystemExit(0)\n")
    for words in (sweep(1, 2), ["experiment=kd_resnet"], ["check", "experiment=kd_resnet"]):
        done = elsewhere(*words)
        assert done.returncode == 1 and done.stderr.startswith("kdlab: error: SystemExit(0): "), (words, done.stderr)
        assert not (workplace / "outputs").exists()


# ---- signals


def children(pid):
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def gone(pid):
    """Whether a process runs no more; it may be there as a zombie that nobody has asked for yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def begun(workplace, elsewhere, *words):
    """A sweep that is at its second job, which takes its time, and its workers."""
    process = elsewhere(*words, begin=True)
    deadline = time.monotonic() + 60
    while not (workplace / "waiting").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    return process, children(process.pid)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")
@pytest.mark.parametrize("launcher", [(), pytest.param(PARALLEL, marks=pytest.mark.slow)], ids=["serial", "joblib"])
@pytest.mark.parametrize(
    ("number", "status", "how"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_ends_workers_too_and_says_how_to_go_on(workplace, elsewhere, launcher, number, status, how):
    process, workers = begun(workplace, elsewhere, *sweep(1, 44, "44.0", 2), *launcher)
    assert len(workers) == 1 + len(launcher) // 2
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == status
    assert err == f"kdlab: {how}; the same command with resume=auto goes on (a sweep: without)\n"
    assert all(map(gone, workers))
    assert "unfinished (running, or killed):\n" in out
    assert out.index(" never began:\n") < out.rindex("loss.temperature=2-")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")
def test_workers_end_with_a_main_process_that_nobody_asks_for(workplace, elsewhere):
    process, workers = begun(workplace, elsewhere, *sweep(44, "44.0"), *PARALLEL)
    process.kill()  # it stays as a zombie until communicate() asks
    deadline = time.monotonic() + 10
    while not all(map(gone, workers)):
        assert time.monotonic() < deadline, "orphans"
        time.sleep(0.01)
    assert not gone(os.getpid()) and process.poll() is not None
    process.communicate()


# ---- the pool alone, in a process without threads


def pool(code, **env):
    """Run code with a pool in a process of its own; returns what it printed, line by line."""
    head = "import os, signal, sys, time\nfrom kdlab.cli.hydra.workers import Pool\n"
    done = subprocess.run(
        [sys.executable, "-c", head + code], cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout.splitlines()


def test_a_pool_that_loses_every_worker_holds_no_more_than_before():
    said = pool(
        "fds = lambda: len(os.listdir('/proc/self/fd')) if os.path.exists('/proc/self/fd') else 0\n"
        "before = fds()\n"
        "with Pool(3, lambda n: os._exit(n % 250)) as it:\n"
        "    codes = sorted(outcome.error.status >> 8 for _, outcome in it.run(range(60)))\n"
        "    print(codes == list(range(60)), len(it._workers), fds() - before)\n"
        "print(fds() - before, signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)\n"
    )
    assert said == ["True 0 2", "0 True"]


def test_a_worker_that_is_lost_between_jobs_is_nobodys_failure():
    said = pool(
        "with Pool(1, lambda n: os.getpid()) as it:\n"
        "    first = it.call(0); os.kill(first, signal.SIGKILL); it._workers[0].wait(5)\n"
        "    print(it.call(1) != first)\n"
    )
    assert said == ["True"]


def test_errors_come_back_as_they_are_or_as_text():
    said = pool(
        "from kdlab.errors import UserError\n"
        "class Odd(Exception):\n"
        "    def __init__(self, a, b): super().__init__(f'{a} {b}')\n"
        "def work(n):\n"
        "    raise [UserError('seed: x'), Odd(1, 2), KeyError('k')][n]\n"
        "with Pool(1, work) as it:\n"
        "    for n in range(3):\n"
        "        try: it.call(n)\n"
        "        except Exception as error: print(type(error).__name__, error)\n"
    )
    assert said == ["UserError seed: x", "RunFailed Odd: 1 2", "KeyError 'k'"]


def test_what_a_worker_registers_for_its_end_is_run_and_what_it_prints_comes_whole():
    said = pool(
        "import atexit\n"
        "atexit.register(lambda: print('main ends', flush=True))\n"
        "sys.stdout.write('said before, ')\n"
        "def work(n): atexit.register(print, 'worker ends'); print('works')\n"
        "with Pool(1, work) as it: it.call(0)\n"
    )
    assert said == ["said before, works", "worker ends", "main ends"]


def test_without_leave_to_fork_jobs_run_here(workplace):
    from kdlab.cli.hydra import workers

    with workers.pool(4, lambda n: os.getpid()) as it:
        assert it.call(0) == os.getpid() and it.count == 1
        assert [outcome.value for _, outcome in it.run([1, 2])] == [os.getpid()] * 2


@pytest.mark.slow
def test_the_command_line_can_be_told_to_run_jobs_in_its_own_process(workplace, elsewhere, monkeypatch):
    assert elsewhere(*sweep(1, 2)).returncode == 0
    monkeypatch.setenv("KDLAB_IN_PROCESS", "1")
    code = "import os, sys; from kdlab.cli.hydra.forking import *; allow_forks(); print(may_fork())"
    assert pool(code) == ["False"] and pool(code, KDLAB_IN_PROCESS="0") == ["True"]
    assert len({call["pid"] for call in ran(workplace)}) == 1


# ---- launchers of others

SUBMITIT = '''
"""Stands in for submitit: a job's results are what its process sent, or an exception where it died."""
import os, pickle

class Job:
    def __init__(self, folder, work):
        folder.mkdir(parents=True, exist_ok=True)
        self.paths = type("Paths", (), {"stderr": folder / "log.err"})
        self.file = folder / "result.pkl"
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self.file.write_bytes(pickle.dumps(work()))
            finally:
                os._exit(0)

    def results(self):
        os.waitpid(self.pid, 0)
        if not self.file.exists():
            raise RuntimeError("Job 7 has not produced any output (state: FAILED)\\nand more")
        return [pickle.loads(self.file.read_bytes())]
'''

LAUNCHER = """
from functools import partial
from pathlib import Path
from hydra.core.utils import run_job
from hydra.plugins.launcher import Launcher

class StandInLauncher(Launcher):
    def setup(self, *, hydra_context, task_function, config):
        self.context, self.task, self.config = hydra_context, task_function, config

    def run(self, number, overrides):
        from kdlab.cli.hydra.launcher import job_config
        from types import SimpleNamespace
        config = job_config(SimpleNamespace(hydra_context=self.context, config=self.config), number, overrides)
        ended = run_job(self.task, config, "hydra.sweep.dir", "hydra.sweep.subdir", self.context)
        ended.cfg = ended.hydra_cfg = None
        return ended

    def launch(self, job_overrides, initial_job_idx):
        from submitit.core.core import Job
        folder = Path(self.config.hydra.sweep.dir) / ".submitit"
        given = enumerate(job_overrides, initial_job_idx)
        jobs = [Job(folder / str(n), partial(self.run, n, list(one))) for n, one in given]
        return [job.results()[0] for job in jobs]
"""


@pytest.fixture
def cluster(workplace):
    """The overrides that choose a launcher which works as submitit's do."""
    package = workplace / "submitit" / "core"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    (package / "core.py").write_text(SUBMITIT)
    plugin = workplace / "hydra_plugins" / "stand_in"
    plugin.mkdir(parents=True)
    (plugin / "__init__.py").write_text(LAUNCHER)
    (workplace / "conf" / "hydra" / "launcher").mkdir(parents=True)
    (workplace / "conf" / "hydra" / "launcher" / "cluster.yaml").write_text(
        "_target_: hydra_plugins.stand_in.StandInLauncher\n"
    )
    return ["hydra/launcher=cluster"]


@pytest.mark.slow
def test_jobs_of_a_cluster_fail_one_by_one(workplace, elsewhere, cluster):
    done = elsewhere(*sweep(77, 1, 2), *cluster)
    assert done.returncode == 1 and "1 of 3 jobs did not finish" in done.stderr, done.stderr
    found = results(workplace)
    assert found[1]["status"] == found[2]["status"] == "finished"
    said = "its process has died; Job 7 has not produced any output (state: FAILED) ("
    assert found[77]["error"].startswith(said) and f"[1/3] loss.temperature=77 failed: RunFailed: {said}" in done.stdout


@pytest.mark.slow
def test_what_a_cluster_keeps_beside_the_jobs_of_a_search_is_no_job(workplace, elsewhere, cluster):
    pytest.importorskip("optuna")
    words = ["-m", "experiment=kd_resnet", "hydra/sweeper=optuna", "loss.alpha=interval(0,1)"]
    done = elsewhere(*words, "hydra.sweeper.n_trials=2", *cluster)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    record = yaml.safe_load((the_sweep(workplace) / "sweep.yaml").read_text())
    assert len(record["jobs"]) == 2 and (the_sweep(workplace) / ".submitit").is_dir()


# ---- what is refused before anything is written


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["hydra.sweeper.params=3"], "hydra.sweeper.params: 3; accepted: a mapping such as "),
        (["hydra.sweeper.params=[a]"], "hydra.sweeper.params: ['a']; accepted: a mapping such as "),
        (["hydra.sweeper=3"], "hydra.sweeper: 3; accepted: an option, such as hydra/sweeper=grid"),
        (["hydra.launcher=null"], "hydra.launcher: None; accepted: an option, such as hydra/launcher=basic"),
        (["hydra/launcher=joblib", "hydra.launcher.n_jobs=0"], "hydra.launcher.n_jobs: 0; accepted: an integer of at "),
        (
            ["hydra/launcher=joblib", "hydra.launcher.timeout=3"],
            "hydra.launcher.timeout: 3.0, which kdlab does not",
        ),
        (["+hydra.launcher.n_job=3"], "hydra.launcher.n_job: 3, which kdlab does not read; accepted: none"),
        (["hydra/sweeper=optuna", "hydra.sweeper.n_jobs=0"], "hydra.sweeper.n_jobs: 0; accepted: an integer of at lea"),
        (["hydra/sweeper=optuna", "hydra.sweeper.n_trials=x"], "hydra.sweeper.n_trials: 'x'; accepted: an integer of"),
        (["hydra/sweeper=optuna", "hydra.sweeper.startup=-1"], "hydra.sweeper.startup: -1; accepted: an integer of at"),
    ],
)
def test_settings_that_a_sweep_would_stumble_over(workplace, capsys, words, said):
    for package in {"optuna", "hydra_plugins.hydra_joblib_launcher"}:
        pytest.importorskip(package)
    output = workplace / "out"
    assert mistake(capsys, ["-m", "experiment=kd_resnet", "seed=0,1", *words], output).startswith(said)


@pytest.mark.parametrize("word", ["hydra/sweeper=optuna", "hydra/launcher=joblib", "+hydra.sweeper.params.seed='0,1'"])
def test_settings_of_sweeps_are_refused_where_one_run_is_meant(workplace, capsys, word):
    said = mistake(capsys, ["experiment=kd_resnet", word], workplace / "out")
    assert said == f"{word.partition('=')[0]}: a setting of sweeps, and this is one run; accepted: with -m before it"


@pytest.mark.parametrize("words", [["-m", "experiment=kd_resnet", "seed=0,1"], ["leaderboard", "digits"]])
def test_a_place_that_cannot_be_written_to_is_said_at_once(workplace, capsys, words):
    (workplace / "taken").touch()
    assert mistake(capsys, [*words, "output=taken/out"]).endswith(
        "taken is no folder; accepted: a folder that can be written to"
    )
    assert not ran(workplace)


def test_a_place_that_fails_all_the_same_is_said_too(workplace, monkeypatch, capsys):
    def mkdir(self, *args, **more):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", mkdir)
    assert mistake(capsys, ["-m", "experiment=kd_resnet", "seed=0,1"]).endswith(
        ": Read-only file system; accepted: a folder that can be written to"
    )
    assert not ran(workplace)
