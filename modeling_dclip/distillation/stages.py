"""The stages of a run, in order: each adds columns or makes a model, in a folder of its own.

A stage is a function of its section, of what earlier stages made, and of the places where it may write. [`run_stages`]
reads the recipe and hands each stage its part. The stages of reinforced training are in `dmclip.py`.
"""

import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset, load_from_disk
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerBase, set_seed

from modeling_dclip.configuration_dclip import DCLIPConfig
from modeling_dclip.data.captions import load_mix
from modeling_dclip.data.captions.false_captions import collect_negatives
from modeling_dclip.data.collation import AnchorBatches, StudentBatches, TeacherBatches, TokenizedStudentBatches
from modeling_dclip.data.columns import Ragged, attach_columns, concatenate_shared, row_keys, save_columns
from modeling_dclip.data.files import writing
from modeling_dclip.data.images import PixelReader
from modeling_dclip.data.regions import add_regions
from modeling_dclip.data.regions.detectors import build_detector
from modeling_dclip.data.rows import NEGATIVES
from modeling_dclip.data.scenes import train_tokenizer
from modeling_dclip.data.teacher_targets import (
    FeatureOptions,
    TeacherFeatures,
    add_teacher_targets,
    compute_features,
    embed_negatives,
    with_negatives,
)
from modeling_dclip.distillation.adapters import (
    add_adapters,
    freeze_parameters,
    plain_state,
    save_adapters,
    scale_adapters,
)
from modeling_dclip.distillation.arguments import (
    AnchorArguments,
    RegionsArguments,
    StudentArguments,
    TeacherArguments,
    deciding_fields,
)
from modeling_dclip.distillation.checkpoints import RECORD_NAME
from modeling_dclip.distillation.dmclip import run_dmclip_stages
from modeling_dclip.distillation.probe import Probe, choose_alpha
from modeling_dclip.distillation.recipes import Recipe
from modeling_dclip.distillation.run import (
    UNCAPTIONED,
    Clip,
    KeyedRows,
    Learned,
    Places,
    SharedData,
    Splits,
    attach_regions,
    check_batches,
    check_parts,
    check_uncaptioned,
    find_clip,
    find_teacher,
    finished_inputs,
    keep_test_part,
    load_matching_teacher,
    load_student,
    load_training_images,
    read_clip,
    read_keyed,
    share_pixels,
    student_splits,
    without_test,
)
from modeling_dclip.distillation.towers import join_towers
from modeling_dclip.distillation.trainer import (
    AnchorTrainer,
    StudentTrainer,
    TeacherTrainer,
    find_overflows,
    require_fit,
    save_weights,
    train_or_resume,
)
from modeling_dclip.encoders.families import counting_cuts, image_modules, shared_width, stated_length
from modeling_dclip.encoders.fingerprints import canonical_json, combine_keys, fingerprint_model, hash_bytes
from modeling_dclip.encoders.loading import ADAPTER_FOLDER, load_processor, load_tokenizer, stored_dtype
from modeling_dclip.encoders.weight_interpolation import interpolate_weights
from modeling_dclip.modeling_dclip import DCLIPModel
from modeling_dclip.modeling_dclip_teacher import DCLIPTeacher
from modeling_dclip.processing_dclip import DCLIPProcessor, DCLIPTeacherProcessor
from modeling_dclip.progress import count_of

logger = logging.getLogger(__name__)

TARGET_COLUMNS = ("teacher_embeds", "text_embeds", "anchor_embeds", NEGATIVES, "negative_embeds")


