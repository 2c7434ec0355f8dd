"""Treatment of Hydra's own flags and settings: each is honoured, or refused with the way to get the same."""

from __future__ import annotations

import copy
import json
import re
import textwrap
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, is_dataclass
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import Any

from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from kdlab.cli.hydra.compose import JOB_NAME, Composition, as_typed
from kdlab.cli.hydra.internals import unresolved
from kdlab.errors import UserError
from kdlab.system.files import read_yaml

RUN_DIR = "hydra.run.dir"
SWEEP_DIR = "hydra.sweep.dir"

UNSET = {
    RUN_DIR: "outputs/${now:%Y-%m-%d}/${now:%H-%M-%S}",
    SWEEP_DIR: "multirun/${now:%Y-%m-%d}/${now:%H-%M-%S}",
    "hydra.sweep.subdir": "${hydra.job.num}",
    "hydra.output_subdir": ".hydra",
}
"""Values of settings that nobody has set, as Hydra fills them in: kdlab then names the folders."""

SUMMARY = [
    ("FLAGS", ""),
    ("-m, --multirun", "a sweep; hydra.mode=MULTIRUN means the same"),
    ("-r, --run", "one run, as without it"),
    ("-c, --cfg job|hydra|all", "print the composed config; -p KEY a part of it, --resolve without interpolations"),
    ("-i, --info [WHAT]", "how the config came about"),
    ("-cd, --config-dir DIR", "options that are found before those of ./conf, and those before the shipped ones"),
    ("-cp, -cn", "refused: options lie in ./conf, an experiment of yours is ./conf/experiment/NAME.yaml"),
    ("--experimental-rerun", "refused: the same command with resume=RUN"),
    ("-sc, --shell-completion", "tab completion of the command kdlab"),
    ("SETTINGS, typed or in a file of yours", ""),
    (RUN_DIR, "the folder of a run, instead of one under output/name; teachers and caches stay in output"),
    (SWEEP_DIR, "the folder of a sweep; the same command goes on in it"),
    ("hydra.job.env_set", "environment variables, set before anything is built"),
    ("hydra.job.env_copy", "nothing to do: jobs have the environment of the command"),
    ("hydra.job.name", "what ${hydra.job.name} means in a folder; the name of a run is name=NAME"),
    ("hydra.job.config.override_dirname", "how ${hydra.job.override_dirname} is written in a folder"),
    ("hydra/launcher, hydra.launcher.*", "how the jobs of a sweep start: basic, joblib, ..."),
    ("hydra/sweeper, hydra.sweeper.*", "how a sweep chooses: grid, optuna; params: what a file sweeps over"),
    ("hydra.callbacks.*", "called by Hydra around each run"),
]
"""Flags and settings that do something, for ``--hydra-help``; those refused are in ``REFUSED`` too."""


@dataclass(frozen=True)
class Refused:
    """A setting of Hydra's that kdlab has no use for.

    ``accepted`` are its values that change nothing; ``way`` is what to do instead.
    """

    key: str
    accepted: tuple[Any, ...]
    way: str


REFUSED = (
    Refused("hydra.job.chdir", (None, False), f"false: kdlab stays in the working folder; {RUN_DIR} names a run's own"),
    Refused("hydra.verbose", (None, False), "false: the log is run.log; tracebacks: KDLAB_TRACEBACK=1"),
    Refused("hydra.output_subdir", (None,), "null: config.yaml and overrides.yaml lie in the run folder itself"),
    Refused("hydra.searchpath", ([],), "--config-dir DIR, or a folder ./conf"),
)  # fmt: skip

LOGGING = ("hydra/job_logging", "hydra/hydra_logging")
SILENT = ("none", "disabled")
"""Options of Hydra's logging that log nothing."""

OWN_LOG = "none: kdlab writes its own log, to standard error and run.log in the run folder"

UNUSED_GROUPS = ("hydra/help", "hydra/hydra_help", "hydra/env", "hydra/output")

SET_BY_HYDRA = (
    "hydra.runtime",
    "hydra.overrides",
    "hydra.job.id",
    "hydra.job.num",
    "hydra.job.override_dirname",
    "hydra.job.config_name",
)

