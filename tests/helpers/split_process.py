"""One of two processes that share a step; apart from the tests, whose imports would take seconds in each process."""

from __future__ import annotations

import os
import sys
from dataclasses import replace

import torch
import torch.distributed
from torch import nn

from helpers.text_cases import VOCAB, padded, sentences
from kdlab.functional import Outputs, StepTotals
from kdlab.losses import KL, CrossEntropy, Objective, ReverseKL

ALL = sentences()


def objective(chunk_rows=5):
    terms = {"ce": CrossEntropy(weight=0.5), "kl": KL(), "reverse": ReverseKL(weight=0.7, temperature=2.0)}
    return Objective(terms, temperature=1.0, alpha=0.6, chunk_rows=chunk_rows)


def window(chosen, parts):
    """What a whole step counts."""
    total = float(sum(weight[1:].sum() for _, weight in chosen))
    return StepTotals(total, total, parts)


def bag_of_words(seed):
    """A network without transformers, which take seconds to import in every process."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Embedding(VOCAB, 6), nn.Tanh(), nn.Linear(6, VOCAB, bias=False)).double()


def step(net, batches, whole):
    """Accumulate, and leave what the trainer's backward passes leave."""
    teacher, compare = bag_of_words(5), objective()
    for batch in batches:
        ids = batch.inputs["input_ids"]
        ours = net(ids)[batch.loss_mask]
        with torch.no_grad():
            theirs = teacher(ids)[batch.loss_mask]
        batch = replace(batch, window=whole)
        (compare(Outputs(ours), Outputs(theirs), batch).total / len(batches)).backward()


def worker(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    net = nn.parallel.DistributedDataParallel(bag_of_words(0))
    mine = ALL[:3] if rank == 0 else ALL[3:]
    step(net, [padded(mine)], window(ALL, 2))
    torch.save([p.grad for p in net.parameters()], f"{folder}/{rank}.pt")
    torch.distributed.barrier()  # who leaves first takes the connection along
    del net  # it holds on to the group
    torch.distributed.destroy_process_group()
    os._exit(0)  # all is saved; torch's threads and the interpreter's end race each other, and now and then abort


if __name__ == "__main__":
    worker(int(sys.argv[1]), sys.argv[2])
