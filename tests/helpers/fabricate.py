"""Run folders made up for tests: the files that a run leaves behind, with plausible numbers, untrained."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any


def model(parameters: int, val: float, test: float, agreement: float | None = None, **more: Any) -> dict[str, Any]:
    """The measurements of one model, as ``result.json`` has them."""
    other = {} if agreement is None else {"agreement": agreement, "kl": 1.2 * (1 - agreement)}
    return {
        "parameters": parameters,
        "bytes": 4 * parameters + 2_048,
        "flops": 250 * parameters,
        "latency_ms": 0.2 + parameters / 3e5,
        "seconds": 10 + parameters / 4e4,
        "val": {"acc": val, "ce": 2.2 * (1 - val), **other},
        "test": {"acc": test, "ce": 2.3 * (1 - test), "acc5": 1 - (1 - test) / 9, "ece": 0.01, **other},
        **more,
    }


def result(temperature: Any = 4.0, alpha: float = 0.9, seed: int = 0, **more: Any) -> dict[str, Any]:
    """A finished run whose accuracy peaks at T = 4 and alpha = 0.9. Keyword arguments replace whole keys."""
    noise = random.Random(f"{temperature} {alpha} {seed}")
    heat = float(temperature) if isinstance(temperature, (int, float)) else 3.0
    quality = 0.984 - 0.004 * abs(math.log2(heat / 4)) - 0.014 * abs(alpha - 0.9)
    val, test = (quality + noise.gauss(0, 0.002) for _ in range(2))
    overrides = [f"loss.temperature={temperature}", f"loss.alpha={alpha}", f"seed={seed}"]
    return {
        "format": 1,
        "status": "finished",
        "error": None,
        "name": "kd_resnet",
        "method": "OfflineKD",
        "config_hash": f"{noise.getrandbits(40):010x}",
        "seed": seed,
        "overrides": overrides,
        "settings": {
            "data": "digits",
            "teacher": "resnet20",
            "student": "resnet8_w4",
            "loss": ["kl"],
            "loss.temperature": temperature,
            "loss.alpha": alpha,
            "epochs": 30,
            "optimizer.lr": 0.1,
            "seed": seed,
        },
        "models": {
            "student": model(5_082, val, test, agreement=test - 0.004),
            "teacher": model(272_474, 0.990, 0.9889, seconds=31.0),
            "baseline": model(5_082, 0.976 + 0.001 * seed, 0.9744 + 0.002 * seed, agreement=0.972),
        },
        "best_epoch": 27,
        "epochs": 30,
        "steps": 300,
        "seconds": {"total": 24.5, "teacher": 0.0, "cache": 0.4, "student": 10.1, "baseline": 0.0},
        "teacher_trained_on": "1200 labelled rows of digits",
        "hardware": {"device": "cpu", "threads": 2, "precision": "32-true", "name": "a processor"},
        "versions": {"python": "3.11.9", "torch": "2.13.0", "lightning": "2.6.6", "kdlab": "0.1.0"},
        "commit": "0123abc",
        "started": f"2025-01-01T10:00:{seed:02d}",
        "finished": f"2025-01-01T10:01:{seed:02d}",
        **more,
    }


def curves(temperature: Any = 4.0, alpha: float = 0.9, seed: int = 0, steps: int = 300) -> list[dict[str, float]]:
    """The lines of ``curves.jsonl``: training terms every 10 steps, validation every 30."""
    noise = random.Random(f"{temperature} {alpha} {seed} curves")
    heat = float(temperature) if isinstance(temperature, (int, float)) else 3.0
    lines = []
    for step in range(10, steps + 1, 10):
        decay = math.exp(-step / (60 + 8 * heat))
        ce = 0.04 + (1 - alpha) * 0.02 + 2.3 * decay * math.exp(noise.gauss(0, 0.12))
        kl = (0.02 + 0.01 * heat + 2.0 * decay) * heat**0.5 * math.exp(noise.gauss(0, 0.12))
        line = {
            "step": step,
            "epoch": step / 10,
            "train/ce": ce,
            "train/kl": kl,
            "train/loss": (1 - alpha) * ce + alpha * kl,
            "train/lr": 0.1 * (1 - step / steps),
            "train/temperature": heat,
            "train/alpha": alpha,
        }
        if step % 30 == 0:
            line |= {"val/ce": 1.3 * ce, "val/kl": 0.05 + 1.9 * decay}
            line |= {"val/acc": 0.98 - decay, "val/agreement": 0.97 - decay}
        lines.append(line)
    return lines


def write(folder: Path, content: dict[str, Any], lines: list[dict[str, float]] | None = None) -> Path:
    """A run folder with these contents; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = content.get("settings")
    settings = settings if isinstance(settings, dict) else {}
    config = "\n".join(f"{key}: {json.dumps(value)}" for key, value in settings.items())
    (folder / "config.yaml").write_text(config + "\n", encoding="utf-8")
    (folder / "overrides.yaml").write_text(json.dumps(content.get("overrides", [])) + "\n", encoding="utf-8")
    (folder / "result.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    if lines is not None:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "curves.jsonl").write_text(text, encoding="utf-8")
    return folder


def sweep(
    folder: Path,
    temperatures: tuple[Any, ...] = (1, 2, 4, 8),
    alphas: tuple[float, ...] = (0.1, 0.5, 0.9),
    seeds: int = 1,
) -> Path:
    """A finished sweep over temperature, alpha and seeds; returns its folder."""
    jobs = []
    for temperature in temperatures:
        for alpha in alphas:
            for seed in range(seeds):
                content = result(temperature, alpha, seed)
                name = f"{','.join(content['overrides'])}-{content['config_hash'][:6]}"
                job = write(folder / name.replace(" ", ""), content, curves(temperature, alpha, seed))
                jobs.append(job.name)
    (folder / "sweep.yaml").write_text(json.dumps({"overrides": ["..."], "jobs": jobs}), encoding="utf-8")
    return folder


def failed(folder: Path, error: str = "loss is not finite at step 40: term kl", **settings: Any) -> Path:
    """A run that failed; returns its folder."""
    content = result(settings.get("temperature", 8), settings.get("alpha", 0.5))
    return write(folder, content | {"status": "failed", "error": error, "models": {}})


# ---- language models: judged by perplexity, where less is better


def language_model(
    parameters: int, ppl: float, em: float | None = None, told: bool = True, **more: Any
) -> dict[str, Any]:
    """The measurements of a language model; ``em`` is exact match at two steps, and falls with every further one."""
    ce = math.log(ppl)
    measures = {"ce": ce, "ppl": ppl, "acc": 0.7 - 0.1 * ce}
    if told:
        measures |= {"kl": 0.05 * ce, "agreement": 0.9 - 0.1 * ce}
    if em is not None:
        by_steps = {
            f"em/{steps}": max(0.0, em - (0.02 + 0.1 * (1 - em)) * (steps - 2) ** 1.3) for steps in (2, 3, 4, 6, 10)
        }
        measures |= {"em": sum(by_steps.values()) / len(by_steps), **by_steps}
    test = {key: value * (1.02 if key in ("ppl", "ce") else 1.0) for key, value in measures.items()}
    return {
        "parameters": parameters,
        "bytes": 4 * parameters + 2_048,
        "flops": 2 * parameters,
        "latency_ms": 0.2 + parameters / 3e5,
        "tokens_per_s": 4e9 / parameters,
        "seconds": 10 + parameters / 4e4,
        "val": measures,
        "test": test,
        **more,
    }


def language_result(
    loss: str = "kl", temperature: Any = 1.0, alpha: float = 0.9, seed: int = 0, **more: Any
) -> dict[str, Any]:
    """A finished run of a language model whose perplexity is least at T = 2 and alpha = 0.9."""
    noise = random.Random(f"{loss} {temperature} {alpha} {seed}")
    worse = 0.12 * abs(math.log2(temperature / 2)) + 0.3 * abs(alpha - 0.9) + 0.1 * (loss != "kl")
    ppl = 4.9 + worse + noise.gauss(0, 0.02)
    content = result(temperature, alpha, seed)
    return content | {
        "name": "lm_shakespeare",
        "score": {"name": "ppl", "greater": False},
        "objective": ppl,
        "settings": content["settings"]
        | {"data": "shakespeare", "teacher": "gpt_small", "student": "gpt_tiny", "loss": [loss]},
        "models": {
            "student": language_model(810_000, ppl, 0.86 - worse / 4),
            "teacher": language_model(3_240_000, 4.3, 0.97, told=False),
            "baseline": language_model(810_000, 5.4 + 0.03 * seed, 0.66),
        },
        "teacher_trained_on": "1,003,854 characters of shakespeare",
        **more,
    }


def language_curves(temperature: float = 1.0, alpha: float = 0.9, seed: int = 0) -> list[dict[str, float]]:
    """The lines of ``curves.jsonl`` of a language model, with perplexity and the length of its own text."""
    lines = curves(temperature, alpha, seed)
    for line in lines:
        line |= {"train/own_length": 40 + line["step"] / 20, "train/own_ended": line["step"] / 400}
        if "val/ce" in line:
            line |= {"val/ppl": math.exp(1.5 + line["val/ce"])}
    return lines


def language_sweep(
    folder: Path,
    losses: tuple[str, ...] = ("kl", "reverse_kl"),
    temperatures: tuple[float, ...] = (1.0,),
    alphas: tuple[float, ...] = (0.9,),
    seeds: int = 1,
    outside: bool = False,
) -> Path:
    """Finished runs of language models; ``ood``: measured outside of their domain too. Returns the folder."""
    for loss in losses:
        for temperature in temperatures:
            for alpha in alphas:
                for seed in range(seeds):
                    content = language_result(loss, temperature, alpha, seed)
                    if outside:
                        for role, ppl in (("student", 11.0 + 0.1 * seed), ("teacher", 7.0), ("baseline", 10.2)):
                            content["models"][role]["ood"] = {"ppl": ppl, "ce": math.log(ppl)}
                    name = f"{loss}-{temperature}-{alpha}-{seed}"
                    write(folder / name, content, language_curves(temperature, alpha, seed))
    return folder
