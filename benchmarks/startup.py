"""How soon the command line answers where nothing is trained, and whether it imported torch.

python benchmarks/startup.py [--runs 5]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

from pairs import duration, header, say, seconds

ROOT = Path(__file__).parents[1]

COMMANDS = {
    "--help": ["--help"],
    "list": ["list"],
    "--cfg job": ["experiment=kd_resnet", "--cfg", "job"],
    "a misspelt option": ["experiment=kd_resnt"],
    "a misspelt key": ["experiment=kd_resnet", "los.temperature=2"],
    "a value of the wrong type": ["experiment=kd_resnet", "optimizer.lr=fast"],
}


def ask(words: list[str], *flags: str) -> subprocess.CompletedProcess:
    """Run the command line from the repository's root."""
    where = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *flags, "-m", "kdlab", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=where, check=False)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--runs", type=int, default=5)
    runs = options.parse_args().runs
    header("startup: what answers without training")
    for name, words in COMMANDS.items():
        imported = ask(words, "-X", "importtime").stderr
        torch = "imports torch" if " torch\n" in imported or "| torch" in imported else "no torch"
        times = sorted(seconds(lambda words=words: ask(words)) for _ in range(runs))
        said = f"{duration(statistics.median(times))} (from {times[0]:.2f} to {times[-1]:.2f} s, n={runs}), {torch}"
        say(name, said, "<= 0.5 s, no torch")


if __name__ == "__main__":
    main()
