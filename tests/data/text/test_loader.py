"""Batches of sequences: what a row is, and that no split, packing or resume changes which rows a step has."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from kdlab.data.text import ANSWER, PROMPT, REASONING, TEXT, Question, RawText, Sequence, TextData, Tokenizer
from kdlab.data.text.loader import pack
from kdlab.data.text.token_store import flatten, windows
from kdlab.errors import UserError

torch.set_num_threads(1)

TOKENIZER = Tokenizer.bytes()


def asked(count, seed=0):
    """Questions of unequal lengths, with random weights."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        pieces = [
            (torch.randint(256, (int(torch.randint(1, most, (1,), generator=draw)),), generator=draw).tolist(), kind)
            for most, kind in ((6, PROMPT), (9, REASONING), (4, ANSWER))
        ]
        question = Question(torch.tensor(pieces[0][0]), str(number))
        found.append(Sequence.of(pieces, question=question, weight=1 + number % 3))
    return found


def running(length):
    ids = torch.arange(length, dtype=torch.int32) % 256
    return Sequence(ids, torch.full((length,), TEXT, dtype=torch.uint8), running=True)


def data_of(train, **options):
    splits = {"train": train, "val": asked(11, 1), "test": asked(5, 2)}
    options = {"context": 20, "batch_size": 8, "segment_weights": {"reasoning": 0.5}} | options
    return TextData(RawText("made", TOKENIZER, splits), **options)


def epoch_of(data, epoch=0):
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)


def rows_of(batch):
    """Every row as (what the network has read of its sequence, what follows, its weight, its segment)."""
    ids, positions = batch.inputs["input_ids"], batch.inputs["position_ids"]
    found = []
    numbers = zip(batch.targets.tolist(), batch.weight.tolist(), batch.segment.tolist(), strict=True)
    for (row, place), about in zip(batch.loss_mask.nonzero().tolist(), numbers, strict=True):
        start = place - int(positions[row, place])
        assert positions[row, start : place + 1].tolist() == list(range(place + 1 - start))
        found.append((tuple(ids[row, start : place + 1].tolist()), *about))
    return found


def expected_rows(sequences, weights=(0, 0.5, 1, 1)):
    found = []
    for one in sequences:
        ids, kinds = one.ids.tolist(), one.segments.tolist()
        for at in range(len(ids) - 1):
            weight = weights[kinds[at + 1]] * one.weight
            if weight > 0:
                found.append((tuple(ids[: at + 1]), ids[at + 1], weight, kinds[at + 1]))
    return found


# ---- what a row is


def test_rows_are_what_follows_in_order():
    sequences = asked(20)
    data = data_of(sequences)
    rows = [row for batch in data.ordered_loader("train", batch_size=3) for row in rows_of(batch)]
    assert rows == expected_rows(sequences)


def test_a_batch_by_hand():
    sequences = [
        Sequence.of([([5, 6], PROMPT), ([7], REASONING), ([8, 9], ANSWER)]),
        Sequence.of([([1], PROMPT), ([2], ANSWER)], weight=2.0),
    ]
    data = data_of(sequences, batch_size=2)
    batch = next(iter(data.ordered_loader("train")))
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 7, 8], [1, 256, 256, 256]]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 3]] * 2
    assert batch.loss_mask.tolist() == [[False, True, True, True], [True, False, False, False]]
    assert batch.targets.tolist() == [7, 8, 9, 2]
    assert batch.weight.tolist() == [0.5, 1, 1, 2]
    assert batch.segment.tolist() == [REASONING, ANSWER, ANSWER, ANSWER]
    assert batch.example_id.tolist() == [[0, 0], [1, 0]] and len(batch) == 4
    assert batch.prompts.tolist() == [2, 1] and batch.sequence_weight.tolist() == [1, 2]
    assert batch.inputs["input_ids"].dtype == batch.targets.dtype == batch.segment.dtype == torch.int64
    packed = next(iter(data_of(sequences, batch_size=2, pack=True).train_dataloader()))
    assert packed.inputs["input_ids"].tolist() == [[5, 6, 7, 8, 1]]
    assert packed.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 0]]
    assert packed.loss_mask.tolist() == [[False, True, True, True, True]]
    assert packed.targets.tolist() == [7, 8, 9, 2] and packed.example_id.tolist() == [[0, 0]]
    assert packed.prompts is None and packed.sequence_weight is None


