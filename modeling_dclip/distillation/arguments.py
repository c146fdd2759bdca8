"""What a recipe may set: its global fields and one section per stage, as dataclasses with typed, documented fields."""

import fnmatch
import importlib.util
import json
import re
from dataclasses import Field, dataclass, field, fields
from fractions import Fraction
from typing import Any, Literal, NamedTuple

import torch
from transformers import TrainingArguments
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from transformers.utils import is_torch_bf16_gpu_available, logging

from modeling_dclip.data.specs import BATCH, COUNT, PART, SEED, WORKERS, Range, check_numbers, shown

logger = logging.get_logger(__name__)

# The fields of adapters. Records written before adapters existed lack them, so at their defaults they decide nothing.
ADAPTER_FIELDS = (
    "lora_rank", "lora_alpha", "lora_dropout", "use_dora", "lora_target_modules", "lora_text", "merge_adapter",
)  # fmt: skip

RECALLS = ("text_to_image_recall@1", "image_to_text_recall@1")  # that a validation of the student measures
MEAN_RECALL = "mean_recall@1"  # of both directions, on the validation images: what chooses the student's checkpoint

REGEX_PREFIX = "re:"  # of a freeze pattern that is a regular expression

# The optimisers of TrainingArguments that keep their state in 8 bits, and the package that each needs.
EIGHT_BIT_PACKAGES = {
    "adamw_torch_8bit": "torchao",
    **dict.fromkeys(
        ("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit", "ademamix_8bit", "paged_ademamix_8bit", "lion_8bit",
         "paged_lion_8bit", "rmsprop_bnb_8bit"),
        "bitsandbytes",
    ),
}  # fmt: skip


TEMPERATURE = Range(1e-4, 1e4)
WEIGHT = Range(0, 1e6)  # of a term of a loss
RATE = Range(0, 1e6)
DECAY = Range(0, 1e4)
EPOCHS = Range(0, 1e6, above=True)
STEPS = Range(0, 1e9, above=True, steps=True)
LAYERS = Range(1, 100, whole=True)
WIDTH = Range(1, 2**16, whole=True)
SIDE = Range(1, 2**13, whole=True)  # of an image, in pixels
AREA = Range(0, 1, above=True)

# Numbers that a training section inherits from `TrainingArguments`; a field's own range goes before.
INHERITED_RANGES = {
    "per_device_train_batch_size": BATCH,
    "per_device_eval_batch_size": BATCH,
    "gradient_accumulation_steps": BATCH,
    "eval_accumulation_steps": BATCH,
    "num_train_epochs": EPOCHS,
    "max_steps": Range(1, 10**9, whole=True, also=-1),
    "learning_rate": RATE,
    "warmup_steps": Range(0, 1e9, steps=True),
    "weight_decay": DECAY,
    "adam_beta1": Range(0, 1, below=True),
    "adam_beta2": Range(0, 1, below=True),
    "adam_epsilon": Range(0, 1, above=True),
    "max_grad_norm": Range(0, 1e9),
    "label_smoothing_factor": Range(0, 1, below=True),
    "neftune_noise_alpha": Range(0, 1e4, above=True),
    "torch_empty_cache_steps": COUNT,
    "logging_steps": STEPS,
    "eval_steps": STEPS,
    "eval_delay": Range(0, 1e9),
    "save_steps": STEPS,
    "save_total_limit": COUNT,
    "seed": SEED,
    "data_seed": SEED,
    "dataloader_num_workers": WORKERS,
    "dataloader_prefetch_factor": Range(1, 1000, whole=True),
    "ddp_bucket_cap_mb": Range(1, 10**6, whole=True),
    "ddp_timeout": COUNT,
    "local_rank": Range(-1, 2**20, whole=True),
}


