"""Stored augmentations: drawn as torchvision draws, replayed to the very pixels torchvision gives."""

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from modeling_dclip.data.reinforced.augmentations import (
    OPERATIONS,
    AugmentationSettings,
    StoredAugmentation,
    draw_augmentation,
    normalise_pixels,
    replay_augmentation,
)

PHOTOS = Path(__file__).parents[4] / "shared" / "data" / "coco_val_sample" / "val2017"
SIZE = (61, 47)  # odd, so that centres lie on half pixels and inside pixels


def picture(size=SIZE, seed=0):
    """Smooth structure and noise: every operation changes it."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(20, 200, size[0])[None, :, None] + np.linspace(0, 40, size[1])[:, None, None]
    pixels = ramp + rng.normal(0, 20, (size[1], size[0], 3))
    return Image.fromarray(pixels.clip(5, 250).astype(np.uint8))


def same(one, other):
    return np.array_equal(np.asarray(one), np.asarray(other))


def torchvision_replay(image, augmentation, image_size):
    """The published replay, of torchvision's own functions."""
    transforms = pytest.importorskip("torchvision.transforms")
    autoaugment = pytest.importorskip("torchvision.transforms.autoaugment")
    bicubic, nearest = transforms.InterpolationMode.BICUBIC, transforms.InterpolationMode.NEAREST
    image = transforms.functional.resized_crop(image, *augmentation.crop, [image_size, image_size], bicubic, True)
    for operation in augmentation.operations:
        if operation is not None:
            name = OPERATIONS[operation[0]].name
            image = autoaugment._apply_op(image, name, operation[1], interpolation=nearest, fill=None)
    return image


def test_operations_have_torchvisions_names_order_magnitudes_and_signs():
    autoaugment = pytest.importorskip("torchvision.transforms.autoaugment")
    space = autoaugment.RandAugment()._augmentation_space(31, (224, 224))
    assert [operation.name for operation in OPERATIONS] == list(space)
    for operation, (magnitudes, signed) in zip(OPERATIONS, space.values(), strict=True):
        assert operation.signed is signed
        for level in range(31):
            expected = float(magnitudes[level]) if magnitudes.ndim else 0.0
            assert operation.magnitude(level / 30, 224) == pytest.approx(expected, rel=1e-6, abs=1e-5), operation.name


@pytest.mark.parametrize("size", [SIZE, (64, 64)], ids=str)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("level", [1, 9, 14, 30])
@pytest.mark.parametrize("number", range(len(OPERATIONS)), ids=lambda number: OPERATIONS[number].name)
def test_every_operation_gives_torchvisions_pixels(number, level, sign, size):
    autoaugment = pytest.importorskip("torchvision.transforms.autoaugment")
    nearest = pytest.importorskip("torchvision.transforms").InterpolationMode.NEAREST
    operation, image = OPERATIONS[number], picture(size)
    magnitude = operation.magnitude(level / 30, 64) * (sign if operation.signed else 1)
    expected = autoaugment._apply_op(image, operation.name, magnitude, interpolation=nearest, fill=None)
    assert same(operation.apply(image, magnitude), expected)
    assert operation.name == "Identity" or level < 9 or not same(expected, image)


def test_replay_gives_torchvisions_pixels_for_many_draws():
    image, settings = picture((90, 70)), AugmentationSettings(image_size=48)
    for index in range(150):
        drawn = draw_augmentation(0, "image", index, image.size, settings)
        assert same(replay_augmentation(image, drawn, 48), torchvision_replay(image, drawn, 48)), drawn


def test_normalised_pixels_equal_torchvisions_bit_by_bit():
    transforms = pytest.importorskip("torchvision.transforms")
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    image = picture()
    expected = transforms.functional.normalize(
        transforms.functional.to_tensor(image), OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
    )
    assert torch.equal(normalise_pixels(image, mean, deviation), expected)


def test_skipped_operations_change_nothing_and_order_matters():
    image, crop = picture(), (3, 4, 40, 50)
    rotate, shift = (5, 30.0), (3, 9.0)
    plain = replay_augmentation(image, StoredAugmentation(crop, ()), 32)
    assert same(plain, replay_augmentation(image, StoredAugmentation(crop, (None, None)), 32))
    one = replay_augmentation(image, StoredAugmentation(crop, (rotate, None, shift)), 32)
    other = replay_augmentation(image, StoredAugmentation(crop, (shift, rotate)), 32)
    assert plain.size == (32, 32) and not same(plain, one) and not same(one, other)


def test_stored_numbers_survive_json_exactly():
    settings = AugmentationSettings(image_size=224)
    for index in range(50):
        drawn = draw_augmentation(1, "image", index, (640, 480), settings)
        assert StoredAugmentation.decode(json.loads(json.dumps(drawn.encode()))) == drawn
    assert StoredAugmentation.decode([[0, 0, 5, 6], None]) == StoredAugmentation((0, 0, 5, 6), ())
    assert StoredAugmentation.decode([[0, 0, 5, 6], [None, [3, -30]]]).encode() == [[0, 0, 5, 6], [None, [3, -30.0]]]


def test_draws_depend_on_seed_image_and_index_and_on_nothing_else():
    settings = AugmentationSettings(image_size=32)
    drawn = draw_augmentation(0, "a", 0, (64, 48), settings)
    assert draw_augmentation(0, "a", 0, (64, 48), settings) == drawn
    others = [draw_augmentation(*key, (64, 48), settings) for key in ((1, "a", 0), (0, "b", 0), (0, "a", 1))]
    assert len({drawn, *others}) == 4


