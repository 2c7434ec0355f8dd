"""A local server of an OpenAI-compatible kind that behaves as a test says."""

import http.server
import json
import threading
import time
from pathlib import Path

import pytest

from kdlab.cli.main import main
from kdlab.traces.pool import RetryPolicy

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
            server.seen.append((self.path, {k.title(): v for k, v in self.headers.items()}, body, time.monotonic()))
        server.behave(self, body, number)

    def do_GET(self):
        self.server.seen.append((self.path, self.headers, None, time.monotonic()))
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


@pytest.fixture
def trace_folder(tmp_path, monkeypatch):
    """An empty folder with three questions, a key, and tries without long waits."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(RetryPolicy, "wait", lambda self, failed: 0.005 * failed)
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
