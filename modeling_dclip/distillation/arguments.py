"""What one run may set: a recipe's global fields and one section a stage, each a dataclass with typed, documented fields."""

import json
from dataclasses import dataclass, fields
from typing import Any, Literal

from transformers import TrainingArguments

from modeling_dclip.distillation.stage_arguments import (
    ADAPTER_FIELDS,
    AdapterArguments,
    StageTrainingArguments,
    default_of,
)
from modeling_dclip.distillation.stage_arguments import describe as _help

STAGES = ("anchor", "regions", "teacher", "targets", "student", "reinforce", "dmclip")

# Fields that decide where and how loudly a stage runs, not what comes out of it.
_SIDE_FIELDS = {
    "output_dir", "logging_dir", "logging_strategy", "logging_steps", "logging_first_step", "log_level", "log_on_each_node",
    "disable_tqdm", "run_name", "report_to", "save_strategy", "save_steps", "save_total_limit", "save_only_model", "use_cpu",
    "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor",
    "ddp_timeout", "ddp_backend", "ddp_find_unused_parameters", "resume_from_checkpoint", "push_to_hub", "hub_token", "local_rank",
    "image_cache_mib", "num_workers", "batch_size", "text_batch_size", "on_bad_image", "folder",
}  # fmt: skip


@dataclass
class RunArguments:
    """The global fields of a recipe."""

    output_dir: str = _help("Folder of the run; each stage writes into its own folder there.", "outputs/run")
    stages: list[str] = _help(
        f"Stages to run, of {', '.join(STAGES)}; also comma separated. By default all that the recipe needs.", []
    )
    clip_model: str | None = _help(
        "The pretrained CLIP to start from: a preset (dclip-vitb32, dclip-vitb16, dclip-vitl14), a folder or a Hub id. "
        "Without it the stage anchor makes one."
    )
    teacher_model: str | None = _help(
        "Folder or Hub id of a trained teacher around the same CLIP, in place of the stage teacher."
    )
    train_datasets: list[str] = _help(
        "Captioned images to train on: specs of modeling_dclip/data/captions.py, @COUNT at the end.", []
    )
    uncaptioned_datasets: list[str] = _help(
        "Images that the student learns from the teacher alone, which must read no caption: the same specs, whose captions are dropped, and "
        "images:FOLDER. Those that are among train_datasets are left out.",
        [],
    )
    train_fraction: float = _help(
        "Share of the images to train on, by image id; the rest validates (see eval_strategy).", 1.0
    )
    exclude_karpathy: list[str] = _help("Karpathy JSON files whose test images are left out of training.", [])
    cache_dir: str | None = _help(
        "Where regions, features and targets are cached by content. Defaults to OUTPUT_DIR/cache."
    )
    seed: int = _help("Of everything that is drawn; a section's own seed goes before.", 0)
    seeds: list[int] = _help("Run once with each, into OUTPUT_DIR/ARM/seed-N; by default once, with seed.", [])
    arms: dict[str, Any] | str | None = _help(
        "Variants of this recipe to compare: name -> fields and sections over this recipe's. They share one anchor.",
        "{}",
    )
    baseline: str | None = _help("The arm that the others are compared with, paired by seed.")
    overwrite: bool = _help("Make stages again whose inputs have changed, instead of stopping with an error.", False)
    evaluate: list[str] = _help("Benchmarks to run on anchor and student at the end, as NAME=SPEC.", [])
    push_to_hub: str | None = _help(
        "namespace/name on the Hub: publish the trained model there at the end, as modeling_dclip.hub.publish does. Needs evaluate and "
        "push_license."
    )
    push_license: str | None = _help("Licence of the published weights, as the Hub writes it.")
    push_arm: str | None = _help("The arm to publish, its first seed; needed where there are several.")
    push_private: bool = _help("Make the published repositories private.", False)

    def __post_init__(self):
        self.stages = [name for entry in self.stages for name in entry.split(",") if name]
        unknown = [name for name in self.stages if name not in STAGES]
        if unknown:
            raise ValueError(f"Unknown stage {unknown[0]!r} in stages. Known stages: {', '.join(STAGES)}.")
        if isinstance(self.arms, str):
            self.arms = json.loads(self.arms)
        if self.baseline is not None and self.baseline not in self.arms:
            raise ValueError(f"Expected baseline to be one of the arms {list(self.arms)}, got {self.baseline!r}.")
        if not 0 < self.train_fraction <= 1:
            raise ValueError(f"Expected train_fraction in (0, 1], got {self.train_fraction}.")
        if self.push_to_hub is not None:
            self._check_push()

    def _check_push(self):
        for name in ("push_license", "evaluate"):
            if not getattr(self, name):
                raise ValueError(f"push_to_hub: expected {name} too, which the model's card needs, got none.")
        arms = list(self.arms or {})
        if self.push_arm is None and len(arms) > 1:
            raise ValueError(f"push_to_hub: expected push_arm, which of {arms} to publish, got none.")
        if self.push_arm is not None and self.push_arm not in arms:
            raise ValueError(f"push_arm: expected one of the arms {arms}, got {self.push_arm!r}.")


