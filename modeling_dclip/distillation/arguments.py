"""What one run may set: a recipe's global fields and one section a stage, each a dataclass with typed,
documented fields.
"""

import importlib.util
import json
import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.utils import is_torch_bf16_gpu_available, logging

# What an adapter is made from. Records that were written before these fields were know nothing of them: at their
# defaults they decide nothing.
ADAPTER_FIELDS = (
    "lora_rank", "lora_alpha", "lora_dropout", "use_dora", "lora_target_modules", "lora_text", "merge_adapter",
)  # fmt: skip

# Optimisers of TrainingArguments with their state in 8 bits, and the package that each needs.
EIGHT_BIT_PACKAGES = {
    "adamw_torch_8bit": "torchao",
    **dict.fromkeys(
        ("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit", "ademamix_8bit", "paged_ademamix_8bit", "lion_8bit",
         "paged_lion_8bit",
         "rmsprop_bnb_8bit"),
        "bitsandbytes",
    ),
}  # fmt: skip


def _help(text: str, default: Any = None, **metadata: Any) -> Any:
    """A field with its default and its one documentation, which `--help` shows."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text, **metadata})
    return field(default=default, metadata={"help": text, **metadata})


@dataclass
class StageTrainingArguments(TrainingArguments):
    """Defaults of every stage that trains."""

    report_to: list[str] = _help(
        "Where to log besides the console and trainer_state.json: auto (tensorboard where it is installed), none, or "
        "trackers by name, such as tensorboard, wandb, trackio.",
        ["auto"],
    )
    remove_unused_columns: bool = _help("Must stay false: batches hold columns that no forward names.", False)
    dataloader_drop_last: bool = _help("Drop the last, smaller batch of an epoch: its negatives would be fewer.", True)
    logging_nan_inf_filter: bool = _help("Hide NaN in the log. Off: a NaN stops the run at the next log.", False)
    logging_steps: float = _help("Log every so many steps; below 1 a share of all steps.", 50)
    save_strategy: str = _help("When to save checkpoints: no, steps or epoch.", "epoch")
    save_total_limit: int | None = _help("Checkpoints to keep.", 1)
    lr_scheduler_type: str = _help("Schedule of the learning rate.", "constant")
    ddp_find_unused_parameters: bool | None = _help("Look for unused parameters; every trained one is used.", False)
    image_cache_mib: int = _help(
        "Bound in MiB a process for decoded pixels held in memory; 0 decodes every time.", 2048
    )

    def __post_init__(self):
        if self.remove_unused_columns:
            raise ValueError(
                "remove_unused_columns: expected false, got true. Batches hold columns that no forward names."
            )
        self.report_to = _find_trackers(self.report_to)
        package = EIGHT_BIT_PACKAGES.get(str(self.optim))
        if package is not None and not is_installed(package):
            raise ImportError(
                f"optim: expected the package {package} for {str(self.optim)!r}, got none. Install it with `pip "
                f"install {package}`, or take adamw_torch."
            )
        self.dataloader_pin_memory &= torch.accelerator.is_available()  # else a warning an epoch
        super().__post_init__()


@dataclass
class AdapterArguments(StageTrainingArguments):
    """Low-rank adapters in place of whole weights. They decide nothing where `lora_rank` is left out."""

    lora_rank: int | None = _help("Train low-rank adapters (LoRA) of this rank, every other weight frozen.")
    lora_alpha: int | None = _help("Their scale is this over the rank; by default the rank, a scale of 1.")
    lora_dropout: float = _help("Dropout in front of them, in [0, 1).", 0.0)
    use_dora: bool = _help("DoRA: a trained magnitude beside the low-rank direction.", False)
    lora_target_modules: list[str] = _help(
        "Last names of the linear layers to adapt. By default the projections of attention, of Mamba mixers and of "
        "MLPs.",
        [],
    )
    merge_adapter: bool = _help(
        "Save whole weights, the adapter merged in, beside the adapter. Off: the adapter alone.", True
    )

    def __post_init__(self):
        defaults = {f.name: default_of(f) for f in fields(self) if f.name in ADAPTER_FIELDS}
        changed = [name for name, default in defaults.items() if getattr(self, name) != default]
        if self.lora_rank is None and changed:
            raise ValueError(f"{changed[0]}: expected lora_rank beside it, got none. Set the rank, for example 16.")
        if self.lora_rank is not None and self.lora_rank < 1:
            raise ValueError(f"lora_rank: expected 1 or more, got {self.lora_rank}.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout: expected a share in [0, 1), got {self.lora_dropout}.")
        if self.lora_rank is not None and not is_installed("peft"):
            raise ImportError(
                'lora_rank: expected the package peft, got none. Install it with `pip install "modeling_dclip[peft]"`.'
            )
        super().__post_init__()


def is_installed(package: str) -> bool:
    """Whether a package can be imported; it is not."""
    return importlib.util.find_spec(package) is not None


def default_of(one: Any) -> Any:
    """The default of a field."""
    return one.default_factory() if callable(one.default_factory) else one.default


def _find_trackers(names: str | list[str]) -> list[str]:
    """The trackers that a run reports to, all of them there."""
    names = [names] if isinstance(names, str) else list(names)
    if names == ["auto"]:
        return ["tensorboard"] if is_installed("tensorboard") else []
    if names in (["none"], ["all"], []):
        return names if names == ["all"] else []
    available = get_available_reporting_integrations()
    if missing := [name for name in names if name not in available]:
        raise ImportError(
            f"report_to: expected a tracker that is installed ({', '.join(available) or 'there is none'}), got "
            f"{missing[0]!r}. Install it with `pip install {missing[0]}`, or write report_to none: losses also go to "
            "trainer_state.json."
        )
    return names


# What the stages of reinforced training may set: the sections `reinforce` and `dmclip`.


logger = logging.get_logger(__name__)


@dataclass
class ReinforceArguments:
    """Section `reinforce`: shards that hold each image's augmentations,
    captions and the teachers' embeddings of both.
    """

    folder: str | None = _help(
        "Where the shards lie. Defaults to OUTPUT_DIR/reinforce, which all arms and seeds of a recipe share."
    )
    teachers: list[str] = _help(
        "CLIPs whose embeddings are stored, side by side in this order: folders, Hub ids, or open_clip:NAME:TAG. By "
        "default clip_model.",
        [],
    )
    augmentations: int = _help("Stored augmentations of an image; a training sample draws one of them.", 30)
    image_size: int | None = _help("Pixels a side of an augmented image. Defaults to dmclip.image_size.")
    min_crop_area: float = _help("Smallest share of the image that a random resized crop keeps, in (0, 1].", 0.08)
    num_operations: int = _help("Operations of RandAugment after the crop; 0 leaves it as it is.", 2)
    magnitude: int = _help("Of RandAugment, 0 to 30.", 9)
    synthetic_captions: str | None = _help(
        "Column of the datasets that holds synthetic captions, one or a list an image."
    )
    captioner: str | None = _help(
        "An image-to-text model that writes synthetic captions, in place of a column: folder or Hub id."
    )
    captions_per_image: int = _help("Synthetic captions that the captioner writes.", 5)
    samples_per_shard: int = _help("Images a tar file: what a killed run loses at most.", 1000)
    dtype: Literal["float16", "float32"] = _help("Of the stored embeddings.", "float16")
    batch_size: int = _help("Augmented images a forward pass of a teacher.", 64)
    num_workers: int = _help("Processes that decode and augment.", 0)
    seed: int = _help("Of the drawn augmentations, and of what @COUNT draws.", 0)

    def __post_init__(self):
        if self.synthetic_captions is not None and self.captioner is not None:
            raise ValueError("reinforce: expected synthetic_captions (a column) or captioner, got both.")


@dataclass
class DMCLIPArguments(StageTrainingArguments):
    """Section `dmclip`: a MambaVision CLIP trained on reinforced shards."""

    train_shards: str | None = _help(
        "Shards to train on: a folder, a tar file or a pattern ({0000..0999}, *). By default those of the stage "
        "reinforce."
    )
    train_samples: int | None = _help("Samples to see, over all processes, in place of max_steps.")
    teacher_widths: list[int] = _help(
        "Widths of the teachers' embeddings in the shards, in order. By default as the index beside the shards says.",
        [],
    )
    model: str | None = _help(
        "A DM-CLIP checkpoint to go on from, folder or Hub id. By default one is made from scratch."
    )
    preset: Literal["T", "T2", "S", "B", "L"] | None = _help(
        "Size of the image encoder; T unless model or vision_model is named."
    )
    vision_config: dict[str, Any] | str | None = _help("Fields of DMCLIPVisionConfig, over the preset's.", "{}")
    text_config: dict[str, Any] | str | None = _help(
        "Fields of DMCLIPTextConfig; vocabulary, special tokens and length come from the tokenizer.", "{}"
    )
    projection_dim: int | None = _help(
        "Width of the shared space; that of model, text_model or a whole DM-CLIP in vision_model, else 512."
    )
    image_size: int | None = _help(
        "Pixels a side; that of model or vision_model, else 256. Windows are chosen to divide the maps unless "
        "vision_config names them."
    )
    tokenizer: str | None = _help("Folder or Hub id. By default that of clip_model.")
    vision_model: str | None = _help(
        "A pretrained image encoder to start from, with its preprocessing: folder or Hub id of a DM-CLIP or of its "
        "image encoder, such as hub.convert makes of MambaVision. A projection of another width is drawn anew."
    )
    text_model: str | None = _help(
        "A pretrained text tower to start from: folder or Hub id of a DM-CLIP or of its text tower."
    )
    freeze_text: bool = _help("Keep the text tower as it is.", False)
    contrastive_loss_weight: float = _help("Weight of InfoNCE between images and texts.", 0.25)
    distillation_loss_weight: float = _help(
        "Weight of the cross-entropy from the teachers' in-batch similarities.", 0.75
    )
    synthetic_captions: bool | None = _help(
        "Add both losses once more over one synthetic caption of each image. By default where the shards have them."
    )
    teacher_logit_scale: float | None = _help(
        "What multiplies every teacher's cosines. By default each one's own, as trained, if the index beside the "
        "shards knows it, else 100."
    )
    image_to_text_weight: float = _help("Share of the image-to-text direction in both losses.", 0.5)
    synthetic_keys: str = _help("Regular expression of the keys that hold synthetic captions.", "syn_text.*")
    samples_per_epoch: int | None = _help(
        "Samples an epoch, over all processes; by default all, which without an index are counted first."
    )
    shuffle_buffer: int = _help("Places of samples held to draw from; more is a better shuffle.", 10000)
    on_bad_sample: Literal["raise", "skip"] = _help(
        "skip: leave out damaged shards and samples, and report them.", "raise"
    )
    learning_rate: float = _help("Peak learning rate.", 1e-4)
    adam_beta2: float = _help("Of AdamW.", 0.95)
    weight_decay: float = _help("Weight decay of matrices.", 0.2)
    max_grad_norm: float = _help("Clip gradients to this norm.", 1.0)
    warmup_steps: float = _help("Steps of linear warm-up; below 1 a share of all steps.", 1000)
    lr_scheduler_type: str = _help("Schedule of the learning rate.", "cosine")
    per_device_train_batch_size: int = _help("Images a step and process.", 256)
    save_strategy: str = _help("When to save checkpoints: no or steps; a stream of shards has no epochs.", "steps")
    save_steps: float = _help("Save every so many steps; below 1 a share of all steps.", 1000)

    ignore_data_skip: bool = _help(
        "Must stay true: a resumed stream goes on by itself, without reading what was seen.", True
    )

    @property
    def reads_teachers(self) -> bool:
        """Whether the loss looks at the teachers' embeddings."""
        return self.distillation_loss_weight > 0

    def __post_init__(self):
        for name in ("vision_config", "text_config"):
            value = getattr(self, name)
            if isinstance(value, str):
                setattr(self, name, json.loads(value))
        weights = (self.contrastive_loss_weight, self.distillation_loss_weight)
        if min(weights) < 0 or max(weights) == 0:
            raise ValueError(
                f"Expected loss weights >= 0 and one above 0, got contrastive and distillation {weights}."
            )
        self._resolve_architecture()
        if self.teacher_logit_scale is not None and not 0 < self.teacher_logit_scale < math.inf:
            raise ValueError(
                "Expected teacher_logit_scale > 0, which multiplies the teachers' cosines, got "
                f"{self.teacher_logit_scale}."
            )
        if not self.ignore_data_skip:
            raise ValueError(
                "ignore_data_skip: expected true, got false. A resumed stream goes on by itself; more would be "
                "skipped."
            )
        if self.bf16 and not self.use_cpu and not is_torch_bf16_gpu_available():
            logger.warning_once(  # a recipe is parsed for every arm and seed
                "dmclip.bf16: no device with bfloat16 here, training will be in float32. With use_cpu it would be the "
                "CPU's."
            )
            self.bf16 = False
        super().__post_init__()
        self._count_steps()

    def _resolve_architecture(self) -> None:
        """Defaults of what is made; what is pretrained knows its own."""
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
                f"Expected a checkpoint to go on from ({self.model!r}) or what to make one of, got both: drop model, "
                "or vision_model, text_model, preset, vision_config and text_config."
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


