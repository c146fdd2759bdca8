"""The licence of a publication: what the model was trained from, and which licences that allows."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from modeling_dclip.configuration_dclip import PRESETS
from modeling_dclip.data.files import read_yaml

# Ids that the Hub knows and that fit weights. `other` needs a name and a link.
LICENCES = (
    "apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0",
    "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0", "openrail", "bigscience-openrail-m", "creativeml-openrail-m", "gpl-3.0",
    "lgpl-3.0", "agpl-3.0", "apple-ascl", "apple-amlr", "unlicense", "other",
)  # fmt: skip
NON_COMMERCIAL = ("cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0", "apple-amlr", "other")

# The terms of weights: a sentence for the card, and the licences that a model trained from them may have.
LicenceTerms = tuple[str | None, tuple[str, ...]]
NO_TERMS: LicenceTerms = (None, LICENCES)
# Published weights, by the beginning of their Hub id.
PUBLISHED_WEIGHTS: dict[str, LicenceTerms] = {
    "openai/clip-": ("OpenAI's CLIP weights are published under MIT.", LICENCES),
    "nvidia/MambaVision": ("MambaVision's weights are for non-commercial use only.", NON_COMMERCIAL),
    "apple/": ("These weights are under a licence of Apple's own.", ("apple-ascl", "apple-amlr", "other")),
}
# Folders that `hub.convert` wrote, by the licence name in their card.
CONVERTED = {
    "mambavision-non-commercial": PUBLISHED_WEIGHTS["nvidia/MambaVision"],
    "apple-mobileclip-weights": PUBLISHED_WEIGHTS["apple/"],
}
# The terms of training data, by the kind of the dataset's spec.
DATA_TERMS = {
    "scenes": "The drawn scenes are made by this package and come without terms.",
    "coco": "COCO's annotations are under CC-BY-4.0; its photographs are under Flickr's terms.",
    "karpathy": (
        "Karpathy's splits point to COCO (annotations under CC-BY-4.0) and Flickr30k (for non-commercial research and "
        "education); the photographs are under Flickr's terms."
    ),
    "flickr30k": (
        "Flickr30k's photographs may be used for non-commercial research and education; they are under Flickr's terms."
    ),
    "conceptual": "Conceptual Captions' texts are free to use; the images belong to the sites they come from.",
}
OTHER_TERMS = "The training data have terms of their own, which this card does not state."


@dataclass(frozen=True)
class Origin:
    """Weights that a model was trained from.

    Args:
        name (`str`): A Hub id, or the last name of a local folder.
        hub_id (`str`, *optional*): The Hub id; `None` for a local folder.
        note (`str`, *optional*): The terms of these weights, one sentence.
        allowed (`tuple[str, ...]`): Licences that a model trained from them may have.
    """

    name: str
    hub_id: str | None
    note: str | None
    allowed: tuple[str, ...]


def read_arguments(folder: str | os.PathLike) -> dict[str, Any]:
    """Read the `arguments.yaml` that training wrote beside the weights.

    Args:
        folder (`str` or `os.PathLike`): The model's folder.

    Returns:
        `dict[str, Any]`: Fields by name, as train.py resolved them.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not YAML, or not a mapping of fields.
    """
    path = Path(folder) / "arguments.yaml"
    if not path.is_file():
        raise FileNotFoundError(
            f"Expected arguments.yaml beside the weights in '{folder}', got none. train.py writes it, and the card's "
            "section on training is made from it."
        )
    arguments = read_yaml(path, "training's arguments", "Restore the file that train.py wrote.")
    if not isinstance(arguments, dict):
        raise ValueError(f"Expected fields in '{path}', got {arguments!r}. Restore the file that train.py wrote.")
    return arguments


def find_origins(arguments: Mapping[str, Any], base_model: str | None = None) -> list[Origin]:
    """Find all weights that a model was trained from, through local folders.

    Args:
        arguments (`Mapping[str, Any]`): The model's training arguments, as [`read_arguments`] returns them.
        base_model (`str`, *optional*): Hub id of the model that training started from, if that was a local copy.

    Returns:
        `list[Origin]`: Direct origins first; empty for a model trained from scratch.

    Raises:
        FileNotFoundError: If a folder that training started from is gone.
        ValueError: If the `arguments.yaml` of such a folder is damaged.
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
                f"Expected the folder '{name}', which the model was trained from, got none: its licence is not known. "
                "Restore the folder, or give --base_model."
            )
        known = next((terms for prefix, terms in PUBLISHED_WEIGHTS.items() if name.startswith(prefix)), NO_TERMS)
        return Origin(name, name, *known)
    card = Path(name) / "README.md"
    licence_name = ModelCard.load(card).data.get("license_name") if card.is_file() else None
    return Origin(Path(name).name, None, *CONVERTED.get(licence_name or "", NO_TERMS))


def check_licence(license: str | None, name: str | None, link: str | None, origins: Sequence[Origin]) -> None:
    """Refuse a licence that the Hub does not know, or that the model's origins do not allow.

    Args:
        license (`str`, *optional*): The Hub's id of the licence. `None` is refused.
        name, link (`str`, *optional*): The licence's name and address, needed for `other`.
        origins (`Sequence[Origin]`): The weights that the model was trained from.

    Raises:
        ValueError: If the licence is unknown, lacks a name or a link, or an origin does not allow it.
    """
    if license not in LICENCES:
        raise ValueError(
            f"license: expected one of {', '.join(LICENCES)}, got {license or 'none'!r}. For any other licence give "
            "`other` with a name and a link."
        )
    if license == "other" and not (name and link):
        raise ValueError("license 'other': expected license_name and license_link too, got none or one of them.")
    for origin in origins:
        if license not in origin.allowed:
            raise ValueError(
                f"license: {origin.name} limits the licence of models trained from it ({origin.note}) Expected one of "
                f"{', '.join(origin.allowed)}, got {license!r}."
            )


def describe_data(specs: Sequence[str]) -> list[str]:
    """Name the terms of training data.

    Args:
        specs (`Sequence[str]`): The datasets' specs.

    Returns:
        `list[str]`: One sentence for each kind of dataset.

    Example:
        >>> describe_data(["scenes:train", "scenes:test"])
        ['The drawn scenes are made by this package and come without terms.']
    """
    return list(dict.fromkeys(DATA_TERMS.get(spec.partition(":")[0], OTHER_TERMS) for spec in specs))
