"""Exchange with an OpenAI-compatible endpoint, through the ``openai`` client (the extra ``[generate]``).

Nothing that an endpoint sends is trusted: not its length, its status, its type or its shape. What goes wrong is one of
three errors, by what helps: trying again, leaving this question out, or stopping.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
import re
import ssl
import time
import urllib.parse
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from kdlab import __version__
from kdlab.errors import UserError
from kdlab.traces.reply import Failed, Fatal, Rejected, Reply, Retryable, complaint, read_reply

try:
    import httpx2
    import openai
except ModuleNotFoundError:
    raise UserError("--endpoint", "openai is not installed", "pip install 'kdlab[generate]'") from None

LARGEST = 64 * 2**20
"""Largest number of bytes of an answer that is read."""

_PERMANENT = {
    401: "the key is missing or not accepted",
    402: "payment is required",
    403: "access is denied",
    404: "no such address or model",
    405: "no such method at this address",
}
_PASSING = {408, 409, 421, 425, 429}


# ---- address and key


@dataclass(frozen=True)
class Address:
    """Address that requests are sent to.

    Attributes:
        path: path of the requests themselves, ``.../chat/completions`` or ``.../completions``.
        chat: whether it takes messages.
    """

    scheme: str
    host: str
    port: int
    path: str
    chat: bool

    @classmethod
    def of(cls, url: str, api: str | None = None, insecure: bool = False) -> Address:
        """Read a URL such as ``https://host/v1`` or ``http://localhost:8000/v1/completions``.

        Args:
            url: base URL, or the whole address of the requests.
            api: kind of the API, ``chat`` or ``completions``; None: by the URL's end, else ``chat``.
            insecure: whether to allow plain http to other machines.

        Raises:
            UserError: for anything else than an http(s) URL without user, query and fragment.
        """
        accepted = "a URL such as https://api.example.com/v1 or http://localhost:8000/v1"
        try:
            parts = urllib.parse.urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise UserError("--endpoint", f"not a URL ({error})", accepted) from None
        if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
            # not shown: what stands there may be a secret
            raise UserError("--endpoint", "has a user, query or fragment", f"{accepted}, the key in the environment")
        host = parts.hostname or ""
        if parts.scheme not in ("http", "https") or not re.fullmatch(r"[\w.:-]+", host) or re.search(r"[\s\0]", url):
            raise UserError("--endpoint", f"{url!r}", accepted)
        if parts.scheme == "http" and not is_local(host) and not insecure:
            raise UserError(
                "--endpoint",
                f"{url} would send key and questions unencrypted",
                "https, http to localhost, or --insecure",
            )
        path = parts.path.rstrip("/")
        ending = re.search(r"/(chat/)?completions$", path)
        kind = None if ending is None else ("chat" if ending[1] else "completions")
        if kind and api and kind != api:
            raise UserError("--api", f"{api}, and the endpoint's path ends with {ending and ending[0]}", kind)
        chat = (kind or api or "chat") == "chat"
        if not ending:
            path += "/chat/completions" if chat else "/completions"
        return cls(parts.scheme, host, port or (443 if parts.scheme == "https" else 80), path, chat)

    @property
    def url(self) -> str:
        """Address as a URL."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{urllib.parse.quote(self.path, safe='/%:@')}"

    @property
    def base(self) -> str:
        """URL without the path that the client appends to it."""
        return self.url.removesuffix("/chat/completions" if self.chat else "/completions")


