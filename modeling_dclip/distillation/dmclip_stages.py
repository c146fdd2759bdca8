"""The stages of reinforced training: reinforce writes shards, dmclip trains a DM-CLIP on them."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import AutoModel, AutoTokenizer, set_seed

from modeling_dclip.configuration_dclip import PRESETS
from modeling_dclip.data.captions import load_mix
from modeling_dclip.data.captions.files import karpathy_test_ids
from modeling_dclip.data.columns import row_keys
from modeling_dclip.data.files import list_folder
from modeling_dclip.data.reinforced import ReinforcedBatches, SampleView
from modeling_dclip.data.reinforced.augmentations import AugmentationSettings
from modeling_dclip.data.reinforced.shards import INDEX_NAME, find_shards
from modeling_dclip.data.reinforced.teachers import TransformersCaptioner, build_teacher
from modeling_dclip.data.reinforced.writer import write_reinforced
from modeling_dclip.distillation.arguments import DMCLIPArguments, deciding_fields
from modeling_dclip.distillation.dmclip import build_dmclip, check_starts, find_image_processor, find_image_size
from modeling_dclip.distillation.run import Run
from modeling_dclip.distillation.trainer import DMCLIPTrainer, train_or_resume
from modeling_dclip.encoders.fingerprints import combine_keys, fingerprint_model

logger = logging.getLogger(__name__)

SHARDS_NAME = "shards"  # inside the stage's folder, whose record must not lie among them


def reinforce(run: Run) -> None:
    """Let the teachers speak once about augmented images and captions, and write it down beside them."""
    recipe, args = run.recipe, run.recipe.reinforce
    check_starts(recipe.dmclip)  # whose size it may take
    names = args.teachers or [run.clip_path]
    device = PartialState().device
    specs = [PRESETS.get(name, name) for name in names]
    loaded = {
        spec: build_teacher(spec, device) for spec in dict.fromkeys(specs) if spec not in run.shared.fingerprints
    }
    run.shared.fingerprints |= {spec: teacher.fingerprint for spec, teacher in loaded.items()}
    dataset, keys = _captioned_images(run)
    size = args.image_size or find_image_size(recipe.dmclip)
    inputs = {"arguments": deciding_fields(args), "image_size": size, "dataset": combine_keys(keys)}
    inputs["teachers"] = [run.shared.fingerprints[spec] for spec in specs]
    record = run.record("reinforce", inputs, run.reinforce_folder)
    if record.finished:
        return
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
            size, scale=(args.min_crop_area, 1.0), num_operations=args.num_operations, magnitude=args.magnitude
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


def _captioned_images(run: Run) -> tuple[Dataset, list[str]]:
    """What is reinforced, the same for every arm and seed, with keys of its rows."""
    recipe = run.recipe.run
    selection = [recipe.train_datasets, recipe.exclude_karpathy, run.recipe.reinforce.seed]
    key = json.dumps(["reinforce", *selection])
    if key not in run.shared.sources:
        if not recipe.train_datasets:
            raise ValueError("train_datasets: expected one or more specs of captioned images, got none.")
        excluded = set().union(*(karpathy_test_ids(path) for path in recipe.exclude_karpathy))
        dataset = load_mix(recipe.train_datasets, seed=run.recipe.reinforce.seed, exclude_ids=excluded)
        run.shared.sources[key] = {"train": (dataset, row_keys(dataset))}
    return run.shared.sources[key]["train"]


def train_dmclip(run: Run) -> None:
    """Train a DM-CLIP on reinforced shards."""
    recipe, args = run.recipe, run.recipe.dmclip
    shards = args.train_shards or str(run.reinforce_folder / SHARDS_NAME)
    if args.train_shards is None and not (Path(shards) / INDEX_NAME).exists():
        raise FileNotFoundError(
            f"No {INDEX_NAME} in '{shards}': run the stage 'reinforce' first, or name dmclip.train_shards."
        )
    check_shards(args, shards)
    check_starts(args)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or args.model or run.clip_path)
    keys = {"shards": _shards_key(shards), "tokenizer": _tokenizer_key(tokenizer), **_model_keys(run)}
    record = run.record("dmclip", {"arguments": deciding_fields(args), **keys})
    if record.finished:
        return
    set_seed(args.seed)
    model, processor = build_dmclip(args, tokenizer)
    batches = _open_batches(args, shards, processor)
    trainer = DMCLIPTrainer(model, args, batches, processor, recipe.resolved("reinforce", "dmclip"))
    train_or_resume(trainer, record.folder)
    if batches.skipped:
        logger.warning("dmclip: left out %d damaged samples or shards", sum(batches.skipped.values()))
    trainer.save_model()
    record.finish()


def check_shards(args: DMCLIPArguments, shards: str) -> None:
    """See whether shards can be what a recipe takes them for, as far as an index beside them tells.

    Args:
        args ([`DMCLIPArguments`]): What is asked of them.
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


def _open_batches(args: DMCLIPArguments, shards: str, processor: Any) -> ReinforcedBatches:
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


def _model_keys(run: Run) -> dict[str, Any]:
    """Keys of the pretrained weights that are named, and how images are normalised for them."""
    args, keys = run.recipe.dmclip, {}
    for name in ("model", "vision_model", "text_model"):
        if (path := getattr(args, name)) is not None:
            keys[name] = _model_key(path, run.shared.fingerprints)
    if args.model or args.vision_model:
        image_processor = find_image_processor(args)
        keys["normalisation"] = [list(image_processor.image_mean), list(image_processor.image_std)]
    return keys


def _model_key(path: str, known: dict[str, str]) -> str:
    """A key of a folder's or a Hub id's weights, which are read once for all arms and seeds,
    and again if a file changes between them.
    """
    files = [file for file in list_folder(path) if file.is_file()]
    states = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    read = json.dumps(["weights", path, states])
    if read not in known:
        with torch.random.fork_rng(
            devices=[]
        ):  # an encoder without a head gets one here: the same one, or the key would never recur
            torch.manual_seed(0)
            known[read] = fingerprint_model(AutoModel.from_pretrained(path))
    return known[read]


def _shards_key(shards: str) -> str:
    """A key of what will be read: the index where there is one, else names and sizes (shards may be terabytes)."""
    paths, index = find_shards(shards)
    if index is not None:
        return combine_keys([json.dumps(index, sort_keys=True)])
    return combine_keys([f"{path.name}/{path.stat().st_size}" for path in paths])


def _tokenizer_key(tokenizer: Any) -> str:
    return combine_keys([tokenizer.backend_tokenizer.to_str(), str(tokenizer.model_max_length)])
