"""What a drawn scene is, how it looks and how it is described: pure functions of a scene and a random source.

A scene holds one to three *groups* of equal objects in an order from left to right or from top to bottom. [`siblings`]
makes the scenes that differ from one in a single respect, which no bag of words tells apart.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image as PILImage
from PIL import ImageDraw

COLOURS = {
    "red": (214, 40, 40),
    "green": (44, 150, 60),
    "blue": (42, 90, 214),
    "yellow": (236, 196, 28),
    "purple": (132, 54, 178),
    "orange": (240, 126, 22),
    "pink": (240, 134, 186),
    "black": (34, 34, 38),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond", "ring", "heart")
PATTERNS = ("plain", "striped", "dotted", "checked")
SIZES = {"small": 0.6, "large": 1.0}
COUNT_WORDS = ("no", "one", "two", "three")
COUNTS, COUNT_WEIGHTS = (1, 2, 3), (3, 2, 1)  # one object is likelier than three
MAX_COUNT = max(COUNTS)


@dataclass(frozen=True)
class Group:
    """Equal objects that are named together: `count` times a `size` `pattern` `colour` `shape`."""

    shape: str
    colour: str
    pattern: str
    size: str
    count: int


@dataclass(frozen=True)
class Scene:
    """What is drawn, before any pixel: `groups` in order along `axis` ("horizontal": left to right, "vertical": top
    down).

    `zoom` enlarges a lone object, as a close-up does; 1.0 elsewhere.
    """

    groups: tuple[Group, ...]
    axis: str
    zoom: float = 1.0


def random_group(rng: random.Random) -> Group:
    """One group with every attribute drawn from `rng`; one object is likelier than three."""
    return Group(
        shape=rng.choice(SHAPES),
        colour=rng.choice(tuple(COLOURS)),
        pattern=rng.choice(PATTERNS),
        size=rng.choice(tuple(SIZES)),
        count=rng.choices(COUNTS, weights=COUNT_WEIGHTS)[0],
    )


def random_scene(rng: random.Random) -> Scene:
    """Two or three groups; neighbours differ in shape and in colour, so that each is named by its attributes."""
    groups: list[Group] = []
    while len(groups) < 2 or (len(groups) < 3 and rng.random() < 0.5):
        group = random_group(rng)
        if all(group.shape != other.shape and group.colour != other.colour for other in groups):
            groups.append(group)
    return Scene(groups=tuple(groups), axis=rng.choice(("horizontal", "vertical")))


def random_close_up(rng: random.Random, group: Group) -> Scene:
    """A scene of one group; a lone object may fill the picture, and then it is a large one."""
    zoom = rng.uniform(1.0, 3.0) if group.count == 1 and rng.random() < 0.7 else 1.0
    if zoom > 1.3:
        group = replace(group, size="large")
    return Scene((group,), rng.choice(("horizontal", "vertical")), zoom)


def _swap(scene: Scene, field: str) -> Scene:
    first, second, *rest = scene.groups
    swapped = (replace(first, **{field: getattr(second, field)}), replace(second, **{field: getattr(first, field)}))
    return replace(scene, groups=(*swapped, *rest))


def siblings(scene: Scene, rng: random.Random) -> list[Scene]:
    """The scene and the scenes that differ from it in one respect only, without repeats,
    in random order after the first.
    """
    recounted = replace(scene.groups[0], count=scene.groups[0].count % MAX_COUNT + 1)
    others = [
        _swap(scene, "colour"),
        _swap(scene, "pattern"),
        replace(scene, groups=scene.groups[::-1]),
        replace(scene, groups=(recounted, *scene.groups[1:])),
    ]
    rng.shuffle(others)
    return list(dict.fromkeys([scene, *others]))


# --- pixels ----------------------------------------------------------------------------------------------------------


def _polygon(points: int, inner: float = 1.0, turn: float = -0.25) -> list[tuple[float, float]]:
    """Corners on the unit circle around (0.5, 0.5); every second one pulled in to the radius `inner`."""
    corners = []
    for k in range(points):
        radius = 0.5 * (inner if k % 2 else 1.0)
        angle = 2 * math.pi * (k / points + turn)
        corners.append((0.5 + radius * math.cos(angle), 0.5 + radius * math.sin(angle)))
    return corners


_OUTLINES: dict[str, list[tuple[float, float]]] = {
    "square": [(0.08, 0.08), (0.92, 0.08), (0.92, 0.92), (0.08, 0.92)],
    "triangle": [(0.5, 0.04), (1.0, 0.94), (0.0, 0.94)],
    "star": _polygon(10, inner=0.42),
    "cross": [
        (i / 3, j / 3)
        for i, j in ((1, 0), (2, 0), (2, 1), (3, 1), (3, 2), (2, 2), (2, 3), (1, 3), (1, 2), (0, 2), (0, 1), (1, 1))
    ],
    "diamond": [(0.5, 0.0), (0.88, 0.5), (0.5, 1.0), (0.12, 0.5)],
    "heart": [
        (0.5, 0.98),
        (0.03, 0.45),
        (0.06, 0.22),
        (0.2, 0.08),
        (0.36, 0.1),
        (0.5, 0.27),
        (0.64, 0.1),
        (0.8, 0.08),
        (0.94, 0.22),
        (0.97, 0.45),
    ],
}


def _shape_mask(shape: str, side: int) -> PILImage.Image:
    scale = 4  # drawn larger and reduced, for smooth edges
    mask = PILImage.new("L", (side * scale, side * scale))
    draw = ImageDraw.Draw(mask)
    last = side * scale - 1
    if shape in ("circle", "ring"):
        draw.ellipse((0, 0, last, last), fill=255)
        if shape == "ring":
            hole = int(0.27 * last)
            draw.ellipse((hole, hole, last - hole, last - hole), fill=0)
    else:
        draw.polygon([(x * last, y * last) for x, y in _OUTLINES[shape]], fill=255)
    return mask.resize((side, side), PILImage.Resampling.BOX)


def _fill(group: Group, side: int) -> PILImage.Image:
    """A square of the group's colour; the pattern is a shade of it, three periods across whatever the size."""
    rows, columns = np.mgrid[0:side, 0:side] / side * 3
    if group.pattern == "striped":
        shaded = rows % 1 < 0.5
    elif group.pattern == "dotted":
        shaded = (rows % 1 - 0.5) ** 2 + (columns % 1 - 0.5) ** 2 < 0.1
    elif group.pattern == "checked":
        shaded = ((rows * 2).astype(int) + (columns * 2).astype(int)) % 2 == 1
    else:
        shaded = np.zeros((side, side), bool)
    colour = np.array(COLOURS[group.colour])
    shade = colour + 0.6 * ((255 if group.colour == "black" else 0) - colour)
    return PILImage.fromarray(np.where(shaded[..., None], shade, colour).astype(np.uint8))


