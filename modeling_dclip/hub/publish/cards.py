"""Model cards: the facts that they show, their example pictures, and how they are rendered and checked.

A template in `hub_cards/` holds the words, [`CardFacts`] the numbers. No number is typed in a template, and a
missing fact is an error.
"""

import os
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from dataclasses import fields as fields_of
from functools import cache
from pathlib import Path
from typing import Any, TypedDict

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from PIL import Image
from transformers import PreTrainedModel, pipeline

from modeling_dclip.data.scenes.drawing import draw_scene, random_close_up, random_group
from modeling_dclip.evaluation.records import Record
from modeling_dclip.evaluation.reports.document import code_markdown, escape_markdown, show_text
from modeling_dclip.evaluation.reports.metric_names import metric_of
from modeling_dclip.hub.publish.licences import LICENCES, Origin
from modeling_dclip.processing_dclip import DCLIPProcessor

EXAMPLES = "examples"  # the folder of the example pictures in a repository
IMAGE_SIZE = 224
# Labels of each example picture. The first is what the picture shows. The others differ from it in colour, in shape,
# or in both.
LABELS = (
    ("red circle", "blue circle", "red square", "green star"),
    ("blue star", "yellow star", "blue heart", "red ring"),
    ("green heart", "pink heart", "green diamond", "black cross"),
)


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

    def to_widget(self) -> dict[str, Any]:
        """The entry of the Hub's `widget` metadata."""
        return {
            "src": self.path,
            "example_title": self.labels[0],
            "candidate_labels": ", ".join(self.labels),
            "output": [dict(output) for output in self.outputs],
        }


class ModelFacts(TypedDict):
    """The sizes of a dual encoder. Numbers of parameters are in millions, rounded to three digits."""

    image_size: int
    patch_size: int | None
    projection_dim: int
    text_length: int
    dtype: str
    image_parameters_millions: str
    text_parameters_millions: str


class TrainingFacts(TypedDict):
    """How a model was trained. `steps`, `epochs` and `minutes` are `None` if training did not record them."""

    section: str
    datasets: list[str]
    uncaptioned: list[str]
    excluded: list[str]
    teachers: list[str]
    reads_teacher: bool
    trains_text: bool
    settings: list[tuple[str, str]]
    steps: int | None
    epochs: float | None
    minutes: float | None


class TeacherFacts(TypedDict):
    """What a teacher reads and how it was trained. `leakage` is a Markdown table, `None` if it was not measured."""

    cross_attention: str
    reads_text: bool
    text_share: float | None
    parameters_millions: str
    training: TrainingFacts
    leakage: str | None


class EvaluationFacts(TypedDict):
    """Results of a model: `table` in Markdown, the `records`, and with what they were measured."""

    table: str
    records: list[Record]
    benchmarks: list[str]
    hardware: str
    versions: str
    has_reference: bool


class CardFacts(TypedDict):
    """Everything that the templates read. `repos` holds the repositories' ids by their kind."""

    family: str
    repos: dict[str, str]
    model: ModelFacts
    training: TrainingFacts
    teacher: TeacherFacts | None
    has_adapter: bool
    evaluation: EvaluationFacts
    examples: list[Example]
    origins: list[Origin]
    base_models: list[str]
    data_terms: list[str]
    license: str
    license_name: str | None
    license_link: str | None
    hardware: str | None
    emissions_grams: float | None


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
        pictures[f"{EXAMPLES}/{labels[0].replace(' ', '-')}.png"] = draw_scene(scene, rng, IMAGE_SIZE)[0]
    return pictures


