"""Start of an experiment or a sweep: all is composed and validated before anything is written; then it runs."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.global_hydra import GlobalHydra
from hydra.core.utils import env_override
from omegaconf import DictConfig, OmegaConf

from kdlab.cli.hydra import hydra_node
from kdlab.cli.hydra.compose import CONFIG, JOB_NAME, Composer, Composition, as_typed, composer
from kdlab.cli.hydra.plan import OURS, QUIET, Flags, Plan, distinct, make_plan, refuse_sweeps
from kdlab.cli.validate import validate
from kdlab.config import builder
from kdlab.errors import RunFailed, UserError
from kdlab.plain_text import one_line
from kdlab.system.terminal import say
from kdlab.system.termination import exit_on_sigterm

if TYPE_CHECKING:
    from kdlab.cli.hydra.workers import InProcess
    from kdlab.experiment.reading import Unread

PLAIN = ("temperature=constant",)
"""Overrides that are defaults: typing them out asks for nothing."""

HARMLESS = ("teacher.",)
"""Beginnings of settings that are reported, and not refused, where nothing reads them: they are known not to matter."""


@contextmanager
def session(flags: Flags, user_modules: bool = True) -> Iterator[Composer]:
    """Initialise Hydra over the config folders, trust the user's own modules if allowed, and yield a composer."""
    with composer(flags.config_dir) as composing, builder.trust(user_modules=user_modules):
        yield composing


@contextmanager
def planned(flags: Flags) -> Iterator[Plan]:
    """Yield a validated plan, for verbs that look at an experiment without running it."""
    with session(flags) as composer:
        yield make_plan(flags, composer)


def start(flags: Flags) -> int:
    """Run what the flags ask for; returns the exit status.

    Raises:
        UserError: a mistake in the command.
        RunFailed: a run that stopped.
    """
    with session(flags) as composer:
        if flags.info is not None:
            GlobalHydra.instance().hydra.show_info(flags.info, CONFIG, list(flags.overrides))  # type: ignore[union-attr]
            return 0
        if flags.cfg is not None:
            return _show(flags, composer)
        made = make_plan(flags, composer)
        gc.enable()
        with env_override(hydra_node.environment(made.points[0])):
            if made.multirun:
                return _sweep(made)
            return _single(made)


def _show(flags: Flags, composer: Composer) -> int:
    """Print the composed config, right or wrong, then say what is wrong with it."""
    parsed = composer.parse(flags.overrides)
    if flags.multirun and any(override.is_sweep_override() for override in parsed):
        raise UserError("--cfg shows one point of a sweep", accepted="one value a key")
    refuse_sweeps(parsed)
    composition = composer.compose([str(o.input_line) for o in parsed])
    shown = {"hydra": composition.hydra} if flags.cfg == "hydra" else composition.tree
    if flags.cfg == "all":
        shown = {**composition.tree, "hydra": composition.hydra}  # type: ignore[dict-item]
    tree = OmegaConf.create(shown)  # type: ignore[call-overload]
    if flags.package:
        tree = OmegaConf.select(tree, flags.package)
        if tree is None:
            raise UserError("--package", f"{flags.package!r}", "a key of the config")
    text = OmegaConf.to_yaml(tree, resolve=flags.resolve) if OmegaConf.is_config(tree) else f"{tree}\n"
    say(text.removesuffix("\n"))
    validate(composition, composer)
    return 0


def preflight(points: Iterable[Composition]) -> None:
    """Let the parts refuse values that no signature can, before anything is written.

    Raises:
        UserError: what a constructor refuses.
    """
    from kdlab import experiment

    for config in distinct(points):
        experiment.preflight(config)


def _look_at(made: Plan) -> None:
    """Let the parts refuse what no signature can, and say what nothing reads, before anything is written."""
    preflight(made.points)
    refuse_unread(made)


def refuse_unread(made: Plan) -> None:
    """Refuse settings that were typed and that no run reads; say those that only some read.

    Raises:
        UserError: names the setting, and why nothing reads it.
    """
    from kdlab import experiment

    known: dict[str, dict[str, Unread]] = {}
    unread: list[dict[str, Unread]] = []
    values: dict[str, str] = {}
    for point in made.points:
        of_point: list[dict[str, Unread]] = []
        for one in [*point.stages.values()] or [point]:
            typed = dict(text.lstrip("+~").partition("=")[::2] for text in as_typed(one.overrides) if text not in PLAIN)
            values.update(typed)
            key = json.dumps([sorted(typed), {**one.config, "seed": None, "stages": None}], default=str, sort_keys=True)
            if key not in known:
                known[key] = experiment.unread(one.config, typed)
            of_point.append(known[key])
        unread.append({key: why for key, why in of_point[0].items() if all(key in other for other in of_point)})
    messages = []
    for key in dict.fromkeys(key for reasons in unread for key in reasons):
        why = [reasons[key] for reasons in unread if key in reasons]
        if len(why) == len(unread) and not key.startswith(HARMLESS):
            raise UserError(key, f"{values[key]}, and {why[0].why}", why[0].accepted)
        read = f" in {len(why)} of {len(unread)} jobs" if len(unread) > 1 else ""
        messages.append(f"kdlab: {key}={values[key]} is not read{read}: {why[0].why}")
    for line in messages:
        say(line, file=sys.stderr)


def _single(made: Plan) -> int:
    from kdlab.cli.hydra.job import Single

    task = Single(made.points[0], made.composer, made.folder, partial(refuse_unread, made))
    hydra = GlobalHydra.instance().hydra
    assert hydra is not None
    hydra.run(CONFIG, task, _for_hydra(made))
    if task.error is not None:
        raise task.error
    return 0