def test_a_network_reads_the_rows():
    """The sum of a bigram network's losses over the rows is the sum over the sequences, whatever the batches are."""
    table = torch.randn(257, 257, dtype=torch.float64).log_softmax(-1)
    sequences = asked(30)
    expected = -sum(weight * table[read[-1], target] for read, target, weight, _ in expected_rows(sequences))
    for pack_ in (False, True):
        data, total = data_of(sequences, pack=pack_), 0.0
        for batch in epoch_of(data):
            logits = table[batch.inputs["input_ids"]][batch.loss_mask]
            total -= (batch.weight.double() * logits.gather(1, batch.targets[:, None])[:, 0]).sum()
        assert torch.isclose(total, expected)


def test_prompts_do_not_depend_on_what_counts():
    draw = [([1, 2, 3], PROMPT), ([4], ANSWER), ([5], PROMPT), ([6], ANSWER)]
    sequences = [Sequence.of(draw), Sequence.of(draw[:1]), Sequence.of([([7, 8], TEXT)]), running(9)]
    for weights in ({"prompt": 1.0}, {"prompt": 0.5, "answer": 0.0}):
        batch = next(iter(data_of(sequences, segment_weights=weights).ordered_loader("train")))
        # the last token of a sequence is not read
        assert batch.prompts.tolist() == [3, 2, 0, 0] and batch.sequence_weight.tolist() == [1, 1, 1, 1]
    moved = batch.to("cpu").part(slice(0, 2))
    assert moved.prompts.equal(batch.prompts) and moved.sequence_weight.equal(batch.sequence_weight)


# ---- windows of running text


@pytest.mark.parametrize("length", [0, 1, 2, 9, 10, 11, 12, 21, 100])
@pytest.mark.parametrize(("context", "stride"), [(10, 10), (10, 3), (10, 1), (1, 1)])
def test_windows_predict_every_token_once(length, context, stride):
    start, size, lead = windows(length, context, stride)
    predicted = []
    for first, count, skipped in zip(start.tolist(), size.tolist(), lead.tolist(), strict=True):
        assert 2 <= count <= context + 1 and first + count <= length
        predicted += range(first + 1 + skipped, first + count)
        if first:
            assert skipped == context - stride
    assert predicted == list(range(1, length))


