"""The licence of a publication: what the model was trained from, and which licences that allows."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
# The terms of weights: a sentence for the card, and the licences that a model trained from them may have.
LicenceTerms = tuple[str | None, tuple[str, ...]]
NO_TERMS: LicenceTerms = (None, LICENCES)
# What a model may be under that was trained from weights under a licence. One that is not here allows any.
_OWN_KIND = "They pass their licence on to models trained from them."
TERMS: dict[str, LicenceTerms] = {
    "mit": ("They are under MIT.", LICENCES),
    "apache-2.0": ("They are under Apache-2.0.", LICENCES),
    "cc-by-sa-4.0": (f"They are under CC-BY-SA-4.0. {_OWN_KIND}", ("cc-by-sa-4.0",)),
    "cc-by-nc-sa-4.0": (
        f"They are under CC-BY-NC-SA-4.0, for non-commercial use only. {_OWN_KIND}", ("cc-by-nc-sa-4.0",)
    ),
    "cc-by-nc-4.0": (
        "They are under CC-BY-NC-4.0, for non-commercial use only.",
        ("cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0", "other"),
    ),
    "cc-by-nc-nd-4.0": ("They are under CC-BY-NC-ND-4.0, which allows no changed version to be shared.", ()),
    "gpl-3.0": (f"They are under GPL-3.0. {_OWN_KIND}", ("gpl-3.0", "agpl-3.0")),
    "lgpl-3.0": (f"They are under LGPL-3.0. {_OWN_KIND}", ("lgpl-3.0", "gpl-3.0", "agpl-3.0")),
    "agpl-3.0": (f"They are under AGPL-3.0. {_OWN_KIND}", ("agpl-3.0",)),
    **{
        name: (f"They are under {name}, whose restrictions of use hold for models trained from them.", (name, "other"))
        for name in ("openrail", "bigscience-openrail-m", "creativeml-openrail-m")
    },
    "apple-amlr": (
        "They are under Apple's licence for research models, for research only.", ("apple-amlr", "other")
    ),
    "apple-ascl": ("They are under Apple's sample code licence.", ("apple-ascl", "apple-amlr", "other")),
    "other": (
        "They are under a licence of their own, which decides what models trained from them may be under.", ("other",)
    ),
}  # fmt: skip
_APPLE: LicenceTerms = (
    "These weights are under a licence of Apple's own.", ("apple-ascl", "apple-amlr", "other")
)  # fmt: skip
# Published weights, by the beginning of their Hub id.
PUBLISHED_WEIGHTS: dict[str, LicenceTerms] = {
    "openai/clip-": ("OpenAI's CLIP weights are published under MIT.", LICENCES),
    "nvidia/MambaVision": (
        "MambaVision's weights are for non-commercial use only (CC-BY-NC-SA-4.0; its code is under the NVIDIA Source "
        "Code License-NC).",
        ("cc-by-nc-sa-4.0", "other"),
    ),
    "apple/": _APPLE,
    "facebook/metaclip-": TERMS["cc-by-nc-4.0"],
    "google/siglip": TERMS["apache-2.0"],
    "laion/CLIP-": TERMS["mit"],
}
# The Hub's id of their licence, where their card cannot be read.
PUBLISHED_LICENCES = {
    "openai/clip-": "mit",
    "apple/": "apple-amlr",
    "facebook/metaclip-": "cc-by-nc-4.0",
    "google/siglip": "apache-2.0",
    "laion/CLIP-": "mit",
}
# By the name that the card of a folder gives a licence `other`; those that `hub.convert` writes, and Apple's.
NAMED: dict[str, LicenceTerms] = {
    "mambavision-non-commercial": PUBLISHED_WEIGHTS["nvidia/MambaVision"],
    **dict.fromkeys(("apple-mobileclip-weights", "apple-sample-code-license", "apple-ascl", "apple-amlr"), _APPLE),
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
        stated (`str`): How it is known where that is not what training read, a part of a sentence; else empty.
        note (`str`, *optional*): The terms of these weights, one sentence.
        allowed (`tuple[str, ...]`): Licences that a model trained from them may have.
    """

    name: str
    hub_id: str | None
    note: str | None
    allowed: tuple[str, ...]
    stated: str = ""


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


# The fields that name the weights that training started from, by the section of the stage.
_STARTS = {"dmclip": ("model", "vision_model", "text_model"), "anchor": ("vision_model", "text_model")}


def name_starts(arguments: Mapping[str, Any]) -> list[str]:
    """Name the models that training started from, as its arguments do: Hub ids and folders; none from scratch.

    Args:
        arguments (`Mapping[str, Any]`): The model's training arguments, as [`read_arguments`] returns them.
    """
    section = next((name for name in ("student", "dmclip", "anchor") if arguments.get(name)), None)
    values = arguments.get(section or "") or {}
    names = [values.get(name) for name in _STARTS[section]] if section in _STARTS else [arguments.get("clip_model")]
    return [PRESETS.get(name, name) for name in names if name]


def find_origins(arguments: Mapping[str, Any], base_model: str | None = None, compared: bool = False) -> list[Origin]:
    """Find all weights that a model was trained from, through local folders.

    Args:
        arguments (`Mapping[str, Any]`): The model's training arguments, as [`read_arguments`] returns them.
        base_model (`str`, *optional*): Hub id of the model that training started from, if that was a local copy. What
            is known of the copy's licence holds too.
        compared (`bool`, *optional*, defaults to `False`): Whether the sizes of `base_model` are known to be the
            model's.

    Returns:
        `list[Origin]`: Direct origins first; empty for a model trained from scratch.

    Raises:
        FileNotFoundError: If a folder that training started from is gone.
        ValueError: If the `arguments.yaml` of such a folder is damaged.
    """
    origins: list[Origin] = []
    names = name_starts(arguments)
    for place, name in enumerate(names or [base_model] if base_model else names):
        if base_model is None or place:
            origins.append(_describe(name))
        else:
            origins.append(_describe_stated(base_model, name, compared))
        if (Path(name) / "arguments.yaml").is_file():
            try:
                origins += find_origins(read_arguments(name))
            except FileNotFoundError:  # of what is stated, the folders before it need not be there
                if base_model is None or place:
                    raise
    return origins


def _describe_stated(base_model: str, read: str, compared: bool) -> Origin:
    """The origin that the publisher gives for what training read, with the terms of both."""
    stated = _describe(base_model)
    sizes = "its sizes are this model's" if compared else "its sizes could not be compared with this model's"
    origin = replace(stated, stated=f"as the publisher states; {sizes}")
    if read == base_model or not Path(read).is_dir():
        return origin
    copy = _describe(read)
    if set(copy.allowed) >= set(stated.allowed):
        return origin
    allowed = tuple(name for name in stated.allowed if name in copy.allowed)
    return replace(origin, allowed=allowed, note=" ".join(filter(None, (stated.note, copy.note))))


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
    told: Any = ModelCard.load(card).data if card.is_file() else {}
    known = NAMED.get(told.get("license_name") or "", TERMS.get(told.get("license") or "", NO_TERMS))
    return Origin(Path(name).name, None, *known)


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
        if not origin.allowed:
            raise ValueError(f"license: {origin.name} allows no model trained from it to be published ({origin.note})")
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
