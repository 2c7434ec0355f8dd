"""Students cut from teachers: which blocks, and that everything else comes along."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kdlab.errors import UserError
from kdlab.models import MLP, CausalLM, blocks, cut, weights_hash
from kdlab.models.transforms.layer_subset import spaced

IDS = torch.randint(0, 40, (2, 7), generator=torch.Generator().manual_seed(1))


def lm(depth: int, form: str = "gpt2", width: int = 16, context: int = 16, vocab_size: int = 40) -> CausalLM:
    torch.manual_seed(depth)
    settings = {"num_hidden_layers": depth, "hidden_size": width, "num_attention_heads": 2}
    settings |= {"intermediate_size": 32} if form == "llama" else {}
    return CausalLM(form, settings, vocab_size=vocab_size, context=context, eos_id=1).eval()


def t5(decoder: int, encoder: int) -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(decoder)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "vocab_size": 40, "decoder_start_token_id": 0}
    config = T5Config(num_layers=encoder, num_decoder_layers=decoder, **sizes)
    return nn.ModuleDict({"net": T5ForConditionalGeneration(config).eval()})


@pytest.mark.parametrize(
    ("count", "total", "expected"),
    [
        (6, 12, [0, 2, 4, 7, 9, 11]),  # DistilGPT-2 and DistilBERT
        (3, 6, [0, 3, 5]),
        (2, 4, [0, 3]),
        (1, 12, [0]),
        (4, 4, [0, 1, 2, 3]),
    ],
)
def test_blocks_are_evenly_spaced(count, total, expected):
    assert spaced(count, total) == expected


@pytest.mark.parametrize("form", ["gpt2", "llama"])
def test_a_cut_student_is_its_teacher_without_the_other_blocks(form):
    teacher, student = lm(6, form), lm(3, form)
    untouched = weights_hash(teacher)
    ((path, picked),) = cut(student, teacher).items()
    assert picked == [0, 3, 5] and path in blocks(student)
    assert weights_hash(teacher) == untouched
    found = student(IDS).dense()
    stack = teacher.get_submodule(path)
    kept = nn.ModuleList([stack[i] for i in picked])
    teacher.set_submodule(path, kept)
    teacher.net.config.num_hidden_layers = 3
    torch.testing.assert_close(found, teacher(IDS).dense(), rtol=0, atol=0)
    with torch.no_grad():
        next(student.parameters()).add_(1)
    assert not torch.equal(next(student.parameters()), next(teacher.parameters()))  # nothing is shared


def test_blocks_can_be_named():
    teacher, student = lm(4), lm(2)
    assert cut(student, teacher, [3, 1]) == {"net.transformer.h": [3, 1]}
    mine, theirs = student.net.transformer.h, teacher.net.transformer.h
    assert torch.equal(mine[0].attn.c_attn.weight, theirs[3].attn.c_attn.weight)
    assert torch.equal(mine[1].mlp.c_fc.bias, theirs[1].mlp.c_fc.bias)
    assert cut(student, teacher, {"net.transformer.h": [0, 2]}) == {"net.transformer.h": [0, 2]}
    assert torch.equal(mine[1].ln_1.weight, theirs[2].ln_1.weight)


def test_a_shorter_context_takes_the_first_positions():
    teacher, student = lm(4, context=16), lm(2, context=8)
    cut(student, teacher)
    torch.testing.assert_close(student.net.transformer.wpe.weight, teacher.net.transformer.wpe.weight[:8])
    with pytest.raises(UserError, match=r"wpe.weight is \(16, 16\) in the student and \(8, 16\)"):
        cut(lm(2, context=16), lm(4, context=8))


def test_both_stacks_of_an_encoder_decoder():
    teacher, student = t5(4, 6), t5(2, 3)
    assert cut(student, teacher) == {"net.encoder.block": [0, 3, 5], "net.decoder.block": [0, 3]}
    mine, theirs = student["net"], teacher["net"]
    assert torch.equal(mine.decoder.block[1].layer[2].DenseReluDense.wo.weight,
                       theirs.decoder.block[3].layer[2].DenseReluDense.wo.weight)  # fmt: skip
    # relative positions are the first block's, whichever block it is made of
    cut(student, teacher, {"net.encoder.block": [1, 2, 3]})
    assert torch.equal(mine.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight,
                       theirs.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight)  # fmt: skip
    assert torch.equal(mine.encoder.block[0].layer[0].SelfAttention.q.weight,
                       theirs.encoder.block[1].layer[0].SelfAttention.q.weight)  # fmt: skip


def test_any_list_of_blocks():
    def stack(depth: int) -> nn.Module:
        return nn.ModuleDict({"stem": nn.Linear(3, 4), "body": nn.ModuleList(nn.Linear(4, 4) for _ in range(depth))})

    teacher, student = stack(5), stack(3)
    assert cut(student, teacher) == {"body": [0, 2, 4]}
    assert torch.equal(student["stem"].weight, teacher["stem"].weight)
    assert torch.equal(student["body"][2].bias, teacher["body"][4].bias)


@pytest.mark.parametrize(
    ("student", "teacher", "layers", "message"),
    [
        (lambda: lm(2, width=8), lambda: lm(4), None, r"cut: net.transformer.wte.weight is \(40, 8\) in the student"),
        (lambda: lm(2, vocab_size=30), lambda: lm(4), None, r"\(30, 16\) in the student and \(40, 16\) in the teacher"),
        (
            lambda: lm(4),
            lambda: lm(2),
            None,
            "student has 4 blocks, the teacher 2; accepted: at most 2",
        ),
        (lambda: lm(2), lambda: lm(4, "llama"), None, "the teacher has no net.transformer.h"),
        (lambda: lm(2), lambda: lm(4), [0, 4], "2 numbers from 0 to 3"),
        (lambda: lm(2), lambda: lm(4), [0], "2 numbers from 0 to 3"),
        (lambda: lm(2), lambda: lm(4), {"h": [0, 1]}, "unknown stack of blocks 'h'"),
        (lambda: MLP(in_features=4), lambda: MLP(in_features=4), None, "MLP has no list of blocks"),
    ],
)
def test_mistakes_are_one_line(student, teacher, layers, message):
    student = student()
    before = weights_hash(student)
    with pytest.raises(UserError, match=message):
        cut(student, teacher(), layers)
    assert weights_hash(student) == before
