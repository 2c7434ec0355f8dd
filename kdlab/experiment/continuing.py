"""Longer training of a run: a new run that starts from the last state of an old one."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kdlab.config.builder import flatten
from kdlab.errors import UserError
from kdlab.experiment.schema import Experiment
from kdlab.methods.lightning_internals import epochs_done
from kdlab.runs import folder as folders
from kdlab.system.files import Unreadable, atomic_write, file_hash
from kdlab.training.checkpoints import read_checkpoint

log = logging.getLogger("kdlab")

MAY_DIFFER = ("epochs", "optimizer", "scheduler")
"""Keys in which a run may differ from the one whose last state it starts from."""

LAST = Path("checkpoints", "last.ckpt")
"""Checkpoint that training goes on from, in the folder of a fit."""


def with_start(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with ``continued_from`` where ``resume`` names a run trained for fewer epochs.

    Where it names a run of the same configuration, that run goes on as it is, and nothing changes here.

    Args:
        config: configuration, resolved and plain.

    Raises:
        UserError: if the run differs in a key outside of ``MAY_DIFFER``, has no state to start from, or has been
            trained for as many epochs already.
    """
    config = dict(config)
    if config.get("resume") in (None, "auto"):
        return config
    run = Path(str(config["resume"]))
    if not (run / "config.yaml").is_file():
        return config  # said where the run is looked for
    old = folders.read_config(run)
    differing = _differing(old, config)
    if not differing:
        return config | {key: old[key] for key in ("continued_from",) if key in old}
    foreign = [key for key in differing if not key.startswith(MAY_DIFFER)]
    if foreign:
        difference = folders.difference(foreign[0], old, config)
        raise UserError(
            "resume",
            f"{run} has another configuration: {difference}",
            (
                f"the same, or one that differs in nothing but {', '.join(MAY_DIFFER)}, to be "
                "trained longer from its last state"
            ),
        )
    return config | {"continued_from": _start(run, old, config)}


def _differing(old: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    configured = {key: value for key, value in config.items() if key != "continued_from"}
    recorded = {key: value for key, value in old.items() if key != "continued_from"}
    return folders.differing_keys(recorded, configured)


def _start(run: Path, old: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the value of ``continued_from``: the run, its epochs, and the hash of its last state."""
    for one in (old, config):
        if one.get("stages") or (one.get("method") or {}).get("generations", 1) != 1:
            raise UserError(
                "resume",
                f"{run} with other epochs, and it has several fits (stages or generations)",
                (
                    "a run of one fit, or its student as a start: init=pretrained pretrained=trained "
                    f"pretrained.checkpoint={run}/student.pt"
                ),
            )
    if (config.get("method") or {}).get("self_teacher") == "snapshot":
        raise UserError(
            "resume", f"{run} with other epochs, and its snapshots divide the epochs among them", "another method"
        )
    recorded, configured = (flatten(one).get("optimizer._target_") for one in (old, config))
    if recorded != configured:
        raise UserError(
            "optimizer", f"{configured}, and {run} holds the state of {recorded}", "the same with other settings"
        )
    try:
        state, done = file_hash(run / LAST), trained_epochs(run / LAST)
    except (OSError, Unreadable) as error:
        raise _unreadable(run, error) from None
    if config["epochs"] <= done:
        raise UserError("epochs", f"{config['epochs']}, and {run} has been trained for {done}", f"above {done}")
    return {"run": str(run), "epochs": done, "state": state}


def _unreadable(run: Path, error: Exception) -> UserError:
    return UserError("resume", f"{run / LAST} cannot be read ({error})", "a run that still has its checkpoint")


def trained_epochs(checkpoint: Path) -> int:
    """Return the number of whole epochs that a checkpoint has seen."""
    return epochs_done(read_checkpoint(checkpoint))


def copy_state(experiment: Experiment, folder: Path) -> None:
    """Give a new run folder the state of the run that it starts from, unless it has one of its own by now.

    Raises:
        UserError: if that run is gone, or its state is another one by now.
    """
    start = experiment.continued_from
    if start is None or (folder / LAST).exists():
        return
    run = Path(start["run"])
    try:
        same = file_hash(run / LAST) == start["state"]
    except (OSError, Unreadable) as error:
        raise _unreadable(run, error) from None
    if not same:
        raise UserError("resume", f"{run / LAST} has changed since", "the state that this run was to start from")
    log.info("training goes on from the last state of %s (%d epochs) in a new run", run, start["epochs"])
    copy_training_state(run, folder)


def copy_training_state(source: Path, folder: Path) -> None:
    """Copy checkpoint, best weights and curves of one fit's folder into another; the checkpoint last, and whole."""
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / "checkpoints" / "best.pt", folder / "checkpoints" / "best.pt")
    if (source / "curves.jsonl").is_file():
        shutil.copyfile(source / "curves.jsonl", folder / "curves.jsonl")
    state = read_checkpoint(source / LAST)
    for saved in state["callbacks"].values():
        if isinstance(saved, dict) and "stopped" in saved:
            saved["stopped"] = False  # early stopping ended that run, and not this one
    with atomic_write(folder / LAST) as file:
        torch.save(state, file)


def before(experiment: Experiment) -> Experiment | None:
    """Return the experiment whose last state this one starts from; None without one, or where that run is gone."""
    if experiment.continued_from is None:
        return None
    try:
        return Experiment.of(folders.read_config(Path(experiment.continued_from["run"])))
    except UserError as error:
        log.warning("the run that this one started from: %s", error)
        return None


def first_part(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what ``result.json`` records of the run that this one started from; None where it started by itself.

    Where that run is gone by now, only what was known of it at the start.
    """
    start = config.get("continued_from")
    if start is None:
        return None
    run = Path(start["run"])
    try:
        recorded = folders.read_config(run)
    except UserError:
        return dict(start)
    old, new = flatten(recorded), flatten(config)
    known = folders.read_result(run) or {}
    return {
        **start,
        "config_hash": known.get("config_hash"),
        "steps": known.get("steps"),
        "seconds": (known.get("seconds") or {}).get("student"),
        "changed": {key: [old.get(key), new.get(key)] for key in _differing(recorded, config)},
    }