def run_stages(recipe: Recipe, shared: SharedData | None = None) -> Path:
    """Run a recipe's stages. Finished ones are skipped, interrupted ones continue.

    Args:
        recipe ([`Recipe`]): Parsed; of one arm.
        shared ([`SharedData`], *optional*): One for several runs in a process, so that images are read once.

    Returns:
        `Path`: The run's folder.

    Raises:
        FileNotFoundError: If a stage needs one that was not run.
        ValueError: If a stage's folder was made from other inputs, an input is wrong, or `student.probe` names
            benchmarks and `shared` has nothing that measures them.
    """
    check_uncaptioned(recipe)
    shared = SharedData() if shared is None else shared
    if recipe.student.probe and shared.open_probe is None and "student" in recipe.stages:
        raise ValueError(
            "student.probe: expected SharedData(open_probe=...), which measures benchmarks, got none. Train with "
            "train.py, or pass an object of modeling_dclip.evaluation.evaluator.Probes."
        )
    places, stages = Places.of(recipe), recipe.stages
    logger.info("Stages: %s, in %s", ", ".join(stages), places.folder)
    check_parts(recipe, shared)
    keep_test_part(recipe, shared)
    if "anchor" in stages:
        if recipe.run.clip_model is None:
            dataset = load_mix(recipe.anchor.train_datasets or recipe.run.train_datasets, seed=recipe.anchor.seed)
            images = without_test(read_keyed(dataset, recipe.run, "anchor", shared), recipe.run, shared)
            make = join_towers if recipe.anchor.joins_towers else make_anchor
            make(recipe.anchor, images, places, recipe.resolved("anchor"))
        else:
            logger.info("anchor: nothing to do, the recipe starts from %s", recipe.run.clip_model)
    if {"regions", "teacher", "targets", "student"} & set(stages):
        _run_dclip_stages(recipe, stages, places, shared)
    if {"reinforce", "dmclip"} & set(stages):
        run_dmclip_stages(recipe, stages, places, shared)
    return places.folder


def _run_dclip_stages(recipe: Recipe, stages: Collection[str], places: Places, shared: SharedData) -> None:
    """Find regions, train a teacher, store its targets, train a student: those of the stages that are asked for."""
    if "student" in stages and "targets" not in stages:
        places.made("targets", RECORD_NAME)  # an error now rather than after the images are read
    images = load_training_images(recipe, shared)
    if {"regions", "teacher", "targets"} & set(stages):
        check_batches(recipe, images)
    if "regions" in stages:
        find_regions(recipe.regions, images, places)
    if not {"teacher", "targets", "student"} & set(stages):
        return
    data = attach_regions(images, places if recipe.uses_detector else None)
    clip = read_clip(find_clip(recipe, places), shared)
    features = FeatureOptions(
        places.cache_dir / "features",
        max_regions=recipe.regions.max_regions,
        batch_size=recipe.targets.batch_size,
        text_batch_size=recipe.targets.text_batch_size,
        chunk_rows=recipe.targets.chunk_rows,
        num_workers=recipe.targets.num_workers,
    )
    if "teacher" in stages:
        if recipe.run.teacher_model is None:
            resolved, learned = recipe.resolved("regions", "teacher"), Learned(images["train"].keys, [clip.path])
            train_teacher(recipe.teacher, data, clip, features, places, resolved, learned)
        else:
            logger.info("teacher: nothing to do, the recipe takes %s", recipe.run.teacher_model)
    if "targets" in stages:
        teacher_path = find_teacher(recipe, places) if recipe.student.reads_teacher else None
        write_targets(teacher_path, data, clip, features, places, recipe.student.false_captions)
    if "student" in stages:
        resolved = recipe.resolved("regions", "teacher", "targets", "student")
        teachers = [recipe.run.teacher_model or places.folder / "teacher"] if recipe.student.reads_teacher else []
        learned = Learned(student_keys(recipe.student, images), [clip.path, *teachers])
        train_student(recipe.student, data, clip, places, resolved, shared, learned)


def student_keys(args: StudentArguments, images: Splits) -> list[str]:
    """Keys of the images that have a say in a student: it learns from them, or they choose its weights.

    Args:
        args ([`StudentArguments`]): Say whether a validation chooses the checkpoint, or a point before it.
        images (`dict[str, KeyedRows]`): From [`~modeling_dclip.distillation.run.load_training_images`].
    """
    chooses = args.load_best_model_at_end or args.wise_ft_rule is not None
    choosing = [images["validation"]] if chooses and "validation" in images else []
    return [key for split in [*student_splits(images), *choosing] for key in split.keys]


