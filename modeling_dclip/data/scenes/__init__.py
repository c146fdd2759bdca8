"""Drawn scenes: a deterministic, offline, fine-grained image-text dataset, and a single-object set with class names.

A scene holds two or three *groups* of equal objects (shape, colour, pattern, size, count) in an order from left to
right or from top to bottom. Scenes come in *families*: one scene and siblings that differ in one respect only (two
colours swapped, two patterns swapped, the order reversed, one count changed). A bag of words cannot tell siblings
apart, so retrieval needs attribute binding, counting and left/right.

Every scene has one *coarse* caption (a few true words, as on the web) and several *detailed* ones of different
wording. Nothing is downloaded; the same split, seed and index give the same pixels and sentences on every machine.
"""

import io
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from tqdm.auto import tqdm
from transformers import CLIPTokenizer

from modeling_dclip.data.scenes.drawing import (
    COLOURS,
    SHAPES,
    Scene,
    coarse_caption,
    detailed_captions,
    draw_scene,
    random_close_up,
    random_group,
    random_scene,
    siblings,
)
from modeling_dclip.data.scenes.hard_negatives import hard_negatives
from modeling_dclip.data.specs import PART, SEED, Range

MOST_SCENES = Range(1, 10**7, whole=True)
SIDES = Range(8, 2**12, whole=True)  # of a drawn image, in pixels
SPLITS = ("pretrain", "train", "validation", "test")
CAPTION_KINDS = ("coarse", "detailed")

CLASS_NAMES = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
TEMPLATES = ("a {}", "a picture of a {}", "a drawing of a {}", "one {}", "we see a {}")


