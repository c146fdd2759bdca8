"""What a detector said, checked once and kept by the content of the image."""

from pathlib import Path

import numpy as np

from modeling_dclip.data.files import replacing
from modeling_dclip.data.network_detectors import Regions

# A crop narrower than a pixel shows nothing.
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