def make_anchor(args: AnchorArguments, images: KeyedRows, places: Places, resolved_arguments: dict[str, Any]) -> None:
    """Pretrain a small CLIP from scratch on captioned images, and save it in the run's folder `anchor`.

    Args:
        args ([`AnchorArguments`]): Architecture, tokenizer, optimiser.
        images ([`KeyedRows`]): With `image_id`, `image`, `captions`, and keys of the images.
        places ([`Places`]): Of the run.
        resolved_arguments (`dict`): Saved beside the weights.

    Raises:
        ValueError: If there are too few images, a config is wrong, or the folder was made from other inputs.
    """
    dataset, keys = images
    inputs = {"arguments": deciding_fields(args), "dataset": combine_keys(row_keys(dataset, keys))}
    record = places.record("anchor", inputs)
    if record.finished:
        return
    Learned(keys).keep(record.folder)
    set_seed(args.seed)
    processor = _anchor_processor(args, dataset)
    model = DCLIPModel(_anchor_config(args, processor.tokenizer))
    batches = AnchorBatches(dataset, processor, seed=args.seed, cache_mib=args.image_cache_mib)
    trainer = AnchorTrainer(model, args, batches, processor, resolved_arguments)
    train_or_resume(trainer, record.folder)
    model.config.freeze_text = True  # fine-tuning keeps the text tower
    trainer.save_result(args.save_dtype)
    record.finish()


def _anchor_config(args: AnchorArguments, tokenizer: PreTrainedTokenizerBase) -> DCLIPConfig:
    text_config = {
        **args.text_config,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")},
    }
    return DCLIPConfig(
        text_config=text_config,
        vision_config=args.vision_config,
        projection_dim=args.projection_dim,
        freeze_text=False,
    )


def _anchor_processor(args: AnchorArguments, dataset: Dataset) -> DCLIPProcessor:
    if args.tokenizer in ("scenes", "captions"):
        sentences = None
        if args.tokenizer == "captions":
            sentences = [text for captions in dataset["captions"] for text in captions]
        tokenizer = train_tokenizer(sentences, vocab_size=args.vocab_size, model_max_length=args.max_length)
    else:
        tokenizer = load_tokenizer(args.tokenizer)
        stated_length(tokenizer, args.tokenizer)
    side = args.vision_config.get("image_size", 224)
    size = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    return DCLIPProcessor(CLIPImageProcessorPil(**size), tokenizer)


def find_regions(args: RegionsArguments, images: Splits, places: Places) -> None:
    """Run a detector on every image, and save its boxes and scores in the run's folder `regions`, one dataset a split.

    Args:
        args ([`RegionsArguments`]): The detector and what to keep.
        images (`dict[str, KeyedRows]`): From [`load_training_images`].
        places ([`Places`]): Of the run.

    Raises:
        ValueError: If the detector is unknown, an image cannot be read, or the folder was made from other inputs.
    """
    if args.detector is None:
        logger.info("regions: nothing to do, no detector is named: the dataset's own boxes, else the whole image")
        return
    detector = build_detector(args.detector, trust_checkpoint=args.trust_checkpoint)
    keys = {split: combine_keys(row_keys(*source)) for split, source in images.items()}
    inputs = {"arguments": deciding_fields(args), "detector": detector.fingerprint, "dataset": keys}
    record = places.record("regions", inputs)
    if record.finished:
        return
    options: dict[str, Any] = {"batch_size": args.batch_size, "cache_dir": places.regions_cache}
    state = PartialState()
    logger.info("regions: looks at %s with %s", _total(images), args.detector)
    for split, (dataset, _) in images.items():
        if state.num_processes > 1 and not getattr(detector, "reads_rows", False):
            share = dataset.shard(state.num_processes, state.process_index, contiguous=True)
            add_regions(share, detector, **options)  # fills the cache that all processes share
            state.wait_for_everyone()
        if state.is_main_process:
            report = record.folder / f"{split}_report.json"
            found = add_regions(dataset, detector, max_regions=args.max_regions, report_file=report, **options)
            save_columns(found.select_columns(["image_id", "boxes", "box_scores"]), record.folder / split)
    record.finish()


