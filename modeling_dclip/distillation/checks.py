"""What of a recipe can be told to be wrong before its first stage runs: in seconds, and all of it at once.

[`check_recipe`] reads names, headers and configurations; [`check_starting_models`] loads the models that later stages
start from. Neither reads a picture.
"""

import difflib
import logging
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModel, CLIPTextConfig, PreTrainedConfig
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from modeling_dclip.configuration_dclip import PRESETS, DCLIPConfig, DCLIPVisionConfig
from modeling_dclip.configuration_dclip_teacher import DCLIPTeacherConfig
from modeling_dclip.data.captions import CAPTION_SOURCES
from modeling_dclip.data.failures import MistakeCollector, naming
from modeling_dclip.data.files import check_output_folder, entry_names, require_file
from modeling_dclip.data.regions.detectors import check_detector
from modeling_dclip.data.specs import parse_spec
from modeling_dclip.distillation.adapters import find_adapted_layers, freeze_parameters
from modeling_dclip.distillation.arguments import SECTIONS, StageTrainingArguments, StudentArguments
from modeling_dclip.distillation.dmclip import check_shards, check_starts, find_image_size
from modeling_dclip.distillation.recipes import GLOBAL, ArmRun, Recipe, check_uncaptioned_fields
from modeling_dclip.distillation.run import (
    READ_AS_CLIP,
    Places,
    SharedData,
    check_positions,
    check_uncaptioned,
    load_matching_teacher,
    read_clip,
    set_positions,
)
from modeling_dclip.distillation.trainer import ImageSide, choose_contrastive_loss
from modeling_dclip.encoders.loading import (
    DUAL_ENCODERS,
    STUDENT_ENCODERS,
    check_model,
    load_image_processor,
    load_processor,
    load_tokenizer,
)
from modeling_dclip.encoders.open_clip import OPEN_CLIP_PREFIX

logger = logging.getLogger(__name__)

_MADE_TOKENIZERS = ("scenes", "captions")  # that the stage anchor trains


def check_recipe(recipe: Recipe, whole: Recipe) -> None:
    """Check what a recipe names, and that its models can be built and trained as it says, before its first stage.

    Models are built without weights, around the CLIP that is there or the one that the stage anchor will make. Of a
    model on the Hub the configuration, the tokenizer and the image processor are fetched.

    Args:
        recipe ([`Recipe`]): Parsed; of one arm.
        whole ([`Recipe`]): The recipe before its arms were told apart.

    Raises:
        OSError: If a file, a folder or a model is missing, or nothing can be written where the run writes.
        ImportError: If a package that the detector needs is not installed.
        WrongModelError: If a model is of another kind.
        ValueError: If the spec of a dataset or of the detector is wrong, a configuration has an unknown or a wrong
            field, the teacher's heads do not divide the width, a pattern of `student.freeze` matches nothing or leaves
            nothing to train, or the device cannot train in the precision that is asked for.
        Mistakes: If several of these are found.
    """
    found = MistakeCollector()
    with found.collecting():
        _check_places(recipe, whole)
    with found.collecting():
        check_uncaptioned_fields(recipe)
    for check in (_check_data, _check_detector, _check_precision):
        with found.collecting():
            check(recipe)
    with found.collecting():
        _check_dmclip(recipe, named_clip(recipe, whole))
    with found.collecting():
        config = _planned_clip(recipe, whole)
        if config is not None:
            _check_architectures(recipe, config)
    with found.collecting():
        _check_teacher(recipe)
    found.tell()


def named_clip(recipe: Recipe, whole: Recipe) -> str | None:
    """Folder or Hub id of the CLIP that a recipe names; `None` if it names none, or the stage anchor makes it.

    Args:
        recipe ([`Recipe`]): Parsed; of one arm, whose `clip_model` may be the anchor that all arms share.
        whole ([`Recipe`]): The recipe before its arms were told apart.

    Returns:
        `str` or `None`
    """
    named = recipe.run.clip_model
    return None if named is None or whole.makes_anchor else PRESETS.get(named, named)


