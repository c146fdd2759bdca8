"""The stage anchor from two pretrained towers: a dual encoder whose projections, and whatever is not frozen, train.

What a frozen tower gives for the training data is computed once and stored; an epoch then takes seconds.

Source: "LiT: Zero-Shot Transfer with Locked-image text Tuning", arXiv 2111.07991; docs/papers.md.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import VisionTextDualEncoderModel, VisionTextDualEncoderProcessor, set_seed

from modeling_dclip.data.chunks import Chunk, compute_chunks, read_chunk
from modeling_dclip.data.collation import Batches, read_captions, tokenize_captions
from modeling_dclip.data.columns import row_keys
from modeling_dclip.data.images import PixelReader
from modeling_dclip.distillation.arguments import AnchorArguments, deciding_fields
from modeling_dclip.distillation.run import KeyedRows, Learned, Places
from modeling_dclip.distillation.trainer import AnchorTrainer, train_or_resume
from modeling_dclip.encoders.families import longest_text
from modeling_dclip.encoders.fingerprints import combine_keys, fingerprint_model, fingerprint_processor
from modeling_dclip.encoders.loading import load_checked
from modeling_dclip.encoders.towers import JoinedTowers, load_towers
from modeling_dclip.progress import count_of

logger = logging.getLogger(__name__)

_ROWS_PER_CHUNK = 512  # a killed run loses no more
_IMAGES_PER_PASS, _TEXTS_PER_PASS = 32, 256


class TowerBatches(Batches):
    """Images and captions as two towers read them, or as frozen towers have read them already.

    Args:
        dataset (`datasets.Dataset`): With `image_id`, `image`, `captions`: N rows with C captions in all.
        processor (`VisionTextDualEncoderProcessor`): The model's.
        image_features (`np.ndarray` of shape `(N, width)`, *optional*): What a frozen image tower gives.
        text_features (`np.ndarray` of shape `(C, width)`, *optional*): What a frozen text tower gives.
        seed (`int`, *optional*, defaults to 0): Of the draw of captions.
        cache_mib (`int`, *optional*, defaults to 2048): Bound of [`~modeling_dclip.data.images.PixelReader`].
        max_length (`int`, *optional*): Longest text in tokens.

    Raises:
        ValueError: If a row has no caption.
    """

    def __init__(
        self,
        dataset: Dataset,
        processor: VisionTextDualEncoderProcessor,
        *,
        image_features: np.ndarray | None = None,
        text_features: np.ndarray | None = None,
        seed: int = 0,
        cache_mib: int = 2048,
        max_length: int | None = None,
    ):
        captions = read_captions(dataset)
        super().__init__(captions.lengths, seed, dataset)
        self.image_features, self.text_features = image_features, text_features
        self.pad_token_id = processor.tokenizer.pad_token_id
        if image_features is None:
            self.pixels = PixelReader(dataset, processor.image_processor, cache_mib)
        if text_features is None:
            self.tokens = tokenize_captions(processor.tokenizer, captions.values, max_length)

    def collate(self, rows: np.ndarray, captions: np.ndarray) -> dict[str, torch.Tensor]:
        """Inputs of [`~modeling_dclip.encoders.towers.JoinedTowers`], and `image_ids (B,)`."""
        batch = {"image_ids": torch.from_numpy(rows)}
        if self.image_features is None:
            batch["pixel_values"] = self.pixels.read(rows)
        else:
            batch["image_features"] = torch.from_numpy(self.image_features[rows]).float()
        if self.text_features is None:
            input_ids, mask = self.tokens.pad(captions, self.pad_token_id)
            batch |= {"input_ids": torch.from_numpy(input_ids).long(), "attention_mask": torch.from_numpy(mask).long()}
        else:
            batch["text_features"] = torch.from_numpy(self.text_features[captions]).float()
        return batch


class JoinedTowersTrainer(AnchorTrainer):
    """Trains a dual encoder of two towers; checkpoints hold the dual encoder."""

    def model_to_save(self) -> VisionTextDualEncoderModel:
        """The dual encoder, in its own format."""
        return super().model_to_save().dual  # type: ignore[return-value]

    def _read_weights(self, folder: Path) -> dict[str, torch.Tensor]:
        """As the base class; in the files of some towers weights have other names."""
        return load_checked(VisionTextDualEncoderModel, folder).state_dict()


def join_towers(args: AnchorArguments, images: KeyedRows, places: Places, resolved_arguments: dict[str, Any]) -> None:
    """Make a dual encoder of two pretrained towers, train it on captioned images, save it in the folder `anchor`.

    Args:
        args ([`AnchorArguments`]): With `vision_model` and `text_model`; which of them is frozen; optimiser.
        images ([`KeyedRows`]): With `image_id`, `image`, `captions`, and keys of the images.
        places ([`Places`]): Of the run.
        resolved_arguments (`dict`): Saved beside the weights.

    Raises:
        OSError: If a tower is missing.
        ValueError: If there are too few images, a tower cannot be joined, or the folder was made from other inputs.
    """
    dataset, keys = images
    set_seed(args.seed)
    dual, processor = load_towers(str(args.vision_model), str(args.text_model), args.projection_dim)
    towers = {"vision_model": fingerprint_model(dual.vision_model), "text_model": fingerprint_model(dual.text_model)}
    towers["processor"] = fingerprint_processor(processor)
    rows = row_keys(dataset, keys)
    inputs = {"arguments": deciding_fields(args), "dataset": combine_keys(rows), "towers": towers}
    record = places.record("anchor", inputs)
    if record.finished:
        return
    Learned(keys).keep(record.folder)
    features = FrozenFeatures(dual, processor, dataset, rows, places.cache_dir / "features")
    batches = TowerBatches(
        dataset,
        processor,
        image_features=features.of_images(towers) if args.freeze_vision else None,
        text_features=features.of_captions(towers) if args.freeze_text else None,
        seed=args.seed,
        cache_mib=args.image_cache_mib,
        max_length=longest_text(dual, processor.tokenizer),
    )
    joined = JoinedTowers(dual, freeze_vision=args.freeze_vision, freeze_text=args.freeze_text)
    trained = sum(parameter.numel() for parameter in joined.parameters() if parameter.requires_grad)
    logger.info(
        "anchor: joins %s and %s, and trains %s of them",
        *(args.vision_model, args.text_model, count_of(trained, "weight")),
    )
    trainer = JoinedTowersTrainer(joined, args, batches, processor, resolved_arguments)
    train_or_resume(trainer, record.folder)
    trainer.save_result(args.save_dtype)
    record.finish()


class FrozenFeatures:
    """What frozen towers give for a dataset, `pooler_output` in float16, computed once and kept in chunks.

    Args:
        dual (`VisionTextDualEncoderModel`): Its towers.
        processor (`VisionTextDualEncoderProcessor`): Its processor.
        dataset (`datasets.Dataset`): With `image_id`, `image`, `captions`.
        keys (`Sequence[str]`): [`~modeling_dclip.data.columns.row_keys`] of the dataset.
        cache_dir (`Path`): Folder of the chunks.
    """

    def __init__(
        self,
        dual: VisionTextDualEncoderModel,
        processor: VisionTextDualEncoderProcessor,
        dataset: Dataset,
        keys: Sequence[str],
        cache_dir: Path,
    ):
        self.dual, self.processor, self.dataset, self.keys = dual, processor, dataset, keys
        self.cache_dir = cache_dir
        self.device = PartialState().device

    @torch.no_grad()
    def of_images(self, towers: dict[str, str]) -> np.ndarray:
        """Of all N images, `(N, width)`; `towers` are keys of the towers and the processor."""
        tower = self.dual.vision_model.to(self.device)
        reader = PixelReader(self.dataset, self.processor.image_processor, cache_mib=0)

        def compute(rows: range) -> Chunk:
            passes = (range(start, min(start + _IMAGES_PER_PASS, rows.stop)) for start in rows[::_IMAGES_PER_PASS])
            return _pooled(tower(pixel_values=reader.read(np.array(part)).to(self.device)) for part in passes)

        return self._all(compute, towers["vision_model"] + towers["processor"], "Encoding images")

    @torch.no_grad()
    def of_captions(self, towers: dict[str, str]) -> np.ndarray:
        """Of all C captions, `(C, width)`; `towers` as above."""
        tower, captions = self.dual.text_model.to(self.device), read_captions(self.dataset)
        tokenizer = self.processor.tokenizer
        tokens = tokenize_captions(tokenizer, captions.values, longest_text(self.dual, tokenizer))

        def compute(rows: range) -> Chunk:
            ours = np.arange(captions.offsets[rows.start], captions.offsets[rows.stop])
            by_length = ours[np.argsort(tokens.lengths[ours], kind="stable")]  # little padding in a pass
            outputs = []
            for start in range(0, len(by_length), _TEXTS_PER_PASS):
                ids, mask = tokens.pad(by_length[start : start + _TEXTS_PER_PASS], tokenizer.pad_token_id)
                given = {"input_ids": torch.from_numpy(ids).long(), "attention_mask": torch.from_numpy(mask).long()}
                outputs.append(tower(**{name: tensor.to(self.device) for name, tensor in given.items()}))
            chunk = _pooled(outputs)
            return {"features": chunk["features"][np.argsort(by_length, kind="stable")]}

        return self._all(compute, towers["text_model"] + towers["processor"], "Encoding captions")

    def _all(self, compute: Callable[[range], Chunk], made_by: str, title: str) -> np.ndarray:
        paths = compute_chunks(
            self.keys,
            compute,
            made_by=combine_keys([title, made_by]),
            cache_dir=self.cache_dir,
            chunk_rows=_ROWS_PER_CHUNK,
            desc=title,
        )
        return np.concatenate([read_chunk(path)["features"] for path in paths])


def _pooled(outputs: Any) -> Chunk:
    return {"features": torch.cat([output.pooler_output.cpu() for output in outputs]).to(torch.float16).numpy()}