def _total(splits: Splits) -> str:
    return count_of(sum(len(part.rows) for part in splits.values()), "image")


def _teacher_processor(teacher: DCLIPTeacher, clip: Clip) -> DCLIPTeacherProcessor:
    return DCLIPTeacherProcessor.from_dual_encoder(load_processor(clip.path), teacher.config.clip_config)


def train_teacher(
    args: TeacherArguments,
    data: Splits,
    clip: Clip,
    features: FeatureOptions,
    places: Places,
    resolved_arguments: dict[str, Any],
    learned: Learned,
) -> None:
    """Train the teacher's block on features that its frozen CLIP computes once; save it in the run's folder `teacher`.

    Args:
        args ([`TeacherArguments`]): Architecture and optimiser.
        data (`dict[str, KeyedRows]`): From [`attach_regions`]. Images without captions are not used.
        clip ([`Clip`]): The CLIP around which the teacher is made.
        features ([`FeatureOptions`]): How its features are computed.
        places ([`Places`]): Of the run.
        resolved_arguments (`dict`): Saved beside the weights.
        learned ([`Learned`]): The images of `data` that it learns from; kept beside it.

    Raises:
        ValueError: If there are too few images, or the folder was made from other inputs.
    """
    captioned = {split: part for split, part in data.items() if split != UNCAPTIONED}
    keys = {split: part.key for split, part in captioned.items()}
    inputs = {"arguments": deciding_fields(args), "clip": clip.key, "dataset": keys}
    record = places.record("teacher", inputs | {"max_regions": features.max_regions})
    if record.finished:
        return
    record.count(captioned)
    learned.keep(record.folder)
    set_seed(args.seed)
    teacher = DCLIPTeacher.from_clip(clip.path, **args.architecture()).float()
    processor, dtype = _teacher_processor(teacher, clip), _resolve_dtype(args.save_dtype, "teacher", clip.path)
    if not any(parameter.requires_grad for parameter in teacher.parameters()):
        logger.info("teacher: cross_attention=%r has nothing to train", args.cross_attention)
        require_fit(find_overflows(teacher.state_dict(), dtype), dtype, "teacher")
        if PartialState().is_main_process:
            save_weights(teacher, record.folder, teacher.state_dict(), dtype)
            with writing(record.folder):
                processor.save_pretrained(record.folder)
        record.finish()
        return
    teacher.to(PartialState().device)
    batches = {}
    with counting_cuts():
        for split, (rows, keys_of_rows) in captioned.items():
            paths = compute_features(rows, teacher, processor, features, keys=keys_of_rows)
            batches[split] = TeacherBatches(TeacherFeatures.load(paths), args.seed, rows)
    train, validation = batches["train"], batches.get("validation")
    trainer = TeacherTrainer(teacher, args, train, processor, resolved_arguments, validation)
    train_or_resume(trainer, record.folder)
    trainer.save_result(dtype)
    record.finish()


def _resolve_dtype(save_dtype: str, stage: str, clip_path: str) -> str:
    """The type to save a stage's model in: the one that is asked for, or that of the CLIP that it starts from."""
    stored = stored_dtype(clip_path)
    if save_dtype != "auto" or stored == "float32":
        return "float32" if save_dtype == "auto" else save_dtype
    logger.info(
        "%s: trained in float32, and saved in %s, as the CLIP '%s' is stored. %s.save_dtype float32 keeps what the "
        "shorter type rounds away.",
        *(stage, stored, clip_path, stage),
    )
    return stored