def check_starting_models(recipe: Recipe, whole: Recipe, shared: SharedData) -> None:
    """Load the CLIP and the teacher that a recipe names, so that damaged weights are told before its first stage.

    Args:
        recipe ([`Recipe`]): Parsed; of one arm.
        whole ([`Recipe`]): The recipe before its arms were told apart.
        shared ([`SharedData`]): Keeps the CLIP's key for the stages.

    Raises:
        OSError, ValueError: As [`~modeling_dclip.distillation.run.read_clip`] and
            [`~modeling_dclip.distillation.run.load_matching_teacher`].
    """
    run, clip = recipe.run, named_clip(recipe, whole)
    if clip is None or not {"teacher", "targets", "student"} & set(recipe.stages):
        return
    with naming("clip_model"):
        read_clip(clip, shared)
    if run.teacher_model is not None and recipe.student.reads_teacher and "targets" in recipe.stages:
        with naming("teacher_model"):
            load_matching_teacher(run.teacher_model, clip)


def _check_places(recipe: Recipe, whole: Recipe) -> None:
    """Refuse a folder that cannot be written; the first one, as the others mostly lie in it."""
    places = Places.of(recipe)
    folders = {"output_dir": Path(whole.run.output_dir), "cache_dir": places.cache_dir}
    if "regions" in recipe.stages and recipe.uses_detector:
        folders["cache_dir, for the detector's answers"] = places.regions_cache
    for field, folder in folders.items():
        with naming(field):
            check_output_folder(folder)


def _check_data(recipe: Recipe) -> None:
    """Check the specs of all datasets, and that their files are there."""
    run, found, stages = recipe.run, MistakeCollector(), set(recipe.stages)
    specs = {"train_datasets": run.train_datasets, "uncaptioned_datasets": run.uncaptioned_datasets}
    if "anchor" in stages:
        specs["anchor.train_datasets"] = recipe.anchor.train_datasets
    for field, texts in specs.items():
        for text in texts:
            with found.collecting(), naming(field):
                parse_spec(text, CAPTION_SOURCES, counted=True).check_files()
    for path in run.exclude_karpathy:
        with found.collecting(), naming("exclude_karpathy"):
            require_file(path, "Karpathy JSON file")
    found.tell()


def _check_detector(recipe: Recipe) -> None:
    regions = recipe.regions
    if regions.detector is not None and recipe.uses_detector and "regions" in recipe.stages:
        with naming("regions.detector"):
            check_detector(regions.detector, trust_checkpoint=regions.trust_checkpoint)


def _check_precision(recipe: Recipe) -> None:
    """Refuse half precision that the device lacks; transformers says so of fp16 only when a stage begins."""
    for name in recipe.stages:
        args = getattr(recipe, name, None)
        if isinstance(args, StageTrainingArguments) and (args.fp16 or args.fp16_full_eval):
            field = f"{name}.fp16" if args.fp16 else f"{name}.fp16_full_eval"
            if args.device.type == "cpu":
                raise ValueError(
                    f"{field}: expected a GPU, got the CPU, which does not train in float16. Leave it out, or set "
                    f"{name}.bf16 and {name}.use_cpu."
                )


