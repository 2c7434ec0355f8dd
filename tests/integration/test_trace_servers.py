"""Endpoints that misbehave: what is tried again, what is refused, what is kept secret, and how fast they are asked."""

import asyncio
import gzip
import json
import os
import socket
import ssl
import struct
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from helpers.serving import KEY, chat, generate, right, traces
from kdlab.cli.main import main
from kdlab.traces.endpoint import Address, Endpoint, retry_after
from kdlab.traces.pool import RateLimiter, RetryPolicy
from kdlab.traces.reply import Fatal, Rejected, Retryable

pytestmark = pytest.mark.usefixtures("trace_folder")


def ask(server, key=KEY, **more):
    """One request to a server, or to a URL."""
    return asyncio.run(Endpoint(Address.of(getattr(server, "url", server)), key, **more).ask({}))


# ---- servers that misbehave


def promise_more(handler, body, number):
    handler.send(200, chat(), length=5000)


def promise_less(handler, body, number):
    handler.send(200, chat(), length=20)


def reset(handler, body, number):
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    handler.wfile = handler.rfile = open(os.devnull, "r+b")  # noqa: SIM115


def torn_chunks(handler, body, number):
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(b'40\r\n{"choices": [')


ODD = {
    "500": (lambda h, b, n: h.send(500, {"error": {"message": "boom"}}), "HTTP 500: boom"),
    "502 page": (lambda h, b, n: h.send(502, b"<html>Bad Gateway</html>"), "HTTP 502: an HTML page"),
    "200 page": (lambda h, b, n: h.send(200, b"<!doctype html><p>Log in"), "an HTML page"),
    "truncated JSON": (lambda h, b, n: h.send(200, json.dumps(chat()).encode()[:-9]), "damaged JSON"),
    "deep JSON": (lambda h, b, n: h.send(200, b"[" * 10**6), "damaged JSON"),
    "no body": (lambda h, b, n: h.send(200, b""), "the answer is nothing"),
    "a list": (lambda h, b, n: h.send(200, [1]), "a JSON list"),
    "no choices": (lambda h, b, n: h.send(200, {"id": 1}), "no choices"),
    "empty choices": (lambda h, b, n: h.send(200, {"choices": []}), "no choices"),
    "odd choices": (lambda h, b, n: h.send(200, {"choices": ["5", None]}), "no choices"),
    "an error with status 200": (lambda h, b, n: h.send(200, {"error": {"message": "busy"}}), "no choices: busy"),
    "no message": (lambda h, b, n: h.send(200, {"choices": [{"index": 0}]}), "no message"),
    "null content": (lambda h, b, n: h.send(200, chat(None)), "the answer is empty"),
    "white content": (lambda h, b, n: h.send(200, chat(" \n ")), "the answer is empty"),
    "content of another type": (lambda h, b, n: h.send(200, chat({"a": 5})), "the answer is empty"),
    "longer promised": (promise_more, "connection failed"),
    "shorter promised": (promise_less, "damaged JSON"),
    "reset": (reset, "connection failed"),
    "torn chunks": (torn_chunks, "connection failed"),
    "no HTTP": (lambda h, b, n: h.wfile.write(b"\x16\x03 hello\r\n\r\n"), "connection failed"),
}


@pytest.mark.parametrize("name", ODD)
def test_what_may_pass_is_tried_again(serve, capsys, name):
    odd, reason = ODD[name]
    server = serve(lambda handler, body, n: (odd if n < 2 else right)(handler, body, n))
    assert generate(server, "--concurrency", "1", "--timeout", "5") == 0
    assert len(server.seen) == 5 and all(row["correct"] for row in traces())
    server = serve(odd)
    with pytest.raises(Retryable, match=reason):
        ask(server, timeout=5.0)


def test_who_never_answers_well_fails_at_the_end_and_the_others_stay(serve, capsys):
    def picky(handler, body, number):
        odd = "4 + 3" in body["messages"][-1]["content"] and not allowed
        handler.send(503, b"overloaded") if odd else right(handler, body, number)

    allowed = []
    server = serve(picky)
    assert generate(server, "--tries", "3") == 1
    shown = capsys.readouterr()
    assert "written 2, skipped 0 (there already), failed 1" in shown.out
    assert shown.err.startswith("kdlab: error: 1 answers are missing") and shown.err.count("\n") == 1
    assert len(server.seen) == 5 and {row["id"] for row in traces()} == {"q2", "q6"}
    (failed,) = traces("out.jsonl.failed.jsonl")
    assert (failed["id"], failed["sample"], failed["tries"]) == ("q4", 0, 3)
    assert failed["error"] == "HTTP 503: overloaded"
    allowed.append(True)
    assert generate(server) == 0
    assert len(traces()) == 3 and not Path("out.jsonl.failed.jsonl").exists()


@pytest.mark.parametrize("status", [401, 402, 403, 404])
def test_hopeless_statuses_stop_at_once(serve, capsys, status):
    server = serve(lambda h, b, n: h.send(status, {"error": {"message": f"Incorrect key: {KEY}."}}))
    assert generate(server, "--concurrency", "1") == 1
    shown = capsys.readouterr()
    assert f"HTTP {status}" in shown.err and shown.err.count("\n") == 1 and len(server.seen) == 1
    assert KEY not in shown.err + shown.out and "Incorrect key: [key]" in shown.err
    assert traces() == []


