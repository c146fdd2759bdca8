"""What the stages of reinforced training may set: the sections `reinforce` and `dmclip`."""

import json
import math
from dataclasses import dataclass
from typing import Any, Literal

from transformers.utils import is_torch_bf16_gpu_available, logging

from modeling_dclip.distillation.stage_arguments import StageTrainingArguments
from modeling_dclip.distillation.stage_arguments import describe as _help

logger = logging.get_logger(__name__)


@dataclass
class ReinforceArguments:
    """Section `reinforce`: shards that hold each image's augmentations, captions and the teachers' embeddings of both."""

    folder: str | None = _help(
        "Where the shards lie. Defaults to OUTPUT_DIR/reinforce, which all arms and seeds of a recipe share."
    )
    teachers: list[str] = _help(
        "CLIPs whose embeddings are stored, side by side in this order: folders, Hub ids, or open_clip:NAME:TAG. By default clip_model.",
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
        "Shards to train on: a folder, a tar file or a pattern ({0000..0999}, *). By default those of the stage reinforce."
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
        "Pixels a side; that of model or vision_model, else 256. Windows are chosen to divide the maps unless vision_config names them."
    )
    tokenizer: str | None = _help("Folder or Hub id. By default that of clip_model.")
    vision_model: str | None = _help(
        "A pretrained image encoder to start from, with its preprocessing: folder or Hub id of a DM-CLIP or of its image encoder, such as "
        "hub.convert makes of MambaVision. A projection of another width is drawn anew."
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
        "What multiplies every teacher's cosines. By default each one's own, as trained, if the index beside the shards knows it, else 100."
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
                f"Expected teacher_logit_scale > 0, which multiplies the teachers' cosines, got {self.teacher_logit_scale}."
            )
        if not self.ignore_data_skip:
            raise ValueError(
                "ignore_data_skip: expected true, got false. A resumed stream goes on by itself; more would be skipped."
            )
        if self.bf16 and not self.use_cpu and not is_torch_bf16_gpu_available():
            logger.warning_once(  # a recipe is parsed for every arm and seed
                "dmclip.bf16: no device with bfloat16 here, training will be in float32. With use_cpu it would be the CPU's."
            )
            self.bf16 = False
        super().__post_init__()
        self._count_steps()

    def _resolve_architecture(self) -> None:
        """Defaults of what is made; what is pretrained knows its own."""
        if self.vision_model is not None and (self.preset or self.vision_config):
            raise ValueError(
                f"vision_model: expected no preset and no vision_config beside {self.vision_model!r}, which has its own architecture."
            )
        if self.model is None:
            if self.vision_model is None:
                self.preset, self.image_size = self.preset or "T", self.image_size or 256
                if self.text_model is None:
                    self.projection_dim = self.projection_dim or 512
        elif self.vision_model or self.text_model or self.preset or self.vision_config or self.text_config:
            raise ValueError(
                f"Expected a checkpoint to go on from ({self.model!r}) or what to make one of, got both: drop model, or vision_model, "
                "text_model, preset, vision_config and text_config."
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
            "evaluate: name clip_model, the reference of the table. This recipe trains a DM-CLIP, and has neither a clip_model nor a "
            "section anchor that makes one."
        )
