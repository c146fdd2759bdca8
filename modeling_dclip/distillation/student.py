"""Fine-tune one student: the part of the stage that knows nothing of recipes, for runs that hold their data themselves."""

import logging
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from modeling_dclip.configuration_dclip import DCLIPConfig
from modeling_dclip.data.collation import StudentBatches
from modeling_dclip.data.pixels import PixelReader
from modeling_dclip.distillation.arguments import StudentArguments
from modeling_dclip.distillation.freezing import freeze_parameters
from modeling_dclip.distillation.records import last_checkpoint
from modeling_dclip.distillation.trainer import BatchesTrainer, StudentTrainer
from modeling_dclip.modeling_dclip import DCLIPModel
from modeling_dclip.processing_dclip import DCLIPProcessor
from modeling_dclip.weight_interpolation import interpolate_weights

logger = logging.getLogger(__name__)


def train_or_resume(trainer: BatchesTrainer, folder: Path) -> None:
    """Train from the last complete checkpoint in a stage's folder, or from the start, and write `trainer_state.json`."""
    checkpoint = last_checkpoint(folder)
    if checkpoint is not None:
        logger.info("%s: resuming from %s", folder.name, checkpoint)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_state()


def load_student(clip_path: str, position_embedding_type: str = "absolute") -> DCLIPModel:
    """A dual encoder about to become a student: pretrained weights in float32, text tower frozen."""
    config = DCLIPConfig.from_pretrained(clip_path)
    config.freeze_text = True
    config.vision_config.position_embedding_type = position_embedding_type
    return DCLIPModel.from_pretrained(clip_path, config=config, dtype=torch.float32)


def fit_student(
    model: DCLIPModel,
    args: StudentArguments,
    dataset: Dataset,
    processor: DCLIPProcessor,
    resolved_arguments: dict[str, Any],
    *,
    validation: Dataset | None = None,
    pixels: PixelReader | None = None,
) -> StudentTrainer:
    """Fine-tune the image encoder of a dual encoder on stored targets and save it in `args.output_dir`.

    Args:
        model ([`DCLIPModel`]): From [`load_student`]; changed in place.
        args ([`StudentArguments`]): Losses, freezing, optimiser.
        dataset (`datasets.Dataset`): With `image_id`, `image`, `captions` and the target columns that `args` reads.
        processor ([`DCLIPProcessor`]): The student's.
        resolved_arguments (`dict`): Saved beside the weights.
        validation (`datasets.Dataset`, *optional*): Rows for `args.eval_strategy`.
        pixels ([`PixelReader`], *optional*): Of the same rows, shared by several runs in one process.

    Returns:
        [`StudentTrainer`]: Done; its `dual_encoder` is the student.

    Raises:
        RuntimeError: If the frozen text tower has changed.
        ValueError: If a column is missing or wrong, or a freeze pattern matches nothing.
    """
    anchor = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options = {"width": model.config.projection_dim, "seed": args.seed, "cache_mib": args.image_cache_mib}
    batches = StudentBatches(
        dataset, processor.image_processor, args.columns, pixels=pixels, min_crop_area=args.min_crop_area, **options
    )
    eval_batches = None
    if validation is not None:
        eval_batches = StudentBatches(validation, processor.image_processor, args.columns, **options)
    trainer = StudentTrainer(model, args, batches, processor, resolved_arguments, eval_batches)
    logger.info("student: %s of the image encoder", freeze_parameters(trainer.model, args.freeze))
    train_or_resume(trainer, Path(args.output_dir))
    trained = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    moved = [name for name in anchor if not name.startswith(("vision_model.", "visual_projection."))]
    moved = [name for name in moved if not torch.equal(anchor[name].cpu(), trained[name])]
    if moved:
        raise RuntimeError(
            f"Frozen weights have changed: {moved[:3]} and {len(moved)} in all. This is a bug; please report it."
        )
    if args.wise_ft_alpha < 1:
        model.load_state_dict(interpolate_weights(anchor, trained, args.wise_ft_alpha))
    trainer.save_model()
    return trainer
