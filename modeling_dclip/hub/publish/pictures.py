"""The example pictures of a card: drawn here, or given by the publisher; never taken from one's own data unasked.

| training data | pictures without `--examples` |
|---|---|
| drawn scenes among them | pictures that this package draws; they have no terms |
| anything else | none: whether pictures may be published is for the publisher to say |
"""

import copy
import io
import random
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import torch
from PIL import Image

from modeling_dclip.data.captions import load_captions, parse_caption_spec
from modeling_dclip.data.files import write_bytes
from modeling_dclip.data.images import decode_image, find_images, has_image_suffix, open_image
from modeling_dclip.data.scenes.drawing import draw_scene, random_close_up, random_group
from modeling_dclip.encoders.families import SIGMOID_TRAINED, counting_cuts
from modeling_dclip.evaluation.embedding import embed_query
from modeling_dclip.hub.publish.training import describe_source, find_overlaps, show_spec

EXAMPLES = "examples"  # the folder of the example pictures in a repository
NO_EXAMPLES = "none"
PROMPT = "This is a photo of {}."  # of transformers' zero-shot pipeline
IMAGE_SIZE = 224  # of a drawn picture
LONGEST_SIDE, QUALITY = 384, 90  # of a given picture, in pixels, and of its JPEG
MOST_PICTURES, DRAWN_FROM_SPEC, LABELS_EACH = 12, 4, 4
# Labels of each drawn picture. The first is what the picture shows. The others differ from it in colour, in shape,
# or in both.
LABELS = (
    ("red circle", "blue circle", "red square", "green star"),
    ("blue star", "yellow star", "blue heart", "red ring"),
    ("green heart", "pink heart", "green diamond", "black cross"),
)
# A file's name that only counts: `IMG_0012`, `DSC00123`, `20240101_120000`.
_CAMERA = re.compile(r"(?:(?:img|dsc|dscn|dscf|pxl|mvimg|image|photo|picture|pict|screenshot|wp|p)(?![a-z]))?[\W\d_]*")


class Score(TypedDict):
    """A label and the model's score of it, in [0, 1]."""

    label: str
    score: float


@dataclass(frozen=True)
class Example:
    """A picture that the model classified.

    Args:
        path (`str`): The picture's file inside the repository.
        labels (`tuple[str, ...]`): The labels to choose from, the right one first.
        outputs (`tuple[Score, ...]`): The model's scores, best first.
    """

    path: str
    labels: tuple[str, ...]
    outputs: tuple[Score, ...]

    def to_widget(self) -> dict[str, Any] | None:
        """The entry of the Hub's `widget` metadata; `None` if a label has a comma, where the widget would cut it."""
        if any("," in label for label in self.labels):
            return None
        return {
            "src": self.path,
            "example_title": self.labels[0],
            "candidate_labels": ", ".join(self.labels),
            "output": [dict(output) for output in self.outputs],
        }


class Pictures(NamedTuple):
    """The pictures that a card shows.

    Attributes:
        files (`Mapping[str, bytes]`): Encoded, by their paths inside a repository.
        labels (`Sequence[tuple[str, ...]]`): For each picture the labels to choose from, the right one first.
        source (`str`): Where they come from, one sentence; empty if there are none.
    """

    files: Mapping[str, bytes]
    labels: Sequence[tuple[str, ...]]
    source: str


@cache
def draw_pictures() -> dict[str, Image.Image]:
    """Draw the example pictures, the same ones every time.

    Returns:
        `dict[str, Image.Image]`: RGB pictures by their paths inside a repository.
    """
    pictures = {}
    for labels in LABELS:
        rng = random.Random(f"card/{labels[0]}")
        colour, shape = labels[0].split()
        group = replace(random_group(rng), colour=colour, shape=shape, pattern="plain", size="large", count=1)
        scene = random_close_up(rng, group)
        pictures[_file_name(labels[0], ".png")] = draw_scene(scene, rng, IMAGE_SIZE)[0]
    return pictures


def choose_pictures(asked: Sequence[str], training: Sequence[str]) -> Pictures:
    """Take the pictures that were asked for, or else those that need nobody's leave.

    A given picture is scaled to at most 384 pixels a side and written anew, without EXIF: neither place nor camera.

    Args:
        asked (`Sequence[str]`): Picture files named as what they show, folders of such, or specs of captioned images;
            `["none"]` for none; empty for the rule at the top.
        training (`Sequence[str]`): Specs of the training data.

    Returns:
        [`Pictures`]

    Raises:
        FileNotFoundError: If a file or folder is missing.
        ValueError: If a picture cannot be read, a name or caption says nothing, there are too few or too many, or a
            spec is wrong.
    """
    if list(asked) == [NO_EXAMPLES]:
        return Pictures({}, (), "")
    if not asked:
        if not any(spec.startswith("scenes:") for spec in training):
            return Pictures({}, (), "")
        files = {path: _encode(image, "PNG") for path, image in draw_pictures().items()}
        return Pictures(files, LABELS, "The pictures are drawn by modeling_dclip, as a part of the training data is.")
    found: list[tuple[str, Image.Image]] = []
    sources = []
    for word in asked:
        shown, source = _read_files(word) if Path(word).exists() else _read_spec(word, training)
        found += shown
        sources.append(source)
    if not 2 <= len({text for text, _ in found}) <= len(found) <= MOST_PICTURES:
        raise ValueError(
            f"examples: expected 2 to {MOST_PICTURES} pictures with different texts, for the model to choose from, "
            f"got {len(found)} with {len({text for text, _ in found})}. Name other files, or a spec that ends in @4."
        )
    texts = list(dict.fromkeys(text for text, _ in found))
    files, labels = {}, []
    for text, image in found:
        image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
        files[_file_name(text, ".jpg", files)] = _encode(image, "JPEG")
        place = texts.index(text)
        labels.append(tuple((texts[place:] + texts[:place])[:LABELS_EACH]))
    return Pictures(files, labels, " ".join(dict.fromkeys(sources)))


