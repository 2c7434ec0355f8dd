"""Traces from endpoints that misbehave, and from models on this machine; what is written survives everything."""

import http.server
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import kdlab
from kdlab.cli.main import main
from kdlab.errors import UserError
from kdlab.generate import pool as pools
from kdlab.generate.endpoint import Address, Endpoint, retry_after
from kdlab.generate.pool import Pace, Tries
from kdlab.generate.questions import Ask, Job, Wording, read_questions
from kdlab.generate.reply import Hopeless, Refused, TryAgain
from kdlab.generate.writer import Output

KEY = "sk-test-5f3a9c"


def chat(text="2 + 3 = 5\n#### 5", **more):
    """A well-formed answer."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop", **more}
    usage = {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}
    return {"id": "x", "object": "chat.completion", "choices": [choice], "usage": usage}


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            number = len(server.seen)
            server.seen.append((self.path, dict(self.headers), body, time.monotonic()))
        server.behave(self, body, number)

    def do_GET(self):
        self.server.seen.append((self.path, dict(self.headers), None, time.monotonic()))
        self.send(200, chat())

    def send(self, status, body, headers=(), length=None):
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(raw) if length is None else length))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *args):
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, behave):
        super().__init__(("127.0.0.1", 0), Handler)
        self.behave, self.seen, self.lock = behave, [], threading.Lock()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, *args):
        pass


@pytest.fixture
def serve():
    """Starts servers that behave as a function (handler, body, number of the request) says."""
    made = []

    def start(behave):
        made.append(Server(behave))
        return made[-1]

    yield start
    for server in made:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """An empty folder with three questions, a key, and tries without long waits."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(Tries, "wait", lambda self, failed: 0.005 * failed)
    rows = [{"question": f"{i} + 3?", "gold": str(i + 3), "id": f"q{i}"} for i in (2, 4, 6)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def generate(server, *words, out="out.jsonl"):
    return main(["generate", "q.jsonl", out, "--endpoint", server.url, "--model", "m", *words])


def traces(path="out.jsonl"):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def right(handler, body, number):
    """Answers the sum that it is asked."""
    asked = body["messages"][-1]["content"] if "messages" in body else body["prompt"].removeprefix("Q: ")
    total = int(asked.split()[0]) + 3
    text = f"{asked.split('?')[0]} = {total}\n#### {total}"
    plain = {"choices": [{"text": " " + text, "finish_reason": "stop"}]}
    handler.send(200, chat(text) if "messages" in body else plain)


# ---- the whole way


def test_traces_are_written_judged_and_read_by_the_data_set(serve, capsys):
    server = serve(right)
    assert generate(server, "--samples", "2", "--temperature", "0.7", "--keep", "agreeing") == 0
    shown = capsys.readouterr().out
    assert "written 6, skipped 0 (there already), failed 0; right 6 of 6 (100.0%)" in shown
    assert "answer 7.0 tokens" in shown and "tokens per second" in shown
    rows = traces()
    assert {(row["id"], row["sample"]) for row in rows} == {(f"q{i}", n) for i in (2, 4, 6) for n in (0, 1)}
    row = next(row for row in rows if row["id"] == "q2")
    assert (row["reasoning"], row["answer"], row["gold"], row["correct"]) == ("2 + 3 = 5", "5", "5", True)
    assert (row["teacher"], row["model"], row["temperature"], row["finish_reason"]) == ("m", "m", 0.7, "stop")
    assert row["usage"]["completion_tokens"] == 7 and len({row["seed"] for row in rows}) == 6
    bodies = [body for _, _, body, _ in server.seen]
    assert {body["seed"] for body in bodies} == {row["seed"] for row in rows}
    assert all((b["model"], b["temperature"], b["max_tokens"]) == ("m", 0.7, 512) and "n" not in b for b in bodies)
    assert all(path == "/v1/chat/completions" for path, *_ in server.seen)
    assert len(traces("out.jsonl.filtered.jsonl")) == 6

    from kdlab.data.text.traces import read_traces

    assert {t.answer for t in read_traces("out.jsonl")} == {"5", "7", "9"}


def test_the_same_command_asks_only_what_is_missing(serve, capsys, workplace):
    server = serve(right)
    assert generate(server, "--limit", "2") == 0
    first = Path("out.jsonl").read_bytes()
    assert generate(server, "--samples", "2") == 0
    assert "written 4, skipped 2" in capsys.readouterr().out
    assert Path("out.jsonl").read_bytes().startswith(first) and len(server.seen) == 6
    Path("out.jsonl").write_bytes(Path("out.jsonl").read_bytes()[:-40])  # as a kill leaves it
    assert generate(server, "--samples", "2") == 0
    assert "written 1, skipped 5" in capsys.readouterr().out
    assert Counter((row["id"], row["sample"]) for row in traces()) == Counter(
        {(f"q{i}", n): 1 for i in (2, 4, 6) for n in (0, 1)}
    )
    assert len({row["seed"] for row in traces()}) == 6


def test_a_last_line_that_lacks_its_break_only_is_kept(serve):
    server = serve(right)
    assert generate(server, "--limit", "1") == 0
    Path("out.jsonl").write_bytes(Path("out.jsonl").read_bytes().rstrip(b"\n"))
    assert generate(server) == 0
    assert len({row["id"] for row in traces()}) == len(traces()) == len(server.seen) == 3


def test_other_settings_are_refused_in_a_line(serve, capsys, workplace):
    server = serve(right)
    assert generate(server) == 0
    before = {path: path.read_bytes() for path in workplace.iterdir()}
    capsys.readouterr()
    assert generate(server, "--temperature", "1") == 2
    said = capsys.readouterr().err
    assert said.startswith("kdlab: error: out.jsonl: was written with temperature 0.0, and now it is 1.0; accepted: ")
    assert said.count("\n") == 1 and len(server.seen) == 3
    assert before == {path: path.read_bytes() for path in workplace.iterdir()}


def test_a_file_of_somebody_else_is_left_alone(serve, capsys):
    Path("out.jsonl").write_text("dear diary\n")
    assert generate(serve(right)) == 2
    assert "no out.jsonl.manifest.json says how it was made" in capsys.readouterr().err
    assert Path("out.jsonl").read_text() == "dear diary\n"


def test_two_processes_do_not_write_one_file(workplace):
    with Output(Path("a.jsonl"), {}), pytest.raises(UserError, match="another process"):
        Output(Path("a.jsonl"), {}).__enter__()


def test_a_damaged_line_in_the_middle_is_not_skipped(serve, capsys):
    server = serve(right)
    assert generate(server) == 0
    lines = Path("out.jsonl").read_bytes().splitlines(keepends=True)
    Path("out.jsonl").write_bytes(lines[0] + b"{oops\n" + lines[2])
    assert generate(server) == 2
    assert "out.jsonl: line 2 is no trace of this command" in capsys.readouterr().err


def test_completions_take_a_prompt_like_that_of_training(serve):
    server = serve(right)
    assert generate(server, "--api", "completions") == 0
    assert {path for path, *_ in server.seen} == {"/v1/completions"}
    assert {body["prompt"] for _, _, body, _ in server.seen} == {f"Q: {i} + 3?\nA:" for i in (2, 4, 6)}
    assert [row["correct"] for row in traces()] == [True] * 3


def test_messages_system_and_template(serve, workplace):
    Path("q.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "9 + 3?"}]}) + "\n" + json.dumps({"question": "1 {x}"})
    )
    Path("t.txt").write_text("Solve {question} {and} mark {marker}")
    server = serve(lambda handler, body, n: handler.send(200, chat("no mark")))
    assert generate(server, "--system", "Be brief.", "--template", "@t.txt", "--concurrency", "1") == 0
    asked = [body["messages"] for _, _, body, _ in server.seen]
    assert asked[0] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "9 + 3?"}]
    assert asked[1][1]["content"] == "Solve 1 {x} {and} mark ####"
    assert [(row["reasoning"], row["answer"]) for row in traces()] == [("no mark", None)] * 2
    assert traces()[0]["messages"] == [{"role": "user", "content": "9 + 3?"}] and "question" not in traces()[0]


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
    with pytest.raises(TryAgain, match=reason):
        Endpoint(Address.of(server.url), KEY, 5.0).ask({})


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


