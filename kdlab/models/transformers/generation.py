"""Continuations of many prompts at once, each the same whatever the others are."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdlab.errors import UserError
from kdlab.functional import Outputs, Projected
from kdlab.functional.modes import eval_mode
from kdlab.ranges import share

Uniform = Callable[[int], Tensor]
"""Function of i that returns numbers (B,) in [0, 1), by which the i-th new token of each prompt is drawn."""


@torch.no_grad()
def continuations(
    net: nn.Module,
    prompts: Sequence[Tensor],
    *,
    new_tokens: int | Sequence[int],
    eos_id: int | None,
    pad_id: int | None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    uniform: Uniform | None = None,
    source: Sequence[Tensor] | None = None,
    classes: int | None = None,
) -> list[Tensor]:
    """Generate a continuation of each prompt by ``net``, in evaluation mode and without gradients.

    A continuation ends with ``eos_id``, after ``new_tokens``, or where the network has no position left. It depends on
    its own prompt and its own numbers only. :class:`~kdlab.models.CausalLM` and :class:`~kdlab.models.Seq2SeqLM` keep
    what they have computed; any other causal network reads everything again for each token.

    Args:
        net: network, called as with a batch: ``input_ids`` (``decoder_input_ids`` with a ``source``) and, if its
            ``forward`` has them, ``position_ids``.
        prompts: (n,) whole numbers each, n at least 1, not all alike.
        new_tokens: greatest length of a continuation; one number for all, or one each.
        eos_id: id that ends a continuation; None: nothing does.
        pad_id: id that fills up shorter prompts; never seen by the others, so any token will do (None is 0).
        temperature: 0 takes the most probable token; else softmax(logits / temperature).
        top_p: probability mass of the most probable tokens that are drawn from, at least. Holtzman et al., *The Curious
            Case of Neural Text Degeneration*, ICLR 2020.
        uniform: the draws, by inverting the distribution function: the same numbers give the same text.
        source: input of an encoder for each prompt: ids (m,), or features (F, m) of one size.
        classes: number of ids, from 0, that may be written; beyond them output matrices hold padding.

    Returns:
        the new ids of each prompt (k,) int64, the end included when reached, where the prompt is.

    Raises:
        UserError: for an empty prompt, one longer than the network's context, or settings out of range.
    """
    most = [new_tokens] * len(prompts) if isinstance(new_tokens, int) else list(new_tokens)
    _check(net, prompts, most, temperature, top_p, uniform, source)
    if not prompts:
        return []
    device = next((p.device for p in net.parameters()), prompts[0].device)
    room = torch.tensor([_room(net, len(p), n) for p, n in zip(prompts, most, strict=True)], device=device)
    texts = [p.to(device, torch.int64) for p in prompts]
    written: list[Tensor] = []
    open_ = torch.ones(len(texts), dtype=torch.bool, device=device)
    lengths = torch.zeros(len(texts), dtype=torch.int64, device=device)
    with eval_mode(net):
        reader = _reader(net, texts, pad_id or 0, source)
        for i in range(max(most)):
            open_ = open_ & (lengths < room)
            if not bool(open_.any()):
                break
            logits = reader.read(written[-1] if written else None)[:, :classes]
            chosen = _choose(logits, temperature, top_p, uniform, i)
            written.append(chosen)
            lengths = lengths + open_
            if eos_id is not None:
                open_ = open_ & (chosen != eos_id)
    ids = torch.stack(written, 1) if written else lengths.new_empty(len(texts), 0)
    return [row[:n].to(p.device) for row, n, p in zip(ids, lengths.tolist(), prompts, strict=True)]


def generate(
    net: nn.Module,
    prompts: Sequence[Tensor],
    *,
    new_tokens: int,
    context: int,
    eos_id: int | None,
    pad_id: int,
    vocab_size: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    uniform: Uniform | None = None,
    source: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Continue each prompt by at least one token, and at most by what fits into the context.

    Args:
        net: a language model.
        prompts: (n,) int64 each, on its device.
        new_tokens: greatest length of a continuation.
        context: tokens that ``net`` can read; the last one written need not be read.
        eos_id: id that ends a continuation, and is part of it; None: nothing ends it.
        pad_id: id that fills up.
        vocab_size: number of ids; those from here on are never written.
        temperature: sampling temperature; 0 takes the most probable token.
        top_p: probability mass of the most probable tokens that are drawn from; 1 draws from all.
        uniform: random numbers of each prompt; number i is for the i-th new token.
        source: inputs of an encoder, one for each prompt.

    Raises:
        UserError: if a prompt leaves no room.
    """
    limits = [min(new_tokens, context + 1 - len(prompt)) for prompt in prompts]
    if limits and min(limits) < 1:
        longest = max(len(prompt) for prompt in prompts)
        raise UserError("data.context", f"{context} leaves no room after a prompt of {longest} tokens", "more")
    return continuations(
        net,
        prompts,
        new_tokens=limits,
        eos_id=eos_id,
        pad_id=pad_id,
        temperature=temperature,
        top_p=top_p,
        uniform=uniform,
        source=source,
        classes=vocab_size,
    )


