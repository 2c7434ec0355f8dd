"""The one place where terms are weighed, averaged and summed."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdlab.errors import UserError, within
from kdlab.functional import Batch, Outputs, Projected, Schedule, StepTotals, chunked, dense, schedule
from kdlab.losses.per_task import for_each_task
from kdlab.losses.temperature import Temperature
from kdlab.losses.temperature import temperature as to_temperature
from kdlab.losses.term import Term

AT_ONCE = 2**24
"""Numbers that dense logits may have to be compared at once. Above, the softmaxes of student and teacher and their
gradients would take several times the memory of the logits."""


class Losses(NamedTuple):
    """Result of an objective for one micro-batch."""

    total: Tensor
    """Weighted sum, scaled so that the mean over all parts of an optimizer step is the whole step's objective."""
    values: Tensor
    """Share of this micro-batch in each unweighted term, (terms,) in the order of ``Objective.names``; shares add up
    to the step's value."""
    counted: tuple[bool, ...]
    """Whether the whole optimizer step has anything that each term counts: labels, or a teacher. Without, its value is
    0 and says nothing."""


class Objective(nn.Module):
    r"""Named terms, weighed by role and averaged over what one optimizer step counts.

    .. math:: L = (1-\alpha) \sum_{label} w_k L_k + \alpha \sum_{soft} w_k L_k + \sum_{other} w_k L_k

    Each :math:`L_k` is the weighted mean of the term's values over the labelled, or over all valid, rows of the whole
    optimizer step, however it is split into micro-batches and processes. A term that returns a scalar (rows interact)
    counts by the rows it saw. Without a teacher, terms that need one are left out and alpha is 0.

    Where student or teacher bring :class:`~kdlab.functional.Projected` logits, the terms that look at one row at a time
    (``Term.rowwise``) see them a chunk of rows at a time, and are differentiated at once: the same numbers and
    gradients, without ever holding (rows, C) logits. So they see dense logits of more than ``AT_ONCE`` numbers, of
    which the chunks spare the softmaxes.

    Args:
        terms: name → term; the name is also the name of its curve.
        temperature: a number above 0, a schedule ``{start, end, shape}``, or a :class:`Temperature`; shared by the
            soft terms that bring none of their own.
        alpha: share of distillation in [0, 1], a number or a schedule; None where the recipe has no alpha.
        chunk_rows: rows of a chunk; None is 128, or more of few classes, up to two million numbers.
        tasks: name → weight, where there are several tasks at once: each term on outputs is computed for every task
            (:func:`~kdlab.losses.per_task.for_each_task`). None for one task.
    """

    def __init__(
        self,
        terms: Mapping[str, Term],
        temperature: float | Mapping | Schedule | Temperature = 1.0,
        alpha: float | Mapping | Schedule | None = None,
        chunk_rows: int | None = None,
        tasks: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        if chunk_rows is not None and chunk_rows < 1:
            raise UserError("loss.chunk_rows", chunk_rows, "a whole number, at least 1, or null")
        self.chunk_rows = chunk_rows
        if not terms:
            raise UserError("loss.terms", "none", "at least one named term")
        for name, term in terms.items():
            if not isinstance(term, Term):
                raise UserError(f"loss.terms.{name}", f"{type(term).__name__}", "a kdlab.losses.Term")
        if tasks:
            terms = for_each_task(terms, tasks)
        self.terms = nn.ModuleDict()
        for name, term in terms.items():
            try:
                self.terms[name] = term
            except (KeyError, TypeError) as error:
                raise UserError(f"loss.terms.{name}", f"{error.args[0]}", "another name for the term") from None
        self.names = list(terms)
        self.temperature = to_temperature(temperature)
        self.alpha = None if alpha is None else schedule(alpha, "loss.alpha", 0.0, 1.0)
        for module in list(self.terms.modules()):
            if getattr(module, "shares_temperature", False):
                module.temperature = self.temperature
        self.per_term: dict[str, Tensor] | None = None
        """Contribution of each term of weight above 0 to the total, which a call records where this is a dict."""
        self._progress = 0.0
        self._temperatures = [module for module in self.modules() if isinstance(module, Temperature)]
        self._followers = [module for module in self.modules() if module is not self and hasattr(module, "progress")]

    @property
    def student_layers(self) -> list[str]:
        """Module paths of the student that the terms look at."""
        return list(dict.fromkeys(layer for term in self._each() for layer in term.student_layers))

    @property
    def teacher_layers(self) -> list[str]:
        """Module paths of the teacher that the terms look at."""
        return list(dict.fromkeys(layer for term in self._each() for layer in term.teacher_layers))

    @property
    def needs_teacher(self) -> bool:
        """Whether some term compares with a teacher."""
        return any(term.needs_teacher for term in self._each())

    @property
    def uses_temperature(self) -> bool:
        """Whether some term that compares with a teacher has another temperature than 1 now."""
        terms = [term for term in self._each() if term.needs_teacher]
        return any(t.now != 1 for t in self._temperatures if any(t in term.modules() for term in terms))

    @property
    def vocabulary_agnostic(self) -> bool:
        """Whether the teacher may have other classes than the student: no term compares class by class."""
        compared = [term for term in self._each() if term.needs_teacher]
        return bool(compared) and all(term.vocabulary_agnostic for term in compared)

    @property
    def progress(self) -> float:
        """Share of training done, in [0, 1]; schedules follow it, and whatever in a term has a ``progress``."""
        return self._progress

    @progress.setter
    def progress(self, value: float) -> None:
        self._progress = value
        for each in self._followers:
            each.progress = value  # type: ignore[assignment]

    def setup(self, student: nn.Module, teacher: nn.Module | None, examples: int | None = None) -> None:
        """Show every term the networks, and how many examples there are to learn from; once, before ``prepare``."""
        for name, term in zip(self.names, self._each(), strict=True):
            with within(f"loss.terms.{name}"):
                term.setup(student, teacher, examples)

    def prepare(self, student: Outputs, teacher: Outputs | None) -> None:
        """Let every term make what depends on shapes; needs one batch's outputs."""
        for name, term in zip(self.names, self._each(), strict=True):
            if teacher is not None or not term.needs_teacher:
                with within(f"loss.terms.{name}"):
                    term.prepare(student, teacher)

    def weights(self, has_teacher: bool = True) -> list[float]:
        """Return the weight of each term now, alpha included."""
        alpha = None if self.alpha is None else self.alpha(self._progress) if has_teacher else 0.0
        factor = {"label": 1.0, "soft": 1.0, "other": 1.0}
        if alpha is not None:
            factor.update(label=1 - alpha, soft=alpha)
        return [factor[term.role] * term.weight(self._progress) for term in self._each()]

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Losses:
        """Weigh and sum the terms over one micro-batch.

        Raises:
            UserError: if teacher and student differ in their number of rows, or in that of classes and a term compares
                class by class.
        """
        # of several tasks, each compares its own
        if teacher is not None and batch.tasks is None and student.logits.shape != teacher.logits.shape:
            self._refuse(student.logits.shape, teacher.logits.shape)
        window = batch.window if batch.window is not None else batch.count()
        labelled = batch.labelled
        weights = self.weights(teacher is not None)
        total, done = self._in_chunks(student, teacher, batch, labelled, window, weights)
        values, counted = [], []
        for n, (term, weight) in enumerate(zip(self._each(), weights, strict=True)):
            count = _counted(term, window)
            counted.append(count > 0 and (teacher is not None or not term.needs_teacher))
            if n in done:
                values.append(done[n])
                continue
            if teacher is None and term.needs_teacher:
                values.append(torch.zeros((), device=student.logits.device))
                continue
            value = _ask(self.names[n], term, student, teacher, batch, labelled.shape)
            value, share = self._share(term, value, batch, labelled, window)
            values.append(value.detach().float() * share)
            if weight:  # one multiplication: on a small network, what autograd records here is felt
                weighted = value * (weight * share * window.parts)
                total = weighted if total is None else total + weighted
                if self.per_term is not None:
                    self.per_term[self.names[n]] = weighted
        if total is None:  # every weight is zero: keep the graph, so that backward is legal
            total = dense(student.logits[:0]).float().sum()  # of nothing: a masked class is -inf, and 0 * -inf is nan
        return Losses(total, torch.stack(values), tuple(counted))

    def _refuse(self, student: torch.Size, teacher: torch.Size) -> None:
        """Refuse logits of two shapes, unless every term takes a teacher with other classes."""
        if self.vocabulary_agnostic and student[:-1] == teacher[:-1]:
            return
        each = zip(self.names, self._each(), strict=True)
        strict = next((n for n, term in each if term.needs_teacher and not term.vocabulary_agnostic), None)
        raise UserError(
            "student, teacher",
            f"logits of shape {tuple(student)} and {tuple(teacher)}"
            + (f", and loss.terms.{strict} compares class by class" if strict else ""),
            "the same number of classes; for unlike vocabularies the teacher's text instead of its "
            "probabilities (kdlab generate, then data=traces) or optimal transport (loss=uld)",
        )

    @staticmethod
    def _share(term: Term, value: Tensor, batch: Batch, labelled: Tensor, window: StepTotals) -> tuple[Tensor, float]:
        """Return a number and a factor whose product is this micro-batch's part of the term's mean over the step."""
        if value.ndim == 0:
            seen = batch.count()
            return value, _counted(term, seen) / max(_counted(term, window), 1e-12)
        if term.rows == "labelled":
            # where, not a product: an unlabelled row may hold inf or nan, and 0 * nan is nan
            value = torch.where(labelled, value, 0.0)
        elif term.rows == "partnered" and batch.partner is not None:
            value = torch.where(batch.partner >= 0, value, 0.0)
        if batch.weight is not None:
            value = value * batch.weight
        count = _counted(term, window)
        return value.sum(), 1 / count if count > 0 else 0.0

    def _in_chunks(
        self,
        student: Outputs,
        teacher: Outputs | None,
        batch: Batch,
        labelled: Tensor,
        window: StepTotals,
        weights: list[float],
    ) -> tuple[Tensor | None, dict[int, Tensor]]:
        """Compute the weighted sum of the terms that a chunk of rows is enough for, and each term's share by number."""
        logits, others = student.logits, None if teacher is None else teacher.logits
        rows_at_once = self._rows_at_once(logits, others)
        if not rows_at_once:
            return None, {}
        chosen = {
            n: t for n, t in enumerate(self._each()) if t.rowwise and (teacher is not None or not t.needs_teacher)
        }
        if not chosen:
            return None, {}

        def values_of(s: Tensor, t: object, rows: slice) -> Tensor:
            part, mine = batch.part(rows), _part(student, s, rows)
            teacher_part = None if teacher is None else _part(teacher, t, rows)
            values = []
            for n, term in chosen.items():
                with nullcontext() if weights[n] else torch.no_grad():
                    values.append(_ask(self.names[n], term, mine, teacher_part, part, s.shape[:1], rowwise=True))
            return torch.stack(values)

        # what _share and forward multiply each row's value with
        wide = torch.promote_types(logits.dtype, torch.float32)
        each = torch.ones_like(labelled, dtype=wide) if batch.weight is None else batch.weight.to(wide)
        shares = []
        for term in chosen.values():
            of_labels = term.rows == "labelled"
            count = window.labelled if of_labels else window.rows
            shares.append((each * labelled if of_labels else each) / count if count > 0 else torch.zeros_like(each))
        share = torch.stack(shares)
        scale = torch.tensor([weights[n] * window.parts for n in chosen], device=share.device, dtype=share.dtype)
        trained = dict.fromkeys(p for term in chosen.values() for p in term.parameters())
        total, values = chunked(values_of, logits, others, share * scale[:, None], rows_at_once, trained)
        if self.per_term is not None:  # differentiated at once, their sum cannot be taken apart afterwards
            for k, n in enumerate(chosen):
                if weights[n]:
                    alone = share * torch.where(torch.arange(len(chosen), device=scale.device) == k, scale, 0)[:, None]
                    self.per_term[self.names[n]] = chunked(values_of, logits, others, alone, rows_at_once, trained)[0]
        means = (torch.where(share != 0, values, 0.0) * share).sum(1).float()
        return total, dict(zip(chosen, means, strict=True))

    def _rows_at_once(self, *logits: Any) -> int:
        """Return the number of rows of a chunk; 0 where all of them may be compared at once."""
        many = [x.shape[1] for x in logits if isinstance(x, Projected) or _is_large(x)]
        if not many:
            return 0
        # 128 rows of few classes would be many small chunks
        return self.chunk_rows or max(128, AT_ONCE // 8 // max(many))

    def _each(self) -> list[Term]:
        return list(self.terms.values())  # type: ignore[arg-type]


def _counted(term: Term, window: StepTotals) -> float:
    """Return the summed weight of the rows that a term's values count over."""
    return {"labelled": window.labelled, "all": window.rows, "partnered": window.partnered}[term.rows]


def _is_large(logits: object) -> bool:
    return isinstance(logits, Tensor) and logits.ndim == 2 and logits.numel() > AT_ONCE


def _part(outputs: Outputs, logits: object, rows: slice) -> Outputs:
    """Return outputs with the logits of some rows, and those of the heads that have one entry per row."""
    heads = {name: v[rows] for name, v in outputs.heads.items() if v.shape[:1] == outputs.logits.shape[:1]}
    return Outputs(logits, heads=heads)


def _ask(
    name: str, term: Term, student: Outputs, teacher: object, batch: Batch, rows: torch.Size, rowwise: bool = False
) -> Tensor:
    """Compute a term's value; an error in it carries the term's name.

    Raises:
        ValueError: if it returns neither one value per row nor, unless it is asked ``rowwise``, a scalar.
    """
    try:
        value = term(student, teacher, batch)
    except UserError:
        raise
    except Exception as error:
        error.add_note(f"loss.terms.{name}")
        raise
    if not isinstance(value, Tensor):
        returned = type(value).__name__ if value is not None else "None"
    elif value.shape == rows or (value.ndim == 0 and not rowwise):
        return value
    else:  # (rows, 1) would broadcast into (rows, rows) without a word
        returned = str(tuple(value.shape))
    raise ValueError(
        f"loss.terms.{name}: {type(term).__name__} returned {returned}; accepted: one value per row, {tuple(rows)}, "
        "or a scalar"
    )