def _background(rng: random.Random, image_size: int) -> PILImage.Image:
    """A pale gradient between two near greys, in a random direction."""
    start, end = (np.array([rng.randint(188, 236) for _ in range(3)], float) for _ in range(2))
    angle = rng.uniform(0, 2 * math.pi)
    rows, columns = np.mgrid[0:image_size, 0:image_size] / image_size - 0.5
    share = np.clip(0.5 + rows * math.sin(angle) + columns * math.cos(angle), 0, 1)[..., None]
    return PILImage.fromarray((start * (1 - share) + end * share).astype(np.uint8))


def _slots(scene: Scene, image_size: int, rng: random.Random) -> list[tuple[Group, tuple[int, int, int, int]]]:
    """The box of every object: group g of G lies in band g along the axis, its members spread across the band."""
    cell = image_size / 3
    bands = len(scene.groups)
    placed = []
    for g, group in enumerate(scene.groups):
        side = int(cell * 0.94 * SIZES[group.size] * scene.zoom)
        along = (g + 0.5) * image_size / bands + rng.uniform(-0.06, 0.06) * image_size
        rows = sorted(rng.sample(range(MAX_COUNT), group.count))
        for row in rows:
            across = (row + 0.5) * cell + rng.uniform(-0.5, 0.5) * (cell - side)
            shifted = along + rng.uniform(-0.03, 0.03) * image_size
            x, y = (shifted, across) if scene.axis == "horizontal" else (across, shifted)
            left = min(max(int(x - side / 2), 0), image_size - side)
            top = min(max(int(y - side / 2), 0), image_size - side)
            placed.append((group, (left, top, left + side, top + side)))
    return placed


def draw_scene(scene: Scene, rng: random.Random, image_size: int = 128) -> tuple[PILImage.Image, np.ndarray]:
    """Draw a scene.

    Args:
        scene (`Scene`): What to draw.
        rng (`random.Random`): Source of the background and of the jitter of positions.
        image_size (`int`, *optional*, defaults to 128): Side in pixels.

    Returns:
        `tuple`: The RGB picture, and the boxes of its objects, float32 `(R, 4)`, xyxy in absolute pixels.
    """
    image = _background(rng, image_size)
    slots = _slots(scene, image_size, rng)
    for group, box in slots:
        side = box[2] - box[0]
        image.paste(_fill(group, side), box[:2], _shape_mask(group.shape, side))
    return image, np.array([box for _, box in slots], np.float32).reshape(-1, 4)


