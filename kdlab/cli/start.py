"""Start an experiment or a sweep: compose and validate everything before anything is written; then run."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from kdlab import spec
from kdlab.cli.compose import CONFIG, Composer, Composition, as_typed, composer
from kdlab.cli.plan import QUIET, Flags, Plan, distinct, make_plan, refuse_sweeps
from kdlab.cli.validate import validate
from kdlab.errors import RunFailed, UserError


@contextmanager
def _session(flags: Flags) -> Iterator[Composer]:
    """Hydra over the config folders, and the user's own modules trusted."""
    with composer(flags.config_dir) as found, spec.trust(user_modules=True):
        yield found


@contextmanager
def planned(flags: Flags) -> Iterator[Plan]:
    """A validated plan, for verbs that look at an experiment without running it."""
    with _session(flags) as found:
        yield make_plan(flags, found)


def start(flags: Flags) -> int:
    """Run what the flags ask for; returns the exit status.

    Raises:
        UserError: a mistake in the command.
        RunFailed: a run that stopped.
    """
    with _session(flags) as found:
        if flags.info is not None:
            GlobalHydra.instance().hydra.show_info(flags.info, CONFIG, list(flags.overrides))  # type: ignore[union-attr]
            return 0
        if flags.cfg is not None:
            return _show(flags, found)
        made = make_plan(flags, found)
        gc.enable()
        preflight(made.points)
        return _sweep(made) if flags.multirun else _single(made)


def _show(flags: Flags, composer: Composer) -> int:
    """Print the composed config, right or wrong, then say what is wrong with it."""
    parsed = composer.parse(flags.overrides)
    if flags.multirun and any(override.is_sweep_override() for override in parsed):
        raise UserError("--cfg shows one point of a sweep; accepted: one value a key")
    refuse_sweeps(parsed)
    found = composer.compose([str(o.input_line) for o in parsed])
    shown = {"hydra": found.hydra} if flags.cfg == "hydra" else found.tree
    if flags.cfg == "all":
        shown = {**found.tree, "hydra": found.hydra}  # type: ignore[dict-item]
    tree = OmegaConf.create(shown)  # type: ignore[call-overload]
    if flags.package:
        tree = OmegaConf.select(tree, flags.package)
        if tree is None:
            raise UserError(f"--package: {flags.package!r}; accepted: a key of the config")
    text = OmegaConf.to_yaml(tree, resolve=flags.resolve) if OmegaConf.is_config(tree) else f"{tree}\n"
    sys.stdout.write(text)
    sys.stdout.flush()
    validate(found, composer)
    return 0


def preflight(points: Iterable[Composition]) -> None:
    """Let the parts refuse values that no signature can, before anything is written.

    Raises:
        UserError: what a constructor refuses.
    """
    from kdlab import experiment

    for config in distinct(points):
        experiment.preflight(config)


def _single(made: Plan) -> int:
    from kdlab.cli.job import Single

    task = Single(made.points[0], made.composer)
    hydra = GlobalHydra.instance().hydra
    assert hydra is not None
    hydra.run(CONFIG, task, _for_hydra(made))
    if task.error is not None:
        raise task.error
    return 0


def _sweep(made: Plan) -> int:
    from kdlab.cli import sweep
    from kdlab.cli.job import Job
    from kdlab.runs import table
    from kdlab.runs.compare import sweep_table

    own = as_typed(made.texts)
    folder = sweep.sweep_folder(made.points[0].config, own, made.searched)
    total = made.jobs
    jobs = [] if made.searched else [_folder(folder, made, point) for point in made.points]
    sweep.write_record(folder, own, [job.name for job in jobs])
    parallel = _share_cores(made.hydra, total)
    how = f", {parallel} at a time" if parallel > 1 else ""
    print(f"sweep of {total} job{'s' * (total > 1)} in {folder}{how}", flush=True)
    hydra = GlobalHydra.instance().hydra
    assert hydra is not None
    broken: Exception | None = None
    try:
        task = Job(folder, made.composer, made.swept, total, parallel)
        hydra.multirun(CONFIG, task, _for_hydra(made, folder, parallel))
    except Exception as error:  # the launcher's, such as a worker killed for memory; jobs never raise
        broken = error
    if made.searched:
        jobs = sorted(path for path in folder.iterdir() if path.is_dir() and path.name != "compare")
        sweep.write_record(folder, own, [job.name for job in jobs])
    table.show(f"\n{sweep_table(folder)}")
    if broken is not None:
        raise RunFailed(
            f"the sweep stopped: {type(broken).__name__}: {broken}; the same command goes on in {folder}"
        ) from broken
    failed = [job for job in jobs if sweep.read_any(job).get("status") != "finished"]
    if failed:
        said = f"{len(failed)} of {len(jobs)} jobs did not finish; the same command runs them"
        if made.searched:  # a trial that failed is told to the study, and counts
            more = max(total, len(jobs)) + len(failed)
            said = f"{len(failed)} of {len(jobs)} jobs failed; more trials: hydra.sweeper.n_trials={more}"
        print(f"kdlab: error: {said}", file=sys.stderr)
    return 1 if failed else 0


def _folder(folder: Path, made: Plan, point: Composition) -> Path:
    from kdlab.cli.sweep import job_folder

    return job_folder(folder, point.overrides, made.swept, point.config)


def _for_hydra(made: Plan, folder: Path | None = None, parallel: int = 1) -> list[str]:
    given = {text.split("=")[0] for text in made.texts}
    name = json.dumps(str(made.points[0].config.get("name") or "kdlab"))
    extra = {**QUIET, "hydra.job.name": name, "hydra.mode": "MULTIRUN" if folder else "RUN"}
    if folder is not None:
        extra["hydra.sweep.dir"] = json.dumps(str(folder))
    if made.searched:
        extra["hydra.sweeper.n_jobs"] = str(parallel)
    return [*(f"{key}={value}" for key, value in extra.items() if key not in given), *made.texts]


def _share_cores(hydra: DictConfig, total: int) -> int:
    """How many jobs run at a time; their share of the cores goes into the environment of the workers."""
    if "joblib" not in str(hydra.launcher.get("_target_")):
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jobs = int(hydra.launcher.get("n_jobs") or 1)
    jobs = max(1, min(total, cores + 1 + jobs if jobs < 0 else jobs))
    threads = str(max(1, cores // jobs))
    for variable in ("KDLAB_THREADS", "OMP_NUM_THREADS"):
        os.environ.setdefault(variable, threads)
    return jobs
