"""Many exchanges at a time: rate limits, retries with growing waits, and an end that breaks off open requests."""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kdlab.errors import RunFailed
from kdlab.traces.prompts import Job, PromptTemplate
from kdlab.traces.reply import Fatal, Rejected, Reply, Retryable

if TYPE_CHECKING:
    from kdlab.traces.endpoint import Endpoint

LONGEST_WAIT = 900.0
"""Longest wait in seconds that an endpoint may ask for; above it, waiting is left to the user."""

_HOPELESS_AFTER = 5
"""Number of questions refused in a row, with none answered, after which the request itself must be wrong."""


@dataclass(frozen=True)
class Answer:
    """Answer of a teacher to one job.

    Attributes:
        rows: rows for the token cache, made by :mod:`kdlab.traces.scores`, or None.
    """

    job: Job
    reply: Reply
    rows: Any = None


@dataclass(frozen=True)
class Failure:
    """Question that stays without an answer."""

    job: Job
    reason: str
    tries: int
    refused: bool = False

    def row(self) -> dict[str, Any]:
        """Return the failure as a row of ``OUT.failed.jsonl``."""
        named = {"id": self.job.ask.id, "key": self.job.ask.key, "sample": self.job.sample}
        return {**named, "error": self.reason, "tries": self.tries}