def _help(text: str, default: Any = None, **metadata: Any) -> Any:
    """A field with its default, its documentation, which `--help` shows, and the range of its numbers."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text, **metadata})
    return field(default=default, metadata={"help": text, **metadata})


SaveDtype = Literal["auto", "float32", "float16", "bfloat16"]
_STORED = "auto"
_OWN_LOSS = "auto"
_BANK_LIMIT, _ALL_NEGATIVES = 2**20, 1.01
# Fields that records written before they existed lack: at these values they decide nothing.
_LATER: dict[str, Any] = {
    "save_dtype": _STORED,
    "per_device_eval_batch_size": None,
    "contrastive_loss": _OWN_LOSS,
    "l2_sp_loss_weight": 0.0,
    "ema_decay": None,
    "layer_decay": 1.0,
    "micro_batch_size": None,
    "negatives": "batch",
    "bank_limit": _BANK_LIMIT,
    "max_negative_similarity": _ALL_NEGATIVES,
    "batch_order": "random",
    "hard_negatives": "none",
    "probe": [],
    "probe_steps": 0.25,
    "keep_retention": None,
    "wise_ft_rule": None,
}
# Of these a student reads what chooses its weights; without either, benchmarks are watched and decide nothing.
_WATCHED, _CHOOSING = ("probe", "probe_steps"), ("keep_retention", "wise_ft_rule")
_LATER_IN_ANCHOR = {"vision_model": None, "text_model": None, "freeze_vision": True, "freeze_text": True}


def _save_dtype() -> Any:
    """The field `save_dtype` of a stage that starts from a model."""
    return _help(
        "Type of the saved weights; training and checkpoints are float32. auto: the type that the starting model is "
        "stored in.",
        _STORED,
    )


STAGES = ("anchor", "regions", "teacher", "targets", "student", "reinforce", "dmclip")

# Switches of `TrainingArguments` with which the same recipe gives another result where it is interrupted or short of
# memory, and says nothing.
_OTHER_RESULTS = {
    "ignore_data_skip": "A resumed run would see other batches than one that was never interrupted.",
    "auto_find_batch_size": "A smaller batch has fewer negatives: set per_device_train_batch_size.",
    "save_only_model": "No run could resume from such a checkpoint. Set save_strategy no to save the model alone.",
}

# Fields that decide where and how loudly a stage runs, not what comes out of it.
_SIDE_FIELDS = {
    "output_dir", "logging_dir", "logging_strategy", "logging_steps", "logging_first_step", "log_level",
    "log_on_each_node", "disable_tqdm", "run_name", "report_to", "save_strategy", "save_steps", "save_total_limit",
    "save_only_model", "use_cpu", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers",
    "dataloader_prefetch_factor", "ddp_timeout", "ddp_backend", "ddp_find_unused_parameters", "resume_from_checkpoint",
    "push_to_hub", "hub_token", "local_rank", "image_cache_mib", "num_workers", "batch_size", "text_batch_size",
    "on_bad_image", "on_nonfinite", "folder", "trust_checkpoint",
}  # fmt: skip


@dataclass
class RunArguments:
    """The global fields of a recipe."""

    output_dir: str = _help("Folder of the run; each stage writes into its own folder there.", "outputs/run")
    stages: list[str] = _help(
        f"Stages to run, of {', '.join(STAGES)}, also comma-separated. By default all that the recipe needs.", []
    )
    clip_model: str | None = _help(
        "The pretrained CLIP to start from: a preset (dclip-vitb32, dclip-vitb16, dclip-vitl14), a folder or a Hub "
        "id. Without it the stage anchor makes one."
    )
    teacher_model: str | None = _help(
        "A trained teacher around the same CLIP, in place of the stage teacher: folder or Hub id."
    )
    train_datasets: list[str] = _help(
        "Captioned images to train on: specs, with @COUNT at the end to draw that many (see docs/data.md).",
        [],
    )
    uncaptioned_datasets: list[str] = _help(
        "Images on which the student learns from the teacher alone. The teacher must read no caption. Specs as for "
        "train_datasets, whose captions are dropped, and images:FOLDER. Images of train_datasets are left out.",
        [],
    )
    train_fraction: float = _help(
        "Share of the images to train on, split by image id. The rest, without the test part, is for validation (see "
        "eval_strategy).",
        1.0,
        range=AREA,
    )
    test_fraction: float = _help(
        "Share of the images that no stage sees and that chooses nothing: the test part, which held_out:OUTPUT_DIR "
        "names. The content of the pictures alone decides which, so it is the same for every arm and seed. @COUNT "
        "then draws the same images for every seed too.",
        0.0,
        range=Range(0, 1, below=True),
    )
    on_bad_image: Literal["raise", "skip"] = _help(
        "What to do with a picture that cannot be read. skip: decode every picture once before the parts are drawn, "
        "leave those out of every part, and list them in OUTPUT_DIR/train_datasets_report.json.",
        "raise",
    )
    exclude_karpathy: list[str] = _help("Karpathy JSON files. Their test images are left out of training.", [])
    cache_dir: str | None = _help(
        "Folder of what is cached by content: a detector's answers and the frozen models' features. By default "
        "answers are in ~/.cache/modeling_dclip (or XDG_CACHE_HOME), which all runs share, and features in "
        "OUTPUT_DIR/cache."
    )
    seed: int = _help("Seed of every random draw. A section's own seed overrides it.", 0, range=SEED)
    seeds: list[int] = _help(
        "Run once with each of these seeds, in OUTPUT_DIR/ARM/seed-N. By default once, with seed.", [], range=SEED
    )
    arms: dict[str, Any] | str | None = _help(
        "Variants of this recipe to compare: name -> fields and sections that override this recipe's. They share one "
        "anchor.",
        "{}",
    )
    baseline: str | None = _help("The arm that the others are compared with, paired by seed.")
    overwrite: bool = _help("Repeat stages whose inputs have changed, instead of stopping with an error.", False)
    evaluate: list[str] = _help("Benchmarks to run on anchor and student at the end, each NAME=SPEC.", [])
    alphas: list[float] = _help(
        "In a recipe of arms or seeds: evaluate these points too, on the line from the anchor (0) to the weights that "
        "training reached (1), and compare arms at equal retention along them.",
        [],
        range=PART,
    )
    push_to_hub: str | None = _help(
        "namespace/name on the Hub: publish the trained model there at the end, as modeling_dclip.hub.publish does. "
        "Needs evaluate and push_license."
    )
    push_license: str | None = _help("Licence of the published weights, as the Hub writes it.")
    push_arm: str | None = _help("The arm to publish, with its first seed. Required if there are several arms.")
    push_private: bool = _help("Make the published repositories private.", False)

    @property
    def leaves_validation(self) -> bool:
        """Whether some images are neither trained on nor in the test part."""
        return Fraction(str(self.train_fraction)) + Fraction(str(self.test_fraction)) < 1

    @property
    def data_seed(self) -> int:
        """The seed of the draws of images: with a test part one for all runs, which share the part."""
        return 0 if self.test_fraction else self.seed

    @property
    def variants(self) -> dict[str, dict[str, Any]]:
        """The arms by name, each with the fields and sections that it overrides."""
        arms = self.arms if isinstance(self.arms, dict) else {}
        return {arm: {} if overrides is None else overrides for arm, overrides in arms.items()}

    def __post_init__(self) -> None:
        check_numbers(self)
        self.stages = [name for entry in self.stages for name in entry.split(",") if name]
        unknown = [name for name in self.stages if name not in STAGES]
        if unknown:
            raise ValueError(f"Unknown stage {unknown[0]!r} in stages. Known stages: {', '.join(STAGES)}.")
        _parse_json(self, "arms")
        for arm, overrides in self.variants.items():
            if not isinstance(overrides, dict):
                raise ValueError(f"arms: expected a mapping of fields for the arm {arm!r}, got {overrides!r}.")
        if self.baseline is not None and self.baseline not in self.variants:
            raise ValueError(f"Expected baseline to be one of the arms {list(self.variants)}, got {self.baseline!r}.")
        if Fraction(str(self.train_fraction)) + Fraction(str(self.test_fraction)) > 1:
            raise ValueError(
                f"train_fraction {self.train_fraction:g} and test_fraction {self.test_fraction:g} are more than all "
                f"images. Set train_fraction to at most {float(1 - Fraction(str(self.test_fraction))):g}, less if "
                "some are to be validated on."
            )
        if self.alphas and not (self.evaluate and (len(self.seeds) > 1 or len(self.variants) > 1)):
            raise ValueError(
                "alphas: expected evaluate and several arms or seeds beside it, whose students are measured together. "
                "For one student run eval.py --alphas."
            )
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: expected different seeds, which have a folder each, got {self.seeds}.")
        if self.push_to_hub is not None:
            self._check_push()

    def _check_push(self) -> None:
        for name in ("push_license", "evaluate"):
            if not getattr(self, name):
                raise ValueError(f"push_to_hub: expected {name} beside it, which the model's card needs, got none.")
        arms = list(self.variants)
        if self.push_arm is None and len(arms) > 1:
            raise ValueError(f"push_to_hub: expected push_arm, one of the arms {arms} to publish, got none.")
        if self.push_arm is not None and self.push_arm not in arms:
            raise ValueError(f"push_arm: expected one of the arms {arms}, got {self.push_arm!r}.")


@dataclass
class StageTrainingArguments(TrainingArguments):
    """Defaults of every stage that trains."""

    report_to: list[str] = _help(
        "Where to log besides the console and trainer_state.json: auto (tensorboard if it is installed), none, or "
        "trackers by name, such as tensorboard, wandb, trackio.",
        ["auto"],
    )
    remove_unused_columns: bool = _help("Must stay false: batches hold columns that no forward method names.", False)
    dataloader_drop_last: bool = _help(
        "Drop the last, smaller batch of an epoch: it would have fewer negatives.", True
    )
    logging_nan_inf_filter: bool = _help("Hide NaN in the log (see on_nonfinite).", False)
    logging_steps: float = _help("Log every n steps; a value below 1 is a share of all steps.", 50)
    on_nonfinite: Literal["stop", "skip"] = _help(
        "What to do with a step whose loss or gradient is NaN or infinite. skip: leave it out and count it.", "stop"
    )
    save_strategy: str = _help("When to save checkpoints: no, steps or epoch.", "epoch")
    save_total_limit: int | None = _help("Number of checkpoints to keep, beside the best one.", 1)
    per_device_eval_batch_size: int | None = _help(  # type: ignore[assignment]
        "Validation images per step and process. By default as many as in training, so that the in-batch losses of "
        "both can be compared.",
    )
    lr_scheduler_type: str = _help("Learning-rate schedule.", "constant")
    ddp_find_unused_parameters: bool | None = _help(
        "Search for unused parameters; every trained parameter is used.", False
    )
    image_cache_mib: int = _help(
        "Memory for decoded pixels in MiB per process; 0 decodes each image every time.",
        2048,
        range=Range(0, 2**24, whole=True),
    )

    def __post_init__(self) -> None:
        check_section(self)
        if self.remove_unused_columns:
            raise ValueError(
                "remove_unused_columns: expected false, got true. Batches hold columns that no forward method names."
            )
        for name, reason in _OTHER_RESULTS.items():
            if getattr(self, name) and default_of(type(self).__dataclass_fields__[name]) is False:
                raise ValueError(f"{name}: expected false, got true. {reason}")
        self.report_to = _find_trackers(self.report_to)
        package = EIGHT_BIT_PACKAGES.get(str(self.optim))
        if package is not None and not is_installed(package):
            raise ImportError(
                f"optim: expected the package {package} for {str(self.optim)!r}, got none. Install it with `pip "
                f"install {package}`, or set optim to adamw_torch."
            )
        self.dataloader_pin_memory &= torch.accelerator.is_available()  # otherwise PyTorch warns once per epoch
        try:
            super().__post_init__()
        except TypeError as error:  # an unknown key of a mapping that transformers or accelerate takes
            raise ValueError(f"expected fields that transformers' TrainingArguments takes, got: {error}.") from error
        metric, known = self.metric_for_best_model, self.validation_metrics
        if metric is not None and metric.removeprefix("eval_") not in known:
            raise ValueError(
                f"metric_for_best_model: expected what a validation measures, of {', '.join(known)}, got "
                f"{shown(metric)}."
            )

    @property
    def validation_metrics(self) -> list[str]:
        """Names of what a validation measures, and `metric_for_best_model` may be."""
        return ["loss"]

    @property
    def eval_batch_size(self) -> int:
        """Validation images per step and process."""
        if self.per_device_eval_batch_size is None:
            return self.train_batch_size
        return super().eval_batch_size

    @property
    def n_gpu(self) -> int:
        """At most 1: with more, transformers would train by `DataParallel`, whose parts of a batch share no negatives.

        Several GPUs have a process each, which `accelerate launch` starts.
        """
        return min(super().n_gpu, 1)


@dataclass
class AdapterArguments(StageTrainingArguments):
    """Low-rank adapters in place of whole weights. Without `lora_rank` there are none."""

    lora_rank: int | None = _help(
        "Train low-rank adapters (LoRA) of this rank and freeze every other weight.", range=Range(1, 2**13, whole=True)
    )
    lora_alpha: int | None = _help(
        "The adapters are scaled by lora_alpha / lora_rank. Defaults to lora_rank, a scale of 1.",
        range=Range(1, 2**20, whole=True),
    )
    lora_dropout: float = _help("Dropout in front of the adapters, in [0, 1).", 0.0, range=Range(0, 1, below=True))
    use_dora: bool = _help("Use DoRA: train a magnitude beside the low-rank direction.", False)
    lora_target_modules: list[str] = _help(
        "Names of the linear layers to adapt, the last part of each. By default the projections of attention, Mamba "
        "mixers and MLPs.",
        [],
    )
    merge_adapter: bool = _help(
        "Save whole weights with the adapter merged in, beside the adapter. If false, save the adapter alone.", True
    )

    def __post_init__(self) -> None:
        check_section(self)
        defaults = {f.name: default_of(f) for f in fields(self) if f.name in ADAPTER_FIELDS}
        changed = [name for name, default in defaults.items() if getattr(self, name) != default]
        if self.lora_rank is None and changed:
            raise ValueError(f"{changed[0]}: expected lora_rank beside it, got none. Set the rank, for example 16.")
        if self.lora_rank is not None and not is_installed("peft"):
            raise ImportError(
                'lora_rank: expected the package peft, got none. Install it with `pip install "modeling_dclip[peft]"`.'
            )
        super().__post_init__()


def check_section(arguments: "Section | StageTrainingArguments") -> None:
    """Check every number of a section against its range.

    Raises:
        ValueError: Naming `section.field`, the range and the value.
    """
    name = next((name for name, kind in SECTIONS.items() if kind is type(arguments)), None)
    check_numbers(arguments, f"{name}." if name else "", INHERITED_RANGES)


def check_pattern(pattern: str) -> str:
    """The regular expression that a pattern of `student.freeze` stands for.

    Args:
        pattern (`str`): A glob, or a regular expression after `re:`.

    Returns:
        `str`: For `re.fullmatch`.

    Raises:
        ValueError: If it is no regular expression; the message has the pattern.
    """
    if not pattern.startswith(REGEX_PREFIX):
        return fnmatch.translate(pattern)
    try:
        return re.compile(pattern.removeprefix(REGEX_PREFIX)).pattern
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(
            f"Freeze pattern {pattern!r}: expected a regular expression after 're:' ({error})."
        ) from error


class WiseFTRule(NamedTuple):
    """A rule that chooses `wise_ft_alpha`: of the points that keep `retention`, that of the highest `metric`."""

    metric: str
    retention: float


_RULE = re.compile(r"best (\S+) at retention (\S+)")


def parse_wise_ft_rule(text: str) -> WiseFTRule:
    """Take `student.wise_ft_rule` apart.

    Args:
        text (`str`): `best METRIC at retention NUMBER`.

    Returns:
        [`WiseFTRule`]: Its metric is one of a student's validation, its retention in (0, 1].

    Raises:
        ValueError: If it is something else; the message shows the form and the metrics.

    Example:
        >>> parse_wise_ft_rule("best mean_recall@1 at retention 0.98")
        WiseFTRule(metric='mean_recall@1', retention=0.98)
    """
    match, retention = _RULE.fullmatch(" ".join(text.split())), None
    if match is not None:
        try:
            retention = float(match[2])
        except ValueError:
            retention = None
    if match is None or retention is None or match[1] not in (MEAN_RECALL, *RECALLS) or retention not in AREA:
        raise ValueError(
            "wise_ft_rule: expected 'best METRIC at retention NUMBER' with METRIC one of "
            f"{', '.join((MEAN_RECALL, *RECALLS))} and NUMBER above 0 and at most 1, such as 'best {MEAN_RECALL} at "
            f"retention 0.98', got {shown(text)}."
        )
    return WiseFTRule(match[1], retention)


def is_installed(package: str) -> bool:
    """Whether a package is installed. It is not imported."""
    return importlib.util.find_spec(package) is not None


def default_of(one: Field) -> Any:
    """The default of a dataclass field."""
    return one.default_factory() if callable(one.default_factory) else one.default


def _parse_json(arguments: "RunArguments | AnchorArguments | DMCLIPArguments", *names: str) -> None:
    """Replace fields that hold JSON text, as the command line gives them, by the mapping they spell."""
    for name in names:
        value = getattr(arguments, name)
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except json.JSONDecodeError as error:
                raise ValueError(f"{name}: expected a mapping as JSON, got {value!r} ({error}).") from error
        if not isinstance(value, dict):
            raise ValueError(f"{name}: expected a mapping, got {value!r}.")
        setattr(arguments, name, value)


def _find_trackers(names: str | list[str]) -> list[str]:
    """The trackers that a run reports to, all of them installed."""
    names = [names] if isinstance(names, str) else list(names)
    if names == ["auto"]:
        return ["tensorboard"] if is_installed("tensorboard") else []
    if names in (["none"], ["all"], []):
        return names if names == ["all"] else []
    available = get_available_reporting_integrations()
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ValueError(
                f"report_to: expected trackers, of {', '.join(INTEGRATION_TO_CALLBACK)}, or auto, all or none alone, "
                f"got {shown(name)}."
            )
        if name not in available:
            raise ImportError(
                f"report_to: expected an installed tracker ({', '.join(available) or 'none is installed'}), got "
                f"{name!r}. Install it with `pip install {name}`, or set report_to to none: losses also go to "
                "trainer_state.json."
            )
    return names


@dataclass
class AnchorArguments(StageTrainingArguments):
    """Section `anchor`: contrastive pretraining of a small CLIP, or of the projections of two pretrained towers."""

    train_datasets: list[str] = _help("Captioned images to pretrain on. Defaults to the recipe's train_datasets.", [])
    vision_config: dict[str, Any] | str | None = _help("Fields of DCLIPVisionConfig.", "{}")
    text_config: dict[str, Any] | str | None = _help(
        "Fields of CLIPTextConfig; vocabulary and special tokens come from the tokenizer.", "{}"
    )
    vision_model: str | None = _help(
        "A pretrained image encoder to start from, a folder or Hub id (a ViT, DINOv2, a model of timm); with "
        "text_model. The anchor is then a VisionTextDualEncoder of the two."
    )
    text_model: str | None = _help(
        "A pretrained text encoder to start from, a folder or Hub id (BERT and its kin), with its tokenizer."
    )
    freeze_vision: bool = _help("With vision_model: it keeps its weights, and its projection trains.", True)
    freeze_text: bool = _help("With text_model: it keeps its weights, and its projection trains.", True)
    projection_dim: int = _help("Width of the shared space.", 128, range=WIDTH)
    tokenizer: str = _help(
        "scenes: train one on the sentences of drawn scenes; captions: train one on the training captions; else a "
        "folder or Hub id.",
        "scenes",
    )
    vocab_size: int = _help(
        "Vocabulary size of a tokenizer that is trained.", 512, range=Range(300, 10**6, whole=True)
    )
    max_length: int = _help(
        "Longest text in tokens, of a tokenizer that is trained.", 48, range=Range(3, 10**4, whole=True)
    )
    image_to_text_weight: float = _help(
        "Share of the image-to-text direction in the loss; the rest is the text-to-image direction.", 0.5, range=PART
    )
    save_dtype: Literal["float32", "float16", "bfloat16"] = _help(
        "Type of the saved weights; training is float32.", "float32"
    )
    learning_rate: float = _help("Peak learning rate.", 1e-3)
    weight_decay: float = _help("Weight decay of matrices.", 0.1)
    lr_scheduler_type: str = _help("Learning-rate schedule.", "cosine")
    warmup_steps: float = _help("Steps of linear warm-up; a value below 1 is a share of all steps.", 0.1)

    def __post_init__(self) -> None:
        _parse_json(self, "vision_config", "text_config")
        if (self.vision_model is None) != (self.text_model is None):
            given, other = (
                ("vision_model", "text_model") if self.text_model is None else ("text_model", "vision_model")
            )
            raise ValueError(
                f"{given}: expected {other} beside it, got none. An anchor is made of two pretrained towers, or from "
                "scratch. Name both, or neither."
            )
        super().__post_init__()

    @property
    def joins_towers(self) -> bool:
        """Whether the anchor is made of two pretrained towers, not from scratch."""
        return self.vision_model is not None


@dataclass
class RegionsArguments:
    """Section `regions`: where to look in each image."""

    detector: str | None = _help(
        "Spec of a detector, e.g. ultralytics:yolov8x.pt (see docs/data.md). Without one the dataset's own boxes are "
        "used, or the whole image if it has none."
    )
    ignore_boxes: bool = _help("Drop the dataset's own boxes, so that the whole image is the only region.", False)
    max_regions: int | None = _help("Keep this many regions per image, those with the highest scores.", range=COUNT)
    batch_size: int = _help("Images per call of the detector.", 16, range=BATCH)
    on_bad_image: Literal["raise", "skip"] = _help(
        "Must stay raise: the global --on_bad_image skip leaves images that cannot be read out of every part.", "raise"
    )
    trust_checkpoint: bool = _help(
        "Load YOLO weights (.pt) whose SHA-256 is not known. Such a file runs code when it is loaded.", False
    )

    def __post_init__(self) -> None:
        check_section(self)
        if self.on_bad_image != "raise":
            raise ValueError(
                f"on_bad_image: expected raise, got {self.on_bad_image}. Set the global field, --on_bad_image skip: "
                "it leaves images that cannot be read out of every part, with and without regions."
            )


@dataclass
class TeacherArguments(StageTrainingArguments):
    """Section `teacher`: the cross-modal block, its training, and how it reads regions."""

    cross_attention: Literal["bidirectional", "text_to_image", "image_to_text", "none", "regions"] = _help(
        "Which stream attends to which. none has nothing to train. regions is the leak-free teacher, which reads no "
        "caption.",
        "bidirectional",
    )
    num_attention_heads: int = _help(
        "Heads of each attention layer of the block.", 8, range=Range(1, 1024, whole=True)
    )
    attention_temperature: float = _help("Temperature of the softmax that pools regions.", 2.0, range=TEMPERATURE)
    text_share: float = _help("Share of the text stream in the embedding, in [0, 1].", 0.5, range=PART)
    region_weighting: bool = _help("Weight regions by area, score and similarity to the caption.", True)
    aggregation: Literal["mean", "multi_cluster"] = _help("How the streams are combined into one embedding.", "mean")
    num_clusters: int = _help("Clusters of the aggregation multi_cluster.", 3, range=Range(1, 1000, whole=True))
    num_cluster_steps: int = _help(
        "k-means steps of the aggregation multi_cluster.", 5, range=Range(1, 1000, whole=True)
    )
    num_region_layers: int = _help("Self-attention layers over regions.", 2, range=LAYERS)
    region_feedforward_ratio: int = _help("Width of their MLPs, as a multiple of the embedding's.", 2, range=LAYERS)
    loss_temperature: float = _help("Temperature of the teacher's InfoNCE.", 0.05, range=TEMPERATURE)
    save_dtype: SaveDtype = _save_dtype()
    learning_rate: float = _help("Peak learning rate.", 1e-5)
    num_train_epochs: float = _help("Passes over the images.", 3.0)
    per_device_train_batch_size: int = _help("Pairs per step and process.", 64)

    def architecture(self) -> dict[str, Any]:
        """The fields of `DCLIPTeacherConfig`."""
        names = (
            "cross_attention", "num_attention_heads", "attention_temperature", "text_share", "region_weighting",
            "aggregation", "num_clusters", "num_cluster_steps", "num_region_layers", "region_feedforward_ratio",
            "loss_temperature",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}


@dataclass
class TargetsArguments:
    """Section `targets`: one pass of the frozen models over the data."""

    batch_size: int = _help("Images per forward pass, each with its regions.", 16, range=BATCH)
    text_batch_size: int = _help("Captions per forward pass.", 256, range=BATCH)
    chunk_rows: int = _help(
        "Images per cache file: the most that a killed run loses.", 512, range=Range(1, 10**6, whole=True)
    )
    num_workers: int = _help("Processes that decode and crop images.", 0, range=WORKERS)

    def __post_init__(self) -> None:
        check_section(self)


@dataclass
class StudentArguments(AdapterArguments):
    """Section `student`: fine-tuning of the image encoder."""

    cosine_distillation_loss_weight: float = _help(
        "Weight of 1 - cosine to the teacher's embedding.", 1.0, range=WEIGHT
    )
    contrastive_loss_weight: float = _help(
        "Weight of the contrastive loss against the frozen text embeddings.", 1.0, range=WEIGHT
    )
    contrastive_loss: Literal["auto", "softmax", "sigmoid"] = _help(
        "softmax: InfoNCE, at temperature. sigmoid: SigLIP's loss, with the model's own scale and bias. auto: the one "
        "that the model's family was trained with.",
        _OWN_LOSS,
    )
    cosine_preservation_loss_weight: float = _help(
        "Weight of 1 - cosine to the anchor's image embedding.", 0.0, range=WEIGHT
    )
    similarity_distillation_loss_weight: float = _help(
        "Weight of the KL from the teacher's in-batch similarities.", 0.0, range=WEIGHT
    )
    l2_sp_loss_weight: float = _help(
        "Weight of half the squared distance of the trained weights to the anchor's (L2-SP).", 0.0, range=WEIGHT
    )
    ema_decay: float | None = _help(
        "Validate and save the exponential moving average of the weights over the steps, which keeps this share of "
        "itself in each step, such as 0.99. By default the weights themselves.",
        range=Range(0, 1, below=True),
    )
    layer_decay: float = _help(
        "Each layer of the image encoder learns at this share of the rate of the layer above it; what stands above "
        "the layers learns at learning_rate.",
        1.0,
        range=Range(0, 1, above=True),
    )
    temperature: float = _help("Temperature of the softmax contrastive loss.", 0.05, range=TEMPERATURE)
    similarity_temperature: float = _help(
        "Temperature of the student's softmax in the similarity loss.", 0.05, range=TEMPERATURE
    )
    similarity_teacher_temperature: float | None = _help(
        "Temperature of the teacher's softmax in the similarity loss. Defaults to the student's.", range=TEMPERATURE
    )
    image_to_text_weight: float = _help(
        "Share of the image-to-text direction in both in-batch losses.", 0.5, range=PART
    )
    negatives: Literal["batch", "bank"] = _help(
        "What the contrastive and the similarity loss compare with. batch: the images and captions of the step. bank: "
        "all captions of the training set, by their stored embeddings, and all its images, by their embeddings of the "
        "last visit (before the first one the anchor's); the batch size then matters little.",
        "batch",
    )
    batch_order: Literal["random", "hard"] = _help(
        "Which images come together in a step. hard: images that are near each other by the anchor's embeddings.",
        "random",
    )
    hard_negatives: Literal["none", "column", "swap", "both"] = _help(
        "False captions of each image as further wrong answers of the contrastive loss, from image to text. column: "
        "those of the dataset's column of false captions, which negatives=COLUMN names in its spec. swap: those that "
        "rules make of its captions, in English, by exchanging colours, numbers, left and right or the like.",
        "none",
    )
    bank_limit: int = _help(
        "Most captions, and most images, that negatives: bank compares with. Where there are more, each epoch draws "
        "as many.",
        _BANK_LIMIT,
        range=COUNT,
    )
    micro_batch_size: int | None = _help(
        "Images that pass the model at once. The losses still compare the whole batch: its gradient in the memory of "
        "a smaller one, for about a quarter more time.",
        range=COUNT,
    )
    max_negative_similarity: float = _help(
        "With negatives: bank, captions whose stored embedding has at least this cosine to the image's own caption "
        "are no negatives. Above 1 all other captions are.",
        _ALL_NEGATIVES,
        range=Range(-1, 1.01),
    )
    freeze: list[str] = _help(
        "Names of parameters of the image encoder to freeze: globs, or regular expressions after re:.", []
    )
    position_embedding_type: Literal["absolute", "rope"] = _help(
        "rope: slow rotary positions beside CLIP's learned table, interpolated to the picture.", "absolute"
    )
    lora_text: bool = _help(
        "Adapt the text tower too. Text embeddings then change, so stored ones no longer fit.", False
    )
    wise_ft_alpha: float = _help(
        "Interpolate the saved weights: this share of the student, the rest of the anchor. 1 saves the student.",
        1.0,
        range=PART,
    )
    probe: list[str] = _help(
        "Benchmarks to measure while training, each NAME=SPEC as in evaluate (retrieval, zero_shot, fine_grained, "
        "diagnostics): before the first step, every probe_steps and after the last step. They only show how training "
        "goes, unless keep_retention or wise_ft_rule reads them.",
        [],
    )
    probe_steps: float = _help(
        "Measure probe every n steps; a value below 1 is a share of all steps.", 0.25, range=STEPS
    )
    keep_retention: float | None = _help(
        "Stop at the first probe whose zero-shot accuracy is less than this share of the accuracy before training "
        "(mean over the zero_shot benchmarks of probe), and keep the weights of the last probe that was not.",
        range=AREA,
    )
    wise_ft_rule: str | None = _help(
        "Choose wise_ft_alpha after training, as 'best METRIC at retention NUMBER': of 11 points from the anchor to "
        "the student, the one with the best METRIC on the validation images (mean_recall@1, text_to_image_recall@1 or "
        "image_to_text_recall@1) that keeps this share of the zero-shot accuracy of probe."
    )
    min_crop_area: float = _help(
        "If below 1, train on random square crops of at least this share of the image's area.", 1.0, range=AREA
    )
    save_dtype: SaveDtype = _save_dtype()
    load_best_model_at_end: bool | None = _help(  # type: ignore[assignment]
        "Keep the student of the best validation. By default so where there is a validation part; the best is then "
        "that of the highest mean R@1 of both directions, or by metric_for_best_model. false: keep the last one."
    )
    learning_rate: float = _help("Peak learning rate.", 1e-6)
    weight_decay: float = _help("Weight decay of matrices.", 0.01)
    num_train_epochs: float = _help("Passes over the images.", 2.0)
    per_device_train_batch_size: int = _help("Images per step and process.", 32)
    max_grad_norm: float = _help("Clip gradients to this norm.", 0.5)

    @property
    def reads_teacher(self) -> bool:
        """Whether any loss term reads the teacher's embeddings."""
        return bool(self.cosine_distillation_loss_weight or self.similarity_distillation_loss_weight)

    @property
    def false_captions(self) -> str:
        """Which false captions a loss term reads, as `hard_negatives`."""
        return self.hard_negatives if self.contrastive_loss_weight else "none"

    @property
    def columns(self) -> list[str]:
        """The embedding columns that the loss terms read."""
        reads_text = self.contrastive_loss_weight or self.similarity_distillation_loss_weight
        names = {
            "teacher_embeds": self.reads_teacher,
            "text_embeds": reads_text,
            "anchor_embeds": self.cosine_preservation_loss_weight
            or self.negatives == "bank"
            or self.batch_order == "hard",
            "negative_embeds": self.false_captions != "none",
        }
        return [name for name, read in names.items() if read]

    @property
    def validation_metrics(self) -> list[str]:
        """Retrieval, the loss and each of its terms."""
        terms = [name.removesuffix("_weight") for name in self.__dataclass_fields__ if name.endswith("_loss_weight")]
        return [MEAN_RECALL, *RECALLS, "loss", *(name for name in terms if getattr(self, f"{name}_weight"))]

    def __post_init__(self) -> None:
        check_section(self)
        for pattern in self.freeze:
            check_pattern(pattern)
        if not (self.reads_teacher or self.contrastive_loss_weight or self.cosine_preservation_loss_weight):
            raise ValueError("Expected at least one loss weight above 0, got none: there is nothing to learn.")
        if self.use_dora and self.wise_ft_alpha < 1:
            raise ValueError(
                "wise_ft_alpha: expected 1 with use_dora, whose adapter cannot be scaled between anchor and "
                f"student, got {self.wise_ft_alpha}. Leave use_dora out, or interpolate the saved weights when you "
                "evaluate them."
            )
        if self.lora_rank is not None and not self.merge_adapter and self.save_dtype not in ("auto", "float32"):
            raise ValueError(
                "save_dtype: expected auto or float32 without merge_adapter, which saves the adapter alone, in "
                f"float32, got {self.save_dtype}. Leave one of both out."
            )
        if self.l2_sp_loss_weight and self.lora_rank is not None:
            raise ValueError(
                "l2_sp_loss_weight: expected 0 with adapters, which leave the anchor's weights as they are, got "
                f"{self.l2_sp_loss_weight}. Leave one of both out."
            )
        if self.negatives == "bank" and (self.lora_text or "text_embeds" not in self.columns):
            raise ValueError(
                "negatives: expected batch "
                + (
                    "with lora_text, which changes the text embeddings"
                    if self.lora_text
                    else "without a loss on texts"
                )
                + ", got bank. Leave one of both out."
            )
        if self.lora_text and self.hard_negatives != "none":
            raise ValueError(
                "hard_negatives: expected none with lora_text, which changes the text embeddings, got "
                f"{self.hard_negatives}. Leave one of both out."
            )
        if self.lora_text and not {"text_embeds"} & set(self.columns):
            raise ValueError("lora_text: expected a loss that reads texts, got none. Set contrastive_loss_weight.")
        self._check_choices()
        asked, self.load_best_model_at_end = self.load_best_model_at_end, False
        super().__post_init__()
        self._resolve_best(asked)

    @property
    def choosing_field(self) -> str | None:
        """The field that lets the benchmarks of `probe` choose weights; `None` if they are watched only."""
        return next((name for name in _CHOOSING if getattr(self, name) is not None), None)

    def _check_choices(self) -> None:
        """Refuse a choice of weights by benchmarks or by a validation that are not there."""
        if (name := self.choosing_field) and not any(one.partition("=")[0] == "zero_shot" for one in self.probe):
            raise ValueError(
                f"{name}: expected a zero_shot benchmark in probe, whose accuracy is to be kept, got "
                f"{', '.join(self.probe) or 'none'}. Set probe, for example to zero_shot=imagefolder:FOLDER."
            )
        if self.wise_ft_rule is None:
            return
        parse_wise_ft_rule(self.wise_ft_rule)
        if self.wise_ft_alpha != 1:
            raise ValueError(
                f"wise_ft_rule: expected wise_ft_alpha 1 beside it, which it chooses, got {self.wise_ft_alpha:g}. "
                "Leave one of both out."
            )
        if self.use_dora:
            raise ValueError(
                "wise_ft_rule: expected no use_dora, whose adapter cannot be scaled between anchor and student, got "
                "true. Leave one of both out."
            )
        if self.eval_strategy == IntervalStrategy.NO:
            raise ValueError(
                "wise_ft_rule: expected a validation part, whose images choose, got eval_strategy no. Set "
                "eval_strategy to epoch or steps, and train_fraction below 1."
            )

    def _resolve_best(self, asked: bool | None) -> None:
        """Decide whether the best checkpoint is kept, and by what. The base class would refuse checkpoints at other
        steps than validations; the trainer saves one at each validation.
        """
        possible = self.eval_strategy != IntervalStrategy.NO and self.save_strategy != SaveStrategy.NO
        if asked and not possible:
            raise ValueError(
                "load_best_model_at_end: expected an eval_strategy and a save_strategy beside it, got "
                f"{IntervalStrategy(self.eval_strategy).value} and {SaveStrategy(self.save_strategy).value}. Set both "
                "to epoch or steps."
            )
        self.load_best_model_at_end = possible if asked is None else asked
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = MEAN_RECALL
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            self.greater_is_better = not self.metric_for_best_model.endswith("loss")