def encode_png(image: PILImage.Image) -> dict[str, Any]:
    """A picture as `datasets.Image` stores it, lossless."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return {"bytes": buffer.getvalue(), "path": None}


def check_request(split: str, n: int) -> None:
    """Refuse an unknown split or an empty set.

    Raises:
        ValueError: Naming what was asked for.
    """
    if split not in SPLITS:
        raise ValueError(f"Expected a split of the drawn scenes, one of {SPLITS}, got {split!r}.")
    if n < 1:
        raise ValueError(f"Expected at least one drawn scene, got n={n}.")
    MOST_SCENES.check(n, "n")


def iterate_scenes(
    split: str, n: int, seed: int, singles: float = 0.0, max_siblings: int = 3
) -> Iterator[tuple[Scene, random.Random]]:
    """Yield `(scene, rng)` for `n` scenes, family after family: a scene and at most `max_siblings` that differ from it
    in one respect.

    A share `singles` of the families is one group alone.
    """
    produced, family = 0, 0
    while produced < n:
        rng = random.Random(f"scenes/{split}/{seed}/{family}")
        alone = rng.random() < singles
        members = (
            [random_close_up(rng, random_group(rng))]
            if alone
            else siblings(random_scene(rng), rng)[: 1 + max_siblings]
        )
        for scene in members[: n - produced]:
            yield scene, rng
            produced += 1
        family += 1


def load_scenes(
    split: str,
    *,
    n: Annotated[int, MOST_SCENES] = 1000,
    seed: Annotated[int, SEED] = 0,
    captions: str = "detailed",
    captions_per_image: Annotated[int, Range(1, 1000, whole=True)] = 5,
    image_size: Annotated[int, SIDES] = 128,
    singles: Annotated[float, PART] = 0.0,
    max_siblings: Annotated[int, Range(0, 1000, whole=True)] = 3,
    negatives: bool = False,
) -> Dataset:
    """Draw a split of the scenes.

    Splits never share a random stream. The scenes of a family follow each other.

    Args:
        split (`str`): `"pretrain"`, `"train"`, `"validation"` or `"test"`.
        n (`int`, *optional*, defaults to 1000): Number of images.
        seed (`int`, *optional*, defaults to 0): Another seed is another dataset.
        captions (`str`, *optional*, defaults to `"detailed"`): `"detailed"` (`captions_per_image` sentences) or
            `"coarse"` (one).
        captions_per_image (`int`, *optional*, defaults to 5): Number of detailed captions.
        image_size (`int`, *optional*, defaults to 128): Side of the stored image in pixels.
        singles (`float`, *optional*, defaults to 0.0): Share of families that hold one group only, in [0, 1].
        max_siblings (`int`, *optional*, defaults to 3): Scenes beside each that differ from it in one respect only, at
            most; 0 makes all scenes independent. The more there are, the more of the problem is telling them apart.
        negatives (`bool`, *optional*, defaults to `False`): A column `negatives` of sentences that are false of the
            scene in one respect each, see [`~modeling_dclip.data.scenes.hard_negatives`]. A single group has none.

    Returns:
        `datasets.Dataset`: Columns `image_id`, `image`, `captions`, `coarse_caption`, `boxes` float32 (R, 4) xyxy in
            pixels, `box_scores` float32 (R,), all 1; maybe `negatives`.

    Raises:
        ValueError: If the split or the kind of captions is unknown, `n < 1` or `max_siblings < 0`.

    Example:
        >>> load_scenes("test", n=2)[0]["image"].size
        (128, 128)
    """
    check_request(split, n)
    SIDES.check(image_size, "image_size")
    if captions not in CAPTION_KINDS:
        raise ValueError(f"Expected captions to be one of {CAPTION_KINDS}, got {captions!r}.")
    if max_siblings < 0:
        raise ValueError(f"Expected max_siblings >= 0, got {max_siblings}.")
    columns: dict[str, list[Any]] = {
        name: [] for name in ("image_id", "image", "captions", "coarse_caption", "boxes", "box_scores")
    }
    if negatives:
        columns["negatives"] = []
    scenes = iterate_scenes(split, n, seed, singles, max_siblings)
    for index, (scene, rng) in enumerate(tqdm(scenes, total=n, desc=f"Drawing scenes ({split})", unit="image")):
        image, boxes = draw_scene(scene, rng, image_size)
        coarse = coarse_caption(scene, rng)
        columns["image_id"].append(f"scenes-{split}-{seed}-{index}")
        columns["image"].append(encode_png(image))
        columns["captions"].append(
            [coarse] if captions == "coarse" else detailed_captions(scene, rng, captions_per_image)
        )
        columns["coarse_caption"].append(coarse)
        columns["boxes"].append(boxes)
        columns["box_scores"].append(np.ones(len(boxes), np.float32))
        if negatives:
            false = {}
            if len(scene.groups) > 1:  # of a source of its own, so that pictures and captions are the same without
                false = hard_negatives(scene, random.Random(f"false captions/{split}/{seed}/{index}"))[1]
            columns["negatives"].append(list(false.values()))
    features = Features(
        image_id=Value("string"),
        image=Image(),
        captions=List(Value("string")),
        coarse_caption=Value("string"),
        boxes=List(List(Value("float32"), length=4)),
        box_scores=List(Value("float32")),
        **({"negatives": List(Value("string"))} if negatives else {}),
    )
    return Dataset.from_dict(columns, features=features)


def load_single_objects(
    split: str,
    *,
    n: Annotated[int, MOST_SCENES] = 1024,
    seed: Annotated[int, SEED] = 0,
    image_size: Annotated[int, SIDES] = 128,
) -> Dataset:
    """Draw one object an image, for zero-shot classification into [`CLASS_NAMES`] (colour and shape; the rest varies
    freely).

    Args:
        split (`str`): As in [`load_scenes`].
        n (`int`, *optional*, defaults to 1024): Number of images; classes take turns.
        seed (`int`, *optional*, defaults to 0): Another seed is another dataset.
        image_size (`int`, *optional*, defaults to 128): Side of the stored image in pixels.

    Returns:
        `datasets.Dataset`: Columns `image_id`, `image`, `label` (`ClassLabel` over [`CLASS_NAMES`]).

    Raises:
        ValueError: If the split is unknown or `n < 1`.
    """
    check_request(split, n)
    SIDES.check(image_size, "image_size")
    columns: dict[str, list[Any]] = {"image_id": [], "image": [], "label": []}
    for index in tqdm(range(n), desc=f"Drawing single objects ({split})", unit="image"):
        rng = random.Random(f"single/{split}/{seed}/{index}")
        label = index % len(CLASS_NAMES)
        colour, shape = CLASS_NAMES[label].split()
        group = replace(random_group(rng), colour=colour, shape=shape, count=1)
        columns["image_id"].append(f"single-{split}-{seed}-{index}")
        columns["image"].append(encode_png(draw_scene(random_close_up(rng, group), rng, image_size)[0]))
        columns["label"].append(label)
    features = Features(image_id=Value("string"), image=Image(), label=ClassLabel(names=list(CLASS_NAMES)))
    return Dataset.from_dict(columns, features=features)


def train_tokenizer(
    sentences: Iterable[str] | None = None, *, vocab_size: int = 512, model_max_length: int = 48
) -> CLIPTokenizer:
    """Train a byte-pair tokenizer of CLIP's form on few words, so that a small CLIP stays small.

    Args:
        sentences (`Iterable[str]`, *optional*): What to train on; the drawn scenes' own sentences if none are given.
        vocab_size (`int`, *optional*, defaults to 512): Tokens, special ones included; 512 hold every word of the
            scenes whole.
        model_max_length (`int`, *optional*, defaults to 48): Longest sequence in tokens, BOS and EOS included.

    Returns:
        `CLIPTokenizer`: With BOS, EOS and padding (= EOS) as CLIP's.
    """
    if sentences is None:
        sentences = [template.format(name) for template in TEMPLATES for name in CLASS_NAMES]
        for scene, rng in iterate_scenes("pretrain", 2000, seed=0, singles=0.3):
            sentences += [*detailed_captions(scene, rng), coarse_caption(scene, rng)]
    sentences = list(sentences)
    clip = CLIPTokenizer()
    backend = clip.backend_tokenizer
    words = {
        word
        for sentence in set(sentences)
        for word, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(sentence))
    }
    # The trainer numbers characters in the order of a hash map, another one every time, and breaks ties by number.
    # Named as special tokens they are numbered first, in this order.
    characters = [*sorted(ByteLevel.alphabet()), *sorted({f"{word[-1]}</w>" for word in words})]
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[clip.bos_token, clip.eos_token, *characters],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    backend.train_from_iterator(sentences, trainer)
    learned = json.loads(backend.to_str())["model"]
    merges: Any = [tuple(merge) for merge in learned["merges"]]
    return CLIPTokenizer(vocab=learned["vocab"], merges=merges, model_max_length=model_max_length)
