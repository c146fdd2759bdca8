"""Compute a frozen teacher's targets once and store them with the data: one per caption, float16, L2-normalised.

The teacher is deterministic, so a stored target equals the one that each training step would compute. A teacher that
reads text gives each caption of an image its own target. The leak-free teacher (`cross_attention="regions"`) gives all
captions of an image the same target, and one target to an image without captions.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader, Subset
from torch.utils.data import Dataset as TorchDataset

from modeling_dclip.data.chunks import Chunk, compute_chunks, read_chunk
from modeling_dclip.data.collation import pass_batch, read_captions, tokenize_captions
from modeling_dclip.data.columns import (
    Ragged,
    check_finite,
    check_regions,
    column_lengths,
    put_columns,
    read_regions,
    with_flat_embeds,
    with_ragged_embeds,
)
from modeling_dclip.data.images import decode_image, undecoded_images
from modeling_dclip.data.rows import CAPTION_FEATURES, NEGATIVES
from modeling_dclip.encoders.families import READ_PADDING, shared_width
from modeling_dclip.encoders.fingerprints import (
    canonical_json,
    combine_keys,
    fingerprint_model,
    fingerprint_processor,
    hash_bytes,
)
from modeling_dclip.modeling_dclip_teacher import DCLIPTeacher
from modeling_dclip.processing_dclip import DCLIPTeacherProcessor, check_boxes, cut_long

# Arrays with several entries a row, and the array that counts them.
_LENGTHS = {
    "region_embeds": "regions_per_image",
    "region_boxes": "regions_per_image",
    "region_scores": "regions_per_image",
    "text_embeds": "captions_per_image",
    "token_embeds": "tokens_per_caption",
}


def _check_counts(chunk: Chunk, path: Path) -> Chunk:
    """Refuse a chunk whose arrays do not belong to the same rows."""
    required = ("image_embeds", "text_embeds", "captions_per_image")
    missing = [name for name in required if name not in chunk]
    missing += [lengths for name, lengths in _LENGTHS.items() if name in chunk and lengths not in chunk]
    odd = (
        []
        if missing
        else [name for name, n in _LENGTHS.items() if name in chunk and chunk[n].sum() != len(chunk[name])]
    )
    rows = {len(chunk[name]) for name in ("image_embeds", "captions_per_image", "regions_per_image") if name in chunk}
    if missing or odd or len(rows) > 1:
        problem = f"it lacks {missing[0]}" if missing else f"{(odd or ['image_embeds'])[0]} is of another length"
        raise ValueError(f"The cached chunk '{path}' is damaged ({problem}). Delete the file and run again.")
    return chunk


@dataclass
class TeacherFeatures:
    """The frozen CLIP's view of N images with C captions in all: all that the teacher's block reads.

    Args:
        image_embeds (`np.ndarray` of shape `(N, D)`): float16, L2-normalised.
        region_embeds ([`Ragged`]): float16 `(regions, D)` of N rows, L2-normalised.
        region_boxes ([`Ragged`]): float32 `(regions, 4)`, xyxy as fractions of the image.
        region_scores ([`Ragged`]): float32 `(regions,)` in [0, 1].
        text_embeds ([`Ragged`]): float16 `(C, D)` of N rows, L2-normalised.
        token_embeds ([`Ragged`] or None): float16 `(tokens, D)` of C rows, not normalised; None if the teacher reads
            no text.
    """

    image_embeds: np.ndarray
    region_embeds: Ragged
    region_boxes: Ragged
    region_scores: Ragged
    text_embeds: Ragged
    token_embeds: Ragged | None

    @classmethod
    def load(cls, paths: Sequence[Path]) -> "TeacherFeatures":
        """Join chunks.

        Raises:
            ValueError: If a chunk is damaged; its file is named.
        """
        chunks = [_check_counts(read_chunk(path), path) for path in paths]
        joined = {name: np.concatenate([chunk.pop(name) for chunk in chunks]) for name in list(chunks[0])}
        columns: dict[str, Any] = {
            name: Ragged.from_lengths(joined[name], joined[lengths])
            for name, lengths in _LENGTHS.items()
            if name in joined
        }
        return cls(image_embeds=joined["image_embeds"], **({"token_embeds": None} | columns))

    def batch(self, rows: np.ndarray, captions: np.ndarray | None) -> dict[str, torch.Tensor]:
        """Inputs of [`DCLIPTeacher`] for pairs of images and captions, padded and masked, on the CPU;
        None leaves the text out.
        """
        region_embeds, region_mask = self.region_embeds.pad(rows)
        arrays = {
            "image_embeds": self.image_embeds[rows],
            "region_embeds": region_embeds,
            "region_mask": region_mask,
            "region_boxes": self.region_boxes.pad(rows)[0],
            "region_scores": self.region_scores.pad(rows)[0],
        }
        if captions is not None:
            arrays["text_embeds"] = self.text_embeds.values[captions]
        if captions is not None and self.token_embeds is not None:
            arrays["token_embeds"], arrays["token_mask"] = self.token_embeds.pad(captions)
        # The block computes in float32; float16 is how features are kept.
        return {
            name: torch.from_numpy(array.astype(np.float32) if array.dtype == np.float16 else array)
            for name, array in arrays.items()
        }


class _RegionRows(TorchDataset):
    """Images with their crops, preprocessed in the data loader's workers."""

    def __init__(self, dataset: Dataset, processor: DCLIPTeacherProcessor, max_regions: int | None, regions: bool):
        self.images = undecoded_images(dataset)
        self.processor, self.max_regions, self.regions = processor, max_regions, regions
        self.boxes: Ragged | None = None
        self.scores: Ragged | None = None
        if "boxes" in dataset.column_names:
            self.boxes, self.scores = read_regions(dataset)
            if regions:
                check_regions(dataset.select_columns("image_id"), self.boxes, self.scores)

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, rows: list[int]) -> dict[str, torch.Tensor]:
        images = [decode_image(self.images, row) for row in rows]
        if not self.regions:
            images = [cut_long(image, self.processor.image_processor) for image in images]
            return {"pixel_values": self.processor.image_processor(images=images, return_tensors="pt")["pixel_values"]}
        regions = {}
        if self.boxes is not None and self.scores is not None:
            entries = [slice(self.boxes.offsets[row], self.boxes.offsets[row + 1]) for row in rows]
            regions["boxes"] = [self.boxes.values[entry] for entry in entries]
            regions["box_scores"] = [self.scores.values[entry] for entry in entries]
            for row, image, boxes, scores in zip(rows, images, *regions.values(), strict=True):
                # The processor would name the place in the batch.
                check_boxes(boxes, scores, image.size, f"{self.images[row]['image_id']!r} (row {row})")
        return dict(self.processor(images=images, max_regions=self.max_regions, **regions))