def encoder_rows(inputs: Any, rows: Sequence[int]) -> list[Tensor] | None:
    """Return the encoder's inputs of some rows of a batch's inputs; None without an encoder.

    Each is (m,) ids without pads, or (F, m) features.
    """
    if "decoder_input_ids" not in inputs:
        return None
    if "input_features" in inputs:
        return [inputs["input_features"][row] for row in rows]
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    return [ids[row] if mask is None else ids[row][mask[row].bool()] for row in rows]


def _check(
    net: nn.Module,
    prompts: Sequence[Tensor],
    most: Sequence[int],
    temperature: float,
    top_p: float,
    uniform: Uniform | None,
    source: Sequence[Tensor] | None,
) -> None:
    if len(most) != len(prompts) or any(n < 1 for n in most):
        raise UserError("new_tokens", f"{most} for {len(prompts)} prompts", "at least 1, one for all or one each")
    if not temperature >= 0:
        raise UserError("temperature", temperature, "0 (the most probable token) or more")
    share("top_p", top_p, zero=False)
    if temperature > 0 and uniform is None:
        raise UserError("uniform", "missing", f"numbers to draw by, at temperature {temperature}")
    if source is not None and len(source) != len(prompts):
        raise UserError("source", f"{len(source)} for {len(prompts)} prompts", "one each")
    context = getattr(net, "context", None)
    for prompt in prompts:
        if not len(prompt):
            raise UserError("prompt", "empty", "at least one token")
        if context is not None and len(prompt) > context:
            raise UserError("prompt", f"{len(prompt)} tokens", f"at most {context}, the network's context")


def _room(net: nn.Module, prompt: int, most: int) -> int:
    """Return the number of tokens that fit; the last one is written, and never read."""
    context = getattr(net, "context", None)
    return most if context is None else min(most, context + 1 - prompt)


# ---- choosing a token


def _choose(logits: Tensor, temperature: float, top_p: float, uniform: Uniform | None, i: int) -> Tensor:
    """Choose the ids (B,) of the i-th new tokens by logits (B, V)."""
    if temperature == 0 or uniform is None:
        return logits.argmax(-1)
    chances = (logits.double() / temperature).softmax(-1)
    if top_p < 1:
        chances = _nucleus(chances, top_p)
    return draw(chances, uniform(i).to(chances))


def draw(chances: Tensor, u: Tensor) -> Tensor:
    """Return the first class whose cumulated chance exceeds ``u``, (B,).

    Chances are (B, V) float64, of a sum of at most 1, and u is (B,) in [0, 1).
    """
    summed = _cumulated(chances)
    first = torch.searchsorted(summed, (u * summed[:, -1])[:, None], right=True)[:, 0]
    # rounding may leave nothing above u: the last class that has a chance
    last = chances.shape[-1] - 1 - (chances.flip(-1) > 0).to(torch.uint8).argmax(-1)
    return torch.minimum(first, last)


def _nucleus(chances: Tensor, top_p: float) -> Tensor:
    """Keep ``chances`` of the fewest classes that have ``top_p`` together, and set 0 elsewhere."""
    ordered, ids = chances.sort(dim=-1, descending=True, stable=True)
    before = _cumulated(ordered) - ordered
    return torch.zeros_like(chances).scatter(-1, ids, ordered * (before < top_p))


def _cumulated(chances: Tensor) -> Tensor:
    """Compute cumulative sums (B, V) that are the same each time."""
    return chances.cumsum(-1) if chances.device.type == "cpu" else _cumulated_exactly(chances)


def _cumulated_exactly(chances: Tensor) -> Tensor:
    """Compute cumulative sums (B, V) of numbers of a sum of about 1, rounded to multiples of 2^-52.

    On GPUs the order in which floating-point numbers are added up is open, and PyTorch refuses to cumulate them where
    deterministic algorithms are asked for. Whole numbers have the same sum in any order.
    """
    return (chances * 2.0**52).round().long().cumsum(-1).double() * 2.0**-52


# ---- reading: with a cache, or everything again