TEMPLATES = ("hydra.help", "hydra.hydra_help")


def summary() -> str:
    """Return the text of ``--hydra-help``: every flag and setting of Hydra's, and what becomes of it."""
    rows = [*SUMMARY, *((one.key, f"refused; accepted: {one.way}") for one in REFUSED)]
    rows.append(("hydra.sweep.subdir", "refused: a job's folder is named by its swept values"))
    rows += [(group, f"refused; accepted: {OWN_LOG}") for group in LOGGING]
    lines = ["Hydra composes the configuration; runs, folders, logs and tables are kdlab's."]
    for name, text in rows:
        lead = f"  {name:<34}" if text else f"\n{name}"
        lines += textwrap.wrap(text, 110, initial_indent=lead, subsequent_indent=" " * 36) if text else [lead]
    return "\n".join(lines)


def is_multirun(composition: Composition) -> bool:
    """Return whether ``hydra.mode`` asks for a sweep, typed or in a file."""
    return composition.hydra.mode == RunMode.MULTIRUN


def check(composition: Composition, typed: Collection[str], multirun: bool) -> None:
    """Refuse settings of Hydra's that would do nothing.

    Args:
        composition: composed config, with Hydra's settings as the user and their files left them.
        typed: the keys and groups on the command line.
        multirun: true if the command is a sweep.

    Raises:
        UserError: names the setting, and the way to get the same.
    """
    whole = OmegaConf.create({"hydra": OmegaConf.to_container(composition.hydra, resolve=False)})
    for one in REFUSED:
        value = OmegaConf.select(whole, one.key)
        value = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
        unset = one.key not in typed and value == UNSET.get(one.key)
        if not unset and not any(value == v and type(value) is type(v) for v in one.accepted):
            raise UserError(one.key, f"{json.dumps(value)}", one.way)
    _check_logging(whole, typed)
    for key in sorted(typed):
        if key.startswith("hydra"):
            _check_typed(key, whole, multirun)
    subdir = "hydra.sweep.subdir"
    value = unresolved(whole, "hydra.sweep.subdir")
    if value != UNSET[subdir] and (multirun or subdir in typed):
        raise UserError(subdir, value, "leave it out: a job's folder is named by its swept values")
    if "hydra.job.name" in typed and not any(
        _is_set(composition, key, typed) and re.search(r"\$\{hydra[.:]job\.name", _raw(composition, key))
        for key in UNSET
    ):
        raise UserError(
            "hydra.job.name",
            f"{composition.hydra.job.name}, and no folder of Hydra's says ${{hydra.job.name}}",
            "name=NAME, the name of the experiment and of its folder",
        )


def _check_typed(key: str, whole: DictConfig, multirun: bool) -> None:
    """Refuse a setting that does nothing, if somebody types it; in a file it may be there for other programs."""
    if key == RUN_DIR and multirun:
        raise UserError(key, "and this is a sweep", f"{SWEEP_DIR}=DIR")
    if key == SWEEP_DIR and not multirun:
        raise UserError(key, "and this is one run", f"{RUN_DIR}=DIR, or -m before a sweep")
    if key in UNUSED_GROUPS and whole.hydra.runtime.choices.get(key) != "default":
        raise UserError(key, "has no use here", "leave it out")
    if key.startswith(tuple(f"{one}." for one in TEMPLATES)):
        raise UserError(key, "has no use here", "leave it out (python -m kdlab --help is not a template)")
    if any(key == one or key.startswith(f"{one}.") for one in SET_BY_HYDRA):
        raise UserError(key, "Hydra sets it", "leave it out")
    if not _is_known(HydraConf(), key.split(".")[1:]):
        raise UserError(key, "not a setting of Hydra's", "those of --cfg hydra")


def _is_known(node: Any, path: list[str]) -> bool:
    """Return whether a setting is one of Hydra's, or lies in an open one (callbacks, launcher, sweeper, env_set)."""
    if not path or not is_dataclass(node):
        return True
    return path[0] in {one.name for one in fields(node)} and _is_known(getattr(node, path[0]), path[1:])