def _half(tensors: list[torch.Tensor]) -> np.ndarray:
    return torch.cat(tensors).cpu().to(torch.float16).numpy()


@dataclass(frozen=True)
class FeatureOptions:
    """How to run a teacher's CLIP over a dataset, and where to keep its features.

    Of these, only `max_regions` changes a feature.

    Args:
        cache_dir (`Path`): Folder of the chunks; may be shared by all datasets and teachers.
        max_regions (`int`, *optional*): Regions per image, those with the highest scores. By default all.
        batch_size (`int`, *optional*, defaults to 16): Images in one forward pass, each with all its regions.
        text_batch_size (`int`, *optional*, defaults to 256): Captions in one forward pass.
        chunk_rows (`int`, *optional*, defaults to 512): Images per file.
        num_workers (`int`, *optional*, defaults to 0): Processes that decode and crop.
    """

    cache_dir: Path
    max_regions: int | None = None
    batch_size: int = 16
    text_batch_size: int = 256
    chunk_rows: int = 512
    num_workers: int = 0


def _encode_images(rows: range, images: _RegionRows, teacher: DCLIPTeacher, options: FeatureOptions) -> Chunk:
    batches = DataLoader(
        Subset(images, rows), options.batch_size, num_workers=options.num_workers, collate_fn=pass_batch
    )
    device = teacher.device
    chunk: dict[str, list] = {name: [] for name in ("image_embeds", "region_embeds")}
    arrays: dict[str, list] = {name: [] for name in ("region_boxes", "region_scores", "regions_per_image")}
    for batch in batches:
        chunk["image_embeds"].append(teacher.encode_images(batch["pixel_values"].to(device)))
        if images.regions:
            mask = batch["region_mask"]
            embeds = teacher.encode_regions(batch["region_pixel_values"].to(device), mask.to(device))
            chunk["region_embeds"].append(embeds.cpu()[mask])
            for name in ("region_boxes", "region_scores"):
                arrays[name].append(batch[name][mask].numpy())
            arrays["regions_per_image"].append(mask.sum(dim=1).numpy())
    encoded = {name: _half(tensors) for name, tensors in chunk.items() if tensors}
    return encoded | {name: np.concatenate(parts) for name, parts in arrays.items() if parts}