def check_reference(recipe: Any) -> None:
    """Refuse a recipe that asks for a table of DM-CLIPs, which start from no CLIP, but has no CLIP to set beside them.

    Args:
        recipe ([`~modeling_dclip.distillation.recipes.Recipe`]): Parsed.

    Raises:
        ValueError: If it is one; before training, not after.
    """
    run, named = recipe.run, recipe.named
    if run.evaluate and "dmclip" in named and "anchor" not in named and run.clip_model is None:
        raise ValueError(
            "evaluate: name clip_model, the reference of the table. This recipe trains a DM-CLIP, and has neither a "
            "clip_model nor a section anchor that makes one."
        )


STAGES = ("anchor", "regions", "teacher", "targets", "student", "reinforce", "dmclip")

# Fields that decide where and how loudly a stage runs, not what comes out of it.
_SIDE_FIELDS = {
    "output_dir", "logging_dir", "logging_strategy", "logging_steps", "logging_first_step", "log_level",
    "log_on_each_node", "disable_tqdm", "run_name", "report_to", "save_strategy", "save_steps", "save_total_limit",
    "save_only_model", "use_cpu", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers",
    "dataloader_prefetch_factor", "ddp_timeout", "ddp_backend", "ddp_find_unused_parameters", "resume_from_checkpoint",
    "push_to_hub", "hub_token", "local_rank", "image_cache_mib", "num_workers", "batch_size", "text_batch_size",
    "on_bad_image", "folder",
}  # fmt: skip


