"""Prompts: questions from JSONL, their identity, and the templates that make prompts of them."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdlab.errors import UserError, misspelt, unknown

log = logging.getLogger("kdlab")

CHAT = "{question}\n\nThink step by step. Then end with a line that holds only {marker} and the final answer."
"""Template of the instruction for a chat model."""

PLAIN = "Q: {question}\nA:"
"""Template for a model without a chat form: the prompt that traces are trained with.

A model that was not trained so needs examples before it (``--template @FILE``).
"""

_FIELDS = ("question", "messages", "gold", "answer", "id", "choices", "equation", "group")
_ROLES = ("system", "developer", "user", "assistant")
_THOUGHTS = re.compile(r"^\s*<think(?:ing)?>(.*?)</think(?:ing)?>", re.DOTALL)


@dataclass(frozen=True)
class Prompt:
    """Question to be answered by a teacher.

    Attributes:
        key: identity of the question for resuming: a hash of id and content.
        question: text of the question, or None where there are ``messages``.
        messages: chat messages, or empty.
        gold: right answer, or None.
        id: name of the question in its file, or None.
        more: further fields of the line that a trace keeps (``choices``, ``equation``, ``group``).
    """

    key: str
    question: str | None
    messages: tuple[Mapping[str, str], ...] = ()
    gold: str | None = None
    id: str | int | None = None
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """Answer that is wanted: a question, and the number of the sample."""

    ask: Prompt
    sample: int
    seed: int

    @classmethod
    def of(cls, ask: Prompt, sample: int, seed: int) -> Job:
        """Return a job whose seed in 0 .. 2^31 - 1 follows from the run's seed, the question and the sample alone."""
        digest = hashlib.sha256(f"{seed}\0{ask.key}\0{sample}".encode()).digest()
        return cls(ask, sample, int.from_bytes(digest[:4], "big") >> 1)

    @property
    def key(self) -> tuple[str, int]:
        """Identity of the job: the question's hash, and the number of the sample."""
        return self.ask.key, self.sample


@dataclass(frozen=True)
class PromptTemplate:
    """Template that makes a prompt of a question, and finds the answer in a reply.

    Args:
        system: text of a system message, or None.
        template: text with ``{question}``, and ``{marker}`` where the marker belongs; None: :data:`CHAT` or
            :data:`PLAIN`.
        marker: text that stands before the final answer.
    """

    system: str | None = None
    template: str | None = None
    marker: str = "####"

    def __post_init__(self) -> None:
        if self.template is not None and "{question}" not in self.template:
            raise UserError("--template", f"{self.template[:60]!r} has no {{question}}", "a text that has it")
        if not self.marker.strip():
            raise UserError("--marker", "empty", "a text such as ####")

    def text(self, ask: Prompt, chat: bool) -> str:
        """Return the question in its template."""
        template = self.template if self.template is not None else (CHAT if chat else PLAIN)
        # not str.format: questions and templates have braces of their own
        return template.replace("{marker}", self.marker).replace("{question}", ask.question or "")

    def messages(self, ask: Prompt) -> list[dict[str, str]]:
        """Return the question as chat messages; its own messages stay unchanged."""
        messages = [dict(m) for m in ask.messages] or [{"role": "user", "content": self.text(ask, True)}]
        if self.system is not None and messages[0]["role"] not in ("system", "developer"):
            messages.insert(0, {"role": "system", "content": self.system})
        return messages

    def prompt(self, ask: Prompt) -> str:
        """Return the question as one text, for a model without a chat form."""
        lead = "" if self.system is None else f"{self.system}\n\n"
        return lead + self.text(ask, False)

    def split(self, text: str, reasoning: str | None = None) -> tuple[str, str | None]:
        """Return (reasoning, final answer or None) of what a teacher wrote.

        Args:
            text: answer as it came; ``<think>...</think>`` at its start is reasoning.
            reasoning: reasoning that came apart from the text, put before it.
        """
        if (thoughts := _THOUGHTS.match(text)) is not None:
            reasoning = "\n".join(part for part in (reasoning, thoughts[1].strip()) if part)
            text = text[thoughts.end() :]
        before, marker, tail = text.rpartition(self.marker)
        answer = tail.strip().partition("\n")[0].strip() if marker else ""
        body = (before if answer else text).strip()
        return "\n".join(part for part in (reasoning and reasoning.strip(), body) if part), answer or None


