"""Pipeline from questions to traces: asks the missing ones, writes the answers, and counts them."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from kdlab.errors import UserError
from kdlab.system.terminal import say
from kdlab.traces.pool import Answer, Failure
from kdlab.traces.prompts import Job, Prompt, PromptTemplate
from kdlab.traces.writer import Output

if TYPE_CHECKING:
    from kdlab.data.text.datasets.traces import Trace
    from kdlab.teachers.cache.token_files import TokenWriter
    from kdlab.traces.scores import Pieces


class AnswerSource(Protocol):
    """Source of answers: :class:`~kdlab.traces.pool.ConcurrentClient` or :class:`~kdlab.traces.local.Local`."""

    wording: PromptTemplate

    def answers(self, jobs: Iterable[Job]) -> Iterator[Answer | Failure]:
        """Yield an answer or a failure for each job, in any order."""


@dataclass
class Summary:
    """Counts of a pipeline's questions, answers and failures.

    Attributes:
        written: number of traces written now; ``skipped``: number of those that were there before.
        failed: number of questions (samples of them) without an answer.
        judged, right: number of traces written now with a known answer, and with that answer.
        unanswered: number of traces written now in which no final answer was found.
        scored: number of traces written now with rows in the token cache; None where none were asked for.
        tokens: number of tokens in the answers, where the teacher reports it; ``counted``: number of those answers.
        words: number of words of reasoning, over all traces written now.
        seconds: total time.
    """

    written: int = 0
    skipped: int = 0
    failed: int = 0
    judged: int = 0
    right: int = 0
    unanswered: int = 0
    scored: int | None = None
    tokens: int = 0
    counted: int = 0
    words: int = 0
    seconds: float = 0.0
    reasons: dict[str, int] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """Return the summary as lines of text."""
        lines = [f"written {self.written}, skipped {self.skipped} (there already), failed {self.failed}"]
        if self.judged:
            lines[0] += f"; right {self.right} of {self.judged} ({self.right / self.judged:.1%})"
        if self.written:
            mean = f"mean length: reasoning {self.words / self.written:.1f} words"
            if self.counted:
                rate = self.tokens / max(self.seconds, 1e-9)
                mean += f", answer {self.tokens / self.counted:.1f} tokens; {rate:,.1f} tokens per second"
            lines.append(mean)
        if self.unanswered:
            lines.append(f"no final answer found in {self.unanswered} (no marker in what was written)")
        if self.scored is not None:
            why = "; of the others, training has other tokens" if self.scored < self.written else ""
            lines.append(f"log-probabilities of {self.scored} of {self.written} traces{why}")
        return lines + [f"failed {n}: {reason}" for reason, n in sorted(self.reasons.items(), key=lambda p: -p[1])[:5]]


@dataclass
class Soft:
    """Settings of the token cache that log-probabilities are stored in.

    Args:
        pieces: pieces of the tokenizer that training uses.
        k: number of classes a token.
        folder: folder of the token cache.
        teacher: name of the teacher that gave them.
    """

    pieces: Pieces
    k: int
    folder: Path
    teacher: str

    def open(self) -> TokenWriter:
        """Return the cache's writer.

        Raises:
            UserError: if the folder holds a cache of something else.
        """
        from kdlab.teachers.cache.token_files import TokenManifest, TokenWriter

        tokenizer = self.pieces.tokenizer
        return TokenWriter(
            self.folder,
            TokenManifest(teacher=self.teacher, data=tokenizer.identity, classes=tokenizer.size, k=self.k),
        )

    def add(self, writer: TokenWriter, answer: Answer, trace: Trace) -> bool:
        """Store an answer's rows, on the disk when this returns; return whether there were any that fit."""
        from kdlab.traces.scores import align

        reply = answer.reply
        if not reply.scores or not trace.reasoning or trace.answer is None:
            return False
        ended = reply.finish_reason in ("", "stop")
        rows = align(reply.scores, self.pieces, trace.question, trace.reasoning, trace.answer, self.k, ended)
        if rows is None:
            return False
        writer.append(rows.ids, rows.positions, rows.classes, rows.log_probs)
        writer.flush()  # before the trace: what counts as done must have its rows
        return True