class RateLimiter:
    """Limiter of requests and tokens per minute.

    Args:
        requests: number of requests per minute, evenly spaced; None for any number.
        tokens: number of tokens per minute, of prompts and answers; None for any number. The cost of an answer is first
            taken to be the mean of those before, and corrected once it is known.
        guess: number of tokens of an exchange before any is known.
        clock: function that returns the time in seconds, for tests.
    """

    def __init__(
        self,
        requests: float | None = None,
        tokens: float | None = None,
        guess: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.requests, self.tokens, self.clock = requests, tokens, clock
        self._next = self._not_before = self._filled = clock()
        self._balance = tokens or 0.0
        self._guess, self._open, self._spent, self._exchanges = guess, 0, 0, 0

    def claim(self) -> float:
        """Return the seconds to wait before asking again; 0: send now, and call :meth:`spent` afterwards."""
        now = self.clock()
        if now < self._not_before:
            return self._not_before - now
        if self.tokens is not None:
            rate = self.tokens / 60
            self._balance = min(self._balance + (now - self._filled) * rate, self.tokens)
            self._filled = now
            lacking = min(self._guess, self.tokens) + self._open * self._guess - self._balance
            if lacking > 0:  # at most a second: exchanges under way may take less than thought
                return min(lacking / rate + 1e-3, 1.0)
        if self.requests is not None:
            if now < self._next:
                return self._next - now
            self._next = now + 60 / self.requests
        self._open += 1
        return 0.0

    def spent(self, tokens: int | None) -> None:
        """Record that an exchange took so many tokens (None: it failed, and took none)."""
        self._open -= 1
        self._balance -= tokens or 0
        if tokens:
            self._exchanges += 1
            self._spent += tokens
            self._guess = self._spent / self._exchanges

    def pause(self, seconds: float) -> None:
        """Let no request pass for so many seconds."""
        self._not_before = max(self._not_before, self.clock() + seconds)


@dataclass(frozen=True)
class RetryPolicy:
    """Number of tries, and waits of ``first * 2^i`` seconds, at most ``longest``, times a random half to one."""

    most: int = 6
    first: float = 1.0
    longest: float = 60.0

    def wait(self, failed: int) -> float:
        """Return the seconds to wait after the ``failed``-th failure; random, so that retries are spread out."""
        return min(self.first * 2 ** (failed - 1), self.longest) * random.uniform(0.5, 1.0)


class ConcurrentClient:
    """Answer source that asks an endpoint, several questions at a time.

    Args:
        endpoint: endpoint to ask.
        wording: template by which questions become prompts.
        settings: further fields of every request; a ``seed`` is added.
        concurrency: number of exchanges at a time.
        pace: rate limits.
        tries: retries of requests that may work later.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        wording: PromptTemplate,
        settings: Mapping[str, Any],
        concurrency: int = 4,
        pace: RateLimiter | None = None,
        tries: RetryPolicy | None = None,
    ) -> None:
        self.endpoint, self.wording, self.settings = endpoint, wording, dict(settings)
        self.concurrency, self.pace, self.tries = concurrency, pace or RateLimiter(), tries or RetryPolicy()

    def body(self, job: Job) -> dict[str, Any]:
        """Return the request for one job."""
        if self.endpoint.address.chat:
            asked: dict[str, Any] = {"messages": self.wording.messages(job.ask)}
        else:
            asked = {"prompt": self.wording.prompt(job.ask)}
        body = {**asked, "seed": job.seed, **self.settings}
        return {name: value for name, value in body.items() if value is not None}

    def answers(self, jobs: Iterable[Job]) -> Iterator[Answer | Failure]:
        """Yield every job's answer or failure, in the order in which they come.

        Raises:
            RunFailed: if no question can be answered: a wrong key, address or model.
        """
        waiting, done = deque(jobs), asyncio.Queue[Answer | Failure | Exception]()
        total, answered, refused = len(waiting), 0, 0

        async def start() -> list[asyncio.Task[None]]:
            return [asyncio.create_task(self._work(waiting, done)) for _ in range(min(self.concurrency, total))]

        with asyncio.Runner() as runner:  # its end breaks off what is under way
            workers = runner.run(start())
            try:
                for _ in range(total):
                    settled = runner.run(done.get())
                    if isinstance(settled, Exception):
                        raise settled
                    answered += isinstance(settled, Answer)
                    refused += isinstance(settled, Failure) and settled.refused
                    yield settled
                    if not answered and refused >= _HOPELESS_AFTER and isinstance(settled, Failure):
                        raise RunFailed(f"the endpoint refused the first {refused} questions: {settled.reason}")
            finally:
                for worker in workers:
                    worker.cancel()
                runner.run(self.endpoint.close())

    async def _work(self, waiting: deque[Job], done: asyncio.Queue[Answer | Failure | Exception]) -> None:
        while waiting:
            try:
                done.put_nowait(await self._persist(waiting.popleft()))
            except Fatal as error:
                waiting.clear()  # nobody else asks with a wrong key
                done.put_nowait(RunFailed(f"{self.endpoint.address.host}: {error}"))
            except Exception as error:
                done.put_nowait(error)

    async def _persist(self, job: Job) -> Answer | Failure:
        """Send a job's prompt until there is an answer, or no further try can help."""
        body, reason = self.body(job), ""
        for attempt in range(1, self.tries.most + 1):
            while (wait := self.pace.claim()) > 0:
                await asyncio.sleep(wait)
            tokens = None
            try:
                reply = await self.endpoint.ask(body)
                tokens = reply.usage.get("total_tokens") or sum(
                    reply.usage.get(name, 0) for name in ("prompt_tokens", "completion_tokens")
                )
                return Answer(job, reply)
            except Rejected as error:
                return Failure(job, str(error), attempt, refused=True)
            except Retryable as error:
                reason, wait = str(error), self._after(error, attempt)
            finally:
                self.pace.spent(tokens)
            if attempt < self.tries.most:
                await asyncio.sleep(wait)
        return Failure(job, reason, self.tries.most)

    def _after(self, error: Retryable, attempt: int) -> float:
        wait = self.tries.wait(attempt)
        if error.after is None:
            return wait
        if error.after > LONGEST_WAIT:
            raise Fatal(f"{error}: asks to wait {error.after:,.0f} s; the same command goes on then")
        self.pace.pause(error.after)  # the limit is everyone's
        return error.after + wait * 0.1
