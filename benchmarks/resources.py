"""What a batch of cached logits, an epoch's end and a sweep's job cost.

python benchmarks/resources.py [--jobs 4]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from pairs import duration, header, say, seconds
from steps import cache, pictures, resnet

from kdlab.functional import Batch
from kdlab.models import save_weights
from kdlab.teachers import Arrays, CachedTeacher

ROOT = Path(__file__).parents[1]


def reading(folder: Path) -> None:
    """Batches of 128 rows out of 50,000 examples in 16 views, 100 classes."""
    data = pictures(1024, 128, 16)
    small = cache(resnet(8, data), data, folder)
    rows = {"train": (50_000, 16)}
    manifest = type(small.logits.manifest)("weights", "data", "crop, flip", 100, rows, "float16")
    (folder / "large").mkdir()
    np.lib.format.open_memmap(folder / "large" / "train.npy", "w+", "float16", (50_000, 16, 100)).flush()
    (folder / "large" / "manifest.json").write_text(json.dumps(manifest.plain()))
    make = torch.Generator().manual_seed(0)
    for name, on_device in (("in memory", 2**30), ("memory-mapped", 0)):
        teacher = CachedTeacher(Arrays(folder / "large", manifest, on_device))
        keys = [torch.stack([torch.randint(n, (128,), generator=make) for n in rows["train"]], 1) for _ in range(300)]
        batches = [Batch(torch.empty(128, 0), torch.zeros(128).long(), key) for key in keys]
        times = sorted(seconds(lambda b=b, t=teacher: t(b)) for b in batches)
        middle, slow = times[150], times[270]
        say(f"reading 128 cached rows, {name}", f"{duration(middle)} (90th percentile {duration(slow)}, n=300)")


def saving(folder: Path) -> None:
    for name, net in (("ResNet-20", resnet(20, pictures(256, 128, val=32))),):
        times = sorted(seconds(lambda n=net: save_weights(n, folder / "x.pt")) for _ in range(20))
        say(f"saving the weights of a {name}, synced", f"{duration(times[10])} (slowest {duration(times[-1])}, n=20)")


def sweeping(folder: Path, jobs: int) -> None:
    """A sweep of one-epoch MLP jobs: the wall time of one more job, less the seconds its training reports."""
    temperatures = ",".join(str(t + 1) for t in range(jobs))
    words = ["-m", "experiment=kd_mlp", "epochs=1", f"loss.temperature={temperatures}", f"output={folder / 'out'}"]
    start = time.perf_counter()
    found = subprocess.run(
        [sys.executable, "-m", "kdlab", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    whole = time.perf_counter() - start
    results = [json.loads(p.read_text()) for p in (folder / "out" / "kd_mlp").glob("**/result.json")]
    if found.returncode or len(results) != jobs:
        say("sweep", f"failed: {found.stderr.strip().splitlines()[-1:]}")
        return
    spent = [(r["seconds"]["total"], r["seconds"]["student"]) for r in results]
    spent.sort(key=lambda s: s[0])
    around = [total - student for total, student in spent][: jobs - 1]  # the slowest trained teacher and baseline too
    others = (whole - sum(total for total, _ in spent)) / jobs
    say("a job of a sweep, around its training", f"{duration(statistics.median(around))} (n={len(around)})")
    say("a sweep outside its jobs (import, compose, table), a job", f"{duration(others)} ({jobs} jobs, once)")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--jobs", type=int, default=4)
    jobs = options.parse_args().jobs
    header("resources: cache, checkpoints, sweeps")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        reading(folder)
        saving(folder)
        sweeping(folder, jobs)


if __name__ == "__main__":
    main()