def read_questions(path: Path, limit: int | None = None, answer_key: str | None = None) -> list[Prompt]:
    """Read the questions of a JSONL file: ``question`` or ``messages``, optionally ``gold`` or ``answer``, and ``id``.

    An ``answer`` that holds GSM8K's ``####`` counts from there on. The same question twice is asked once.

    Args:
        path: path of the file.
        limit: largest number of questions to read.
        answer_key: field with the right answer; None: ``gold``, else ``answer``.

    Raises:
        UserError: with the number of the first line that is not such an object; for one id of two questions; if there
            are none.
    """
    questions: dict[str, Prompt] = {}
    lines: dict[str, tuple[int, str]] = {}
    named: set[str] = set()
    for number, text in _lines(path):
        ask = _ask(text, f"{path}: line {number}", answer_key, named)
        if ask.id is not None:
            first, key = lines.setdefault(str(ask.id), (number, ask.key))
            if key != ask.key:
                raise UserError(path, f"line {number}: id {ask.id!r} is line {first}'s too", "unique ids")
        questions.setdefault(ask.key, ask)
        if limit is not None and len(questions) >= limit:
            break
    if not questions:
        raise UserError(path, "no questions in it", f"lines such as {_EXAMPLE}")
    return list(questions.values())


_EXAMPLE = '{"question": "..."} or {"messages": [{"role": "user", "content": "..."}]}'


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                try:
                    text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise UserError(path, f"line {number}: not UTF-8 ({error.reason})") from None
                if text.strip():
                    yield number, text
    except OSError as error:
        raise UserError(path, error.strerror, f"a JSONL file with lines such as {_EXAMPLE}") from None


def _ask(text: str, where: str, answer_key: str | None, named: set[str]) -> Prompt:
    """Return the question of a line; add to ``named`` the misspelt keys that the log has named, to name each once."""
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(where, f"no JSON ({error})", _EXAMPLE) from None
    if not isinstance(row, dict):
        raise UserError(where, f"a JSON {type(row).__name__}", _EXAMPLE)
    for slip in sorted(row.keys() - named - {*_FIELDS, answer_key}):
        named.add(slip)
        if meant := misspelt(slip, [one for one in _FIELDS if one not in row]):
            log.warning("%s: field %r is not read as %r", where, slip, meant)
    question, messages, name = row.get("question"), row.get("messages"), row.get("id")
    if messages is not None:
        question = None
        _check_messages(messages, where)
    elif not isinstance(question, str) or not question.strip():
        near = unknown("", "question", row, "field") if row and "question" not in row else None
        raise UserError(where, "no text under 'question'", f"{_EXAMPLE}, not{near}" if near else _EXAMPLE)
    if name is not None and (isinstance(name, bool) or not isinstance(name, str | int)):
        raise UserError(where, f"id {name!r}", "a text or an integer")
    if answer_key is not None and answer_key not in row:
        raise UserError(where, f"no field {answer_key!r}", ", ".join(map(repr, row)))
    value = row.get(answer_key) if answer_key else row.get("gold", row.get("answer"))
    gold = None if value is None or isinstance(value, dict | list) else str(value)
    if gold is not None and "####" in gold:
        gold = gold.rpartition("####")[2].strip()
    content = [None if name is None else str(name), question if messages is None else messages]
    try:
        key = hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]
    except UnicodeEncodeError:
        raise UserError(where, "holds half of a surrogate pair", "valid Unicode text") from None
    more = {name: row[name] for name in ("choices", "equation", "group") if row.get(name) is not None}
    return Prompt(key, question, tuple(messages or ()), gold or None, name, more)


def _check_messages(messages: object, where: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise UserError(where, "messages is no list of messages", _EXAMPLE)
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise UserError(where, "a message without text under 'content'", _EXAMPLE)
        if message.get("role") not in _ROLES:
            raise unknown(f"{where}: role", message.get("role"), _ROLES)
    if messages[-1]["role"] == "assistant":
        raise UserError(where, "the last message is the assistant's", "messages that end with a question")
