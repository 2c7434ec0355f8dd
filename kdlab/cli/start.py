"""Start an experiment or a sweep: compose and validate everything before anything is written; then run."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from kdlab import spec
from kdlab.cli.compose import CONFIG, Composer, Composition, as_typed, composer
from kdlab.cli.grid_sweeper import grid
from kdlab.cli.validate import check_sweepable, validate
from kdlab.errors import RunFailed, UserError

QUIET = {
    "hydra.run.dir": ".",
    "hydra.sweep.subdir": ".",
    "hydra.output_subdir": "null",
    "hydra/job_logging": "none",
    "hydra/hydra_logging": "none",
    "hydra/sweeper": "grid",
}
"""Hydra writes and prints nothing of its own: run folders, logs and tables are kdlab's."""


@dataclass(frozen=True)
class Flags:
    """What the command line asks for besides overrides."""

    overrides: tuple[str, ...] = ()
    multirun: bool = False
    cfg: str | None = None
    resolve: bool = False
    package: str | None = None
    info: str | None = None
    config_dir: Path | None = None


@dataclass
class Plan:
    """A command, composed and validated."""

    composer: Composer
    texts: list[str]
    """The overrides as Hydra takes them, sweeps unexpanded."""
    points: list[Composition]
    """What would run: one point, every point of a grid, or the ends of what a search draws from."""
    swept: tuple[str, ...] = ()
    searched: bool = False
    """Whether the points are only the ends of a search."""

    @property
    def jobs(self) -> int:
        """How many runs it means."""
        return int(self.hydra.sweeper.n_trials) if self.searched else len(self.points)

    @property
    def hydra(self) -> DictConfig:
        """Hydra's own settings."""
        assert self.points[0].hydra is not None
        return self.points[0].hydra


def plan(flags: Flags, composer: Composer) -> Plan:
    """Compose and validate all that a command asks for; writes nothing and imports no torch.

    Raises:
        UserError: the first mistake in any point or stage.
    """
    parsed = composer.parse(flags.overrides)
    texts = [str(override.input_line) for override in parsed]
    given = {override.get_key_element() for override in parsed}
    quiet = [f"{key}={value}" for key, value in QUIET.items() if key not in given]
    if not flags.multirun:
        _refuse_sweeps(parsed)
        found = Plan(composer, texts, [composer.compose([*quiet, *texts], hydra=True)])
    else:
        found = _plan_sweep(composer, parsed, texts, quiet)
    for point in found.points:
        validate(point, composer)
        if flags.multirun:
            check_sweepable(point.config)
    return found


def _refuse_sweeps(parsed: Iterable[Override]) -> None:
    for override in parsed:
        if override.is_sweep_override():
            raise UserError(
                f"{override.get_key_element()}: {override.get_value_string()!r} is several values; "
                "accepted: one value, a list [a,b], or -m before it to sweep over them"
            )


def _plan_sweep(composer: Composer, parsed: list[Override], texts: list[str], quiet: list[str]) -> Plan:
    """Every point of the sweep; params that a file sweeps over (``hydra.sweeper.params``) included."""
    plain = [str(o.input_line) for o in parsed if not o.is_sweep_override()]
    params = composer.compose([*quiet, *plain], hydra=True)
    assert params.hydra is not None
    own = OmegaConf.to_container(params.hydra.sweeper).get("params") or {}  # type: ignore[union-attr]
    given = {o.get_key_element() for o in parsed}
    parsed = [*composer.parse(f"{k}={v}" for k, v in own.items() if k not in given), *parsed]
    searched = "optuna" in str(params.hydra.runtime.choices.get("hydra/sweeper"))
    swept = tuple(o.get_key_element().lstrip("+") for o in parsed if o.is_sweep_override())
    points = _ends(parsed) if searched else _grid(parsed)
    return Plan(
        composer,
        texts,
        [composer.compose([*quiet, *p], hydra=i == 0) for i, p in enumerate(points)],
        swept,
        searched,
    )


