"""Render model cards: facts in, Markdown with metadata out.

No number is typed in a template, and none may be missing.
"""

import os
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from PIL import Image
from transformers import PreTrainedModel, pipeline

from modeling_dclip.data.scenes.drawing import draw_scene, random_close_up, random_group
from modeling_dclip.evaluation.reports.metric_names import metric_of
from modeling_dclip.hub.publish.licences import LICENCES

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
    """A picture (`path` inside the repository), the labels to choose from, the right one first,
    and the model's `outputs`, best first.
    """

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


CARDS = Path(__file__).parents[3] / "hub_cards"
SUFFIXES = {"dual": "", "vision": "-vision", "teacher": "-teacher", "clip": "-clip"}
PIPELINES = {
    "dual": "zero-shot-image-classification",
    "vision": "image-feature-extraction",
    "teacher": None,  # no pipeline serves it
    "clip": "zero-shot-image-classification",
}
# The Hub's word for what a kind of benchmark asks.
TASKS = {"retrieval": "image-text-retrieval", "zero_shot": "zero-shot-image-classification"}
NEEDS_EXTRA = "Cards are rendered with jinja2, got {}. Install it with `pip install modeling_dclip[hub]`."


def template_name(family: str, kind: str) -> str:
    """The file of a card's template."""
    return f"{family}{SUFFIXES[kind]}.md.jinja"


def load_jinja() -> Any:
    """The module jinja2, of the extra `hub`.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise ImportError(NEEDS_EXTRA.format(error)) from error
    return jinja2


def render_card(kind: str, facts: Mapping[str, Any], cards: str | os.PathLike | None = None) -> str:
    """Render one card.

    Args:
        kind (`str`): `dual`, `vision`, `teacher` or `clip`.
        facts (`Mapping`): Of [`~modeling_dclip.hub.publish.facts.gather_facts`].
        cards (`str` or `os.PathLike`, *optional*): Folder of the templates; by default `hub_cards` of this checkout.

    Returns:
        `str`: Metadata and Markdown.

    Raises:
        FileNotFoundError: If the template is missing.
        ImportError: If jinja2 is not installed.
        ValueError: If a fact that the template names is missing.
    """
    jinja2 = load_jinja()
    folder, name = Path(cards or CARDS), template_name(facts["family"], kind)
    if not (folder / name).is_file():
        raise FileNotFoundError(
            f"Expected the card's template {name} in '{folder}', got none. Templates come with a checkout of the "
            "repository; give --cards."
        )
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown
    )
    try:
        body = environment.get_template(name).render(**facts, kind=kind, name=facts["repos"][kind].split("/")[1])
    except jinja2.UndefinedError as error:
        raise ValueError(f"Expected all that the card {name} names, got a fact missing: {error}.") from error
    body = re.sub(r"\n{3,}", "\n\n", body).strip()
    return f"---\n{make_metadata(kind, facts).to_yaml()}\n---\n\n{body}\n"


def make_metadata(kind: str, facts: Mapping[str, Any]) -> ModelCardData:
    """The metadata of one card.

    Args:
        kind, facts: As in [`render_card`].

    Returns:
        `ModelCardData`: With licence, base model, `model-index`, widget and emissions, where there are any.
    """
    shows_results = kind != "teacher"
    fields: dict[str, Any] = {
        "language": "en",
        "license": facts["license"],
        "license_name": facts["license_name"],
        "license_link": facts["license_link"],
        "library_name": "transformers",
        "pipeline_tag": PIPELINES[kind],
        "tags": [facts["family"], "clip", "image-text-retrieval", "distillation"],
        "base_model": facts["base_models"] or None,
        "datasets": _hub_datasets(facts["training"]["datasets"]) or None,
    }
    if kind in ("dual", "clip"):
        fields["widget"] = facts["widget"]
    if facts["emissions_grams"] is not None:
        emissions = {
            "emissions": facts["emissions_grams"],
            "training_type": "fine-tuning",
            "hardware_used": facts["hardware"],
        }
        fields["co2_eq_emissions"] = {name: value for name, value in emissions.items() if value is not None}
    if shows_results:
        fields["eval_results"] = make_eval_results(facts["evaluation"]["records"])
        fields["model_name"] = facts["repos"][kind].split("/")[1]
    return ModelCardData(**fields)


def _hub_datasets(specs: list[str]) -> list[str]:
    return list(dict.fromkeys(spec.split(":")[1] for spec in specs if spec.startswith("hub:")))


def make_eval_results(records: list[Mapping[str, Any]]) -> list[EvalResult]:
    """Turn results records into entries of a `model-index`, values as they were measured.

    Args:
        records (`list[dict]`): Of one model. Kinds of benchmark that are no task of the Hub (efficiency, ...) are left
            out.

    Returns:
        `list[EvalResult]`
    """
    results = []
    for record in records:
        kind, _, spec = record["benchmark"].partition("=")
        if kind not in TASKS:
            continue
        shared = {
            "task_type": TASKS[kind],
            "dataset_type": spec.partition(":")[0],
            "dataset_name": spec,
            "dataset_split": record["split"],
            "dataset_revision": record["dataset_fingerprint"],
        }
        for metric, value in record["metrics"].items():
            names = {"metric_type": metric, "metric_name": metric_of(metric).title, "metric_value": value}
            results.append(EvalResult(**shared, **names))
    return results


def check_card(card: str, folder: Path, where: str) -> None:
    """Check a rendered card without network: its metadata can be read back, and the files it shows are there.

    Args:
        card (`str`): Rendered.
        folder (`Path`): Of the repository.
        where (`str`): For messages.

    Raises:
        ValueError: Naming what is wrong.
    """
    data = ModelCard(card).data.to_dict()
    if data.get("license") not in LICENCES or data.get("library_name") != "transformers":
        raise ValueError(f"Expected a known licence and library in the card of {where}, got {data.get('license')!r}.")
    shown = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", card) + [entry["src"] for entry in data.get("widget", [])]
    for path in shown:
        if "://" not in path and not (folder / path).is_file():
            raise ValueError(f"Expected {path}, which the card of {where} shows, in '{folder}', got no such file.")
    for entry in data.get("widget", []):
        labels = entry["candidate_labels"].split(", ")
        if sorted(output["label"] for output in entry["output"]) != sorted(labels):
            raise ValueError(
                f"Expected one stored output a label for {entry['src']} in the card of {where}, got {entry}."
            )
    if leftover := re.search(r"\{\{|\{%|\bUndefined\b", card):
        raise ValueError(f"Expected no trace of the template in the card of {where}, got {leftover[0]!r}.")