def _check_dmclip(recipe: Recipe, clip: str | None) -> None:
    """Check what the stages reinforce and dmclip read besides captions; `clip` is the CLIP that is named."""
    stages, found = set(recipe.stages), MistakeCollector()
    if "reinforce" in stages:
        for teacher in dict.fromkeys(recipe.reinforce.teachers or ([] if clip is None else [clip])):
            if not teacher.startswith(OPEN_CLIP_PREFIX):  # known to the package alone
                with found.collecting(), naming("reinforce.teachers" if recipe.reinforce.teachers else "clip_model"):
                    check_named_model(teacher)
        if recipe.reinforce.captioner is not None:
            with found.collecting(), naming("reinforce.captioner"):
                check_named_model(recipe.reinforce.captioner)
    if {"reinforce", "dmclip"} & stages:
        with found.collecting():
            check_starts(recipe.dmclip)
            find_image_size(recipe.dmclip)
    if "dmclip" in stages:
        args = recipe.dmclip
        if args.train_shards is not None:
            with found.collecting(), naming("dmclip.train_shards"):
                check_shards(args, args.train_shards)
        tokenizers = {"dmclip.tokenizer": args.tokenizer, "dmclip.model": args.model, "clip_model": clip}
        field, name = next(((field, name) for field, name in tokenizers.items() if name), ("", None))
        if name is not None:
            with found.collecting(), naming(field):
                load_tokenizer(name)
    found.tell()


def _check_teacher(recipe: Recipe) -> None:
    name = recipe.run.teacher_model
    if name is None or not recipe.student.reads_teacher or not {"targets", "student"} & set(recipe.stages):
        return
    with naming("teacher_model"):
        check_named_model(name, ("dclip_teacher",))
    check_uncaptioned(recipe)


def check_named_model(name: str, kinds: Collection[str] | None = None) -> Any:
    """As [`~modeling_dclip.encoders.loading.check_model`], of a preset too; a name with a typo gets the nearest one.

    Args:
        name (`str`): Preset, folder or Hub id.
        kinds (`Collection[str]`, *optional*): The model types that are expected.

    Returns:
        `PreTrainedConfig`

    Raises:
        OSError, ValueError: As there.
    """
    name = PRESETS.get(name, name)
    try:
        return check_model(name, kinds)
    except OSError as error:
        if not (near := nearest_model(name)):
            raise
        raise FileNotFoundError(f"{error} Did you mean {near!r}?") from error


def nearest_model(name: str) -> str | None:
    """The preset, published CLIP or folder beside it whose name is nearest to a name that nothing has.

    Args:
        name (`str`): As the user wrote it.

    Returns:
        `str` or `None`: `None` where there is a model of this name, or none of a near one.
    """
    known = {*PRESETS, *PRESETS.values()}
    if os.path.exists(name) or name in known:
        return None
    folder = Path(name).parent
    known |= {str(folder / entry) for entry in entry_names(folder)} if folder.is_dir() else set()
    near: Sequence[str] = difflib.get_close_matches(name, known, 1, cutoff=0.8)
    return near[0] if near else None


def _check_architectures(recipe: Recipe, config: Any) -> None:
    """Build teacher and student without weights."""
    stages = set(recipe.stages)
    if "teacher" in stages and recipe.run.teacher_model is None:
        _build("teacher", DCLIPTeacherConfig, clip_config=config.to_dict(), **recipe.teacher.architecture())
    if "student" in stages:
        check_contrastive_loss(recipe.student, config, recipe.values["student"])
        _check_student(recipe.student, config)


def check_contrastive_loss(args: StudentArguments, config: Any, given: Collection[str]) -> None:
    """Refuse a contrastive loss that a model cannot be trained with, and settings that the sigmoid one does not read.

    Args:
        args ([`StudentArguments`]): Of the run.
        config (`PreTrainedConfig`): Of the dual encoder that the student starts from.
        given (`Collection[str]`): The fields of the section that were set.

    Raises:
        ValueError: Naming the field.
    """
    if not args.contrastive_loss_weight or choose_contrastive_loss(args.contrastive_loss, config) != "sigmoid":
        return
    unread = {"temperature": True, "image_to_text_weight": not args.similarity_distillation_loss_weight}
    for name in (name for name, is_unread in unread.items() if is_unread and name in given):
        raise ValueError(
            f"student.{name}: expected none, as the sigmoid loss of a {config.model_type} has the model's own "
            f"scale and bias, and one direction, got {getattr(args, name)}. Unset it (--student.{name} none), or set "
            "student.contrastive_loss to softmax."
        )