def test_a_draw_is_the_same_on_every_machine():
    drawn = draw_augmentation(0, "a", 0, (640, 480), AugmentationSettings(image_size=224))
    assert drawn.encode() == [[169, 230, 245, 189], [[7, -0.27], [6, -0.27]]]


def test_draws_cover_all_operations_and_both_signs_and_stay_in_range():
    settings = AugmentationSettings(image_size=224)
    signs, shares, ratios = Counter(), [], []
    for index in range(3000):
        (top, left, height, width), operations = draw_augmentation(0, "a", index, (640, 480), settings)
        assert 0 <= top <= 480 - height and 0 <= left <= 640 - width
        shares.append(height * width / (640 * 480))
        ratios.append(width / height)
        signs.update((number, math.copysign(1, magnitude)) for number, magnitude in operations)
    assert 0.078 < min(shares) and max(shares) <= 1
    assert 0.74 < min(ratios) and max(ratios) < 1.35
    counts = Counter()
    for (number, _), count in signs.items():
        counts[number] += count
    # 6,000 draws of 14 operations: 428.6 expected, five standard deviations are 100
    assert len(counts) == 14 and all(abs(count - 6000 / 14) < 100 for count in counts.values())
    assert all((number, -1.0) in signs and (number, 1.0) in signs for number in range(14) if OPERATIONS[number].signed)


def test_crops_are_spread_as_torchvisions():
    transforms = pytest.importorskip("torchvision.transforms")
    image, settings = Image.new("RGB", (640, 480)), AugmentationSettings(image_size=224)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = [transforms.RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(3000)]
    ours = [draw_augmentation(0, "a", index, image.size, settings).crop for index in range(3000)]
    # The standard error of a quantile of 3,000 draws is about 1 % of the spread, on both sides.
    spread = np.percentile(theirs, 95, axis=0) - np.percentile(theirs, 5, axis=0)
    for percentile in (10, 50, 90):
        difference = np.percentile(ours, percentile, axis=0) - np.percentile(theirs, percentile, axis=0)
        assert (np.abs(difference) < 0.05 * spread).all(), (percentile, difference / spread)


@pytest.mark.real_data
@pytest.mark.skipif(not PHOTOS.is_dir(), reason="needs ../shared/data/coco_val_sample")
def test_replay_gives_torchvisions_pixels_on_photographs():
    paths = sorted(PHOTOS.glob("*.jpg"))
    assert len(paths) == 128
    for number, path in enumerate(paths):
        image = Image.open(path).convert("RGB")
        drawn = draw_augmentation(0, path.stem, number, image.size, AugmentationSettings(image_size=224))
        assert same(replay_augmentation(image, drawn, 224), torchvision_replay(image, drawn, 224)), (path.name, drawn)


@pytest.mark.parametrize("size", [(1000, 3), (3, 1000), (1, 1)], ids=str)
def test_extreme_images_are_cut_at_the_centre_as_torchvision_does(size):
    transforms = pytest.importorskip("torchvision.transforms")
    crop = draw_augmentation(0, "a", 0, size, AugmentationSettings(image_size=8, scale=(1.0, 1.0))).crop
    expected = transforms.RandomResizedCrop.get_params(Image.new("RGB", size), [1.0, 1.0], [3 / 4, 4 / 3])
    assert crop == expected


@pytest.mark.parametrize(
    "stored",
    [
        None,
        [[0, 0, 5, 6]],
        [[0, 0, 5], []],
        [[0, 0, 5.5, 6], []],
        [[-1, 0, 5, 6], []],
        [[0, 0, 0, 6], []],
        [[0, 0, 5, "6"], []],
        [[0, 0, 5, 6], [[14, 0.0]]],
        [[0, 0, 5, 6], [[1]]],
        [[0, 0, 5, 6], [[1.5, 0.1]]],
        [[0, 0, 5, 6], [[1, math.nan]]],
        [[0, 0, 5, 6], [[10, 9.0]]],
        [[0, 0, 5, 6], 5],
        [[0, 0, 5, 6], 0],
        [[0, 0, 5, 6], {}],
        [[0, 0, 5, 10**400], []],
        [[0, 0, 5, math.inf], []],
        [[0, 0, 5, 6], [[1, 10**400]]],
        [[0, 0, 5, 6], [[10**400, 1]]],
    ],
    ids=lambda stored: repr(stored)[:40],
)
def test_a_malformed_augmentation_is_refused(stored):
    with pytest.raises(ValueError, match="expected"):
        StoredAugmentation.decode(stored)


def test_a_crop_outside_the_image_is_refused():
    with pytest.raises(ValueError, match="inside the image of 61 x 47 pixels"):
        replay_augmentation(picture(), StoredAugmentation((0, 0, 48, 61), ()), 32)


@pytest.mark.parametrize(
    "wrong",
    [
        {"image_size": 0},
        {"image_size": -64},
        {"image_size": 10**6},
        {"scale": (0.0, 1.0)},
        {"scale": (0.5, 0.1)},
        {"scale": (5, 1.0)},
        {"scale": (math.nan, 1.0)},
        {"ratio": (0.0, 1.0)},
        {"ratio": (0.5, math.inf)},
        {"num_operations": -1},
        {"num_operations": 10**6},
        {"magnitude": 31},
        {"magnitude": 2.5},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused_with_their_name(wrong):
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))}: expected .*, got .{{1,30}}$"):
        AugmentationSettings(**{"image_size": 32, **wrong})