def _read_files(word: str) -> tuple[list[tuple[str, Image.Image]], str]:
    """A picture file, or those of a folder, with the texts that their names say."""
    paths = find_images(word).files if Path(word).is_dir() else [Path(word)]
    if not paths or not all(map(has_image_suffix, paths)):
        raise ValueError(f"examples: expected a picture or a folder of pictures at '{word}', got none.")
    if len(paths) > MOST_PICTURES:
        raise ValueError(f"examples: expected at most {MOST_PICTURES} pictures, got {len(paths)} in '{word}'.")
    shown = []
    for path in paths:
        text = " ".join(re.sub(r"[-_]+", " ", path.stem).split())
        if _CAMERA.fullmatch(path.stem.lower()):
            raise ValueError(
                f"examples: expected a file named as what it shows, such as 'a-red-bicycle.jpg', got '{path.name}'. "
                "The name is the text that the card shows. Or name captioned images: csv:TABLE.csv:FOLDER@4."
            )
        shown.append((text, open_image(path, f"The example '{path.name}'")))
    return shown, "The publisher chose the pictures and named them."


def _read_spec(word: str, training: Sequence[str]) -> tuple[list[tuple[str, Image.Image]], str]:
    """Captioned images of a dataset, each with its first caption."""
    if ":" not in word:
        raise FileNotFoundError(
            "examples: expected a picture, a folder of pictures or a spec such as csv:TABLE.csv:FOLDER@4, got "
            f"'{word}', where nothing is."
        )
    spec = parse_caption_spec(word if re.search(r"@\d+$", word) else f"{word}@{DRAWN_FROM_SPEC}")
    rows = load_captions(spec)
    shown = [(" ".join(rows[row]["captions"][0].split()), decode_image(rows, row)) for row in range(len(rows))]
    words = describe_source(show_spec(word)).words
    seen = " Training read the same data." if find_overlaps([f"={word}"], training) else ""
    return shown, f"The publisher chose the pictures and their captions from {words}.{seen}"


def _file_name(text: str, suffix: str, taken: Mapping[str, bytes] | None = None) -> str:
    """A path inside the repository that says what the picture shows, unlike those that are taken."""
    words = re.sub(r"[^a-z0-9]+", " ", text.lower()).strip()[:200]
    plain = textwrap.shorten(words, 40, placeholder="").replace(" ", "-") or "picture"
    number = 1
    while (path := f"{EXAMPLES}/{plain}{'' if number == 1 else f'-{number}'}{suffix}") in (taken or {}):
        number += 1
    return path


def _encode(image: Image.Image, form: str) -> bytes:
    stream = io.BytesIO()
    bare = Image.new("RGB", image.size)  # carries nothing over but pixels
    bare.paste(image)
    bare.save(stream, form, optimize=True, **({"quality": QUALITY} if form == "JPEG" else {}))
    return stream.getvalue()


def make_examples(model: Any, processor: Any, pictures: Pictures) -> list[Example]:
    """Classify the example pictures, with the words and the scores of transformers' zero-shot pipeline.

    Texts are read as the model's family reads them, so that long ones are cut.

    Args:
        model (`PreTrainedModel`): A dual encoder.
        processor: The model's processor.
        pictures ([`Pictures`]): What to classify.

    Returns:
        `list[Example]`: Scores in [0, 1], rounded to three digits. Those of a SigLIP stand alone; those of other
            families are shares of 1.
    """
    # A call leaves padding and truncation in a tokenizer, and with it in the files that are published.
    tokenizer, bias = copy.deepcopy(processor.tokenizer), getattr(model, "logit_bias", 0.0)
    examples = []
    for (path, content), labels in zip(pictures.files.items(), pictures.labels, strict=True):
        with counting_cuts():
            texts = torch.cat([embed_query(model, tokenizer, PROMPT.format(label)) for label in labels])
        cosines = (embed_query(model, processor, open_image(content)) @ texts.T)[0]
        logits = cosines * model.logit_scale.detach().exp() + bias
        alone = model.config.model_type in SIGMOID_TRAINED
        scores = (logits.sigmoid() if alone else logits.softmax(dim=-1)).tolist()
        best = sorted(zip(labels, scores, strict=True), key=lambda one: -one[1])
        examples.append(Example(path, labels, tuple(Score(label=name, score=round(score, 3)) for name, score in best)))
    return examples


def save_pictures(folder: str | Path, files: Mapping[str, bytes]) -> None:
    """Write example pictures below a repository's folder.

    Args:
        folder (`str` or `Path`): The repository's folder.
        files (`Mapping[str, bytes]`): Of [`Pictures`].
    """
    for path, content in files.items():
        write_bytes(Path(folder) / path, content)
