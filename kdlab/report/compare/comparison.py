"""Comparison of runs: grouped over their seeds, ranked on validation, and written out as rows.

The test split is shown and chooses nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdlab.errors import unknown
from kdlab.plain_text import one_line
from kdlab.report import table
from kdlab.runs.measures import SCORES, Measure, Score, measures, score_of, shown
from kdlab.runs.read import ALPHA, TEMPERATURE, Found, Group, Run, differing, finite, group, same, setting, short

_MOST_SETTINGS = 6
"""Largest number of differing settings that a table shows by default; the rest are in the CSV."""

_PER_TOKEN = ("ppl", "ce")
"""Scores that compare only for the same text, vocabulary and choice of the tokens that count."""

_NOT_THE_TASK = frozenset(
    f"data.{key}"
    for key in (
        *("root", "download", "train", "fraction", "mix", "ood", "rationale_weight", "drop_long"),
        *("batch_size", "eval_batch_size", "context", "pack", "seed", "data_seed", "split_seed"),
    )
)
"""Settings of data that do not change which text and tokens a perplexity measures."""


@dataclass
class Comparison:
    """Comparison of runs: grouped over seeds, ranked, with what differs between them."""

    groups: list[Group]
    measures: dict[str, Measure]
    differs: list[str]
    runs: list[Run]
    """Finished runs that count, those of all groups."""
    failed: list[Run] = field(default_factory=list)
    unfinished: list[Path] = field(default_factory=list)
    repeats: list[Run] = field(default_factory=list)
    ranks: Measure | None = None
    """Measure that the groups are ranked by, best first; None where their scores do not compare."""
    unlike: list[str] = field(default_factory=list)
    """Settings of data that differ, where these make the scores measure different things; else empty."""

    @classmethod
    def of(cls, found: Found, each: bool = False) -> Comparison:
        """Group and rank the runs of a search; ``each`` keeps every run a row of its own."""
        groups, repeats = group(found.finished)
        if each:
            groups = [Group(run.settings, [run]) for run in found.finished]
            repeats = []
        runs = [run for one in groups for run in one.runs]
        numbers = measures(runs)
        differs = _differing(runs, found.failed)
        if each and len({same(run.seed) for run in runs}) > 1:
            differs.append("seed")
        unlike = _unlike(runs)
        ranks = numbers["val"] if not unlike else numbers["val_em"] if _all(runs, numbers["val_em"]) else None
        ranking = groups if ranks is None else ranked(groups, ranks)
        return cls(ranking, numbers, differs, runs, found.failed, found.unfinished, repeats, ranks, unlike)

    @property
    def score(self) -> Score:
        """Score that each run is judged by."""
        return score_of(self.runs)

    @property
    def common(self) -> Score:
        """Score that the runs are compared by: :attr:`score`, or exact match where that does not compare."""
        return self.score if self.ranks is None or self.ranks.score is None else self.ranks.score

    @property
    def order(self) -> str:
        """Order of the groups, in words."""
        return "not ranked" if self.ranks is None else "best on validation first"

    @property
    def seeds(self) -> int:
        """Largest number of runs in one row."""
        return max((len(one.runs) for one in self.groups), default=0)

    @property
    def title(self) -> str:
        """Title in a line: the settings that all runs share, and the number of runs."""
        shared = constant(self.runs, ("name", "data", "teacher", "student"))
        nets = [setting(shared[key]) for key in ("teacher", "student") if shared.get(key) is not None]
        parts = [setting(shared[key]) for key in ("name", "data") if key in shared] + [" → ".join(nets)]
        count = f"{len(self.runs)} run{'s' * (len(self.runs) != 1)}"
        if len(self.groups) != len(self.runs):
            count += f" in {len(self.groups)} setting{'s' * (len(self.groups) != 1)}"
        return " · ".join([part for part in parts if part] + [count])


def _differing(runs: Sequence[Run], failed: Sequence[Run]) -> list[str]:
    """Return the settings that differ between the runs, and those in which only a failed run differs."""
    own = set(differing(runs))
    shared = constant(runs, {key for run in runs for key in run.settings})

    def decided(key: str) -> bool:
        return key in shared and any(same(run.settings.get(key, shared[key])) != same(shared[key]) for run in failed)

    keys = [key for key in differing([*runs, *failed]) if key in own or decided(key)]
    return [key for key in keys if not _implied(key, keys, [*runs, *failed])]


def _implied(key: str, differs: Iterable[str], runs: Sequence[Run]) -> bool:
    """Return whether a setting came with the option that it belongs to: ``loss.terms.kl.weight`` with ``loss``."""
    if key in (TEMPERATURE, ALPHA):
        return False
    for option in differs:
        if key.startswith(f"{option}."):
            pairs = {(same(run.settings.get(option)), same(run.settings.get(key))) for run in runs}
            return len(pairs) == len({chosen for chosen, _ in pairs})
    return False


def _unlike(runs: Sequence[Run]) -> list[str]:
    """Return the settings of data by which perplexities are of different texts, tokens or choices of tokens."""
    if score_of(runs).key not in _PER_TOKEN:
        return []
    keys = [key for key in differing(runs) if key == "data" or (key.startswith("data.") and key not in _NOT_THE_TASK)]
    return keys[:1] if keys[:1] == ["data"] else keys


def _all(runs: Sequence[Run], measure: Measure) -> bool:
    return all(measure.get(run) is not None for run in runs)


def constant(runs: Sequence[Run], keys: Iterable[str]) -> dict[str, Any]:
    """Return those settings of ``keys`` that all the runs have, with one value."""
    first = runs[0].settings if runs else {}
    return {k: first[k] for k in keys if k in first and len({same(run.settings.get(k)) for run in runs}) == 1}


def ranked(groups: Iterable[Group], measure: Measure) -> list[Group]:
    """Return the groups, best first by ``measure``, each with its rank; those without it last, unranked."""
    known, unknown = list[tuple[float, Group]](), list[Group]()
    for one in groups:
        stat = one.stat(measure.get)
        if stat is None:
            unknown.append(one)
        else:
            known.append((-stat.mean if measure.higher else stat.mean, one))
    known.sort(key=lambda pair: pair[0])
    for place, (_, one) in enumerate(known, 1):
        one.rank = place
    for one in unknown:
        one.rank = None
    return [one for _, one in known] + unknown


def columns_of(comparison: Comparison, wanted: str | None = None) -> list[str]:
    """Return the keys of the columns to show: those ``wanted`` (``A,B,...``), or what differs, and the scores.

    Raises:
        UserError: a column that is not there.
    """
    if wanted is not None:
        return [_known("columns", key.strip(), comparison) for key in wanted.split(",") if key.strip()]
    scores = [key for key in shown(comparison.runs) if _measured(key, comparison)]
    if comparison.ranks is not None and comparison.ranks.key not in scores:
        scores.insert(0, comparison.ranks.key)
    scores = [key for key in scores if key not in alike(comparison)]
    if not comparison.differs:
        return ["run", *scores]
    # Runs kept apart for a difference that no setting shows are told apart by their folders.
    labels = [one.label(comparison.differs) for one in comparison.groups]
    extra = ["run"] if len(set(labels)) < len(labels) else []
    many = ["n"] if comparison.seeds > 1 else []
    return [*comparison.differs[:_MOST_SETTINGS], *extra, *many, *scores]


def alike(comparison: Comparison) -> dict[str, str]:
    """Return the numbers of language models that are the same in every row, by key: they need no column."""
    if len(comparison.groups) < 2 or comparison.score.key == "acc":
        return {}
    same_ones = {}
    for key in set(shown(comparison.runs)) - {"val", "test"}:
        measure = comparison.measures[key]
        written = {measure.write(one.stat(measure.get)) for one in comparison.groups}
        if len(written) == 1 and (value := written.pop()) is not None:
            same_ones[key] = value
    return {key: same_ones[key] for key in shown(comparison.runs) if key in same_ones}


def _measured(key: str, comparison: Comparison) -> bool:
    return any(comparison.measures[key].get(run) is not None for run in comparison.runs)


def _known(option: str, key: str, comparison: Comparison) -> str:
    settings = {name for run in comparison.runs for name in run.settings}
    accepted = {*comparison.measures, *settings, "n", "run"}
    if key not in accepted:
        raise unknown(option, key, accepted, "column")
    return key


def ordered(comparison: Comparison, wanted: str | None = None) -> list[Group]:
    """Return the groups in the order ``wanted`` (``KEY`` or ``-KEY``); ranks stay those of validation.

    Raises:
        UserError: a column that is not there.
    """
    if not wanted:
        return comparison.groups
    backwards, key = wanted.startswith("-"), _known("sort", wanted.removeprefix("-"), comparison)
    measure = comparison.measures.get(key)

    def place(one: Group) -> tuple[int, float, str]:
        stat = one.stat(measure.get) if measure else None
        if measure:
            return (0, -stat.mean if measure.higher else stat.mean, "") if stat else (1, 0.0, "")
        value = len(one.runs) if key == "n" else one.runs[0].label if key == "run" else one.settings.get(key)
        amount = finite(value)
        return (0, amount, "") if amount is not None else (1 + (value is None), 0.0, setting(value))

    known = sorted(comparison.groups, key=place)
    if not backwards:
        return known
    absent = [one for one in known if measure and one.stat(measure.get) is None]
    return [one for one in reversed(known) if one not in absent] + absent


def row(one: Group, comparison: Comparison, columns: Iterable[str]) -> dict[str, str | None]:
    """Return the cells of a group, written out, by column key."""
    cells: dict[str, str | None] = {"rank": None if one.rank is None else str(one.rank)}
    for key in columns:
        if key in comparison.measures:
            measure = comparison.measures[key]
            cells[key] = measure.write(one.stat(measure.get))
        elif key == "n":
            cells[key] = str(len(one.runs))
        elif key == "run":
            cells[key] = one.runs[0].label + (f" and {len(one.runs) - 1} more" if len(one.runs) > 1 else "")
        elif key in one.settings:
            cells[key] = setting(one.settings[key])
    return cells


def head(key: str, comparison: Comparison) -> table.Column:
    """Return the heading of a column, and the side its cells stand on."""
    if key in comparison.measures:
        return table.Column(key, comparison.measures[key].title)
    if key in ("rank", "n"):
        return table.Column(key, "#" if key == "rank" else key)
    numbers = all(isinstance(one.settings.get(key), (int, float, type(None))) for one in comparison.groups)
    return table.Column(key, short(key), right=numbers and key != "run")


def footer(comparison: Comparison, columns: Sequence[str]) -> list[str]:
    """Return the notes that a reader needs to read the table rightly."""
    lines = ["Ranked on validation; the test split is shown, and chooses nothing."]
    if comparison.unlike:
        lines = [_why_not(comparison)]
    elif all(one.rank is None for one in comparison.groups):
        lines = ["Nothing was validated, so nothing is ranked; the test split is shown, and chooses nothing."]
    if comparison.seeds > 1:
        lines.append(f"a ± b: mean and sample standard deviation over n seeds (up to {comparison.seeds}).")
    if "difference" in columns:
        name = comparison.measures["difference"].title
        lines.append(f"{name}: test score of the student, less that of the same student trained without a teacher.")
    if "gap" in columns:
        lines.append("gap closed: of the way from the baseline's test score to the teacher's, what the student went.")
    if "ood_difference" in columns:
        lines.append("ood: the same score on text from outside the domain; test is inside it.")
    constants = [f"{comparison.measures[k].title} {v}" for k, v in alike(comparison).items() if k not in columns]
    if constants:
        lines.append(f"The same in all rows: {'; '.join(constants)}.")
    hidden = [key for key in comparison.differs if key not in columns]
    if hidden:
        shown = ", ".join(map(one_line, hidden[:4])) + (", ..." if len(hidden) > 4 else "")
        lines.append(f"{len(hidden)} more settings differ ({shown}): see the CSV, or --columns.")
    if comparison.repeats:
        lines.append(f"{len(comparison.repeats)} repeated runs left out (same config, same seed: the latest counts).")
    return lines


def _why_not(comparison: Comparison) -> str:
    """Explain why the score ranks nothing, and what ranks instead."""
    what = ", ".join(map(one_line, comparison.unlike[:4])) + (", ..." if len(comparison.unlike) > 4 else "")
    why = f"{comparison.score.short} is of different data or tokens ({what}) and does not compare across these rows"
    if comparison.ranks is None:
        return f"Not ranked: {why}, and not every run has exact match; compare runs of the same data."
    return f"Ranked by {SCORES['em'].long} on validation: {why}. The test split chooses nothing."
