"""Images as an encoder sees them, a batch at a time: read, resized and cropped once, normalised when asked for.

Pixels are those of the image processor given, bit for bit. transformers rescales and normalises image by image in
numpy: 1.1 of the 1.8 ms that a 224 px JPEG takes on one quiet core, several times as much on a busy one. An 8-bit
value has only 256 results per channel, so [`PixelReader`] takes a table of them from the processor itself and looks a
batch up at once, on the device it is on: a quarter of the bytes travel.
"""

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from PIL import Image
from tqdm.auto import tqdm

from modeling_dclip.data.files import find_files
from modeling_dclip.processing_dclip import lay_over_white

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
IMAGES_PER_READ = 64  # enough for one call of the image processor to pay, few enough for a smooth progress bar


def find_images(folder: str | os.PathLike) -> tuple[list[Path], list[Path]]:
    """The pictures of a folder and of those below it, by their endings in any case.

    Returns:
        `tuple[list[Path], list[Path]]`: The pictures, and the files passed over, each in order of paths.
    """
    return find_files(folder, IMAGE_SUFFIXES)


def decode_image(dataset: Dataset, row: int, *, rgb: bool = True) -> Image.Image:
    """One image of a dataset with `image_id` and `image`, in RGB or with `rgb=False` in the mode it is stored in.

    Raises:
        ValueError: If it cannot be read or decoded; the message names id and row.
    """
    try:
        image = dataset[row]["image"]  # decoded whole
        return lay_over_white(image) if rgb else image
    except (OSError, SyntaxError, ValueError) as error:  # what PIL raises for missing, truncated and malformed files
        image_id = dataset.select_columns("image_id")[row]["image_id"]
        raise ValueError(
            f"Image {image_id!r} (row {row}) cannot be read: {error}. Replace the file or drop the row; the regions "
            "stage does so with on_bad_image: skip."
        ) from error


def look_up(raw: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Replace every 8-bit value by its entry: raw (B, channels, H, W) uint8, table (channels, 256) -> (B, channels, H,
    W).
    """
    offsets = 256 * torch.arange(len(table), dtype=torch.int32, device=raw.device).view(1, -1, 1, 1)
    return table.flatten().index_select(0, (raw.int() + offsets).flatten()).view(raw.shape)


class PixelReader:
    """Images as the encoder sees them: resized and cropped by the image processor once, normalised per batch.

    While all rows fit into `cache_mib`, pixels are kept as uint8 from the start on (read with a progress bar);
    otherwise each batch decodes its images, for which a data loader has workers.

    Args:
        dataset (`datasets.Dataset`): With `image_id` and `image`, at least one row.
        image_processor: Of transformers. If it is of the PIL backend, a probe decides whether a table gives its exact
            values; any other is called for everything, and its pixels are not kept.
        cache_mib (`int`, *optional*, defaults to 2048): Bound in MiB, a process; 0 turns the cache off.
    """

    def __init__(self, dataset: Dataset, image_processor: Any, cache_mib: int = 2048):
        self.images = dataset.select_columns(["image_id", "image"]).with_format(None)
        self.image_processor = image_processor
        # More than one where images differ in shape: SigLIP 2's NaFlex has masks and grids beside its patches.
        self.input_names = tuple(getattr(image_processor, "model_input_names", ("pixel_values",)))
        self.table = self._value_table()  # (channels, 256), or None
        self.cache: torch.Tensor | None = None
        if self.table is None or not cache_mib:
            return
        first = self.decode([0])
        if len(dataset) * first[0].numel() <= cache_mib * 2**20:
            self.cache = torch.empty(len(dataset), *first.shape[1:], dtype=torch.uint8)
            with tqdm(total=len(dataset), desc="Reading pixels", unit="image") as progress:
                for start in range(0, len(dataset), IMAGES_PER_READ):
                    rows = range(start, min(start + IMAGES_PER_READ, len(dataset)))
                    self.cache[rows.start : rows.stop] = self.decode(rows)
                    progress.update(len(rows))

    def _value_table(self) -> torch.Tensor | None:
        processor = self.image_processor
        rescales = getattr(processor, "do_rescale", False) and getattr(processor, "do_normalize", False)
        pads = getattr(processor, "do_pad", False)  # comes after normalising, so its zeros are no value of the table
        if getattr(processor, "backend", None) != "pil" or not rescales or pads or len(self.input_names) > 1:
            return None
        greys = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)  # (1, 256, 3)
        keep_size = {"do_resize": False, "do_center_crop": False, "input_data_format": "channels_last"}
        table = processor(images=greys, return_tensors="pt", **keep_size)["pixel_values"][0, :, 0, :]
        generator = np.random.default_rng(0)
        probes = [generator.integers(0, 256, shape, dtype=np.uint8) for shape in ((37, 61, 3), (90, 50, 3))]
        expected = processor(images=probes, return_tensors="pt", input_data_format="channels_last")["pixel_values"]
        raw = self._bytes_of(probes, input_data_format="channels_last")
        same = raw.dtype == torch.uint8 and torch.equal(look_up(raw, table), expected)
        return table if same else None

    def _bytes_of(self, images: list[Any], **kwargs: Any) -> torch.Tensor:
        return self.image_processor(
            images=images, return_tensors="pt", do_rescale=False, do_normalize=False, **kwargs
        )["pixel_values"]

    def decode(self, rows: Sequence[int] | np.ndarray) -> torch.Tensor:
        """Read rows from the dataset; collate function of a `DataLoader` over row numbers.

        Returns:
            `torch.Tensor` of shape `(B, 3, H, W)`: uint8, or where there is no table the processor's pixel values.

        Raises:
            ValueError: If an image cannot be decoded; the message names its id.
        """
        if self.table is None:
            return self.decode_inputs(rows)["pixel_values"]
        return self._bytes_of(self._images(rows))

    def decode_inputs(self, rows: Sequence[int] | np.ndarray) -> dict[str, torch.Tensor]:
        """Read rows as all that the image processor makes of them, by `input_names`; a collate function too.

        Raises:
            ValueError: If an image cannot be decoded; the message names its id.
        """
        inputs = self.image_processor(images=self._images(rows), return_tensors="pt")
        return {name: inputs[name] for name in self.input_names}

    def _images(self, rows: Sequence[int] | np.ndarray) -> list[Image.Image]:
        # Left to the processor where it converts: transformers lays transparent pixels over white.
        rgb = not getattr(self.image_processor, "do_convert_rgb", False)
        return [decode_image(self.images, int(row), rgb=rgb) for row in rows]

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """What [`PixelReader.decode`] gave as the processor's pixel values, on the device it is on."""
        return pixels if self.table is None else look_up(pixels, self.table.to(pixels.device))

    def read(self, rows: np.ndarray) -> torch.Tensor:
        """Rows as normalised float32 `(B, 3, H, W)`."""
        return self.normalise(
            self.decode(rows) if self.cache is None else self.cache[torch.from_numpy(np.asarray(rows))]
        )


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


# What PIL raises for broken files, besides OSError: bad PNG chunks, a missing plugin, absurd sizes.
UNREADABLE_IMAGE = (OSError, SyntaxError, ValueError, ImportError, Image.DecompressionBombError)


def open_image(encoded: bytes) -> Image.Image:
    """Decode to RGB, transparent pixels over white.

    Raises:
        ValueError: If that cannot be done.
    """
    try:
        return lay_over_white(Image.open(io.BytesIO(encoded)))
    except UNREADABLE_IMAGE as error:
        raise ValueError(f"expected an image, got {error}") from error