@dataclass
class AnchorArguments(StageTrainingArguments):
    """Section `anchor`: contrastive pretraining of a small CLIP."""

    train_datasets: list[str] = _help("Captioned images to pretrain on; by default the recipe's train_datasets.", [])
    vision_config: dict[str, Any] | str | None = _help("Fields of DCLIPVisionConfig.", "{}")
    text_config: dict[str, Any] | str | None = _help(
        "Fields of CLIPTextConfig; vocabulary and special tokens come from the tokenizer.", "{}"
    )
    projection_dim: int = _help("Width of the shared space.", 128)
    tokenizer: str = _help(
        "scenes: trained on the drawn scenes' sentences; captions: on the training captions; else a folder or Hub id.",
        "scenes",
    )
    vocab_size: int = _help("Tokens of a tokenizer that is trained.", 512)
    max_length: int = _help("Longest text in tokens, for a tokenizer that is trained.", 48)
    image_to_text_weight: float = _help(
        "Share of the image-to-text direction in the loss; the rest is text-to-image's.", 0.5
    )
    save_dtype: Literal["float32", "float16", "bfloat16"] = _help(
        "Of the saved weights; training is float32.", "float32"
    )
    learning_rate: float = _help("Peak learning rate.", 1e-3)
    weight_decay: float = _help("Weight decay of matrices.", 0.1)
    lr_scheduler_type: str = _help("Schedule of the learning rate.", "cosine")
    warmup_steps: float = _help("Steps of linear warm-up; below 1 a share of all steps.", 0.1)

    def __post_init__(self):
        for name in ("vision_config", "text_config"):
            value = getattr(self, name)
            if isinstance(value, str):
                setattr(self, name, json.loads(value))
        super().__post_init__()


@dataclass
class RegionsArguments:
    """Section `regions`: where to look in each image."""

    detector: str | None = _help(
        "Spec of a detector (modeling_dclip/data/regions.py), e.g. ultralytics:yolov8x.pt. Without one the dataset's own boxes are "
        "taken, else the whole image."
    )
    ignore_boxes: bool = _help("Drop the dataset's own boxes: the whole image is the one region.", False)
    max_regions: int | None = _help("Keep so many of the highest scores an image.")
    batch_size: int = _help("Images a call of the detector.", 16)
    on_bad_image: Literal["raise", "skip"] = _help(
        "skip: leave out images that cannot be read and list them in the report.", "raise"
    )


@dataclass
class TeacherArguments(StageTrainingArguments):
    """Section `teacher`: the cross-modal block, its training, and how it reads regions."""

    cross_attention: Literal["bidirectional", "text_to_image", "image_to_text", "none", "regions"] = _help(
        "Who attends to whom; none trains nothing; regions is the leak-free teacher.", "bidirectional"
    )
    num_attention_heads: int = _help("Heads of every attention of the block.", 8)
    attention_temperature: float = _help("Of the pooling's softmax.", 2.0)
    text_share: float = _help("Share of the text stream in the embedding, in [0, 1].", 0.5)
    region_weighting: bool = _help("Weigh regions by area, score and similarity to the caption.", True)
    aggregation: Literal["mean", "multi_cluster"] = _help("How the streams become one embedding.", "mean")
    num_clusters: int = _help("Clusters of multi_cluster.", 3)
    num_cluster_steps: int = _help("k-means steps of multi_cluster.", 5)
    num_region_layers: int = _help("Self-attention layers of regions.", 2)
    region_feedforward_ratio: int = _help("Width of their MLPs over the embedding's.", 2)
    loss_temperature: float = _help("Of the teacher's InfoNCE.", 0.05)
    learning_rate: float = _help("Peak learning rate.", 1e-5)
    num_train_epochs: float = _help("Passes over the images.", 3.0)
    per_device_train_batch_size: int = _help("Pairs a step and process.", 64)

    def architecture(self) -> dict[str, Any]:
        """The fields of `DCLIPTeacherConfig`."""
        names = (
            "cross_attention", "num_attention_heads", "attention_temperature", "text_share", "region_weighting", "aggregation",
            "num_clusters", "num_cluster_steps", "num_region_layers", "region_feedforward_ratio", "loss_temperature",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}