def test_requests_that_are_all_refused_stop_early(serve, capsys, workplace):
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
    with pytest.raises(TryAgain, match=r"no answer within 0.3 s"):
        Endpoint(Address.of(server.url), KEY, timeout=0.3).ask({})
    assert time.monotonic() - started < 1.5


def test_an_answer_without_end_is_not_read_to_it(serve):
    def endless(handler, body, number):
        handler.send_response(200)
        handler.end_headers()
        while True:
            handler.wfile.write(b" " * 2**16)

    server = serve(endless)
    with pytest.raises(Refused, match="larger than 1 MiB"):
        Endpoint(Address.of(server.url), KEY, largest=2**20).ask({})


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
    endpoint = Endpoint(Address.of(server.url), KEY)
    found = [endpoint.ask({}) for _ in answers]
    assert [reply.text for reply in found[:3]] == ["a #### 1", "a #### 2", "#### 3"]
    assert found[2].reasoning == "thought" and found[2].usage == {} and found[2].finish_reason == ""
    found[3].text.encode()
    declined = {"choices": [{"message": {"content": None, "refusal": "I cannot"}}]}
    with pytest.raises(Refused, match="declined: I cannot"):
        Endpoint(Address.of(serve(lambda h, b, n: h.send(200, declined)).url), KEY).ask({})


