"""Augmentation: what each transform does, that nothing but (seed, example, view) decides it, and mixing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from kdlab.data import CLEAN, digits, synthetic, tensors
from kdlab.data.augment import TRANSFORMS, Augmentation, Crop, Cutout, Flip
from kdlab.data.mixing import CutMix, MixUp, Recipe
from kdlab.data.ops import OPS, apply_ops, equalize, posterize, rotate, sharpness, translate_x
from kdlab.errors import UserError
from kdlab.functional.rng import Draws
from kdlab.functional.types import NO_LABEL

PER_IMAGE = [name for name in TRANSFORMS if name not in ("mixup", "cutmix")]


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (24, 3, 16, 12), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("name", PER_IMAGE)
def test_a_view_is_the_same_in_any_batch(images, name):
    shown = Augmentation([name], (3, 16, 12), seed=3)
    example, view = torch.arange(24), torch.arange(24) % 5
    whole = shown(images, example, view)
    assert whole.shape == images.shape and whole.dtype == torch.float32
    assert whole.min() >= 0 and whole.max() <= 1
    for part in (torch.tensor([7]), torch.tensor([20, 3, 11]), torch.arange(23, -1, -1)):
        assert shown(images[part], example[part], view[part]).equal(whole[part])
    assert not shown(images, example, view + 1).equal(whole)
    assert not Augmentation([name], (3, 16, 12), seed=4)(images, example, view).equal(whole)


def test_transforms_do_not_share_their_numbers(images):
    alone = Augmentation(["flip"], (3, 16, 12))
    twice = Augmentation(["flip", "flip"], (3, 16, 12))
    example = torch.arange(24)
    assert not twice(images, example, 0).equal(alone.to_float(images))  # would undo itself


def test_crop_shows_each_window_of_the_padded_picture(images):
    crop = Crop(16, 12, padding=2)
    assert crop.finite == 25 and Crop(32, 32).finite == 81
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    for outcome in range(25):
        y, x = divmod(outcome, 5)
        assert crop.apply(images, torch.full((24,), outcome)).equal(padded[:, :, y : y + 16, x : x + 12])
    reflected = Crop(16, 12, padding=2, fill="reflect").apply(images, torch.zeros(24, dtype=torch.long))
    assert reflected.equal(torch.nn.functional.pad(images.float(), (2, 2, 2, 2), "reflect")[:, :, :16, :12].byte())


def test_flip_and_cutout(images):
    assert Flip().apply(images, torch.ones(24, dtype=torch.long)).equal(images.flip(-1))
    assert Flip().apply(images, torch.zeros(24, dtype=torch.long)).equal(images)
    holes = Cutout(16, 12, size=4).apply(images + 1 - (images == 255).byte(), torch.full((24,), 5 * 12 + 6)) == 0
    expected = torch.zeros(16, 12, dtype=torch.bool)
    expected[3:7, 4:8] = True
    assert holes[:, 0].equal(expected.expand(24, 16, 12))


def test_all_views_are_counted_and_distinct(images):
    shown = Augmentation(["crop", "flip"], (3, 32, 32), enumerate_views=True)
    assert shown.finite == 162
    picture = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8).expand(162, -1, -1, -1)
    views = shown(picture, torch.zeros(162, dtype=torch.long), torch.arange(162))
    assert len(views.flatten(1).unique(dim=0)) == 162
    assert shown(picture, torch.arange(162), 40)[3].equal(views[40])  # the same for every example


def test_operations_agree_with_pillow(images):
    half = torch.full((24,), 0.5)
    up = torch.zeros(24, dtype=torch.bool)
    shown = images.float() / 255
    for ours, theirs in (
        (equalize(shown, half, up), ImageOps.equalize),
        (posterize(shown, half, up), lambda picture: ImageOps.posterize(picture, 5)),
    ):
        for row in range(24):
            picture = Image.fromarray(images[row].permute(1, 2, 0).numpy())
            expected = torch.from_numpy(np.array(theirs(picture))).permute(2, 0, 1)
            assert (ours[row] * 255).round().byte().equal(expected)


def test_geometry_moves_what_it_should():
    dot = torch.zeros(1, 1, 9, 9)
    dot[..., 4, 7] = 1
    up = torch.zeros(1, dtype=torch.bool)
    moved = translate_x(dot, torch.tensor([2 / 9 / 0.3]), up)
    assert moved[..., 4, 5] == pytest.approx(1, abs=1e-4)
    turned = rotate(dot.clone(), torch.tensor([1.0]), up)
    y, x = divmod(int(turned.flatten().argmax()), 9)
    assert (y, x) in ((3, 7), (2, 7), (3, 6), (5, 7), (6, 7), (5, 6), (6, 6), (2, 6))
    flat = torch.full((1, 1, 9, 9), 0.5)
    assert torch.allclose(sharpness(flat, torch.ones(1), up), flat)


def test_apply_ops_gives_each_row_its_own(images):
    shown = images.float() / 255
    chosen = torch.arange(24) % len(OPS)
    strength, down = torch.linspace(0, 1, 24), torch.arange(24) % 2 == 0
    together = apply_ops(shown, chosen, strength, down)
    for row in range(24):
        one = slice(row, row + 1)
        assert OPS[int(chosen[row])](shown[one], strength[one], down[one]).equal(together[one])


def test_trivial_uses_every_operation_about_equally():
    draws = Draws.of(0, torch.arange(14_000), 0).stream(0)
    counts = draws.integers(0, len(OPS)).bincount(minlength=len(OPS))
    assert len(counts) == 14 and counts.min() > 850 and counts.max() < 1150


# ---- views of a data set


def test_views_of_a_data_set():
    assert digits().views == 1 and digits().transform == "none" and digits().uncacheable_reason is None
    endless = digits(augment=["crop"])
    assert endless.views is None and "data.views" in endless.uncacheable_reason
    few = digits(augment=["crop", "flip"], views=4)
    assert few.views == 4 and few.transform == "crop + flip; views=4; seed=0"
    every = digits(augment=[{"crop": {"padding": 1}}, "flip"], views="all")
    assert every.views == 18 and every.transform == "crop(padding=1) + flip; views=all 18"
    assert digits(augment=["crop", "mixup"]).views is None


@pytest.mark.parametrize("views", [3, "all"])
def test_an_epoch_shows_what_sequential_showed(views):
    data = digits(augment=["crop", "flip"], views=views)
    book = torch.stack(
        [torch.cat([b.inputs for b in data.ordered_loader("train", v)]) for v in range(data.views)], dim=1
    )
    seen = set()
    for epoch in range(3):
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            assert batch.inputs.equal(book[batch.example_id[:, 0], batch.example_id[:, 1]])
            seen.update(batch.example_id[:, 1].tolist())
    assert seen == set(range(data.views))


def test_sequential_is_in_order_and_complete():
    data = digits(augment=["crop"], views=2)
    for split, rows in (("train", 1200), ("val", 237), ("test", 360)):
        keys = torch.cat([b.example_id for b in data.ordered_loader(split, batch_size=100)])
        assert keys[:, 0].equal(torch.arange(rows))
        assert keys[:, 1].eq(CLEAN if split == "train" else 0).all()
    clean = torch.cat([b.inputs for b in data.ordered_loader("train")])
    plain = torch.cat([b.inputs for b in digits().ordered_loader("train", 0)])
    assert clean.equal(plain)
    assert torch.cat([b.inputs for b in data.ordered_loader("val", 0)]).equal(
        torch.cat([b.inputs for b in data.val_dataloader()])
    )
    with pytest.raises(UserError, match=r"view: 2; accepted: 0\.\.1"):
        data.ordered_loader("train", 2)
    with pytest.raises(UserError, match=r"view: 1; accepted: 0\.\.0 of the val"):
        data.ordered_loader("val", 1)
    with pytest.raises(UserError, match="unknown split 'vall'; nearest: val"):
        data.ordered_loader("vall")


def test_augmented_shows_the_training_view_or_another():
    data = digits(augment=["crop"], views=4)
    batch = next(iter(data.train_dataloader()))
    raw = torch.cat([b.inputs for b in data.ordered_loader("train")])[batch.example_id[:, 0]]
    assert data.augmented(raw, *batch.example_id.T).equal(batch.inputs)
    strong = data.augmented(raw, *batch.example_id.T, augment=["randaugment"])
    assert strong.shape == raw.shape and not strong.equal(batch.inputs)


# ---- mixing


def mixed_by_hand(data, batch_size, epoch=0):
    """Each step of an epoch, mixed from unmixed rows by the recipe's published formula."""
    plain = digits(batch_size=batch_size, labels=600)
    loader = plain.train_dataloader()
    loader.sampler.set_epoch(epoch)
    for step, batch in enumerate(loader):
        yield batch, Recipe(data._augmentation.mixings, 0, epoch, step, len(batch))


