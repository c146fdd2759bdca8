"""DM-CLIP: build the model that will train, and the stages of reinforced training.

A DM-CLIP is made from scratch, around pretrained towers, or from a checkpoint. The stage `reinforce` writes shards,
the stage `dmclip` trains a DM-CLIP on them.

Source: "Knowledge Distillation from Transformer to Mamba for an efficient CLIP" [M]; "MobileCLIP", arXiv 2311.17049
[MC]; docs/papers.md.
"""

import json
import logging
from collections.abc import Collection, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from transformers import (
    AutoModel,
    CLIPImageProcessorPil,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    set_seed,
)
from transformers.utils import has_file

from modeling_dclip.configuration_dclip import PRESETS
from modeling_dclip.configuration_dmclip import DMCLIP_PRESETS, DMCLIPConfig, DMCLIPTextConfig, DMCLIPVisionConfig
from modeling_dclip.data.columns import row_keys
from modeling_dclip.data.reinforced import ReinforcedBatches, SampleView
from modeling_dclip.data.reinforced.augmentations import AugmentationSettings
from modeling_dclip.data.reinforced.shards import INDEX_NAME, find_shards
from modeling_dclip.data.reinforced.teachers import TransformersCaptioner, build_teacher
from modeling_dclip.data.reinforced.writer import write_reinforced
from modeling_dclip.distillation.arguments import (
    DMCLIPArguments,
    ReinforceArguments,
    RunArguments,
    deciding_fields,
)
from modeling_dclip.distillation.checkpoints import read_record
from modeling_dclip.distillation.recipes import Recipe
from modeling_dclip.distillation.run import (
    KeyedRows,
    Learned,
    Places,
    SharedData,
    file_states,
    find_clip,
    holding_folders,
    load_captioned,
    read_keyed,
    without_test,
)
from modeling_dclip.distillation.trainer import DMCLIPTrainer, train_or_resume
from modeling_dclip.encoders.families import stated_length
from modeling_dclip.encoders.fingerprints import combine_keys, fingerprint_model
from modeling_dclip.encoders.loading import check_values, load_tokenizer, read_config, stored_dtype
from modeling_dclip.modeling_dmclip import DMCLIPModel, DMCLIPVisionModel
from modeling_dclip.modeling_dmclip_text import DMCLIPTextModel
from modeling_dclip.processing_dclip import DCLIPProcessor

logger = logging.getLogger(__name__)

Loaded = TypeVar("Loaded", bound=PreTrainedModel)

# The models that a field of the section may name, told by the model_type in their config.
_STARTS = {
    "model": (DMCLIPConfig,),
    "vision_model": (DMCLIPConfig, DMCLIPVisionConfig),
    "text_model": (DMCLIPConfig, DMCLIPTextConfig),
}
_PREPROCESSING = ("preprocessor_config.json", "processor_config.json")
_HEAD = "projection."  # of the image encoder; its other keys are those of its backbone

# Fields of a config that the section has a field of its own for, or that the tokenizer decides.
_SET_ELSEWHERE = {
    "image_size",
    "projection_dim",
    "vocab_size",
    "max_position_embeddings",
    "bos_token_id",
    "eos_token_id",
}
SHARDS_NAME = "shards"  # in the stage's folder, so that its record is not among them


def _check_fields(name: str, given: dict[str, Any], config_class: type) -> None:
    """Refuse unknown fields. A config accepts any name, so a typo in a recipe would go unnoticed."""
    known = {f.name for f in fields(config_class)} - _SET_ELSEWHERE
    unknown = sorted(set(given) - known)
    if unknown:
        raise ValueError(
            f"dmclip.{name}: expected fields of {config_class.__name__} that the section does not set itself, got "
            f"{unknown[0]!r}."
        )


