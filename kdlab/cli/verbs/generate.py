"""Traces from a teacher that writes: an OpenAI-compatible endpoint, or a model on this machine."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdlab.cli.main import Parser
from kdlab.errors import RunFailed, UserError
from kdlab.plain_text import one_line
from kdlab.system.files import Unreadable, read_text
from kdlab.system.terminal import say, warn

if TYPE_CHECKING:
    from kdlab.traces.pipeline import AnswerSource, Soft, Summary
    from kdlab.traces.prompts import Prompt, PromptTemplate
    from kdlab.traces.writer import Output

EPILOG = """\
QUESTIONS is JSONL: {"question": "..."} or {"messages": [{"role": "user", "content": "..."}]}, and optionally "id",
and the right answer under "gold" or "answer". OUT gets a line a sample, and is what data=traces data.path=OUT reads.
Beside it: OUT.manifest.json (how it was asked), OUT.failed.jsonl (what stayed without an answer), OUT.tokens (the token
cache of --logprobs: the most probable tokens at temperature 1), and with --keep or --logprobs OUT.filtered.jsonl.
The same command again goes on where it stopped, and asks again what failed.

An endpoint needs the openai client (pip install 'kdlab[generate]'). The key comes from the environment, goes to the
endpoint's host only, and is written nowhere.

examples
  export OPENAI_API_KEY=...
  kdlab generate train.jsonl traces.jsonl --endpoint https://api.openai.com/v1 --model gpt-4o-mini \\
      --samples 4 --temperature 0.7 --requests-per-minute 300 --keep right
  kdlab generate train.jsonl traces.jsonl --endpoint http://localhost:8000/v1 --model Qwen/Qwen3-8B \\
      --logprobs 20 --tokenizer Qwen/Qwen3-8B --concurrency 32
  kdlab generate train.jsonl traces.jsonl --model outputs/my_teacher/RUN --temperature 0 --logprobs 32
  kdlab generate train.jsonl traces.jsonl --model gpt2 --template @few_shot.txt --marker '####'
