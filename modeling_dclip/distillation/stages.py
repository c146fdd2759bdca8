"""The stages of a run, in order.

Each adds columns or makes a model, in its own folder; those of reinforced training are in dmclip_stages.py.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, load_from_disk
from transformers import AutoTokenizer, CLIPImageProcessorPil, set_seed

from modeling_dclip.configuration_dclip import DCLIPConfig
from modeling_dclip.data.captions import load_mix
from modeling_dclip.data.collation import AnchorBatches, StudentBatches, TeacherBatches, TokenizedStudentBatches
from modeling_dclip.data.columns import attach_columns, concatenate_shared, row_keys
from modeling_dclip.data.images import PixelReader
from modeling_dclip.data.regions import add_regions
from modeling_dclip.data.regions.detectors import build_detector
from modeling_dclip.data.scenes import train_tokenizer
from modeling_dclip.data.teacher_targets import TeacherFeatures, add_teacher_targets, compute_features
from modeling_dclip.distillation.adapters import (
    add_adapters,
    plain_state,
    save_adapters,
    scale_adapters,
)
from modeling_dclip.distillation.arguments import StudentArguments, deciding_fields
from modeling_dclip.distillation.dmclip_stages import reinforce, train_dmclip
from modeling_dclip.distillation.freezing import freeze_parameters
from modeling_dclip.distillation.recipes import UNCAPTIONED, Recipe
from modeling_dclip.distillation.run import (
    RECORD_NAME,
    Run,
    SharedData,
    check_uncaptioned,
    finished_inputs,
    load_student,
)
from modeling_dclip.distillation.trainer import (
    AnchorTrainer,
    StudentTrainer,
    TeacherTrainer,
    train_or_resume,
)
from modeling_dclip.encoders.fingerprints import combine_keys, fingerprint_model
from modeling_dclip.encoders.loading import ADAPTER_FOLDER, load_checked
from modeling_dclip.encoders.weight_interpolation import interpolate_weights
from modeling_dclip.modeling_dclip import DCLIPModel
from modeling_dclip.modeling_dclip_teacher import DCLIPTeacher
from modeling_dclip.processing_dclip import DCLIPProcessor, DCLIPTeacherProcessor

logger = logging.getLogger(__name__)


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


TARGET_COLUMNS = ("teacher_embeds", "text_embeds", "anchor_embeds")


def run_stages(recipe: Recipe, shared: SharedData | None = None) -> Path:
    """Run a recipe's stages; finished ones are skipped, interrupted ones go on.

    Args:
        recipe ([`Recipe`]): Parsed.
        shared ([`SharedData`], *optional*): One for several runs in a process, so that images are read once.

    Returns:
        `Path`: The run's folder.

    Raises:
        FileNotFoundError: If a stage needs one that was not run.
        ValueError: If a stage's folder was made from other inputs, or an input is wrong.
    """
    check_uncaptioned(recipe)
    run = Run(recipe, shared)
    logger.info("Stages: %s, in %s", ", ".join(run.stages), run.folder)
    for name in run.stages:
        if name in ("regions", "teacher", "targets"):
            run.check_batches()
        _STAGES[name](run)
    return run.folder


def make_anchor(run: Run) -> None:
    """Pretrain a small CLIP from scratch on captioned images."""
    recipe, args = run.recipe, run.recipe.anchor
    if recipe.run.clip_model is not None:
        logger.info("anchor: nothing to do, the recipe starts from %s", recipe.run.clip_model)
        return
    dataset = load_mix(args.train_datasets or recipe.run.train_datasets, seed=args.seed)
    inputs = {"arguments": deciding_fields(args), "dataset": combine_keys(row_keys(dataset))}
    record = run.record("anchor", inputs)
    if record.finished:
        return
    set_seed(args.seed)
    processor = _anchor_processor(args, dataset)
    tokenizer = processor.tokenizer
    text_config = {
        **args.text_config,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")},
    }
    config = DCLIPConfig(
        text_config=text_config,
        vision_config=args.vision_config,
        projection_dim=args.projection_dim,
        freeze_text=False,
    )
    model = DCLIPModel(config)
    batches = AnchorBatches(dataset, processor, seed=args.seed, cache_mib=args.image_cache_mib)
    trainer = AnchorTrainer(model, args, batches, processor, recipe.resolved("anchor"))
    train_or_resume(trainer, record.folder)
    model.config.freeze_text = True  # what fine-tunes it keeps its text tower
    logit_scale = model.logit_scale.data
    model.to(getattr(torch, args.save_dtype)).logit_scale.data = logit_scale  # float32 in every model
    trainer.save_model()
    record.finish()


def _anchor_processor(args: Any, dataset: Dataset) -> DCLIPProcessor:
    if args.tokenizer in ("scenes", "captions"):
        sentences = None
        if args.tokenizer == "captions":
            sentences = [text for captions in dataset["captions"] for text in captions]
        tokenizer = train_tokenizer(sentences, vocab_size=args.vocab_size, model_max_length=args.max_length)
    else:
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    side = args.vision_config.get("image_size", 224)
    size = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    return DCLIPProcessor(CLIPImageProcessorPil(**size), tokenizer)


def find_regions(run: Run) -> None:
    """Let a detector look at every image."""
    args = run.recipe.regions
    if args.detector is None:
        logger.info("regions: nothing to do, no detector is named: the dataset's own boxes, else the whole image")
        return
    detector = build_detector(args.detector)
    dataset_keys = {split: combine_keys(row_keys(*source)) for split, source in run.sources.items()}
    inputs = {"arguments": deciding_fields(args), "detector": detector.fingerprint, "dataset": dataset_keys}
    record = run.record("regions", inputs)
    if record.finished:
        return
    options = {
        "batch_size": args.batch_size,
        "cache_dir": run.cache_dir / "regions",
        "on_bad_image": args.on_bad_image,
    }
    state = PartialState()
    for split, (dataset, _) in run.sources.items():
        if state.num_processes > 1 and not getattr(detector, "reads_rows", False):
            share = dataset.shard(state.num_processes, state.process_index, contiguous=True)
            add_regions(share, detector, **options)  # fills the cache, which all share
            state.wait_for_everyone()
        if state.is_main_process:
            report = record.folder / f"{split}_report.json"
            found = add_regions(dataset, detector, max_regions=args.max_regions, report_file=report, **options)
            found.select_columns(["image_id", "boxes", "box_scores"]).save_to_disk(record.folder / split)
    record.finish()


def _feature_options(run: Run) -> dict[str, Any]:
    args = run.recipe.targets
    names = ("batch_size", "text_batch_size", "chunk_rows", "num_workers")
    return {
        "cache_dir": run.cache_dir / "features",
        "max_regions": run.recipe.regions.max_regions,
        **{name: getattr(args, name) for name in names},
    }


def _teacher_processor(run: Run, path: str) -> DCLIPTeacherProcessor:
    processor = DCLIPProcessor.from_pretrained(path)
    return DCLIPTeacherProcessor(processor.image_processor, processor.tokenizer)


def train_teacher(run: Run) -> None:
    """Train the teacher's block on features that its frozen CLIP computes once."""
    recipe, args = run.recipe, run.recipe.teacher
    if recipe.run.teacher_model is not None:
        logger.info("teacher: nothing to do, the recipe takes %s", recipe.run.teacher_model)
        return
    keys = {split: run.data_keys[split] for split in run.captioned_data}
    inputs = {"arguments": deciding_fields(args), "clip": run.clip_key, "dataset": keys}
    record = run.record("teacher", inputs | {"max_regions": recipe.regions.max_regions})
    if record.finished:
        return
    set_seed(args.seed)
    teacher = DCLIPTeacher.from_clip(run.clip_path, **args.architecture())
    processor = _teacher_processor(run, run.clip_path)
    if not any(parameter.requires_grad for parameter in teacher.parameters()):
        logger.info("teacher: cross_attention=%r has nothing to train", args.cross_attention)
        if PartialState().is_main_process:
            teacher.save_pretrained(record.folder)
            processor.save_pretrained(record.folder)
        record.finish()
        return
    teacher.to(PartialState().device)
    batches = {}
    for split, (dataset, keys) in run.captioned_data.items():
        paths = compute_features(dataset, teacher, processor, keys=keys, **_feature_options(run))
        batches[split] = TeacherBatches(TeacherFeatures.load(paths), args.seed)
    trainer = TeacherTrainer(
        teacher, args, batches["train"], processor, recipe.resolved("regions", "teacher"), batches.get("validation")
    )
    train_or_resume(trainer, record.folder)
    trainer.save_model()
    record.finish()


