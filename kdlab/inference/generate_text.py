"""Text that a finished run's language model writes after a given text, from the run folder alone."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdlab.data.text.tokenizer import Tokenizer
from kdlab.errors import UserError
from kdlab.functional.rng import uniform
from kdlab.inference.predict import load_model
from kdlab.models.transformers.generation import continuations
from kdlab.system import files
from kdlab.system.files import Unreadable

log = logging.getLogger("kdlab")

_NEW_TOKENS = 64


@dataclass(frozen=True)
class Completion:
    """Text that a model generated after one input text, or in answer to it."""

    source: str
    """File that the text is from, or the text itself."""
    prompt: str
    """Text that the model read; empty where an encoder read it, and what it wrote stands alone."""
    text: str
    sample: int
    ended: bool
    """Whether the model came to an end of text by itself."""


def complete(
    run: Path,
    inputs: Sequence[str],
    *,
    new_tokens: int | None = None,
    temperature: float = 0.0,
    samples: int = 1,
    seed: int = 0,
    trust: bool = False,
) -> list[Completion]:
    """Continue texts; with an encoder-decoder, answer them.

    A text too long for the model's context is read from where the rest of it and the new tokens fit.

    Args:
        run: a run folder of a language model.
        inputs: texts, or names of files with text.
        new_tokens: largest number of tokens generated for each text; None is 64, or half of a context that is shorter
            than two times that.
        temperature: sampling temperature; 0 writes the most probable token each time.
        samples: number of continuations of each text, which differ where the temperature is above 0.
        seed: seed of the sampling; each drawn number is a function of (seed, text's number, sample, position).
        trust: whether to trust the run folder, see :func:`~kdlab.inference.predict.load_model`.

    Raises:
        UserError: for settings out of range, a file that cannot be read, or characters that the model does not know.
    """
    if samples < 1 or (samples > 1 and temperature == 0):
        accepted = "at least 1" if samples < 1 else "1 at temperature 0, where all would be alike"
        raise UserError("predict", f"--samples {samples}", accepted)
    texts = [read_text(one) for one in inputs]
    net, described = load_model(run, trust)
    if described["target"] == "class":
        raise UserError(
            f"{run}/model.json", "is of a network that predicts classes", "the run folder of a language model"
        )
    tokenizer = Tokenizer.load(_beside(run, described["tokenizer"]), key="predict")
    limit = _context(net, described)
    if new_tokens is None:
        new_tokens = _NEW_TOKENS if limit is None else max(1, min(_NEW_TOKENS, limit // 2))
    if limit is not None and not 1 <= new_tokens <= limit:
        raise UserError("predict", f"--new-tokens {new_tokens}", f"1 to {limit}, the model's context")
    prompts, encoded = _prompts(net, texts, tokenizer, limit, new_tokens)
    written = [
        continuations(
            net,
            prompts,
            new_tokens=new_tokens,
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
            temperature=temperature,
            uniform=_Draws(seed, len(prompts), sample),
            source=encoded,
            classes=tokenizer.size,
        )
        for sample in range(samples)
    ]
    completions = []
    for number, (source, text) in enumerate(zip(inputs, texts, strict=True)):
        for sample, of_all in enumerate(written):
            ids, prompt = of_all[number].tolist(), "" if encoded else text
            completions.append(Completion(source, prompt, tokenizer.decode(ids), sample, tokenizer.eos_id in ids))
    return completions


@dataclass(frozen=True)
class _Draws:
    """Source of the random numbers, (rows,) in [0, 1), by which the i-th new tokens of one sample are drawn."""

    seed: int
    rows: int
    sample: int

    def __call__(self, i: int) -> Tensor:
        return uniform(self.seed, torch.arange(self.rows), self.sample, i)


def read_text(text: str) -> str:
    """Return ``text`` itself, or the content of the file of that name without the line break that ends it.

    A text that ends in ``.txt`` is the name of a file whether it is there or not.

    Raises:
        UserError: if there is nothing to read, or it is no UTF-8.
    """
    if not _names_a_file(text):
        if not text:
            raise UserError("predict", "the text is empty", "at least one character, or a file with text")
        return text
    try:
        content = files.read_text(text).replace("\r\n", "\n").removesuffix("\n")
    except (OSError, Unreadable) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError("predict", f"{text}: cannot be read as UTF-8 text ({reason})", "a .txt file") from None
    if not content:
        raise UserError("predict", f"{text} is empty", "a file with text")
    return content


def _names_a_file(text: str) -> bool:
    if "\n" in text:
        return False
    try:
        return text.lower().endswith(".txt") or Path(text).is_file()
    except (OSError, ValueError):  # what no file can be called
        return False


def _beside(run: Path, name: object) -> Path:
    """Return a file's path in the run folder; nothing outside of it is read, whatever the folder says."""
    path = run / Path(str(name)).name
    if not path.is_file():
        raise UserError(path, "does not exist", "a whole run folder, with its tokenizer")
    return path


def _context(net: nn.Module, described: dict[str, Any]) -> int | None:
    """Return the largest number of tokens that the model reads at once; None where nothing says it."""
    known = [size for size in (getattr(net, "context", None), described.get("context")) if isinstance(size, int)]
    return min(known, default=None)


def _prompts(
    net: nn.Module, texts: Sequence[str], tokenizer: Tokenizer, limit: int | None, new_tokens: int
) -> tuple[list[Tensor], list[Tensor] | None]:
    """Return the token ids that the decoder begins with, and those that an encoder reads, if there is one."""
    if getattr(net, "speech", False):
        raise UserError("predict", "the model reads sound", "the run folder of a model that reads text")
    rows = [tokenizer.encode(text) for text in texts]
    if hasattr(net, "encode"):
        start = torch.tensor([tokenizer.eos_id])
        return [start] * len(rows), [torch.tensor([*ids, tokenizer.eos_id]) for ids in rows]
    room = None if limit is None else limit + 1 - new_tokens
    prompts = []
    for ids in rows:
        if room is not None and len(ids) > room:
            log.warning("predict: %d of a text's %d tokens are read: the last that fit the context", room, len(ids))
        # of nothing, a text begins as training texts do: after the end of another one
        prompts.append(torch.tensor((ids if room is None else ids[-room:]) or [tokenizer.eos_id]))
    return prompts, None
