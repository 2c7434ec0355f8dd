"""One exchange with an OpenAI-compatible endpoint, over the standard library.

Nothing that an endpoint sends is trusted: not its length, its status, its type or its shape. What goes wrong is one of
three errors, by what helps: trying again, leaving this question out, or stopping.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import ipaddress
import json
import os
import re
import socket
import ssl
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from kdlab import __version__
from kdlab.errors import UserError
from kdlab.traces.reply import Failed, Fatal, Rejected, Reply, Retryable, complaint, read_reply

LARGEST = 64 * 2**20
"""Bytes of an answer above which it is not read on."""

_PERMANENT = {
    401: "the key is missing or not accepted",
    402: "payment is required",
    403: "access is denied",
    404: "no such address or model",
    405: "no such method at this address",
}
_PASSING = {408, 409, 421, 425, 429}
_CHUNK = 2**16


# ---- where to, and with which key


@dataclass(frozen=True)
class Address:
    """Where requests go.

    Attributes:
        path: that of the requests themselves, ``.../chat/completions`` or ``.../completions``.
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
            url: the base, or the whole address of the requests.
            api: ``chat`` or ``completions``; None: by the URL's end, else ``chat``.
            insecure: allow plain http to other machines.

        Raises:
            UserError: for anything else than an http(s) URL without user, query and fragment.
        """
        accepted = "accepted: a URL such as https://api.example.com/v1 or http://localhost:8000/v1"
        try:
            parts = urllib.parse.urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise UserError("--endpoint", f"not a URL ({error}); {accepted}") from None
        if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
            # not shown: what stands there may be a secret
            raise UserError("--endpoint", f"has a user, query or fragment; {accepted}, the key in the environment")
        host = parts.hostname or ""
        if parts.scheme not in ("http", "https") or not re.fullmatch(r"[\w.:-]+", host) or re.search(r"[\s\0]", url):
            raise UserError("--endpoint", f"{url!r}; {accepted}")
        if parts.scheme == "http" and not is_local(host) and not insecure:
            raise UserError(
                "--endpoint",
                f"{url} would send key and questions unencrypted",
                "https, http to localhost, or --insecure",
            )
        path = parts.path.rstrip("/")
        ending = re.search(r"/(chat/)?completions$", path)
        found = None if ending is None else ("chat" if ending[1] else "completions")
        if found and api and found != api:
            raise UserError("--api", f"{api}, and the endpoint's path ends with {ending and ending[0]}", found)
        chat = (found or api or "chat") == "chat"
        if not ending:
            path += "/chat/completions" if chat else "/completions"
        return cls(parts.scheme, host, port or (443 if parts.scheme == "https" else 80), path, chat)

    @property
    def url(self) -> str:
        """The address as a URL."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{urllib.parse.quote(self.path, safe='/%:@')}"


