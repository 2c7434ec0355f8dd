"""Text small enough for a test, in the publishers' layouts, and a GPT-2 as a hub would hold it."""

from __future__ import annotations

import hashlib
import json
import wave
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdlab.data.download import Remote
from kdlab.data.text.datasets import corpora
from kdlab.data.text.tokenizer import Tokenizer

WORDS = ("the", "king", "and", "queen", "of", "all", "our", "noble", "lands", "have", "come", "to", "speak", "thee")


def prose(length: int, seed: int = 0) -> str:
    """Characters of sentences drawn from a few words, so that a tiny network learns something at once."""
    draw = np.random.default_rng(seed)
    lines = []
    while sum(map(len, lines)) < length:
        lines.append(" ".join(draw.choice(WORDS, 6)) + ".\n")
    return "".join(lines)[:length]


def write_shakespeare(folder: Path, monkeypatch, length: int = 6000) -> Path:
    """A stand-in for tiny shakespeare that passes for the publisher's file; returns the root."""
    text = prose(length)
    (folder / "input.txt").write_text(text)
    checksum = f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
    monkeypatch.setattr(corpora, "SHAKESPEARE", Remote("https://example.org", checksum))
    return folder


def write_wikitext(folder: Path, name: str = "wikitext-2", length: int = 3000) -> Path:
    """The publisher's three files; returns the root."""
    (folder / name).mkdir(parents=True)
    for seed, (part, size) in enumerate({"train": length, "valid": length // 2, "test": length // 4}.items(), 10):
        (folder / name / f"wiki.{part}.tokens").write_text(f" = Lands = \n {prose(size, seed)} \n")
    return folder


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """A file of JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_reasoning(folder: Path, train: int = 24, test: int = 4) -> Path:
    """SVAMP and CQA with a teacher's reasoning; returns the root."""

    def svamp(i: int) -> dict[str, Any]:
        right = {"answer": f"( {i}.0 + 2.0 )", "teacher_answer": f"({i} + 2)"}
        asked = {"question": f"Ann has {i} and gets 2. How many?", "teacher_reasoning": f"She has {i} + 2 = {i + 2}."}
        return asked | right

    def cqa(i: int) -> dict[str, Any]:
        right = {"choices": ["bank", "river", "bed"], "answer": "bank", "teacher_answer": "bank"}
        return {"question": f"Where is money {i}?", "teacher_reasoning": "Of these, only bank holds money."} | right

    for name, row in (("svamp", svamp), ("cqa", cqa)):
        write_rows(folder / f"{name}_train.jsonl", map(row, range(train)))
        write_rows(folder / f"{name}_test.jsonl", map(row, range(100, 100 + test)))
    return folder


def write_pairs(path: Path, count: int = 30) -> Path:
    """Words to be written backwards."""
    words = [prose(12, seed).split()[0] for seed in range(count)]
    return write_rows(path, ({"source": f"{word} {i}", "target": word[::-1]} for i, word in enumerate(words)))


def write_speech(folder: Path, takes: int = 7) -> Path:
    """Tones for spoken digits of two speakers, in the publisher's files; returns the root."""
    folder.mkdir(parents=True, exist_ok=True)
    for digit in range(10):
        for speaker in (0, 1):
            for take in range(takes):
                seconds = np.arange(1600 + 80 * take) / 8000
                tone = 8000 * np.sin(2 * np.pi * (200 + 150 * digit + 40 * speaker) * seconds)
                with wave.open(str(folder / f"{digit}_{'ab'[speaker]}_{take}.wav"), "wb") as file:
                    file.setnchannels(1)
                    file.setsampwidth(2)
                    file.setframerate(8000)
                    file.writeframes(tone.astype("<i2").tobytes())
    return folder


def write_gpt2(folder: Path, layers: int = 4, extra: int = 0, context: int = 32) -> Path:
    """A GPT-2 with random weights and its tokenizer, as transformers saves them.

    Args:
        folder: where to.
        layers: its blocks.
        extra: outputs beyond the tokenizer's ids, as in a padded vocabulary.
        context: its positions.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = Tokenizer.bpe([prose(2000)], 300)
    sizes = {"n_layer": layers, "n_head": 2, "n_embd": 16, "n_positions": context}
    torch.manual_seed(0)
    end = dict.fromkeys(("eos_token_id", "bos_token_id"), tokenizer.eos_id)
    net = GPT2LMHeadModel(GPT2Config(**sizes, vocab_size=tokenizer.size + extra, initializer_range=0.2, **end))
    net.save_pretrained(folder)
    tokenizer.save(folder)
    return folder
