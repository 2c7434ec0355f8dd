"""Traces written by an endpoint: the whole way, interruptions, mistakes, questions."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from helpers.paths import ROOT
from helpers.serving import chat, generate, right, traces
from kdlab.cli.main import main
from kdlab.errors import UserError
from kdlab.traces import pool as pools
from kdlab.traces.endpoint import Address
from kdlab.traces.prompts import Job, Prompt, PromptTemplate, read_questions
from kdlab.traces.writer import Output

pytestmark = pytest.mark.usefixtures("trace_folder")

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

    from kdlab.data.text.datasets.traces import read_traces

    assert {t.answer for t in read_traces("out.jsonl")} == {"5", "7", "9"}


def test_the_same_command_asks_only_what_is_missing(serve, capsys, trace_folder):
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


def test_other_settings_are_refused_in_a_line(serve, capsys, trace_folder):
    server = serve(right)
    assert generate(server) == 0
    before = {path: path.read_bytes() for path in trace_folder.iterdir()}
    capsys.readouterr()
    assert generate(server, "--temperature", "1") == 2
    said = capsys.readouterr().err
    assert said.startswith("kdlab: error: out.jsonl: was written with temperature 0.0, and now it is 1.0; accepted: ")
    assert said.count("\n") == 1 and len(server.seen) == 3
    assert before == {path: path.read_bytes() for path in trace_folder.iterdir()}


def test_a_file_of_somebody_else_is_left_alone(serve, capsys):
    Path("out.jsonl").write_text("dear diary\n")
    assert generate(serve(right)) == 2
    assert "no out.jsonl.manifest.json says how it was made" in capsys.readouterr().err
    assert Path("out.jsonl").read_text() == "dear diary\n"


def test_two_processes_do_not_write_one_file(trace_folder):
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


def test_messages_system_and_template(serve, trace_folder):
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


def test_a_killed_run_goes_on(serve, trace_folder):
    server = serve(stuck)
    words = ["generate", "q.jsonl", "out.jsonl", "--endpoint", server.url, "--model", "m", "--concurrency", "1"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
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
def test_mistakes(capsys, trace_folder, words, start):
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
    before = set(trace_folder.rglob("*"))
    assert main(["generate", *words]) == 2
    said = capsys.readouterr().err
    assert said.removeprefix("kdlab: error: ").startswith(start) and said.count("\n") == 1, said
    assert "hunter2" not in said and set(trace_folder.rglob("*")) == before


def test_help_and_import_are_light(tmp_path):
    code = (
        "import sys, kdlab.traces, kdlab.traces.pool, kdlab.traces.pipeline\n"
        "from kdlab.cli.main import main\n"
        "try: main(['generate', '--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "assert not {'torch', 'numpy', 'lightning'} & set(sys.modules)\n"
    )
    env = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "examples" in done.stdout and max(map(len, done.stdout.splitlines())) <= 120


# ---- questions, addresses, splitting


def test_questions(trace_folder):
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


def test_fields_of_questions_that_look_like_slips_are_named_once(trace_folder, caplog):
    Path("x.jsonl").write_text(
        '{"question": "a", "Answer": "1", "level": 3}\n' * 2 + '{"question": "b", "answers": "1"}\n'
    )
    assert all(ask.gold is None for ask in read_questions(Path("x.jsonl")))
    assert caplog.messages == [
        "x.jsonl: line 1: field 'Answer' is not read as 'answer'",
        "x.jsonl: line 3: field 'answers' is not read as 'answer'",
    ]
    caplog.clear()
    assert read_questions(Path("x.jsonl"), limit=1, answer_key="Answer")[0].gold == "1" and not caplog.messages


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
    assert PromptTemplate().split(text) == (reasoning, answer)


def test_addresses():
    assert Address.of("https://h/v1/").url == "https://h:443/v1/chat/completions"
    assert Address.of("https://h/v1", "completions").path == "/v1/completions"
    assert not Address.of("http://[::1]:80/completions").chat and Address.of("http://[::1]:80").url.startswith(
        "http://[::1]"
    )
    assert Address.of("http://h/x", insecure=True).host == "h"


def test_answers_are_judged_by_their_kind():
    from kdlab.traces.pipeline import is_right

    def ask(gold, **more):
        return Prompt("k", "q", (), gold, None, more)

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
