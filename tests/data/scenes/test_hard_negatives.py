"""Hard negatives of the drawn scenes: every false sentence is false of its scene,
read by a parser that knows only the words.
"""

import random
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from modeling_dclip.data.questions import load_hard_negatives
from modeling_dclip.data.questions.rows import QUESTION_FEATURES
from modeling_dclip.data.scenes import load_scenes
from modeling_dclip.data.scenes.drawing import (
    COLOURS,
    COUNTS,
    PATTERNS,
    SHAPES,
    SIZES,
    Group,
    Scene,
    detailed_captions,
    random_scene,
)
from modeling_dclip.data.scenes.hard_negatives import CATEGORIES, hard_negatives

NUMBERS = {"a": 1, "an": 1, "one": 1, "a single": 1, "two": 2, "three": 3}
WITH = {"stripes": "striped", "dots": "dotted", "checks": "checked"}
PHRASE = re.compile(
    rf"(a single|an?|one|two|three)( {'| '.join(SIZES)})?( {'| '.join(PATTERNS)})?( {'| '.join(COLOURS)})?"
    rf" ({'|'.join(SHAPES)})(s|es)?( in ({'|'.join(COLOURS)}))?( with (stripes|dots|checks))?"
)
AXES = {"left": "horizontal", "right": "horizontal"} | dict.fromkeys(("top", "bottom", "above", "below"), "vertical")


def parse_phrase(text):
    """Attributes that a noun phrase claims; article, number and plural must agree, and no word may be left over."""
    match = PHRASE.fullmatch(text)
    assert match, f"no noun phrase: {text!r}"
    number, size, pattern, colour, shape, plural, _, in_colour, _, with_pattern = match.groups()
    count = NUMBERS[number]
    assert plural == (None if count == 1 else "es" if shape == "cross" else "s"), text
    if number in ("a", "an"):
        assert (number == "an") == (text.split()[1][0] in "aeiou"), text
    assert not (colour and in_colour) and not (pattern and with_pattern)
    claimed = {"count": count, "shape": shape, "colour": in_colour or (colour or "").strip()}
    claimed |= {"size": size.strip()} if size else {}
    claimed |= {"pattern": (pattern or WITH.get(with_pattern)).strip()} if pattern or with_pattern else {}
    return claimed


def split_list(text):
    return re.split(r", | and ", text)


def parse(sentence):
    """`(axis, phrases, surely)`: phrases in the order claimed along the axis;
    `surely` the index pairs that any reading puts in order.
    """
    if match := re.fullmatch(r"from (left to right|top to bottom) : (.*)", sentence):
        phrases, axis = split_list(match[2]), AXES[match[1].split()[0]]
    elif match := re.fullmatch(r"(?:on|at) the (left|top) (.*) , then (.*)", sentence):
        phrases, axis = [match[2], *split_list(match[3])], AXES[match[1]]
        return axis, [parse_phrase(p) for p in phrases], [(0, i) for i in range(1, len(phrases))]
    elif match := re.fullmatch(
        r"(.*) on the (right) and (.*) on its left|(.*) at the (bottom) and (.*) over it", sentence
    ):
        last, where, others = [group for group in match.groups() if group]
        phrases, axis = [*split_list(others), last], AXES[where]
        return axis, [parse_phrase(p) for p in phrases], [(i, len(phrases) - 1) for i in range(len(phrases) - 1)]
    else:
        (words,) = set(re.findall(r"to the left of|to the right of|above|below", sentence))
        phrases, axis = sentence.split(f" {words} "), AXES[words.split()[-2] if " " in words else words]
        phrases = phrases if words in ("to the left of", "above") else phrases[::-1]
    return axis, [parse_phrase(p) for p in phrases], [(i, i + 1) for i in range(len(phrases) - 1)]


def holds(sentence, scene, *, in_any_reading):
    """Whether the sentence is true of the scene: in every reading, or in at least one."""
    axis, phrases, surely = parse(sentence)
    places = []
    for claimed in phrases:
        fits = [i for i, g in enumerate(scene.groups) if all(getattr(g, field) == v for field, v in claimed.items())]
        if len(fits) != 1:
            return False
        places += fits
    ordered = [(i, i + 1) for i in range(len(places) - 1)] if in_any_reading else surely
    return axis == scene.axis and len(set(places)) == len(places) and all(places[i] < places[j] for i, j in ordered)


def questions(n, first=0):
    for seed in range(first, first + n):
        scene = random_scene(random.Random(f"scene {seed}"))
        yield scene, *hard_negatives(scene, random.Random(seed))


def test_the_parser_knows_true_from_false():
    scene = Scene(
        (Group("circle", "red", "plain", "large", 1), Group("cross", "orange", "dotted", "small", 2)), "horizontal"
    )
    assert holds("a large red circle to the left of two crosses in orange with dots", scene, in_any_reading=True)
    for false in (
        "a large red circle to the right of two dotted orange crosses",
        "a small red circle to the left of two dotted orange crosses",
        "a large red circle above two dotted orange crosses",
        "a large red circle to the left of three dotted orange crosses",
        "a large red cross to the left of two dotted orange circles",
    ):
        assert not holds(false, scene, in_any_reading=False)
    with pytest.raises(AssertionError):
        parse("a orange circle above two red stars")
    with pytest.raises(AssertionError):
        parse("an orange circle above two red star")
    for seed in range(100):
        rng = random.Random(seed)
        other = random_scene(rng)
        assert all(holds(caption, other, in_any_reading=True) for caption in detailed_captions(other, rng))