def check_starts(args: DMCLIPArguments) -> None:
    """Check that `model`, `vision_model` and `text_model` name models of the right kind. Only their configs are read.

    Args:
        args ([`DMCLIPArguments`]): The section.

    Raises:
        OSError: If there is no config in a folder or under a Hub id.
        ValueError: If a model is of another kind, or an image encoder's BatchNorms are folded into its weights.
    """
    for name, kinds in _STARTS.items():
        if (path := getattr(args, name)) is None:
            continue
        stored = PreTrainedConfig.get_config_dict(path)[0]
        if stored.get("model_type") not in (expected := [kind.model_type for kind in kinds]):
            raise ValueError(
                f"dmclip.{name}: expected the model_type {' or '.join(expected)} in the config of {path!r}, got "
                f"{stored.get('model_type')!r}. Convert published MambaVision and MobileCLIP checkpoints with "
                "`python -m modeling_dclip.hub.convert`."
            )
        read_config(path)
        if name != "text_model" and DMCLIPVisionConfig.from_pretrained(path).batch_norm_folded:
            raise ValueError(
                f"dmclip.{name}: expected an image encoder with its BatchNorms, got {path!r}, where fuse() folded "
                "them into the weights for inference. Name the model it was made from."
            )


def _vision_config(args: DMCLIPArguments) -> DMCLIPVisionConfig:
    if args.vision_model is not None:
        config = DMCLIPVisionConfig.from_pretrained(args.vision_model)
        return config if args.image_size in (None, config.image_size) else config.for_image_size(args.image_size)
    _check_fields("vision_config", args.vision_config, DMCLIPVisionConfig)
    config = DMCLIPVisionConfig(**{**DMCLIP_PRESETS[args.preset], **args.vision_config, "image_size": args.image_size})
    return config if "window_sizes" in args.vision_config else config.for_image_size(args.image_size)


def _end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends a text: CLIP's end token, or the separator of BERT and its kin."""
    token = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    if token is None:
        raise ValueError(
            f"Expected a tokenizer that ends texts with eos_token or sep_token, got {type(tokenizer).__name__} "
            f"('{tokenizer.name_or_path}') without. Set dmclip.tokenizer to another."
        )
    return token


