"""Under what licence a model may go out: what it starts from decides with its owner, and the card says so."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard

from modeling_dclip.configuration_dclip import PRESETS

# What the card tells of the stage that made the weights, in this order.
_OPTIMISER = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "num_train_epochs",
    "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "bf16", "fp16", "seed",
)  # fmt: skip
SETTINGS = {
    "student": (
        "cosine_distillation_loss_weight", "contrastive_loss_weight", "cosine_preservation_loss_weight",
        "similarity_distillation_loss_weight", "temperature", "image_to_text_weight", "wise_ft_alpha", "freeze",
        "position_embedding_type", *_OPTIMISER,
    ),
    "dmclip": ("preset", "image_size", "contrastive_loss_weight", "distillation_loss_weight", "freeze_text",
               *_OPTIMISER),
    "anchor": ("image_to_text_weight", *_OPTIMISER),
    "teacher": (
        "cross_attention", "attention_temperature", "text_share", "region_weighting", "aggregation",
        "loss_temperature", *_OPTIMISER,
    ),
}  # fmt: skip

# Told where adapters were trained.
ADAPTER_SETTINGS = ("lora_rank", "lora_alpha", "lora_dropout", "use_dora", "lora_text")
# Weights of the loss terms that look at what a teacher says.
DISTILLATION = (
    "cosine_distillation_loss_weight",
    "similarity_distillation_loss_weight",
    "distillation_loss_weight",
)


def read_arguments(folder: str | os.PathLike) -> dict[str, Any]:
    """The `arguments.yaml` that training left in a folder.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is no YAML, or no table of fields.
    """
    path = Path(folder) / "arguments.yaml"
    if not path.is_file():
        raise FileNotFoundError(
            f"Expected arguments.yaml beside the weights in '{folder}', got none. train.py writes it; the card's "
            "training section comes from it."
        )
    try:
        arguments = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"Expected YAML in '{path}', got: {reason}. Put back what train.py wrote.") from error
    if not isinstance(arguments, dict):
        raise ValueError(f"Expected fields in '{path}', got {arguments!r}. Put back what train.py wrote.")
    return arguments


def read_training(folder: str | os.PathLike, section: str | None = None) -> dict[str, Any]:
    """How a model was trained, from what training left beside its weights.

    Args:
        folder (`str` or `os.PathLike`): Of the model.
        section (`str`, *optional*): The stage that made it; by default the one of student, dmclip and anchor that is
            there.

    Returns:
        `dict[str, Any]`: `arguments` (all), `section`, `datasets`, `uncaptioned`, `excluded`, `reads_teacher`,
            `trains_text`, `teachers` (of reinforced data), `settings` (pairs of name and value), and `steps`,
            `epochs`, `minutes`, which are None where training did not say.

    Raises:
        FileNotFoundError: If there is no `arguments.yaml`.
        ValueError: If it is damaged, or a field of it is missing.
    """
    arguments = read_arguments(folder)
    if section is None:
        section = next((name for name in ("student", "dmclip", "anchor") if name in arguments), None)
    values = arguments.get(section) or {}
    needed = [name for name in SETTINGS.get(section, ()) if name not in values]
    needed = [f"{section}.{name}" for name in needed] + [
        name for name in ("train_datasets", "exclude_karpathy", "seed") if name not in arguments
    ]
    if section is None or needed:
        raise ValueError(
            f"Expected {needed[0] if needed else 'student, dmclip or anchor'} in arguments.yaml of '{folder}', got "
            f"{sorted(arguments)}."
        )
    datasets = arguments["train_datasets"] or values.get("train_datasets") or []
    shards = values.get("train_shards")
    adapted = [name for name in ADAPTER_SETTINGS if name in values] if values.get("lora_rank") else []
    # Of the two fields that say how long to train, the one that the other overrides.
    unused = "num_train_epochs" if values["max_steps"] > 0 else "max_steps"
    return {
        "arguments": arguments,
        "section": section,
        "datasets": [*map(show_spec, datasets), *([f"shards {Path(shards).name}"] if shards else [])],
        "uncaptioned": [show_spec(spec) for spec in arguments.get("uncaptioned_datasets") or []],
        "excluded": [Path(name).name for name in arguments["exclude_karpathy"]],
        "reads_teacher": any(values.get(name) for name in DISTILLATION),
        "trains_text": section != "teacher" and bool(values.get("lora_text")),
        "settings": [(name, show_value(values[name])) for name in (*SETTINGS[section], *adapted) if name != unused],
        "teachers": [
            Path(name).name if Path(name).is_dir() else show_spec(name)
            for name in (arguments.get("reinforce") or {}).get("teachers", [])
        ],
        **_read_state(Path(folder) / "trainer_state.json"),
    }


def show_spec(spec: str) -> str:
    """A spec without the folders of this machine: of an absolute path its last name.

    Example:
        >>> show_spec("coco:/home/me/coco/captions.json:images@500")
        'coco:captions.json:images@500'
    """
    return re.sub(r"(?<![\w.])/(?:[^/:,=@]+/)+", "", spec)


def show_value(value: Any) -> str:
    """A setting as the recipe writes it."""
    if isinstance(value, float) and value and not 1e-3 <= abs(value) < 1e4:
        return f"{value:.10g}"
    return str(value).lower() if isinstance(value, bool) else "–" if value in (None, []) else str(value)


def _read_state(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {"steps": None, "epochs": None, "minutes": None}
    state = json.loads(path.read_text(encoding="utf-8"))
    runtime = next(
        (entry["train_runtime"] for entry in reversed(state["log_history"]) if "train_runtime" in entry), None
    )
    return {
        "steps": state["global_step"],
        "epochs": state["epoch"],
        "minutes": None if runtime is None else runtime / 60,
    }


# Ids that the Hub knows and that fit weights; `other` needs a name and a link.
LICENCES = (
    "apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0",
    "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0", "openrail", "bigscience-openrail-m", "creativeml-openrail-m", "gpl-3.0",
    "lgpl-3.0", "agpl-3.0", "apple-ascl", "apple-amlr", "unlicense", "other",
)  # fmt: skip
NON_COMMERCIAL = ("cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0", "apple-amlr", "other")

# Of published weights by the beginning of their Hub id: what binds those who start from them, and the licences that
# respect it.
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
    "karpathy": (
        "Karpathy's splits point to COCO (annotations CC-BY-4.0) and Flickr30k (research and education, "
        "non-commercial); the photographs are under Flickr's terms."
    ),
    "flickr30k": (
        "Flickr30k's photographs may be used for non-commercial research and education; they are under Flickr's terms."
    ),
    "conceptual": "Conceptual Captions' texts are free to use; the images belong to the sites they come from.",
}
OTHER_DATA = "The data have terms of their own, which this card does not know."


@dataclass(frozen=True)
class Origin:
    """What a model starts from: a Hub id or a local folder, its `hub_id` if it has one,
    and what binds because of it.
    """

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
                f"Expected the folder '{name}', which the model was trained from, got none: what it is under is not "
                "known. Bring it back, or give --base_model."
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
            f"license: expected one of {', '.join(LICENCES)}, got {license!r}. Any other is `other` with a name and a "
            "link."
        )
    if license == "other" and not (name and link):
        raise ValueError("license 'other': expected license_name and license_link beside it, got none or one of them.")
    for origin in origins:
        if license not in origin.allowed:
            raise ValueError(
                f"license: {origin.name} binds what starts from it ({origin.note}) Expected one of "
                f"{', '.join(origin.allowed)}, got {license!r}."
            )


def describe_data(specs: list[str]) -> list[str]:
    """The terms of training data, one sentence a kind."""
    return list(dict.fromkeys(DATA.get(spec.partition(":")[0], OTHER_DATA) for spec in specs))
