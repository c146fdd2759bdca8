"""Let a frozen teacher write its targets beside the data: one per caption, float16, L2-normalised.

The teacher is deterministic, so a target computed once equals the one computed in every step. A teacher that reads
text gives another target for each caption of an image; the leak-free one (`cross_attention="regions"`) the same, and
one to an image without a caption.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from modeling_dclip.data.chunks import compute_chunks, read_chunk
from modeling_dclip.data.columns import Ragged, check_finite, with_flat_embeds, with_ragged_embeds
from modeling_dclip.data.teacher_features import TeacherFeatures, compute_features, fingerprint_model

PAIRS_PER_PASS = 512  # of the teacher's block, which is small


@torch.no_grad()
def embed_pairs(
    teacher: Any, features: TeacherFeatures, rows: np.ndarray, captions: np.ndarray | None
) -> torch.Tensor:
    """A teacher's embedding of pairs of an image and a caption, whether or not they belong together.

    Args:
        teacher ([`DCLIPTeacher`]): In eval mode, on the device to use.
        features ([`TeacherFeatures`]): N images, C captions.
        rows (`np.ndarray` of shape `(P,)`): The image of each pair, below N.
        captions (`np.ndarray` of shape `(P,)` or None): The caption of each pair, below C; None if the teacher reads no text.

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


def teach(teacher: Any, features: TeacherFeatures) -> np.ndarray:
    """A frozen teacher's embedding of every caption's pair; one of an image without captions.

    Args:
        teacher ([`DCLIPTeacher`]): In eval mode, on the device to use.
        features ([`TeacherFeatures`]): N images, C captions.

    Returns:
        `np.ndarray` of shape `(C + images without captions, D)`: float16, L2-normalised.
    """
    captions_per_image = features.text_embeds.lengths
    rows = np.arange(len(captions_per_image))
    if teacher.config.cross_attention == "regions":  # computed once an image
        values = embed_pairs(teacher, features, rows, None).to(torch.float16).numpy()
        return np.repeat(values, np.maximum(captions_per_image, 1), axis=0)
    rows = np.repeat(rows, captions_per_image)
    return embed_pairs(teacher, features, rows, np.arange(len(rows))).to(torch.float16).numpy()


def _read(paths: Sequence[Path], name: str) -> np.ndarray:
    return np.concatenate([read_chunk(path)[name] for path in paths])


def add_teacher_targets(
    dataset: Dataset,
    teacher: Any,
    processor: Any,
    *,
    keys: Sequence[str],
    cache_dir: Path,
    with_teacher: bool = True,
    chunk_rows: int = 512,
    **options: Any,
) -> Dataset:
    """Compute the columns a student learns from.

    Chunks of rows are written atomically under keys of their content (pixels, captions, boxes), the teacher's weights
    and the settings: a run that was killed goes on at the next chunk, a changed row or teacher is computed again.

    Args:
        dataset (`datasets.Dataset`): With `image_id`, `image`, `captions`, and where it has them `boxes`, `box_scores`.
        teacher ([`DCLIPTeacher`]): Trained; on the device to use.
        processor ([`DCLIPTeacherProcessor`]): Its own.
        keys (`Sequence[str]`): [`row_keys`] of the dataset.
        cache_dir (`Path`): Where chunks are kept; may be shared by all datasets and teachers.
        with_teacher (`bool`, *optional*, defaults to `True`): Without, only the frozen CLIP speaks: no `teacher_embeds`.
        chunk_rows (`int`, *optional*, defaults to 512): Images a file.
        options: Of [`compute_features`].

    Returns:
        `datasets.Dataset`: The rows with `teacher_embeds` float16 (captions, D), `text_embeds` float16 (captions, D),
        `anchor_embeds` float16 (D,), all L2-normalised, replacing older ones. A row without captions (`captioned=False`) has one
        entry in `teacher_embeds` and none in `text_embeds`.

    Raises:
        ValueError: If an image cannot be read, a caption is blank, a box is wrong, or a target is not finite; the
            message names the row.
    """
    teacher.eval()
    cache = {"cache_dir": Path(cache_dir), "chunk_rows": chunk_rows}
    paths = compute_features(dataset, teacher, processor, keys=keys, regions=with_teacher, **cache, **options)
    text_embeds = Ragged.from_lengths(_read(paths, "text_embeds"), _read(paths, "captions_per_image"))
    columns = {"text_embeds": text_embeds}
    if with_teacher:

        def compute(rows: range) -> dict[str, np.ndarray]:
            return {"teacher_embeds": teach(teacher, TeacherFeatures.load([paths[rows.start // chunk_rows]]))}

        chunk_keys = [paths[row // chunk_rows].stem for row in range(len(dataset))]
        made_by = fingerprint_model(teacher)
        targets = compute_chunks(chunk_keys, compute, made_by=made_by, desc="Writing teacher targets", **cache)
        entries = np.maximum(text_embeds.lengths, 1)
        columns["teacher_embeds"] = Ragged.from_lengths(_read(targets, "teacher_embeds"), entries)
    for name, embeds in columns.items():
        check_finite(dataset, name, embeds)
        dataset = with_ragged_embeds(dataset, name, embeds)
    anchor_embeds = _read(paths, "image_embeds")
    check_finite(dataset, "anchor_embeds", Ragged(anchor_embeds, np.arange(len(anchor_embeds) + 1)))
    return with_flat_embeds(dataset, "anchor_embeds", anchor_embeds)