def write_targets(run: Run) -> None:
    """Let the frozen teacher and the frozen CLIP write the columns the student learns from."""
    recipe = run.recipe
    with_teacher = recipe.student.reads_teacher
    if with_teacher:
        path = run.teacher_path
        teacher = load_checked(DCLIPTeacher, path, dtype="auto")
        _check_same_clip(teacher, run)
    else:  # the frozen CLIP alone; `none` adds nothing to it
        path = run.clip_path
        teacher = DCLIPTeacher.from_clip(path, cross_attention="none")
    inputs = {"teacher": fingerprint_model(teacher), "clip": run.clip_key, "dataset": run.data_keys}
    record = run.record("targets", inputs | {"max_regions": recipe.regions.max_regions, "with_teacher": with_teacher})
    if record.finished:
        return
    teacher.to(PartialState().device)
    processor = _teacher_processor(run, path)
    for split, (dataset, keys) in run.data.items():
        options = _feature_options(run) | {"captioned": split != UNCAPTIONED}
        targets = add_teacher_targets(dataset, teacher, processor, keys=keys, with_teacher=with_teacher, **options)
        names = ["image_id", *(name for name in TARGET_COLUMNS if name in targets.column_names)]
        if PartialState().is_main_process:
            targets.select_columns(names).save_to_disk(record.folder / split)
    record.finish()


