"""The stages of reinforced training: `reinforce` writes shards, `dmclip` trains a DM-CLIP on them."""

import json
import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoModel, PreTrainedTokenizerFast, set_seed

from modeling_dclip.configuration_dclip import PRESETS
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
from modeling_dclip.distillation.dmclip import build_dmclip, check_starts, find_image_processor, find_image_size
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
from modeling_dclip.encoders.loading import load_tokenizer, stored_dtype
from modeling_dclip.processing_dclip import DCLIPProcessor

logger = logging.getLogger(__name__)

SHARDS_NAME = "shards"  # in the stage's folder, so that its record is not among them


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
