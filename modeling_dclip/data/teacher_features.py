"""What the frozen CLIP inside a teacher sees, computed once: the teacher's block then trains on columns alone.

A region is encoded once an image and a sentence once a caption, kept in chunks keyed by the rows' content, the CLIP's
weights and the settings.
"""

import hashlib
import json
from collections.abc import Sequence
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
from modeling_dclip.data.columns import Ragged, column_lengths, combine_keys, ragged_column
from modeling_dclip.data.pixels import decode_image

# Fields of a config that say where a model comes from, not what it computes.
_PROVENANCE = {
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "transformers_version",
    "model_type",
    "processor_class",
}


def _computed(config: Any) -> Any:
    if not isinstance(config, dict):
        return config
    return {name: _computed(value) for name, value in config.items() if name not in _PROVENANCE}


@torch.no_grad()
def fingerprint_model(model: Any) -> str:
    """A key of what a model computes: its config, and its weights' names, types and values. Hexadecimal SHA-256."""
    key = hashlib.sha256(json.dumps(_computed(model.config.to_dict()), sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        key.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        key.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return key.hexdigest()


def fingerprint_processor(processor: Any) -> str:
    """A key of what a processor computes: image settings, vocabulary and merges, longest text."""
    image_settings = _computed(processor.image_processor.to_dict())
    tokenizer = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    tokenizer = {name: value for name, value in tokenizer.items() if name not in ("truncation", "padding")}  # a call's
    parts = [image_settings, tokenizer, processor.tokenizer.model_max_length]
    return combine_keys([json.dumps(part, sort_keys=True, default=str) for part in parts])


@dataclass
class TeacherFeatures:
    """The frozen CLIP's view of N images with C captions in all: all that the teacher's block reads.

    Args:
        image_embeds (`np.ndarray` of shape `(N, D)`): float16, L2-normalised.
        region_embeds ([`Ragged`]): float16 `(regions, D)` of N rows, L2-normalised.
        region_boxes ([`Ragged`]): float32 `(regions, 4)`, xyxy as fractions of the image.
        region_scores ([`Ragged`]): float32 `(regions,)` in [0, 1].
        text_embeds ([`Ragged`]): float16 `(C, D)` of N rows, L2-normalised.
        token_embeds ([`Ragged`] or None): float16 `(tokens, D)` of C rows, not normalised; None if the teacher reads no text.
    """

    image_embeds: np.ndarray
    region_embeds: Ragged
    region_boxes: Ragged
    region_scores: Ragged
    text_embeds: Ragged
    token_embeds: Ragged | None

    @classmethod
    def load(cls, paths: Sequence[Path]) -> "TeacherFeatures":
        """Join chunks."""
        chunks = [read_chunk(path) for path in paths]
        joined = {name: np.concatenate([chunk.pop(name) for chunk in chunks]) for name in list(chunks[0])}
        columns = {
            name: Ragged.from_lengths(joined[name], joined[lengths])
            for name, lengths in (
                ("region_embeds", "regions_per_image"),
                ("region_boxes", "regions_per_image"),
                ("region_scores", "regions_per_image"),
                ("text_embeds", "captions_per_image"),
                ("token_embeds", "tokens_per_caption"),
            )
            if name in joined
        }
        columns.setdefault("token_embeds", None)
        return cls(image_embeds=joined["image_embeds"], **columns)

    def batch(self, rows: np.ndarray, captions: np.ndarray | None) -> dict[str, torch.Tensor]:
        """Inputs of [`DCLIPTeacher`] for pairs of images and captions, padded and masked, on the CPU; None leaves the text out."""
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

    def __init__(self, dataset: Dataset, processor: Any, max_regions: int | None, regions: bool):
        self.images = dataset.select_columns(["image_id", "image"]).with_format(None)
        self.processor, self.max_regions, self.regions = processor, max_regions, regions
        self.boxes = self.scores = None
        if "boxes" in dataset.column_names:
            self.boxes, self.scores = (ragged_column(dataset, name) for name in ("boxes", "box_scores"))

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, rows: list[int]) -> dict[str, torch.Tensor]:
        images = [decode_image(self.images, row) for row in rows]
        if not self.regions:
            return {"pixel_values": self.processor.image_processor(images=images, return_tensors="pt")["pixel_values"]}
        regions = {}
        if self.boxes is not None:
            entries = [slice(self.boxes.offsets[row], self.boxes.offsets[row + 1]) for row in rows]
            regions["boxes"] = [self.boxes.values[entry] for entry in entries]
            regions["box_scores"] = [self.scores.values[entry] for entry in entries]
        return dict(self.processor(images=images, max_regions=self.max_regions, **regions))


def _half(tensors: list[torch.Tensor]) -> np.ndarray:
    return torch.cat(tensors).cpu().to(torch.float16).numpy()


def _encode_images(rows: range, images: _RegionRows, teacher: Any, batch_size: int, num_workers: int) -> Chunk:
    batches = DataLoader(Subset(images, rows), batch_size=batch_size, num_workers=num_workers, collate_fn=pass_batch)
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
    captions: Sequence[str], processor: Any, teacher: Any, batch_size: int, reads_text: bool
) -> Chunk:
    tokens = tokenize_captions(processor.tokenizer, captions)
    by_length = np.argsort(-tokens.lengths, kind="stable")  # captions of a batch alike in length: little padding
    text_embeds, token_embeds = [None] * len(captions), [None] * len(captions)
    for start in range(0, len(captions), batch_size):
        rows = by_length[start : start + batch_size]
        input_ids, mask = tokens.pad(rows, processor.tokenizer.pad_token_id)
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