"""


def parser() -> Parser:
    """Return the parser of the verb's arguments."""
    made = Parser(
        prog="kdlab generate",
        usage="kdlab generate QUESTIONS OUT --model NAME [--endpoint URL] ...",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = made.add_argument
    add("questions", type=Path, metavar="QUESTIONS", help="a JSONL file")
    add("out", type=Path, metavar="OUT", help="the traces: a new JSONL file, or one to go on with")
    add("--model", required=True, help="its name at the endpoint; without one: a run folder, a folder, or a hub name")
    _add_questions(made)
    _add_endpoint(made)
    _add_log_probabilities(made)
    _add_local_model(made)
    return made


def _add_questions(parser: Parser) -> None:
    add = parser.add_argument_group("what is asked").add_argument
    add("--samples", type=int, default=1, metavar="N", help="answers for each question (default 1)")
    add("--temperature", type=float, default=0.0, help="0 (default): the most probable answer")
    add("--top-p", type=float, default=1.0, help="draw among the most probable tokens of this mass (default 1)")
    add("--max-tokens", type=int, default=512, metavar="N", help="the longest answer (default 512)")
    add("--seed", type=int, default=0, help="each sample has its own, made of this one (default 0)")
    add("--system", metavar="TEXT|@FILE", help="a system message")
    add("--template", metavar="TEXT|@FILE", help="around {question}; by default one that asks for reasoning")
    add("--marker", default="####", help="what stands before the final answer (default ####)")
    add("--limit", type=int, metavar="N", help="only the first N questions")
    add("--gold", metavar="FIELD", help="the right answer's field (default: gold, else answer)")
    add("--keep", choices=("right", "agreeing"), help="also write OUT.filtered.jsonl with these traces only")


def _add_endpoint(parser: Parser) -> None:
    add = parser.add_argument_group("endpoint").add_argument
    add("--endpoint", metavar="URL", help="such as https://host/v1; an OpenAI-compatible server")
    add("--api", choices=("chat", "completions"), help="default: by the URL, else chat")
    add("--key-variable", metavar="NAME", help="environment variable with the key (default OPENAI_API_KEY)")
    add("--insecure", action="store_true", help="allow http to other machines: key and questions can be read there")
    add("--concurrency", type=int, default=4, metavar="N", help="requests at a time (default 4)")
    add("--requests-per-minute", type=float, metavar="N", help="no more than so many, evenly spaced")
    add("--tokens-per-minute", type=float, metavar="N", help="no more than so many, of prompts and answers")
    add("--tries", type=int, default=6, metavar="N", help="before a question counts as failed (default 6)")
    add("--timeout", type=float, default=300.0, metavar="SECONDS", help="of one answer (default 300)")
    add("--extra", metavar="JSON", help="further fields of requests, null leaves one out: '{\"max_tokens\": null}'")


def _add_log_probabilities(parser: Parser) -> None:
    add = parser.add_argument_group("log-probabilities").add_argument
    add("--logprobs", type=int, default=0, metavar="K", help="of the K most probable tokens, into a token cache")
    add("--tokenizer", metavar="FOLDER|NAME", help="the one of training, or bytes (a local model has its own)")
    add("--cache", type=Path, metavar="FOLDER", help="the token cache (default OUT.tokens)")


def _add_local_model(parser: Parser) -> None:
    add = parser.add_argument_group("model on this machine").add_argument
    add("--batch-size", type=int, default=16, metavar="N", help="questions at a time (default 16)")
    add("--device", default="auto", help="auto (default), cpu, cuda, ...")
    add("--trust", action="store_true", help="let a run folder build modules found here; only for runs you made")


def main(argv: Sequence[str]) -> int:
    """Run ``kdlab generate QUESTIONS OUT --model NAME [--endpoint URL]``; returns the exit status."""
    args = parser().parse_args(argv)
    check(args)
    from kdlab.traces import prompts

    wording = prompts.PromptTemplate(_text(args.system, "--system"), _text(args.template, "--template"), args.marker)
    asks = prompts.read_questions(args.questions, args.limit, args.gold)
    if args.endpoint is not None:
        source, about, soft = _remote(args, wording, asks)
    else:
        source, about, soft = _here(args, wording, asks)
    return _run(args, asks, source, about, soft)


def check(args: argparse.Namespace) -> None:
    """Check the numbers of the command line, and which arguments go together.

    Raises:
        UserError: for a number out of its range, or arguments that do not go together.
    """
    ranges: dict[str, tuple[float, float]] = {
        "samples": (1, 10**6),
        "temperature": (0, 100),
        "top_p": (1e-6, 1),
        "max_tokens": (1, 10**7),
        "limit": (1, 10**12),
        "concurrency": (1, 1024),
        "requests_per_minute": (1e-3, 1e9),
        "tokens_per_minute": (1, 1e12),
        "tries": (1, 100),
        "timeout": (1e-3, 86400),
        "logprobs": (0, 20 if args.endpoint else 1000),
        "batch_size": (1, 10**6),
    }
    for name, (low, high) in ranges.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise UserError(f"--{name.replace('_', '-')}", value, f"from {low:g} to {high:g}")
    if args.out.absolute() == args.questions.absolute():
        raise UserError("OUT", f"{args.out} is QUESTIONS too", "another file")
    if args.endpoint is None:
        for name in ("api", "key_variable", "requests_per_minute", "tokens_per_minute", "extra"):
            if getattr(args, name) is not None:
                raise UserError(f"--{name.replace('_', '-')}", "without --endpoint", "an endpoint, or leave it out")
    if args.tokenizer is not None and (args.endpoint is None or not args.logprobs):
        raise UserError("--tokenizer", "goes with --endpoint and --logprobs", "both, or leave it out")
    if args.tokenizer in ("characters", "bpe") and not Path(args.tokenizer).exists():
        raise UserError(
            "--tokenizer",
            f"{args.tokenizer} is made of the texts of training, unknown here",
            ("bytes, the folder of a run that has it (tokenizer.json), or a model on the hub"),
        )
    if args.cache is not None and not args.logprobs:
        raise UserError("--cache", "without --logprobs", "--logprobs K, or leave it out")


def _remote(
    args: argparse.Namespace, wording: PromptTemplate, asks: Sequence[Prompt]
) -> tuple[AnswerSource, dict[str, Any], Soft | None]:
    from kdlab.traces.endpoint import Address, Endpoint, read_key
    from kdlab.traces.pool import ConcurrentClient, RateLimiter, RetryPolicy

    address = Address.of(args.endpoint, args.api, args.insecure)
    key = read_key(args.key_variable, address)
    if not address.chat and any(ask.messages for ask in asks):
        raise UserError("--api", "completions, and questions with messages", "chat, or questions with 'question'")
    if args.logprobs and args.tokenizer is None:
        raise UserError("--logprobs", "without --tokenizer", "with that of training, a folder or hub name")
    extra = _extra(args.extra)
    settings: dict[str, Any] = {
        "model": args.model,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "max_tokens": args.max_tokens,
    }
    if args.logprobs:
        settings |= {"logprobs": True, "top_logprobs": args.logprobs} if address.chat else {"logprobs": args.logprobs}
    pool = ConcurrentClient(
        Endpoint(address, key, args.timeout),
        wording,
        {**settings, **extra},
        args.concurrency,
        RateLimiter(args.requests_per_minute, args.tokens_per_minute, guess=min(args.max_tokens, 512)),
        RetryPolicy(args.tries),
    )
    soft = None
    if args.logprobs:
        from kdlab.data.text.tokenizer import Tokenizer

        by_bytes = args.tokenizer == "bytes" and not Path("bytes").exists()
        tokenizer = Tokenizer.bytes() if by_bytes else Tokenizer.load(args.tokenizer, "--tokenizer")
        soft = _soft(args, tokenizer, f"{args.model} at {address.host}")
    return pool, {"endpoint": address.url, "extra": extra}, soft


def _here(
    args: argparse.Namespace, wording: PromptTemplate, asks: Sequence[Prompt]
) -> tuple[AnswerSource, dict[str, Any], Soft | None]:
    # what can be known without the model first: it may take minutes to load
    _output(args, wording, {"endpoint": None, "extra": {}})
    from kdlab.traces.local import Local, load

    writer = load(args.model, args.device, args.trust)
    if writer.chat is None and any(ask.messages for ask in asks):
        raise UserError("QUESTIONS", f"messages, and {args.model} has no chat template", "'question' fields")
    if args.logprobs >= writer.tokenizer.size:
        raise UserError("--logprobs", args.logprobs, f"below the vocabulary, {writer.tokenizer.size}")
    local = Local(
        writer,
        wording,
        temperature=args.temperature,
        top_p=args.top_p,
        new_tokens=args.max_tokens,
        batch_size=args.batch_size,
        top=args.logprobs,
    )
    soft = _soft(args, writer.tokenizer, args.model) if args.logprobs else None
    return local, {"endpoint": None, "extra": {}}, soft


def _soft(args: argparse.Namespace, tokenizer: Any, teacher: str) -> Soft:
    from kdlab.traces.pipeline import Soft
    from kdlab.traces.scores import Pieces

    folder = args.cache if args.cache is not None else args.out.with_name(f"{args.out.name}.tokens")
    return Soft(Pieces(tokenizer), args.logprobs, folder, teacher)


def _output(args: argparse.Namespace, wording: PromptTemplate, where: dict[str, Any]) -> Output:
    """Open the output file, held against how its traces were asked for."""
    from kdlab.traces.writer import Output

    settings = {
        **where,
        "model": args.model,
        "system": wording.system,
        "template": wording.template,
        "marker": wording.marker,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "max_tokens": args.max_tokens,
        "seed": args.seed,
        "logprobs": args.logprobs,
        "tokenizer": args.tokenizer,
    }
    return Output(args.out, settings)


def _run(
    args: argparse.Namespace, asks: Sequence[Prompt], source: AnswerSource, where: dict[str, Any], soft: Soft | None
) -> int:
    from kdlab.traces.pipeline import check_keep, run_pipeline, write_filtered

    output = _output(args, source.wording, where)
    if args.keep:
        check_keep(args.keep, asks, args.samples)
    about = {"teacher": args.model, "model": args.model, "temperature": args.temperature}
    try:
        summary = run_pipeline(asks, args.samples, args.seed, source, output, about, soft)
    except KeyboardInterrupt as stop:
        _say(getattr(stop, "summary", None))
        say(f"kdlab: interrupted; the same command goes on with what is missing in {args.out}", file=sys.stderr)
        return 130
    except RunFailed as error:
        _say(getattr(error, "summary", None))
        raise
    _say(summary)
    say(f"traces: {one_line(args.out)}")
    if args.keep or soft is not None:
        path, kept = write_filtered(output, args.keep or "all", soft is not None)
        say(f"kept: {one_line(path)}, {kept} of {len(output.done)} traces")
    if summary.failed:
        raise RunFailed(
            f"{summary.failed} answers are missing ({output.failures} says why); the same command asks for them again"
        )
    if soft is not None and summary.written and not summary.scored:
        warn(
            f"log-probabilities of 0 of {summary.written} traces were stored: either none came, or"
            f" --tokenizer {args.tokenizer or args.model} has other tokens than {args.model}"
        )
        return 1
    return 0


def _say(summary: Summary | None) -> None:
    for line in summary.lines() if summary is not None else ():
        say(one_line(line))


def _text(value: str | None, name: str) -> str | None:
    """Return a text, or what stands in the file behind an ``@``."""
    if value is None or not value.startswith("@"):
        return value
    try:
        return read_text(value[1:])
    except (OSError, Unreadable) as error:
        raise UserError(name, f"{value}: {error}", "a text, or @ and a file with text") from None


def _extra(value: str | None) -> dict[str, Any]:
    if value is None:
        return {}
    try:
        fields = json.loads(value)
    except ValueError as error:
        raise UserError("--extra", f"no JSON ({error})", "an object such as '{\"max_tokens\": null}'") from None
    taken = {"messages", "prompt", "model", "n", "stream"}
    if not isinstance(fields, dict) or taken & set(fields):
        raise UserError("--extra", f"{value[:80]}", f"a JSON object without {', '.join(sorted(taken))}")
    return fields