def _sweep(made: Plan) -> int:
    from kdlab.cli.hydra import sweep
    from kdlab.cli.hydra.workers import pool

    own = as_typed(made.texts)
    folder = made.folder or sweep.sweep_folder(made.points[0].config, own, made.searched)
    sweep.check_writable(folder)
    jobs = [] if made.searched else [_folder(folder, made, point) for point in made.points]
    parallel = _share_cores(made.hydra, made.jobs)
    begun = False

    def begin() -> None:
        nonlocal begun
        sweep.write_record(folder, own, [job.name for job in jobs])
        begun = True
        how = f", {parallel} at a time" if parallel > 1 else ""
        say(f"sweep of {made.jobs} job{'s' * (made.jobs > 1)} in {one_line(folder)}{how}")

    stopped: BaseException | None = None
    with exit_on_sigterm():
        try:
            with pool(parallel) as workers:
                _launch(made, folder, jobs, parallel, workers, begin)
        except BaseException as error:  # of the launcher or the search, or a signal: jobs never raise
            if not begun:
                raise
            stopped = error
        if made.searched:
            jobs = sweep.jobs_in(folder)
            sweep.write_record(folder, own, [job.name for job in jobs])
        return _end(made, folder, jobs, stopped)


def _launch(
    made: Plan, folder: Path, jobs: list[Path], parallel: int, workers: InProcess, begin: Callable[[], None]
) -> None:
    """Run the jobs of a sweep, by kdlab's own launcher or by one that Hydra finds."""
    from kdlab.cli.hydra.job import Job
    from kdlab.cli.hydra.launcher import PoolLauncher
    from kdlab.cli.hydra.sweep import read_any

    launcher = None
    if runs_in_pool(made.hydra):
        launcher = PoolLauncher(workers, partial(_look_at, made), begin)
    else:
        _look_at(made)
        begin()
    last = frozenset(n for n, job in enumerate(jobs) if read_any(job).get("status") == "failed")
    task = Job(folder, made.composer, made.swept, made.jobs, parallel, last, launcher)
    hydra = GlobalHydra.instance().hydra
    assert hydra is not None
    hydra.multirun(CONFIG, task, _for_hydra(made, folder, parallel))


def _end(made: Plan, folder: Path, jobs: list[Path], stopped: BaseException | None) -> int:
    """Show what a sweep came to; returns the exit status.

    Raises:
        BaseException: what stopped it.
    """
    from kdlab.cli.hydra.sweep import read_any
    from kdlab.report import table
    from kdlab.report.compare.summary import sweep_table

    table.show(f"\n{sweep_table(folder, jobs)}")
    if isinstance(stopped, Exception):
        raise RunFailed(
            f"the sweep stopped: {type(stopped).__name__}: {stopped}; the same command goes on in {folder}"
        ) from stopped
    if stopped is not None:
        raise stopped
    failed = [job for job in jobs if read_any(job).get("status") != "finished"]
    if failed:
        message = f"{len(failed)} of {len(jobs)} jobs did not finish; the same command runs them"
        if made.searched:  # a trial that failed is told to the study, and counts
            more = max(made.jobs, len(jobs)) + len(failed)
            message = f"{len(failed)} of {len(jobs)} jobs failed; more trials: hydra.sweeper.n_trials={more}"
        say(f"kdlab: error: {message}", file=sys.stderr)
    return 1 if failed else 0


def _folder(folder: Path, made: Plan, point: Composition) -> Path:
    from kdlab.cli.hydra.sweep import job_folder

    return job_folder(folder, point.overrides, made.swept, point.config)


def _for_hydra(made: Plan, folder: Path | None = None, parallel: int = 1) -> list[str]:
    """Return the overrides for Hydra's own run: what it would write or print is kdlab's to do."""
    given = {text.split("=")[0] for text in made.texts}
    texts = [text for text in made.texts if text.split("=")[0] not in (*OURS, "hydra.mode")]
    name = json.dumps(str(made.points[0].config.get("name") or "kdlab"))
    extra = {**QUIET, "hydra.mode": "MULTIRUN" if folder else "RUN"}
    if folder is not None:
        extra[hydra_node.SWEEP_DIR] = json.dumps(str(folder))
    if made.points[0].hydra.job.name == JOB_NAME:
        extra["hydra.job.name"] = name
    if made.searched and "hydra.sweeper.n_jobs" not in given:
        extra["hydra.sweeper.n_jobs"] = str(parallel)
    # Hydra would look for what they name in its own settings alone
    known = (f"++hydra.job.env_set.{k}={json.dumps(v)}" for k, v in hydra_node.environment(made.points[0]).items())
    return [*(f"{key}={value}" for key, value in extra.items()), *texts, *known]


def runs_in_pool(hydra: DictConfig) -> bool:
    """Return whether kdlab's own launcher runs the jobs: unless another is chosen, or it has to be a process each."""
    target = str(hydra.launcher.get("_target_"))
    return "Basic" in target or ("Joblib" in target and hasattr(os, "fork"))


def _share_cores(hydra: DictConfig, total: int) -> int:
    """Return how many jobs run at a time, and put their share of the cores into the environment of the workers."""
    from kdlab.cli.hydra.forking import may_fork

    if "Joblib" not in str(hydra.launcher.get("_target_")) or (runs_in_pool(hydra) and not may_fork()):
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jobs = int(hydra.launcher.get("n_jobs") or 1)
    jobs = max(1, min(total, cores + 1 + jobs if jobs < 0 else jobs))
    threads = str(max(1, cores // jobs))
    for variable in ("KDLAB_THREADS", "OMP_NUM_THREADS"):
        os.environ.setdefault(variable, threads)
    return jobs
