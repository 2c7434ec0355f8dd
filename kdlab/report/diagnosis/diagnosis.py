"""Counts of what a student lost of its teacher, and what it inherited, over answers to the same examples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

FORMAT = 1
"""Version of ``diagnosis.json``."""

BINS = 15
"""Number of bins of the calibration, as everywhere in kdlab."""

ROLES = ("teacher", "student", "baseline")

KINDS = {
    "inherited": "wrong as the teacher is, in the same class",
    "own": "wrong where the teacher is right",
    "other": "wrong where the teacher is, in another class",
    "corrected": "right where the teacher is wrong",
}
"""Kinds of a network's answer beside the teacher's, where not both are right; the first three are errors."""

ALONE = {"errors": "wrong"}
BESIDE_BASELINE = {
    "lost": "wrong where the baseline is right",
    "shared": "wrong where the baseline is too",
    "gained": "right where the baseline is wrong",
}


def diagnose(
    logits: Mapping[str, Tensor],
    targets: Tensor,
    classes: Sequence[str],
    slices: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Any]:
    """Count everything that stands in ``diagnosis.json``.

    Args:
        logits: map of role (``student``, and perhaps ``teacher`` and ``baseline``) → (N, C), of the same examples in
            order.
        targets: (N,) class ids.
        classes: name of each class.
        slices: map of column name → the group of each example, N texts.

    Returns:
        Plain numbers, texts and lists; examples are numbers from 0 in the order of the split.
    """
    roles = [role for role in ROLES if role in logits]
    predictions = {role: logits[role].argmax(-1) for role in roles}
    result: dict[str, Any] = {
        "examples": len(targets),
        "classes": list(classes),
        "networks": {role: network(logits[role], targets) for role in roles},
    }
    if "teacher" in predictions:
        result["against_teacher"] = {
            role: {
                "agreement": _share(predictions[role] == predictions["teacher"]),
                **_listed(predictions[role], predictions["teacher"], targets),
            }
            for role in roles
            if role != "teacher"
        }
    if "baseline" in predictions:
        result["against_baseline"] = against_baseline(predictions["student"], predictions["baseline"], targets)
    result["per_class"] = [
        {"class": name, **_part(predictions, targets, targets == number)} for number, name in enumerate(classes)
    ]
    result["slices"] = {
        column: [
            {"value": value, **_part(predictions, targets, torch.tensor([one == value for one in groups]))}
            for value in sorted(set(groups), key=_natural)
        ]
        for column, groups in (slices or {}).items()
    }
    result["confusions"] = confusions(predictions, targets, classes)
    result["disagreements"] = disagreements(predictions, targets, classes) if "teacher" in predictions else []
    result["targets"] = targets.tolist()
    result["predictions"] = {role: predictions[role].tolist() for role in roles}
    return result


def network(logits: Tensor, targets: Tensor) -> dict[str, Any]:
    """Return accuracy, errors and calibration of one network.

    ``ece`` is the expected calibration error over 15 bins (Guo et al., *On Calibration of Modern Neural Networks*, ICML
    2017), ``overconfidence`` the mean confidence less the accuracy.
    """
    logs = logits.double().log_softmax(-1)
    sure, first = logs.exp().max(-1)
    right = first == targets
    bins = []
    # right-closed, so that a confidence of 1 is in the last
    number = (sure * BINS).ceil().long().sub(1).clamp(0, BINS - 1)
    for n in range(BINS):
        inside = number == n
        if inside.any():
            numbers = {"confidence": _share(sure[inside]), "accuracy": _share(right[inside])}
            bins.append({"low": n / BINS, "high": (n + 1) / BINS, "examples": int(inside.sum()), **numbers})
    ece = sum(one["examples"] * abs(one["accuracy"] - one["confidence"]) for one in bins) / max(len(targets), 1)
    return {
        "accuracy": _share(right),
        "errors": int((~right).sum()),
        "cross_entropy": _share(-logs.gather(1, targets[:, None])[:, 0]),
        "confidence": _share(sure),
        "overconfidence": _share(sure) - _share(right),
        "ece": ece,
        "calibration": bins,
    }


def kinds(said: Tensor, teacher: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Return which examples are of each of :data:`KINDS`: (N,) bool by name."""
    right, taught = said == targets, teacher == targets
    return {
        "inherited": ~right & ~taught & (said == teacher),
        "own": ~right & taught,
        "other": ~right & ~taught & (said != teacher),
        "corrected": right & ~taught,
    }


def against_baseline(student: Tensor, baseline: Tensor, targets: Tensor) -> dict[str, Any]:
    """Compare the right answers of student and baseline, with the p-value of the difference.

    ``p`` is that of the exact sign test (McNemar's): how probable a difference of this size or more is, if each example
    that only one of the two gets right were as likely to be the one's as the other's.
    """
    right, alone = student == targets, baseline == targets
    masks = {"lost": ~right & alone, "shared": ~right & ~alone, "gained": right & ~alone}
    listed = _masks(masks)
    return {**listed, "p": sign_test(listed["gained"], listed["lost"])}