def _encode_captions(
    captions: Iterable[str], processor: DCLIPTeacherProcessor, teacher: DCLIPTeacher, batch_size: int, reads_text: bool
) -> Chunk:
    tokens = tokenize_captions(processor.tokenizer, captions)
    clip_config: Any = teacher.config.clip_config
    least = processor.tokenizer.model_max_length if clip_config.model_type in READ_PADDING else 1
    by_length = np.argsort(-tokens.lengths, kind="stable")  # captions of one length in a batch need little padding
    count = len(tokens.lengths)
    text_embeds, token_embeds = ([torch.empty(0)] * count for _ in range(2))
    for start in range(0, count, batch_size):
        rows = by_length[start : start + batch_size]
        input_ids, mask = tokens.pad(rows, processor.tokenizer.pad_token_id, least)
        texts, token_states, token_mask = teacher.encode_text(
            torch.from_numpy(input_ids).long().to(teacher.device), torch.from_numpy(mask).long().to(teacher.device)
        )
        for index, row in enumerate(rows):
            text_embeds[row] = texts[index : index + 1]
            if reads_text:
                token_embeds[row] = token_states[index][token_mask[index]]
    chunk = {"text_embeds": _half(text_embeds)}
    if reads_text:
        chunk["token_embeds"] = _half(token_embeds)
        chunk["tokens_per_caption"] = np.array([len(states) for states in token_embeds])
    return chunk


def _require_finite(dataset: Dataset, rows: range, name: str, values: np.ndarray, lengths: np.ndarray) -> None:
    """Refuse NaN and infinity before a chunk is kept: embeddings `(entries, D)` of rows with so many entries each."""
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(bad):
        row = rows.start + int(np.searchsorted(np.cumsum(lengths), bad[0], side="right"))
        raise ValueError(
            f"Column {name!r}, row {row} (image {dataset['image_id'][row]!r}): expected finite numbers of the model, "
            f"got NaN or infinity ({len(bad)} such entries among {len(rows)} rows). Check the model's weights and the "
            "image."
        )


def _no_captions(dataset: Dataset, teacher: DCLIPTeacher, reads_text: bool) -> Ragged:
    if reads_text:
        raise ValueError(
            f"Expected a teacher that reads no caption (cross_attention='regions') for images without captions, got "
            f"{teacher.config.cross_attention!r}. Train such a teacher, or give the images captions."
        )
    lengths = column_lengths(dataset, "captions")
    if lengths.any():
        row = int(np.flatnonzero(lengths)[0])
        raise ValueError(
            f"Image {dataset['image_id'][row]!r} (row {row}): expected no caption, got {lengths[row]}. Drop the "
            "captions first."
        )
    return Ragged.from_lengths(np.array([], dtype=object), lengths)


