"""Render model cards: facts in, Markdown with metadata out. No number is typed in a template, and none may be missing."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from modeling_dclip.evaluation.metric_names import metric_of
from modeling_dclip.hub.licences import LICENCES

CARDS = Path(__file__).parents[2] / "hub_cards"
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
        facts (`Mapping`): Of [`~modeling_dclip.hub.card_facts.gather_facts`].
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
            f"Expected the card's template {name} in '{folder}', got none. Templates come with a checkout of the repository; give --cards."
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
        records (`list[dict]`): Of one model. Kinds of benchmark that are no task of the Hub (efficiency, ...) are left out.

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