def write_targets(
    teacher_path: str | None,
    data: Splits,
    clip: Clip,
    features: FeatureOptions,
    places: Places,
    false_captions: str = "none",
) -> None:
    """Compute the columns that the student learns from with the frozen teacher and the frozen CLIP.

    They are saved in the run's folder `targets`, one dataset a split.

    Args:
        teacher_path (`str` or `None`): Folder or Hub id of the trained teacher; `None` computes the CLIP's columns.
        data (`dict[str, KeyedRows]`): From [`attach_regions`].
        clip ([`Clip`]): The CLIP that the student starts from.
        features ([`FeatureOptions`]): How its features are computed.
        places ([`Places`]): Of the run.
        false_captions (`str`, *optional*, defaults to `"none"`): As `student.hard_negatives`.

    Raises:
        ValueError: If the teacher is around another CLIP or holds NaN, or the folder was made from other inputs.
    """
    with_teacher = teacher_path is not None
    if teacher_path is not None:
        teacher = load_matching_teacher(teacher_path, clip.path)
        processor = load_processor(teacher_path, DCLIPTeacherProcessor)
    else:
        teacher = DCLIPTeacher.from_clip(clip.path, cross_attention="none")  # adds nothing to the CLIP
        processor = _teacher_processor(teacher, clip)
    keys = {split: part.key for split, part in data.items()}
    inputs = {"teacher": fingerprint_model(teacher), "clip": clip.key, "dataset": keys}
    inputs |= {"max_regions": features.max_regions, "with_teacher": with_teacher}
    negatives = {} if false_captions == "none" else _find_negatives(data, false_captions)
    if negatives:
        texts = {split: canonical_json([of.values.tolist(), of.lengths.tolist()]) for split, of in negatives.items()}
        inputs["false_captions"] = {split: hash_bytes(text) for split, text in texts.items()}
    record = places.record("targets", inputs)
    if record.finished:
        return
    logger.info("targets: embeds %s and their captions", _total(data))
    teacher.to(PartialState().device)
    with counting_cuts():
        for split, (rows, keys_of_rows) in data.items():
            options = {"captioned": split != UNCAPTIONED, "with_teacher": with_teacher}
            targets = add_teacher_targets(rows, teacher, processor, features, keys=keys_of_rows, **options)
            if split in negatives:
                embeds = embed_negatives(negatives[split], teacher, processor, features)
                targets = with_negatives(targets, negatives[split], embeds)
            names = ["image_id", *(name for name in TARGET_COLUMNS if name in targets.column_names)]
            if PartialState().is_main_process:
                save_columns(targets.select_columns(names), record.folder / split)
    record.finish()


def _find_negatives(data: Splits, kind: str) -> dict[str, Ragged]:
    """The false captions of every split; images without captions have none."""
    found = {}
    for split, (rows, _) in data.items():
        if split == UNCAPTIONED:
            found[split] = Ragged.from_lengths(np.array([], dtype=object), np.zeros(len(rows), np.int64))
        else:
            found[split] = collect_negatives(rows, kind, "training images" if split == "train" else f"{split} images")
    return found