def run_pipeline(
    asks: Sequence[Prompt],
    samples: int,
    seed: int,
    source: AnswerSource,
    output: Output,
    about: Mapping[str, Any],
    soft: Soft | None = None,
) -> Summary:
    """Ask the questions that are not answered yet, and append each answer as a trace.

    Args:
        asks: questions to answer.
        samples: number of answers wanted for each.
        seed: seed of all samples.
        source: source of the answers.
        output: file that traces are appended to; it is opened here.
        about: keys that every trace gets (``teacher``, ``model``, ``temperature``).
        soft: settings of the token cache for log-probabilities, or None.

    Returns:
        The counts; an exception that interrupts it carries them as ``summary``.
    """
    # seconds of imports, before there are answers that could get lost meanwhile
    import kdlab.data.text.datasets.traces  # noqa: F401

    started, summary = time.monotonic(), Summary(scored=0 if soft else None)
    failures: list[dict[str, Any]] = []
    with ExitStack() as stack:
        cache = stack.enter_context(soft.open()) if soft else None
        stack.enter_context(output)
        wanted = [Job.of(ask, sample, seed) for sample in range(samples) for ask in asks]
        jobs = [job for job in wanted if job.key not in output.done]
        summary.skipped = len(wanted) - len(jobs)
        progress = stack.enter_context(Progress(len(jobs)))
        try:
            for outcome in source.answers(jobs):
                if isinstance(outcome, Failure):
                    failures.append(outcome.row())
                    summary.failed += 1
                    summary.reasons[outcome.reason] = summary.reasons.get(outcome.reason, 0) + 1
                else:
                    trace = to_trace(outcome, source.wording, about)
                    if soft is not None and cache is not None:
                        scored = soft.add(cache, outcome, trace)
                        trace = replace(trace, extra={**trace.extra, "scored": scored})
                        summary.scored = (summary.scored or 0) + scored
                    output.add(outcome.job.key, trace.line())
                    _count(summary, outcome, trace)
                progress.show(summary)
        except BaseException as error:
            error.summary = summary  # type: ignore[attr-defined]
            raise
        finally:
            summary.seconds = time.monotonic() - started
            output.write_failures(failures)
    return summary


def to_trace(answer: Answer, wording: PromptTemplate, about: Mapping[str, Any]) -> Trace:
    """Divide an answer into reasoning and final answer, and judge it where the right answer is known."""
    from kdlab.data.text.datasets.traces import Trace

    ask, reply = answer.job.ask, answer.reply
    reasoning, final = wording.split(reply.text, reply.reasoning)
    about = dict(about)
    extra = {
        **({} if ask.id is None else {"id": ask.id}),
        **{name: value for name, value in ask.more.items() if name != "group"},
        **{name: value for name, value in about.items() if name != "teacher"},
        "seed": answer.job.seed,
        "sample": answer.job.sample,
        "key": ask.key,
        "finish_reason": reply.finish_reason or None,
        "usage": reply.usage or None,
    }
    return Trace(
        question=ask.question or spoken(ask.messages),
        reasoning=reasoning or None,
        answer=final,
        teacher=about.get("teacher"),
        messages=ask.messages or None,
        gold=ask.gold,
        correct=None if ask.gold is None else is_right(final, ask),
        group=str(ask.more.get("group") or ""),
        extra=extra,
    )


