"""Sentences that are false of a drawn scene in one respect: does a model bind attributes, order and number, or only
words? Asked in questions, or learned from.

The true sentence and the false one share their wording and differ in that respect only:

| category | the false sentence | why it is false of the scene |
|---|---|---|
| `swapped_colour` | colours of two groups exchanged | groups differ in shape and colour: no group has that pair |
| `swapped_pattern` | two named patterns exchanged that differ, none plain | no group has that shape and pattern |
| `swapped_object` | shapes of two groups exchanged | as for colours |
| `swapped_relation` | left and right, or above and below, exchanged | the first group would be the last |
| `wrong_count` | another number of one group's objects | numbers are meant exactly, as everywhere in the scenes |
| `wrong_colour` | one group in a colour that no group has | |
| `wrong_object` | one group of a shape that no group has | |

A relation is exchanged by its words ("A to the left of B" becomes "A to the right of B"); in sentences without such
words A and B change places.

The swapped sentences keep the words, so a bag of words can only guess. No category can be answered without the
picture: a sentence is as often the true one of a question as the false one. For this reason wrong counts are asked of
as many ones as threes.
"""

import random
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

from modeling_dclip.data.scenes.drawing import (
    COLOURS,
    COUNT_WEIGHTS,
    COUNTS,
    RELATIONS,
    SHAPES,
    Scene,
    noun_phrase,
)

CATEGORIES = (
    "swapped_colour",
    "swapped_pattern",
    "swapped_object",
    "swapped_relation",
    "wrong_count",
    "wrong_colour",
    "wrong_object",
)


class Wording(NamedTuple):
    """How a scene is put into words: which sentence, which attributes of each group,
    and a seed for each group's phrase.
    """

    relation: int
    attributes: tuple[tuple[str, ...], ...]
    seeds: tuple[int, ...]


def random_wording(scene: Scene, rng: random.Random) -> Wording:
    """A wording for a scene of two or more groups, drawn as for its detailed captions."""
    attributes = []
    for _ in scene.groups:
        left_out = rng.choices(("size", "pattern", None), weights=(4, 1, 5))[0]
        attributes.append(tuple(a for a in ("count", "size", "pattern", "colour") if a != left_out))
    relation = rng.randrange(len(RELATIONS[scene.axis]))
    return Wording(relation, tuple(attributes), tuple(rng.getrandbits(32) for _ in scene.groups))


def say(scene: Scene, wording: Wording) -> str:
    """The sentence about a scene in a given wording: what two scenes have in common is worded alike."""
    return RELATIONS[scene.axis][wording.relation](_phrases(scene, wording))


def _phrases(scene: Scene, wording: Wording) -> list[str]:
    named = zip(scene.groups, wording.attributes, wording.seeds, strict=True)
    return [noun_phrase(group, random.Random(seed), attributes) for group, attributes, seed in named]


def _say_reversed(scene: Scene, wording: Wording) -> str:
    """The sentence with the opposite direction: its word where the next or the last relation is its opposite,
    else the order.
    """
    relation = {0: 1, 1: 0}.get(wording.relation, wording.relation)  # to the left of, to the right of; above, below
    return RELATIONS[scene.axis][relation](_phrases(scene, wording)[::-1])


def _exchanged(scene: Scene, field: str, i: int, j: int) -> Scene:
    groups = list(scene.groups)
    groups[i] = replace(groups[i], **{field: getattr(scene.groups[j], field)})
    groups[j] = replace(groups[j], **{field: getattr(scene.groups[i], field)})
    return replace(scene, groups=tuple(groups))


def _changed(scene: Scene, i: int, field: str, value: Any) -> Scene:
    groups = list(scene.groups)
    groups[i] = replace(groups[i], **{field: value})
    return replace(scene, groups=tuple(groups))


def _replaced(scene: Scene, field: str, choices: Iterable[str], rng: random.Random) -> Scene:
    """One group with a value of `field` that no group has."""
    taken = {getattr(group, field) for group in scene.groups}
    value = rng.choice([choice for choice in choices if choice not in taken])
    return _changed(scene, rng.randrange(len(scene.groups)), field, value)


def _recounted(scene: Scene, rng: random.Random) -> Scene | None:
    """One group with another count, or none.

    Groups are taken in random order and kept with a chance inverse to how often their count is drawn, so that the true
    counts of all questions are one, two and three alike. Else the smaller number would be the better guess without
    looking.
    """
    for i in rng.sample(range(len(scene.groups)), len(scene.groups)):
        count = scene.groups[i].count
        if rng.random() < 1 / COUNT_WEIGHTS[count - 1]:
            return _changed(scene, i, "count", rng.choice([other for other in COUNTS if other != count]))
    return None


def hard_negatives(scene: Scene, rng: random.Random) -> tuple[str, dict[str, str]]:
    """A true sentence about a scene, and sentences that are false of it in one respect.

    Args:
        scene (`Scene`): Two or more groups that differ in shape and in colour, as
            [`~modeling_dclip.data.scenes.drawing.random_scene`] makes them.
        rng (`random.Random`): Source of the wording and of what is exchanged.

    Returns:
        `tuple[str, dict[str, str]]`: The true sentence; by category a false one. `swapped_pattern` and `wrong_count`
            are missing where no group allows them.

    Raises:
        ValueError: If the scene has a single group, or groups of one shape or of one colour, which sentences could not
            tell apart.

    Example:
        >>> from modeling_dclip.data.scenes.drawing import random_scene
        >>> sentence, negatives = hard_negatives(random_scene(random.Random(1)), random.Random(1))
        >>> sentence in negatives.values()
        False
    """
    groups = scene.groups
    if len(groups) < 2 or any(len({getattr(g, f) for g in groups}) < len(groups) for f in ("shape", "colour")):
        raise ValueError(f"Expected two or more groups that differ in shape and in colour, got {groups}.")
    wording = random_wording(scene, rng)
    sentence = say(scene, wording)
    pairs = [(i, j) for j in range(len(groups)) for i in range(j)]
    patterned = [
        (i, j)
        for i, j in pairs
        if len({groups[i].pattern, groups[j].pattern, "plain"}) == 3  # plain is worded otherwise than the others
        and "pattern" in wording.attributes[i]
        and "pattern" in wording.attributes[j]
    ]
    false_scenes = {
        "swapped_colour": _exchanged(scene, "colour", *rng.choice(pairs)),
        "swapped_pattern": _exchanged(scene, "pattern", *rng.choice(patterned)) if patterned else None,
        "swapped_object": _exchanged(scene, "shape", *rng.choice(pairs)),
        "wrong_count": _recounted(scene, rng),
        "wrong_colour": _replaced(scene, "colour", COLOURS, rng),
        "wrong_object": _replaced(scene, "shape", SHAPES, rng),
    }
    negatives = {name: say(false, wording) for name, false in false_scenes.items() if false is not None}
    negatives["swapped_relation"] = _say_reversed(scene, wording)
    return sentence, {name: negatives[name] for name in CATEGORIES if name in negatives}
