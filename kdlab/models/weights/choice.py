"""Which of the weights in a checkpoint a network gets, and what is said of the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from kdlab.config.override_text import argument
from kdlab.errors import UserError, unknown
from kdlab.models.transforms.surgery import classifiers_of
from kdlab.models.weights.contents import WRAPPERS, Entry, State
from kdlab.models.weights.keys import Fit, Rules, count, fit, misfit, pattern, some

PLAIN, AVERAGE = "plain", "ema"
"""Values of ``weights``: the weights that training went on with, and their average."""

ONE_OF_SEVERAL = len(WRAPPERS)
"""Rank of an entry whose name does not say that it holds the network that a file is about."""


@dataclass
class Candidate:
    """Weights in a file that fit a network by name."""

    entry: Entry
    fitted: Fit
    shaped: bool
    """Whether they fit by shape too."""

    @property
    def average(self) -> bool:
        """Whether the weights are an average over training."""
        return self.entry.average or self.fitted.average

    @property
    def names(self) -> list[str]:
        """Values of ``weights`` that choose it, the shortest name that tells it from others of its file first."""
        entry, prefix = self.entry.name, self.fitted.prefix.removesuffix(".")
        return [name for name in (prefix, entry, f"{entry}.{prefix}") if name.strip(".")] or [PLAIN]

    @property
    def rank(self) -> tuple[bool, bool, int]:
        """Its place among those of a file, lower first."""
        student = self.entry.name.rpartition(".")[2] == "student"  # beside it there may be its teacher
        rank = ONE_OF_SEVERAL if student else self.entry.rank
        # Lightning's average is in the place of the weights, and what the file is about
        aside = self.average and not (self.entry.average and rank < ONE_OF_SEVERAL)
        return not self.shaped, aside, rank


@dataclass(frozen=True)
class Where:
    """Source of weights, for messages."""

    path: str
    key: str
    """Config key that names the file."""

    @property
    def file(self) -> str:
        """Key and file."""
        return f"{self.key}: {self.path}"

    def other(self, name: str) -> str:
        """Return the key ``name`` beside the one that names the file."""
        parent, _, last = self.key.rpartition(".")
        return f"{parent}.{name}" if parent and last == "checkpoint" else name


def choose(
    net: nn.Module,
    entries: Sequence[Entry],
    rules: Rules | None,
    weights: str | None,
    where: Where,
    head: bool = True,
) -> tuple[State, list[str]]:
    """Choose the weights of a file for a network; return them under its names, and notes on what was done and left.

    Args:
        net: the network.
        entries: the state dicts in the file.
        rules: renaming rules of the user's.
        weights: ``plain``, ``ema``, the name of an entry or prefix; None takes the plain ones, or an average where
            there are no others.
        where: the file.
        head: False where the classifier need not fit.

    Raises:
        UserError: nothing fits, several do with nothing between them, or ``weights`` names what is not there.
    """
    tried = [(entry, one) for entry in entries for one in fit(net, entry.state, rules, where.file)]
    candidates = [Candidate(entry, one, _shaped(net, one.state, head)) for entry, one in tried if one.fits]
    candidates += _completed(net, tried, candidates, head)
    wanted = sorted(_asked(candidates, entries, weights, where), key=lambda one: one.rank)
    if not wanted:
        named = [(entry, one) for entry, one in tried if weights in (None, *_kinds(entry, one))] or tried
        # the first entry is what the file is about, unless another one comes nearer
        _, nearest = min(named, key=lambda pair: len(pair[1].missing) + len(pair[1].extra))
        raise misfit(net, nearest, where.file, where.other("mapping"))
    best = [one for one in wanted if one.rank == wanted[0].rank]
    sure = best[0].rank[2] < ONE_OF_SEVERAL
    chosen = next((one for one in best if sure and not one.fitted.prefix), best[0])
    if len(best) > 1 and (chosen.fitted.prefix or not sure):
        raise _several(best, where)
    notes = [*_chosen(chosen, candidates, entries), *chosen.fitted.notes, *_ignored(chosen, candidates)]
    others = _others(chosen, candidates, entries, where) if weights is None else []
    return {name: chosen.fitted.state[name] for name in net.state_dict()}, [*notes, *others]


def _shaped(net: nn.Module, state: State, head: bool) -> bool:
    wanted = net.state_dict()
    own = tuple(f"{name}." for name in classifiers_of(net)) if not head else ()
    return all(state[name].shape == wanted[name].shape for name in wanted if not name.startswith(own))


def _completed(
    net: nn.Module, tried: Sequence[tuple[Entry, Fit]], candidates: Sequence[Candidate], head: bool
) -> list[Candidate]:
    """Complete averages of parameters alone with the buffers of the plain weights, which they are used with."""
    buffers = {name for name, _ in net.named_buffers()}
    plain = next((one for one in candidates if not one.average), None)
    completed = []
    for entry, one in tried:
        average = entry.average or one.average
        if plain is None or not average or one.extra or not one.missing or not set(one.missing) <= buffers:
            continue
        for name in one.missing:
            one.state[name] = plain.fitted.state[name]
        one.notes.append(f"{len(one.missing)} buffers, which it lacks, of {plain.names[0]}")
        one.missing = []
        completed.append(Candidate(entry, one, _shaped(net, one.state, head)))
    return completed


def _kinds(entry: Entry, one: Fit) -> tuple[str, ...]:
    """Return the values of ``weights`` that mean an entry."""
    return (AVERAGE if entry.average or one.average else PLAIN, *Candidate(entry, one, True).names)


def _asked(
    candidates: Sequence[Candidate], entries: Sequence[Entry], weights: str | None, where: Where
) -> list[Candidate]:
    """Return the candidates that ``weights`` names."""
    if weights is None:
        return list(candidates)
    name = weights.removesuffix(".")
    wanted = [one for one in candidates if name in one.names and one.names != [PLAIN]]
    wanted = wanted or [one for one in candidates if name in _kinds(one.entry, one.fitted)]
    if wanted or any(weights in (entry.name, AVERAGE if entry.average else PLAIN) for entry in entries):
        return wanted
    names = [name for one in candidates for name in one.names[:1]] + [entry.name for entry in entries if entry.name]
    if weights in (PLAIN, AVERAGE):
        what = "average of weights" if weights == AVERAGE else "weights but averages"
        held = ", ".join(dict.fromkeys(names)) or "none that fit"
        raise UserError(
            where.other("weights"), f"{weights}, and {where.path} holds no {what} (it holds {held})", "null"
        )
    raise unknown(where.other("weights"), weights, dict.fromkeys([PLAIN, AVERAGE, *names]), "entry of the file")


def _chosen(chosen: Candidate, candidates: Sequence[Candidate], entries: Sequence[Entry]) -> list[str]:
    """Return a note that names the chosen one of several, or that says that it is an average; none otherwise."""
    if chosen.average:
        return [f"an average of weights ({chosen.names[0]})" if chosen.names != [PLAIN] else "an average of weights"]
    several = len(candidates) > 1 or chosen.entry.rank >= ONE_OF_SEVERAL
    return [f"those of {chosen.names[0]}"] if several and chosen.names != [PLAIN] else []


def _ignored(chosen: Candidate, candidates: Sequence[Candidate]) -> list[str]:
    """Return a note on the names in the same state dict that belong to no network, or none."""
    taken = tuple(
        one.fitted.prefix
        for one in candidates
        if one.entry is chosen.entry and one is not chosen and one.fitted.prefix and one.average
    )
    names = [name for name in chosen.fitted.ignored if not name.startswith(taken)]
    left = [*names, *chosen.entry.left_out] if chosen.entry.name else names
    return [f"beside the network, {count(left)} ignored ({some(left)})"] if left else []


def _others(chosen: Candidate, candidates: Sequence[Candidate], entries: Sequence[Entry], where: Where) -> list[str]:
    """Return notes on the other weights of a file, and what to type for them."""
    notes = []
    key = where.other("weights")
    for kind, value in (("an average of the weights", AVERAGE), ("the weights that are no average", PLAIN)):
        others = [one for one in candidates if one is not chosen and one.average == (value == AVERAGE)]
        if others and chosen.average != (value == AVERAGE):
            names = ", ".join(dict.fromkeys(one.names[0] for one in others))
            notes.append(f"the file also holds {kind} ({names}), which {argument(key, value)} takes")
    if more := [one for one in candidates if one is not chosen and one.average == chosen.average]:
        shown = ", ".join(argument(key, name) for name in dict.fromkeys(one.names[0] for one in more))
        notes.append(f"others in the file fit too: {shown}")
    fitting = {id(one.entry) for one in candidates}
    large = len(chosen.fitted.state) // 2
    if strange := [e for e in entries if e.average and id(e) not in fitting and len(e.state) > large]:
        notes.append(f"the file also holds an average that does not fit ({', '.join(e.name for e in strange)})")
    return notes


def _several(best: Sequence[Candidate], where: Where) -> UserError:
    """Return the error for several networks of a file that fit equally well, with what to type for each."""
    if len({id(one.entry) for one in best}) > 1:
        names = [one.entry.name for one in best]
        typed = " or ".join(argument(where.other("weights"), name) for name in names)
        return UserError(where.file, f"holds several networks that fit ({some(names, 6)})", typed)
    prefixes = [one.fitted.prefix for one in best]
    each = []
    for own in prefixes:
        rules = {pattern(own): ""} | {pattern(other): None for other in prefixes if other != own}
        each.append(argument(where.other("mapping"), rules))
    return UserError(
        where.file,
        f"holds {len(prefixes)} networks that fit, with names that begin with {', '.join(prefixes)}",
        " or ".join(each),
    )