def test_the_true_sentence_is_true_and_every_negative_false_in_any_reading():
    asked = Counter()
    for scene, sentence, negatives in questions(500):
        assert holds(sentence, scene, in_any_reading=True), (sentence, scene)
        for category, negative in negatives.items():
            assert not holds(negative, scene, in_any_reading=False), (category, negative, scene)
            asked[category] += 1
    assert set(asked) == set(CATEGORIES)
    assert min(asked.values()) > 150 and sum(count == 500 for count in asked.values()) == 5


def changes(sentence, negative):
    """Fields that differ between two sentences, phrase by phrase in the order of the scene."""
    (axis, true, _), (other_axis, false, _) = parse(sentence), parse(negative)
    assert axis == other_axis and len(true) == len(false)
    return [{f for f in a.keys() | b.keys() if a.get(f) != b.get(f)} for a, b in zip(true, false, strict=True)]


def test_a_negative_differs_in_its_respect_only():
    fields = {"swapped_colour": "colour", "swapped_pattern": "pattern", "swapped_object": "shape"}
    fields |= {"wrong_count": "count", "wrong_colour": "colour", "wrong_object": "shape"}
    for scene, sentence, negatives in questions(300):
        for category, negative in negatives.items():
            if category == "swapped_relation":
                (_, true, _), (_, false, _) = parse(sentence), parse(negative)
                assert true == false[::-1]
                continue
            changed = [fields_changed for fields_changed in changes(sentence, negative) if fields_changed]
            assert changed == [{fields[category]}] * (2 if category.startswith("swapped") else 1), (sentence, negative)
            if category in ("wrong_colour", "wrong_object"):
                shown = {getattr(group, fields[category]) for group in scene.groups}
                named = [phrase[fields[category]] for phrase in parse(negative)[1]]
                assert sum(value not in shown for value in named) == 1


def bag(sentence):
    """Words without number, form of a pattern and article, directions as one."""
    words = re.sub(r"with (stripes|dots|checks)", lambda m: WITH[m[1]], sentence).replace(",", " ").split()
    singular = {f"{shape}{'es' if shape == 'cross' else 's'}": shape for shape in SHAPES}
    same = {"an": "a", "right": "left", "below": "above", "to": "", "the": "", "of": ""}
    return Counter(same.get(word, singular.get(word, word)) for word in words)


def test_swapped_sentences_hold_the_same_words():
    for _, sentence, negatives in questions(200):
        for category in ("swapped_colour", "swapped_pattern", "swapped_object", "swapped_relation"):
            if category in negatives:
                assert bag(sentence) == bag(negatives[category])


def test_no_word_or_pair_of_words_tells_true_from_false_without_the_picture():
    counts = {category: (Counter(), Counter()) for category in CATEGORIES}
    for _, sentence, negatives in questions(2500):
        for category, negative in negatives.items():
            for counter, text in zip(counts[category], (sentence, negative), strict=True):
                words = ["^", *text.split(), "$"]
                counter.update({*words, *zip(words, words[1:], strict=False)})
    scores = [
        (true[item] - false[item]) / np.sqrt(true[item] + false[item])
        for true, false in counts.values()
        for item in true.keys() | false.keys()
        if true[item] + false[item] >= 20
    ]
    assert len(scores) > 800 and np.abs(scores).max() < 5  # standard deviations, or less where both hold the item


def test_wrong_counts_are_asked_of_every_number_alike():
    pairs = Counter()
    for _, sentence, negatives in questions(3000):
        if "wrong_count" in negatives:
            true, false = parse(sentence)[1], parse(negatives["wrong_count"])[1]
            pairs.update((a["count"], b["count"]) for a, b in zip(true, false, strict=True) if a != b)
    assert set(pairs) == {(a, b) for a in COUNTS for b in COUNTS if a != b}
    mean = sum(pairs.values()) / len(pairs)
    assert all(abs(count - mean) < 4 * np.sqrt(mean) for count in pairs.values())


def test_scenes_that_words_cannot_tell_apart_are_refused():
    scene = random_scene(random.Random(0))
    same = replace(scene, groups=(scene.groups[0], replace(scene.groups[1], colour=scene.groups[0].colour)))
    for bad in (replace(scene, groups=scene.groups[:1]), same):
        with pytest.raises(ValueError, match="two or more groups that differ in shape and in colour"):
            hard_negatives(bad, random.Random(0))


def test_the_same_seed_gives_the_same_rows_and_another_seed_others():
    first, again, other = (load_hard_negatives("test", n=7, seed=seed, image_size=48) for seed in (3, 3, 4))
    for name in ("image_id", "captions", "negative_captions", "categories"):
        assert first[name][:] == again[name][:]
    assert first["captions"][:] != other["captions"][:]
    longer = load_hard_negatives("test", n=9, seed=3, image_size=48)
    assert longer["negative_captions"][:7] == first["negative_captions"][:]


def test_pictures_are_those_of_the_independent_scenes():
    asked = load_hard_negatives("validation", n=5, seed=2)
    drawn = load_scenes("validation", n=5, seed=2, max_siblings=0)
    assert asked["image_id"][:] == drawn["image_id"][:]
    for one, two in zip(asked["image"], drawn["image"], strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(two))
    assert asked.features == QUESTION_FEATURES
    for row in asked:
        assert len(set(row["captions"])) == 1 and all(len(texts) == 1 for texts in row["negative_captions"])
        assert len(row["captions"]) == len(row["negative_captions"]) == len(row["categories"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("tset",), "split of the drawn scenes.*'tset'"), (("test", 0), "at least one drawn scene")],
)
def test_wrong_requests_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_hard_negatives(arguments[0], **({"n": arguments[1]} if len(arguments) > 1 else {}))