def _check_same_clip(teacher: DCLIPTeacher, run: Run) -> None:
    student = load_student(run.clip_path)
    expected, got = student.config.projection_dim, teacher.config.projection_dim
    if expected != got:
        raise ValueError(
            f"Expected a teacher of the student's width {expected} ({run.clip_path}), got {got} ({run.teacher_path}). "
            "Distil from a teacher around the same CLIP."
        )
    theirs, ours = teacher.clip.state_dict(), student.state_dict()
    if theirs.keys() != ours.keys() or any(not torch.equal(theirs[name], ours[name]) for name in ours):
        raise ValueError(
            f"The teacher '{run.teacher_path}' holds another CLIP than the student starts from ('{run.clip_path}'): "
            "their embeddings live in different spaces. Train the teacher around this CLIP, or set clip_model to the "
            "teacher's."
        )


def train_student(run: Run) -> None:
    """Fine-tune the image encoder on the stored targets."""
    recipe, args = run.recipe, run.recipe.student
    targets = run.made("targets", RECORD_NAME, "")
    inputs = {"arguments": deciding_fields(args), "clip": run.clip_key, "dataset": run.data_keys}
    record = run.record("student", inputs | {"targets": finished_inputs(targets)})
    if record.finished:
        return
    data = {split: attach_columns(rows, load_from_disk(targets / split)) for split, (rows, _) in run.data.items()}
    columns = ["image_id", "image", "captions", *args.columns]
    train = concatenate_shared([data[split].select_columns(columns) for split in run.student_splits])
    set_seed(args.seed)
    model = load_student(run.clip_path, args.position_embedding_type)
    processor = DCLIPProcessor.from_pretrained(run.clip_path)
    fit_student(
        model, args, train, processor, recipe.resolved("regions", "teacher", "targets", "student"),
        validation=data.get("validation"), pixels=run.pixels(processor.image_processor, args.image_cache_mib),
    )  # fmt: skip
    record.finish()


_STAGES = {
    "anchor": make_anchor,
    "regions": find_regions,
    "teacher": train_teacher,
    "targets": write_targets,
    "student": train_student,
    "reinforce": reinforce,
    "dmclip": train_dmclip,
}
