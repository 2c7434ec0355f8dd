"""Schedules, taps, seeds, and the batch and outputs types."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kdlab.errors import UserError
from kdlab.functional import (
    Batch,
    Outputs,
    Schedule,
    StepTotals,
    Taps,
    as_probabilities,
    hash_seed,
    schedule,
    seed_torch,
)

quick = settings(max_examples=100, deadline=None, derandomize=True)

# ---- schedules -------------------------------------------------------------------------------------------------------


def test_schedule_shapes():
    at = (0.0, 0.25, 0.5, 0.75, 1.0)
    assert [Schedule(8, 1)(p) for p in at] == [8.0, 6.25, 4.5, 2.75, 1.0]
    cosine = [8 + (1 - 8) * (1 - math.cos(math.pi * p)) / 2 for p in at]
    assert [Schedule(8, 1, "cosine")(p) for p in at] == pytest.approx(cosine)
    assert [Schedule(8, 1, "step", at=0.5)(p) for p in at] == [8, 8, 1, 1, 1]
    assert [Schedule(0, 1, begin=0.25, until=0.75)(p) for p in at] == [0, 0, 0.5, 1, 1]
    assert [schedule(3, "k")(p) for p in at] == [3.0] * 5
    assert schedule({"start": 8, "end": 1, "shape": "cosine"}, "k") == Schedule(8, 1, "cosine")
    assert Schedule(8, 1).range == (1, 8)


@quick
@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6), st.floats(-1, 2), st.sampled_from(["linear", "cosine", "step"]))
def test_a_schedule_stays_between_its_ends_and_arrives(start, end, progress, shape):
    course = Schedule(start, end, shape)
    assert min(start, end) <= course(progress) <= max(start, end)
    assert course(0.0) == start and course(1.0) == pytest.approx(end, rel=1e-9, abs=1e-9)
    assert schedule(start, "k")(progress) == start


def test_a_schedule_never_rounds_past_its_end():
    assert Schedule(1.0, 1e-45)(1.0) == 1e-45  # 1 + (1e-45 - 1) is 0, and no temperature


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (math.inf, "inf"),
        (-math.inf, "-inf"),
        (math.nan, "nan"),
        (True, "True"),
        ("4", "'4'"),
        (None, "None"),
        ([1], "[1]"),
        ({"start": 1}, "needs start and end"),
        ({"start": None, "end": 1}, "key.start: None"),
        ({"start": 1, "end": math.inf}, "key.end: inf"),
        ({"start": 1, "end": True}, "key.end: True"),
        ({"start": 1, "end": 2, "shape": "linaer"}, "nearest: linear"),
        ({"start": 1, "end": 2, "begn": 0}, "nearest: begin"),
        ({"start": 1, "end": 2, "begin": 0.6, "until": 0.4}, "0 <= begin < until <= 1"),
        ({"start": 1, "end": 2, "at": 2}, "at: 2"),
        ({"start": 1, "end": 30}, "30; accepted: between 0 and 20"),
        (-1, "-1; accepted: between 0 and 20"),
    ],
)
def test_schedule_errors_are_one_line_with_key_and_value(value, says):
    with pytest.raises(UserError) as caught:
        schedule(value, "key", 0, 20)
    message = str(caught.value)
    assert message.startswith("key") and says in message and "\n" not in message


# ---- taps ------------------------------------------------------------------------------------------------------------


class Pair(nn.Module):
    """A layer that answers with a tuple, as recurrent layers do."""

    def forward(self, x):
        return x + 1, None


def net():
    return nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.ReLU(), nn.Linear(3, 4)), Pair())


def hooks(model):
    return sum(len(m._forward_hooks) for m in model.modules())


def test_taps_capture_and_leave_nothing():
    model, x = net(), torch.randn(5, 2)
    with Taps(model, ["0", "1.1", "2", "0"]) as seen:
        out = model(x)
    assert list(seen) == ["0", "1.1", "2"]
    assert torch.equal(seen["0"], model[0](x)) and torch.equal(seen["2"], out[0])
    assert hooks(model) == 0
    before = dict(seen)
    model(torch.randn(5, 2))
    assert all(torch.equal(seen[k], before[k]) for k in seen)


def test_taps_go_when_the_call_fails():
    model = net()
    with pytest.raises(RuntimeError), Taps(model, ["0"]):
        model(torch.randn(5, 7))
    assert hooks(model) == 0


def test_a_copy_of_a_tapped_network_writes_into_its_own_taps():
    model = net()
    with Taps(model, ["0"]):
        model(torch.zeros(1, 2))
    twin, tap = copy.deepcopy(model), Taps(model, ["0"])
    assert hooks(twin) == 0
    with tap as seen:
        model(torch.zeros(1, 2))
        kept = seen["0"]
        twin(torch.ones(1, 2))
        assert seen["0"] is kept
    with tap as again:  # one Taps opens anew, empty
        assert again == {}


@pytest.mark.parametrize("name", ["1.0x", "", "1.2"])
def test_an_unknown_layer_names_the_nearest(name):
    with pytest.raises(UserError) as caught:
        Taps(net(), [name], key="student_layer")
    assert str(caught.value).startswith(f"student_layer: unknown layer '{name}'")
    assert "1.1" in str(caught.value)
    if name:
        assert "nearest: 1.0" in str(caught.value) or "nearest: 1.1" in str(caught.value)


# ---- seeds -----------------------------------------------------------------------------------------------------------


def splitmix64(seed, count):
    """Vigna's reference generator."""
    out, state = [], seed
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        out.append(z ^ (z >> 31))
    return out