def _reader(net: nn.Module, texts: list[Tensor], pad: int, source: Sequence[Tensor] | None) -> Any:
    alike = len({len(text) for text in texts}) == 1
    if source is None and getattr(net, "cached", False):
        return _Cached(net, texts, pad)
    if source is not None and alike and all(hasattr(net, part) for part in ("encode", "decode", "cache")):
        return _Encoded(net, texts, pad, source)
    return _Again(net, texts, pad, source)


class _Cached:
    """Generation by a causal network with ``step``: prompts are padded on the left, to go on in the same column."""

    def __init__(self, net: Any, texts: list[Tensor], pad: int) -> None:
        self.net, self.past = net, None
        longest = max(len(text) for text in texts)
        lengths = texts[0].new_tensor([len(text) for text in texts])
        columns = torch.arange(longest, device=lengths.device)
        self.ids = torch.stack([nn.functional.pad(text, (longest - len(text), 0), value=pad) for text in texts])
        self.mask = (columns >= longest - lengths[:, None]).long()
        self.places = (columns - (longest - lengths[:, None])).clamp(min=0)
        self.context = getattr(net, "context", None)

    def read(self, new: Tensor | None) -> Tensor:
        """Compute the logits (B, V) after the prompts, or after the tokens just written."""
        if new is not None:
            self.ids = new[:, None]
            self.mask = torch.cat([self.mask, torch.ones_like(self.ids)], 1)
            self.places = self.places[:, -1:] + 1
            if self.context is not None:  # what has ended is still read, and must not run out of positions
                self.places = self.places.clamp(max=self.context - 1)
        logits, self.past = self.net.step(self.ids, self.mask, self.places, self.past)
        return logits


class _Encoded:
    """Generation by an encoder-decoder network with ``encode``, ``decode`` and ``cache``; prompts have one length."""

    def __init__(self, net: Any, texts: list[Tensor], pad: int, source: Sequence[Tensor]) -> None:
        self.net = net
        self.ids = torch.stack(texts)
        given = encoder_inputs(source, pad, self.ids.device)
        self.mask = given.get("attention_mask")
        self.encoded = self.net.encode(**given)
        self.past = self.net.cache()

    def read(self, new: Tensor | None) -> Tensor:
        """Compute the logits (B, V) after the prompts, or after the tokens just written."""
        ids = self.ids if new is None else new[:, None]
        logits, self.past = self.net.decode(ids, self.encoded, self.mask, self.past)
        return _dense(logits[:, -1])


@dataclass
class _Again:
    """Generation by any causal network: prompts are padded on the right, and everything is read for each token."""

    net: nn.Module
    texts: list[Tensor]
    pad: int
    source: Sequence[Tensor] | None

    def read(self, new: Tensor | None) -> Tensor:
        """Compute the logits (B, V) after the prompts, or after the tokens just written."""
        if new is not None:
            self.texts = [torch.cat([text, one]) for text, one in zip(self.texts, new[:, None], strict=True)]
            context = getattr(self.net, "context", None)
            self.texts = [text[:context] for text in self.texts]
        ids = nn.utils.rnn.pad_sequence(self.texts, batch_first=True, padding_value=self.pad)
        last = ids.new_tensor([len(text) - 1 for text in self.texts])
        logits = Outputs.of(self._call(ids)).logits
        return _dense(logits[torch.arange(len(ids), device=ids.device), last])

    def _call(self, ids: Tensor) -> Any:
        if self.source is not None:
            return self.net(decoder_input_ids=ids, **encoder_inputs(self.source, self.pad, ids.device))
        accepted = inspect.signature(self.net.forward).parameters
        if "input_ids" not in accepted and not any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
            return self.net(ids)
        placed: Mapping[str, Tensor] = {"position_ids": torch.arange(ids.shape[1], device=ids.device).expand_as(ids)}
        return self.net(input_ids=ids, **(placed if "position_ids" in accepted else {}))


def encoder_inputs(source: Sequence[Tensor], pad: int, device: torch.device) -> dict[str, Tensor]:
    """Build an encoder's inputs: ids (m,) padded on the right with a mask, or features (F, m) stacked."""
    if source[0].is_floating_point():
        return {"input_features": torch.stack([features.to(device) for features in source])}
    lengths = torch.tensor([len(ids) for ids in source], device=device)
    ids = nn.utils.rnn.pad_sequence([s.to(device, torch.int64) for s in source], batch_first=True, padding_value=pad)
    mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
    return {"input_ids": ids, "attention_mask": mask.long()}


def _dense(logits: Projected | Tensor) -> Tensor:
    return logits.dense() if isinstance(logits, Projected) else logits