def sign_test(a: int, b: int) -> float:
    """Return the two-sided p of ``a`` against ``b`` draws of a fair coin.

    >>> round(sign_test(5, 1), 5)
    0.21875
    """
    n, k = a + b, min(a, b)
    if a == b:
        return 1.0
    logs = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2) for i in range(k + 1)]
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))


def confusions(said: Mapping[str, Tensor], targets: Tensor, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Return pairs (true class, wrong class) with each network's count, the student's most frequent first."""
    counts = {role: _pairs(targets, answer, len(classes)) for role, answer in said.items()}
    pairs = set().union(*counts.values())
    rows = [
        {"true": classes[t], "said": classes[p], **{role: count.get((t, p), 0) for role, count in counts.items()}}
        for t, p in sorted(pairs)
    ]
    return sorted(rows, key=lambda row: (-row["student"], -(row["student"] - row.get("teacher", 0))))


def disagreements(said: Mapping[str, Tensor], targets: Tensor, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Return pairs (teacher's class, student's class), most frequent first, with how often each of the two is right."""
    student, teacher = said["student"], said["teacher"]
    counts = _pairs(teacher, student, len(classes))
    right = _pairs(teacher, student, len(classes), student == targets)
    taught = _pairs(teacher, student, len(classes), teacher == targets)
    rows = [
        {
            "teacher": classes[t],
            "student": classes[s],
            "examples": count,
            "student_right": right.get((t, s), 0),
            "teacher_right": taught.get((t, s), 0),
        }
        for (t, s), count in sorted(counts.items())
    ]
    return sorted(rows, key=lambda row: -row["examples"])


def most_confident_errors(logits: Mapping[str, Tensor], targets: Tensor, most: int) -> dict[str, tuple[str, list[int]]]:
    """Return the examples of each kind that a network is most sure of: kind → (its meaning, their numbers).

    With a teacher the kinds are :data:`KINDS`; else they compare with the baseline, or hold all errors.
    """
    predictions = {role: values.argmax(-1) for role, values in logits.items()}
    sure = {role: values.double().softmax(-1).max(-1).values for role, values in logits.items()}
    student = predictions["student"]
    if "teacher" in predictions:
        masks, names, reference = kinds(student, predictions["teacher"], targets), dict(KINDS), "teacher"
    elif "baseline" in predictions:
        right, alone = student == targets, predictions["baseline"] == targets
        masks = {"lost": ~right & alone, "shared": ~right & ~alone, "gained": right & ~alone}
        names, reference = dict(BESIDE_BASELINE), "baseline"
    else:
        masks, names, reference = {"errors": student != targets}, dict(ALONE), "student"
    chosen = {}
    for kind, mask in masks.items():
        # of what the student got right, how sure the other one was of its mistake
        by = sure[reference if kind in ("corrected", "gained") else "student"]
        order = torch.where(mask, by, -1.0).argsort(descending=True, stable=True)
        chosen[kind] = (names[kind], order[: min(int(mask.sum()), most)].tolist())
    return chosen


def _part(predictions: Mapping[str, Tensor], targets: Tensor, mask: Tensor) -> dict[str, Any]:
    """Return accuracies and kinds of errors of some of the examples."""
    own = targets[mask]
    answers = {role: answer[mask] for role, answer in predictions.items()}
    counts: dict[str, Any] = {"examples": len(own)}
    counts["accuracy"] = {role: _share(answer == own) if len(own) else None for role, answer in answers.items()}
    if "teacher" in predictions:
        masks = kinds(answers["student"], answers["teacher"], own)
        counts |= {kind: int(one.sum()) for kind, one in masks.items()}
    return counts


def _listed(predicted: Tensor, teacher: Tensor, targets: Tensor) -> dict[str, Any]:
    return _masks(kinds(predicted, teacher, targets))


def _masks(masks: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the number of examples in each mask, and their indices."""
    counts: dict[str, Any] = {name: int(mask.sum()) for name, mask in masks.items()}
    return {**counts, "numbers": {name: mask.nonzero()[:, 0].tolist() for name, mask in masks.items()}}


def _pairs(a: Tensor, b: Tensor, classes: int, where: Tensor | None = None) -> dict[tuple[int, int], int]:
    """Return (a, b) → number of examples, of those where the two differ."""
    differ = a != b if where is None else (a != b) & where
    codes, counts = (a[differ] * classes + b[differ]).unique(return_counts=True)
    return {divmod(code, classes): count for code, count in zip(codes.tolist(), counts.tolist(), strict=True)}


def _share(values: Tensor) -> float:
    return float(values.double().mean()) if len(values) else math.nan


def _natural(text: str) -> tuple[int, float, str]:
    """Return a sort key: numbers, and what begins with one, by their size, before all other texts."""
    try:
        return 0, float(text.split(" ")[0]), text
    except ValueError:
        return 1, 0.0, text
