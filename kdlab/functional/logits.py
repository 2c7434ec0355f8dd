"""The forms that logits come in, beside a dense tensor (rows, C).

``Projected`` has not been multiplied out; ``Sparse`` keeps the most probable classes and the mass of all others;
``Sampled`` keeps classes drawn from the distribution. All forms have ``shape``, ``dtype``, ``device``, ``detach``, and
slices of rows; ``align_logits`` turns any pair of them into two dense tensors that every divergence takes.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kdlab.errors import UserError

NOTHING = -1e4
"""Logit so low that its probability is 0 in float64 at any temperature up to 10."""


class _Form:
    """Base of the forms: dataclasses of tensors, whose first dimension is the row but for ``_shared``."""

    _shared: tuple[str, ...] = ()

    def _each(self, change: Any, names: tuple[str, ...] = ()) -> Any:
        given = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        changed = {k: change(v) for k, v in given.items() if isinstance(v, Tensor) and k not in names}
        return replace(self, **changed)  # type: ignore[type-var]

    def detach(self) -> Any:
        """Return the same, cut from the graph."""
        return self._each(Tensor.detach)

    def to(self, device: Any, non_blocking: bool = False) -> Any:
        """Return the same on another device."""
        return self._each(lambda v: v.to(device, non_blocking=non_blocking))

    def __getitem__(self, rows: slice | Tensor) -> Any:
        """Return some of the rows: a slice, a mask or indices."""
        return self._each(lambda v: v[rows], self._shared)

    def __len__(self) -> int:
        return self.shape[0]  # type: ignore[attr-defined]


def _fit(ok: bool, form: str, message: str) -> None:
    if not ok:
        raise ValueError(f"{form}: {message}")


@dataclass(eq=False)
class Projected(_Form):
    """Logits ``hidden @ weight.T + bias`` that are made a few rows at a time; see :func:`~kdlab.functional.chunked`.

    Args:
        hidden: (rows, d), or (B, T, d) before the rows are picked.
        weight: (C, d), the output layer's.
        bias: (C,) or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    _shared = ("weight", "bias")

    def __post_init__(self) -> None:
        width, (classes, deep) = self.hidden.shape[-1], self.weight.shape
        _fit(width == deep, "Projected", f"hidden states of width {width}, a matrix of width {deep}")
        if self.bias is not None:
            _fit(self.bias.shape == (classes,), "Projected", f"bias {tuple(self.bias.shape)}, {classes} classes")

    @property
    def shape(self) -> torch.Size:
        """Shape of the dense logits."""
        return torch.Size((*self.hidden.shape[:-1], self.weight.shape[0]))

    @property
    def dtype(self) -> torch.dtype:
        """Type of the dense logits."""
        return self.hidden.dtype

    @property
    def device(self) -> torch.device:
        """Device of the dense logits."""
        return self.hidden.device

    def dense(self) -> Tensor:
        """Return the logits (rows, C), all at once."""
        return F.linear(self.hidden, self.weight, self.bias)


