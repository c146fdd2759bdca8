"""Model cards: the facts that they show, and how they are rendered and checked.

A template in `hub_cards/` holds the words, [`CardFacts`] the numbers. No number is typed in a template, and a
missing fact is an error.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields as fields_of
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from modeling_dclip.data.captions.parts import HELD_OUT
from modeling_dclip.evaluation.records import Record
from modeling_dclip.evaluation.reports.document import code_markdown, escape_markdown, show_text
from modeling_dclip.evaluation.reports.metric_names import metric_of
from modeling_dclip.hub.publish.evaluation import EvaluationFacts
from modeling_dclip.hub.publish.licences import LICENCES, Origin
from modeling_dclip.hub.publish.pictures import Example
from modeling_dclip.hub.publish.training import TrainingFacts, describe_source
from modeling_dclip.progress import count_of


class ModelFacts(TypedDict):
    """The sizes of a dual encoder. Numbers of parameters are in millions, rounded to three digits.

    Its weights are published in `dtype`; training saved them in `saved_dtype`. `words` say what it is; a model of
    transformers' own has its `class_name`. A stock CLIP is read by transformers without the code beside it. `reading`
    is what the processor is told of texts, in the cards' code. `uses_sigmoid` says whether each score stands alone.
    """

    words: str
    class_name: str | None
    is_stock_clip: bool
    needs_code: bool
    reading: str
    uses_sigmoid: bool
    has_pipeline: bool
    image_size: int | None
    patch_size: int | None
    projection_dim: int
    text_length: int
    dtype: str
    saved_dtype: str
    image_parameters_millions: str
    text_parameters_millions: str


class TeacherFacts(TypedDict):
    """What a teacher reads and how it was trained. `leakage` is a Markdown table, `None` if it was not measured."""

    cross_attention: str
    reads_text: bool
    text_share: float | None
    parameters_millions: str
    training: TrainingFacts
    leakage: str | None


class NamedDataset(NamedTuple):
    """A dataset that the publisher names: in words, and by its id on the Hub if the name is one."""

    name: str
    hub_id: str | None


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
    examples_source: str
    datasets: list[NamedDataset]
    languages: list[str]
    origins: list[Origin]
    base_models: list[str]
    data_terms: list[str]
    license: str
    license_name: str | None
    license_link: str | None
    hardware: str | None
    emissions_grams: float | None


CARD_TEMPLATES = Path(__file__).parents[3] / "hub_cards"
REPO_SUFFIXES = {"dual": "", "vision": "-vision", "teacher": "-teacher"}
WITH_EXAMPLES = ("dual",)
MOST_LETTERS_SHOWN = 72  # of a label in the table of examples
PIPELINES = {
    "dual": "zero-shot-image-classification",
    "vision": "image-feature-extraction",
    "teacher": None,  # no pipeline serves it
}
# The Hub's name of the task that a kind of benchmark measures.
TASKS = {"retrieval": "image-text-retrieval", "zero_shot": "zero-shot-image-classification"}


def template_name(family: str, kind: str) -> str:
    """The file name of a card's template. All teachers have the same.

    Example:
        >>> template_name("dclip", "vision")
        'dclip-vision.md.jinja'
    """
    return f"{'dclip' if kind == 'teacher' else family}{REPO_SUFFIXES[kind]}.md.jinja"


def render_card(kind: str, facts: CardFacts, templates: str | os.PathLike | None = None) -> str:
    """Render one card.

    Args:
        kind (`str`): `dual`, `vision` or `teacher`.
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
    environment.filters |= {
        "text": escape_markdown,
        "code": code_markdown,
        "alt": _alternative_text,
        "strong": _strong,
        "short": _short,
    }
    facts = _show_all(facts)
    try:
        body = environment.get_template(name).render(**facts, kind=kind, name=facts["repos"][kind].split("/")[1])
    except jinja2.UndefinedError as error:
        raise ValueError(
            f"Expected every fact that the card's template {name} reads, got one missing: {error}."
        ) from error
    body = re.sub(r"\n{3,}", "\n\n", body).strip()
    return f"---\n{make_metadata(kind, facts).to_yaml()}\n---\n\n{body}\n"


