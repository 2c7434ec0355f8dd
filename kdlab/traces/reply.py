"""Replies of an endpoint, read without trust in their type or shape; and the errors that they can be."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


class Failed(Exception):
    """Error of an exchange that brought no answer: the reason, in one line, without the key."""

    def __init__(self, reason: str) -> None:
        super().__init__(" ".join(reason.split()))


class Retryable(Failed):
    """Error that may not occur on another try.

    Attributes:
        after: number of seconds that the endpoint asks to wait, or None.
    """

    def __init__(self, reason: str, after: float | None = None) -> None:
        super().__init__(reason)
        self.after = after


class Rejected(Failed):
    """Error of an endpoint that does not answer this question, and would not on another try."""


class Fatal(Failed):
    """Error by which no question can be answered: a wrong key, address or model."""


@dataclass(frozen=True)
class Scored:
    """Token of an answer with its log-probabilities, as the endpoint names it.

    Attributes:
        piece: bytes of the token; of a special form ``token_id:N`` where the endpoint names ids.
        top: pairs of (piece, natural log-probability), the most probable first.
    """

    piece: bytes
    top: tuple[tuple[bytes, float], ...]


@dataclass(frozen=True)
class Reply:
    """Reply to one prompt.

    Attributes:
        text: text of the answer, never empty.
        reasoning: reasoning that the endpoint keeps apart from it, or None.
        finish_reason: reason of the end: ``stop``, ``length`` and the like; empty where the endpoint says nothing.
        usage: numbers of tokens, by the endpoint's names.
        scores: a row for each token of the text, or None.
    """

    text: str
    reasoning: str | None = None
    finish_reason: str = ""
    usage: dict[str, int] = field(default_factory=dict)
    scores: tuple[Scored, ...] | None = None


def complaint(raw: bytes) -> tuple[str, str]:
    """Return (code, message) of an error's body, as far as it has them."""
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        text = raw[:200].decode("utf-8", "replace").strip()
        return "", "an HTML page" if text.startswith("<") else text
    error = body.get("error", body) if isinstance(body, dict) else body
    if isinstance(error, dict):
        message = error.get("message") or error.get("detail") or ""
        return str(error.get("code") or error.get("type") or ""), str(message)[:300]
    return "", str(error)[:300]


def read_reply(body: Mapping[str, Any], chat: bool, clean: Callable[[str], str] = str) -> Reply:
    """Read the first choice of an answer's body.

    Args:
        body: JSON object of the answer.
        chat: whether it should hold a message (else a text).
        clean: function applied to every text.

    Raises:
        Retryable: if a field is missing or of another type, or the text is empty.
        Rejected: if the model declined to answer.
    """
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        _, error = complaint(json.dumps({"error": body["error"]}).encode()) if body.get("error") else ("", "")
        raise Retryable(clean(f"the answer has no choices{': ' if error else ''}{error}"))
    choice = choices[0]  # one is asked for; what else comes is the same, or odd
    reason = choice.get("finish_reason")
    reasoning = None
    if chat:
        message = choice.get("message")
        if not isinstance(message, dict):
            raise Retryable("the answer has no message")
        text = _text(message.get("content"))
        reasoning = _text(message.get("reasoning_content")) or _text(message.get("reasoning")) or None
        if not text.strip() and isinstance(message.get("refusal"), str):
            raise Rejected(clean(f"the model declined: {message['refusal'][:200]}"))
    else:
        text = _text(choice.get("text"))
    if not text.strip():
        if reason == "content_filter":
            raise Rejected("the answer was filtered")
        raise Retryable("the answer is empty" + (" (reasoning took all tokens)" if reason == "length" else ""))
    usage = body.get("usage")
    return Reply(
        clean(text),
        None if reasoning is None else clean(reasoning),
        clean(reason) if isinstance(reason, str) else "",
        {k: v for k, v in usage.items() if type(v) is int and v >= 0} if isinstance(usage, dict) else {},
        _scores(choice.get("logprobs"), chat),
    )


def _text(content: object) -> str:
    """Return a text, or the joined texts of a list of parts."""
    if isinstance(content, list):
        return "".join(p["text"] for p in content if isinstance(p, dict) and isinstance(p.get("text"), str))
    return content if isinstance(content, str) else ""


def _scores(logprobs: object, chat: bool) -> tuple[Scored, ...] | None:
    """Read log-probabilities in either API's form; None where they are missing or not as documented."""
    try:
        assert isinstance(logprobs, dict)
        if isinstance(logprobs.get("content"), list):
            return tuple(
                Scored(_piece(row), _ranked([(_piece(r), float(r["logprob"])) for r in row["top_logprobs"]]))
                for row in logprobs["content"]
            )
        rows = zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True)
        return tuple(
            Scored(token.encode(), _ranked([(name.encode(), float(value)) for name, value in top.items()]))
            for token, top in rows
        )
    except (AssertionError, KeyError, TypeError, ValueError, AttributeError, UnicodeEncodeError):
        return None


def _piece(row: Mapping[str, Any]) -> bytes:
    given = row.get("bytes")
    return bytes(given) if isinstance(given, list) else row["token"].encode()


def _ranked(pairs: list[tuple[bytes, float]]) -> tuple[tuple[bytes, float], ...]:
    if any(not value <= 1e-3 for _, value in pairs):  # NaN too
        raise ValueError
    return tuple(sorted(pairs, key=lambda pair: -pair[1]))