def _no_captions(dataset: Dataset, teacher: Any, reads_text: bool) -> Ragged:
    if reads_text:
        raise ValueError(
            f"Expected a teacher that reads no caption (cross_attention='regions') for images without captions, got "
            f"{teacher.config.cross_attention!r}. Train such a teacher, or give the images captions."
        )
    lengths = column_lengths(dataset, "captions")
    if lengths.any():
        row = int(np.flatnonzero(lengths)[0])
        raise ValueError(
            f"Image {dataset[row]['image_id']!r} (row {row}): expected no caption, got {lengths[row]}. Drop the captions first."
        )
    return Ragged.from_lengths(np.array([], dtype=object), lengths)


def compute_features(
    dataset: Dataset,
    teacher: Any,
    processor: Any,
    *,
    keys: Sequence[str],
    cache_dir: Path,
    regions: bool = True,
    max_regions: int | None = None,
    batch_size: int = 16,
    text_batch_size: int = 256,
    chunk_rows: int = 512,
    num_workers: int = 0,
    alone: bool = False,
    captioned: bool = True,
) -> list[Path]:
    """Encode images, regions, captions and, where the teacher reads text, tokens with the CLIP inside a teacher.

    Args:
        dataset (`datasets.Dataset`): With `image_id`, `image`, `captions`, and where it has them `boxes`, `box_scores`.
        teacher ([`DCLIPTeacher`]): On the device to use. Only its frozen CLIP is read.
        processor ([`DCLIPTeacherProcessor`]): Its own.
        keys (`Sequence[str]`): [`row_keys`] of the dataset.
        cache_dir (`Path`): Where chunks are kept.
        regions (`bool`, *optional*, defaults to `True`): Whether to encode regions.
        max_regions (`int`, *optional*): Keep the best-scored so many an image.
        batch_size (`int`, *optional*, defaults to 16): Images a forward pass, each with all its regions.
        text_batch_size (`int`, *optional*, defaults to 256): Captions a forward pass.
        chunk_rows (`int`, *optional*, defaults to 512): Images a file.
        num_workers (`int`, *optional*, defaults to 0): Processes that decode and crop.
        alone (`bool`, *optional*, defaults to `False`): Only one of the run's processes calls.
        captioned (`bool`, *optional*, defaults to `True`): Without, the rows have no captions and the teacher must read none.

    Returns:
        `list[Path]`: Files for [`TeacherFeatures.load`], in order of rows.

    Raises:
        ValueError: If an image cannot be read, a caption is blank, or a box is wrong; without `captioned`, if a row has a caption or
            the teacher reads them.
    """
    reads_text = regions and teacher.config.cross_attention != "regions"
    captions = read_captions(dataset) if captioned else _no_captions(dataset, teacher, reads_text)
    images = _RegionRows(dataset, processor, max_regions, regions)

    def compute(rows: range) -> Chunk:
        texts = captions.values[captions.offsets[rows.start] : captions.offsets[rows.stop]]
        chunk = _encode_images(rows, images, teacher, batch_size, num_workers)
        if captioned:
            chunk |= _encode_captions(texts, processor, teacher, text_batch_size, reads_text)
        else:
            chunk["text_embeds"] = np.zeros((0, chunk["image_embeds"].shape[1]), np.float16)
        return chunk | {"captions_per_image": captions.lengths[rows.start : rows.stop]}

    settings = {"regions": regions, "max_regions": max_regions, "reads_text": reads_text}
    made_by = combine_keys(
        [fingerprint_model(teacher.clip), fingerprint_processor(processor), json.dumps(settings, sort_keys=True)]
    )
    options = {
        "cache_dir": cache_dir,
        "chunk_rows": chunk_rows,
        "desc": "Encoding regions and captions",
        "alone": alone,
    }
    return compute_chunks(keys, compute, made_by=made_by, **options)