def _check_student(args: StudentArguments, config: Any) -> None:
    """Build the student without weights, and see that it can train as it is asked to."""
    check_positions(config, args.position_embedding_type)
    own = DUAL_ENCODERS.get(config.model_type)
    if config.model_type in READ_AS_CLIP:
        set_positions(config.vision_config, args.position_embedding_type)
    with torch.device("meta"):
        model = AutoModel.from_config(config) if own is None else own(config)
    if args.gradient_checkpointing and not model.vision_model.supports_gradient_checkpointing:
        raise ValueError(
            f"student.gradient_checkpointing: expected an image encoder that can compute activations again, got "
            f"{type(model.vision_model).__name__}. Leave it out."
        )
    if args.lora_rank is None:
        freeze_parameters(ImageSide(model), args.freeze)
    else:
        find_adapted_layers(model, args)


def _planned_clip(recipe: Recipe, whole: Recipe) -> PreTrainedConfig | None:
    """The configuration of the dual encoder that teacher and student start from; `None` if neither is made."""
    if whole.makes_anchor:
        return _planned_anchor(whole)
    clip = named_clip(recipe, whole)
    if clip is None or not {"teacher", "targets", "student"} & set(recipe.stages):
        return None
    with naming("clip_model"):
        config = check_named_model(clip, STUDENT_ENCODERS)
        load_processor(clip)
    own = DUAL_ENCODERS.get(config.model_type)
    return config if own is None else own.config_class.from_pretrained(clip)


def _planned_anchor(whole: Recipe) -> DCLIPConfig | None:
    args: Any = whole.anchor  # its mappings are parsed
    if args.joins_towers:
        _check_towers(whole)
        return None
    for name, kind in (("vision_config", DCLIPVisionConfig), ("text_config", CLIPTextConfig)):
        known = {one.name for one in fields(kind)}
        if unknown := sorted(set(getattr(args, name)) - known):
            near = difflib.get_close_matches(unknown[0], known, 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"anchor.{name}: expected fields of {kind.__name__}, got {unknown[0]!r}.{hint}")
    if args.tokenizer not in _MADE_TOKENIZERS and "anchor" in whole.stages:
        with naming("anchor.tokenizer"):
            load_tokenizer(args.tokenizer)
    words = {**args.text_config, "vocab_size": args.vocab_size, "max_position_embeddings": args.max_length}
    sizes = {"vision_config": args.vision_config, "projection_dim": args.projection_dim}
    return _build("anchor", DCLIPConfig, text_config=words, **sizes)


def _check_towers(whole: Recipe) -> None:
    """Look for the two towers that the stage anchor joins, and for their processors."""
    found, args = MistakeCollector(), whole.anchor
    if "anchor" not in whole.stages:
        return
    for field, name, load in (
        ("vision_model", args.vision_model, load_image_processor),
        ("text_model", args.text_model, load_tokenizer),
    ):
        with found.collecting(), naming(f"anchor.{field}"):
            check_named_model(str(name))
            load(str(name))
    found.tell()


def _build(section: str, kind: Any, **values: Any) -> Any:
    """A configuration from a section's fields. An error names the section."""
    try:
        return kind(**values)
    except (StrictDataclassError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split()).rpartition("ValueError: ")[2]
        raise ValueError(f"Recipe, {section}: {reason}") from error


