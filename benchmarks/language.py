"""What distilling language models costs: steps, memory, caches, generation; and how far off sparse targets are.

    python benchmarks/language.py [--teacher-parameters 100M] [--rounds 3] [--parts step,memory,cache,bias,generation]

GPT-2s from a config with random weights read random tokens of a vocabulary of 50,257; a student has about a quarter of
its teacher's parameters. On a GPU the default is a teacher of 124 million parameters, in bf16 by autocast; on a CPU one
of 12 million, in float32. A step is zero_grad, teacher, student, CE + KL (temperature 1), backward, AdamW, by kdlab's
task, objective and teachers; "all logits at once" is the same with logits made by one ``F.linear``.

All kinds of steps are timed in turn, in rounds, so that each ratio is of times from the same round. Memory is taken in
a process of its own for each kind: ``torch.cuda.max_memory_allocated``, or the peak resident set, over what a step of
four tokens leaves behind (weights, gradients, the optimizer's state).

Bias: a small teacher and student are trained on a text, and the student's gradients compared, see sparse.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import sparse
import torch
from gpts import CACHED, KINDS, LIGER, Bench, liger_kinds, parameters, size_of
from pairs import compare, duration, header, ratio, say, seconds
from vocabulary import peak

from kdlab.batch_transforms.on_policy import GeneratedText
from kdlab.errors import UserError
from kdlab.models.transformers.generation import continuations

PARTS = ("step", "memory", "cache", "bias", "generation")
RATIOS = (
    ("kd", "kd, dense", "0.75 for the loss alone, see vocabulary.py"),
    ("ce", "ce, dense", ""),
    ("kd", "ce", ""),
    ("kd, top-k", "ce", ""),
    ("kd, sampled", "ce", ""),
    ("kd, top-k", "kd", ""),
    ("kd", "ce, dense", ""),
    ("ce", "ce, liger", ""),
    ("kd", "kd, liger", ""),
    ("kd", "kd, liger torch", ""),
)


# ---- steps


def first(bench: Bench, kinds: dict[str, str]) -> list[str]:
    """Take one step of each kind from the same weights: forms of one loss say the same. The kinds that can run."""
    start = {name: value.clone() for name, value in bench.student.state_dict().items()}
    losses: dict[str, float] = {}
    for kind in kinds:
        bench.student.load_state_dict(start)
        try:
            losses[kind] = float(bench.step(kind))
        except torch.OutOfMemoryError:
            say(f"step: {kinds[kind]}", "out of memory")
        except Exception as error:
            if kind not in LIGER:
                raise
            say(f"step: {kinds[kind]}", f"failed: {type(error).__name__}: {str(error).splitlines()[:1]}")
    for name in ("ce", "kd"):
        say(f"loss, {name}", "; ".join(f"{k} {v:.5f}" for k, v in losses.items() if k.startswith(name)))
    return list(losses)


def steps(bench: Bench, kinds: dict[str, str], rounds: int) -> None:
    """The time of every kind of step, in rounds, and the ratios that matter."""
    times: dict[str, list[float]] = {kind: [] for kind in first(bench, kinds)}
    for n in range(rounds):
        for kind in list(times) if n % 2 == 0 else list(times)[::-1]:
            times[kind].append(seconds(lambda kind=kind: bench.step(kind), bench.clock))
    tokens = len(bench.full)
    for kind, found in times.items():
        middle = statistics.median(found)
        say(f"step: {kinds[kind]}", f"{duration(middle)}, {tokens / middle:,.0f} tokens a second")
    for a, b, target in RATIOS:
        if a in times and b in times:
            say(f"time, {a} : {b}", ratio(times[a], times[b]), target)


# ---- memory


def one(bench: Bench, kind: str) -> dict[str, int | None]:
    """Bytes at rest and at most, of one step in this process."""
    cuda = bench.device.type == "cuda"
    bench.step(kind, bench.least)
    rest = torch.cuda.memory_allocated() if cuda else peak()
    try:
        bench.step(kind)
    except torch.OutOfMemoryError:
        return {"rest": rest, "peak": None}
    return {"rest": rest, "peak": torch.cuda.max_memory_allocated() if cuda else peak()}


def memory(kinds: dict[str, str], words: list[str]) -> None:
    """Peaks, each from a process of its own."""
    found: dict[str, int] = {}
    for kind, name in kinds.items():
        command = [sys.executable, __file__, "--one", kind, *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            say(f"memory, {name}", f"failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
            continue
        told = json.loads(done.stdout.strip().splitlines()[-1])
        if told["peak"] is None:
            say(f"memory, {name}", f"out of memory, over {mib(told['rest'])} at rest")
            continue
        found[kind] = told["peak"] - told["rest"]
        say(f"memory, {name}", f"{mib(found[kind])} over {mib(told['rest'])} at rest")
    for a, b, target in RATIOS:
        if a in found and b in found and (a, b) != ("kd", "ce, dense"):
            say(f"memory over rest, {a} : {b}", f"{found[a] / found[b]:.3f}", target.replace("0.75", "0.17"))


def mib(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB"


# ---- generation


def generation(bench: Bench, pairs: int) -> None:
    """Greedy text with and without a cache of keys and values, and a step on the student's own text."""
    net, size = bench.student, bench.size
    prompt = min(16, size.context // 2)
    prompts = list(bench.full.inputs["input_ids"][:, :prompt])
    most = min(size.new_tokens, size.context + 1 - prompt)
    texts = {}

    def write(cached: bool, net: torch.nn.Module = net) -> None:
        net.cached = cached
        with bench.autocast():
            texts[cached] = continuations(net, prompts, new_tokens=most, eos_id=None, pad_id=0)
        net.cached = True

    found = compare(lambda: write(True), lambda: write(False), pairs, clock=bench.clock)
    tokens = len(prompts) * most
    with_, without = (f"{tokens / s:,.0f}" for s in found.seconds)
    what = f"{len(prompts)} prompts of {prompt} tokens, {most} new ones"
    say(f"greedy generation, student, {what}", f"{with_} tokens a second with a cache, {without} without")
    say("time, with a cache : without", found)
    same = sum(int((a == b).sum()) for a, b in zip(texts[True], texts[False], strict=True))
    say("the same tokens in both", f"{same / tokens:.1%} (random weights, whose ties rounding decides)")
    found = compare(lambda: write(True, bench.teacher.net), lambda: write(True), pairs, clock=bench.clock)
    say("time, teacher : student, with a cache", found)
    own_text(bench, prompt, pairs)


def own_text(bench: Bench, prompt: int, pairs: int) -> None:
    """A step on text that the student writes (as long as the data's), against one on the data."""
    size, end = bench.size, bench.classes - 1
    most = size.context + 1 - prompt
    source = GeneratedText(end, end, bench.classes, size.context, fraction=1.0, new_tokens=most, prompt=prompt)
    taken = iter(range(10**9))

    def write():
        with bench.autocast():
            return source(bench.full, bench.student, bench.teacher, bench.task, 0, next(taken))[0]

    found = compare(lambda: bench.step("kd", write()), lambda: bench.step("kd"), pairs, clock=bench.clock)
    say(f"time, on-policy step ({most} new tokens a sequence) : distillation step, live teacher", found)
    say("of it writing", duration(seconds(write, bench.clock)))


# ---- all of it


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher-parameters", help="such as 100M: the smallest teacher of at least so many")
    parser.add_argument("--parts", default=",".join(PARTS), help="which measurements")
    parser.add_argument("--rounds", type=int, default=3, help="times that everything is timed")
    parser.add_argument("--classes", type=int, default=50257, help="size of the vocabulary")
    parser.add_argument("--batch", type=int, help="sequences of a step")
    parser.add_argument("--context", type=int, help="tokens of a sequence")
    parser.add_argument("--new-tokens", type=int, help="tokens to generate")
    parser.add_argument("--chunk", type=int, default=128, help="rows of a chunk")
    parser.add_argument("--k", type=int, default=32, help="classes of a cache, a token")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=["float32", "bf16"], help="bf16 on a GPU, else float32")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    sparse.add_options(parser)
    parser.add_argument("--one", choices=[*KINDS, *LIGER], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args()


def made(args: argparse.Namespace, folder: Path) -> Bench:
    """What is measured."""
    cuda = args.device.startswith("cuda")
    text = args.teacher_parameters or ("100M" if cuda else "10M")
    units = {"K": 1e3, "M": 1e6, "B": 1e9}
    wanted = float(text[:-1]) * units[text[-1].upper()] if text[-1].upper() in units else float(text)
    size = size_of(wanted)
    given = {name: getattr(args, name) for name in ("batch", "context", "new_tokens") if getattr(args, name)}
    bf16 = args.precision == "bf16" if args.precision else cuda
    return Bench(replace(size, **given), args.classes, torch.device(args.device), bf16, args.chunk, args.k, folder)


def main() -> None:
    args = options()
    parts = args.parts.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        raise SystemExit(f"parts: {', '.join(unknown)}; accepted: {', '.join(PARTS)}")
    torch.set_num_threads(args.threads)
    if args.one:
        print(json.dumps(one(made(args, Path(args.folder)), args.one)))
        return
    with tempfile.TemporaryDirectory() as place:
        bench = made(args, Path(place))
        report(bench, parts, args)


def report(bench: Bench, parts: list[str], args: argparse.Namespace) -> None:
    size, where = bench.size, bench.device
    header(f"language models: {size.batch} x {size.context} tokens, {bench.classes} classes, {args.threads} thread(s)")
    if where.type == "cuda":
        print(f"{torch.cuda.get_device_name(where)}, CUDA {torch.version.cuda}")
    teacher, student = parameters(bench.teacher.net), parameters(bench.student)
    print(
        f"teacher {teacher:,} parameters, student {student:,} ({student / teacher:.2f}); "
        f"{'bf16 by autocast' if bench.bf16 else 'float32'}, chunks of {args.chunk} rows, caches of {args.k} ids\n"
    )
    kinds, remark = liger_kinds(where)
    kinds = KINDS | kinds
    written = {form: bench.write(form) for form in CACHED.values()}
    if "step" in parts:
        if remark:
            print(remark)
        steps(bench, kinds, args.rounds)
    if "memory" in parts:
        names = ("teacher_parameters", "batch", "context", "classes", "chunk", "k", "threads", "device", "precision")
        given = [f"--{name.replace('_', '-')}={value}" for name in names if (value := getattr(args, name)) is not None]
        memory(kinds, [*given, f"--folder={bench.folder}"])
    if "cache" in parts:
        sparse.files(bench, written, args.rounds)
    if "generation" in parts:
        generation(bench, max(2, args.rounds // 2))
    if "bias" in parts:
        sparse.bias(where, args)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(str(error)) from None
