"""Sequences in every layout: batches of them padded or packed, and a tiny GPT-2 that reads them."""

from __future__ import annotations

import torch
from torch import nn

from kdlab.functional import Projected, SequenceBatch

VOCAB, WIDTH = 23, 8


def sentence(length, seed, prompt=0):
    """Token ids (length,), and the weight of each as a target: 0 in the prompt, and uneven behind it."""
    draw = torch.Generator().manual_seed(1000 + seed)
    ids = torch.randint(0, VOCAB, (length,), generator=draw)
    weight = 0.25 + torch.rand(length, generator=draw, dtype=torch.float64)
    weight[:prompt] = 0
    return ids, weight


def sentences(lengths=(9, 4, 12, 6, 3, 10, 7, 5), prompts=(3, 0, 5, 2, 1, 0, 4, 2), seed=0):
    return [sentence(n, seed + i, p) for i, (n, p) in enumerate(zip(lengths, prompts, strict=True))]


def lines_of(lines, width=None, pad=0, positions=True):
    """A batch with each list of sentences in one line, one behind the other, and padding on the right."""
    width = width or max(sum(len(ids) - 1 for ids, _ in line) for line in lines)
    ids = torch.full((len(lines), width), pad)
    place = torch.zeros(len(lines), width, dtype=torch.int64)
    weight, target = torch.zeros(len(lines), width, dtype=torch.float64), torch.zeros(len(lines), width).long()
    for n, line in enumerate(lines):
        at = 0
        for own, worth in line:
            span = slice(at, at + len(own) - 1)
            ids[n, span], target[n, span], weight[n, span] = own[:-1], own[1:], worth[1:]
            place[n, span] = torch.arange(len(own) - 1)
            at += len(own) - 1
        place[n, at:] = torch.arange(width - at) + (int(place[n, at - 1]) + 1 if at else 0)
    where = weight > 0
    inputs = {"input_ids": ids, "position_ids": place} if positions else {"input_ids": ids}
    return SequenceBatch(inputs, target[where], weight=weight[where], loss_mask=where)


def padded(chosen, **more):
    return lines_of([[each] for each in chosen], **more)


def tiny_gpt2(seed=0, width=WIDTH, vocab=VOCAB):
    """A GPT-2 in float64; answers with all positions' projected logits."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    sizes = {"n_embd": width, "n_layer": 1, "n_head": 2, "n_positions": 64, "vocab_size": vocab}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    net = GPT2LMHeadModel(GPT2Config(**sizes, **dropout, initializer_range=0.4, use_cache=False))
    return Headless(net.double().eval())


class Headless(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, **inputs):
        hidden = self.net.transformer(**inputs).last_hidden_state
        return Projected(hidden, self.net.lm_head.weight)