# ---- the key


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(serve, capsys, status):
    thief = serve(right)
    server = serve(lambda h, b, n: h.send(status, b"", [("Location", f"{thief.url}/chat/completions?k={KEY}")]))
    assert generate(server, "--concurrency", "1") == 1
    said = capsys.readouterr().err
    assert "redirects to 127.0.0.1" in said and KEY not in said
    assert not thief.seen and len(server.seen) == 1


def test_the_key_is_sent_and_stands_nowhere(serve, capsys, workplace, monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # would read the key, were it used
    echo = serve(lambda h, b, n: h.send(200, chat(f"the key is {h.headers['Authorization']} #### {KEY}")))
    assert generate(echo) == 0
    assert echo.seen[0][1]["Authorization"] == f"Bearer {KEY}"
    shown = capsys.readouterr()
    written = b"".join(path.read_bytes() for path in workplace.rglob("*") if path.is_file())
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


def test_a_certificate_that_is_not_accepted_is_hopeless(monkeypatch):
    import ssl

    def refuse(self):
        raise ssl.SSLCertVerificationError(1, "self-signed certificate")

    monkeypatch.setattr("http.client.HTTPSConnection.connect", refuse)
    with pytest.raises(Hopeless, match="certificate"):
        Endpoint(Address.of("https://api.example.com/v1"), KEY).ask({})


# ---- pace


def test_requests_per_minute(serve):
    server = serve(right)
    assert generate(server, "--requests-per-minute", "600", "--concurrency", "3") == 0
    times = sorted(when for *_, when in server.seen)
    assert np.diff(times).min() > 0.07


def test_tokens_per_minute_wait_for_what_was_spent():
    now = [0.0]
    pace = Pace(tokens=600, guess=100, clock=lambda: now[0])
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
    tries = Tries(first=1.0, longest=60.0)
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


# ---- interruption


def stuck(handler, body, number):
    """Answers twice, and then no more."""
    if number >= 2:
        time.sleep(30)
    right(handler, body, number)


def wait_for_two(server, process=None):
    deadline = time.monotonic() + 90
    while len(server.seen) < 3 or not Path("out.jsonl").exists() or len(traces()) < 2:
        assert time.monotonic() < deadline and (process is None or process.poll() is None)
        time.sleep(0.02)


def goes_on(server):
    server.behave = right
    assert len(traces()) == 2 and generate(server, "--concurrency", "1") == 0
    assert len(traces()) == 3 and len(server.seen) == 4


def test_an_interrupted_run_says_how_to_go_on(serve, capsys):
    server = serve(stuck)

    def interrupt():
        wait_for_two(server)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert generate(server, "--concurrency", "1") == 130
    thread.join()
    shown = capsys.readouterr()
    assert shown.err == "kdlab: interrupted; the same command goes on with what is missing in out.jsonl\n"
    assert "written 2, skipped 0" in shown.out
    goes_on(server)


def test_a_killed_run_goes_on(serve, workplace):
    server = serve(stuck)
    words = ["generate", "q.jsonl", "out.jsonl", "--endpoint", server.url, "--model", "m", "--concurrency", "1"]
    env = {**os.environ, "PYTHONPATH": str(Path(kdlab.__file__).parent.parent)}
    process = subprocess.Popen([sys.executable, "-m", "kdlab", *words], env=env)
    wait_for_two(server, process)
    process.kill()
    process.wait()
    goes_on(server)


# ---- mistakes

BASE = ["q.jsonl", "out.jsonl", "--endpoint", "http://localhost:1/v1", "--model", "m"]
MISTAKES = [
    ([], "the following arguments are required"),
    (["q.jsonl", "out.jsonl"], "the following arguments are required: --model"),
    (["nowhere.jsonl", *BASE[1:]], "nowhere.jsonl: No such file or directory; accepted: a JSONL file"),
    ([".", *BASE[1:]], ".: Is a directory"),
    (["bad.jsonl", *BASE[1:]], "bad.jsonl: line 3: no JSON"),
    (["list.jsonl", *BASE[1:]], "list.jsonl: line 1: a JSON list"),
    (["typo.jsonl", *BASE[1:]], "typo.jsonl: line 1: no text under 'question'"),
    (["role.jsonl", *BASE[1:]], "role.jsonl: line 1: role: unknown value 'usr'; nearest: user"),
    (["twice.jsonl", *BASE[1:]], "twice.jsonl: line 2: id 1 is line 1's too"),
    (["latin.jsonl", *BASE[1:]], "latin.jsonl: line 1: not UTF-8"),
    (["empty.jsonl", *BASE[1:]], "empty.jsonl: no questions in it"),
    ([*BASE, "--gold", "solution"], "q.jsonl: line 1: no field 'solution'; accepted: 'question'"),
    (["q.jsonl", "q.jsonl", *BASE[2:]], "OUT: q.jsonl is QUESTIONS too"),
    (["q.jsonl", ".", *BASE[2:]], ".: is a folder"),
    (["q.jsonl", "q.jsonl/x.jsonl", *BASE[2:]], "q.jsonl/x.jsonl: cannot be written to"),
    ([*BASE, "--samples", "0"], "--samples: 0; accepted: from 1 to "),
    ([*BASE, "--samples", "x"], "argument --samples: invalid int value: 'x'"),
    ([*BASE, "--temperature", "-1"], "--temperature: -1.0; accepted"),
    ([*BASE, "--temperature", "nan"], "--temperature: nan; accepted"),
    ([*BASE, "--top-p", "0"], "--top-p: 0.0; accepted"),
    ([*BASE, "--concurrency", "0"], "--concurrency: 0; accepted"),
    ([*BASE, "--requests-per-minute", "0"], "--requests-per-minute: 0.0; accepted"),
    ([*BASE, "--tries", "0"], "--tries: 0; accepted"),
    ([*BASE, "--timeout", "0"], "--timeout: 0.0; accepted"),
    ([*BASE, "--template", "no place"], "--template: 'no place' has no {question}"),
    ([*BASE, "--template", "@nowhere.txt"], "--template: @nowhere.txt: "),
    ([*BASE, "--marker", " "], "--marker: empty"),
    ([*BASE, "--key-variable", "NOT_SET"], "--key-variable: NOT_SET is not set"),
    ([*BASE, "--extra", "{"], "--extra: no JSON"),
    ([*BASE, "--extra", '{"n": 3}'], "--extra: "),
    ([*BASE, "--logprobs", "5"], "--logprobs: without --tokenizer"),
    ([*BASE, "--logprobs", "21", "--tokenizer", "x"], "--logprobs: 21; accepted: from 0 to 20"),
    ([*BASE, "--tokenizer", "x"], "--tokenizer: goes with --endpoint and --logprobs"),
    ([*BASE, "--logprobs", "5", "--tokenizer", "./nowhere"], "--tokenizer: ./nowhere: no such file or folder"),
    ([*BASE, "--logprobs", "5", "--tokenizer", "bpe"], "--tokenizer: bpe is made of the texts of training"),
    ([*BASE, "--cache", "c"], "--cache: without --logprobs"),
    ([*BASE, "--keep", "agreeing"], "--keep: agreeing, with --samples 1"),
    (["plain.jsonl", *BASE[1:], "--keep", "right"], "--keep: right, and no question has a gold answer"),
    ([*BASE, "--keep", "best"], "argument --keep: invalid choice: 'best'"),
    (["q.jsonl", "o", "--model", "m", "--extra", "{}"], "--extra: without --endpoint"),
    (["q.jsonl", "o", "--model", "./nowhere"], "--model: ./nowhere"),
    (["chat.jsonl", *BASE[1:], "--api", "completions"], "--api: completions, and questions with messages"),
    ([*BASE[:3], "ftp://x/v1", *BASE[4:]], "--endpoint: 'ftp://x/v1'; accepted: a URL"),
    ([*BASE[:3], "api.example.com", *BASE[4:]], "--endpoint: 'api.example.com'; accepted: a URL"),
    ([*BASE[:3], "http://x:port/v1", *BASE[4:]], "--endpoint: not a URL"),
    ([*BASE[:3], "https://me:hunter2@x/v1", *BASE[4:]], "--endpoint: has a user, query or fragment"),
    ([*BASE[:3], "http://api.example.com/v1", *BASE[4:]], "--endpoint: http://api.example.com/v1 would send key"),
    ([*BASE[:3], "http://x/v1/completions", *BASE[4:], "--api", "chat", "--insecure"], "--api: chat, and"),
]


@pytest.mark.parametrize(("words", "start"), MISTAKES, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_mistakes(capsys, workplace, words, start):
    user = {"role": "user", "content": "hi"}
    files = {
        "bad.jsonl": b'{"question": "a"}\n\n{"question": \n',
        "list.jsonl": b"[1]\n",
        "typo.jsonl": b'{"qestion": "a"}\n',
        "role.jsonl": json.dumps({"messages": [{**user, "role": "usr"}]}).encode(),
        "twice.jsonl": b'{"id": 1, "question": "a"}\n{"id": 1, "question": "b"}\n',
        "latin.jsonl": '{"question": "é"}'.encode("latin-1"),
        "empty.jsonl": b"\n\n",
        "plain.jsonl": b'{"question": "a"}\n',
        "chat.jsonl": json.dumps({"messages": [user]}).encode(),
    }
    for name, content in files.items():
        Path(name).write_bytes(content)
    before = set(workplace.rglob("*"))
    assert main(["generate", *words]) == 2
    said = capsys.readouterr().err
    assert said.removeprefix("kdlab: error: ").startswith(start) and said.count("\n") == 1, said
    assert "hunter2" not in said and set(workplace.rglob("*")) == before


def test_help_and_import_are_light(tmp_path):
    code = (
        "import sys, kdlab.generate, kdlab.generate.pool, kdlab.generate.produce\n"
        "from kdlab.cli.main import main\n"
        "try: main(['generate', '--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "assert not {'torch', 'numpy', 'lightning'} & set(sys.modules)\n"
    )
    env = {"PYTHONPATH": str(Path(kdlab.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "examples" in done.stdout and max(map(len, done.stdout.splitlines())) <= 120


# ---- questions, addresses, splitting


def test_questions(workplace):
    Path("x.jsonl").write_text(
        '\ufeff{"question": "a", "answer": "x\\n#### 72"}\n{"question": "a", "answer": "72"}\n'
        '{"question": "a", "id": 7}\n{"question": "c", "gold": 4.5, "choices": ["4.5", "5"]}\n'
    )
    asks = read_questions(Path("x.jsonl"))
    assert [(a.question, a.gold, a.id) for a in asks] == [("a", "72", None), ("a", None, 7), ("c", "4.5", None)]
    assert len({a.key for a in asks}) == 3 and asks[2].more == {"choices": ["4.5", "5"]}
    seeds = {Job.of(ask, sample, seed).seed for ask in asks for sample in range(3) for seed in range(3)}
    assert len(seeds) == 27 and all(0 <= seed < 2**31 for seed in seeds)
    assert Job.of(asks[0], 1, 2) == Job.of(asks[0], 1, 2)


@pytest.mark.parametrize(
    ("text", "reasoning", "answer"),
    [
        ("so 5.\n#### 5", "so 5.", "5"),
        ("#### 1 no\n#### 2\nthanks", "#### 1 no", "2"),
        ("<think>\nhm\n</think>\n\nIt is\n#### 3", "hm\nIt is", "3"),
        ("nothing", "nothing", None),
        ("cut ####", "cut ####", None),
        ("#### 5", "", "5"),
    ],
)
def test_splitting(text, reasoning, answer):
    assert Wording().split(text) == (reasoning, answer)


def test_addresses():
    assert Address.of("https://h/v1/").url == "https://h:443/v1/chat/completions"
    assert Address.of("https://h/v1", "completions").path == "/v1/completions"
    assert not Address.of("http://[::1]:80/completions").chat and Address.of("http://[::1]:80").url.startswith(
        "http://[::1]"
    )
    assert Address.of("http://h/x", insecure=True).host == "h"


def test_answers_are_judged_by_their_kind():
    from kdlab.generate.produce import is_right

    def ask(gold, **more):
        return Ask("k", "q", (), gold, None, more)

    assert is_right("$1,200.0", ask("1200")) and not is_right("12", ask("1200")) and not is_right(None, ask("1"))
    assert is_right("(b)", ask("bank", choices=["park", "bank"])) and is_right("The  Bank.", ask("the bank"))


def test_a_pool_leaves_no_threads_behind(serve):
    before = threading.active_count()
    assert generate(serve(right), "--concurrency", "8") == 0
    deadline = time.monotonic() + 3
    while any(t.name.startswith("ask-") for t in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not [t for t in threading.enumerate() if t.name.startswith("ask-")]
    assert pools.LONGEST_WAIT > 0 and before > 0


# ---- log-probabilities


def scored_answer(tokenizer, ids, k, top_p=None):
    """Token by token as an endpoint reports it, with the distribution of a fixed table."""
    import torch

    rows = []
    for token in ids:
        logits = torch.randn(tokenizer.size, generator=torch.Generator().manual_seed(token)).log_softmax(-1)
        top = logits.topk(k)
        named = [(int(i), float(v)) for i, v in zip(top.indices, top.values, strict=True)]
        rows.append((token, named))
    return rows


def as_logprobs(pieces, rows):
    def piece(token):
        raw = pieces.bytes[token]
        return {"token": raw.decode("utf-8", "replace"), "bytes": list(raw)}

    return {
        "content": [
            {**piece(token), "logprob": -0.5, "top_logprobs": [{**piece(i), "logprob": v} for i, v in top]}
            for token, top in rows
        ]
    }


def small_tokenizer(folder):
    from kdlab.data.text.tokenizer import Tokenizer

    texts = ["Q: 2 + 3?\nA: 2 + 3 = 5\n#### 5", " 4 + 3 = 7 \n#### 7 é", "héhé so so many"] * 3
    made = Tokenizer.bpe(texts, 300)
    made.save(folder)
    return made


def test_log_probabilities_reach_the_cache_where_tokens_agree(serve, capsys, workplace):
    from kdlab.data.text.forms import Example, sequences
    from kdlab.generate.scores import Pieces
    from kdlab.teachers.sequences import sequence_key
    from kdlab.teachers.token_files import TokenManifest, read_index

    tokenizer = small_tokenizer(workplace / "tok")
    pieces = Pieces(tokenizer)
    assert pieces.find(" é".encode()) == tokenizer.encode(" é")[0] or len(tokenizer.encode(" é")) > 1
    asked = {}

    def scored(handler, body, number):
        first = int(body["messages"][-1]["content"].split()[0])
        text = f"{first} + 3 = {first + 3}\n#### {first + 3}"
        # reasoning and answer apart, as training has them; no space before the first token
        ids = [*tokenizer.encode(text.partition("\n")[0]), *tokenizer.encode("\n" + text.partition("\n")[2])]
        rows = scored_answer(tokenizer, ids, 4)
        if first == 6:  # the endpoint's tokens are others than training's
            rows = [(t, top) for char in text for t, top in scored_answer(tokenizer, tokenizer.encode(char), 4)]
        asked[first] = rows
        assert body["logprobs"] is True and body["top_logprobs"] == 4
        handler.send(200, chat(text, logprobs=as_logprobs(pieces, rows)))

    server = serve(scored)
    words = ["--logprobs", "4", "--tokenizer", str(workplace / "tok")]
    assert generate(server, *words) == 0
    shown = capsys.readouterr().out
    assert "log-probabilities of 2 of 3 traces" in shown
    assert {row["id"]: row["scored"] for row in traces()} == {"q2": True, "q4": True, "q6": False}
    assert [row["id"] for row in traces("out.jsonl.filtered.jsonl") if not row["scored"]] == []

    folder = Path("out.jsonl.tokens")
    plain = json.loads((folder / "manifest.json").read_text())
    manifest = TokenManifest(**{**plain, "splits": tuple(plain["splits"])})
    assert manifest.classes == tokenizer.size and manifest.k == 4 and KEY not in json.dumps(plain)
    index = read_index(folder, manifest.record)
    records = np.fromfile(folder / "rows.bin", manifest.record)
    (sequence,) = sequences([Example("2 + 3?", "2 + 3 = 5", "5")], tokenizer)
    key = sequence_key(sequence.ids.numpy()[:-1])
    (entry,) = [e for e in index if e["key"].tobytes() == key]
    own = records[entry["start"] : entry["start"] + entry["rows"]]
    assert len(own) == int((sequence.segments != 0).sum()) == len(asked[2]) + 1
    for record, (_, top) in list(zip(own, asked[2], strict=False))[1:]:
        assert record["ids"].tolist() == [i for i, _ in top]
        assert record["values"] == pytest.approx([v for _, v in top], abs=2e-3)
        assert np.exp(record["rest"]) == pytest.approx(1 - sum(np.exp(v) for _, v in top), abs=1e-5)
    assert own[-1]["ids"][0] == tokenizer.eos_id and own[-1]["values"][0] == 0 and np.exp(own[-1]["rest"]) == 0
    # the first row's candidates have got the space that training has there
    spaced = [(b" " + pieces.bytes[i], v) for i, v in asked[2][0][1]]
    known = {pieces.bytes.index(piece): v for piece, v in spaced if piece in pieces.bytes}
    kept = {int(i): float(v) for i, v in zip(own[0]["ids"], own[0]["values"], strict=True) if v > -1000}
    assert kept == pytest.approx(known, abs=2e-3)


def test_odd_log_probabilities_are_left_out(serve, capsys, workplace):
    small_tokenizer(workplace / "tok")
    odd = [
        None,
        {"content": [{"token": "2"}]},
        {"content": [{"token": "2", "top_logprobs": [{"token": "2", "logprob": "high"}]}]},
        {"content": [{"token": "2", "top_logprobs": [{"token": "2", "logprob": 3.0}]}]},
        {"content": [{"token": "2", "bytes": [300], "top_logprobs": []}]},
        {"content": []},
        [1, 2],
    ]
    Path("q.jsonl").write_text("".join(json.dumps({"question": f"{i} + 3?"}) + "\n" for i in range(len(odd))))
    server = serve(lambda h, b, n: h.send(200, chat(logprobs=odd[n])))
    assert generate(server, "--logprobs", "2", "--tokenizer", str(workplace / "tok")) == 1
    shown = capsys.readouterr()
    assert f"log-probabilities of 0 of {len(odd)} traces" in shown.out
    assert f"warning: log-probabilities of 0 of {len(odd)} traces were stored" in shown.err
    # nothing is left to ask: that is no failure
    assert generate(server, "--logprobs", "2", "--tokenizer", str(workplace / "tok")) == 0


def test_a_tokenizer_of_bytes_needs_no_file(serve, capsys):
    def scored(handler, body, number):
        text = "five\n#### 5"
        named = [{"token": c, "logprob": -0.1, "top_logprobs": [{"token": c, "logprob": -0.1}]} for c in text]
        handler.send(200, chat(text, logprobs={"content": named}))

    assert generate(serve(scored), "--logprobs", "1", "--tokenizer", "bytes") in (0, 1)
    assert json.loads(Path("out.jsonl.tokens/manifest.json").read_text())["classes"] == 257


# ---- models on this machine


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """A folder as transformers writes it: a GPT-2 of one layer that was taught three sums by heart."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from kdlab.data.text.forms import Example, sequences

    folder = tmp_path_factory.mktemp("model")
    tokenizer = small_tokenizer(folder)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=tokenizer.size + 3, n_positions=64, n_embd=32, n_layer=1, n_head=2,
        bos_token_id=0, eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    net = GPT2LMHeadModel(config)
    rows = sequences([Example(f"{i} + 3?", f"{i} + 3 = {i + 3}", str(i + 3)) for i in (2, 4, 6)], tokenizer)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(150):
        logits = [(net(input_ids=r.ids.long()[None]).logits[0, :-1], r.ids.long()[1:]) for r in rows]
        loss = sum(torch.nn.functional.cross_entropy(found, wanted) for found, wanted in logits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.eval().save_pretrained(folder)
    return folder


def here(model, *words, out="out.jsonl"):
    return main(["generate", "q.jsonl", out, "--model", str(model), "--device", "cpu", "--max-tokens", "40", *words])


def test_a_model_on_this_machine_writes_what_it_learned(tiny_model, capsys):
    assert here(tiny_model, "--logprobs", "5") == 0
    assert "right 3 of 3" in capsys.readouterr().out
    row = traces()[0]
    assert (row["reasoning"], row["answer"], row["finish_reason"], row["scored"]) == ("2 + 3 = 5", "5", "stop", True)

    import torch
    from transformers import GPT2LMHeadModel

    from kdlab.data.text.forms import Example, sequences
    from kdlab.data.text.tokenizer import Tokenizer
    from kdlab.teachers.sequences import sequence_key
    from kdlab.teachers.token_files import TokenManifest, read_index

    tokenizer = Tokenizer.load(tiny_model)
    (sequence,) = sequences([Example("2 + 3?", "2 + 3 = 5", "5")], tokenizer)
    manifest = TokenManifest(str(tiny_model), f"tokens of {tokenizer.fingerprint[:16]}", tokenizer.size, 5)
    index = read_index(Path("out.jsonl.tokens"), manifest.record)
    (entry,) = [e for e in index if e["key"].tobytes() == sequence_key(sequence.ids.numpy()[:-1])]
    records = np.fromfile("out.jsonl.tokens/rows.bin", manifest.record)[entry["start"] :][: entry["rows"]]
    with torch.no_grad():
        logits = GPT2LMHeadModel.from_pretrained(tiny_model)(input_ids=sequence.ids.long()[None]).logits[0]
    first = int((sequence.segments == 0).sum())
    wanted = logits[first - 1 : -1, : tokenizer.size].log_softmax(-1).topk(5)
    assert torch.equal(torch.from_numpy(records["ids"].astype(np.int64)), wanted.indices)
    np.testing.assert_allclose(records["values"], wanted.values.numpy(), atol=2e-2, rtol=1e-3)


def test_samples_depend_on_their_seed_and_not_on_the_batch(tiny_model):
    words = ["--temperature", "1.5", "--samples", "4", "--keep", "agreeing"]
    assert here(tiny_model, *words, "--batch-size", "12") in (0, 1)
    assert here(tiny_model, *words, "--batch-size", "1", out="b.jsonl") in (0, 1)
    texts = [
        {(row["id"], row["sample"]): (row["reasoning"], row["answer"]) for row in traces(path)}
        for path in ("out.jsonl", "b.jsonl")
    ]
    assert texts[0] == texts[1] and len(texts[0]) >= 10 and len(set(texts[0].values())) > 3
    assert here(tiny_model, *words, "--seed", "1", out="c.jsonl") in (0, 1)
    assert {(r["id"], r["sample"]): (r["reasoning"], r["answer"]) for r in traces("c.jsonl")} != texts[0]


def test_prompts_without_room_fail_alone(tiny_model, capsys):
    Path("q.jsonl").write_text(json.dumps({"question": "2 + 3?"}) + "\n" + json.dumps({"question": "so " * 300}))
    assert here(tiny_model) == 1
    assert len(traces()) == 1
    assert "tokens, the context 64" in traces("out.jsonl.failed.jsonl")[0]["error"]


def test_a_chat_template_is_used_where_there_is_one(tiny_model, tmp_path, monkeypatch):
    import shutil

    from kdlab.generate.local import Local, load

    folder = tmp_path / "chatty"
    shutil.copytree(tiny_model, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|endoftext|>{% endfor %}assistant:"
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    local = Local(load(str(folder), "cpu"), Wording(system="s", template="{question}"))
    ids = local.prompt(Job.of(Ask("k", "so?"), 0, 0))
    assert ids.count(local.writer.tokenizer.eos_id) == 2
    assert local.writer.tokenizer.decode(ids) == "system: suser: so?assistant:"


def test_messages_need_a_chat_template(tiny_model, capsys, workplace):
    Path("q.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}]}))
    assert here(tiny_model) == 2
    assert "has no chat template" in capsys.readouterr().err and not Path("out.jsonl").exists()


def test_a_run_folder_is_a_teacher(tiny_model, tmp_path, capsys):
    import shutil

    import torch

    from kdlab.models.language import CausalLM

    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(tiny_model / "tokenizer.json", run)
    shape = {"n_embd": 32, "n_layer": 1, "n_head": 2}
    net = CausalLM(name=str(tiny_model))
    torch.save(net.state_dict(), run / "student.pt")
    network = {"_target_": "kdlab.models.CausalLM", "architecture": "gpt2", "settings": shape}
    arguments = {"vocab_size": net.net.config.vocab_size, "context": 64, "eos_id": 0, "pad_id": 0}
    described = {"network": network, "weights": "student.pt", "arguments": arguments, "tokenizer": "tokenizer.json"}
    (run / "model.json").write_text(json.dumps(described))
    assert here(run) == 0
    assert "right 3 of 3" in capsys.readouterr().out
    (run / "tokenizer.json").unlink()
    assert here(run, out="b.jsonl") == 2
    assert "has no tokenizer.json; accepted: the run of a language model" in capsys.readouterr().err
