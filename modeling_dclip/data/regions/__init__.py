"""Add the columns `boxes` and `box_scores`: where to look in each image.

A detector's answers are cached in one file for each image, under the detector's fingerprint and the content of the
encoded image. A run that was killed continues where it stopped, and a picture under two names is detected once.

    python -m modeling_dclip.data.regions --dataset SPEC --detector SPEC --output FOLDER
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image
from tqdm.auto import tqdm

from modeling_dclip.data.columns import BOXES_FEATURE, SCORES_FEATURE, put_columns
from modeling_dclip.data.files import remove_leftovers, replacing, write_json
from modeling_dclip.data.images import UnreadableImageError, open_image, read_encoded
from modeling_dclip.data.regions.detectors import RegionDetector, Regions, build_detector
from modeling_dclip.data.rows import first, require_rows
from modeling_dclip.encoders.fingerprints import hash_bytes
from modeling_dclip.progress import count_of

# A crop that is narrower than a pixel shows nothing.
MIN_SIDE_PIXELS = 1.0


def clip_regions(regions: Regions, size: tuple[int, int], image_id: str) -> tuple[np.ndarray, int]:
    """Clip boxes to the image and drop those left with a side under one pixel.

    Args:
        regions (`tuple[np.ndarray, np.ndarray]`): Boxes `(R, 4)` and scores `(R,)`.
        size (`tuple[int, int]`): Width and height in pixels.
        image_id (`str`): For messages.

    Returns:
        `tuple[np.ndarray, int]`: float32 `(R', 5)`, box and score, and the number dropped.

    Raises:
        ValueError: If shapes disagree, a number is not finite, or a score is outside [0, 1].
    """
    boxes, scores = (np.asarray(part, np.float32) for part in regions)
    if boxes.ndim != 2 or boxes.shape[1] != 4 or scores.shape != boxes.shape[:1]:
        raise ValueError(
            f"Image {image_id!r}: expected boxes (R, 4) and scores (R,) from the detector, "
            f"got {boxes.shape} and {scores.shape}."
        )
    if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
        raise ValueError(
            f"Image {image_id!r}: the detector gave a box or score that is not finite. Check its weights."
        )
    if len(scores) and not (scores.min() >= 0 and scores.max() <= 1):
        raise ValueError(f"Image {image_id!r}: expected scores in [0, 1], got {scores.min()} to {scores.max()}.")
    clipped = boxes.clip(0, np.array([*size, *size], np.float32))
    wide_enough = (clipped[:, 2:] - clipped[:, :2] >= MIN_SIDE_PIXELS).all(axis=1)
    return np.concatenate([clipped, scores[:, None]], axis=1)[wide_enough], int((~wide_enough).sum())


class RegionCache:
    """Regions by the content of the encoded image, one small file each, written atomically.

    Args:
        folder (`Path`): One detector's; it holds that detector's answers before any cut to `max_regions`.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        remove_leftovers(folder, below=True)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.npy"

    def has(self, key: str) -> bool:
        """Whether the regions of an image are known."""
        return self._path(key).is_file()

    def load(self, key: str) -> np.ndarray:
        """The regions `(R, 5)` of an image that is known.

        Raises:
            ValueError: If the file is damaged.
        """
        path = self._path(key)
        try:
            return np.load(path, allow_pickle=False).reshape(-1, 5)
        except (ValueError, EOFError) as error:
            raise ValueError(
                f"The cached regions '{path}' are damaged ({error}). Delete the file and run again."
            ) from error

    def store(self, key: str, regions: np.ndarray) -> None:
        """Keep the regions `(R, 5)` of an image."""
        with replacing(self._path(key)) as path:
            np.save(path, regions)


__all__ = ["RegionDetector", "add_regions", "build_detector"]

logger = logging.getLogger(__name__)


@dataclass
class _Pending:
    """A decoded image that waits for its batch, with every row that shows it."""

    image: Image.Image
    row: dict[str, Any]
    indices: list[int]


@dataclass
class _Progress:
    """What a run has found so far, row by row, and what it will report."""

    regions: list[np.ndarray | None]
    computed: int = 0
    from_cache: int = 0
    dropped_boxes: int = 0
    skipped: list[dict[str, str]] = field(default_factory=list)


def _detect(
    detector: RegionDetector, cache: RegionCache | None, pending: dict[str, _Pending], progress: _Progress
) -> None:
    """Run one batch and empty `pending`."""
    waiting = list(pending.values())
    if not waiting:
        return
    answers = detector([one.image for one in waiting], [one.row for one in waiting])
    for (key, one), answer in zip(pending.items(), answers, strict=True):
        regions, dropped = clip_regions(answer, one.image.size, one.row["image_id"])
        if cache is not None:
            cache.store(key, regions)
        for index in one.indices:
            progress.regions[index] = regions
        progress.computed += 1
        progress.dropped_boxes += dropped
    pending.clear()


