"""Answers of a model on this machine: a transformers model by folder or hub name, or a run folder."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdlab.data.text.tokenizer import Tokenizer
from kdlab.errors import UserError
from kdlab.functional import Projected
from kdlab.functional.rng import Draws, mix_tensor
from kdlab.traces.pool import Answer, Failure
from kdlab.traces.prompts import Job, PromptTemplate
from kdlab.traces.reply import Reply, Scored

log = logging.getLogger("kdlab")

CHUNK_ROWS = 256
"""Number of rows whose logits of the whole vocabulary exist at a time."""


@dataclass(frozen=True)
class Writer:
    """Language model that writes answers, with its tokenizer.

    Attributes:
        net: network in eval mode, on its device.
        context: largest number of tokens that it reads, or None.
        chat: transformers' tokenizer with the model's chat template, or None for a model that just continues.
    """

    net: nn.Module
    tokenizer: Tokenizer
    context: int | None
    chat: Any = None


def load(model: str, device: str = "auto", trust: bool = False) -> Writer:
    """Load a model and its tokenizer.

    Args:
        model: path of a run folder or of a folder that transformers reads, or a name on the hub.
        device: name of the device: ``auto``, ``cpu``, ``cuda``, ...
        trust: whether to trust a run folder, see :func:`kdlab.inference.predict.load_model`.

    Raises:
        UserError: if there is none, or it writes no text.
    """
    place = _device(device)
    folder = Path(model).expanduser()
    if (folder / "model.json").is_file():
        from kdlab.inference.predict import load_model

        if not (folder / "tokenizer.json").is_file():
            raise UserError("--model", f"{folder} has no tokenizer.json", "the run of a language model")
        net, _ = load_model(folder, trust)
        if hasattr(net, "encode"):
            raise UserError("--model", f"{folder} holds an encoder-decoder", "the run of a causal language model")
        return Writer(net.to(place), Tokenizer.load(folder, "--model"), getattr(net, "context", None))
    from kdlab.models.transformers.causal_lm import CausalLM

    tokenizer = Tokenizer.load(model, "--model")
    try:
        net = CausalLM(name=model, vocab_size=tokenizer.size, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
    except UserError as error:
        raise error.inside("--model") from None
    return Writer(net.eval().to(place), tokenizer, net.context, _chat(model))


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError("--device", f"{name!r} cannot be used here", "auto, cpu, or a device there is") from None


def _chat(model: str) -> Any:
    from transformers import AutoTokenizer

    from kdlab.models.transformers.base import quiet

    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # of the hub, of files in layouts that only kdlab reads: there is no template in them
        log.debug("%s: no chat template (%s)", model, error)
        return None
    return tokenizer if getattr(tokenizer, "chat_template", None) else None


class Local:
    """Answer source that runs a model on this machine, in batches of questions.

    What a sample says depends on its seed, and not on the batch it is in.

    Args:
        writer: model that answers.
        wording: template by which questions become prompts.
        temperature: sampling temperature; 0 takes the most probable token.
        top_p: probability mass of the most probable tokens that are drawn from.
        new_tokens: largest number of tokens in an answer.
        batch_size: number of questions in a batch.
        top: number of classes a token whose log-probabilities (at temperature 1) are returned; 0 for none.
    """

    def __init__(
        self,
        writer: Writer,
        wording: PromptTemplate,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        new_tokens: int = 256,
        batch_size: int = 16,
        top: int = 0,
    ) -> None:
        self.writer, self.wording = writer, wording
        self.temperature, self.top_p, self.new_tokens = temperature, top_p, new_tokens
        self.batch_size, self.top = batch_size, top
        self.device = next(writer.net.parameters()).device

    def prompt(self, job: Job) -> list[int]:
        """Return the token ids that the model continues."""
        tokenizer, chat = self.writer.tokenizer, self.writer.chat
        if chat is None:
            if job.ask.messages:
                raise UserError("questions", "messages, and the model has no chat template", "question")
            return tokenizer.encode(self.wording.prompt(job.ask))
        text = chat.apply_chat_template(self.wording.messages(job.ask), tokenize=False, add_generation_prompt=True)
        return tokenizer.encode(text, special=True)

    def answers(self, jobs: Iterable[Job]) -> Iterator[Answer | Failure]:
        """Yield every job's answer, batch by batch, or a failure where the prompt leaves no room in the context."""
        waiting = iter(jobs)
        while batch := list(islice(waiting, self.batch_size)):
            fitting: list[tuple[Job, Tensor]] = []
            for job in batch:
                try:
                    ids = self.prompt(job)
                except UserError as error:
                    yield Failure(job, str(error), 1)
                    continue
                if self.writer.context is not None and len(ids) >= self.writer.context:
                    yield Failure(job, f"the prompt has {len(ids)} tokens, the context {self.writer.context}", 1)
                elif not ids:
                    yield Failure(job, "the prompt is empty", 1)
                else:
                    fitting.append((job, torch.tensor(ids)))
            if fitting:
                yield from self._batch(fitting)

    @torch.no_grad()
    def _batch(self, batch: Sequence[tuple[Job, Tensor]]) -> Iterator[Answer | Failure]:
        from kdlab.models.transformers.generation import continuations

        tokenizer = self.writer.tokenizer
        prompts = [ids.to(self.device) for _, ids in batch]
        draws = Draws(mix_tensor(torch.tensor([job.seed for job, _ in batch], device=self.device)))
        written = continuations(
            self.writer.net,
            prompts,
            new_tokens=self.new_tokens,
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
            temperature=self.temperature,
            top_p=self.top_p,
            uniform=draws.uniform if self.temperature > 0 else None,
            classes=tokenizer.size,
        )
        for (job, prompt), ids in zip(batch, written, strict=True):
            text = tokenizer.decode(ids.tolist())
            if not text.strip():
                yield Failure(job, "the answer is empty", 1)
                continue
            ended = bool(len(ids)) and int(ids[-1]) == tokenizer.eos_id
            usage = {"prompt_tokens": len(prompt), "completion_tokens": len(ids)}
            scores = self._scores(prompt.to(self.device), ids.to(self.device)) if self.top else None
            yield Answer(job, Reply(text, None, "stop" if ended else "length", usage, scores))

    def _scores(self, prompt: Tensor, written: Tensor) -> tuple[Scored, ...]:
        """Return the model's distribution for every token that it wrote."""
        size = self.writer.tokenizer.size
        outputs = self.writer.net(input_ids=torch.cat([prompt, written[:-1]])[None])
        logits: Any = outputs if isinstance(outputs, Projected | Tensor) else outputs.logits
        if isinstance(logits, Projected):
            logits = Projected(logits.hidden[0], logits.weight, logits.bias)
        else:
            logits = logits[0]
        rows, end = [], len(prompt) + len(written) - 1
        for start in range(len(prompt) - 1, end, CHUNK_ROWS):
            part = logits[torch.arange(start, min(start + CHUNK_ROWS, end), device=self.device)]
            part = part.dense() if isinstance(part, Projected) else part
            values, ids = part[:, :size].float().log_softmax(-1).topk(self.top)
            rows += list(zip(ids.tolist(), values.tolist(), strict=True))
        return tuple(
            Scored(_named(token), tuple((_named(i), value) for i, value in zip(ids, values, strict=True)))
            for token, (ids, values) in zip(written.tolist(), rows, strict=True)
        )


def _named(token: int) -> bytes:
    return b"token_id:%d" % token