def compute_features(
    dataset: Dataset,
    teacher: DCLIPTeacher,
    processor: DCLIPTeacherProcessor,
    options: FeatureOptions,
    *,
    keys: Sequence[str],
    regions: bool = True,
    alone: bool = False,
    captioned: bool = True,
) -> list[Path]:
    """Encode images, regions, captions and, where the teacher reads text, tokens with the CLIP inside a teacher.

    Args:
        dataset (`datasets.Dataset`): With `image_id`, `image`, `captions`, and maybe `boxes` and `box_scores`.
        teacher ([`DCLIPTeacher`]): On the device to use. Only its frozen CLIP is used.
        processor ([`DCLIPTeacherProcessor`]): The teacher's.
        options ([`FeatureOptions`]): Batch sizes, and where chunks are kept.
        keys (`Sequence[str]`): [`row_keys`] of the dataset.
        regions (`bool`, *optional*, defaults to `True`): Whether to encode regions.
        alone (`bool`, *optional*, defaults to `False`): Whether only one of the run's processes calls this.
        captioned (`bool`, *optional*, defaults to `True`): `False` if no row has a caption; the teacher must then read
            none.

    Returns:
        `list[Path]`: Files for [`TeacherFeatures.load`], in the order of the rows.

    Raises:
        ValueError: If an image cannot be read, a caption is blank, or a box is wrong; with `captioned=False`, if a row
            has a caption or the teacher reads captions.
    """
    reads_text = regions and teacher.config.cross_attention != "regions"
    captions = read_captions(dataset) if captioned else _no_captions(dataset, teacher, reads_text)
    images = _RegionRows(dataset, processor, options.max_regions, regions)

    def compute(rows: range) -> Chunk:
        texts = captions.values[captions.offsets[rows.start] : captions.offsets[rows.stop]]
        chunk = _encode_images(rows, images, teacher, options)
        if captioned:
            chunk |= _encode_captions(texts, processor, teacher, options.text_batch_size, reads_text)
        else:
            chunk["text_embeds"] = np.zeros((0, chunk["image_embeds"].shape[1]), np.float16)
        chunk |= {"captions_per_image": captions.lengths[rows.start : rows.stop]}
        ones = np.ones(len(rows), np.int64)
        for name in ("image_embeds", "region_embeds", "text_embeds"):
            if name in chunk:
                _require_finite(dataset, rows, name, chunk[name], chunk.get(_LENGTHS.get(name, ""), ones))
        return chunk

    settings = {"regions": regions, "max_regions": options.max_regions, "reads_text": reads_text}
    made_by = combine_keys(
        [fingerprint_model(teacher.clip), fingerprint_processor(processor), canonical_json(settings)]
    )
    return compute_chunks(
        keys,
        compute,
        made_by=made_by,
        cache_dir=options.cache_dir,
        chunk_rows=options.chunk_rows,
        desc="Encoding regions and captions",
        alone=alone,
    )


PAIRS_PER_PASS = 512  # the teacher's block is small


@torch.no_grad()
def embed_pairs(
    teacher: DCLIPTeacher, features: TeacherFeatures, rows: np.ndarray, captions: np.ndarray | None
) -> torch.Tensor:
    """Embed pairs of an image and a caption with a teacher, whether or not the two belong together.

    Args:
        teacher ([`DCLIPTeacher`]): In eval mode, on the device to use.
        features ([`TeacherFeatures`]): N images, C captions.
        rows (`np.ndarray` of shape `(P,)`): The image of each pair, below N.
        captions (`np.ndarray` of shape `(P,)` or None): The caption of each pair, below C; None if the teacher reads
            no text.

    Returns:
        `torch.Tensor` of shape `(P, D)`: float32, L2-normalised, on the CPU.
    """
    embeds = []
    for start in range(0, len(rows), PAIRS_PER_PASS):
        pairs = slice(start, start + PAIRS_PER_PASS)
        batch = features.batch(rows[pairs], None if captions is None else captions[pairs])
        batch = {name: tensor.to(teacher.device) for name, tensor in batch.items()}
        embeds.append(teacher(**batch, return_loss=False).teacher_embeds.float().cpu())
    return torch.cat(embeds)