@dataclass
class ReinforceArguments:
    """Section `reinforce`: shards that hold each image's augmentations, its captions and the teachers' embeddings of
    both.
    """

    folder: str | None = _help(
        "Folder of the shards. Defaults to OUTPUT_DIR/reinforce, which all arms and seeds of a recipe share."
    )
    teachers: list[str] = _help(
        "CLIPs whose embeddings are stored side by side, in this order: folders, Hub ids, or open_clip:NAME:TAG. "
        "Defaults to clip_model.",
        [],
    )
    augmentations: int = _help(
        "Stored augmentations per image. A training sample draws one of them.", 30, range=Range(1, 10**6, whole=True)
    )
    image_size: int | None = _help("Side of an augmented image in pixels. Defaults to dmclip.image_size.", range=SIDE)
    min_crop_area: float = _help(
        "Smallest share of the image that a random resized crop keeps, in (0, 1].", 0.08, range=AREA
    )
    num_operations: int = _help(
        "Operations of RandAugment after the crop; 0 keeps the crop as it is.", 2, range=Range(0, 100, whole=True)
    )
    magnitude: int = _help("Magnitude of RandAugment, 0 to 30.", 9, range=Range(0, 30, whole=True))
    synthetic_captions: str | None = _help("Column of the datasets with synthetic captions, one or a list per image.")
    captioner: str | None = _help(
        "An image-to-text model that writes synthetic captions, in place of a column: folder or Hub id."
    )
    captions_per_image: int = _help(
        "Synthetic captions per image that the captioner writes.", 5, range=Range(1, 1000, whole=True)
    )
    samples_per_shard: int = _help(
        "Images per tar file: the most that a killed run loses.", 1000, range=Range(1, 10**6, whole=True)
    )
    dtype: Literal["float16", "float32"] = _help("Type of the stored embeddings.", "float16")
    batch_size: int = _help("Augmented images per forward pass of a teacher.", 64, range=BATCH)
    num_workers: int = _help("Processes that decode and augment images.", 0, range=WORKERS)
    seed: int = _help("Seed of the augmentations, and of the images that @COUNT draws.", 0, range=SEED)

    def __post_init__(self) -> None:
        check_section(self)
        if self.synthetic_captions is not None and self.captioner is not None:
            raise ValueError("reinforce: expected synthetic_captions (a column) or captioner, got both.")