def check_effects(runs: Sequence[ArmRun], whole: Recipe) -> None:
    """Refuse fields of the command line that nothing reads in any run, and log those of the recipe file in one line.

    Args:
        runs (`Sequence[ArmRun]`): From [`~modeling_dclip.distillation.recipes.expand_arms`].
        whole ([`Recipe`]): The recipe before its arms were told apart.

    Raises:
        ValueError: Naming the field, the reason and the stages that run.
        Mistakes: If there are several.
    """
    given = [(section, field) for section, values in whole.values.items() for field in values]
    for overrides in whole.run.variants.values():
        for name, value in overrides.items():
            given += [(name, field) for field in value] if name in SECTIONS and isinstance(value, dict) else []
    _check_kind(whole, given)
    found, silent = MistakeCollector(), dict[str, list[str]]()
    for section, field in dict.fromkeys(given):
        reasons = [_without_effect(section, field, run.recipe, whole) for run in runs]
        if not all(reasons):
            continue
        name = field if section == GLOBAL else f"{section}.{field}"
        if (section, field) in whole.on_line:
            stages = list(dict.fromkeys(stage for run in runs for stage in run.recipe.stages))
            with found.collecting():
                raise ValueError(
                    f"--{name}: has no effect in this recipe, as {reasons[0]}. Leave it out. Stages that run: "
                    f"{', '.join(stages)}."
                )
        silent.setdefault(str(reasons[0]), []).append(name)
    found.tell()
    if silent:
        told = [f"{', '.join(names)} ({reason})" for reason, names in silent.items()]
        logger.info("%s: without effect in this run: %s", whole.path, "; ".join(told))


def _check_kind(whole: Recipe, given: Collection[tuple[str, str]]) -> None:
    """Refuse `--dmclip.FIELD` alone: it would make a recipe for a student one for a DM-CLIP."""
    elsewhere = {section for section, field in given if (section, field) not in whole.on_line}
    line = sorted(f"--dmclip.{field}" for section, field in whole.on_line if section == "dmclip")
    if line and "dmclip" not in elsewhere and {"teacher", "targets", "student", "regions"} & elsewhere:
        raise ValueError(
            f"{line[0]}: expected a recipe with a section dmclip, got one for a student ('{whole.path}'). Name "
            "another --recipe, such as recipes/dmclip_demo.yaml, or leave it out."
        )


def _without_effect(section: str, field: str, recipe: Recipe, whole: Recipe) -> str | None:
    """Why nothing of a run reads a field; `None` if something does."""
    if section == GLOBAL:
        return _global_without_effect(field, recipe, whole)
    stages, student = set(recipe.stages), recipe.student
    readers = {"targets": {"teacher", "targets"}, "dmclip": {"reinforce", "dmclip"}}.get(section, {section})
    runs = bool(readers & stages)
    if section == "anchor":
        runs = whole.makes_anchor and "anchor" in whole.stages
    elif section == "regions":
        runs = recipe.uses_detector or (field in ("max_regions", "ignore_boxes") and student.reads_teacher)
        runs &= bool({"regions", "teacher", "targets", "student"} & stages)
    elif section == "teacher":
        runs &= recipe.run.teacher_model is None
    elif section == "student" and field in _DECIDING_STAGES:
        runs = bool({"regions", "teacher", "targets", "student"} & stages)
    elif section == "reinforce" and field == "folder":
        runs |= "dmclip" in stages and recipe.dmclip.train_shards is None
    if not runs:
        return _why_not(section, recipe)
    args: Any = getattr(recipe, section)
    return next((reason for name, unread, reason in _field_rules(section, args) if name == field and unread), None)


# Fields of the student that say which columns earlier stages make.
_DECIDING_STAGES = ("cosine_distillation_loss_weight", "similarity_distillation_loss_weight")


def _why_not(section: str, recipe: Recipe) -> str:
    """Why the stage of a section does not run."""
    run = recipe.run
    if section == "anchor" and run.clip_model is not None:
        return f"clip_model ({run.clip_model}) is named, so that no anchor is made; --clip_model none unsets it"
    if run.stages and section not in run.stages:
        return f"the stage {section} is not among --stages"
    if section in ("reinforce", "dmclip") and not recipe.trains_dmclip:
        return f"the stage {section} does not run without a section dmclip"
    if recipe.trains_dmclip:
        shards = section == "reinforce" and recipe.dmclip.train_shards is not None
        return "dmclip.train_shards names the shards" if shards else "the recipe trains a DM-CLIP, not a student"
    if section == "teacher" and run.teacher_model is not None and recipe.student.reads_teacher:
        return "teacher_model is named, so that no teacher is trained"
    if section == "regions" and recipe.regions.detector is None and recipe.student.reads_teacher:
        return "regions.detector is not set"
    return f"the student reads no teacher, so that the stage {section} does not run"