def teach(teacher: DCLIPTeacher, features: TeacherFeatures) -> np.ndarray:
    """Compute a frozen teacher's targets: one per caption, and one per image without captions.

    Args:
        teacher ([`DCLIPTeacher`]): In eval mode, on the device to use.
        features ([`TeacherFeatures`]): N images, C captions.

    Returns:
        `np.ndarray` of shape `(C + images without captions, D)`: float16, L2-normalised.
    """
    captions_per_image = features.text_embeds.lengths
    rows = np.arange(len(captions_per_image))
    if teacher.config.cross_attention == "regions":  # computed once per image
        values = embed_pairs(teacher, features, rows, None).to(torch.float16).numpy()
        return np.repeat(values, np.maximum(captions_per_image, 1), axis=0)
    rows = np.repeat(rows, captions_per_image)
    return embed_pairs(teacher, features, rows, np.arange(len(rows))).to(torch.float16).numpy()


def _read(paths: Sequence[Path], name: str) -> np.ndarray:
    found = []
    for path in paths:
        if name not in (chunk := read_chunk(path)):
            raise ValueError(f"The cached chunk '{path}' is damaged (it lacks {name}). Delete the file and run again.")
        found.append(chunk[name])
    if odd := [path for path, array in zip(paths, found, strict=True) if array.shape[1:] != found[0].shape[1:]]:
        raise ValueError(
            f"The cached chunk '{odd[0]}' is damaged ({name} is of another width). Delete it and run again."
        )
    return np.concatenate(found)