def test_a_quota_that_is_spent_is_hopeless_and_a_bad_request_is_of_one_question(serve, capsys):
    server = serve(lambda h, b, n: h.send(429, {"error": {"code": "insufficient_quota", "message": "pay"}}))
    assert generate(server, "--concurrency", "1") == 1 and len(server.seen) == 1
    server = serve(lambda h, b, n: h.send(400, {"error": {"message": "too long"}}) if n == 0 else right(h, b, n))
    assert generate(server, "--concurrency", "1", out="b.jsonl") == 1
    assert len(server.seen) == 3 and traces("b.jsonl.failed.jsonl")[0]["error"] == "HTTP 400: too long"


def test_requests_that_are_all_refused_stop_early(serve, capsys, trace_folder):
    Path("q.jsonl").write_text("".join(json.dumps({"question": str(i)}) + "\n" for i in range(40)))
    server = serve(lambda h, b, n: h.send(400, {"error": {"message": "unknown field"}}))
    assert generate(server, "--concurrency", "1") == 1
    assert "refused the first 5 questions: HTTP 400: unknown field" in capsys.readouterr().err
    assert len(server.seen) < 12


def test_retry_after_holds_everybody_back(serve):
    server = serve(lambda h, b, n: h.send(429, {}, [("Retry-After", "0.4")]) if n == 0 else right(h, b, n))
    assert generate(server, "--concurrency", "1") == 0
    times = [when for *_, when in server.seen]
    assert times[1] - times[0] >= 0.4 and len(times) == 4


def test_a_wait_of_hours_is_left_to_the_user(serve, capsys):
    server = serve(lambda h, b, n: h.send(429, {}, [("Retry-After", "7200")]))
    started = time.monotonic()
    assert generate(server) == 1
    assert "asks to wait 7,200 s" in capsys.readouterr().err and time.monotonic() - started < 5


