"""What a cache of tokens takes, and how far its gradients are from those of all classes. Run by language.py."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from gpts import Bench, parameters
from pairs import duration, say, seconds
from torch import Tensor, nn

from kdlab.data import TextData, text_files
from kdlab.functional import Batch, Outputs, Sampled, Sparse, dense
from kdlab.losses import KL, CrossEntropy, Objective
from kdlab.models import CausalLM
from kdlab.tasks import LanguageModeling

ROOT = Path(__file__).parents[1]
COUNTS = (4, 8, 16, 32, 64)
WIDTHS = {"teacher": (4, 4, 128), "student": (4, 4, 64)}
CHUNK = 512


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("bias")
    group.add_argument("--text", help="a UTF-8 file to train on; else the Python files of kdlab")
    group.add_argument("--vocab", type=int, default=2048, help="byte pairs learned of that text")
    group.add_argument("--train-steps", type=int, help="of teacher and student; 120 on a CPU, 3000 on a GPU")
    group.add_argument("--draws", type=int, default=8, help="times that sampled targets are drawn")


# ---- files


def files(bench: Bench, written: dict[str, float], rounds: int) -> None:
    """Bytes on the disk, the time of writing, and of reading a batch."""
    tokens = sum(len(batch) for batch in (bench.least, bench.full))

    def ask() -> None:
        with bench.autocast():
            bench.teacher(bench.full)

    ask()
    alone = statistics.median(seconds(ask, bench.clock) for _ in range(3))
    for form, spent in written.items():
        cache = bench.cached(form)
        size = sum(path.stat().st_size for path in cache.folder.iterdir() if path.name != "manifest.json")
        lines = sum(len(batch.example_id) for batch in (bench.least, bench.full))
        target = "about 200 at k=32" if form == "topk" else ""
        say(
            f"cache, {form}: bytes a token", f"{size / tokens:.1f} ({size:,} for {tokens} in {lines} sequences)", target
        )
        again = min(spent, *(bench.again(form) for _ in range(max(1, rounds // 3))))
        say(f"cache, {form}: writing", f"{tokens / again:,.0f} tokens a second, the teacher included")
        times = sorted(seconds(lambda c=cache: c(bench.full), bench.clock) for _ in range(20 * rounds))
        middle, slow = times[len(times) // 2], times[len(times) * 9 // 10]
        found = f"{duration(middle)} (90th percentile {duration(slow)}, n={len(times)}, files in memory)"
        say(f"cache, {form}: reading a batch of {len(bench.full)} tokens", found)
    say("the teacher's hidden states of the same batch", duration(alone))


# ---- bias


class Gradients:
    """Gradients of KL with respect to all parameters of a student, for targets in any form."""

    def __init__(self, net: nn.Module, batch: Batch, logits: Tensor, classes: int) -> None:
        self.net, self.batch, self.logits = net.eval(), batch, logits
        self.task = LanguageModeling(classes)

    def of(self, targets: Any, temperature: float = 1.0) -> Tensor:
        """(parameters,), in float64."""
        objective = Objective({"kl": KL()}, temperature, chunk_rows=CHUNK)
        self.net.zero_grad()
        found = self.task.outputs(self.net, self.batch)
        objective(found, Outputs(targets), self.batch).total.backward()
        return torch.cat([p.grad.flatten() for p in self.net.parameters() if p.grad is not None]).double()


def bias(device: torch.device, args: argparse.Namespace) -> None:
    """Train a teacher and a student on a text, and compare the gradients that sparse targets give."""
    with tempfile.TemporaryDirectory() as place:
        data, what = corpus(args, Path(place))
    data.to(device)
    steps = args.train_steps or (3000 if device.type == "cuda" else 120)
    start, nets, ppl = time.perf_counter(), {}, {}
    batch = heldout(data)
    for name, shape in WIDTHS.items():
        nets[name] = trained(data, shape, steps, device)
        with torch.no_grad():
            logits = dense(LanguageModeling(data.vocab_size).outputs(nets[name], batch).logits)
        ppl[name] = float(torch.nn.functional.cross_entropy(logits, batch.targets).exp())
        if name == "teacher":
            told = logits
    sizes = ", ".join(f"{n} {parameters(net):,} parameters, perplexity {ppl[n]:.1f}" for n, net in nets.items())
    print(f"\nbias: {what}; {data.vocab_size} byte pairs, {steps} steps of {data.batch_size} x {data.context} tokens")
    print(f"{sizes} ({duration(time.perf_counter() - start)}); gradients of {len(batch)} held-out tokens\n")
    gradients = Gradients(nets["student"], batch, told, data.vocab_size)
    most_probable(gradients)
    drawn(gradients, args.draws)


def corpus(args: argparse.Namespace, folder: Path) -> tuple[TextData, str]:
    """The text, and what it is."""
    if args.text:
        path, what = Path(args.text), args.text
    else:
        files_ = sorted((ROOT / "kdlab").rglob("*.py"))
        path, what = folder / "source.txt", f"the {len(files_)} Python files of kdlab (code and English, not prose)"
        # in a mixed order, so that what is held out is like the rest
        files_ = [files_[i] for i in torch.randperm(len(files_), generator=torch.Generator().manual_seed(0))]
        path.write_text("\n\n".join(file.read_text(encoding="utf-8") for file in files_), encoding="utf-8")
    data = text_files(str(path), tokenizer="bpe", vocab=args.vocab, context=128, batch_size=16, eval_batch_size=32)
    return data, what


def heldout(data: TextData) -> Batch:
    """One batch of text that nobody was trained on."""
    return next(iter(data.test_dataloader()))


def trained(data: TextData, shape: tuple[int, int, int], steps: int, device: torch.device) -> CausalLM:
    """A GPT-2 after some steps of cross-entropy."""
    layers, heads, width = shape
    settings = {"n_layer": layers, "n_head": heads, "n_embd": width}
    settings |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    torch.manual_seed(0)
    end = data.tokenizer.eos_id
    net = CausalLM("gpt2", settings, None, data.vocab_size, data.context, end, end, attention="sdpa").to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps + 1, pct_start=0.1)
    objective, task = Objective({"ce": CrossEntropy()}, chunk_rows=CHUNK), LanguageModeling(data.vocab_size)
    loader, done, epoch = data.train_dataloader(), 0, 0
    net.train()
    while done < steps:
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            optimizer.zero_grad()
            objective(task.outputs(net, batch), None, batch).total.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            rate.step()
            done += 1
            if done == steps:
                break
        epoch += 1
    return net


def most_probable(gradients: Gradients) -> None:
    """How far gradients of the k most probable classes are from those of all, at temperatures 1 and 2."""
    print("the k most probable and a bucket: gradient against that of all classes (off: norm of the difference)")
    print(f"{'k':>6} {'tail mass':>10}" + heading("T=1") + heading("T=2"))
    exact = {t: gradients.of(gradients.logits, t) for t in (1, 2)}
    classes = gradients.logits.shape[-1]
    for k in (*(k for k in COUNTS if k < classes), classes):
        kept = Sparse.of(gradients.logits, k)
        cells = [row(against(gradients.of(kept, t), whole)) for t, whole in exact.items()]
        print(f"{k:>6} {float(kept.tail.exp().mean()):>10.4f}" + "".join(cells), flush=True)


def drawn(gradients: Gradients, times: int) -> None:
    """The same of classes that are drawn: one drawing, and the mean of several."""
    print(f"\nk drawn classes, T=1: one drawing, and the mean of {times} (chance: how far off it is without a bias)")
    print(f"{'k':>6}" + heading("one") + heading("mean") + f"{'chance':>9}")
    exact = gradients.of(gradients.logits)
    source = torch.Generator(gradients.logits.device).manual_seed(0)
    for k in COUNTS:
        found = [gradients.of(Sampled.of(gradients.logits, k, generator=source)) for _ in range(times)]
        mean = torch.stack(found).mean(0)
        spread = sum(float((one - mean).square().sum()) for one in found) / (times - 1)
        single = [statistics.mean(values) for values in zip(*(against(one, exact) for one in found), strict=True)]
        chance = (spread / times) ** 0.5 / float(exact.norm())
        print(f"{k:>6}" + row(single) + row(against(mean, exact)) + f"{chance:>9.2g}", flush=True)


def heading(name: str) -> str:
    return f" | {name:>5}{'cosine':>9}{'norm':>8}{'off':>9}"


def row(values: Iterable[float]) -> str:
    cosine, norm, off = values
    return f" | {'':>5}{cosine:>9.4f}{norm:>8.3f}{off:>9.2g}"


def against(found: Tensor, exact: Tensor) -> tuple[float, float, float]:
    """Cosine, ratio of norms, and relative distance."""
    cosine = float(torch.nn.functional.cosine_similarity(found, exact, dim=0))
    return cosine, float(found.norm() / exact.norm()), float((found - exact).norm() / exact.norm())
