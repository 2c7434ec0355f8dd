"""Names that configs had before, and their names now: for errors that say so, and for results of earlier runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

KEYS = {
    "source": "batch_transform",
    "companion": "auxiliary",
    "method.source": "method.self_teacher",
    "teacher.weighing": "teacher.weighting",
    "data.arrange": "data.pairing",
    "data.ratio": "data.unlabelled_ratio",
    "data.outside": "data.ood",
}
"""Key or group → its name now; keys below it keep theirs."""

VALUES = {
    ("method.source", "step"): "method.self_teacher=none",
    ("init", "cut"): "init=layer_subset",
    ("init", "classifier"): "init=teacher_head",
    ("temperature", "one"): "temperature=none, or loss.temperature=1",
    ("temperature", "five"): "loss.temperature=5",
}
"""Key and value → the text that is typed now."""

TARGETS = {
    "kdlab.data.attack.AttackedRows": "kdlab.batch_transforms.AttackedRows",
    "kdlab.data.data_free.GeneratedRows": "kdlab.batch_transforms.GeneratedRows",
    "kdlab.data.data_free.InvertedRows": "kdlab.batch_transforms.InvertedRows",
    "kdlab.data.strong_view.StrongViews": "kdlab.batch_transforms.StrongViews",
    "kdlab.data.text.own.OwnText": "kdlab.batch_transforms.GeneratedText",
    "kdlab.losses.LastStepKL": "kdlab.losses.DLB",
    "kdlab.losses.PartnerKL": "kdlab.losses.CSKD",
    "kdlab.methods.Training": "kdlab.training.TrainerConfig",
    "kdlab.models.Reused": "kdlab.models.SimKDStudent",
    "kdlab.models.adapters.lora": "kdlab.models.LoRA",
    "kdlab.models.companions.Exits": "kdlab.models.Exits",
    "kdlab.models.companions.peers": "kdlab.models.peers",
}
"""``_target_`` → its name now."""


def current(key: str, value: object = None) -> str | None:
    """Return the current name of a former key (and value); None where nothing changed.

    >>> current("data.ratio", 7), current("source.eps", 0.1), current("init", "cut"), current("init", "fresh")
    ('data.unlabelled_ratio', 'batch_transform.eps', 'init=layer_subset', None)
    """
    if isinstance(value, str) and (key, value) in VALUES:
        return VALUES[key, value]
    owner, _, own = key.partition("teacher.data.")
    if own and not owner:  # a teacher's data have the keys of data
        below = current(f"data.{own}")
        return f"teacher.{below}" if below else None
    for old, new in KEYS.items():
        if key == old or key.startswith(f"{old}."):
            return new + key.removeprefix(old)
    return None


def with_current_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flat settings of a run under the current names."""
    return {current(key) or key: value for key, value in settings.items()}