@dataclass
class DMCLIPArguments(StageTrainingArguments):
    """Section `dmclip`: a MambaVision CLIP trained on reinforced shards."""

    train_shards: str | None = _help(
        "Shards to train on: a folder, a tar file or a pattern ({0000..0999}, *). Defaults to those of the stage "
        "reinforce."
    )
    train_samples: int | None = _help(
        "Samples to train on, over all processes, in place of max_steps.", range=Range(1, 10**12, whole=True)
    )
    teacher_widths: list[int] = _help(
        "Widths of the teachers' embeddings in the shards, in order. By default read from the index beside the "
        "shards.",
        [],
        range=WIDTH,
    )
    model: str | None = _help(
        "A DM-CLIP checkpoint to continue from: folder or Hub id. By default a model is made from scratch."
    )
    preset: Literal["T", "T2", "S", "B", "L"] | None = _help(
        "Size of the image encoder. Defaults to T, unless model or vision_model is set."
    )
    vision_config: dict[str, Any] | str | None = _help(
        "Fields of DMCLIPVisionConfig that override the preset's.", "{}"
    )
    text_config: dict[str, Any] | str | None = _help(
        "Fields of DMCLIPTextConfig; vocabulary, special tokens and length come from the tokenizer.", "{}"
    )
    projection_dim: int | None = _help(
        "Width of the shared space. Defaults to that of model, text_model or a whole DM-CLIP in vision_model, else "
        "512.",
        range=WIDTH,
    )
    image_size: int | None = _help(
        "Side of the images in pixels. Defaults to that of model or vision_model, else 256. The attention windows are "
        "chosen to divide the feature maps, unless vision_config sets window_sizes.",
        range=SIDE,
    )
    tokenizer: str | None = _help("Folder or Hub id of a tokenizer. Defaults to that of clip_model.")
    vision_model: str | None = _help(
        "A pretrained image encoder to start from, with its preprocessing: folder or Hub id of a DM-CLIP or of its "
        "image encoder, for example one that modeling_dclip.hub.convert made of MambaVision. A projection of another "
        "width is initialised anew."
    )
    text_model: str | None = _help(
        "A pretrained text tower to start from: folder or Hub id of a DM-CLIP or of its text tower."
    )
    freeze_text: bool = _help("Freeze the text tower.", False)
    contrastive_loss_weight: float = _help("Weight of InfoNCE between images and texts.", 0.25, range=WEIGHT)
    distillation_loss_weight: float = _help(
        "Weight of the cross-entropy from the teachers' in-batch similarities.", 0.75, range=WEIGHT
    )
    synthetic_captions: bool | None = _help(
        "Compute both losses also over one synthetic caption per image, and add them. By default if the shards have "
        "synthetic captions."
    )
    teacher_logit_scale: float | None = _help(
        "Multiplies every teacher's cosines. By default each teacher's own trained scale if the index beside the "
        "shards has it, else 100.",
        range=Range(0, 1e6, above=True),
    )
    image_to_text_weight: float = _help("Share of the image-to-text direction in both losses.", 0.5, range=PART)
    synthetic_keys: str = _help("Regular expression of the keys that hold synthetic captions.", "syn_text.*")
    samples_per_epoch: int | None = _help(
        "Samples per epoch, over all processes. By default all; without an index they are counted first.",
        range=Range(1, 10**12, whole=True),
    )
    shuffle_buffer: int = _help(
        "Size of the shuffle buffer in samples; a larger one shuffles better.",
        10000,
        range=Range(1, 10**7, whole=True),
    )
    on_bad_sample: Literal["raise", "skip"] = _help(
        "What to do with a damaged shard or sample. skip: leave it out and report it.", "raise"
    )
    save_dtype: SaveDtype = _save_dtype()
    learning_rate: float = _help("Peak learning rate.", 1e-4)
    adam_beta2: float = _help("Second beta of AdamW.", 0.95)
    weight_decay: float = _help("Weight decay of matrices.", 0.2)
    max_grad_norm: float = _help("Clip gradients to this norm.", 1.0)
    warmup_steps: float = _help("Steps of linear warm-up; a value below 1 is a share of all steps.", 1000)
    lr_scheduler_type: str = _help("Learning-rate schedule.", "cosine")
    per_device_train_batch_size: int = _help("Images per step and process.", 256)
    micro_batch_size: int | None = _help(
        "Images that pass the model at once. The losses still compare the whole batch: its gradient in the memory of "
        "a smaller one, for about a quarter more time. BatchNorm sees these images alone.",
        range=COUNT,
    )
    save_strategy: str = _help("When to save checkpoints: no or steps. A stream of shards has no epochs.", "steps")
    save_steps: float = _help("Save every n steps; a value below 1 is a share of all steps.", 1000)

    ignore_data_skip: bool = _help(
        "Must stay true: a resumed stream continues by itself, without reading the samples before.", True
    )

    @property
    def reads_teachers(self) -> bool:
        """Whether the loss reads the teachers' embeddings."""
        return self.distillation_loss_weight > 0

    def __post_init__(self) -> None:
        _parse_json(self, "vision_config", "text_config")
        check_section(self)
        weights = (self.contrastive_loss_weight, self.distillation_loss_weight)
        if max(weights) == 0:
            raise ValueError(f"Expected a loss weight above 0, got contrastive and distillation {weights}.")
        self._resolve_architecture()
        if not self.ignore_data_skip:
            raise ValueError(
                "ignore_data_skip: expected true, got false. A resumed stream continues by itself, so the trainer "
                "must not skip batches."
            )
        if self.bf16 and not self.use_cpu and not is_torch_bf16_gpu_available():
            logger.warning_once(  # once, not for every arm and seed
                "dmclip.bf16: no device with bfloat16 here, so training is in float32. Set dmclip.use_cpu for "
                "bfloat16 on the CPU."
            )
            self.bf16 = False
        super().__post_init__()
        self._count_steps()

    def _resolve_architecture(self) -> None:
        """Fill in the defaults of a model that is made; a pretrained one has its own."""
        if self.vision_model is not None and (self.preset or self.vision_config):
            raise ValueError(
                f"vision_model: expected no preset and no vision_config beside {self.vision_model!r}, which has its "
                "own architecture."
            )
        if self.model is None:
            if self.vision_model is None:
                self.preset, self.image_size = self.preset or "T", self.image_size or 256
                if self.text_model is None:
                    self.projection_dim = self.projection_dim or 512
        elif self.vision_model or self.text_model or self.preset or self.vision_config or self.text_config:
            raise ValueError(
                f"Expected a checkpoint to go on from ({self.model!r}) or the parts of a new model, got both. Leave "
                "out model, or vision_model, text_model, preset, vision_config and text_config."
            )

    def _count_steps(self) -> None:
        if self.train_samples is not None:
            if self.max_steps > 0:
                raise ValueError(
                    f"Expected train_samples or max_steps, got both ({self.train_samples} and {self.max_steps})."
                )
            self.max_steps = max(
                1, self.train_samples // (self.train_batch_size * self.world_size * self.gradient_accumulation_steps)
            )


