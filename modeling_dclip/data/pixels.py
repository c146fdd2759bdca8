"""Images as an encoder sees them, a batch at a time: read, resized and cropped once, normalised when asked for."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from PIL import Image
from tqdm.auto import tqdm

IMAGES_PER_READ = 64  # enough for one call of the image processor to pay, few enough for a smooth progress bar


def decode_image(dataset: Dataset, row: int) -> Image.Image:
    """One image in RGB, of a dataset with `image_id` and `image`.

    Raises:
        ValueError: If it cannot be read or decoded; the message names id and row.
    """
    try:
        return dataset[row]["image"].convert("RGB")
    except (OSError, SyntaxError) as error:  # what PIL raises for missing, truncated and malformed files
        image_id = dataset.select_columns("image_id")[row]["image_id"]
        raise ValueError(
            f"Image {image_id!r} (row {row}) cannot be read: {error}. Replace the file or drop the row; the regions stage does so with "
            "on_bad_image: skip."
        ) from error


class PixelReader:
    """Images as the encoder sees them: resized and cropped by the image processor once, normalised per batch.

    Values equal the image processor's own to float32 rounding. While all rows fit into `cache_mib`, pixels are kept as
    uint8 from the start on (read with a progress bar); otherwise each batch decodes its images, for which
    `dataloader_num_workers` is there.

    Args:
        dataset (`datasets.Dataset`): With `image_id` and `image`.
        image_processor (`CLIPImageProcessorPil`): Of the PIL backend: it resizes uint8 pixels.
        cache_mib (`int`, *optional*, defaults to 2048): Bound in MiB, a process; 0 turns the cache off.
    """

    def __init__(self, dataset: Dataset, image_processor: Any, cache_mib: int = 2048):
        self.images = dataset.select_columns(["image_id", "image"]).with_format(None)
        self.image_processor = image_processor
        mean, deviation = np.array(image_processor.image_mean), np.array(image_processor.image_std)
        self.mean = torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1)
        self.deviation = torch.tensor(deviation, dtype=torch.float32).view(-1, 1, 1)
        self.cache: torch.Tensor | None = None
        first = self.decode([0])
        if len(dataset) * first[0].numel() <= cache_mib * 2**20:
            self.cache = torch.empty(len(dataset), *first.shape[1:], dtype=torch.uint8)
            with tqdm(total=len(dataset), desc="Reading pixels", unit="image") as progress:
                for start in range(0, len(dataset), IMAGES_PER_READ):
                    rows = range(start, min(start + IMAGES_PER_READ, len(dataset)))
                    self.cache[rows.start : rows.stop] = self.decode(rows)
                    progress.update(len(rows))

    def decode(self, rows: Sequence[int]) -> torch.Tensor:
        """Read rows from the dataset: uint8 `(B, 3, H, W)`.

        Raises:
            ValueError: If an image cannot be decoded; the message names its id.
        """
        images = [decode_image(self.images, int(row)) for row in rows]
        pixels = self.image_processor(images=images, do_rescale=False, do_normalize=False, return_tensors="pt")
        return pixels["pixel_values"]

    def read(self, rows: np.ndarray) -> torch.Tensor:
        """Rows as normalised float32 `(B, 3, H, W)`."""
        pixels = self.decode(rows) if self.cache is None else self.cache[torch.from_numpy(np.asarray(rows))]
        # In place: three passes over one buffer instead of three buffers, which take 20 times as long at 64 pixels.
        return pixels.float().mul_(self.image_processor.rescale_factor).sub_(self.mean).div_(self.deviation)


def random_resized_crop(pixel_values: torch.Tensor, areas: np.ndarray, places: np.ndarray) -> torch.Tensor:
    """Cut a square of each image and bring it back to full size, bilinearly.

    Args:
        pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): Images.
        areas (`np.ndarray` of shape `(B,)`): Share of the area to keep, in (0, 1].
        places (`np.ndarray` of shape `(2, B)`): Where along x and y the square lies in what room there is, in [0, 1].

    Returns:
        `torch.Tensor` of shape `(B, 3, H, W)`.
    """
    sides = np.sqrt(areas)
    theta = np.zeros((len(areas), 2, 3), np.float32)
    theta[:, 0, 0] = theta[:, 1, 1] = sides
    theta[:, :, 2] = ((2 * places - 1) * (1 - sides)).T
    grid = F.affine_grid(torch.from_numpy(theta), list(pixel_values.shape), align_corners=False)
    return F.grid_sample(pixel_values, grid, mode="bilinear", padding_mode="border", align_corners=False)