def test_running_text_is_cut_and_read_with_overlap():
    data = TextData(RawText("made", TOKENIZER, {"train": [running(100)]}), context=10, batch_size=4)
    assert data.counts["train"] == 10
    rows = [row for batch in data.ordered_loader("train") for row in rows_of(batch)]
    assert [target for _, target, _, _ in rows] == list(range(1, 100))
    assert [read[0] for read, *_ in rows] == [10 * ((target - 1) // 10) for target in range(1, 100)]
    source = RawText("made", TOKENIZER, {"train": [running(50)], "test": [running(100)]})
    data = TextData(source, context=10, batch_size=4, eval_stride=4)
    rows = [row for batch in data.test_dataloader() for row in rows_of(batch)]
    assert [target for _, target, _, _ in rows] == list(range(1, 100))
    assert min(len(read) for read, target, _, _ in rows if target > 10) == 10 - 4 + 1
    assert sum(len(one.targets) for one in data.ordered_loader("train")) == 49


def test_sums_of_examples_are_sums_of_rows():
    sequences = [*asked(20), running(45)]
    flat, origin = flatten(sequences, 10, 4)
    weights = torch.tensor([0, 0.5, 1, 0.25])
    sums, counts = flat.sums(weights)
    table = weights.tolist()
    for number, one in enumerate(sequences):
        rows = expected_rows([one], table)
        assert sums[origin == number].sum() == pytest.approx(sum(weight for *_, weight, _ in rows))
        assert counts[origin == number].sum() == len(rows)


# ---- packing


def test_packing_is_first_fit_decreasing():
    row, offset = pack([4, 8, 1, 4, 2, 1], 10)
    assert row.tolist() == [1, 0, 1, 1, 0, 1] and offset.tolist() == [0, 0, 8, 4, 8, 9]
    draw = torch.randint(1, 20, (200,), generator=torch.Generator().manual_seed(0))
    row, offset = pack(draw.tolist(), 20)
    taken = torch.zeros(int(row.max()) + 1, 20, dtype=torch.long)
    for one, (r, o) in enumerate(zip(row.tolist(), offset.tolist(), strict=True)):
        taken[r, o : o + int(draw[one])] += 1
    assert taken.max() == 1 and taken.sum() == draw.sum()
    assert len(taken) <= 11 / 9 * -(-int(draw.sum()) // 20) + 1


@pytest.mark.parametrize("accumulate", [1, 2])
def test_packed_and_padded_rows_are_the_same(accumulate):
    sequences = asked(40)
    padded = epoch_of(data_of(sequences).to("cpu", accumulate), 1)
    packed = epoch_of(data_of(sequences, pack=True).to("cpu", accumulate), 1)
    assert len(padded) == len(packed) == 5 * accumulate
    for one, other in zip(padded, packed, strict=True):
        assert Counter(rows_of(one)) == Counter(rows_of(other))
        assert one.window == other.window
        assert other.inputs["input_ids"].shape[0] < one.inputs["input_ids"].shape[0]
        assert other.inputs["input_ids"].shape[1] <= 20
        starts = (other.inputs["position_ids"] == 0).sum()
        assert starts >= one.inputs["input_ids"].shape[0]
    assert all(len(batch.example_id) == len(batch.inputs["input_ids"]) for batch in packed)


def test_packed_rows_name_their_first_sequence():
    sequences = asked(12)
    for batch in epoch_of(data_of(sequences, pack=True)):
        for row, (example, _) in zip(batch.inputs["input_ids"], batch.example_id.tolist(), strict=True):
            ids = sequences[example].ids[:-1].tolist()
            assert row[: len(ids)].tolist() == ids


# ---- splits of a step


@pytest.mark.parametrize("pack_", [False, True])
@pytest.mark.parametrize(("accumulate", "world"), [(4, 1), (1, 4), (2, 2), (8, 1)])
def test_however_a_step_is_split_it_has_the_same_rows(accumulate, world, pack_):
    sequences = asked(40)
    whole = epoch_of(data_of(sequences), 2)
    ranks = []
    for rank in range(world):
        data = data_of(sequences, pack=pack_).to("cpu", accumulate, rank, world)
        ranks.append(epoch_of(data, 2))
        assert len(ranks[-1]) == len(data.train_dataloader()) == 5 * accumulate
    for step, batch in enumerate(whole):
        micros = range(step * accumulate, (step + 1) * accumulate)
        parts = [ranks[rank][micro] for micro in micros for rank in range(world)]
        assert sum((Counter(rows_of(part)) for part in parts), Counter()) == Counter(rows_of(batch))
        if not pack_:
            assert torch.cat([part.example_id for part in parts]).equal(batch.example_id)
            assert [row for part in parts for row in rows_of(part)] == rows_of(batch)
        total = float(batch.weight.sum())
        for part in parts:
            assert part.window[:3] == (pytest.approx(total), pytest.approx(total), accumulate * world)
            assert part.window.examples == sum(sequences[example].weight for example in batch.example_id[:, 0].tolist())
    assert whole[0].window.labelled != whole[1].window.labelled


def gradient(parts, first):
    """Of the weighted mean of a bigram network's losses, as the Objective takes it."""
    table = first.clone().requires_grad_()
    for batch in parts:
        logits = table[batch.inputs["input_ids"]][batch.loss_mask]
        losses = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none")
        (losses * batch.weight.double()).sum().div(batch.window.rows).backward()
    return table.grad


def test_gradients_are_equal_under_every_split():
    torch.manual_seed(0)
    first, sequences = torch.randn(257, 257, dtype=torch.float64), asked(16)
    expected = gradient(epoch_of(data_of(sequences))[:1], first)
    for pack_, accumulate, world in [(True, 1, 1), (False, 4, 1), (True, 4, 1), (False, 2, 2), (True, 1, 2)]:
        ranks = [data_of(sequences, pack=pack_).to("cpu", accumulate, rank, world) for rank in range(world)]
        parts = [batch for data in ranks for batch in epoch_of(data)[:accumulate]]
        assert torch.allclose(gradient(parts, first), expected, rtol=0, atol=1e-14)


def test_processes_share_evaluation():
    sequences = asked(6)
    whole = [row for batch in data_of(sequences).val_dataloader() for row in rows_of(batch)]
    shares = [data_of(sequences).to("cpu", 1, rank, 2).val_dataloader() for rank in range(2)]
    assert [len(loader) for loader in shares] == [2, 2]
    assert Counter(row for loader in shares for batch in loader for row in rows_of(batch)) == Counter(whole)


# ---- order and resume


def test_an_epoch_is_every_sequence_once_in_a_new_order():
    data = data_of(asked(37))
    keys = [torch.cat([batch.example_id[:, 0] for batch in epoch_of(data, epoch)]) for epoch in range(3)]
    assert all(key.sort().values.equal(torch.arange(37)) for key in keys)
    assert not keys[0].equal(keys[1]) and not keys[1].equal(keys[2])
    assert torch.cat([batch.example_id[:, 0] for batch in epoch_of(data, 1)]).equal(keys[1])
    assert not torch.cat([batch.example_id[:, 0] for batch in epoch_of(data_of(asked(37), seed=1), 1)]).equal(keys[1])


def test_a_resumed_epoch_goes_on_where_it_was():
    data = data_of(asked(40), pack=True).to("cpu", 2)
    whole = epoch_of(data, 3)
    loader = data.train_dataloader()
    assert loader is data.train_dataloader()
    loader.skip = 7
    late = iter(loader)
    loader.sampler.set_epoch(3)  # as Lightning does: after iter(), before the first batch
    rest = list(late)
    assert loader.skip == 0 and len(rest) == len(whole) - 7
    for one, other in zip(rest, whole[7:], strict=True):
        assert rows_of(one) == rows_of(other) and one.window == other.window
    assert data.to("cpu").train_dataloader() is not loader


def test_a_micro_batch_may_be_one_sequence_but_not_none():
    data = data_of(asked(40), batch_size=4).to("cpu", 4)
    assert all(len(batch.example_id) == 1 for batch in epoch_of(data))
    with pytest.raises(UserError, match=r"data\.batch_size: 4 of 40 rows in 5 parts .* accepted: at least 5 rows"):
        data_of(asked(40), batch_size=4).to("cpu", 5).train_dataloader()
    assert len(data_of(asked(41), batch_size=4).to("cpu", 2).train_dataloader()) == 20


# ---- encoders


def test_an_encoder_gets_ids_and_a_mask():
    start = [256]
    train = [
        Sequence.of([(start, PROMPT), ([1, 2], ANSWER)], source=torch.tensor([7, 8, 9])),
        Sequence.of([(start, PROMPT), ([3], ANSWER)], source=torch.tensor([5])),
    ]
    data = TextData(RawText("pairs", TOKENIZER, {"train": train, "test": train[::-1]}), context=8, batch_size=2)
    assert data.target == "text"
    batch = next(iter(data.ordered_loader("train")))
    assert set(batch.inputs) == {"input_ids", "attention_mask", "decoder_input_ids"}
    assert batch.inputs["input_ids"].tolist() == [[7, 8, 9], [5, 256, 256]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.inputs["decoder_input_ids"].tolist() == [[256, 1], [256, 256]]
    assert batch.loss_mask.tolist() == [[True, True], [True, False]] and batch.targets.tolist() == [1, 2, 3]
    with pytest.raises(UserError, match=r"data\.pack: true; pairs has encoder inputs"):
        TextData(RawText("pairs", TOKENIZER, {"train": train}), pack=True)


def test_features_are_padded_to_their_fixed_length():
    features = [torch.randn(3, 4), torch.randn(3, 2)]
    train = [Sequence.of([([256], PROMPT), ([1], ANSWER)], source=one) for one in features]
    source = RawText("speech", TOKENIZER, {"train": train}, source_length=6, source_fill=-1.0)
    batch = next(iter(TextData(source, batch_size=2).ordered_loader("train")))
    given = batch.inputs["input_features"]
    assert given.shape == (2, 3, 6)
    assert given[0, :, :4].equal(features[0]) and given[1, :, :2].equal(features[1])
    assert (given[0, :, 4:] == -1).all() and (given[1, :, 2:] == -1).all()
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]]