@dataclass
class TargetsArguments:
    """Section `targets`: the frozen models' one pass over the data."""

    batch_size: int = _help("Images a forward pass, each with its regions.", 16)
    text_batch_size: int = _help("Captions a forward pass.", 256)
    chunk_rows: int = _help("Images a cache file: what a killed run loses at most.", 512)
    num_workers: int = _help("Processes that decode and crop images.", 0)


@dataclass
class StudentArguments(AdapterArguments):
    """Section `student`: the image encoder's fine-tuning."""

    cosine_distillation_loss_weight: float = _help("Weight of 1 - cosine to the teacher's embedding.", 1.0)
    contrastive_loss_weight: float = _help("Weight of InfoNCE against the frozen text embeddings.", 1.0)
    cosine_preservation_loss_weight: float = _help("Weight of 1 - cosine to the anchor's image embedding.", 0.0)
    similarity_distillation_loss_weight: float = _help(
        "Weight of the KL from the teacher's in-batch similarities.", 0.0
    )
    temperature: float = _help("Of the contrastive loss.", 0.05)
    similarity_temperature: float = _help("Of the student's softmax in the similarity loss.", 0.05)
    similarity_teacher_temperature: float | None = _help("Of the teacher's; by default the student's.")
    image_to_text_weight: float = _help("Share of the image-to-text direction in both in-batch losses.", 0.5)
    freeze: list[str] = _help(
        "Parameters of the image encoder to freeze: globs, or regular expressions after re:.", []
    )
    position_embedding_type: Literal["absolute", "rope"] = _help(
        "rope: rotary positions in place of CLIP's table.", "absolute"
    )
    lora_text: bool = _help(
        "Adapt the text tower too: text embeddings then move, and stored ones no longer fit.", False
    )
    wise_ft_alpha: float = _help("Weights saved at the end: this share of student, the rest anchor. 1 is off.", 1.0)
    min_crop_area: float = _help("Below 1: random square crops of at least this share of the image's area.", 1.0)
    learning_rate: float = _help("Peak learning rate.", 1e-6)
    weight_decay: float = _help("Weight decay of matrices.", 0.01)
    num_train_epochs: float = _help("Passes over the images.", 2.0)
    per_device_train_batch_size: int = _help("Images a step and process.", 32)
    max_grad_norm: float = _help("Clip gradients to this norm.", 0.5)

    @property
    def reads_teacher(self) -> bool:
        """Whether any loss term looks at the teacher's embeddings."""
        return bool(self.cosine_distillation_loss_weight or self.similarity_distillation_loss_weight)

    @property
    def columns(self) -> list[str]:
        """The embedding columns that the loss terms read."""
        reads_text = self.contrastive_loss_weight or self.similarity_distillation_loss_weight
        names = {
            "teacher_embeds": self.reads_teacher,
            "text_embeds": reads_text,
            "anchor_embeds": self.cosine_preservation_loss_weight,
        }
        return [name for name, read in names.items() if read]

    def __post_init__(self):
        if not 0 <= self.wise_ft_alpha <= 1:
            raise ValueError(f"Expected wise_ft_alpha in [0, 1], got {self.wise_ft_alpha}.")
        if not self.columns:
            raise ValueError("Expected at least one loss weight above 0, got none: there is nothing to learn.")
        if self.use_dora and self.wise_ft_alpha < 1:
            raise ValueError(
                f"wise_ft_alpha: expected 1 with use_dora, whose adapter cannot hold a point between, got {self.wise_ft_alpha}. Leave use_dora "
                "out, or interpolate the saved weights when you evaluate them."
            )
        if self.lora_text and not {"text_embeds"} & set(self.columns):
            raise ValueError("lora_text: expected a loss that looks at texts, got none. Set contrastive_loss_weight.")
        super().__post_init__()


def deciding_fields(arguments: Any) -> dict[str, Any]:
    """What of a section decides the stage's result, JSON-able: all fields that are ours, and changed ones of `TrainingArguments`
    and of what older records do not know.

    Example:
        >>> deciding_fields(RegionsArguments(max_regions=3))
        {'detector': None, 'ignore_boxes': False, 'max_regions': 3}
    """
    inherited = {f.name: default_of(f) for f in fields(arguments) if f.name in ADAPTER_FIELDS}
    if isinstance(arguments, TrainingArguments):
        inherited |= {f.name: f.default for f in fields(TrainingArguments)}
    resolved = as_plain(arguments)
    return {
        name: value
        for name, value in resolved.items()
        if name not in _SIDE_FIELDS and (name not in inherited or value != inherited[name])
    }


def as_plain(arguments: Any) -> dict[str, Any]:
    """A section as plain values, for YAML and JSON."""
    if isinstance(arguments, TrainingArguments):
        return json.loads(json.dumps(arguments.to_dict(), default=str))
    return {f.name: getattr(arguments, f.name) for f in fields(arguments)}