# In the order of their stages.
SECTIONS = {
    "anchor": AnchorArguments,
    "regions": RegionsArguments,
    "teacher": TeacherArguments,
    "targets": TargetsArguments,
    "student": StudentArguments,
    "reinforce": ReinforceArguments,
    "dmclip": DMCLIPArguments,
}
TRAINING_SECTIONS = ("anchor", "teacher", "student", "dmclip")

Section = (
    AnchorArguments
    | RegionsArguments
    | TeacherArguments
    | TargetsArguments
    | StudentArguments
    | ReinforceArguments
    | DMCLIPArguments
)


def deciding_fields(arguments: Section) -> dict[str, Any]:
    """The fields of a section that decide the stage's result, as JSON values.

    These are all fields of this package; those of `TrainingArguments`, those of adapters and a `save_dtype` whose
    default is auto only where they differ from their defaults. Fields that decide only where and how loudly a stage
    runs are left out.

    Args:
        arguments ([`Section`]): A section.

    Returns:
        `dict[str, Any]`: Value by field name.

    Example:
        >>> deciding_fields(RegionsArguments(max_regions=3))
        {'detector': None, 'ignore_boxes': False, 'max_regions': 3}
    """
    inherited = {f.name: default_of(f) for f in fields(arguments) if f.name in ADAPTER_FIELDS}
    if isinstance(arguments, TrainingArguments):
        inherited |= {f.name: f.default for f in fields(TrainingArguments)}
    defaults = {f.name: default_of(f) for f in fields(arguments)}
    later = _LATER | (_LATER_IN_ANCHOR if isinstance(arguments, AnchorArguments) else {})
    inherited |= {name: value for name, value in later.items() if name in defaults and defaults[name] == value}
    resolved, side = as_plain(arguments), _SIDE_FIELDS
    if isinstance(arguments, StudentArguments) and arguments.choosing_field is None:
        side = side | set(_WATCHED)
    return {
        name: value
        for name, value in resolved.items()
        if name not in side and (name not in inherited or value != inherited[name])
    }


def as_plain(arguments: RunArguments | Section) -> dict[str, Any]:
    """The global fields or a section as plain values, for YAML and JSON."""
    if isinstance(arguments, TrainingArguments):
        return json.loads(json.dumps(arguments.to_dict(), default=str))
    return {f.name: getattr(arguments, f.name) for f in fields(arguments)}
