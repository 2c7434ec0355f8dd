"""Sequences that a network writes itself: the student's (on-policy distillation) or the teacher's (sequence level)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from kdlab.batch_transforms.base import BatchTransform
from kdlab.data.text.sequence import ANSWER, TEXT
from kdlab.errors import UserError, unknown
from kdlab.functional import NO_LABEL, Batch, Schedule, SequenceBatch, StepTotals, schedule
from kdlab.functional.rng import Draws, fold, seed_of
from kdlab.models.transformers.generation import encoder_rows, generate
from kdlab.ranges import share, whole_number
from kdlab.tasks import Task
from kdlab.teachers import Teacher

Writer = Literal["student", "teacher"]

_CURVES = ("own", "own_length", "own_ended", "own_truncated")


class GeneratedText(BatchTransform):
    r"""Batch transform that replaces the continuations of a batch's prompts by text of the student or the teacher.

    With ``writer="student"`` the loss is taken where the student itself arrives, under the teacher's judgement; with
    probability :math:`\lambda` (``fraction``) a step is such a one, else it sees the data:

    .. math::
        (1-\lambda)\, E_{(x,y)\sim \text{data}}[D(p_T \| p_S)(y|x)]
        + \lambda\, E_{x\sim \text{data}}\, E_{y\sim p_S(\cdot|x)}[D(p_T \| p_S)(y|x)]

    Agarwal et al., *On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes*, ICLR 2024; with
    the reverse KL, per token, what Gu et al., *MiniLLM*, ICLR 2024, minimise without their policy gradient. No gradient
    goes through the drawing, as in GKD. There is nothing to imitate in the student's text, so its rows have no label.

    With ``writer="teacher"`` the teacher's text takes the place of the references, as labels: Kim and Rush,
    *Sequence-Level Knowledge Distillation*, EMNLP 2016 (greedy at temperature 0; theirs is beam search). It writes the
    student's tokens; one with a tokenizer of its own writes text beforehand (``kdlab generate``).

    A sequence counts as it weighs among the data, however long its text: its rows weigh weight / length. Whether a
    step is on-policy depends on (seed, step), a continuation on (seed, step, example) and the weights, so that neither
    processes, micro-batches nor a resumed run change what is written.

    Args:
        eos_id: end-of-text id of the tokenizer.
        pad_id: padding id of the tokenizer.
        vocab_size: ids of the tokenizer; others, of a padded output layer, are never written.
        context: tokens that the networks read at most.
        writer: network that writes, ``student`` or ``teacher``.
        fraction: :math:`\lambda`, a number in [0, 1] or a schedule over training.
        new_tokens: the longest continuation; the context may end it earlier.
        prompt: tokens of running text that are given. The prompt of a question is the question, whatever its tokens
            weigh (``SequenceBatch.prompts``).
        temperature: sampling temperature; 0 takes the most probable token.
        top_p: probability mass of the most probable tokens that are drawn from; 1 draws from all.
        buffer: continuations that are kept, the newest ones; 0 keeps none.
        replay: the probability that a step with own text takes what the buffer has for its examples.

    Attributes:
        progress: share of training done, in [0, 1]; a schedule follows it.

    Raises:
        UserError: for an argument out of its range.
    """

    target = "next_token"

    def __init__(
        self,
        eos_id: int,
        pad_id: int,
        vocab_size: int,
        context: int,
        writer: Writer = "student",
        fraction: float | Mapping | Schedule = 0.5,
        new_tokens: int = 64,
        prompt: int = 16,
        temperature: float = 1.0,
        top_p: float = 1.0,
        buffer: int = 0,
        replay: float = 0.5,
    ) -> None:
        if writer not in get_args(Writer):
            raise unknown("batch_transform.writer", writer, get_args(Writer), "writer")
        for name, value, least in (("new_tokens", new_tokens, 1), ("prompt", prompt, 1), ("buffer", buffer, 0)):
            whole_number(f"batch_transform.{name}", value, least)
        if not temperature >= 0:
            raise UserError("batch_transform.temperature", temperature, "0 (the most probable token) or more")
        share("batch_transform.top_p", top_p, zero=False)
        share("batch_transform.replay", replay)
        self.eos_id, self.pad_id, self.vocab_size, self.context = eos_id, pad_id, vocab_size, context
        self.writer, self.teacher_writes = writer, writer == "teacher"
        self.fraction = schedule(fraction, "batch_transform.fraction", 0.0, 1.0)
        self.new_tokens, self.prompt = new_tokens, prompt
        self.temperature, self.top_p = temperature, top_p
        self.replay = replay
        self._kept = _Buffer(buffer)

    @torch.no_grad()
    def __call__(
        self,
        batch: Batch,
        student: nn.Module,
        teacher: Teacher | nn.Module | None,
        task: Task,
        seed: int,
        step: int,
        part: int = 0,
    ) -> tuple[Batch, dict[str, Tensor]]:
        """Return a micro-batch as it is, or with its continuations replaced.

        Args:
            batch: batch of sequences, not packed.
            student: the network that is trained.
            teacher: a network, or a :class:`~kdlab.teachers.Teacher` with one (``net``); None where the student writes.
            task: task that reads the batch; not needed here.
            seed: seed of the run.
            step: the optimizer step, counted from 0.
            part: index of the micro-batch within the step; nothing depends on it.

        Returns:
            the batch, on the device of the one given, and the curves ``own`` (1 where the text is own), ``own_length``
            (mean, in tokens), ``own_ended`` (share that came to end-of-text) and ``own_truncated`` (share cut off).

        Raises:
            UserError: for packed batches, or a teacher that should write and cannot.
        """
        if self.writer == "teacher" and isinstance(teacher, Teacher) and teacher.own_tokenizer:
            raise UserError(
                "batch_transform.writer",
                "teacher, and its tokenizer is not the student's",
                ("a teacher with the same tokenizer, or text that it wrote before (kdlab generate, then data=traces)"),
            )
        own = _chance(seed, "own", step) < self.fraction(self.progress)
        device = batch.targets.device
        curves = dict.fromkeys(_CURVES, torch.full((), torch.nan, device=device))
        curves["own"] = torch.tensor(float(own), device=device)
        if not own:
            return batch, curves
        teaching = teacher.net if isinstance(teacher, Teacher) else teacher
        net = student if self.writer == "student" else teaching
        if not isinstance(net, nn.Module):
            raise UserError("batch_transform.writer", "teacher, and no network teaches", "student, or a live teacher")
        starts = self._starts(batch)
        if not starts:
            return batch, curves
        texts = self._texts(net, batch, starts, seed, step)
        ended = (torch.stack([text[-1] for text in texts]) == self.eos_id).float()
        curves["own_length"] = torch.tensor([float(len(text)) for text in texts], device=device).mean()
        curves["own_ended"], curves["own_truncated"] = ended.mean(), 1 - ended.mean()
        return self._rebuilt(batch, starts, texts), curves

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs: the buffer, as tensors."""
        return self._kept.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that :meth:`state_dict` returned."""
        self._kept.load_state_dict(state)

    def _starts(self, batch: Batch) -> list[_Start]:
        """Return the sequences that have rows, with their prompts."""
        if not isinstance(batch, SequenceBatch) or not isinstance(batch.inputs, dict) or batch.example_id is None:
            raise UserError(
                "batch_transform", "own text in place of inputs that are no sequences", "batch_transform=none"
            )
        ids, where = batch.inputs[_name(batch)].long(), batch.loss_mask
        places = torch.arange(where.shape[1], device=where.device)
        read = ((places + 1) * where).amax(1)  # up to the last one that counts
        positions = batch.inputs.get("position_ids", places)
        if bool(((positions != places) & (places < read[:, None])).any()):
            raise UserError("data.pack", "true; accepted with own text (source): false")
        starts = []
        about = torch.stack([read, _prompts(batch), batch.example_id[:, 0]], 1)
        for row, (length, prompt, example) in enumerate(about.tolist()):
            if length:
                given, kind = (prompt, ANSWER) if prompt else (min(self.prompt, length), TEXT)
                starts.append(_Start(row, example, ids[row, :given], kind))
        return starts

    def _texts(self, net: nn.Module, batch: Batch, starts: list[_Start], seed: int, step: int) -> list[Tensor]:
        """Return the continuation of each prompt: written now, or taken from the buffer."""
        device = batch.targets.device
        self._kept.begin(step)
        shown = self._shown(batch, starts)
        again = self._kept.room and _chance(seed, "replay", step) < self.replay
        kept = [
            self._kept.find(start.example, ids) if again else None for start, ids in zip(starts, shown, strict=True)
        ]
        missing = [number for number, text in enumerate(kept) if text is None]
        asked = [starts[number] for number in missing]
        examples = torch.tensor([start.example for start in asked], dtype=torch.int64, device=device)
        new = generate(
            net,
            [start.prompt for start in asked],
            new_tokens=self.new_tokens,
            context=self.context,
            eos_id=self.eos_id,
            pad_id=self.pad_id,
            vocab_size=self.vocab_size,
            temperature=self.temperature,
            top_p=self.top_p,
            uniform=Draws(fold(seed_of(seed, "own text", step), examples)).uniform,
            source=encoder_rows(batch.inputs, [start.row for start in asked]),
        )
        torch.clear_autocast_cache()  # weights cast without gradients are no good to the training step that follows
        if self._kept.room:
            texts = _moved(new, "cpu", torch.int32)
            self._kept.add(step, [(starts[n].example, shown[n], t) for n, t in zip(missing, texts, strict=True)])
        fresh, old = iter(new), iter(_moved([text for text in kept if text is not None], device, torch.int64))
        return [next(fresh) if text is None else next(old) for text in kept]

    def _shown(self, batch: Batch, starts: list[_Start]) -> list[Tensor]:
        """Return the prompts as the buffer keeps them; empty tensors where it keeps none."""
        if not self._kept.room:
            return [torch.empty(0)] * len(starts)
        ids = batch.inputs[_name(batch)].cpu().int()  # type: ignore[index]
        return [ids[start.row, : len(start.prompt)] for start in starts]

    def _rebuilt(self, batch: Batch, starts: list[_Start], texts: list[Tensor]) -> Batch:
        """Return the batch with other continuations."""
        assert isinstance(batch, SequenceBatch) and isinstance(batch.inputs, dict) and batch.example_id is not None
        device, total = batch.targets.device, sum(len(text) for text in texts)
        about = [
            (start.row, start.kind, len(start.prompt), len(text)) for start, text in zip(starts, texts, strict=True)
        ]
        rows, kinds, given, sizes = torch.tensor(about).T.to(device)
        whole = [torch.cat([start.prompt, text[:-1]]) for start, text in zip(starts, texts, strict=True)]
        read = nn.utils.rnn.pad_sequence(whole, batch_first=True, padding_value=self.pad_id)
        places = torch.arange(read.shape[1], device=device)
        inputs = {name: value[rows] for name, value in batch.inputs.items()} | {_name(batch): read}
        if "position_ids" in inputs:
            inputs["position_ids"] = places.expand_as(read)
        share = torch.ones(len(rows), device=device) if batch.sequence_weight is None else batch.sequence_weight[rows]
        targets, labelled = torch.cat(texts), self.writer == "teacher"
        return replace(
            batch,
            inputs=inputs,
            targets=targets if labelled else torch.full_like(targets, NO_LABEL),
            example_id=batch.example_id[rows],
            weight=(share / sizes).repeat_interleave(sizes, output_size=total),
            segment=kinds.repeat_interleave(sizes, output_size=total),
            loss_mask=(places >= given[:, None] - 1) & (places < (given + sizes)[:, None] - 1),
            prompts=None if batch.prompts is None else batch.prompts[rows],
            sequence_weight=share,
            hidden_targets=None,
            window=_window(batch.window, share, labelled),
        )


@dataclass
class _Start:
    """Prompt that is continued, and the row and example that it is from."""

    row: int
    example: int
    prompt: Tensor
    kind: int


class _Buffer:
    """The newest continuations, by example; the same in every process, however the steps were divided.

    What a step adds is not found before the next step, and what is dropped is decided then, by (step, example): so
    the order within a step does not matter.
    """

    def __init__(self, room: int) -> None:
        self.room = room
        self._step = -1
        self._entries: dict[int, tuple[int, Tensor, Tensor]] = {}

    def begin(self, step: int) -> None:
        """Make room, at the first micro-batch of a step."""
        if step == self._step:
            return
        self._step = step
        while (over := len(self._entries) - self.room) > 0:
            # as they are added, the oldest come first; within a step, the order depends on how it was divided
            _, oldest = next(groupby(self._entries, key=lambda example: self._entries[example][0]))
            for example in sorted(oldest)[:over]:
                del self._entries[example]

    def find(self, example: int, prompt: Tensor) -> Tensor | None:
        """Return the text (n,), int32 on the CPU, that an earlier step wrote after this prompt (m,) of this example."""
        step, before, text = self._entries.get(example, (self._step, prompt, prompt))
        return text if step < self._step and before.equal(prompt) else None

    def add(self, step: int, new: list[tuple[int, Tensor, Tensor]]) -> None:
        """Keep what was written in this step, by this and all other processes.

        Each entry is (example, prompt, text), int32 on the CPU.
        """
        # a piece of a tensor would keep all of it, and send all of it
        for example, prompt, text in _everywhere([(e, p.clone(), t.clone()) for e, p, t in new]):
            self._entries.pop(example, None)  # so that it goes to the end
            self._entries[example] = (step, prompt, text)

    def state_dict(self) -> dict[str, Any]:
        if not self._entries:
            return {}
        examples = sorted(self._entries)
        steps, prompts, texts = zip(*(self._entries[example] for example in examples), strict=True)
        return {
            "step": self._step,
            "examples": torch.tensor(examples),
            "steps": torch.tensor(steps),
            "lengths": torch.tensor([[len(p), len(t)] for p, t in zip(prompts, texts, strict=True)]),
            "ids": torch.cat([ids for pair in zip(prompts, texts, strict=True) for ids in pair]),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._entries, self._step = {}, -1
        if not state:
            return
        self._step = int(state["step"])
        pieces = iter(state["ids"].split(state["lengths"].flatten().tolist()))
        each = zip(state["steps"].tolist(), state["examples"].tolist(), pieces, pieces, strict=True)
        for step, example, prompt, text in sorted(each, key=lambda entry: entry[:2]):
            self._entries[example] = (step, prompt.clone(), text.clone())


def _chance(seed: int, name: str, step: int) -> float:
    """Return a random number in [0, 1) that is a function of (seed, name, step)."""
    return float(Draws(fold(seed_of(seed, name), torch.tensor([step]))).uniform(0))


def _name(batch: Batch) -> str:
    return "decoder_input_ids" if "decoder_input_ids" in batch.inputs else "input_ids"


def _prompts(batch: SequenceBatch) -> Tensor:
    """Return the prompt length of each sequence in tokens, (B,); 0 for running text."""
    if batch.prompts is not None:
        return batch.prompts
    if batch.segment is not None and bool((batch.segment != TEXT).any()):
        raise UserError(
            "batch_transform",
            "own text, and the batch does not say how long its prompts are (SequenceBatch.prompts)",
            ("a sequence a row (data.pack=false) of a data set that says so, or batch_transform=none"),
        )
    return batch.targets.new_zeros(len(batch.example_id))  # type: ignore[arg-type]


def _moved(texts: list[Tensor], device: Any, dtype: torch.dtype) -> list[Tensor]:
    """Move texts to ``device`` in one copy."""
    return list(torch.cat(texts).to(device, dtype).split([len(text) for text in texts])) if texts else []


def _window(window: StepTotals | None, share: Tensor, labelled: bool) -> StepTotals:
    """Count the step's rows by the summed weights of its sequences, which is what their rows' weights add up to."""
    whole = window is None or window.parts == 1
    total = float(share.double().sum()) if whole else window.examples  # type: ignore[union-attr]
    if not total:
        raise ValueError("StepTotals.examples: 0; accepted: the summed weight of the sequences of the optimizer step")
    return StepTotals(total if labelled else 0.0, total, 1 if whole else window.parts, total)  # type: ignore[union-attr]


def _everywhere(new: list[Any]) -> list[Any]:
    """Gather the entries of all processes; each calls this at the same micro-batches."""
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return new
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, new)
    return [entry for one in gathered for entry in one]