def train_student(
    args: StudentArguments,
    data: Splits,
    clip: Clip,
    places: Places,
    resolved_arguments: dict[str, Any],
    shared: SharedData,
    learned: Learned,
) -> None:
    """Fine-tune the image encoder on the targets in the run's folder `targets`; save the student in `student`.

    Args:
        args ([`StudentArguments`]): Losses, freezing, optimiser.
        data (`dict[str, KeyedRows]`): From [`attach_regions`].
        clip ([`Clip`]): The CLIP that the student starts from.
        places ([`Places`]): Of the run.
        resolved_arguments (`dict`): Saved beside the weights.
        shared ([`SharedData`]): Holds pixels that an earlier run decoded.
        learned ([`Learned`]): The images of `data` that it learns from; kept beside it.

    Raises:
        FileNotFoundError: If the stage targets was not run.
        ValueError: If that stage did not finish, or the folder was made from other inputs; and as [`fit_student`].
    """
    targets = places.made("targets", RECORD_NAME)
    keys = {split: part.key for split, part in data.items()}
    inputs = {"arguments": deciding_fields(args), "clip": clip.key, "dataset": keys}
    record = places.record("student", inputs | {"targets": finished_inputs(targets)})
    if record.finished:
        return
    probe = shared.open_probe(args.probe) if shared.open_probe is not None and args.probe else None
    if probe is not None and args.choosing_field is not None and PartialState().is_main_process:
        learned = learned._replace(keys=[*learned.keys, *probe.image_keys()])  # they choose too
    learned.keep(record.folder)
    columns = ["image_id", "image", "captions", *args.columns]
    taught = {
        split: KeyedRows(attach_columns(rows, load_from_disk(targets / split)), keys_of_rows)
        for split, (rows, keys_of_rows) in data.items()
    }
    train = concatenate_shared([part.rows.select_columns(columns) for part in student_splits(taught)])
    validation = taught["validation"].rows if "validation" in taught else None
    record.count(data)
    set_seed(args.seed)
    model = load_student(clip.path, args.position_embedding_type)
    processor = load_processor(clip.path)
    pixels = share_pixels(data, processor.image_processor, args.image_cache_mib, shared)
    adapter_alone = args.lora_rank is not None and not args.merge_adapter
    dtype = "float32" if adapter_alone else _resolve_dtype(args.save_dtype, "student", clip.path)
    options: dict[str, Any] = {"validation": validation, "pixels": pixels, "save_dtype": dtype, "probe": probe}
    fit_student(model, args, train, processor, resolved_arguments, **options)
    record.finish()


def fit_student(
    model: Any,
    args: StudentArguments,
    dataset: Dataset,
    processor: Any,
    resolved_arguments: dict[str, Any],
    *,
    validation: Dataset | None = None,
    pixels: PixelReader | None = None,
    save_dtype: str = "float32",
    probe: Probe | None = None,
) -> StudentTrainer:
    """Fine-tune the image encoder of a dual encoder on stored targets, and save it in `args.output_dir`.

    With `args.lora_rank` the weights stay as they are and adapters train; these are saved in `adapter/` too.

    Args:
        model (`PreTrainedModel`): From [`load_student`], of any family; changed in place.
        args ([`StudentArguments`]): Losses, freezing, optimiser.
        dataset (`datasets.Dataset`): With `image_id`, `image`, `captions` and the target columns that `args` reads.
        processor: The student's, of its family.
        resolved_arguments (`dict`): Saved beside the weights.
        validation (`datasets.Dataset`, *optional*): Rows for `args.eval_strategy`.
        pixels ([`PixelReader`], *optional*): Of the same rows, shared by several runs in one process.
        save_dtype (`str`, *optional*, defaults to `"float32"`): Of the saved weights; an adapter stays float32.
        probe ([`~modeling_dclip.distillation.probe.Probe`], *optional*): Measures the benchmarks of `args.probe`.

    Returns:
        [`StudentTrainer`]: After training; its `dual_encoder` is the student, in float32.

    Raises:
        ImportError: If adapters are asked for and peft is not installed.
        RuntimeError: If a frozen weight has changed.
        ValueError: If a column is missing or wrong, a freeze pattern matches nothing, a weight is too large for
            `save_dtype`, or as [`~modeling_dclip.distillation.probe.choose_alpha`].
    """
    anchor = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapters = None
    if args.lora_rank is not None:
        if hasattr(model.config, "freeze_text"):  # each call of train() would freeze an adapter in the text tower
            model.config.freeze_text = not args.lora_text
        adapters = add_adapters(model, args, ("vision_model", "text_model") if args.lora_text else ("vision_model",))
    with counting_cuts():
        batches, eval_batches = _make_batches(model, args, dataset, processor, validation, pixels)
    measures: dict[str, Any] = {"adapters": adapters, "probe": probe}
    trainer = StudentTrainer(model, args, batches, processor, resolved_arguments, eval_batches, **measures)
    logger.info(
        "student: %s of the %s",
        freeze_parameters(trainer.model, args.freeze),
        "dual encoder" if args.lora_text else "image encoder",
    )
    train_or_resume(trainer, Path(args.output_dir))
    trained = {name: tensor.cpu() for name, tensor in plain_state(model, merged=False).items()}
    _check_frozen(anchor, trained, trains=() if adapters is not None else image_modules(model))
    _put_on_line(trainer, args, anchor, trained)
    if adapters is not None:
        _finish_adapters(trainer, args, save_dtype)
    else:
        trainer.save_result(save_dtype)
    return trainer


