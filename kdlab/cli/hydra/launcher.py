"""Launchers of the jobs of a sweep: kdlab's own, and what it takes to go on where the jobs of another crash."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from kdlab.cli.hydra.workers import InProcess, Outcome
from kdlab.errors import RunFailed

CHECK = None
"""Stand-in for a job that makes a worker look at the whole sweep, before the first job."""


class PoolLauncher(Launcher):
    """Launcher of a sweep's jobs in a pool of workers: ``hydra/launcher=basic`` has one, ``joblib`` ``n_jobs``.

    Args:
        pool: workers that run the jobs.
        check: function that looks at the whole sweep; what it raises ends the sweep before anything is written. It runs
            in a worker, since it needs the modules that jobs need, and the main process is to stay without them.
        begin: function called once the check has passed, before the first job.
    """

    config: DictConfig
    task_function: Any
    hydra_context: HydraContext

    def __init__(self, pool: InProcess, check: Callable[[], None], begin: Callable[[], None]) -> None:
        self.pool, self.check, self.begin = pool, check, begin
        pool.work = self._work

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what Hydra hands over."""
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def open(self) -> None:
        """Check the sweep, and begin it."""
        self.pool.call(CHECK)
        self.begin()

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run jobs, those that failed before after the others; what they return is in the order in which they came."""
        jobs = list(enumerate(map(list, job_overrides), initial_job_idx))
        jobs.sort(key=lambda job: job[0] in self.task_function.last)
        ended: dict[int, JobReturn] = {}
        for n, outcome in self.pool.run(jobs):
            number, overrides = jobs[n]
            if outcome.error is None:
                ended[number] = returned(overrides, outcome.value)
            else:
                ended[number] = failed(self, number, overrides, outcome)
        return [ended[number] for number in sorted(ended)]

    def _work(self, job: tuple[int, list[str]] | None) -> Any:
        """Run one job, as Hydra's launchers do."""
        if job is CHECK:
            return self.check()
        setup_globals()
        ended = run_job(
            hydra_context=self.hydra_context,
            task_function=self.task_function,
            config=job_config(self, *job),
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )
        if ended.status == JobStatus.FAILED:
            raise ended._return_value
        return ended.return_value


def job_config(sweep: Any, number: int, overrides: Sequence[str]) -> DictConfig:
    """Return the configuration of one job, Hydra's settings included.

    Args:
        sweep: the launcher or sweeper, as its ``setup`` left it.
        number: number of the job, from 0.
        overrides: overrides of the job.
    """
    config = sweep.hydra_context.config_loader.load_sweep_config(sweep.config, list(overrides))
    with open_dict(config):
        config.hydra.job.id = config.hydra.job.num = number
    return config


def returned(overrides: Sequence[str], value: Any, status: JobStatus = JobStatus.COMPLETED) -> JobReturn:
    """Return a job's result in the form of Hydra's launchers."""
    job = JobReturn()
    job.overrides, job.return_value, job.status = overrides, value, status
    return job


def failed(sweep: Any, number: int, overrides: Sequence[str], outcome: Outcome) -> JobReturn:
    """Record the failure of a job that could not do so itself; returns what Hydra's launchers return of a job."""
    value = sweep.task_function.failed(lambda: _given(sweep, number, overrides), number, outcome)
    if value is None:
        return returned(overrides, outcome.error, JobStatus.FAILED)
    return returned(overrides, value)


def _given(sweep: Any, number: int, overrides: Sequence[str]) -> DictConfig:
    """Return the config of a job, once :class:`HydraConfig` holds Hydra's settings of it."""
    config = job_config(sweep, number, overrides)
    HydraConfig.instance().set_config(config)
    with open_dict(config):
        del config["hydra"]
    return config


# ---- launchers of others --------------------------------------------------------------------------------------------


@contextmanager
def apart_from_each_other() -> Iterator[None]:
    """Let submitit's jobs fail one by one, each with an :class:`Outcome` in place of a result.

    It would raise what is known of the first one that died, and wait for none of the others. Since jobs of kdlab's
    raise nothing, an exception from one says that its process has died.
    """
    if importlib.util.find_spec("submitit") is None:
        yield
        return
    from submitit.core.core import Job

    plain = Job.results

    def results(job: Any) -> list[Any]:
        try:
            return plain(job)
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            return [Outcome(error=RunFailed(f"its process has died; {lines[0]} ({job.paths.stderr})"))]

    Job.results = results
    try:
        yield
    finally:
        Job.results = plain