def test_mixup_mixes_inputs_and_labels_of_the_same_pairs():
    data = digits(batch_size=64, labels=600, augment=[{"mixup": {"alpha": 1.0}}])
    for got, (plain, recipe) in zip(data.train_dataloader(), mixed_by_hand(data, 64), strict=True):
        other, share = recipe.partner, recipe.share
        expected = plain.inputs * share + plain.inputs[other] * (1 - share)
        assert torch.allclose(got.inputs, expected)
        both = plain.labelled & plain.labelled[other]
        assert got.labelled.equal(both) and got.window.labelled == both.sum() and got.window.rows == len(plain)
        hot = torch.nn.functional.one_hot(plain.targets.clamp(min=0), 10).float()
        assert torch.allclose(got.targets, (hot * share + hot[other] * (1 - share)) * both[:, None])
        assert got.example_id is None and got.hidden_targets is None


def test_cutmix_labels_go_by_the_area_that_is_really_pasted():
    own, partner = torch.zeros(4, 1, 8, 8), torch.ones(4, 1, 8, 8)
    for share, place in ((0.5, (0.5, 0.5)), (0.3, (0.01, 0.99)), (0.99, (0.2, 0.2)), (0.01, (0.9, 0.1))):
        mixed, kept = CutMix().combine(own, partner, share, place)
        assert (1 - mixed).mean().item() == pytest.approx(kept)
    labels = torch.tensor([0, 1, NO_LABEL, 2])
    recipe = Recipe([CutMix()], 0, 0, 0, 4)
    _, targets = recipe(own, partner, labels, labels[[1, 2, 3, 0]], 3)
    assert targets.sum(1).tolist() == pytest.approx([1, 0, 0, 1])


