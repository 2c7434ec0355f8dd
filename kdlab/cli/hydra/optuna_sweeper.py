"""Search instead of a grid: ``hydra/sweeper=optuna`` asks Optuna's TPE for each next job.

The study is kept in the sweep folder, so that the same command goes on where an interrupted search stopped.
It makes better what a job returns, the student's score on validation data: accuracy is maximised, perplexity
minimised. Which of them it is, the first job that finishes says. A job that fails counts as such, and the search
goes on. With ``hydra/launcher=joblib`` ``hydra.sweeper.n_jobs`` jobs run at a time.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep, Transformer
from hydra.core.utils import JobReturn, JobStatus

from kdlab.cli.hydra import sweep
from kdlab.cli.hydra.grid_sweeper import LaunchingSweeper
from kdlab.errors import UserError

if TYPE_CHECKING:
    import optuna

STUDY = "study.log"


class OptunaSweeper(LaunchingSweeper):
    """Sweeper that runs ``n_trials`` jobs, each where the ones before suggest.

    Args:
        n_trials: number of jobs in all, those of an earlier, interrupted search included.
        n_jobs: number of jobs that are asked for, and launched, at a time.
        seed: seed of the sampler.
        startup: number of jobs that are drawn at random before the search starts to learn.
        params: further swept overrides, as ``{key: "interval(0, 1)"}``.
    """

    def __init__(
        self, n_trials: int, n_jobs: int, seed: int, startup: int, params: dict[str, str] | None = None
    ) -> None:
        super().__init__(params)
        self.n_trials, self.n_jobs, self.seed, self.startup = n_trials, n_jobs, seed, startup

    def sweep(self, arguments: list[str]) -> optuna.Study:
        """Run the search; returns the study."""
        self.open()  # before Optuna's modules are here, whose threads a worker would not have
        import optuna

        parsed = self.parse(arguments)
        fixed = [_fixed(override) for override in parsed if not override.is_sweep_override()]
        space = {o.get_key_element(): distribution(o) for o in parsed if o.is_sweep_override()}
        folder = Path(self.config.hydra.sweep.dir)
        study = self._study(folder)
        again = _cut_off(study, set(space))
        while (done := _finished(study)) < self.n_trials:
            batch = min(self.n_jobs, self.n_trials - done)
            trials = [again.pop(0) if again else study.ask(space) for _ in range(batch)]
            jobs = [[*fixed, *(f"{key}={_said(trial.params[key])}" for key in space)] for trial in trials]
            numbers = [trial.number for trial in trials]
            ended = self.launch(jobs, done)
            study = self._turned(study, folder)
            for number, job in zip(numbers, ended, strict=True):
                value = _objective(job)
                state = optuna.trial.TrialState.FAIL if value is None else None
                study.tell(number, value, state=state)
        return study

    def _study(self, folder: Path) -> optuna.Study:
        """Make or continue the folder's study."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        folder.mkdir(parents=True, exist_ok=True)
        study = optuna.create_study(
            study_name="kdlab",
            storage=_storage(folder),
            direction="maximize",
            load_if_exists=True,
        )
        return self._with_sampler(study)

    def _turned(self, study: optuna.Study, folder: Path) -> optuna.Study:
        """Return the study in the right direction: the first result says whether more or less is better.

        Optuna fixes the direction when a study is made, which is before any job has run. No trial has a value yet
        when it turns out to be the other one, so the study is made anew with the same trials.
        """
        import optuna

        greater = sweep.greater(folder)
        direction = optuna.study.StudyDirection.MINIMIZE if greater is False else optuna.study.StudyDirection.MAXIMIZE
        if greater is None or study.direction == direction:
            return study
        name, storage, trials = study.study_name, _storage(folder), study.get_trials()
        optuna.delete_study(study_name=name, storage=storage)
        study = optuna.create_study(study_name=name, storage=storage, direction=direction)
        study.add_trials(trials)
        return self._with_sampler(study)

    def _with_sampler(self, study: optuna.Study) -> optuna.Study:
        import optuna

        # past trials shift the seed: the same seed again would draw the same points again
        study.sampler = optuna.samplers.TPESampler(
            seed=self.seed + len(study.trials), n_startup_trials=self.startup, constant_liar=self.n_jobs > 1
        )
        return study


def _storage(folder: Path) -> optuna.storages.JournalStorage:
    from optuna.storages.journal import JournalFileBackend, JournalStorage

    return JournalStorage(JournalFileBackend(str(folder / STUDY)))


def _cut_off(study: optuna.Study, keys: set[str]) -> list[Any]:
    """Return the trials that were running when an earlier search died: they run again, from their checkpoints."""
    import optuna

    running = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,))
    for trial in running:
        if set(trial.params) != keys:  # died before the point was drawn
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    return [trial for trial in running if set(trial.params) == keys]


def _finished(study: optuna.Study) -> int:
    import optuna

    states = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.FAIL)
    return sum(bool(t.params) for t in study.get_trials(deepcopy=False, states=states))


def distribution(override: Override) -> optuna.distributions.BaseDistribution:
    """Return the distribution of an override: a choice, a range, an interval; ``tag(log, ...)`` is logarithmic.

    Raises:
        UserError: an empty or negative interval.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value = override.value()
    key = override.get_key_element()
    if override.is_choice_sweep():
        return CategoricalDistribution([_plain(v) for v in override.sweep_iterator(Transformer.encode)])
    if isinstance(value, RangeSweep):
        points = value.range()
        if isinstance(points, range) and points.step > 0 and len(points) > 1 and not value.shuffle:
            return IntDistribution(points[0], points[-1], step=points.step)
        return CategoricalDistribution([_plain(v) for v in override.sweep_iterator(Transformer.encode)])
    assert isinstance(value, IntervalSweep) and value.start is not None and value.end is not None
    log = "log" in value.tags
    if value.end <= value.start or (log and value.start <= 0):
        accepted = "interval(low, high) with low < high" + (", low above 0 for tag(log, ...)" if log else "")
        raise UserError(key, f"interval({value.start:g},{value.end:g})", accepted)
    if "int" in value.tags or (isinstance(value.start, int) and isinstance(value.end, int)):
        return IntDistribution(int(value.start), int(value.end), log=log)
    return FloatDistribution(value.start, value.end, log=log)


def samples(override: Override) -> list[str]:
    """Return the ends of an interval and a point inside, to be checked before a search starts."""
    distribution(override)
    value = override.value()
    assert isinstance(value, IntervalSweep) and value.start is not None and value.end is not None
    inside = value.start + (value.end - value.start) * 0.382
    whole = isinstance(value.start, int) or "int" in value.tags
    return [_said(value.start), _said(int(inside) if whole else inside), _said(value.end)]


def _fixed(override: Override) -> str:
    key = override.get_key_element()
    return key if override.is_delete() else f"{key}={override.get_value_element_as_str()}"


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)


def _said(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, float):
        return f"{value:.6g}"  # six digits name a job folder; more would tell nobody anything
    return str(value).lower() if isinstance(value, bool) else str(value)


def _objective(job: JobReturn) -> float | None:
    """Return the objective of a job, if it finished with a finite number; else None."""
    if job.status != JobStatus.COMPLETED or not isinstance(job.return_value, int | float):
        return None
    return float(job.return_value) if math.isfinite(job.return_value) else None
