"""This machine and its packages: versions, devices, and what does not fit together."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from kdlab.cli.main import Parser
from kdlab.plain_text import one_line
from kdlab.system.terminal import say

NEEDED = (
    "torch", "lightning", "torchmetrics", "hydra-core", "omegaconf", "tensorboard", "numpy", "PyYAML",
    "safetensors", "matplotlib", "pillow", "filelock", "tqdm",
)  # fmt: skip
OPTIONAL = {
    "optuna": "searches",
    "hydra-joblib-launcher": "parallel sweeps",
    "wandb": "logger",
    "mlflow": "logger",
}
BESIDE_TORCH = ("torchvision", "timm", "torchaudio")
"""Packages that kdlab does not use, but others import; built against one torch, they break beside another."""

FEATURES = {
    "amx_bf16": "AMX-BF16",
    "amx_int8": "AMX-INT8",
    "avx512_bf16": "AVX512-BF16",
    "avx512f": "AVX512",
    "avx2": "AVX2",
}

_ASK_TORCH = """
import json, torch
cuda = torch.cuda.is_available()
print(json.dumps({
    "threads": torch.get_num_threads(), "built_for": torch.version.cuda or torch.version.hip,
    "mps": torch.backends.mps.is_available(),
    "gpus": [f"{p.name}, {p.total_memory / 2**30:.0f} GiB" for p in map(torch.cuda.get_device_properties,
             range(torch.cuda.device_count()))] if cuda else [],
}))
"""


@dataclass(frozen=True)
class Line:
    """Finding about one thing; ``ok`` is None for a plain fact."""

    text: str
    ok: bool | None = None


def main(argv: Sequence[str]) -> int:
    """Run ``kdlab doctor``; returns the exit status, 1 if something is broken."""
    Parser(prog="kdlab doctor", description=__doc__).parse_args(argv)
    broken = 0
    for line in (*machine(), *packages(), *torch_and_friends()):
        broken += line.ok is False
        say(f"{ {None: '', True: 'ok', False: 'FAIL'}[line.ok]:<6}{one_line(line.text)}")
    say(f"{broken} broken" if broken else "all well")
    return 1 if broken else 0


def machine() -> Iterator[Line]:
    """Look at Python, processor, memory and disk."""
    yield Line(
        f"python {platform.python_version()} ({sys.executable}) on {platform.platform()}",
        sys.version_info >= (3, 11),
    )
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    features = cpu_features()
    yield Line(f"cpu: {usable} usable cores of {os.cpu_count()}; {', '.join(features) or 'no known vector features'}")
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        yield Line(f"memory: {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB")
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    yield Line(f"disk: {free:.1f} GiB free in {Path.cwd()}", free > 1)


def cpu_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """Return the CPU features that decide whether bf16 is worth it there."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    flags = next((line.split(":", 1)[1].split() for line in text.splitlines() if line.startswith("flags")), [])
    return [name for flag, name in FEATURES.items() if flag in flags]


def packages() -> Iterator[Line]:
    """Look at the versions of what kdlab needs, and of what it can use."""
    for name in NEEDED:
        version = _version(name)
        yield Line(f"{name} {version}" if version else f"{name} is missing: pip install {name}", version is not None)
    for name, use in OPTIONAL.items():
        version = _version(name)
        yield Line(f"{name} {version}" if version else f"{name} is not installed ({use}; optional)")


def torch_and_friends() -> Iterator[Line]:
    """Check that torch imports, what it runs on, and that packages built against it fit."""
    if find_spec("torch") is None:
        return
    error, output = _try(_ASK_TORCH)
    if error:
        yield Line(f"import torch fails: {error}", False)
        return
    facts = json.loads(output.splitlines()[-1])
    devices = facts["gpus"] or (["Apple GPU (mps)"] if facts["mps"] else ["cpu only"])
    yield Line(f"devices: {'; '.join(devices)}; torch uses {facts['threads']} threads", True)
    if facts["built_for"] and not facts["gpus"]:
        yield Line(f"torch is built for CUDA/ROCm {facts['built_for']}, and no such device is usable here")
    for name in BESIDE_TORCH:
        if find_spec(name) is None:
            continue
        error, _ = _try(f"import {name}")
        yield (Line(f"{name} {_version(name)}: fits torch", True) if not error else Line(misfit(name, error), False))


def misfit(name: str, error: str) -> str:
    """Return what is wrong with a package built against another torch, and what to do."""
    return (
        f"{name} {_version(name)} does not fit torch {_version('torch')} ({error}): kdlab does not need it, "
        f"so pip uninstall {name}; or install the build for this torch, from the index torch came from"
    )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _try(code: str) -> tuple[str, str]:
    """Run code in another process, since a misfit may crash it; returns its last error line, and what it printed."""
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return "no answer within 120 s", ""
    if done.returncode == 0:
        return "", done.stdout
    lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
    return (lines[-1].strip()[:200] if lines else f"exit status {done.returncode}"), ""