def _put_on_line(
    trainer: StudentTrainer, args: StudentArguments, anchor: dict[str, torch.Tensor], trained: dict[str, torch.Tensor]
) -> None:
    """Put the weights at `wise_ft_alpha` between the anchor's and the trained ones, or where `wise_ft_rule` says.

    With adapters these are scaled. The saved arguments say which alpha it is.
    """
    model, alpha = trainer.dual_encoder, args.wise_ft_alpha
    if alpha == 1 and args.wise_ft_rule is None:
        return
    trained = {name: tensor.clone() for name, tensor in trained.items()}
    own = {name: one.detach().clone() for name, one in model.named_parameters() if one.requires_grad}

    def put(alpha: float) -> None:
        if trainer.adapters is None:
            model.load_state_dict(interpolate_weights(anchor, trained, alpha))
            return
        with torch.no_grad():
            for name, one in model.named_parameters():
                if name in own:
                    one.copy_(own[name])
        scale_adapters(model, alpha)

    if args.wise_ft_rule is not None:
        alpha = choose_alpha(trainer, args.wise_ft_rule, put)
        resolved = trainer.resolved_arguments
        student = {**resolved.get("student", {}), "wise_ft_alpha": alpha}
        trainer.resolved_arguments = {**resolved, "student": student}
    put(alpha)


def _make_batches(
    model: Any,
    args: StudentArguments,
    dataset: Dataset,
    processor: Any,
    validation: Dataset | None,
    pixels: PixelReader | None,
) -> tuple[StudentBatches, StudentBatches | None]:
    width = shared_width(model.config)
    options: dict[str, Any] = {"width": width, "seed": args.seed, "cache_mib": args.image_cache_mib}

    def make(rows: Dataset, columns: list[str], **more: Any) -> StudentBatches:
        if args.lora_text:
            return TokenizedStudentBatches(rows, model, processor, columns, **options, **more)
        return StudentBatches(rows, processor.image_processor, columns, **options, **more)

    train = make(dataset, args.columns, pixels=pixels, min_crop_area=args.min_crop_area, bank=args.negatives == "bank")
    if validation is None:
        return train, None
    return train, make(validation, list(dict.fromkeys([*args.columns, "text_embeds"])))  # for retrieval


def _check_frozen(anchor: dict[str, torch.Tensor], trained: dict[str, torch.Tensor], trains: tuple[str, ...]) -> None:
    """Check that frozen weights did not change: those whose names do not begin as `trains` says."""
    frozen = [name for name in anchor if not name.startswith(trains)]
    moved = [name for name in frozen if name not in trained or not torch.equal(anchor[name].cpu(), trained[name])]
    if moved:
        raise RuntimeError(
            f"Frozen weights have changed: {moved[:3]}, {len(moved)} in all. This is a bug; please report it."
        )


def _finish_adapters(trainer: StudentTrainer, args: StudentArguments, save_dtype: str) -> None:
    """Save the adapter, and with `merge_adapter` the student with it merged in."""
    model, folder = trainer.dual_encoder, Path(args.output_dir)
    if args.merge_adapter:
        trainer.save_result(save_dtype)  # writes the adapter too
        trainer.adapters.merge_and_unload()
        trainer.adapters = None
        if hasattr(model.config, "freeze_text"):
            model.config.freeze_text = True
    else:
        trainer.guard.check_weights(model, trainer.state.global_step)
        if args.should_save:
            save_adapters(trainer.adapters, folder)
            trainer.save_beside(folder)
    logger.info("student: the adapter is in %s", folder / ADAPTER_FOLDER)
