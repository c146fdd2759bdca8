"""The drawn scenes: deterministic, truthful, hard in the ways promised."""

import hashlib
import random

import numpy as np
import pytest

from modeling_dclip.data.scenes import (
    CLASS_NAMES,
    SPLITS,
    TEMPLATES,
    iterate_scenes,
    load_scenes,
    load_single_objects,
    train_tokenizer,
)
from modeling_dclip.data.scenes.drawing import (
    COLOURS,
    COUNT_WORDS,
    PATTERNS,
    SHAPES,
    SIZES,
    Group,
    Scene,
    coarse_caption,
    detailed_captions,
    draw_scene,
    random_scene,
    siblings,
)

TWO_GROUPS = Scene(
    (Group("circle", "red", "plain", "large", 1), Group("star", "blue", "dotted", "small", 2)), axis="horizontal"
)


def _pixels(dataset):
    return [np.asarray(image) for image in dataset["image"]]


def test_the_same_seed_draws_the_same_pixels_and_sentences():
    first, second = load_scenes("train", n=9, seed=3), load_scenes("train", n=9, seed=3)
    assert first["captions"][:] == second["captions"][:]
    assert all((a == b).all() for a, b in zip(_pixels(first), _pixels(second), strict=True))


def test_a_longer_dataset_starts_with_the_shorter_one():
    assert load_scenes("test", n=14)["captions"][:5] == load_scenes("test", n=5)["captions"][:]


def test_splits_and_seeds_share_no_picture():
    digests = [
        hashlib.sha256(pixels.tobytes()).hexdigest()
        for split in SPLITS
        for seed in (0, 1)
        for pixels in _pixels(load_scenes(split, n=12, seed=seed))
    ]
    assert len(set(digests)) == len(digests)


def test_boxes_lie_inside_the_image_and_hold_the_objects_colour():
    image, boxes = draw_scene(TWO_GROUPS, random.Random(0))
    assert boxes.shape == (3, 4) and boxes.dtype == np.float32
    assert (boxes >= 0).all() and (boxes <= 128).all() and (boxes[:, 2:] > boxes[:, :2]).all()
    pixels = np.asarray(image)
    for box, colour in zip(boxes.astype(int), ("red", "blue", "blue"), strict=True):
        inside = pixels[box[1] : box[3], box[0] : box[2]].reshape(-1, 3)
        assert (inside == COLOURS[colour]).all(1).mean() > 0.1  # a dotted star covers about a sixth of its box


def test_the_first_group_is_left_of_or_above_the_second():
    for axis, low in (("horizontal", 0), ("vertical", 1)):
        scene = Scene(TWO_GROUPS.groups, axis)
        for seed in range(20):
            boxes = draw_scene(scene, random.Random(seed))[1]
            centres = (boxes[:, low] + boxes[:, low + 2]) / 2
            assert centres[0] < centres[1:].min()


def test_detailed_captions_name_every_group_with_its_own_attributes():
    for seed in range(50):
        rng = random.Random(seed)
        scene = random_scene(rng)
        for caption in detailed_captions(scene, rng, 5):
            for group in scene.groups:
                assert group.shape in caption
                assert group.count == 1 or COUNT_WORDS[group.count] in caption
            named = [colour for colour in COLOURS if colour in caption.replace(",", " ").split()]
            assert set(named) <= {group.colour for group in scene.groups}


def test_detailed_captions_of_a_scene_differ_in_wording():
    for seed in range(50):
        captions = detailed_captions(random_scene(random.Random(seed)), random.Random(seed), 5)
        assert len(set(captions)) == 5


def test_order_words_are_true():
    assert {c.index("circle") < c.index("star") for c in _captions_with(TWO_GROUPS, "to the left of")} == {True}
    assert {c.index("circle") < c.index("star") for c in _captions_with(TWO_GROUPS, "to the right of")} == {False}


def _captions_with(scene, words):
    found = [c for seed in range(20) for c in detailed_captions(scene, random.Random(seed), 5) if words in c]
    assert found
    return found


def test_siblings_differ_from_the_scene_in_one_respect():
    for seed in range(50):
        scene, *others = siblings(random_scene(random.Random(seed)), random.Random(seed))
        assert others and scene not in others
        for other in others:
            same_bag = sorted(map(str, scene.groups)) == sorted(map(str, other.groups))
            changed = [a != b for a, b in zip(scene.groups, other.groups, strict=True)]
            assert same_bag or 1 <= sum(changed) <= 2
            for field in ("shape", "size"):
                assert sorted(getattr(g, field) for g in scene.groups) == sorted(
                    getattr(g, field) for g in other.groups
                )


@pytest.mark.parametrize("max_siblings", [0, 1, 3])
def test_families_hold_a_scene_and_at_most_so_many_siblings(max_siblings):
    families = {}  # by random source, of which each family has its own
    for scene, rng in iterate_scenes("test", 200, 0, max_siblings=max_siblings):
        families.setdefault(id(rng), (rng, []))[1].append(scene)
    sizes = {len(scenes) for _, scenes in families.values()}
    assert max(sizes) == 1 + max_siblings
    assert all(len(set(scenes)) == len(scenes) for _, scenes in families.values())


def test_coarse_captions_are_shorter_than_detailed_ones():
    pairs = [
        (coarse_caption(scene, rng), detailed_captions(scene, rng)) for scene, rng in iterate_scenes("train", 200, 0)
    ]
    coarse = np.mean([len(c.split()) for c, _ in pairs])
    detailed = np.mean([len(c.split()) for _, captions in pairs for c in captions])
    assert coarse < 0.6 * detailed


def test_single_objects_cover_every_class_and_show_its_colour():
    dataset = load_single_objects("test", n=len(CLASS_NAMES))
    assert sorted(dataset["label"]) == list(range(len(CLASS_NAMES)))
    assert dataset.features["label"].names == list(CLASS_NAMES)
    for row in dataset:
        colour = COLOURS[CLASS_NAMES[row["label"]].split()[0]]
        assert (np.asarray(row["image"]).reshape(-1, 3) == colour).all(1).sum() > 30


def test_class_names_are_colours_times_shapes_and_templates_have_a_slot():
    assert len(CLASS_NAMES) == len(COLOURS) * len(SHAPES) == len(set(CLASS_NAMES))
    assert all(template.count("{}") == 1 for template in TEMPLATES)
    assert len(PATTERNS) == 4 and len(SIZES) == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: load_scenes("tset"), "split of the drawn scenes.*'tset'"),
        (lambda: load_scenes("test", n=0), "at least one drawn scene, got n=0"),
        (lambda: load_scenes("test", captions="long"), "captions to be one of.*'long'"),
        (lambda: load_scenes("test", max_siblings=-1), "max_siblings >= 0, got -1"),
        (lambda: load_single_objects("tset"), "split of the drawn scenes.*'tset'"),
    ],
)
def test_wrong_requests_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_tokenizer_keeps_every_word_whole_and_ends_with_eos():
    tokenizer = train_tokenizer()
    words = {
        word
        for scene, rng in iterate_scenes("test", 300, 1)
        for caption in detailed_captions(scene, rng)
        for word in caption.replace(",", " ").split()
    }
    assert [word for word in words if len(tokenizer(word)["input_ids"]) != 3] == []
    assert tokenizer("a red star")["input_ids"][-1] == tokenizer.eos_token_id
    assert tokenizer.model_max_length == 48
