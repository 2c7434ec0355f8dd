"""Killed at any moment, a run goes on to the same bits; what is half written never replaces what is whole."""

import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from helpers.paths import ROOT
from helpers.tiny import MLP, OFTEN, QUIET, checkpoint, curve, mistake, newest, result, same, steps, train, weights
from kdlab.cli.main import main
from kdlab.errors import CannotWrite
from kdlab.experiment import run as experiment_run
from kdlab.models import save_weights
from kdlab.system import files
from kdlab.system.termination import TERMINATED
from kdlab.training import checkpoints

AUGMENTED = (*MLP, "student.dropout=0.3", "data.augment=[{crop: {padding: 1}}]", "temperature=annealed", "data.views=8")
CASES = {
    "augmented": (*AUGMENTED, "epochs=4"),
    "ema": ("experiment=ema", "student=mlp", "student.dropout=0.3", "data.batch_size=32", "epochs=4"),
    "wrn": (
        "experiment=kd_resnet",
        "student=wrn_16_1",
        "student.dropout=0.2",
        "teacher=mlp",
        "teacher.epochs=1",
        "loss.alpha={start: 1, end: 0, shape: cosine}",
        "data.fraction=0.3",
        "data.batch_size=20",
        "data.augment=[{crop: {padding: 1}}, {cutout: {size: 2}}]",
        "epochs=2",
    ),
}


