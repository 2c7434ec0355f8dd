"""The order of examples, how steps are split and resumed, and what labels, ratio and fraction mean."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import pytest
import torch

from kdlab.data import digits
from kdlab.data.order import Order, Views, parts_of
from kdlab.data.splits import quotas, stratified
from kdlab.errors import UserError
from kdlab.functional.rng import Draws, mix, mix_tensor, permutation, seed_of, uniform
from kdlab.functional.types import NO_LABEL


def epoch_of(data, epoch=0):
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)


def joined(batches, name):
    return torch.cat([getattr(batch, name) for batch in batches])


# ---- random numbers


def test_numbers_follow_the_published_generator():
    # the first outputs of SplitMix64 seeded with 1234567, as in its author's reference program
    golden, state, outputs = 0x9E3779B97F4A7C15, 1234567, []
    for _ in range(3):
        state = (state + golden) % 2**64
        outputs.append(mix(state))
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_tensors_mix_as_integers_do():
    numbers = [0, 1, -1, 2**63 - 1, -(2**63), 123456789]
    assert [n % 2**64 for n in mix_tensor(torch.tensor(numbers)).tolist()] == [mix(n) for n in numbers]


def test_permutation_is_one_and_differs_by_key():
    orders = [permutation(1000, 3, "order", epoch) for epoch in range(2)]
    assert all(order.sort().values.equal(torch.arange(1000)) for order in orders)
    assert not orders[0].equal(orders[1])
    assert orders[0].equal(permutation(1000, 3, "order", 0))
    assert len({tuple(permutation(4, seed).tolist()) for seed in range(200)}) == 24
    assert seed_of(1, "a") != seed_of("a", 1) and seed_of("ab") != seed_of("a", "b")


def test_numbers_are_uniform_and_independent():
    example = torch.arange(50_000)
    draws = [uniform(0, example, 0), uniform(0, example, 1), uniform(1, example, 0), uniform(0, example, 0, draw=1)]
    for numbers in draws:
        assert abs(numbers.mean() - 0.5) < 0.01 and abs(numbers.var() - 1 / 12) < 0.002
        assert numbers.min() >= 0 and numbers.max() < 1
    assert (torch.corrcoef(torch.stack(draws)) - torch.eye(4)).abs().max() < 0.02
    counts = Draws.of(0, example, 0).integers(0, 7).bincount(minlength=7)
    assert len(counts) == 7 and (counts / 50_000 - 1 / 7).abs().max() < 0.01


def test_a_number_does_not_depend_on_its_batch():
    whole = uniform(5, torch.arange(100), 2)
    assert uniform(5, torch.tensor([42, 7]), torch.tensor([2, 2])).equal(whole[[42, 7]])


# ---- splits


def test_quotas_are_proportional_and_leave_no_class_out():
    assert quotas(torch.tensor([50, 30, 20]), 10).tolist() == [5, 3, 2]
    assert quotas(torch.tensor([1000, 1, 1]), 5).tolist() == [3, 1, 1]
    assert quotas(torch.tensor([3, 3, 3]), 9).tolist() == [3, 3, 3]
    assert quotas(torch.tensor([5, 0, 5]), 4).tolist() == [2, 0, 2]


def test_stratified_choice_is_a_function_of_the_seed():
    targets = torch.arange(100) % 4
    chosen = stratified(targets, 20, 0, "labels")
    assert targets[chosen].bincount().tolist() == [5, 5, 5, 5]
    assert chosen.equal(stratified(targets, 20, 0, "labels"))
    assert not chosen.equal(stratified(targets, 20, 1, "labels"))
    assert not chosen.equal(stratified(targets, 20, 0, "val"))


# ---- order


def test_an_epoch_shows_every_row_once_and_epochs_differ():
    data = digits(batch_size=64)
    first, again, second = epoch_of(data, 0), epoch_of(data, 0), epoch_of(data, 1)
    assert len(first) == len(data.train_dataloader()) == 19
    assert joined(first, "example_id")[:, 0].sort().values.equal(torch.arange(1200))
    assert joined(first, "example_id").equal(joined(again, "example_id"))
    assert not joined(first, "example_id").equal(joined(second, "example_id"))
    assert not joined(first, "example_id").equal(joined(epoch_of(digits(batch_size=64, seed=1)), "example_id"))
    inputs = data.ordered_loader("train")
    expected = joined(list(inputs), "inputs")[joined(first, "example_id")[:, 0]]
    assert joined(first, "inputs").equal(expected) and expected.dtype == torch.float32 and expected.max() == 1


def test_the_epoch_is_looked_at_when_the_first_batch_is_asked_for():
    data = digits()
    loader = data.train_dataloader()
    early = iter(loader)
    loader.sampler.set_epoch(3)
    assert joined(list(early), "example_id").equal(joined(epoch_of(data, 3), "example_id"))


def test_the_split_does_not_depend_on_the_training_seed():
    one, two = digits(labels=100, val=200, seed=0), digits(labels=100, val=200, seed=7)
    assert one.fingerprint == two.fingerprint
    assert joined(list(one.ordered_loader("train")), "targets").equal(
        joined(list(two.ordered_loader("train")), "targets")
    )
    assert digits(labels=100, val=200, split_seed=1).fingerprint != one.fingerprint


@pytest.mark.parametrize("augment", [["crop", "flip"], ["trivial"], ["crop", {"mixup": {"alpha": 1.0}}], ["cutmix"]])
@pytest.mark.parametrize(("accumulate", "world"), [(4, 1), (1, 4), (2, 2)])
def test_however_a_step_is_split_it_has_the_same_rows_and_pictures(augment, accumulate, world):
    options = {"batch_size": 256, "augment": augment, "labels": 600}
    whole = epoch_of(digits(**options), 2)
    ranks = []
    for rank in range(world):
        data = digits(**options).to("cpu", accumulate=accumulate, rank=rank, world=world)
        ranks.append(epoch_of(data, 2))
        assert len(ranks[-1]) == len(data.train_dataloader()) == 5 * accumulate
    for step, batch in enumerate(whole):
        micros = range(step * accumulate, (step + 1) * accumulate)
        parts = [ranks[rank][micro] for micro in micros for rank in range(world)]
        assert torch.cat([part.inputs for part in parts]).equal(batch.inputs)
        assert torch.cat([part.targets for part in parts]).equal(batch.targets)
        count = batch.count()
        for part in parts:
            assert part.window[:3] == (count.labelled, count.rows, accumulate * world)
        assert batch.window[:3] == (count.labelled, count.rows, 1)


@pytest.mark.parametrize("options", [{}, {"augment": ["crop", "cutmix"]}, {"labels": 100, "unlabelled_ratio": 3}])
@pytest.mark.parametrize("skip", [1, 7, 18])
def test_skip_goes_on_within_an_epoch_once(options, skip):
    data = digits(**options)
    whole = epoch_of(data, 4)
    loader = data.train_dataloader()
    loader.skip = skip
    rest = list(loader)
    assert len(rest) == len(whole) - skip and loader.skip == 0
    for one, other in zip(rest, whole[skip:], strict=True):
        assert one.inputs.equal(other.inputs) and one.targets.equal(other.targets) and one.window == other.window
    assert len(list(loader)) == len(whole)


def test_a_last_step_too_small_for_its_parts_is_left_out():
    targets = torch.zeros(21, dtype=torch.long)
    assert Order(targets, 10, parts=1).sizes == [10, 10]
    assert Order(torch.zeros(22, dtype=torch.long), 10, parts=1).sizes == [10, 10, 2]
    assert Order(torch.zeros(27, dtype=torch.long), 10, parts=4).sizes == [10, 10]
    left = [set(range(21)) - set(Order(targets, 10).epoch(e).rows.tolist()) for e in range(8)]
    assert all(len(rows) == 1 for rows in left) and len(set.union(*left)) > 1
    assert parts_of(10, 4) == [3, 3, 2, 2]


def test_too_many_parts_are_refused():
    with pytest.raises(UserError, match=r"data\.batch_size: 8 .* 5 parts .* at least 10"):
        digits(batch_size=8).to("cpu", accumulate=5).train_dataloader()


# ---- labels, ratio, fraction


def test_labels_withholds_all_but_a_stratified_few():
    data = digits(labels=100)
    assert data.counts == {"train": 1200, "labelled": 100, "val": 237, "test": 360}
    assert data.describe() == "100 labelled and 1100 unlabelled rows of digits"
    batches = epoch_of(data)
    targets, truth = joined(batches, "targets"), joined(batches, "hidden_targets")
    known = targets != NO_LABEL
    assert known.sum() == 100 and targets[known].equal(truth[known])
    assert targets[known].bincount().tolist() == [10] * 10
    assert (truth >= 0).all()
    assert all(batch.window[:3] == (float(batch.labelled.sum()), float(len(batch)), 1) for batch in batches)


def test_no_labels_at_all_and_all_of_them():
    none = epoch_of(digits(labels=0, unlabelled_ratio=3))
    assert not joined(none, "labelled").any() and sum(len(b) for b in none) == 1200
    assert none[0].window.labelled == 0
    every = epoch_of(digits(unlabelled_ratio=3))
    assert joined(every, "labelled").all() and every[0].hidden_targets is None


@pytest.mark.parametrize(("ratio", "labelled"), [(0, 64), (1, 32), (7, 8), (100, 1)])
def test_ratio_fixes_the_share_of_labelled_rows_of_every_step(ratio, labelled):
    batches = epoch_of(digits(labels=100, unlabelled_ratio=ratio))
    assert len(batches) == 19
    for batch in batches:
        assert len(batch) == 64 and batch.labelled.sum() == labelled == batch.window.labelled


def test_pools_go_round_reshuffled_with_a_new_view_each_time():
    data = digits(labels=100, unlabelled_ratio=3, augment=["crop"])
    batches = epoch_of(data, 1)
    keys = joined(batches, "example_id")[joined(batches, "labelled")]
    rounds = math.ceil(19 * 16 / 100)
    assert keys.unique(dim=0).shape == keys.shape  # no picture twice
    for turn, part in enumerate(keys[:, 1].unique().tolist()):
        assert part == rounds + turn
    first = keys[keys[:, 1] == rounds][:, 0]
    assert len(first) == 100 and len(first.unique()) == 100
    assert (keys[:, 0].bincount()[keys[:, 0].unique()] >= 3).all()


def test_labelled_rows_are_spread_over_a_step():
    batches = epoch_of(digits(labels=100, unlabelled_ratio=1, batch_size=64).to("cpu", accumulate=4))
    assert sum(0 < int(b.labelled.sum()) < len(b) for b in batches) == len(batches)


def test_fraction_keeps_a_stratified_part():
    data = digits(fraction=0.1)
    assert data.counts["train"] == 120
    assert joined(epoch_of(data), "targets").bincount().tolist() == [12] * 10
    assert digits(fraction=0.1, split_seed=1).fingerprint != data.fingerprint
    assert data.counts["test"] == 360 and data.counts["val"] == 237


# ---- views


def test_views_take_turns_or_are_chosen_by_hash():
    example, showing = torch.arange(1000), torch.full((1000,), 5)
    assert Views(None)(example, showing).equal(showing)
    assert Views(1)(example, showing).eq(0).all()
    assert Views(3)(example, showing).eq(2).all()
    hashed = Views(162, hashed=True)(example, showing)
    assert hashed.min() >= 0 and hashed.max() < 162 and len(hashed.unique()) > 120
    assert Views(162, hashed=True)(example[[17]], showing[[17]]).equal(hashed[[17]])


def test_every_process_makes_the_same_batches():
    code = (
        "import torch; from kdlab.data import digits; "
        "d = digits(labels=50, unlabelled_ratio=2, augment=['crop', 'trivial']);"
        "b = list(d.train_dataloader())[5]; "
        "print(d.fingerprint, b.example_id.sum().item(), b.inputs.double().sum().item())"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    data = digits(labels=50, unlabelled_ratio=2, augment=["crop", "trivial"])
    batch = next(itertools.islice(data.train_dataloader(), 5, None))
    here = [data.fingerprint, str(batch.example_id.sum().item()), str(batch.inputs.double().sum().item())]
    assert there == here
