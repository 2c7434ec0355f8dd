"""Scores that runs are judged by, and every number of a run that a comparison can show or sort by."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from kdlab.plain_text import one_line
from kdlab.runs.formatting import count, decimal, number, percent, seconds, size
from kdlab.runs.read import Run, Stat, finite, mapping

SPLITS = ("val", "test", "ood")
"""Splits that a model is measured on; ``ood`` is text from outside the domain that the student was taught."""


class Score(NamedTuple):
    """Score that models are judged by, with its names and how it is written."""

    key: str
    """Key of the score in ``result.json``."""
    short: str
    long: str
    fraction: bool
    """Whether it is a fraction that is shown in per cent."""
    higher: bool
    """Whether more is better."""

    @property
    def unit(self) -> str:
        """Heading of a column: ``acc %``, ``ppl``."""
        return f"{self.short} %" if self.fraction else self.short

    def form(self, value: float | None) -> str | None:
        """Format a score."""
        return percent(value) if self.fraction else decimal(value)

    def difference(self, value: float | None) -> str | None:
        """Format a difference of two scores, with its sign; fractions in points."""
        return percent(value, True) if self.fraction else decimal(value, True)

    def deviation(self, spread: float, around: float) -> str | None:
        """Format a standard deviation, with the decimals of the mean that it belongs to."""
        return percent(spread) if self.fraction else decimal(spread, like=around)

    def verdict(self, difference: float) -> str:
        """Return whether a difference is better, worse or the same: where less is better, its sign alone misleads."""
        return "same" if not difference else "better" if (difference > 0) == self.higher else "worse"


SCORES = {
    one.key: one
    for one in (
        Score("acc", "acc", "accuracy", True, True),
        Score("robust_acc", "robust", "accuracy under attack", True, True),
        Score("ppl", "ppl", "perplexity", False, False),
        Score("ce", "CE", "cross-entropy", False, False),
        Score("em", "em", "exact match", True, True),
        Score("ppl_word", "word ppl", "perplexity of words", False, False),
        Score("wer", "WER", "word error rate", True, False),
        Score("cer", "CER", "character error rate", True, False),
    )
}
"""Known scores, by their key in ``result.json``."""

_UNSAID = ("acc", "ppl", "ce")
"""Scores for a result without ``score``: it is judged by the first of these that was measured."""

_ALWAYS_THERE = ("acc", "ce")
"""Measures of a language model that say nothing which its score does not say: in no table unless asked for."""


def score_named(key: str, higher: bool | None = None) -> Score | None:
    """Return a score by its key; None for an unknown key, unless ``higher`` says how to read it."""
    if key in SCORES:
        return SCORES[key] if higher is None else SCORES[key]._replace(higher=higher)
    if re.fullmatch(r"pass@\d{1,6}", key):
        return Score(key, key, f"solved in {key.removeprefix('pass@')} attempts", True, higher is not False)
    if key.startswith("acc_"):  # of one of several tasks
        task = one_line(key.removeprefix("acc_"))
        return Score(key, task, f"accuracy of {task}", True, higher is not False)
    return None if higher is None else Score(key, one_line(key), one_line(key), False, higher)


def score_of(runs: Sequence[Run]) -> Score:
    """Return the score that these runs are judged by: the one they name, else accuracy, perplexity or cross-entropy."""
    for run in runs:
        recorded = mapping(run.result.get("score"))
        name, greater = recorded.get("name"), recorded.get("greater")
        if isinstance(name, str) and (score := score_named(name, greater if isinstance(greater, bool) else None)):
            return score
    for key in _UNSAID:
        if any(run.number(run.subject, split, key) is not None for run in runs for split in ("val", "test")):
            return SCORES[key]
    return SCORES["acc"]


def further(runs: Sequence[Run]) -> list[Score]:
    """Return the other scores that any model of these runs has, in a fixed order."""
    measured = (mapping(model.get(split)) for run in runs for model in run.models.values() for split in SPLITS)
    keys = {key for one in measured for key, value in one.items() if finite(value) is not None}
    known = [one for key in keys - {"ce", score_of(runs).key} if (one := score_named(str(key))) is not None]
    order = list(SCORES)
    return sorted(known, key=lambda one: (order.index(one.key) if one.key in order else 99, len(one.key), one.key))


def headline(runs: Sequence[Run]) -> list[Score]:
    """Return the scores of :func:`further` that belong in every table."""
    return [one for one in further(runs) if one.key not in _ALWAYS_THERE]


def beside(run: Run, split: str, score: Score) -> float | None:
    """Return the student's score less the baseline's: the same student, on the same budget, without its teacher."""
    mine, alone = run.number(run.subject, split, score.key), run.number("baseline", split, score.key)
    return None if mine is None or alone is None else mine - alone


def gap_closed(run: Run, split: str, score: Score) -> float | None:
    """Return the part of the way from baseline to teacher that the student went, (s - b) / (t - b).

    0 is the baseline and 1 the teacher, whichever direction is better; None where the teacher is no better than the
    baseline, and there is no gap to close.
    """
    gained = beside(run, split, score)
    teacher, alone = (run.number(role, split, score.key) for role in ("teacher", "baseline"))
    if gained is None or teacher is None or alone is None or score.verdict(teacher - alone) != "better":
        return None
    return gained / (teacher - alone)


@dataclass(frozen=True)
class Measure:
    """Number of a run that tables can show: how to get it, its title, and how to write it."""

    key: str
    title: str
    get: Callable[[Run], float | None]
    form: Callable[[float | None], str | None]
    higher: bool = True
    """Whether more is better, so that higher values come first where rows are sorted by it."""
    spread: bool = True
    """Whether seeds can change it: the deviation of a parameter count says nothing."""
    score: Score | None = None
    """Score that it is one of, or a difference of."""
    verdict: bool = False
    """Whether it is a difference that is called better or worse."""

    def deviation(self, stat: Stat) -> str | None:
        """Format the standard deviation; None for one run."""
        if stat.std is None or not self.spread:
            return None
        return self.score.deviation(stat.std, stat.mean) if self.score else self.form(stat.std)

    def write(self, stat: Stat | None) -> str | None:
        """Format as ``mean ± std``; the mean alone for one run; None where there is no number."""
        if stat is None:
            return None
        spread = self.deviation(stat)
        text = self.form(stat.mean) if spread is None else f"{self.form(stat.mean)} ± {spread}"
        return f"{text} {self.score.verdict(stat.mean)}" if self.verdict and self.score else text


def measures(runs: Sequence[Run]) -> dict[str, Measure]:
    """Return everything that ``compare`` can show or sort by, by key, with ``val`` first: the one that ranks."""
    score = score_of(runs)

    def of(*path: str) -> Callable[[Run], float | None]:
        return lambda run: run.number(run.subject, *path)

    all_of_them = [
        _scored(score, "val", f"val {score.unit}", "val"),
        _scored(score, "test", f"test {score.unit}", "test"),
        _scored(SCORES["em"], "val_em", f"val {SCORES['em'].unit}", "val"),
        _scored(score, "baseline", f"baseline {score.unit}", "test", "baseline"),
        _difference(score, "difference", "test"),
        Measure("gap", "gap closed %", lambda run: gap_closed(run, "test", score), _whole_percent),
        Measure("agreement", "agree %", lambda run: _either(run, "agreement"), percent),
        Measure("inherited", "inherited errors", of("errors", "inherited"), _errors, False),
        Measure("own_errors", "own errors", of("errors", "own"), _errors, False),
        Measure("corrected", "corrected", of("errors", "corrected"), _errors),
        Measure("inherited_baseline", "shared by baseline", _shared, _errors, False),
        Measure("parameters", "params", of("parameters"), count, False, False),
        Measure("seconds", "train s", _seconds, seconds, False),
        Measure("bytes", "size", of("bytes"), size, False, False),
        Measure("flops", "flops", of("flops"), count, False, False),
        Measure("latency", "latency ms", of("latency_ms"), number, False),
        Measure("tokens", "tokens/s", of("tokens_per_s"), count, spread=False),
        _scored(score, "teacher", f"teacher {score.unit}", "test", "teacher"),
        Measure("kl", "KL", lambda run: _either(run, "kl"), _nats, False),
        Measure("val_ce", "val CE", of("val", "ce"), number, False),
        Measure("val_kl", "val KL", of("val", "kl"), number, False),
        Measure("test_ce", "test CE", of("test", "ce"), number, False),
        Measure("test_kl", "test KL", of("test", "kl"), number, False),
        Measure("ece", "test ECE", of("test", "ece"), number, False),
        Measure("best_epoch", "best epoch", lambda run: finite(run.result.get("best_epoch")), count, False),
        Measure("total_seconds", "total s", lambda run: _clock(run, "total"), seconds, False),
        _scored(score, "ood", f"ood {score.unit}", "ood"),
        _scored(score, "ood_teacher", f"ood teacher {score.unit}", "ood", "teacher"),
        _scored(score, "ood_baseline", f"ood baseline {score.unit}", "ood", "baseline"),
        _difference(score, "ood_difference", "ood", f"ood {_title(score)}"),
    ]
    for one in further(runs):
        all_of_them += [
            _scored(one, one.key, f"test {one.unit}", "test"),
            _scored(one, f"{one.key}_teacher", f"teacher {one.unit}", "test", "teacher"),
            _scored(one, f"{one.key}_baseline", f"baseline {one.unit}", "test", "baseline"),
            _difference(one, f"{one.key}_difference", "test", f"{one.short} {_title(one)}"),
        ]
    return {measure.key: measure for measure in all_of_them}


WIDE = ("bytes", "parameters", "tokens", "kl", "seconds", "teacher", "agreement", "gap", "baseline")
"""Columns that a terminal too narrow for the table of language models leaves out, in this order."""


def shown(runs: Sequence[Run]) -> tuple[str, ...]:
    """Return the keys that a table shows by default, as far as they were measured."""
    score = score_of(runs)
    ood = ("ood", "ood_difference")
    others = [key for one in headline(runs) for key in (one.key, f"{one.key}_difference")]
    if score.key == "acc":
        return ("val", "test", "baseline", "difference", *others, *ood, "agreement", "parameters", "seconds")
    first = ("val", "test", "teacher", "baseline", "difference", "gap")
    return (*first, *others, *ood, "agreement", "kl", "parameters", "bytes", "tokens", "seconds")


def _scored(score: Score, key: str, title: str, split: str, role: str | None = None) -> Measure:
    def get(run: Run) -> float | None:
        return run.number(role or run.subject, split, score.key)

    return Measure(key, title, get, score.form, score.higher, score=score)


def _difference(score: Score, key: str, split: str, title: str | None = None) -> Measure:
    def get(run: Run) -> float | None:
        return beside(run, split, score)

    verdict = not score.higher
    return Measure(key, title or _title(score), get, score.difference, score.higher, score=score, verdict=verdict)


def _title(score: Score) -> str:
    return "gain" if score.higher else "vs baseline"


def _nats(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"


def _whole_percent(value: float | None) -> str | None:
    return percent(value, places=0)


def _errors(value: float | None) -> str | None:
    """Format a number of errors, or the mean of several."""
    return None if value is None else f"{value:,.1f}".removesuffix(".0")


def _shared(run: Run) -> float | None:
    return run.number("baseline", "errors", "inherited")


def _either(run: Run, key: str) -> float | None:
    value = run.number(run.subject, "test", key)
    return run.number(run.subject, "val", key) if value is None else value


def _seconds(run: Run) -> float | None:
    value = run.number(run.subject, "seconds")
    return _clock(run, run.subject) if value is None else value


def _clock(run: Run, key: str) -> float | None:
    spent: Any = run.result.get("seconds")
    return finite(spent.get(key)) if isinstance(spent, Mapping) else None
