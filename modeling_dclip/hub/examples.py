"""Pictures for a card, drawn here, with what the model says about them: the page then shows an answer without running the model."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import PreTrainedModel, pipeline

from modeling_dclip.data.scene_drawing import draw_scene, random_close_up, random_group

FOLDER = "examples"
IMAGE_SIZE = 224
# What is in the picture first; each of the others differs from it in colour, in shape, or in both.
LABELS = (
    ("red circle", "blue circle", "red square", "green star"),
    ("blue star", "yellow star", "blue heart", "red ring"),
    ("green heart", "pink heart", "green diamond", "black cross"),
)


@dataclass(frozen=True)
class Example:
    """A picture (`path` inside the repository), the labels to choose from, the right one first, and the model's `outputs`, best first."""

    path: str
    labels: tuple[str, ...]
    outputs: tuple[dict[str, Any], ...]

    def to_widget(self) -> dict[str, Any]:
        """As the Hub's metadata have it."""
        return {
            "src": self.path,
            "example_title": self.labels[0],
            "candidate_labels": ", ".join(self.labels),
            "output": [dict(output) for output in self.outputs],
        }


@cache
def draw_pictures() -> dict[str, Image.Image]:
    """Draw the pictures, always the same, by their paths inside a repository."""
    pictures = {}
    for labels in LABELS:
        rng = random.Random(f"card/{labels[0]}")
        colour, shape = labels[0].split()
        group = replace(random_group(rng), colour=colour, shape=shape, pattern="plain", size="large", count=1)
        scene = random_close_up(rng, group)
        pictures[f"{FOLDER}/{labels[0].replace(' ', '-')}.png"] = draw_scene(scene, rng, IMAGE_SIZE)[0]
    return pictures


def make_examples(model: PreTrainedModel, processor: Any) -> list[Example]:
    """Ask a dual encoder about the pictures, through the pipeline that its users call.

    Args:
        model (`PreTrainedModel`): A dual encoder.
        processor ([`DCLIPProcessor`]): The model's.

    Returns:
        `list[Example]`: Scores in [0, 1] to three digits, of the pipeline's own prompt.
    """
    classify = pipeline(
        "zero-shot-image-classification",
        model=model,
        tokenizer=processor.tokenizer,
        image_processor=processor.image_processor,
    )
    examples = []
    for (path, image), labels in zip(draw_pictures().items(), LABELS, strict=True):
        answers = classify(image, candidate_labels=list(labels))
        outputs = tuple({"label": answer["label"], "score": round(float(answer["score"]), 3)} for answer in answers)
        examples.append(Example(path, labels, outputs))
    return examples


def save_pictures(folder: str | Path, paths: Sequence[str]) -> None:
    """Write pictures, by their paths inside a repository, below a folder."""
    pictures = draw_pictures()
    for path in paths:
        target = Path(folder) / path
        target.parent.mkdir(parents=True, exist_ok=True)
        pictures[path].save(target, format="PNG", optimize=True)
