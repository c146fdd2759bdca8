"""Under what licence a model may go out: what it starts from decides with its owner, and the card says so."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from modeling_dclip.configuration_dclip import PRESETS
from modeling_dclip.hub.training_facts import read_arguments

# Ids that the Hub knows and that fit weights; `other` needs a name and a link.
LICENCES = (
    "apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0",
    "cc-by-nc-nd-4.0", "openrail", "bigscience-openrail-m", "creativeml-openrail-m", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "apple-ascl",
    "apple-amlr", "unlicense", "other",
)  # fmt: skip
NON_COMMERCIAL = ("cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0", "apple-amlr", "other")

# Of published weights by the beginning of their Hub id: what binds those who start from them, and the licences that respect it.
WEIGHTS = {
    "openai/clip-": ("OpenAI's CLIP weights are published under MIT.", LICENCES),
    "nvidia/MambaVision": ("MambaVision's weights are for non-commercial use only.", NON_COMMERCIAL),
    "apple/": ("These weights come under a licence of Apple's own.", ("apple-ascl", "apple-amlr", "other")),
}
# Of folders that `hub.convert` wrote, by the licence name in their card.
CONVERTED = {
    "mambavision-non-commercial": WEIGHTS["nvidia/MambaVision"],
    "apple-mobileclip-weights": WEIGHTS["apple/"],
}
# By the kind of a dataset's spec.
DATA = {
    "scenes": "Drawn scenes are made by this package: no terms.",
    "coco": "COCO's annotations are CC-BY-4.0; its photographs are under Flickr's terms.",
    "karpathy": "Karpathy's splits point to COCO (annotations CC-BY-4.0) and Flickr30k (research and education, non-commercial); the "
    "photographs are under Flickr's terms.",
    "flickr30k": "Flickr30k's photographs may be used for non-commercial research and education; they are under Flickr's terms.",
    "conceptual": "Conceptual Captions' texts are free to use; the images belong to the sites they come from.",
}
OTHER_DATA = "The data have terms of their own, which this card does not know."


@dataclass(frozen=True)
class Origin:
    """What a model starts from: a Hub id or a local folder, its `hub_id` if it has one, and what binds because of it."""

    name: str
    hub_id: str | None
    note: str | None
    allowed: tuple[str, ...]


def find_origins(arguments: Mapping[str, Any], base_model: str | None = None) -> list[Origin]:
    """Follow a model's arguments to all weights it starts from, through local folders.

    Args:
        arguments (`Mapping`): Of its training (`arguments.yaml`).
        base_model (`str`, *optional*): Hub id of what it starts from, where that was a local copy.

    Returns:
        `list[Origin]`: Direct ones first; none for a model trained from scratch.

    Raises:
        FileNotFoundError: If a folder is not there any more.
        ValueError: If the arguments in one are damaged.
    """
    trained_from = arguments.get("dmclip") or {}
    names = (
        [trained_from.get("model"), trained_from.get("text_model")] if trained_from else [arguments.get("clip_model")]
    )
    if base_model is not None:
        names = [base_model, *names[1:]]
    origins: list[Origin] = []
    for name in (PRESETS.get(name, name) for name in names if name):
        origins.append(_describe(name))
        if (Path(name) / "arguments.yaml").is_file():
            origins += find_origins(read_arguments(name))
    return origins


def _describe(name: str) -> Origin:
    if not Path(name).is_dir():
        if Path(name).is_absolute() or name.startswith("."):
            raise FileNotFoundError(
                f"Expected the folder '{name}', which the model was trained from, got none: what it is under is not known. Bring it back, or "
                "give --base_model."
            )
        known = next((terms for prefix, terms in WEIGHTS.items() if name.startswith(prefix)), (None, LICENCES))
        return Origin(name, name, *known)
    card = Path(name) / "README.md"
    licence_name = ModelCard.load(card).data.get("license_name") if card.is_file() else None
    return Origin(Path(name).name, None, *CONVERTED.get(licence_name, (None, LICENCES)))


def check_licence(license: str, name: str | None, link: str | None, origins: list[Origin]) -> None:
    """Refuse a licence that the Hub does not know, or that what the model starts from does not allow.

    Raises:
        ValueError: Saying which, and what would do.
    """
    if license not in LICENCES:
        raise ValueError(
            f"license: expected one of {', '.join(LICENCES)}, got {license!r}. Any other is `other` with a name and a link."
        )
    if license == "other" and not (name and link):
        raise ValueError("license 'other': expected license_name and license_link beside it, got none or one of them.")
    for origin in origins:
        if license not in origin.allowed:
            raise ValueError(
                f"license: {origin.name} binds what starts from it ({origin.note}) Expected one of {', '.join(origin.allowed)}, got {license!r}."
            )


def describe_data(specs: list[str]) -> list[str]:
    """The terms of training data, one sentence a kind."""
    return list(dict.fromkeys(DATA.get(spec.partition(":")[0], OTHER_DATA) for spec in specs))