# --- words -----------------------------------------------------------------------------------------------------------


def noun_phrase(group: Group, rng: random.Random, attributes: tuple[str, ...]) -> str:
    """Name a group, e.g. "two small red stars with dots": only the given attributes, in a wording drawn from `rng`."""
    noun = group.shape
    if group.count > 1:
        noun = {"cross": "crosses"}.get(noun, noun + "s")
    before, after = [], []
    if "size" in attributes:
        before.append(group.size)
    if "pattern" in attributes:
        suffix = {"striped": "with stripes", "dotted": "with dots", "checked": "with checks"}.get(group.pattern)
        if suffix and rng.random() < 0.4:
            after.append(suffix)
        else:
            before.append(group.pattern)
    if "colour" in attributes:
        if rng.random() < 0.2:
            after.insert(0, f"in {group.colour}")
        else:
            before.append(group.colour)
    count = COUNT_WORDS[group.count]
    article = rng.choice(("one", "a single")) if "count" in attributes and rng.random() < 0.15 else "a"
    if article == "a" and (before or [noun])[0][0] in "aeiou":
        article = "an"
    return " ".join([article if group.count == 1 else count, *before, noun, *after])


def _join(phrases: list[str]) -> str:
    return phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]


def _chain(phrases: list[str], words: str) -> str:
    return f" {words} ".join(phrases)


RELATIONS: dict[str, tuple[Callable[[list[str]], str], ...]] = {
    "horizontal": (
        lambda p: _chain(p, "to the left of"),
        lambda p: _chain(p[::-1], "to the right of"),
        lambda p: "from left to right : " + _join(p),
        lambda p: f"on the left {p[0]} , then {_join(p[1:])}",
        lambda p: f"{p[-1]} on the right and {_join(p[:-1])} on its left",
    ),
    "vertical": (
        lambda p: _chain(p, "above"),
        lambda p: _chain(p[::-1], "below"),
        lambda p: "from top to bottom : " + _join(p),
        lambda p: f"at the top {p[0]} , then {_join(p[1:])}",
        lambda p: f"{p[-1]} at the bottom and {_join(p[:-1])} over it",
    ),
}

_ALONE: tuple[Callable[[list[str]], str], ...] = (
    lambda p: p[0],
    lambda p: f"a picture of {p[0]}",
    lambda p: f"we see {p[0]}",
    lambda p: f"a drawing of {p[0]}",
    lambda p: f"only {p[0]}",
)


def detailed_captions(scene: Scene, rng: random.Random, n: int = 5) -> list[str]:
    """`n` true sentences of different wording that name every group and their order;
    most attributes, never all left out.
    """
    relations = RELATIONS[scene.axis] if len(scene.groups) > 1 else _ALONE
    captions = []
    for relation in rng.sample(relations, k=min(n, len(relations))) + rng.choices(
        relations, k=max(n - len(relations), 0)
    ):
        phrases = []
        for group in scene.groups:
            left_out = rng.choices(("size", "pattern", None), weights=(4, 1, 5))[0]
            kept = tuple(a for a in ("count", "size", "pattern", "colour") if a != left_out)
            phrases.append(noun_phrase(group, rng, kept))
        captions.append(relation(phrases))
    return captions


def coarse_caption(scene: Scene, rng: random.Random) -> str:
    """One short true sentence, as found on the web: some of the groups, one or two attributes each,
    sometimes their order.
    """
    with_relation = len(scene.groups) > 1 and rng.random() < 0.35
    groups = list(scene.groups)
    if not with_relation:
        rng.shuffle(groups)
    start = rng.randrange(len(groups) - 1) if with_relation else 0
    groups = groups[start : start + (2 if with_relation else rng.choice((1, 2)))]
    phrases = []
    for group in groups:
        attributes = rng.sample(("colour", "pattern", "size"), k=rng.choice((1, 1, 2)))
        phrases.append(noun_phrase(group, rng, tuple(attributes)))
    if with_relation:
        return rng.choice(RELATIONS[scene.axis][:2])(phrases)
    return rng.choice(("{}", "{}", "a picture of {}", "we see {}", "a drawing of {}")).format(_join(phrases))