@dataclass
class RunArguments:
    """The global fields of a recipe."""

    output_dir: str = _help("Folder of the run; each stage writes into its own folder there.", "outputs/run")
    stages: list[str] = _help(
        f"Stages to run, of {', '.join(STAGES)}; also comma separated. By default all that the recipe needs.", []
    )
    clip_model: str | None = _help(
        "The pretrained CLIP to start from: a preset (dclip-vitb32, dclip-vitb16, dclip-vitl14), a folder or a Hub "
        "id. Without it the stage anchor makes one."
    )
    teacher_model: str | None = _help(
        "Folder or Hub id of a trained teacher around the same CLIP, in place of the stage teacher."
    )
    train_datasets: list[str] = _help("Captioned images to train on: specs, @COUNT at the end (see docs/data.md).", [])
    uncaptioned_datasets: list[str] = _help(
        "Images that the student learns from the teacher alone, which must read no caption: the same specs, whose "
        "captions are dropped, and images:FOLDER. Those that are among train_datasets are left out.",
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
        "namespace/name on the Hub: publish the trained model there at the end, as modeling_dclip.hub.publish does. "
        "Needs evaluate and push_license."
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
        "Spec of a detector, e.g. ultralytics:yolov8x.pt (see docs/data.md). Without one the dataset's "
        "own boxes are taken, else the whole image."
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
            "cross_attention", "num_attention_heads", "attention_temperature", "text_share", "region_weighting",
            "aggregation", "num_clusters", "num_cluster_steps", "num_region_layers", "region_feedforward_ratio",
            "loss_temperature",
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
                "wise_ft_alpha: expected 1 with use_dora, whose adapter cannot hold a point between, got "
                f"{self.wise_ft_alpha}. Leave use_dora out, or interpolate the saved weights when you evaluate them."
            )
        if self.lora_text and not {"text_embeds"} & set(self.columns):
            raise ValueError("lora_text: expected a loss that looks at texts, got none. Set contrastive_loss_weight.")
        super().__post_init__()


def deciding_fields(arguments: Any) -> dict[str, Any]:
    """What of a section decides the stage's result, JSON-able: all fields that are ours, and changed ones of
    `TrainingArguments` and of what older records do not know.

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


# The sections of a recipe by name, in the order of their stages.


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
