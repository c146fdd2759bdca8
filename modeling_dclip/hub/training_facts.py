"""How a model was trained, read from what training left beside its weights."""

import json
import os
import re
from pathlib import Path
from typing import Any

import yaml

# What the card tells of the stage that made the weights, in this order.
_OPTIMISER = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "num_train_epochs", "max_steps",
    "per_device_train_batch_size", "gradient_accumulation_steps", "bf16", "fp16", "seed",
)  # fmt: skip
SETTINGS = {
    "student": (
        "cosine_distillation_loss_weight", "contrastive_loss_weight", "cosine_preservation_loss_weight",
        "similarity_distillation_loss_weight", "temperature", "image_to_text_weight", "wise_ft_alpha", "freeze", "position_embedding_type",
        *_OPTIMISER,
    ),
    "dmclip": ("preset", "image_size", "contrastive_loss_weight", "distillation_loss_weight", "freeze_text", *_OPTIMISER),
    "anchor": ("image_to_text_weight", *_OPTIMISER),
    "teacher": (
        "cross_attention", "attention_temperature", "text_share", "region_weighting", "aggregation", "loss_temperature", *_OPTIMISER,
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
            f"Expected arguments.yaml beside the weights in '{folder}', got none. train.py writes it; the card's training section comes from it."
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
        section (`str`, *optional*): The stage that made it; by default the one of student, dmclip and anchor that is there.

    Returns:
        `dict[str, Any]`: `arguments` (all), `section`, `datasets`, `uncaptioned`, `excluded`, `reads_teacher`, `trains_text`, `teachers` (of
        reinforced data), `settings` (pairs of name and value), and `steps`, `epochs`, `minutes`, which are None where training did not say.

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
            f"Expected {needed[0] if needed else 'student, dmclip or anchor'} in arguments.yaml of '{folder}', got {sorted(arguments)}."
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