def _field_rules(section: str, args: Any) -> Iterator[tuple[str, bool, str]]:
    """Fields of a section that another one switches off: the field, whether it is off, and why."""
    if isinstance(args, StageTrainingArguments):
        yield "num_train_epochs", args.max_steps > 0, f"{section}.max_steps ({args.max_steps}) says how long it trains"
        yield "eval_steps", args.eval_strategy != IntervalStrategy.STEPS, f"{section}.eval_strategy is not steps"
        yield "save_steps", args.save_strategy != SaveStrategy.STEPS, f"{section}.save_strategy is not steps"
    if section in ("student", "dmclip"):
        whole = (args.micro_batch_size or 1) >= args.per_device_train_batch_size
        batch = f"{section}.per_device_train_batch_size ({args.per_device_train_batch_size})"
        yield "micro_batch_size", whole, f"it is not below {batch}"
    if section == "student":
        similarity, contrastive = args.similarity_distillation_loss_weight, args.contrastive_loss_weight
        for name in ("similarity_temperature", "similarity_teacher_temperature"):
            yield name, not similarity, "student.similarity_distillation_loss_weight is 0"
        for name in ("temperature", "contrastive_loss", "hard_negatives"):
            yield name, not contrastive, "student.contrastive_loss_weight is 0"
        yield "image_to_text_weight", not (contrastive or similarity), "the weights of both in-batch losses are 0"
        in_batch = args.negatives == "batch" and (contrastive or similarity)
        yield "batch_order", not in_batch, "no loss compares the images of a batch"
        for name in ("bank_limit", "max_negative_similarity"):
            yield name, args.negatives != "bank", "student.negatives is not bank"
        yield "probe_steps", not args.probe, "student.probe names no benchmark"
    elif section == "teacher":
        for name in ("num_clusters", "num_cluster_steps"):
            yield name, args.aggregation != "multi_cluster", "teacher.aggregation is not multi_cluster"
    elif section == "anchor":
        for name in ("vision_config", "text_config", "tokenizer", "vocab_size", "max_length"):
            yield name, args.joins_towers, "anchor.vision_model and anchor.text_model name towers that are there"
        for name in ("freeze_vision", "freeze_text"):
            yield name, not args.joins_towers, "anchor.vision_model and anchor.text_model are not set"
        for name in ("vocab_size", "max_length"):
            yield name, args.tokenizer not in _MADE_TOKENIZERS, "anchor.tokenizer names a tokenizer that is there"
    elif section == "reinforce":
        yield "magnitude", args.num_operations == 0, "reinforce.num_operations is 0"
        yield "captions_per_image", args.captioner is None, "reinforce.captioner is not set"
    elif section == "dmclip":
        yield "teacher_logit_scale", args.distillation_loss_weight == 0, "dmclip.distillation_loss_weight is 0"


def _global_without_effect(field: str, recipe: Recipe, whole: Recipe) -> str | None:
    """Why nothing of a run reads a global field; `None` if something does."""
    if field == "seed" and whole.run.seeds and not whole.makes_anchor:
        return f"seeds says {whole.run.seeds}: set --seeds, or unset it with --seeds none"
    if field in ("push_license", "push_arm", "push_private") and whole.run.push_to_hub is None:
        return "nothing is published without push_to_hub"
    if field == "teacher_model" and (recipe.trains_dmclip or not recipe.student.reads_teacher):
        return "no loss of a student reads a teacher"
    return None