def begin(place, name, *words):
    """The command in a process of its own, with every checkpoint that there is time for."""
    command = [sys.executable, "-m", "kdlab", *QUIET, *OFTEN, *words, f"output={place}", f"name={name}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with (place / f"{name}.log").open("a") as log:
        return subprocess.Popen(command, cwd=place, env=environment, stderr=log, stdout=log)


def finished(run):
    return (run / "result.json").exists()


def wait_for(process, place, name, at):
    """Wait until a run has saved more than ``at`` steps; returns its folder and how many it saved."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        runs = list((place / name).iterdir()) if (place / name).exists() else []
        if runs and (done := steps(runs[0])) > at:
            return runs[0], done
        assert process.poll() is None, (place / f"{name}.log").read_text()[-2000:]
        time.sleep(0.005)
    raise AssertionError("no checkpoint")


def interrupted(place, name, at, number, *words):
    process = begin(place, name, *words)
    run, _ = wait_for(process, place, name, at)
    process.send_signal(number)
    return run, process.wait(60)


@pytest.mark.parametrize("case", ["augmented", *(pytest.param(one, marks=pytest.mark.slow) for one in ("ema", "wrn"))])
def test_killed_a_run_ends_with_the_same_bits(place, case):
    words = CASES[case]
    whole = train(place, f"{case}_whole", *words, *OFTEN)
    total, epochs = result(whole)["steps"], result(whole)["epochs"]
    name = f"{case}_killed"
    seen = [0]
    while len(seen) < (3 if case == "augmented" else 2) or not any(step % (total // epochs) for step in seen):
        at = max(seen[-1], int((0.25 if len(seen) == 1 else 0.6) * total))
        run, status = interrupted(place, name, at, signal.SIGKILL, *words, "resume=auto")
        assert status == -signal.SIGKILL and not (run / "result.json").exists()
        seen.append(steps(run))
        assert seen[-2] < seen[-1] < total
    again = train(place, name, *words, *OFTEN, "resume=auto")
    assert again == run and len(list((place / name).iterdir())) == 1
    assert same(weights(again), weights(whole))
    assert same(checkpoint(again)["state_dict"], checkpoint(whole)["state_dict"])
    for key in ("train/ce", "train/loss", "val/acc", "val/ce"):
        assert curve(again, key) == curve(whole, key), key
    before, after = result(whole)["models"]["student"], result(again)["models"]["student"]
    assert before["val"] == after["val"] and before["test"] == after["test"]
    assert result(again)["best_epoch"] == result(whole)["best_epoch"] and result(again)["steps"] == total


def test_sigterm_saves_and_exits_with_143(place):
    words = CASES["augmented"]
    whole = train(place, "augmented_whole", *words, *OFTEN, "resume=auto")
    rare = "trainer.save_minutes=10"
    run, status = interrupted(place, "terminated", 0, signal.SIGTERM, *words, rare, "resume=auto")
    assert status == TERMINATED == 143
    assert 0 < steps(run) < result(whole)["steps"] and not (run / "result.json").exists()
    again = train(place, "terminated", *words, *OFTEN, f"resume={run}")
    assert again == run and same(weights(again), weights(whole))


def test_ctrl_c_exits_with_130_and_a_line(place):
    run, status = interrupted(place, "stopped", 3, signal.SIGINT, *CASES["augmented"])
    assert status == 130
    assert (place / "stopped.log").read_text().splitlines()[-1].startswith("kdlab: interrupted")
    assert steps(run) > 0 and not (run / "result.json").exists()


@pytest.mark.slow
def test_a_killed_teacher_goes_on_too(place):
    words = (*MLP, "epochs=1", "teacher.epochs=6", "teacher.seed=5")
    process = begin(place, "killed_teacher", *words)
    deadline = time.monotonic() + 60
    while not (killed := [f for f in place.glob("teachers/mlp-*") if 0 < steps(f) < 6 * 19 and not finished(f)]):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert len(killed) == 1 and 0 < steps(killed[0]) < 6 * 19 and not finished(killed[0])
    first = train(place, "killed_teacher", *words)
    assert result(first)["models"]["teacher"]["seconds"] > 0
    for file in killed[0].glob("**/*"):
        if file.is_file():
            file.unlink()
    second = train(place, "whole_teacher", *words)
    assert same(weights(first), weights(second))


# ---- what can be wrong with what is there


@pytest.fixture
def half(place, monkeypatch):
    """A run that failed after two of four epochs, as a full disk or a lost machine leaves it."""

    def fail_at(epoch):
        plain = checkpoints.Saver.on_train_epoch_end

        def hook(self, trainer, module):
            plain(self, trainer, module)
            if trainer.current_epoch == epoch and trainer.max_epochs == 4:
                raise RuntimeError("the machine is gone")

        with monkeypatch.context() as patched:
            patched.setattr(checkpoints.Saver, "on_train_epoch_end", hook)
            name = f"half_{time.monotonic_ns()}"
            return train(place, name, *MLP, "epochs=4", "baseline=false", status=1)

    return fail_at


def again(run, *words):
    where = [f"output={run.parent.parent}", f"name={run.parent.name}"]
    return [*QUIET, *MLP, "epochs=4", "baseline=false", *where, *words]


def test_another_configuration_is_refused(place, half, capsys):
    run = half(1)
    said = mistake(capsys, [*again(run, f"resume={run}"), "loss.alpha=0.25", "logger=csv", "trainer.log_every=7"])
    assert said.startswith(f"resume: {run} has another configuration: loss.alpha is 0.9 there and 0.25 here; accepted:")
    said = mistake(capsys, again(run, "resume=nowhere"))
    assert said == "resume: nowhere is not a run folder (no config.yaml); accepted: a run folder, or auto"
    assert main(again(run, f"resume={run}", "logger=csv", "trainer.log_every=7")) == 0, "these change no result"


@pytest.mark.parametrize("damage", ["truncated", "flipped", "foreign", "empty", "other zip"])
def test_a_damaged_checkpoint_is_refused_in_one_line(place, half, capsys, damage):
    run = half(0)
    last = run / "checkpoints" / "last.ckpt"
    content = bytearray(last.read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    elif damage == "flipped":
        content[len(content) // 2] ^= 4
    elif damage == "other zip":
        torch.save({"weights": torch.zeros(3)}, last)
        content = last.read_bytes()
    else:
        content = b"hello" if damage == "foreign" else b""
    last.write_bytes(content)
    said = one_line(capsys, again(run, "resume=auto"))
    assert said.startswith(f"resume: {last} "), said
    assert last.read_bytes() == bytes(content), "it was not touched"


def one_line(capsys, words, status=2):
    """The last line on standard error of a command that begins a run before it finds out."""
    capsys.readouterr()
    assert main(words) == status
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("kdlab: error: ") and not any("error" in line.lower() for line in lines[:-1]), lines
    return lines[-1].removeprefix("kdlab: error: ")


@pytest.mark.parametrize("what", ["os.replace", "torch.save", "os.fsync"])
def test_a_save_that_dies_leaves_the_last_good_checkpoint(place, half, monkeypatch, what):
    run = half(1)
    kept = checkpoint(run)
    best = weights(run / "checkpoints", "best.pt")

    def die(*args, **options):
        if what == "torch.save":
            args[1].write(b"half of a file")
        raise KeyError("killed")

    with monkeypatch.context() as patched:
        patched.setattr(what, die)
        assert main(again(run, "resume=auto")) == 1
    assert checkpoint(run)["global_step"] == kept["global_step"]
    assert same(checkpoint(run)["state_dict"], kept["state_dict"])
    assert same(weights(run / "checkpoints", "best.pt"), best)
    assert not (run / "result.json").exists() and not list(run.glob("**/*.tmp"))
    assert main(again(run, "resume=auto")) == 0
    assert same(weights(run), weights(train(place, "half_whole", *MLP, "epochs=4", "baseline=false", "resume=auto")))


@contextmanager
def limited(size: int):
    """No file of this process may grow beyond ``size`` bytes: what a full disk says, on any file system."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_said_and_keeps_the_last_checkpoint(place, half, capsys):
    run = half(1)
    kept = checkpoint(run)["global_step"]
    with limited(3_000):  # less than the student's weights
        said = one_line(capsys, again(run, "resume=auto"), 1)
    assert "the disk is full" in said and "cannot write" in said and "resume=auto" in said
    assert "KDLAB_TRACEBACK" not in said and not list(run.glob("**/*.tmp"))
    assert checkpoint(run)["global_step"] == kept and not (run / "result.json").exists()
    assert main(again(run, "resume=auto")) == 0
    assert same(weights(run), weights(train(place, "half_whole", *MLP, "epochs=4", "baseline=false", "resume=auto")))


def test_a_full_disk_is_found_under_what_torch_makes_of_it(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"before")
    for path in (tmp_path / "a.pt", tmp_path / "b.safetensors"):
        with limited(1_000), pytest.raises(CannotWrite, match=f"cannot write {path}: the disk is full"):
            save_weights({"w": torch.zeros(10_000)}, path)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a.pt", b"before")]


def test_a_mistake_while_writing_is_no_full_disk(tmp_path):
    with pytest.raises(AttributeError, match="mine"), files.atomic_write(tmp_path / "a"):
        raise AttributeError("mine")
    with pytest.raises(IsADirectoryError), files.atomic_write(tmp_path) as file:
        file.write(b"x")
    assert not list(tmp_path.iterdir())


# ---- resuming what is (partly) done


def test_a_finished_run_shows_its_table_and_trains_nothing(place, capsys, monkeypatch):
    words = (*MLP, "epochs=1", "baseline=false", "resume=auto")
    run = train(place, "done", *words)
    written = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    capsys.readouterr()
    monkeypatch.setitem(experiment_run.__globals__, "fit_stage", None)
    assert train(place, "done", *words) == run
    said = capsys.readouterr().out
    assert "student" in said and f"run folder: done/{run.name}" in said
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == written


@pytest.mark.slow
def test_stages_go_on_after_the_last_finished_one(place, monkeypatch):
    words = ("experiment=kd_two_stage", "student=mlp", "teacher=mlp", "teacher.epochs=1", "baseline=false")
    stages = "stages={soft: ['loss.alpha=1', 'epochs=2'], labels: ['loss.alpha=0', 'epochs=2', 'init=previous']}"
    whole = train(place, "stages_whole", *words, stages)
    run, _ = _killed_in_second_stage(place, *words, stages)
    soft = run / "stages" / "soft" / "checkpoints" / "last.ckpt"
    before = soft.stat().st_mtime_ns
    again = train(place, "stages_killed", *words, *OFTEN, stages, "resume=auto")
    assert again == run and soft.stat().st_mtime_ns == before, "the finished stage was trained again"
    assert same(weights(again), weights(whole))
    assert same(weights(again / "stages" / "soft"), weights(whole / "stages" / "soft"))
    assert result(again)["steps"] == result(whole)["steps"] == 4 * 19


def _killed_in_second_stage(place, *words):
    process = begin(place, "stages_killed", *words)
    deadline = time.monotonic() + 60
    while not (found := list((place / "stages_killed").glob("*/stages/labels/checkpoints/last.ckpt"))):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.wait()
    return found[0].parents[3], found[0]


def test_validating_every_other_epoch_resumes_the_same(place, monkeypatch):
    """What is not validated after a resume must not pass for the best."""
    words = (*MLP, "epochs=4", "trainer.validate_every=2", "baseline=false", "optimizer.lr=0.02")
    whole = train(place, "every_other_whole", *words)
    plain = checkpoints.Saver.on_train_epoch_end

    def hook(self, trainer, module):
        plain(self, trainer, module)
        if trainer.current_epoch == 1 and "every_other_cut" in str(self.folder):
            raise RuntimeError("the machine is gone")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints.Saver, "on_train_epoch_end", hook)
        cut = train(place, "every_other_cut", *words, status=1)
    best = weights(cut / "checkpoints", "best.pt")
    seen = []
    keep = checkpoints.Saver._keep

    def watched(self, trainer, *more):
        seen.append(trainer.current_epoch)
        keep(self, trainer, *more)

    monkeypatch.setattr(checkpoints.Saver, "_keep", watched)
    again = train(place, "every_other_cut", *words, "resume=auto")
    assert again == cut and set(seen) <= {3}, seen
    assert same(weights(again), weights(whole)) and result(again)["best_epoch"] == result(whole)["best_epoch"]
    assert best.keys() == weights(again).keys()