def spoken(messages: Sequence[Mapping[str, str]]) -> str:
    """Return a conversation as the one text that :func:`kdlab.data.text.datasets.traces.read_traces` makes of it."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


def is_right(given: str | None, ask: Prompt) -> bool:
    """Return whether an answer is right: among the question's choices, as a number, or else as words."""
    from kdlab.data.text.answers import choice, same_number, same_text
    from kdlab.data.text.numerals import is_number

    if given is None or ask.gold is None:
        return False
    choices = ask.more.get("choices")
    if isinstance(choices, list) and all(isinstance(option, str) for option in choices):
        chosen, right = choice(given, choices), choice(ask.gold, choices)
        return chosen is not None and chosen == right
    if is_number(ask.gold):
        return same_number(given, ask.gold)
    return same_text(given, ask.gold)


def write_filtered(output: Output, keep: str, scored: bool) -> tuple[Path, int]:
    """Write the traces that are worth learning to ``OUT.filtered.jsonl``; return its path, and their number.

    Args:
        output: output that holds all traces.
        keep: filter: ``all``, ``right`` or ``agreeing``; see :func:`kdlab.data.text.datasets.traces.select`.
        scored: whether to keep only traces whose log-probabilities are in the token cache.
    """
    from kdlab.data.text.answers import same_number, same_text
    from kdlab.data.text.datasets.traces import agreeing_ones, read_traces, right_ones, write_traces
    from kdlab.data.text.numerals import is_number

    def same(given: str, other: str) -> bool:
        if is_number(other):
            return same_number(given, other)
        return same_text(given, other)

    traces = read_traces(output.path, "OUT", torn=True)
    if keep == "right":
        traces = right_ones([trace for trace in traces if trace.correct is not None], same, "--keep")
    elif keep == "agreeing":
        traces = agreeing_ones(traces, same)
    if scored:
        traces = [trace for trace in traces if trace.extra.get("scored")]
    path = output.path.with_name(f"{output.path.name}.filtered.jsonl")
    write_traces(path, traces)
    return path, len(traces)


def check_keep(keep: str, asks: Sequence[Prompt], samples: int) -> None:
    """Check that a filter can keep at least one trace.

    Raises:
        UserError: for a filter that could keep nothing.
    """
    if keep == "right" and all(ask.gold is None for ask in asks):
        raise UserError("--keep", "right, and no question has a gold answer", "agreeing, or questions with gold")
    if keep == "agreeing" and samples < 2:
        raise UserError("--keep", f"agreeing, with --samples {samples}", "at least 2 samples")


def _count(summary: Summary, answer: Answer, trace: Trace) -> None:
    summary.written += 1
    summary.judged += trace.correct is not None
    summary.right += bool(trace.correct)
    summary.unanswered += trace.answer is None
    summary.words += len((trace.reasoning or "").split())
    if (tokens := answer.reply.usage.get("completion_tokens")) is not None:
        summary.tokens += tokens
        summary.counted += 1


class Progress:
    """Progress display on standard error: a bar on a terminal, else a line every few seconds."""

    def __init__(self, total: int, seconds: float = 10.0) -> None:
        self.total, self.seconds = total, seconds

    def __enter__(self) -> Progress:
        self._bar: Any = None
        self._last, self._started = time.monotonic(), time.monotonic()
        if sys.stderr.isatty() and self.total:
            from tqdm import tqdm

            self._bar = tqdm(total=self.total, unit="answer", leave=False, file=sys.stderr)
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, summary: Summary) -> None:
        """Show the counts after one more answer or failure."""
        done = summary.written + summary.failed
        right = f", right {summary.right / summary.judged:.1%}" if summary.judged else ""
        if self._bar is not None:
            self._bar.set_postfix_str(f"failed {summary.failed}{right}", refresh=False)
            self._bar.update(done - self._bar.n)
        elif time.monotonic() - self._last > self.seconds:
            self._last = time.monotonic()
            left = (self._last - self._started) / done * (self.total - done)
            line = f"generate: {done} of {self.total}, failed {summary.failed}{right}, {left:.0f} s left"
            say(line, file=sys.stderr)