@dataclass(eq=False)
class Sparse(_Form):
    """Logits of the k most probable classes of each row, and one bucket with the mass of all others.

    A divergence then compares k + 1 probabilities: the k, and the bucket. With k = C it is the dense divergence. With
    fewer it is biased: it says nothing about how the student spreads the bucket's mass, and at temperature 1 never
    exceeds the dense one (data processing inequality). Another temperature softens the k + 1, bucket included.

    Args:
        ids: (rows, k) whole numbers, no two alike in a row.
        log_probs: (rows, k) natural logarithms, at temperature 1.
        tail: (rows,) natural logarithm of the remaining mass; -inf where nothing remains.
        classes: C, the size of the vocabulary.
    """

    ids: Tensor
    log_probs: Tensor
    tail: Tensor
    classes: int

    def __post_init__(self) -> None:
        _fit(self.ids.shape == self.log_probs.shape, "Sparse", "ids and log_probs differ in shape")
        _fit(self.tail.shape == self.ids.shape[:1], "Sparse", f"tail {tuple(self.tail.shape)}, one value a row wanted")

    @property
    def shape(self) -> torch.Size:
        """Shape of the dense logits."""
        return torch.Size((self.ids.shape[0], self.classes))

    @property
    def dtype(self) -> torch.dtype:
        """Type of the kept log-probabilities."""
        return self.log_probs.dtype

    @property
    def device(self) -> torch.device:
        """Device of the kept log-probabilities."""
        return self.log_probs.device

    @classmethod
    def of(cls, logits: Tensor, k: int) -> Sparse:
        """Keep the ``k`` most probable classes of dense logits (rows, C)."""
        wide = _wide(logits)
        ids = wide.topk(k, -1).indices
        kept, tail = _split(wide.log_softmax(-1), ids)
        return cls(ids, kept, tail, logits.shape[-1])

    def buckets(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Reduce dense logits (rows, C) and this to logits (rows, k + 1) of the k classes and the bucket."""
        kept, tail = _split(_wide(logits), self.ids.long())
        own = torch.cat([self.log_probs, self.tail[:, None]], -1)
        # not -inf where nothing remains: a temperature divides by it, and the gradient of that would be 0 times inf
        return torch.cat([kept, tail[:, None]], -1).clamp(min=NOTHING), _wide(own).clamp(min=NOTHING)


@dataclass(eq=False)
class Sampled(_Form):
    r"""k classes a row, drawn from the distribution; an unbiased stand-in for it where its expectation is taken.

    .. math:: E\Big[\sum_j w_{ij} f(c_{ij})\Big] = \sum_c p_{ic} f(c)

    Unlike the ``k`` most probable classes it also reaches the tail. Anshumann et al., *Sparse Logit Sampling:
    Accelerating Knowledge Distillation in LLMs*, ACL 2025. It serves the cross-entropy part of KL(teacher || student);
    with the teacher's entropy, KL itself.

    Args:
        ids: (rows, k) whole numbers; a class may come up more than once.
        weights: (rows, k), p / (k · probability of being drawn).
        classes: C.
        entropy: (rows,) of the distribution, in nats; None leaves it out (the loss is then KL plus a constant).
    """

    ids: Tensor
    weights: Tensor
    classes: int
    entropy: Tensor | None = None

    def __post_init__(self) -> None:
        _fit(self.ids.shape == self.weights.shape, "Sampled", "ids and weights differ in shape")

    @property
    def shape(self) -> torch.Size:
        """Shape of the dense logits."""
        return torch.Size((self.ids.shape[0], self.classes))

    @property
    def dtype(self) -> torch.dtype:
        """Type of the drawn weights."""
        return self.weights.dtype

    @property
    def device(self) -> torch.device:
        """Device of the drawn ids."""
        return self.weights.device

    @classmethod
    def of(cls, logits: Tensor, k: int, flatten: float = 1.0, generator: torch.Generator | None = None) -> Sampled:
        """Draw ``k`` classes a row, with replacement, in proportion to p to the power ``flatten``.

        Args:
            logits: (rows, C).
            k: draws a row.
            flatten: 1 draws from p itself (all weights 1 / k); 0 draws every class alike.
            generator: generator on the device of ``logits``.
        """
        log_p = _wide(logits).log_softmax(-1)
        floor = torch.finfo(log_p.dtype).min  # 0 times -inf is NaN
        chance = (flatten * log_p.clamp(min=floor)).log_softmax(-1)
        ids = chance.exp().multinomial(k, replacement=True, generator=generator)
        weights = (log_p.gather(-1, ids) - chance.gather(-1, ids)).exp() / k
        entropy = -torch.special.xlogy(log_p.exp(), log_p.exp()).sum(-1)
        return cls(ids, weights, logits.shape[-1], entropy)

    def kl(self, logits: Tensor) -> Tensor:
        r"""Estimate of ``KL(this || logits)``, (rows, C) -> (rows,); the cross-entropy alone where no entropy is given.

        .. math:: -\sum_j w_{ij} \log q_{i c_{ij}} - H_i
        """
        log_q = _wide(logits).log_softmax(-1).gather(-1, self.ids.long())
        cross = -(self.weights.to(log_q.dtype) * log_q.clamp(min=torch.finfo(log_q.dtype).min)).sum(-1)
        return cross if self.entropy is None else cross - self.entropy


Logits = Tensor | Projected | Sparse | Sampled


def dense(logits: Any) -> Tensor:
    """Return logits (rows, C) as one tensor.

    Raises:
        UserError: if they are sparse or sampled, which say nothing about most classes.
    """
    if isinstance(logits, Tensor):
        return logits
    if isinstance(logits, Projected):
        return logits.dense()
    raise UserError(
        "logits",
        (
            f"{type(logits).__name__.lower()} ones, of {logits.ids.shape[-1]} classes a row; "
            "accepted by this loss: logits of all classes (a live teacher, or a cache of "
            "dense logits)"
        ),
    )


def columns(logits: Any, count: int) -> Any:
    """Return the first ``count`` classes of dense or projected logits, without a copy; their softmax is renormalised.

    The output matrices of language models are often padded beyond the vocabulary.
    """
    if logits.shape[-1] == count:
        return logits
    if isinstance(logits, Projected):
        bias = None if logits.bias is None else logits.bias[:count]
        return Projected(logits.hidden, logits.weight[:count], bias)
    return logits[..., :count]


def finite(logits: Any) -> bool:
    """Return whether logits hold neither inf nor nan; of projected ones, only the hidden states are checked."""
    values = logits.hidden if isinstance(logits, Projected) else logits
    return bool(values.isfinite().all())


def align_logits(student: Any, teacher: Any) -> tuple[Tensor, Tensor]:
    """Return both logits as dense tensors of one shape: (rows, C), or (rows, k + 1) with a sparse teacher."""
    if isinstance(student, Tensor) and isinstance(teacher, Tensor):
        return student, teacher
    student = dense(student)
    return teacher.buckets(student) if isinstance(teacher, Sparse) else (student, dense(teacher))


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _split(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits (rows, k) at ``ids``, and the logarithm (rows,) of the summed exponentials of all others."""
    # summed over the others themselves: 1 - sum of the kept would lose a small tail. A finite floor, since the
    # gradient of a logsumexp of nothing but -inf is NaN
    least = torch.finfo(logits.dtype).min
    tail = logits.scatter(-1, ids, least).logsumexp(-1)
    return logits.gather(-1, ids), tail.masked_fill(tail < least / 2, -torch.inf)
