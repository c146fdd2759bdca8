"""Fine-tune one student: the part of the stage that knows nothing of recipes, for runs that hold their data themselves."""

import logging
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from modeling_dclip.configuration_dclip import DCLIPConfig
from modeling_dclip.data.collation import StudentBatches
from modeling_dclip.data.pixels import PixelReader
from modeling_dclip.distillation.adapters import (
    ADAPTER_FOLDER,
    TokenizedStudentBatches,
    add_adapters,
    plain_state,
    save_adapters,
    scale_adapters,
)
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

    With `args.lora_rank` every weight stays as it is and adapters train; they are saved in `adapter/` too.

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
        ImportError: If adapters are asked for and peft is not installed.
        RuntimeError: If a frozen weight has changed.
        ValueError: If a column is missing or wrong, or a freeze pattern matches nothing.
    """
    anchor = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapters = None
    if args.lora_rank is not None:
        model.config.freeze_text = not args.lora_text  # else each call of train() would freeze its adapter
        adapters = add_adapters(model, args, ("vision_model", "text_model") if args.lora_text else ("vision_model",))
    batches, eval_batches = _make_batches(model, args, dataset, processor, validation, pixels)
    trainer = StudentTrainer(model, args, batches, processor, resolved_arguments, eval_batches, adapters=adapters)
    logger.info(
        "student: %s of the %s",
        freeze_parameters(trainer.model, args.freeze),
        "dual encoder" if args.lora_text else "image encoder",
    )
    train_or_resume(trainer, Path(args.output_dir))
    trained = {name: tensor.cpu() for name, tensor in plain_state(model, merged=False).items()}
    _check_frozen(anchor, trained, all_of_it=adapters is not None)
    if adapters is not None:
        _finish_adapters(trainer, args)
        return trainer
    if args.wise_ft_alpha < 1:
        model.load_state_dict(interpolate_weights(anchor, trained, args.wise_ft_alpha))
    trainer.save_model()
    return trainer


def _make_batches(
    model: DCLIPModel,
    args: StudentArguments,
    dataset: Dataset,
    processor: DCLIPProcessor,
    validation: Dataset | None,
    pixels: PixelReader | None,
) -> tuple[StudentBatches, StudentBatches | None]:
    options = {"width": model.config.projection_dim, "seed": args.seed, "cache_mib": args.image_cache_mib}

    def make(rows: Dataset, **more: Any) -> StudentBatches:
        if args.lora_text:
            return TokenizedStudentBatches(rows, processor, args.columns, **options, **more)
        return StudentBatches(rows, processor.image_processor, args.columns, **options, **more)

    train = make(dataset, pixels=pixels, min_crop_area=args.min_crop_area)
    return train, None if validation is None else make(validation)


def _check_frozen(anchor: dict[str, torch.Tensor], trained: dict[str, torch.Tensor], all_of_it: bool) -> None:
    """See that what should not train did not: the text tower, and beside adapters every weight."""
    frozen = [name for name in anchor if all_of_it or not name.startswith(("vision_model.", "visual_projection."))]
    moved = [name for name in frozen if name not in trained or not torch.equal(anchor[name].cpu(), trained[name])]
    if moved:
        raise RuntimeError(
            f"Frozen weights have changed: {moved[:3]} and {len(moved)} in all. This is a bug; please report it."
        )


def _finish_adapters(trainer: StudentTrainer, args: StudentArguments) -> None:
    """Walk back to `wise_ft_alpha`, save the adapter, and the student with it merged in where that is asked for."""
    model, folder = trainer.dual_encoder, Path(args.output_dir)
    if args.wise_ft_alpha < 1:
        scale_adapters(model, args.wise_ft_alpha)
    if args.merge_adapter:
        trainer.save_model()  # writes the adapter too
        trainer.adapters.merge_and_unload()
        trainer.adapters, model.config.freeze_text = None, True
    elif args.should_save:
        save_adapters(trainer.adapters, folder)
        trainer.save_beside(folder)
    logger.info("student: the adapter is in %s", folder / ADAPTER_FOLDER)