def test_retry_after_is_read_in_all_its_forms():
    assert retry_after({"Retry-After": "3"}) == 3 and retry_after({"retry-after-ms": "250"}) == 0.25
    assert retry_after({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0
    late = retry_after({"Retry-After": "Fri, 01 Jan 2100 00:00:00 GMT"})
    assert late is not None and late > 1e8
    for odd in ("soon", "-3", "1.2.3", "9" * 400, "", "nan"):
        found = retry_after({"Retry-After": odd})
        assert found is None or 0 <= found <= 1e9


def drip(handler, body, number):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


def drip_headers(handler, body, number):
    for _ in range(100):
        handler.wfile.write(b"H")
        handler.wfile.flush()
        time.sleep(0.05)


@pytest.mark.parametrize("slow", [drip, drip_headers, lambda h, b, n: time.sleep(3)], ids=["body", "headers", "silent"])
def test_the_timeout_is_of_the_whole_exchange(serve, slow):
    server = serve(slow)
    started = time.monotonic()
    with pytest.raises(Retryable, match=r"no answer within 0.3 s"):
        ask(server, timeout=0.3)
    assert time.monotonic() - started < 1.5


def test_an_answer_without_end_is_not_read_to_it(serve):
    def endless(handler, body, number):
        handler.send_response(200)
        handler.end_headers()
        while True:
            handler.wfile.write(b" " * 2**16)

    server = serve(endless)
    with pytest.raises(Rejected, match="larger than 1 MiB"):
        ask(server, largest=2**20)


def test_duplicate_choices_parts_and_reasoning(serve):
    two = chat("a #### 1")
    two["choices"] = [two["choices"][0], two["choices"][0]]
    answers = [
        two,
        chat([{"type": "text", "text": "a"}, {"type": "image"}, {"text": " #### 2"}]),
        {"choices": [{"message": {"content": "#### 3", "reasoning_content": "thought"}}], "usage": {"x": "y"}},
        chat("half \ud800 of a pair #### 4"),
    ]
    server = serve(lambda h, b, n: h.send(200, answers[n]))
    found = [ask(server) for _ in answers]
    assert [reply.text for reply in found[:3]] == ["a #### 1", "a #### 2", "#### 3"]
    assert found[2].reasoning == "thought" and found[2].usage == {} and found[2].finish_reason == ""
    found[3].text.encode()
    declined = {"choices": [{"message": {"content": None, "refusal": "I cannot"}}]}
    with pytest.raises(Rejected, match="declined: I cannot"):
        ask(serve(lambda h, b, n: h.send(200, declined)))


def packed(handler, body, number):
    handler.send(200, gzip.compress(b" " * 2**24), [("Content-Encoding", "gzip")])


def test_a_packed_answer_is_not_unpacked(serve):
    with pytest.raises(Rejected, match="compressed"):
        ask(serve(packed))
    with pytest.raises(Rejected, match="larger than 1 MiB"):
        ask(serve(lambda h, b, n: h.send(500, b" " * 2**21)), largest=2**20)


# ---- the key


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(serve, capsys, status):
    thief = serve(right)
    server = serve(lambda h, b, n: h.send(status, b"", [("Location", f"{thief.url}/chat/completions?k={KEY}")]))
    assert generate(server, "--concurrency", "1") == 1
    said = capsys.readouterr().err
    assert "redirects to 127.0.0.1" in said and KEY not in said
    assert not thief.seen and len(server.seen) == 1


def test_the_key_is_sent_and_stands_nowhere(serve, capsys, trace_folder, monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # would read the key, were it used
    echo = serve(lambda h, b, n: h.send(200, chat(f"the key is {h.headers['Authorization']} #### {KEY}")))
    assert generate(echo) == 0
    assert echo.seen[0][1]["Authorization"] == f"Bearer {KEY}"
    shown = capsys.readouterr()
    written = b"".join(path.read_bytes() for path in trace_folder.rglob("*") if path.is_file())
    assert KEY not in shown.out + shown.err and KEY.encode() not in written
    assert KEY not in repr(Endpoint(Address.of(echo.url), KEY))


@pytest.mark.parametrize("value", ["sk-a\nb-secret", "sk secret", "sk-ü-secret"])
def test_a_key_that_no_header_can_hold_is_refused_without_showing_it(serve, capsys, monkeypatch, value):
    monkeypatch.setenv("OPENAI_API_KEY", value)
    server = serve(right)
    assert generate(server) == 2
    said = capsys.readouterr().err
    assert said.startswith("kdlab: error: --key-variable: OPENAI_API_KEY holds") and "secret" not in said
    assert not server.seen


def test_another_variable_and_a_local_server_without_key(serve, monkeypatch, capsys):
    monkeypatch.setenv("MY_KEY", "other")
    server = serve(right)
    assert generate(server, "--key-variable", "MY_KEY") == 0
    assert server.seen[0][1]["Authorization"] == "Bearer other"
    monkeypatch.delenv("OPENAI_API_KEY")
    assert generate(server, out="b.jsonl") == 0
    assert "Authorization" not in server.seen[-1][1]


def test_a_certificate_that_is_not_accepted_is_hopeless(serve, monkeypatch):
    def refuse(*args, **more):
        raise ssl.SSLCertVerificationError(1, "self-signed certificate")

    monkeypatch.setattr(ssl.SSLContext, "wrap_bio", refuse)
    with pytest.raises(Fatal, match="certificate is not accepted"):
        ask(serve(right).url.replace("http:", "https:"))


def test_a_proxy_carries_encrypted_requests_only(serve, monkeypatch):
    proxy = serve(right)  # knows no CONNECT, and says so
    for name in ("https_proxy", "http_proxy", "all_proxy"):
        monkeypatch.setenv(name, proxy.url)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with pytest.raises(Retryable, match="501"):
        ask("https://192.0.2.1/v1")  # an address that nobody has
    insecure = Address.of("http://192.0.2.1/v1", insecure=True)
    with pytest.raises(Retryable, match=r"connection failed|no answer"):
        asyncio.run(Endpoint(insecure, KEY, timeout=2.0).ask({}))
    assert not proxy.seen


def test_what_to_install_is_said(monkeypatch, capsys, trace_folder):
    monkeypatch.setitem(sys.modules, "openai", None)
    monkeypatch.delitem(sys.modules, "kdlab.traces.endpoint")
    assert main(["generate", "q.jsonl", "o.jsonl", "--endpoint", "http://localhost:1/v1", "--model", "m"]) == 2
    assert "--endpoint: openai is not installed; accepted: pip install 'kdlab[generate]'" in capsys.readouterr().err
    assert not Path("o.jsonl").exists()


# ---- pace


def test_requests_per_minute(serve):
    server = serve(right)
    assert generate(server, "--requests-per-minute", "600", "--concurrency", "3") == 0
    times = sorted(when for *_, when in server.seen)
    assert np.diff(times).min() > 0.07


def test_tokens_per_minute_wait_for_what_was_spent():
    now = [0.0]
    pace = RateLimiter(tokens=600, guess=100, clock=lambda: now[0])
    sent = 0
    while now[0] < 600:
        if pace.claim() == 0:
            sent += 300
            pace.spent(300)
        now[0] += 0.1
    assert sent == pytest.approx(600 * 11, rel=0.06)  # ten minutes, and the first minute's full balance
    pace.pause(50)
    assert pace.claim() == pytest.approx(50, abs=0.2)


def test_waits_grow_and_have_a_limit(monkeypatch):
    monkeypatch.undo()
    tries = RetryPolicy(first=1.0, longest=60.0)
    for failed, most in ((1, 1), (2, 2), (5, 16), (7, 60), (50, 60)):
        found = [tries.wait(failed) for _ in range(50)]
        assert most / 2 <= min(found) < max(found) <= most


def test_concurrency(serve):
    now, most, lock = [0], [0], threading.Lock()

    def slow(handler, body, number):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.15)
        with lock:
            now[0] -= 1
        right(handler, body, number)

    assert generate(serve(slow), "--samples", "3", "--concurrency", "3") == 0
    assert most[0] == 3