# ---- a loss that is not finite


@pytest.mark.parametrize("every", [1, 50])
def test_a_loss_that_is_not_finite_stops_the_run(place, capsys, every):
    words = [*QUIET, *MLP, "epochs=2", "optimizer.lr=1e30", f"trainer.log_every={every}", f"output={place}"]
    said = one_line(capsys, [*words, f"name=broken_{every}"], 1)
    assert said.startswith("the loss is not finite at step 2: ce = ") and "optimizer.lr" in said
    run = newest(place, f"broken_{every}")
    assert not (run / "result.json").exists() and not (run / "student.pt").exists()
    assert not (run / "checkpoints" / "best.pt").exists()


@pytest.mark.parametrize("val", ["null", "0"])
def test_weights_that_broke_in_the_last_step_never_become_best(place, capsys, val):
    """One step an epoch: each loss is finite until the weights that it led to are looked at."""
    words = [*QUIET, *MLP, "epochs=1", "optimizer.lr=1e38", "data.batch_size=2000", f"data.val={val}"]
    said = one_line(capsys, [*words, f"output={place}", f"name=late_{val}"], 1)
    assert "not finite" in said and "step 1" in said, said
    run = newest(place, f"late_{val}")
    assert not (run / "student.pt").exists() and not (run / "result.json").exists()
    assert val == "0" or not (run / "checkpoints" / "best.pt").exists()