def test_mix_is_splitmix64_chained_and_stable():
    golden = 0x9E3779B97F4A7C15
    assert splitmix64(1234567, 2) == [6457827717110365317, 3203168211198807973]  # published test vector
    for a, b in ((0, 0), (1, 2), (-1, 7), (2**63, 5)):
        first = splitmix64(golden ^ (a % 2**64), 1)[0]
        assert hash_seed(a) == first >> 1
        assert hash_seed(a, b) == splitmix64(first ^ (b % 2**64), 1)[0] >> 1
    assert (
        hash_seed(0) == 3980143261097177850 and hash_seed(1, 2, 3) == 2623250113353451629
    )  # a checkpoint of today must resume tomorrow


def test_mix_is_distinct_and_depends_on_order():
    values = {hash_seed(a, b) for a in range(-20, 100) for b in range(100)}
    assert len(values) == 120 * 100
    assert hash_seed(1, 2) != hash_seed(2, 1) and hash_seed(1) != hash_seed(1, 0) and hash_seed(0) != hash_seed(0, 0)
    assert all(0 <= v < 2**63 for v in values)


def test_seed_torch_is_a_function_of_its_parts():
    draws = []
    for parts in ((1, 2), (1, 3), (1, 2)):
        seed_torch(*parts)
        draws.append(torch.rand(3))
    assert torch.equal(draws[0], draws[2]) and not torch.equal(draws[0], draws[1])


# ---- batches and outputs ---------------------------------------------------------------------------------------------


def test_batch_counts_labels_and_weights():
    hard = Batch(torch.zeros(4, 1), torch.tensor([1, -100, 0, -100]))
    assert hard.labelled.tolist() == [True, False, True, False] and hard.count() == StepTotals(2.0, 4.0, 1)
    fuzzy = Batch(torch.zeros(3, 1), torch.tensor([[0.5, 0.5], [0.0, 0.0], [0.0, 1.0]]))
    assert fuzzy.labelled.tolist() == [True, False, True] and len(fuzzy) == 3
    weight = torch.tensor([0.5, 2.0, 3.0, 0.0])
    assert hard.count(weight) == StepTotals(3.5, 5.5, 1)
    assert Batch(hard.inputs, hard.targets, weight=weight).count() == StepTotals(3.5, 5.5, 1)


def test_batch_moves_dicts_and_leaves_the_window():
    window = StepTotals(1.0, 2.0, 3)
    batch = Batch({"ids": torch.zeros(2, 3)}, torch.zeros(2).long(), weight=torch.ones(2), window=window)
    moved = batch.to("meta")
    assert moved.inputs["ids"].device.type == moved.targets.device.type == moved.weight.device.type == "meta"
    assert moved.window == window and batch.targets.device.type == "cpu"


def test_soft_targets():
    assert torch.equal(as_probabilities(torch.tensor([1, -100]), 3), torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]))
    given_ = torch.tensor([[0.25, 0.75]], dtype=torch.float16)
    assert as_probabilities(given_, 2).dtype == torch.float32 and as_probabilities(given_, 2).tolist() == [[0.25, 0.75]]


def test_outputs_of_what_networks_return():
    class Answer:
        logits = torch.ones(1, 2)

    x = torch.ones(1, 2)
    for raw, extra in itertools.product((x, {"logits": x}, Answer(), Outputs(x)), ({}, {"l": x})):
        out = Outputs.of(raw, extra)
        assert torch.equal(out.logits, x) and list(out.features) == list(extra)
        if isinstance(raw, Outputs):
            raw.features.clear()
    live = torch.ones(2, requires_grad=True) * 2
    cut = Outputs(live, {"a": live}, {"b": live}).detach()
    assert not any(t.requires_grad for t in (cut.logits, cut.features["a"], cut.heads["b"]))