def test_steps_differ_in_share_and_some_are_left_alone():
    recipes = [Recipe([MixUp(alpha=1.0, prob=0.5)], 0, 0, step, 32) for step in range(200)]
    active = [recipe for recipe in recipes if recipe.active]
    assert 70 < len(active) < 130
    assert len({recipe.share for recipe in active}) == len(active)
    again = Recipe([MixUp(alpha=1.0, prob=0.5)], 0, 0, 17, 32)
    assert (again.share, again.active) == (recipes[17].share, recipes[17].active)
    both = [Recipe([MixUp(), CutMix()], 0, 1, step, 8).mixing.name for step in range(50)]
    assert {"mixup", "cutmix"} == set(both)


def test_tables_can_be_mixed():
    batch = next(iter(synthetic(augment=["mixup"]).train_dataloader()))
    assert batch.inputs.shape == (64, 10) and batch.targets.shape == (64, 2)


def test_float_pictures_are_augmented_too():
    inputs = torch.rand(60, 3, 8, 8)
    data = tensors(inputs, torch.arange(60) % 3, augment=["crop", "trivial"], batch_size=20)
    batch = next(iter(data.train_dataloader()))
    assert batch.inputs.dtype == torch.float32 and batch.inputs.shape[1:] == (3, 8, 8)


# ---- errors


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        (["cropp"], r"data\.augment: unknown transform 'cropp'; nearest: crop"),
        ([{"crop": {"paddin": 4}}], r"data\.augment\.crop: unknown option 'paddin'; nearest: padding"),
        ([{"crop": {"height": 4}}], r"data\.augment\.crop: unknown option 'height'"),
        ([{"crop": {"padding": 8}}], r"data\.augment\.crop\.padding: 8; accepted: 1\.\.7"),
        ([{"crop": {"padding": "x"}}], r"data\.augment\.crop: .*wrong type"),
        ([{"crop": {"fill": "wrap"}}], r"data\.augment\.crop\.fill: unknown value 'wrap'"),
        ([{"crop": 4}], r"data\.augment\.crop: 4; accepted: a mapping"),
        ([{"cutout": {"size": 0}}], r"data\.augment\.cutout\.size: 0"),
        ([{"random_resized_crop": {"scale": [0.9, 0.1]}}], r"random_resized_crop\.scale: \[0\.9, 0\.1\]"),
        ([{"trivial": {"strength": 2}}], r"trivial\.strength: 2"),
        ([{"randaugment": {"ops": 0}}], r"randaugment\.ops: 0"),
        ([{"randaugment": {"magnitude": 11}}], r"randaugment\.magnitude: 11"),
        ([{"mixup": {"alpha": 0}}], r"data\.augment\.mixup\.alpha: 0; accepted: above 0"),
        ([{"cutmix": {"prob": 2}}], r"data\.augment\.cutmix\.prob: 2"),
        (7, r"data\.augment: 7"),
    ],
)
def test_mistakes_in_augment(augment, message):
    with pytest.raises(UserError, match=message):
        digits(augment=augment)


def test_mistakes_in_views():
    for views in (0, -1, "some", True, 1.5):
        with pytest.raises(UserError, match=r"data\.views: .*accepted: null"):
            digits(augment=["crop"], views=views)
    with pytest.raises(UserError, match=r"data\.views: all; trivial .* counted: crop, flip, cutout"):
        digits(augment=["crop", "trivial"], views="all")
    with pytest.raises(UserError, match=r"data\.views: 4; mixup"):
        digits(augment=["mixup"], views=4)
    with pytest.raises(UserError, match=r"crop needs pictures .* accepted: mixup"):
        synthetic(augment=["crop"])


def test_augment_takes_mappings_and_single_names():
    one = Augmentation({"crop": {"padding": 2}, "flip": None}, (1, 8, 8))
    other = Augmentation([{"crop": {"padding": 2}}, "flip"], (1, 8, 8))
    assert one.text == other.text == "crop(padding=2) + flip" and one.finite == 50
    assert Augmentation("flip", (1, 8, 8)).finite == 2
    assert Augmentation({"flip": False}, (1, 8, 8)).text == "none"