def is_local(host: str) -> bool:
    """Whether this name never leaves the machine."""
    if host.lower() in ("localhost", "ip6-localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_key(variable: str | None, address: Address) -> str | None:
    """The API key from the environment; None for a server on this machine that needs none.

    Args:
        address: the server.
        variable: the environment variable's name; None: ``OPENAI_API_KEY``, and a local server may go without.

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
    """Sends prompts to one address.

    Args:
        address: where to.
        key: sent as a bearer token to that address only; appears in no text that leaves this class.
        timeout: seconds for a whole exchange, however slowly bytes drip in.
        largest: bytes of an answer above which it is given up.
    """

    def __init__(self, address: Address, key: str | None, timeout: float = 300.0, largest: int = LARGEST) -> None:
        self.address, self.timeout, self.largest = address, timeout, largest
        self.__key = key
        self._under_way: set[socket.socket] = set()
        self._closed = False
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"Endpoint({self.address.url})"

    def ask(self, body: Mapping[str, Any]) -> Reply:
        """One request.

        Args:
            body: the request's fields; ``messages`` or ``prompt`` by :attr:`Address.chat`.

        Raises:
            Retryable, Rejected, Fatal: by what helps.
        """
        status, headers, raw = self._exchange(json.dumps(body).encode())
        if status == 200:
            return read_reply(self._parsed(raw), self.address.chat, self._clean)
        raise self._trouble(status, headers, raw)

    def close(self) -> None:
        """Break off what is under way, so that waiting threads end."""
        with self._lock:
            self._closed = True
            for sock in self._under_way:
                _break_off(sock)

    def _clean(self, text: str) -> str:
        # halves of surrogate pairs, which JSON can hold, have no form in UTF-8
        text = text.encode("utf-8", "replace").decode()
        return text.replace(self.__key, "[key]") if self.__key else text

    def _exchange(self, content: bytes) -> tuple[int, http.client.HTTPMessage, bytes]:
        headers = {
            "Content-Type": "application/json",
            "Accept": "application/json",
            "Connection": "close",
            "User-Agent": f"kdlab/{__version__}",
        }
        if self.__key:
            headers["Authorization"] = f"Bearer {self.__key}"
        connection = self._connection()
        timer: threading.Timer | None = None
        sock: socket.socket | None = None
        deadline = time.monotonic() + self.timeout
        try:
            connection.connect()
            sock = connection.sock
            assert sock is not None
            with self._lock:
                self._under_way.add(sock)
                if self._closed:
                    raise Retryable("broken off")
            timer = threading.Timer(max(deadline - time.monotonic(), 0), _break_off, [sock])
            timer.daemon = True
            timer.start()
            connection.request("POST", urllib.parse.quote(self.address.path, safe="/%:@"), content, headers)
            response = connection.getresponse()
            return response.status, response.headers, self._body(response)
        except ssl.SSLCertVerificationError as error:
            said = getattr(error, "verify_message", error)
            raise Fatal(f"its certificate is not accepted ({said})") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            if time.monotonic() >= deadline or isinstance(error, TimeoutError):
                raise Retryable(f"no answer within {self.timeout:g} s") from None
            said = self._clean(str(error)[:200])
            raise Retryable(f"connection failed ({type(error).__name__}{': ' if said else ''}{said})") from None
        finally:
            if timer is not None:
                timer.cancel()
            with self._lock:
                if sock is not None:
                    self._under_way.discard(sock)
            connection.close()

    def _connection(self) -> http.client.HTTPConnection:
        host, port = self.address.host, self.address.port
        if self.address.scheme == "http":
            # never through a proxy: it would read the key
            return http.client.HTTPConnection(host, port, timeout=self.timeout)
        context = ssl.create_default_context()
        proxy = None if is_local(host) else urllib.request.getproxies().get("https")
        if not proxy or urllib.request.proxy_bypass(host):
            return http.client.HTTPSConnection(host, port, timeout=self.timeout, context=context)
        parts = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        connection = http.client.HTTPSConnection(
            parts.hostname or "", parts.port or 8080, timeout=self.timeout, context=context
        )
        more = {}
        if parts.username:
            pair = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
            more["Proxy-Authorization"] = "Basic " + base64.b64encode(pair.encode()).decode()
        connection.set_tunnel(host, port, more)
        return connection

    def _body(self, response: http.client.HTTPResponse) -> bytes:
        parts, size = [], 0
        while chunk := response.read1(_CHUNK):
            parts.append(chunk)
            size += len(chunk)
            if size > self.largest:
                raise Rejected(f"the answer is larger than {self.largest / 2**20:.3g} MiB")
        if response.length:  # read1 says nothing about bytes that were promised and never came
            raise http.client.IncompleteRead(b"", response.length)
        return b"".join(parts)

    def _parsed(self, raw: bytes) -> dict[str, Any]:
        try:
            found = json.loads(raw)
        except (ValueError, RecursionError):
            kind = "an HTML page" if raw.lstrip()[:1] == b"<" else "nothing" if not raw.strip() else "damaged JSON"
            raise Retryable(f"the answer is {kind}") from None
        if not isinstance(found, dict):
            raise Retryable(f"the answer is a JSON {type(found).__name__}, not an object")
        return found

    def _trouble(self, status: int, headers: http.client.HTTPMessage, raw: bytes) -> Failed:
        code, said = complaint(raw)
        reason = f"HTTP {status}" + (f": {self._clean(said)}" if said else "")
        if 300 <= status < 400:
            # the other place is not asked: it would get the key
            host = urllib.parse.urlsplit(self._clean(headers.get("Location") or "")).hostname
            return Fatal(f"HTTP {status}: redirects to {host or 'another path'}; accepted: --endpoint with that")
        if status in _PERMANENT:
            return Fatal(f"HTTP {status}, {_PERMANENT[status]}" + (f": {self._clean(said)}" if said else ""))
        if code == "insufficient_quota":
            return Fatal(reason)
        if status in _PASSING or status >= 500:
            return Retryable(reason, retry_after(headers))
        return Rejected(reason)


def _break_off(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        # of the plain socket also under TLS, whose own shutdown pulls the session from under the reading thread
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def retry_after(headers: Mapping[str, str] | http.client.HTTPMessage) -> float | None:
    """Seconds to wait: ``Retry-After`` as a number or a date (RFC 9110, 10.2.3), or ``retry-after-ms``."""
    try:
        found = None
        if (milliseconds := headers.get("retry-after-ms")) is not None:
            found = float(milliseconds) / 1000
        elif (value := headers.get("Retry-After")) is not None:
            value = value.strip()
            # a fractional number is not in the standard, and sent all the same
            numeric = re.fullmatch(r"[\d.]+", value)
            found = float(value) if numeric else parsedate_to_datetime(value).timestamp() - time.time()
    except (ValueError, OverflowError):
        return None
    return None if found is None or found != found else min(max(found, 0.0), 1e9)
