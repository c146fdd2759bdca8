"""What a card says of a model's training, in words: the data, the method, the length, the settings.

All of it comes from what training wrote beside the weights: `arguments.yaml`, `trainer_state.json`, `manifest.json`.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypedDict

from modeling_dclip.data.failures import redact
from modeling_dclip.data.files import MANIFEST_NAME, read_json
from modeling_dclip.progress import count_of

# The settings of each training stage that a card's table shows, in this order.
_OPTIMISER = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "num_train_epochs",
    "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "bf16", "fp16", "seed",
)  # fmt: skip
SETTINGS = {
    "student": (
        "cosine_distillation_loss_weight", "contrastive_loss_weight", "contrastive_loss",
        "cosine_preservation_loss_weight", "similarity_distillation_loss_weight", "temperature",
        "image_to_text_weight", "wise_ft_alpha", "freeze", "position_embedding_type", *_OPTIMISER,
    ),
    "dmclip": ("preset", "image_size", "contrastive_loss_weight", "distillation_loss_weight", "freeze_text",
               *_OPTIMISER),
    "anchor": ("image_to_text_weight", *_OPTIMISER),
    "teacher": (
        "cross_attention", "attention_temperature", "text_share", "region_weighting", "aggregation",
        "loss_temperature", *_OPTIMISER,
    ),
}  # fmt: skip
# Shown where training recorded them: earlier runs did not have them.
LATER_SETTINGS = ("contrastive_loss",)
# Shown if adapters were trained.
ADAPTER_SETTINGS = ("lora_rank", "lora_alpha", "lora_dropout", "use_dora", "lora_text")
# Weights of the loss terms, and what each term does. The first group needs a teacher.
TEACHER_LOSSES = {
    "cosine_distillation_loss_weight": "each embedding moves to the teacher's",
    "similarity_distillation_loss_weight": "the model ranks a batch as the teacher does",
    "distillation_loss_weight": "the model ranks a batch as its teachers do",
}
OTHER_LOSSES = {
    "contrastive_loss_weight": "an image and its caption find each other in a batch",
    "cosine_preservation_loss_weight": "image embeddings stay near those of the untouched CLIP",
}
# What each kind of dataset is called. `{}` is the name of its file or folder.
SOURCES = {
    "scenes": "scenes drawn by modeling_dclip",
    "coco": "COCO",
    "karpathy": "Karpathy's split in {}",
    "flickr30k": "Flickr30k",
    "conceptual": "Conceptual Captions",
    "csv": "the publisher's own captions in {}",
    "parquet": "the parquet files {}",
    "hub": "{}, a dataset of the Hub",
    "disk": "the saved dataset {}",
    "wds": "the shards {}",
    "images": "the publisher's own images in {}",
    "imagefolder": "the image folder {}",
    "held_out": "the held-out images of the run {}",
}
# A file or folder whose name does not say which data it holds: a pattern, or a part of a dataset.
_UNTOLD = re.compile(r".*[*?\[].*|(?:train|val|valid|validation|test|dev|data)(?:[^a-z].*)?|[\W\d]*", re.IGNORECASE)
# In a spec: an address, or an absolute path of at least two names.
_ADDRESS_OR_PATH = re.compile(
    r"(?P<address>\b[a-z][a-z0-9+.-]*://[^/\s:,=]+(?::\d+)?(?:/[^\s:,=@?]*)?(?:\?[^\s,:@]*)?)"
    r"|(?<![\w.])(?P<path>/(?:[^/:,=@]+/)+[^/:,=@]*)"
)
# Fewer training images are a limit of the model; usual retrieval sets have thousands (Flickr8k 6,000).
FEW_TRAINING_IMAGES = 1_000
# In the log of a training that ended at a loss of zero-shot accuracy: the step whose weights were kept.
KEPT_BY_PROBE = "probe_kept_step"
# What decides which checkpoint is kept, by the name that the trainer gives it.
CHOOSERS = {"loss": "validation loss", "mean_recall@1": "mean R@1 of both directions on the validation images"}


class DataSource(NamedTuple):
    """A dataset: `words` say what it is, `spec` names it without folders of this machine."""

    words: str
    spec: str


class TrainingFacts(TypedDict):
    """How a model was trained, in words. What training did not record is `None` or an empty list.

    `sources` and `uncaptioned` are the datasets, `counts` their sizes, `few_images` how many were trained on where
    they are few, `losses` and `methods` what was done, `length`
    and `checkpoint` how long and which state was kept, `settings` a table.
    """

    section: str
    specs: list[str]
    sources: list[DataSource]
    uncaptioned: list[DataSource]
    counts: list[str]
    few_images: str | None
    excluded: list[str]
    may_hold_test_images: bool
    teachers: list[str]
    detector: str | None
    reads_teacher: bool
    trains_text: bool
    uses_adapter: bool
    averages_weights: bool
    losses: list[str]
    methods: list[str]
    optimiser: str
    length: str | None
    checkpoint: str | None
    settings: list[tuple[str, str]]


def describe_training(
    arguments: Mapping[str, Any], folder: str | os.PathLike, section: str | None = None
) -> TrainingFacts:
    """Say how a model was trained, from what training wrote beside its weights.

    Args:
        arguments (`Mapping[str, Any]`): The training arguments in that folder.
        folder (`str` or `os.PathLike`): The model's folder. `trainer_state.json` and `manifest.json` may be missing.
        section (`str`, *optional*): The stage that trained the model. By default `student`, `dmclip` or `anchor`,
            whichever the arguments have.

    Returns:
        [`TrainingFacts`]

    Raises:
        ValueError: If an argument is missing.
    """
    section, values = _find_section(arguments, folder, section)
    datasets = arguments["train_datasets"] or values.get("train_datasets") or []
    uncaptioned = arguments.get("uncaptioned_datasets") or []
    shards = values.get("train_shards")
    specs = [*map(show_spec, datasets), *([f"shards {Path(shards).name}"] if shards else [])]
    adapted = [name for name in ADAPTER_SETTINGS if name in values] if values.get("lora_rank") else []
    # Two fields set the length of training; the one that the other overrides is not shown.
    unused = "num_train_epochs" if values["max_steps"] > 0 else "max_steps"
    teachers = (arguments.get("reinforce") or {}).get("teachers", [])
    state, counts = _read_state(Path(folder) / "trainer_state.json"), _read_counts(Path(folder) / MANIFEST_NAME)
    names = (*SETTINGS[section], *adapted)
    reads_teacher = any(values.get(name) for name in TEACHER_LOSSES)
    return TrainingFacts(
        section=section,
        specs=specs,
        sources=[describe_source(spec) for spec in specs],
        uncaptioned=[describe_source(show_spec(spec)) for spec in uncaptioned],
        counts=_describe_counts(counts),
        few_images=_describe_few(counts),
        excluded=[Path(name).name for name in arguments["exclude_karpathy"]],
        may_hold_test_images=any(spec.partition(":")[0] not in ("scenes", "csv", "images") for spec in specs),
        teachers=[Path(name).name if Path(name).is_dir() else show_spec(name) for name in teachers],
        detector=_name_detector(arguments) if section == "teacher" or reads_teacher else None,
        reads_teacher=reads_teacher,
        trains_text=section == "dmclip" or (section != "teacher" and bool(values.get("lora_text"))),
        uses_adapter=bool(values.get("lora_rank")),
        averages_weights=values.get("wise_ft_alpha", 1) != 1,
        losses=_describe_losses(values),
        methods=_describe_methods(values),
        optimiser=_describe_optimiser(values),
        length=_describe_length(state, values),
        checkpoint=_describe_checkpoint(state, values),
        settings=[(name, show_value(values[name])) for name in names if name != unused and name in values],
    )


def _find_section(
    arguments: Mapping[str, Any], folder: str | os.PathLike, section: str | None
) -> tuple[str, Mapping[str, Any]]:
    """The stage that trained the model and its fields, after a check that all that the card reads are there."""
    if section is None:
        section = next((name for name in ("student", "dmclip", "anchor") if name in arguments), None)
    if section is None:
        raise ValueError(
            f"Expected student, dmclip or anchor in arguments.yaml of '{folder}', got {sorted(arguments)}."
        )
    values = arguments.get(section) or {}
    needed = (name for name in SETTINGS[section] if name not in LATER_SETTINGS)
    missing = [f"{section}.{name}" for name in needed if name not in values]
    missing += [name for name in ("train_datasets", "exclude_karpathy", "seed") if name not in arguments]
    if missing:
        raise ValueError(f"Expected {missing[0]} in arguments.yaml of '{folder}', got {sorted(arguments)}.")
    return section, values


def show_spec(spec: str) -> str:
    """Write a spec without the folders of this machine: an absolute path is cut to its last name.

    A name that does not say which data it holds keeps the folder before it, unless that is somebody's home. An address
    stays whole, without its secrets.

    Example:
        >>> show_spec("coco:/home/me/coco/captions.json:images@500")
        'coco:captions.json:images@500'
        >>> show_spec("zero_shot=parquet:/data/cifar10/test.parquet")
        'zero_shot=parquet:cifar10/test.parquet'
        >>> show_spec("wds:https://me:abc@host:8080/sets/birds:/home/me/birds@500")
        'wds:https://***@host:8080/sets/birds:birds@500'
    """
    return _ADDRESS_OR_PATH.sub(lambda found: found["address"] or _short_path(found["path"]), redact(spec))


def _short_path(path: str) -> str:
    """The last name of a path, after the nearest folders that say which data it is."""
    parts = PurePosixPath(path).parts
    start = len(parts) - 1
    while start > 0 and _UNTOLD.fullmatch(parts[start]) and _may_be_shown(parts[:start]):
        start -= 1
    return "/".join(parts[start:])


def _may_be_shown(folder: Sequence[str]) -> bool:
    """Whether a folder's name may be told: it is no root and nobody's home."""
    return folder[-1] not in ("/", "..", "root", "home", "Users") and folder[-2:-1] not in (("home",), ("Users",))


def describe_source(spec: str) -> DataSource:
    """Say what a dataset is.

    Example:
        >>> describe_source("csv:captions.csv:photos").words
        "the publisher's own captions in captions.csv"
        >>> describe_source("parquet:data/cifar10/*.parquet").words
        'the parquet files cifar10/*.parquet'
    """
    kind, _, rest = spec.partition(":")
    name = re.split(r"[:,@]", rest)[0]
    return DataSource(SOURCES.get(kind, spec).replace("{}", _short_path(name) if kind != "hub" else name), spec)


def show_value(value: Any) -> str:
    """Write a setting as a recipe does.

    Example:
        >>> [show_value(value) for value in (1e-05, True, None, "cosine", 3.0)]
        ['1e-05', 'true', '–', 'cosine', '3']
    """
    if isinstance(value, float) and value and not 1e-3 <= abs(value) < 1e4:
        return f"{value:.10g}"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value).lower() if isinstance(value, bool) else "–" if value in (None, []) else str(value)


def show_duration(seconds: float) -> str:
    """Write a duration as a person would.

    Example:
        >>> [show_duration(seconds) for seconds in (0.4, 25.2, 90, 1500, 5400, 100_000)]
        ['less than a second', '25 seconds', '1 minute 30 seconds', '25 minutes', '1 hour 30 minutes', '1 day 4 hours']
    """
    if seconds < 1:
        return "less than a second"
    seconds, minutes, hours = round(seconds), round(seconds / 60), round(seconds / 3600)
    if seconds < 600:
        parts = (seconds // 60, "minute"), (seconds % 60, "second")
    elif minutes < 24 * 60:
        parts = (minutes // 60, "hour"), (minutes % 60, "minute")
    else:
        parts = (hours // 24, "day"), (hours % 24, "hour")
    return " ".join(count_of(number, noun) for number, noun in parts if number)


def _read_counts(manifest: Path) -> dict[str, dict[str, int]]:
    """How many images and captions each part of the data has, where training counted them."""
    if not manifest.is_file():
        return {}
    return read_json(manifest, "manifest", advice="Restore it.").get("counts", {})


def _describe_few(counts: Mapping[str, Mapping[str, int]]) -> str | None:
    """How many images were trained on, with and without captions, if that is known and they are few."""
    images = sum(counts[part]["images"] for part in ("train", "uncaptioned") if counts.get(part))
    return count_of(images, "image") if 0 < images < FEW_TRAINING_IMAGES else None


def _describe_counts(counts: Mapping[str, Mapping[str, int]]) -> list[str]:
    parts = {
        "train": "{} with {} were trained on",
        "uncaptioned": "{} without captions, too",
        "validation": "{} with {} were used for validation",
    }
    return [
        words.format(count_of(found["images"], "image"), count_of(found["captions"], "caption"))
        for part, words in parts.items()
        if (found := counts.get(part))
    ]


def _name_detector(arguments: Mapping[str, Any]) -> str | None:
    """The detector that found regions; a local file without its folders."""
    named = (arguments.get("regions") or {}).get("detector")
    return None if named is None else show_spec(named)


def _describe_losses(values: Mapping[str, Any]) -> list[str]:
    known = TEACHER_LOSSES | OTHER_LOSSES
    return [
        f"{name.removesuffix('_loss_weight').replace('_', ' ')} loss, weight {show_value(values[name])}: {meaning}"
        for name, meaning in known.items()
        if values.get(name)
    ]


def _describe_methods(values: Mapping[str, Any]) -> list[str]:
    methods = []
    if rank := values.get("lora_rank"):
        kind = "DoRA" if values.get("use_dora") else "LoRA"
        where = "both encoders" if values.get("lora_text") else "the image encoder"
        methods.append(f"{kind} adapters of rank {rank} in {where}; all other weights stayed as they were")
    elif "wise_ft_alpha" in values:
        frozen = ", except those named " + ", ".join(values["freeze"]) if values.get("freeze") else ""
        methods.append(f"all weights of the image encoder were trained{frozen}")
    alpha, rule = values.get("wise_ft_alpha", 1), values.get("wise_ft_rule")
    known = ", ".join(show_spec(one) for one in values.get("probe") or [] if one.startswith("zero_shot"))
    if alpha != 1 or rule is not None:
        mixed = f"WiSE-FT: the saved weights are {alpha:.4g} times the trained ones plus {1 - alpha:.4g} times those "
        chosen = f"; the share was chosen on validation data by the rule '{rule}', measured on {known}"
        methods.append(f"{mixed}before training{chosen if rule is not None else ''}")
    if (least := values.get("keep_retention")) is not None:
        methods.append(
            f"training was to end at the first measurement that found less than {100 * least:g} % of the accuracy on "
            f"{known} before training"
        )
    return methods


def _describe_optimiser(values: Mapping[str, Any]) -> str:
    optimiser = "AdamW" if str(values.get("optim", "adamw")).startswith("adamw") else values["optim"]
    schedule = values["lr_scheduler_type"].replace("_", " ")
    rate = f"{optimiser}, learning rate {show_value(values['learning_rate'])}, {schedule}"
    warmup = values["warmup_steps"]
    if warmup:
        rate += f" after a warm-up of {f'{warmup:.0%} of the steps' if warmup < 1 else count_of(int(warmup), 'step')}"
    precision = next((name for name in ("bf16", "fp16") if values.get(name)), "float32")
    return (
        f"{rate}; weight decay {show_value(values['weight_decay'])}; gradients clipped at norm "
        f"{show_value(values['max_grad_norm'])}; {precision}; seed {values['seed']}"
    )


def _read_state(path: Path) -> dict[str, Any] | None:
    """The state that the trainer wrote at the end, `None` if there is none."""
    if not path.is_file():
        return None
    return read_json(path, "trainer's state", keys=("global_step", "epoch", "log_history"), advice="Restore it.")


def show_epochs(epochs: float) -> str:
    """Write a number of epochs with at most one decimal.

    Example:
        >>> [show_epochs(number) for number in (3.3333, 1.0, 0.98, 0.01)]
        ['3.3 epochs', '1 epoch', '1 epoch', 'less than 0.1 epochs']
    """
    if epochs < 0.05:
        return "less than 0.1 epochs"
    number = f"{epochs:.1f}".removesuffix(".0")
    return f"{number} epoch{'' if number == '1' else 's'}"


def _describe_length(state: Mapping[str, Any] | None, values: Mapping[str, Any]) -> str | None:
    if state is None or not state["global_step"]:
        return None
    size = values["per_device_train_batch_size"] * values["gradient_accumulation_steps"]
    parts = [f"{count_of(state['global_step'], 'step')} of {count_of(size, 'pair')} per device"]
    if state["epoch"]:
        parts.insert(0, show_epochs(state["epoch"]))
    runtimes = [entry["train_runtime"] for entry in state["log_history"] if "train_runtime" in entry]
    return ", ".join([*parts, *([show_duration(runtimes[-1])] if runtimes else [])])


def _describe_checkpoint(state: Mapping[str, Any] | None, values: Mapping[str, Any]) -> str | None:
    """Which state of the training was kept, if it was chosen."""
    held = next((log[KEPT_BY_PROBE] for log in (state or {}).get("log_history", []) if KEPT_BY_PROBE in log), None)
    if state is not None and held is not None:
        kept = f"the last one measured that kept {100 * values['keep_retention']:g} % of the zero-shot accuracy"
        return f"{kept}, after step {held:,} of {state['global_step']:,}"
    if state is None or not values.get("load_best_model_at_end") or not state.get("best_global_step"):
        return None
    name = str(values.get("metric_for_best_model") or "loss").removeprefix("eval_")
    word = CHOOSERS.get(name, f"{name.replace('_', ' ')} on the validation images")
    best = "highest" if values.get("greater_is_better") else "lowest"
    return f"the one with the {best} {word}, after step {state['best_global_step']:,} of {state['global_step']:,}"


def find_overlaps(benchmarks: Sequence[str], training: Sequence[str]) -> list[str]:
    """Find benchmarks whose images were trained on: their dataset is one that training read.

    Args:
        benchmarks (`Sequence[str]`): `KIND=SPEC`, without folders of this machine.
        training (`Sequence[str]`): Specs of the training data, in the same form.

    Returns:
        `list[str]`: The benchmarks, in their order.

    Example:
        >>> find_overlaps(["retrieval=csv:a.csv:photos@100", "retrieval=csv:b.csv:photos"], ["csv:a.csv:photos"])
        ['retrieval=csv:a.csv:photos@100']
    """
    trained = {re.split(r"[,@]", spec)[0] for spec in training}
    return [one for one in benchmarks if re.split(r"[,@]", one.partition("=")[2])[0] in trained]