def _check_logging(whole: DictConfig, typed: Collection[str]) -> None:
    for group in LOGGING:
        choice = whole.hydra.runtime.choices.get(group)
        key = group.replace("/", ".")
        if choice in SILENT or (choice is None and group in typed):
            continue
        if choice != "default" or group in typed:
            raise UserError(group, choice, OWN_LOG)
        own = OmegaConf.to_container(OmegaConf.select(whole, key), resolve=False)
        if own != read_yaml(Path(str(resources.files("hydra.conf") / f"{group}/default.yaml"))):
            raise UserError(key, "has no use here", "leave it out: kdlab writes its own log")


# ---- folders


def run_folder(composition: Composition, typed: Collection[str]) -> Path | None:
    """Return the folder that ``hydra.run.dir`` names; None where nobody set it.

    Raises:
        UserError: if it cannot be resolved, or is no folder's name.
    """
    return _folder(composition, RUN_DIR, datetime.now()) if _is_set(composition, RUN_DIR, typed) else None


def sweep_folder(points: list[Composition], typed: Collection[str]) -> Path | None:
    """Return the folder that ``hydra.sweep.dir`` names; None where nobody set it.

    Raises:
        UserError: if it cannot be resolved, or is another one for every job.
    """
    if not _is_set(points[0], SWEEP_DIR, typed):
        return None
    now = datetime.now()
    first, last = (_folder(point, SWEEP_DIR, now) for point in (points[0], points[-1]))
    if first != last:
        raise UserError(SWEEP_DIR, f"{first} and {last}", "one folder for all jobs of a sweep")
    return first


def _raw(composition: Composition, key: str) -> str:
    """Return a setting as it was written, interpolations and all."""
    return unresolved(composition.hydra, key.removeprefix("hydra."))


def _is_set(composition: Composition, key: str, typed: Collection[str]) -> bool:
    return key in typed or _raw(composition, key) != UNSET[key]


def _folder(composition: Composition, key: str, now: datetime) -> Path:
    """Return the folder that a setting names, resolved as Hydra does it."""
    raw = _raw(composition, key)
    # one time for all jobs, stages and processes of a command
    text = re.sub(r"\$\{now:([^}]*)\}", lambda match: now.strftime(match[1]), raw)
    whole = copy.deepcopy(composition.tree)
    with open_dict(whole):
        whole["hydra"] = copy.deepcopy(composition.hydra)
        job = whole.hydra.job
        if job.name == JOB_NAME:
            job.name = str(composition.config.get("name") or JOB_NAME)
        job.override_dirname = _override_dirname(composition, job)
        OmegaConf.update(whole, key, text)
    try:
        with _as_hydras(whole):
            resolved = str(OmegaConf.select(whole, key, throw_on_missing=True))
    except Exception as error:  # OmegaConf raises many sorts, and resolvers whatever they like
        reason = " ".join(str(error).split(" full_key")[0].split())
        raise UserError(key, f"{raw}: cannot be resolved ({reason})", "a folder") from None
    if not resolved.strip() or "\0" in resolved:
        raise UserError(key, f"{resolved!r}", "a folder")
    return Path(resolved)


def _override_dirname(composition: Composition, job: DictConfig) -> str:
    """Return Hydra's ``override_dirname`` of all that was typed; the composer gives Hydra the group choices alone."""
    form = job.config.override_dirname
    typed = as_typed(composition.overrides)
    kept = [text for text in typed if text.lstrip("+").split("=")[0] not in form.exclude_keys]
    return form.item_sep.join(sorted(text.replace("=", form.kv_sep, 1) for text in kept))


@contextmanager
def _as_hydras(whole: DictConfig) -> Iterator[None]:
    """Let ``${hydra:...}`` look into these settings."""
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(whole)
    try:
        yield
    finally:
        HydraConfig.instance().cfg = before


# ---- environment


def environment(composition: Composition) -> dict[str, str]:
    """Return ``hydra.job.env_set`` without what only a job knows (``${hydra.job.num}``), which is left to Hydra."""
    given = {}
    for name in composition.hydra.job.env_set:
        with suppress(Exception):  # an interpolation that does not resolve yet
            given[str(name)] = str(composition.hydra.job.env_set[name])
    return given