def _strong(text: str) -> str:
    """Text in bold; asterisks in it do not end that."""
    return f"**{escape_markdown(text).strip().replace('*', '&#42;')}**"


def _short(text: str) -> str:
    """The beginning of a long text, for a cell of a table."""
    if len(text) <= MOST_LETTERS_SHOWN:
        return text
    begun = text[: MOST_LETTERS_SHOWN - 1]
    return (begun.rpartition(" ")[0] or begun[:-1]).rstrip(" ,.;:") + " …"


def _alternative_text(text: str) -> str:
    """Text in the brackets of a picture inside a table."""
    return re.sub(r"\\?[\[\]]", " ", escape_markdown(text, in_table=True))


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
        "language": facts["languages"] or None,
        "license": facts["license"],
        "license_name": facts["license_name"],
        "license_link": facts["license_link"],
        "library_name": "transformers",
        "pipeline_tag": PIPELINES[kind] if kind != "dual" or facts["model"]["has_pipeline"] else None,
        "tags": _make_tags(kind, facts),
        "base_model": facts["base_models"] or None,
        "datasets": list_datasets(facts) or None,
    }
    if kind in WITH_EXAMPLES:
        widgets = [example.to_widget() for example in facts["examples"]]
        fields["widget"] = [entry for entry in widgets if entry is not None] or None
    if facts["emissions_grams"] is not None:
        emissions = {
            "emissions": facts["emissions_grams"],
            "training_type": "fine-tuning",
            "hardware_used": facts["hardware"],
        }
        fields["co2_eq_emissions"] = {name: value for name, value in emissions.items() if value is not None}
    if kind != "teacher":  # its leakage is no result of a task
        fields["eval_results"] = make_eval_results(facts["evaluation"]["records"], facts["evaluation"]["held_out"])
        fields["model_name"] = facts["repos"][kind].split("/")[1]
    return ModelCardData(**fields)


def _make_tags(kind: str, facts: CardFacts) -> list[str]:
    """Tags of the Hub: what the model is, and distillation and adapters where there were any."""
    training = facts["training"]
    learned = training["reads_teacher"] or kind == "teacher"
    words = ["distillation"] * learned + ["lora"] * (training["uses_adapter"] and kind != "teacher")
    ours = [facts["family"]] if kind == "teacher" or facts["model"]["class_name"] is None else []
    return [*ours, "clip", "image-text-retrieval", *words]


def list_datasets(facts: CardFacts) -> list[str]:
    """The ids of the training data on the Hub: those that the publisher named, and those that training read there."""
    read = [spec.split(":")[1] for spec in facts["training"]["specs"] if spec.startswith("hub:")]
    return list(dict.fromkeys([*(one.hub_id for one in facts["datasets"] if one.hub_id), *read]))


def make_eval_results(records: Sequence[Record], held_out: Sequence[str] = ()) -> list[EvalResult]:
    """Turn results records into entries of a `model-index`, with the measured values.

    Args:
        records (`Sequence[Record]`): Records of one model. Benchmarks whose kind is not a task of the Hub
            (efficiency, ...) are left out.
        held_out (`Sequence[str]`, *optional*): The benchmarks whose images the model's own run held out.

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
            "dataset_name": _name_data(record, held_out),
            "dataset_split": record["split"],
            "dataset_revision": record["dataset_fingerprint"],
        }
        for metric, value in record["metrics"].items():
            title = metric_of(metric).title
            results.append(EvalResult(**shared, metric_type=metric, metric_name=title, metric_value=value))
    return results


def _name_data(record: Record, held_out: Sequence[str]) -> str:
    """What a benchmark's data are called in the metadata: words, without folders."""
    spec = record["benchmark"].partition("=")[2]
    if not spec.startswith(f"{HELD_OUT}:"):
        return describe_source(spec).words
    whose = "the training data" if record["benchmark"] in held_out else "a run's data"
    return f"held-out part of {whose} ({count_of(record['n'], 'image')})"


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