def _grid(parsed: list[Override]) -> list[list[str]]:
    for override in parsed:
        if override.is_interval_sweep():
            raise UserError(
                f"{override.get_key_element()}: {override.get_value_string()!r}; "
                "accepted: choices a,b or range(low,high); an interval needs hydra/sweeper=optuna"
            )
        if override.is_hydra_override() and override.is_sweep_override():
            raise UserError(f"{override.get_key_element()}: cannot be swept; accepted: one value")
    return grid(parsed)


def _ends(parsed: list[Override]) -> list[list[str]]:
    """A search cannot be listed: each value that it may draw is checked once, intervals at both ends."""
    from kdlab.cli.optuna_sweeper import samples

    draws = []
    for override in parsed:
        key = override.get_key_element()
        if override.is_interval_sweep():
            draws.append([f"{key}={value}" for value in samples(override)])
        elif override.is_sweep_override():
            draws.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        else:
            draws.append([str(override.input_line)])
    return [
        [values[min(i, len(values) - 1)] for values in draws] for i in range(max(map(len, draws), default=1))
    ]


@contextmanager
def _session(flags: Flags) -> Iterator[Composer]:
    """Hydra over the config folders, and the user's own modules within reach."""
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # the console script, unlike ``python -m``, leaves it out
    with composer(flags.config_dir) as found, spec.trust(user_modules=True):
        yield found


@contextmanager
def planned(flags: Flags) -> Iterator[Plan]:
    """A validated plan, for verbs that look at an experiment without running it."""
    with _session(flags) as found:
        yield plan(flags, found)


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
        made = plan(flags, found)
        gc.enable()
        preflight(made.points)
        return _sweep(made) if flags.multirun else _single(made)


def _show(flags: Flags, composer: Composer) -> int:
    """Print the composed config, right or wrong, then say what is wrong with it."""
    parsed = composer.parse(flags.overrides)
    _refuse_sweeps(parsed)
    found = composer.compose([str(o.input_line) for o in parsed], hydra=flags.cfg != "job")
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


def distinct(points: Iterable[Composition]) -> Iterator[dict[str, Any]]:
    """Every config and stage that differs in more than its seed."""
    seen = set()
    for point in points:
        for config in (point.config, *(stage.config for stage in point.stages.values())):
            key = json.dumps({**config, "seed": None, "stages": None}, sort_keys=True, default=str)
            if key not in seen:
                seen.add(key)
                yield config


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
    from kdlab.runs.compare import sweep_table

    own = as_typed(made.texts)
    folder = sweep.sweep_folder(made.points[0].config, own, made.searched)
    total = made.jobs
    jobs = [] if made.searched else [_folder(folder, made, point) for point in made.points]
    sweep.write_record(folder, own, [job.name for job in jobs])
    parallel = _share_cores(made.hydra, total)
    print(
        f"sweep of {total} jobs in {folder}" + (f", {parallel} at a time" if parallel > 1 else ""), flush=True
    )
    hydra = GlobalHydra.instance().hydra
    assert hydra is not None
    broken: Exception | None = None
    try:
        task = Job(folder, made.composer, made.swept, total, parallel)
        hydra.multirun(CONFIG, task, _for_hydra(made, folder, parallel))
    except (
        Exception
    ) as error:  # the launcher died, such as a worker killed for memory; jobs themselves never raise
        broken = error
    if made.searched:
        jobs = sorted(path for path in folder.iterdir() if path.is_dir() and path.name != "compare")
        sweep.write_record(folder, own, [job.name for job in jobs])
    print(f"\n{sweep_table(folder)}", flush=True)
    if broken is not None:
        raise RunFailed(
            f"the sweep stopped: {type(broken).__name__}: {broken}; the same command goes on in {folder}"
        ) from broken
    failed = [job for job in jobs if sweep.read_result(job).get("status") != "finished"]
    if failed:
        print(
            f"kdlab: error: {len(failed)} of {len(jobs)} jobs did not finish; the same command runs them",
            file=sys.stderr,
        )
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