def _text_config(args: DMCLIPArguments, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    _check_fields("text_config", args.text_config, DMCLIPTextConfig)
    if args.text_model is not None and args.text_config:
        raise ValueError(
            f"dmclip.text_config: expected no text_config beside text_model {args.text_model!r}, which has its own."
        )
    return {
        **args.text_config,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.cls_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id,
        "eos_token_id": _end_token(tokenizer),
    }


def build_dmclip(args: DMCLIPArguments, tokenizer: PreTrainedTokenizerBase) -> tuple[DMCLIPModel, DCLIPProcessor]:
    """Build the DM-CLIP that will train, in float32, and its processor.

    Args:
        args ([`DMCLIPArguments`]): From scratch by `preset`, `vision_config`, `text_config`; with `vision_model` or
            `text_model` around a pretrained tower, or both; with `model` a whole checkpoint. New weights are drawn
            from torch's generator: seed it before. A pretrained image encoder keeps its projection if it has the
            wanted width. Otherwise a new one is drawn, and that is logged.
        tokenizer (`CLIPTokenizer`): Decides vocabulary, special tokens and length of a new text tower.

    Returns:
        `tuple[DMCLIPModel, DCLIPProcessor]`: The processor of [`find_image_processor`] with this tokenizer.

    Raises:
        ValueError: If a field of a config is unknown, `projection_dim` is not the checkpoint's or the text tower's,
            a named model is of another kind or lacks weights, or the tokenizer does not fit the text tower.
    """
    check_starts(args)
    model = _make_model(args, tokenizer) if args.model is None else _load_checkpoint(args)
    _check_tokenizer(tokenizer, model.config.text_config)
    return model, DCLIPProcessor(find_image_processor(args), tokenizer)


def find_image_size(args: DMCLIPArguments) -> int:
    """The side in pixels of the images that a DM-CLIP will train on.

    Args:
        args ([`DMCLIPArguments`]): The section.

    Returns:
        `int`: `args.image_size` if it is set, else the size of the checkpoint or the image encoder.
    """
    return args.image_size or DMCLIPVisionConfig.from_pretrained(args.model or args.vision_model).image_size


def find_image_processor(args: DMCLIPArguments) -> CLIPImageProcessorPil:
    """The image processor of a DM-CLIP: that of the checkpoint or the image encoder if it has one, else CLIP's.

    Args:
        args ([`DMCLIPArguments`]): The section.

    Returns:
        `CLIPImageProcessorPil`: For the size of [`find_image_size`].
    """
    source, side = args.model or args.vision_model, find_image_size(args)
    if source is None:
        return CLIPImageProcessorPil(**_sizes(side))
    if not any(has_file(source, name) for name in _PREPROCESSING):
        logger.warning("dmclip: no %s in %r, so images are normalised as for CLIP", _PREPROCESSING[0], source)
        return CLIPImageProcessorPil(**_sizes(side))
    if args.model is not None:
        image_processor = DCLIPProcessor.from_pretrained(args.model).image_processor
    else:
        image_processor = CLIPImageProcessorPil.from_pretrained(args.vision_model)
    if image_processor.crop_size["height"] == image_processor.crop_size["width"] == side:
        return image_processor
    return CLIPImageProcessorPil.from_dict(image_processor.to_dict() | _sizes(side))


def _load_checkpoint(args: DMCLIPArguments) -> DMCLIPModel:
    config = DMCLIPConfig.from_pretrained(args.model)
    _check_projection(args, config.projection_dim, f"model {args.model!r}")
    if args.image_size not in (None, config.vision_config.image_size):
        config.vision_config = config.vision_config.for_image_size(args.image_size)
    config.freeze_text = args.freeze_text
    return _load(DMCLIPModel, args.model, "model", config=config)[0]


def _make_model(args: DMCLIPArguments, tokenizer: PreTrainedTokenizerBase) -> DMCLIPModel:
    text, text_config, vision_config = None, _text_config(args, tokenizer), _vision_config(args)
    projection_dim = args.projection_dim or (vision_config.projection_dim if _is_dual(args.vision_model) else 512)
    if args.text_model is not None:
        text, _ = _load(DMCLIPTextModel, args.text_model, "text_model")
        text_config, projection_dim = text.config, text.config.projection_dim
        _check_projection(args, projection_dim, f"text_model {args.text_model!r}")
    config = DMCLIPConfig(
        text_config=text_config,
        vision_config=vision_config,
        projection_dim=projection_dim,
        freeze_text=args.freeze_text,
    )
    model = DMCLIPModel(config)
    if text is not None:
        model.text_model.load_state_dict(text.state_dict())
    if args.vision_model is not None:
        _take_vision_weights(model.vision_model, args.vision_model)
    return model


def _is_dual(path: str | None) -> bool:
    """Whether a model's image projection leads into a space shared with texts. That of an image encoder alone is often
    a classifier.
    """
    return path is not None and PreTrainedConfig.get_config_dict(path)[0]["model_type"] == DMCLIPConfig.model_type


def _take_vision_weights(vision_model: DMCLIPVisionModel, path: str) -> None:
    """Load the weights of a pretrained image encoder, but keep the drawn projection if the stored one is no match."""
    loaded, lacking = _load(DMCLIPVisionModel, path, "vision_model", may_lack=_HEAD)
    weights, width, stored = loaded.state_dict(), vision_model.config.projection_dim, loaded.config.projection_dim
    if lacking or stored != width:
        found = "none" if lacking else f"one to {stored}"
        logger.info(
            "dmclip: drew a new projection to %d, because %r has %s; all other weights are its", width, path, found
        )
        own = vision_model.state_dict()
        weights |= {name: tensor for name, tensor in own.items() if name.startswith(_HEAD)}
    vision_model.load_state_dict(weights)


def _load(
    model_class: type[Loaded], path: str, name: str, may_lack: str | None = None, config: DMCLIPConfig | None = None
) -> tuple[Loaded, list[str]]:
    """Load a model in float32, with every weight from its folder.

    Only weights whose names start with `may_lack` may be missing; their names are returned beside the model.
    """
    options: dict[str, Any] = {} if config is None else {"config": config}
    loaded: Any = model_class.from_pretrained(  # with output_loading_info a pair
        path, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    model, found = loaded
    lacking = [key for key in sorted(found["missing_keys"]) if may_lack is not None and key.startswith(may_lack)]
    wrong = {
        "missing": sorted(set(found["missing_keys"]) - set(lacking)),
        "left over": sorted(found["unexpected_keys"]),
        "of another shape": sorted(key for key, *_ in found["mismatched_keys"]),
    }
    if told := [f"{len(keys)} {kind}, such as {keys[0]}" for kind, keys in wrong.items() if keys]:
        raise ValueError(
            f"dmclip.{name}: expected in {path!r} the weights that its config describes, got {'; '.join(told)}. The "
            "file is damaged, or the config is another model's."
        )
    check_values(model, path)
    return model, lacking


def _sizes(side: int) -> dict[str, dict[str, int]]:
    return {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}


def _check_projection(args: DMCLIPArguments, width: int, whose: str) -> None:
    if args.projection_dim not in (None, width):
        raise ValueError(
            f"dmclip.projection_dim: expected {width}, as {whose} has it, got {args.projection_dim}. Leave it out."
        )


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: DMCLIPTextConfig) -> None:
    if len(tokenizer) != config.vocab_size or _end_token(tokenizer) != config.eos_token_id:
        raise ValueError(
            f"Expected a tokenizer of the text tower's {config.vocab_size} tokens that ends with "
            f"{config.eos_token_id}, got {len(tokenizer)} tokens ending with {_end_token(tokenizer)} "
            f"('{tokenizer.name_or_path}'). Set dmclip.tokenizer to the tower's."
        )


def run_dmclip_stages(recipe: Recipe, stages: Collection[str], places: Places, shared: SharedData) -> None:
    """Write reinforced shards and train a DM-CLIP on them: those of the two stages that are asked for.

    Args:
        recipe ([`Recipe`]): Parsed; of one arm.
        stages (`Collection[str]`): May hold `reinforce` and `dmclip`.
        places ([`Places`]): Of the run.
        shared ([`SharedData`]): Of the runs of this process.

    Raises:
        FileNotFoundError: If a stage needs one that was not run.
        ValueError: If a stage's folder was made from other inputs, or an input is wrong.
    """
    args = recipe.dmclip
    if "reinforce" in stages:
        check_starts(args)  # their image size may become that of the shards
        teachers = recipe.reinforce.teachers or [find_clip(recipe, places)]
        size = recipe.reinforce.image_size or find_image_size(args)
        reinforce(recipe.reinforce, recipe.run, teachers, size, places, shared)
    if "dmclip" in stages:
        shards = args.train_shards or str(places.reinforced / SHARDS_NAME)
        if args.train_shards is None and not (Path(shards) / INDEX_NAME).exists():
            raise FileNotFoundError(
                f"No {INDEX_NAME} in '{shards}': run the stage 'reinforce' first, or name dmclip.train_shards."
            )
        tokenizer = args.tokenizer or args.model or find_clip(recipe, places)
        train_dmclip(args, shards, tokenizer, places, recipe.resolved("reinforce", "dmclip"), shared)


def reinforce(
    args: ReinforceArguments,
    run: RunArguments,
    teachers: Sequence[str],
    image_size: int,
    places: Places,
    shared: SharedData,
) -> None:
    """Compute the teachers' embeddings of augmented images and captions once, and store them in shards.

    The shards are in `shards` in the folder of the stage.

    Args:
        args ([`ReinforceArguments`]): Augmentations, captions and how they are stored.
        run ([`RunArguments`]): Names the datasets and the test images to leave out.
        teachers (`Sequence[str]`): CLIPs: presets, folders, Hub ids or `open_clip:NAME:TAG`.
        image_size (`int`): Side of an augmented image in pixels.
        places ([`Places`]): Of the run.
        shared ([`SharedData`]): Holds images and fingerprints of teachers that an earlier run read.

    Raises:
        FileNotFoundError: If a file of the datasets is missing.
        OSError: If another run writes the folder.
        ValueError: If a dataset or a teacher is wrong, or the folder was made from other inputs.
    """
    specs = [PRESETS.get(name, name) for name in teachers]
    device, loaded = PartialState().device, {}
    for spec in dict.fromkeys(specs):
        if spec not in shared.fingerprints:
            loaded[spec] = build_teacher(spec, device)
            shared.fingerprints[spec] = loaded[spec].fingerprint
    images, (dataset, keys) = _captioned_images(run, args.seed, shared)
    inputs = {"arguments": deciding_fields(args), "image_size": image_size, "dataset": combine_keys(keys)}
    inputs["teachers"] = [shared.fingerprints[spec] for spec in specs]
    # Runs may share the folder: none deletes or writes what another one is writing.
    with holding_folders([str(places.reinforced)] if _may_write(places) else []):
        record = places.record("reinforce", inputs, places.reinforced)
        if record.finished:
            return
        Learned(images.keys).keep(record.folder)
        loaded |= {spec: build_teacher(spec, device) for spec in dict.fromkeys(specs) if spec not in loaded}
        captioner = None
        if args.captioner is not None:
            options = {"captions": args.captions_per_image, "seed": args.seed, "device": device}
            captioner = TransformersCaptioner(args.captioner, **options)
        write_reinforced(
            dataset,
            [loaded[spec] for spec in specs],
            output=record.folder / SHARDS_NAME,
            settings=AugmentationSettings(
                image_size,
                scale=(args.min_crop_area, 1.0),
                num_operations=args.num_operations,
                magnitude=args.magnitude,
            ),
            augmentations=args.augmentations,
            synthetic_captions=args.synthetic_captions,
            captioner=captioner,
            samples_per_shard=args.samples_per_shard,
            seed=args.seed,
            dtype=args.dtype,
            batch_size=args.batch_size,
            num_workers=args.num_workers,
        )
        record.finish()


def _may_write(places: Places) -> bool:
    """Whether the stage may write its folder. A finished one is only read, and may be read-only."""
    try:
        record = read_record(places.reinforced)
    except ValueError:  # damaged: said where it is opened
        return True
    return record is None or not record["finished"] or places.overwrite


def _captioned_images(run: RunArguments, seed: int, shared: SharedData) -> tuple[KeyedRows, KeyedRows]:
    """The images to reinforce, the same for every arm and seed, without the test part: with keys of the images, and
    with keys of their rows.
    """
    key = json.dumps(
        ["reinforce", run.train_datasets, run.exclude_karpathy, run.test_fraction, run.on_bad_image, seed]
    )
    if key not in shared.sources:
        dataset = load_captioned(run.train_datasets, run.exclude_karpathy, 0 if run.test_fraction else seed, shared)
        images = without_test(read_keyed(dataset, run, "reinforce", shared), run, shared)
        shared.sources[key] = {"images": images, "rows": KeyedRows(images.rows, row_keys(*images))}
    return shared.sources[key]["images"], shared.sources[key]["rows"]


def train_dmclip(
    args: DMCLIPArguments,
    shards: str,
    tokenizer_path: str,
    places: Places,
    resolved_arguments: dict[str, Any],
    shared: SharedData,
) -> None:
    """Train a DM-CLIP on reinforced shards, and save it in the run's folder `dmclip`.

    Args:
        args ([`DMCLIPArguments`]): Architecture, losses, optimiser.
        shards (`str`): Folder, tar file or pattern.
        tokenizer_path (`str`): Folder or Hub id.
        places ([`Places`]): Of the run.
        resolved_arguments (`dict`): Saved beside the weights.
        shared ([`SharedData`]): Holds fingerprints of pretrained weights that an earlier run read.

    Raises:
        FileNotFoundError: If there are no shards.
        ValueError: If the shards or the pretrained parts do not fit, or the folder was made from other inputs.
    """
    check_shards(args, shards)
    check_starts(args)
    tokenizer = load_tokenizer(tokenizer_path)
    stated_length(tokenizer, tokenizer_path)
    keys = {"shards": _shards_key(shards), "tokenizer": _tokenizer_key(tokenizer), **_model_keys(args, shared)}
    record = places.record("dmclip", {"arguments": deciding_fields(args), **keys})
    if record.finished:
        return
    starts = [one for one in (args.model, args.vision_model, args.text_model) if one is not None]
    Learned([], [Path(shards).parent, *starts]).keep(record.folder)  # the stage reinforce keeps keys beside its shards
    set_seed(args.seed)
    model, processor = build_dmclip(args, tokenizer)
    batches = _open_batches(args, shards, processor)
    trainer = DMCLIPTrainer(model, args, batches, processor, resolved_arguments)
    train_or_resume(trainer, record.folder)
    if batches.num_skipped:
        logger.warning("dmclip: left out %d damaged samples or shards", batches.num_skipped)
    trainer.save_result(find_dtype(args))
    record.finish()


def find_dtype(args: DMCLIPArguments) -> str:
    """The type to save a DM-CLIP in: the one that is asked for, or that of the weights that it starts from.

    Args:
        args ([`DMCLIPArguments`]): The section.

    Returns:
        `str`: With `save_dtype: auto` that of `model`, or of `vision_model` and `text_model` if both have the same;
        float32 if a part is made from nothing.
    """
    if args.save_dtype != "auto":
        return args.save_dtype
    starts = [args.model] if args.model is not None else [args.vision_model, args.text_model]
    stored = {"float32" if start is None else stored_dtype(start) for start in starts}
    if len(stored) > 1 or stored == {"float32"}:  # new weights are float32
        return "float32"
    logger.info(
        "dmclip: trained in float32, and saved in %s, as %s is stored. dmclip.save_dtype float32 keeps what the "
        "shorter type rounds away.",
        *(min(stored), " and ".join(repr(start) for start in starts)),
    )
    return min(stored)


def check_shards(args: DMCLIPArguments, shards: str) -> None:
    """Check that shards hold what the recipe expects, as far as an index beside them says.

    Args:
        args ([`DMCLIPArguments`]): What the recipe expects of them.
        shards (`str`): Folder, tar file or pattern.

    Raises:
        FileNotFoundError: If there are none.
        ValueError: If the teachers' widths are not `args.teacher_widths`, or there are no synthetic captions where
            `args` asks for them.
    """
    index = find_shards(shards)[1]
    if index is None:
        return
    stored = [teacher["width"] for teacher in index["teachers"]]
    if args.teacher_widths and list(args.teacher_widths) != stored:
        raise ValueError(
            f"dmclip.teacher_widths: expected {stored}, as the index of '{shards}' says, got {args.teacher_widths}. "
            "Leave them out."
        )
    if args.synthetic_captions and not index["counts"]["synthetic_captions"]:
        raise ValueError(
            f"dmclip.synthetic_captions: expected synthetic captions in '{shards}', got none. Write the shards with "
            "reinforce.synthetic_captions or reinforce.captioner, or leave the field out."
        )


def _open_batches(args: DMCLIPArguments, shards: str, processor: DCLIPProcessor) -> ReinforcedBatches:
    view = SampleView(
        find_image_size(args),
        args.teacher_widths or None,
        processor.image_processor.image_mean,
        processor.image_processor.image_std,
        args.synthetic_captions,
        args.synthetic_keys,
    )
    return ReinforcedBatches(
        shards,
        processor.tokenizer,
        view,
        batch_size=args.per_device_train_batch_size,
        seed=args.seed,
        shuffle_buffer=args.shuffle_buffer,
        samples_per_epoch=args.samples_per_epoch,
        on_bad_sample=args.on_bad_sample,
    )


def _model_keys(args: DMCLIPArguments, shared: SharedData) -> dict[str, Any]:
    """Keys of the pretrained weights that the section names, and how images are normalised for them."""
    keys: dict[str, Any] = {}
    for name in ("model", "vision_model", "text_model"):
        if (path := getattr(args, name)) is not None:
            keys[name] = _model_key(path, shared.fingerprints)
    if args.model or args.vision_model:
        image_processor = find_image_processor(args)
        keys["normalisation"] = [list(image_processor.image_mean), list(image_processor.image_std)]
    return keys


def _model_key(path: str, known: dict[str, str]) -> str:
    """A key of the weights in a folder or under a Hub id.

    They are read once for all arms and seeds, and again if a file changes in between.
    """
    read = json.dumps(["weights", file_states(path)])
    if read not in known:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # an encoder without a head gets one here: always the same, so that the key recurs
            known[read] = fingerprint_model(AutoModel.from_pretrained(path, trust_remote_code=False))
    return known[read]


def _shards_key(shards: str) -> str:
    """A key of the shards: of their index if there is one, else of names and sizes, for shards may be terabytes."""
    paths, index = find_shards(shards)
    if index is not None:
        return combine_keys([json.dumps(index, sort_keys=True)])
    return combine_keys([f"{path.name}/{path.stat().st_size}" for path in paths])


def _tokenizer_key(tokenizer: PreTrainedTokenizerFast) -> str:
    return combine_keys([tokenizer.backend_tokenizer.to_str(), str(tokenizer.model_max_length)])