def add_teacher_targets(
    dataset: Dataset,
    teacher: DCLIPTeacher,
    processor: DCLIPTeacherProcessor,
    options: FeatureOptions,
    *,
    keys: Sequence[str],
    with_teacher: bool = True,
    captioned: bool = True,
) -> Dataset:
    """Compute the columns that a student learns from.

    Chunks of rows are written atomically under keys of their content (pixels, captions, boxes), the teacher's weights
    and the settings. A run that was killed goes on at the next chunk. A changed row or teacher is computed again.

    Args:
        dataset (`datasets.Dataset`): With `image_id`, `image`, `captions`, and maybe `boxes` and `box_scores`.
        teacher ([`DCLIPTeacher`]): Trained; on the device to use.
        processor ([`DCLIPTeacherProcessor`]): The teacher's.
        options ([`FeatureOptions`]): Batch sizes, and where chunks are kept.
        keys (`Sequence[str]`): [`row_keys`] of the dataset.
        with_teacher (`bool`, *optional*, defaults to `True`): Whether to compute `teacher_embeds`. Without, only the
            frozen CLIP is used.
        captioned (`bool`, *optional*, defaults to `True`): As in [`compute_features`].

    Returns:
        `datasets.Dataset`: The rows with `teacher_embeds` float16 (captions, D), `text_embeds` float16 (captions, D),
            `anchor_embeds` float16 (D,), all L2-normalised, replacing older ones. A row without captions
            (`captioned=False`) has one entry in `teacher_embeds` and none in `text_embeds`.

    Raises:
        ValueError: If an image cannot be read, a caption is blank, a box is wrong, or a target is not finite; the
            message names the row.
    """
    teacher.eval()
    paths = compute_features(
        dataset, teacher, processor, options, keys=keys, regions=with_teacher, captioned=captioned
    )
    text_embeds = Ragged.from_lengths(_read(paths, "text_embeds"), _read(paths, "captions_per_image"))
    columns = {"text_embeds": text_embeds}
    if with_teacher:
        chunk_rows, entries = options.chunk_rows, np.maximum(text_embeds.lengths, 1)

        def compute(rows: range) -> Chunk:
            values = teach(teacher, TeacherFeatures.load([paths[rows.start // chunk_rows]]))
            _require_finite(dataset, rows, "teacher_embeds", values, entries[rows.start : rows.stop])
            return {"teacher_embeds": values}

        targets = compute_chunks(
            [paths[row // chunk_rows].stem for row in range(len(dataset))],
            compute,
            made_by=fingerprint_model(teacher),
            cache_dir=options.cache_dir,
            chunk_rows=chunk_rows,
            desc="Writing teacher targets",
        )
        columns["teacher_embeds"] = Ragged.from_lengths(_read(targets, "teacher_embeds"), entries)
    for name, embeds in columns.items():
        check_finite(dataset, name, embeds)
        dataset = with_ragged_embeds(dataset, name, embeds)
    anchor_embeds = _read(paths, "image_embeds")
    check_finite(dataset, "anchor_embeds", Ragged(anchor_embeds, np.arange(len(anchor_embeds) + 1)))
    return with_flat_embeds(dataset, "anchor_embeds", anchor_embeds)


def embed_negatives(
    negatives: Ragged, teacher: DCLIPTeacher, processor: DCLIPTeacherProcessor, options: FeatureOptions
) -> Ragged:
    """Embed the false captions of images with the frozen text tower, in chunks that a killed run need not do again.

    Args:
        negatives ([`Ragged`]): Texts of N rows.
        teacher ([`DCLIPTeacher`]): On the device to use. Only its frozen CLIP is used.
        processor ([`DCLIPTeacherProcessor`]): The teacher's.
        options ([`FeatureOptions`]): Batch sizes, and where chunks are kept.

    Returns:
        [`Ragged`]: float16 `(false captions, D)` of N rows, L2-normalised.
    """
    bounds, clip_config = negatives.offsets, teacher.config.clip_config
    width, pairs = shared_width(clip_config), zip(bounds[:-1], bounds[1:], strict=True)
    keys = [hash_bytes(canonical_json(negatives.values[start:stop].tolist())) for start, stop in pairs]

    def compute(rows: range) -> Chunk:
        texts = negatives.values[bounds[rows.start] : bounds[rows.stop]]
        if not len(texts):
            return {"text_embeds": np.zeros((0, width), np.float16)}
        return _encode_captions(texts, processor, teacher, options.text_batch_size, reads_text=False)

    paths = compute_chunks(
        keys,
        compute,
        made_by=combine_keys([fingerprint_model(teacher.clip), fingerprint_processor(processor), "negatives"]),
        cache_dir=options.cache_dir,
        chunk_rows=options.chunk_rows,
        desc="Encoding false captions",
    )
    return Ragged.from_lengths(_read(paths, "text_embeds"), negatives.lengths)


def with_negatives(dataset: Dataset, negatives: Ragged, embeds: Ragged) -> Dataset:
    """Add the columns `negatives`, false captions, and `negative_embeds`, replacing older ones.

    Args:
        dataset (`datasets.Dataset`): N rows.
        negatives ([`Ragged`]): Texts of N rows.
        embeds ([`Ragged`]): From [`embed_negatives`].

    Raises:
        ValueError: If an embedding is not finite; the message names the row.
    """
    check_finite(dataset, "negative_embeds", embeds)
    bounds = negatives.offsets
    texts = [negatives.values[start:stop].tolist() for start, stop in zip(bounds[:-1], bounds[1:], strict=True)]
    dataset = put_columns(dataset, {NEGATIVES: (texts, CAPTION_FEATURES["captions"])})
    return with_ragged_embeds(dataset, "negative_embeds", embeds)