def _find_regions(
    dataset: Dataset, detector: RegionDetector, cache: RegionCache | None, batch_size: int, on_bad_image: str
) -> _Progress:
    progress = _Progress(regions=[None] * len(dataset))
    pending: dict[str, _Pending] = {}
    rows = dataset.with_format(None).cast_column("image", ImageFeature(decode=False))
    advice = "Replace the file, or leave such images out with --on_bad_image skip."
    for index, row in enumerate(tqdm(rows, desc="Finding regions", unit="image")):
        stored = row.pop("image")
        file = (stored or {}).get("path") or "stored bytes"
        name = f"Image {row['image_id']!r} ('{file}')"
        try:
            data = read_encoded(stored, name, advice)
            key = str(index) if cache is None else hash_bytes(data)
            seen = key in pending or (cache is not None and cache.has(key))
            image = None if seen else open_image(data, name, advice=advice)
        except UnreadableImageError as error:
            if on_bad_image == "raise":
                raise
            progress.skipped.append({"image_id": row["image_id"], "file": file, "reason": error.reason})
            continue
        if image is not None:
            pending[key] = _Pending(image, row, [index])
        elif key in pending:
            pending[key].indices.append(index)
        elif cache is not None:
            progress.regions[index] = cache.load(key)
            progress.from_cache += 1
        if len(pending) == batch_size:
            _detect(detector, cache, pending, progress)
    _detect(detector, cache, pending, progress)
    return progress


def _report(progress: _Progress, detector: str, report_file: str | Path | None) -> None:
    total, skipped = len(progress.regions), progress.skipped
    if skipped:
        ids = first(one["image_id"] for one in skipped)
        logger.warning("Left out %d of %s that cannot be read, first: %s", len(skipped), count_of(total, "image"), ids)
    if progress.dropped_boxes:
        logger.warning("Dropped boxes with a side under a pixel inside their image: %d", progress.dropped_boxes)
    if report_file is None:
        return
    report = {
        "detector": detector,
        "images": total,
        "computed_images": progress.computed,
        "cached_images": progress.from_cache,
        "dropped_boxes_of_computed_images": progress.dropped_boxes,
        "skipped_images": len(skipped),
        "skipped": skipped,
    }
    write_json(report_file, report, indent=2)


def _best(regions: np.ndarray, max_regions: int | None) -> np.ndarray:
    """The `max_regions` of the highest scores, best first; all, in the detector's order, if there are no more."""
    if max_regions is None or len(regions) <= max_regions:
        return regions
    return regions[np.argsort(-regions[:, 4], kind="stable")[:max_regions]]


def _with_columns(dataset: Dataset, regions: list[np.ndarray]) -> Dataset:
    """Put the two columns in, replacing older ones. Arrow straight from numpy: no Python number per coordinate."""
    flat = np.concatenate(regions)
    offsets = np.cumsum([0, *map(len, regions)], dtype=np.int32)
    boxes = pa.FixedSizeListArray.from_arrays(pa.array(flat[:, :4].reshape(-1)), 4)
    columns = {
        "boxes": (pa.ListArray.from_arrays(offsets, boxes), BOXES_FEATURE),
        "box_scores": (pa.ListArray.from_arrays(offsets, pa.array(flat[:, 4])), SCORES_FEATURE),
    }
    return put_columns(dataset, columns)


def add_regions(
    dataset: Dataset,
    detector: RegionDetector,
    *,
    batch_size: int = 16,
    cache_dir: str | Path,
    max_regions: int | None = None,
    on_bad_image: Literal["raise", "skip"] = "raise",
    report_file: str | Path | None = None,
) -> Dataset:
    """Find the regions of every image.

    Boxes are clipped to the image; one left with a side under a pixel is dropped and counted. An image may end with no
    box: the processor then takes the whole image.

    Args:
        dataset (`datasets.Dataset`): With `image_id` and `image`.
        detector (`RegionDetector`): See [`build_detector`].
        batch_size (`int`, *optional*, defaults to 16): Images a call of the detector.
        cache_dir (`str` or `Path`): Where answers are kept; shared by all datasets and detectors.
        max_regions (`int`, *optional*): Keep so many of the highest scores. Does not touch the cache.
        on_bad_image (`str`, *optional*, defaults to `"raise"`): `"skip"` leaves out images that cannot be read or
            decoded, and reports.
        report_file (`str` or `Path`, *optional*): A JSON with the counts and, for each image left out, its id, file
            and reason.

    Returns:
        `datasets.Dataset`: The rows with `boxes` float32 (R, 4) and `box_scores` float32 (R,), replacing older ones.

    Raises:
        ValueError: If an image cannot be read (the message names id and file), all are left out, a box is wrong, or an
            argument is.
    """
    if on_bad_image not in ("raise", "skip"):
        raise ValueError(f"Expected on_bad_image to be 'raise' or 'skip', got {on_bad_image!r}.")
    if batch_size < 1 or (max_regions is not None and max_regions < 1):
        raise ValueError(f"Expected batch_size and max_regions of at least 1, got {batch_size} and {max_regions}.")
    require_rows(len(dataset), "the dataset")
    # A detector that reads rows may answer differently for equal pixels.
    cache = None if getattr(detector, "reads_rows", False) else RegionCache(Path(cache_dir) / detector.fingerprint)
    progress = _find_regions(dataset, detector, cache, batch_size, on_bad_image)
    _report(progress, detector.fingerprint, report_file)
    if cache is not None:
        told = (progress.computed, progress.from_cache, cache.folder)
        logger.info("regions: detected %d images, took %d from earlier runs in %s", *told)
    kept = [index for index, regions in enumerate(progress.regions) if regions is not None]
    require_rows(len(kept), f"the dataset after leaving out {len(progress.skipped)} unreadable images")
    empty = np.zeros((0, 5), np.float32)
    filled = [empty if regions is None else _best(regions, max_regions) for regions in progress.regions]
    dataset = _with_columns(dataset, filled)
    return dataset if len(kept) == len(dataset) else dataset.select(kept)