def test_a_loss_that_breaks_later_leaves_a_finite_best(place, capsys, monkeypatch):
    words = [*QUIET, *MLP, "epochs=3", "scheduler=multistep", "scheduler.milestones=[1]", "scheduler.gamma=1e30"]
    said = one_line(capsys, [*words, f"output={place}", "name=late"], 1)
    assert said.startswith("the loss is not finite at step 2"), said
    run = newest(place, "late")
    best = weights(run / "checkpoints", "best.pt")
    assert all(bool(tensor.isfinite().all()) for tensor in best.values())
    assert checkpoint(run)["global_step"] == 19 and not (run / "result.json").exists()


def test_a_cluster_gets_no_hand_in_checkpoints(place, monkeypatch):
    """In a SLURM job Lightning would save one of its own on SIGUSR1, and load it where training begins anew."""
    slurm = {
        "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NODEID": "0", "SLURM_NODELIST": "localhost",
    }  # fmt: skip
    words = (*MLP, "epochs=1", "baseline=false")
    plain = train(place, "no_cluster", *words)
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(rank_zero_only, "rank", 1)  # what Lightning makes of SLURM_PROCID when it is imported
    handlers, started = [], checkpoints.Saver.on_train_start

    def hook(self, trainer, module):
        handlers.append(signal.getsignal(signal.SIGUSR1))
        (self.folder.parent / "hpc_ckpt_1.ckpt").write_bytes(b"no checkpoint at all")
        started(self, trainer, module)
        if len(handlers) == 1:
            raise RuntimeError("the machine is gone")

    monkeypatch.setattr(checkpoints.Saver, "on_train_start", hook)
    run = train(place, "cluster", *words, status=1)
    assert not (run / "checkpoints" / "last.ckpt").exists() and (run / "hpc_ckpt_1.ckpt").exists()
    assert train(place, "cluster", *words, f"resume={run}") == run
    assert handlers == [signal.SIG_DFL] * 2
    assert same(weights(run), weights(plain)) and curve(run, "train/loss") == curve(plain, "train/loss") != []