def make_examples(model: PreTrainedModel, processor: DCLIPProcessor) -> list[Example]:
    """Classify the example pictures with the pipeline that users call.

    Args:
        model (`PreTrainedModel`): A dual encoder.
        processor ([`DCLIPProcessor`]): The model's processor.

    Returns:
        `list[Example]`: Scores in [0, 1], rounded to three digits, for the pipeline's own prompt.
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
        outputs = tuple(Score(label=one["label"], score=round(float(one["score"]), 3)) for one in answers)
        examples.append(Example(path, labels, outputs))
    return examples


def save_pictures(folder: str | Path, paths: Sequence[str]) -> None:
    """Write example pictures below a repository's folder.

    Args:
        folder (`str` or `Path`): The repository's folder.
        paths (`Sequence[str]`): Pictures to write, by their paths inside the repository.
    """
    pictures = draw_pictures()
    for path in paths:
        target = Path(folder) / path
        target.parent.mkdir(parents=True, exist_ok=True)
        pictures[path].save(target, format="PNG", optimize=True)


CARD_TEMPLATES = Path(__file__).parents[3] / "hub_cards"
REPO_SUFFIXES = {"dual": "", "vision": "-vision", "teacher": "-teacher", "clip": "-clip"}
WITH_EXAMPLES = ("dual", "clip")
PIPELINES = {
    "dual": "zero-shot-image-classification",
    "vision": "image-feature-extraction",
    "teacher": None,  # no pipeline serves it
    "clip": "zero-shot-image-classification",
}
# The Hub's name of the task that a kind of benchmark measures.
TASKS = {"retrieval": "image-text-retrieval", "zero_shot": "zero-shot-image-classification"}


def template_name(family: str, kind: str) -> str:
    """The file name of a card's template.

    Example:
        >>> template_name("dclip", "vision")
        'dclip-vision.md.jinja'
    """
    return f"{family}{REPO_SUFFIXES[kind]}.md.jinja"


def render_card(kind: str, facts: CardFacts, templates: str | os.PathLike | None = None) -> str:
    """Render one card.

    Args:
        kind (`str`): `dual`, `vision`, `teacher` or `clip`.
        facts ([`CardFacts`]): What the template reads.
        templates (`str` or `os.PathLike`, *optional*): Folder of the templates; by default `hub_cards` of this
            checkout.

    Returns:
        `str`: Metadata and Markdown.

    Raises:
        FileNotFoundError: If the template is missing.
        ValueError: If a fact that the template reads is missing.
    """
    folder, name = Path(templates or CARD_TEMPLATES), template_name(facts["family"], kind)
    if not (folder / name).is_file():
        raise FileNotFoundError(
            f"Expected the card's template {name} in '{folder}', got none. A checkout of the repository has the "
            "templates; give their folder as --cards."
        )
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown: `text` and `code` escape what comes from files
    )
    environment.filters |= {"text": escape_markdown, "code": code_markdown}
    facts = _show_all(facts)
    try:
        body = environment.get_template(name).render(**facts, kind=kind, name=facts["repos"][kind].split("/")[1])
    except jinja2.UndefinedError as error:
        raise ValueError(
            f"Expected every fact that the card's template {name} reads, got one missing: {error}."
        ) from error
    body = re.sub(r"\n{3,}", "\n\n", body).strip()
    return f"---\n{make_metadata(kind, facts).to_yaml()}\n---\n\n{body}\n"


def _show_all(value: Any) -> Any:
    """Facts as they can be written: see [`~modeling_dclip.evaluation.reports.document.show_text`]."""
    if isinstance(value, str):
        return show_text(value)
    if isinstance(value, Mapping):
        return {show_text(str(name)): _show_all(one) for name, one in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_show_all, value))
    if isinstance(value, (list, tuple)):
        return type(value)(map(_show_all, value))
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{one.name: _show_all(getattr(value, one.name)) for one in fields_of(value)})
    return value


def make_metadata(kind: str, facts: CardFacts) -> ModelCardData:
    """Make the metadata of one card.

    Args:
        kind, facts: As in [`render_card`].

    Returns:
        `ModelCardData`: Licence and tags, and where they exist base models, `model-index`, widget and emissions.
    """
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
    if kind in WITH_EXAMPLES:
        fields["widget"] = [example.to_widget() for example in facts["examples"]]
    if facts["emissions_grams"] is not None:
        emissions = {
            "emissions": facts["emissions_grams"],
            "training_type": "fine-tuning",
            "hardware_used": facts["hardware"],
        }
        fields["co2_eq_emissions"] = {name: value for name, value in emissions.items() if value is not None}
    if kind != "teacher":  # its leakage is no result of a task
        fields["eval_results"] = make_eval_results(facts["evaluation"]["records"])
        fields["model_name"] = facts["repos"][kind].split("/")[1]
    return ModelCardData(**fields)


def _hub_datasets(specs: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(spec.split(":")[1] for spec in specs if spec.startswith("hub:")))


def make_eval_results(records: Sequence[Record]) -> list[EvalResult]:
    """Turn results records into entries of a `model-index`, with the measured values.

    Args:
        records (`Sequence[Record]`): Records of one model. Benchmarks whose kind is not a task of the Hub
            (efficiency, ...) are left out.

    Returns:
        `list[EvalResult]`: One for each metric of each record.
    """
    results = []
    for record in records:
        kind, _, spec = record["benchmark"].partition("=")
        if kind not in TASKS:
            continue
        shared: dict[str, Any] = {
            "task_type": TASKS[kind],
            "dataset_type": spec.partition(":")[0],
            "dataset_name": spec,
            "dataset_split": record["split"],
            "dataset_revision": record["dataset_fingerprint"],
        }
        for metric, value in record["metrics"].items():
            title = metric_of(metric).title
            results.append(EvalResult(**shared, metric_type=metric, metric_name=title, metric_value=value))
    return results


def check_card(card: str, folder: Path, where: str) -> None:
    """Check a rendered card without a network: its metadata can be read back, and the files that it shows exist.

    Args:
        card (`str`): The rendered card.
        folder (`Path`): The repository's folder.
        where (`str`): The repository's id, for messages.

    Raises:
        ValueError: If the licence, a stored output or a shown file is missing, or a template's tag is left.
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
                f"Expected one stored output for each label of {entry['src']} in the card of {where}, got {entry}."
            )
    if leftover := re.search(r"\{\{|\{%|\bUndefined\b", card):
        raise ValueError(f"Expected no tag of the template in the card of {where}, got {leftover[0]!r}.")