def is_local(host: str) -> bool:
    """Return whether a host name is this machine's own."""
    if host.lower() in ("localhost", "ip6-localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_key(variable: str | None, address: Address) -> str | None:
    """Return the API key from the environment; None for a server on this machine that needs none.

    Args:
        address: the server.
        variable: name of the environment variable; None: ``OPENAI_API_KEY``, and a local server may go without.

    Raises:
        UserError: if it is not set, or holds what no header can; never with its value.
    """
    name = variable or "OPENAI_API_KEY"
    key = os.environ.get(name, "").strip()
    if not key:
        if variable is None and is_local(address.host):
            return None
        raise UserError("--key-variable", f"{name} is not set", "an environment variable that holds the API key")
    if not re.fullmatch(r"[\x21-\x7e]+", key):
        raise UserError("--key-variable", f"{name} holds spaces or characters no key has", "printable ASCII")
    return key


# ---- the exchange


class Endpoint:
    """Client that sends prompts to one address.

    Args:
        address: address to send to.
        key: API key, sent as a bearer token to that address only; it appears in no text that leaves this class.
        timeout: number of seconds for a whole exchange, however slowly bytes arrive.
        largest: number of bytes of an answer above which it is given up.
    """

    def __init__(self, address: Address, key: str | None, timeout: float = 300.0, largest: int = LARGEST) -> None:
        self.address, self.timeout, self.largest = address, timeout, largest
        self.__key = key
        # unencrypted requests never go through a proxy: it would read the key
        proxied = address.scheme == "https" and not is_local(address.host)
        self._client = openai.AsyncOpenAI(
            base_url=address.base,
            api_key=key or "none",
            max_retries=0,  # what is tried again, and when, is decided for all questions together
            timeout=timeout,
            default_headers={"User-Agent": f"kdlab/{__version__}", "Accept-Encoding": "identity"},
            http_client=openai.DefaultAsyncHttpxClient(
                follow_redirects=False,  # the other place would get the key
                trust_env=proxied,
                event_hooks={"response": [self._limit]},
            ),
        )

    def __repr__(self) -> str:
        return f"Endpoint({self.address.url})"

    async def ask(self, body: Mapping[str, Any]) -> Reply:
        """Send one request, and return the reply.

        Args:
            body: fields of the request; ``messages`` or ``prompt`` by :attr:`Address.chat`.

        Raises:
            Retryable, Rejected, Fatal: by what helps.
        """
        client, asked = (self._client.chat, "messages") if self.address.chat else (self._client, "prompt")
        needed = {"model": "", asked: ""} | {name: body[name] for name in ("model", asked) if name in body}
        further = {name: value for name, value in body.items() if name not in needed}
        headers = {} if self.__key else {"Authorization": openai.Omit()}
        send = client.completions.with_raw_response.create
        try:
            async with asyncio.timeout(self.timeout):
                answer = await send(**needed, extra_body=further, extra_headers=headers)
        except (TimeoutError, openai.APITimeoutError):
            raise Retryable(f"no answer within {self.timeout:g} s") from None
        except openai.APIConnectionError as error:
            raise self._unreached(error) from None
        except openai.APIStatusError as error:
            raise self._refused(error.response.status_code, error.response.headers, error.response.content) from None
        return read_reply(self._parsed(answer.content), self.address.chat, self._clean)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    def _clean(self, text: str) -> str:
        # halves of surrogate pairs, which JSON can hold, have no form in UTF-8
        text = text.encode("utf-8", "replace").decode()
        return text.replace(self.__key, "[key]") if self.__key else text

    async def _limit(self, response: httpx2.Response) -> None:
        """Limit the size of an answer, and refuse a compressed one, which would grow."""
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise Rejected("the answer is compressed, and was not to be")
        response.stream = _Limited(response.stream, self.largest)

    def _unreached(self, error: BaseException) -> Failed:
        """Return why no answer came: the first of the error's causes that explains it."""
        cause = error
        while True:
            if isinstance(cause, Failed):
                return cause
            if isinstance(cause, ssl.SSLCertVerificationError):
                return Fatal(f"its certificate is not accepted ({getattr(cause, 'verify_message', cause)})")
            if (further := cause.__cause__ or cause.__context__) is None:
                break
            cause = further
        reason = self._clean(str(cause)[:200])
        return Retryable(f"connection failed ({type(cause).__name__}{': ' if reason else ''}{reason})")

    def _parsed(self, raw: bytes) -> dict[str, Any]:
        try:
            body = json.loads(raw)
        except (ValueError, RecursionError):
            kind = "an HTML page" if raw.lstrip()[:1] == b"<" else "nothing" if not raw.strip() else "damaged JSON"
            raise Retryable(f"the answer is {kind}") from None
        if not isinstance(body, dict):
            raise Retryable(f"the answer is a JSON {type(body).__name__}, not an object")
        return body

    def _refused(self, status: int, headers: Mapping[str, str], raw: bytes) -> Failed:
        code, message = complaint(raw)
        more = f": {self._clean(message)}" if message else ""
        if 300 <= status < 400:
            host = urllib.parse.urlsplit(self._clean(headers.get("Location") or "")).hostname
            return Fatal(f"HTTP {status}: redirects to {host or 'another path'}; accepted: --endpoint with that")
        if status in _PERMANENT:
            return Fatal(f"HTTP {status}, {_PERMANENT[status]}{more}")
        if code == "insufficient_quota":
            return Fatal(f"HTTP {status}{more}")
        if status in _PASSING or status >= 500:
            return Retryable(f"HTTP {status}{more}", retry_after(headers))
        return Rejected(f"HTTP {status}{more}")


class _Limited(httpx2.AsyncByteStream):
    """Byte stream of an answer that raises above a number of bytes."""

    def __init__(self, stream: Any, largest: int) -> None:
        self.stream, self.largest = stream, largest

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        async for chunk in self.stream:
            size += len(chunk)
            if size > self.largest:
                raise Rejected(f"the answer is larger than {self.largest / 2**20:.3g} MiB")
            yield chunk

    async def aclose(self) -> None:
        await self.stream.aclose()


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds to wait: ``Retry-After`` as a number or a date (RFC 9110, 10.2.3), or ``retry-after-ms``."""
    try:
        delay = None
        if (milliseconds := headers.get("retry-after-ms")) is not None:
            delay = float(milliseconds) / 1000
        elif (value := headers.get("Retry-After")) is not None:
            value = value.strip()
            # a fractional number is not in the standard, and sent all the same
            numeric = re.fullmatch(r"[\d.]+", value)
            delay = float(value) if numeric else parsedate_to_datetime(value).timestamp() - time.time()
    except (ValueError, OverflowError):
        return None
    return None if delay is None or delay != delay else min(max(delay, 0.0), 1e9)
