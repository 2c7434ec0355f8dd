"""A stand-in for experiments, for tests of sweeps alone: it scores a config by arithmetic, and crashes on demand."""

import json
import os
import subprocess
import sys

import pytest

import kdlab.experiment
from helpers.paths import ROOT

STAND_IN = '''
"""Stands in for kdlab.experiment, in this process and in those of a launcher."""
import json, os
from pathlib import Path

def score(config):
    temperature = config["loss"]["temperature"]
    heat = temperature if isinstance(temperature, (int, float)) else temperature["start"]
    return 0.9 - 0.01 * abs(heat - 4) - 0.1 * abs(config["loss"]["alpha"] - 0.5) + 0.001 * config["seed"]

def preflight(config, deep=False):
    return []

def crash(kind):
    import signal, sys, time
    if kind == 77:
        os._exit(7)
    if kind == 78:
        os._exit(0)
    if kind == 79:
        os.kill(os.getpid(), signal.SIGSEGV)
    if kind == 80:
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == 81 and not Path("died").exists():  # where another runs
        while len(Path("log.jsonl").read_text().splitlines()) < 2:
            time.sleep(0.01)
        Path("died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == 82:
        while not Path("died").exists():
            time.sleep(0.01)
        time.sleep(0.3)
    if kind == 55:
        sys.exit(0)
    if kind == 56:
        class Odd(BaseException):
            pass
        raise Odd("neither here nor there")
    if kind == 44:
        Path("waiting").touch()
        time.sleep(60)

def run(config, *, folder=None, overrides=(), stages=None, choices=None):
    from kdlab.config import builder
    from kdlab.errors import RunFailed
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").touch()
    with open("log.jsonl", "a") as log:
        line = {"folder": str(folder), "overrides": list(overrides), "stages": list(stages or {}),
                "pid": os.getpid(), "threads": os.environ.get("KDLAB_THREADS")}
        log.write(json.dumps(line) + "\\n")
    if config["loss"]["temperature"] == 13 and not Path("mended").exists():
        raise RunFailed("loss is not finite at step 3: kl")
    if config["loss"]["temperature"] == 66:
        raise KeyboardInterrupt
    crash(config["loss"]["temperature"])
    value = score(config)
    measured = {"acc": value, "ce": 0.1, "kl": 0.1, "agreement": value}
    model = {"parameters": 5, "bytes": 20, "flops": None, "latency_ms": None, "seconds": 1.0,
             "val": measured, "test": {**measured, "acc": value - 0.01}}
    result = {"format": 1, "status": "finished", "error": None, "name": config["name"], "method": "OfflineKD",
              "config_hash": builder.config_hash(config), "seed": config["seed"], "overrides": list(overrides),
              "settings": {**builder.flatten(config), **(choices or {})},
              "models": {"student": model, "teacher": None, "baseline": None}, "objective": value,
              "best_epoch": 1, "epochs": 1, "steps": 1, "seconds": {"total": 30.0},
              "teacher_trained_on": None, "hardware": {}, "versions": {},
              "commit": None,
              "started": "2026-01-01T00:00:00", "finished": "2026-01-01T00:00:30"}
    (folder / "result.json").write_text(json.dumps(result))
    return result
'''


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    (tmp_path / "stand_in_for_runs.py").write_text(STAND_IN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "stand_in_for_runs", raising=False)
    import stand_in_for_runs

    for name in ("run", "preflight"):
        # into its namespace: asking for the old value first would import torch
        monkeypatch.setitem(vars(kdlab.experiment), name, getattr(stand_in_for_runs, name))
    return tmp_path


@pytest.fixture
def elsewhere(workplace):
    """Run the command line in a process whose children have the stand-in too."""
    (workplace / "sitecustomize.py").write_text(
        "import kdlab.experiment, stand_in_for_runs\n"
        "kdlab.experiment.run = stand_in_for_runs.run\n"
        "kdlab.experiment.preflight = stand_in_for_runs.preflight\n"
    )
    root = ROOT
    env = {k: v for k, v in os.environ.items() if k not in ("KDLAB_THREADS", "OMP_NUM_THREADS", "KDLAB_IN_PROCESS")}
    env["PYTHONPATH"] = os.pathsep.join([str(workplace), str(root)])

    def run(*words, begin=False):
        start = subprocess.Popen if begin else subprocess.run
        return start(
            [sys.executable, "-m", "kdlab", *words],
            cwd=workplace,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return run


def ran(workplace):
    log = workplace / "log.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def the_sweep(workplace, name="kd_resnet"):
    (folder,) = (workplace / "outputs" / name).glob("sweep-*")
    return folder
