"""Embed the images and captions of a dataset with any dual encoder of transformers: bounded memory, named failures.

Pixels are those of the processor given, bit for bit; give one loaded with `backend="pil"` for numbers to publish, as PIL and
torchvision differ by 1-2 grey levels. transformers rescales and normalises image by image in numpy: 1.1 of the 1.8 ms that a 224 px
JPEG takes on one quiet core, several times as much on a busy one. An 8-bit value has only 256 results per channel, so [`PixelReader`]
takes a table of them from the processor itself, and a batch is looked up at once on the model's device: a quarter of the bytes
travel, and the host is left with 0.7 ms an image.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset, Image
from torch.utils.data import DataLoader
from tqdm.auto import tqdm


class DatasetEmbeddings(NamedTuple):
    """`image_embeds` (I, D) and `text_embeds` (C, D), float32, L2-normalised, on the CPU; `image_of_caption` (C,) int64."""

    image_embeds: torch.Tensor
    text_embeds: torch.Tensor
    image_of_caption: torch.Tensor


class PixelReader:
    """Decode dataset rows into one batch of pixels; collate function of a `DataLoader`.

    Args:
        image_processor: Of transformers. If it is of the PIL backend, a probe decides whether the table gives its exact values.
    """

    def __init__(self, image_processor: Any) -> None:
        self.image_processor = image_processor
        self.feature = Image()
        self.table = self._value_table()  # (channels, 256), or None: call the processor for everything

    def _value_table(self) -> torch.Tensor | None:
        processor = self.image_processor
        rescales = getattr(processor, "do_rescale", False) and getattr(processor, "do_normalize", False)
        pads = getattr(processor, "do_pad", False)  # comes after normalising, so its zeros are no value of the table
        if getattr(processor, "backend", None) != "pil" or not rescales or pads:
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

    def _decode(self, row: dict[str, Any]) -> Any:
        try:
            image = self.feature.decode_example(row["image"])  # loads all pixels
        except (OSError, SyntaxError, ValueError) as error:  # what PIL raises for a missing, truncated or foreign file
            raise ValueError(
                f"Expected a readable image, got {type(error).__name__}: {error} for image_id {row['image_id']!r}. Repair or "
                f"remove this image."
            ) from error
        # Left to the processor where it converts: transformers lays transparent pixels over white.
        return image if getattr(self.image_processor, "do_convert_rgb", False) else image.convert("RGB")

    def __call__(self, rows: list[dict[str, Any]]) -> torch.Tensor:
        """Give (B, channels, H, W): uint8 to be looked up in `table`, or float32 pixel values where `table` is `None`."""
        images = [self._decode(row) for row in rows]
        if self.table is None:
            return self.image_processor(images=images, return_tensors="pt")["pixel_values"]
        return self._bytes_of(images)


def look_up(raw: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Replace every 8-bit value by its entry: raw (B, channels, H, W) uint8, table (channels, 256) -> (B, channels, H, W)."""
    offsets = 256 * torch.arange(len(table), dtype=torch.int32, device=raw.device).view(1, -1, 1, 1)
    return table.flatten().index_select(0, (raw.int() + offsets).flatten()).view(raw.shape)


def _projected(output: Any) -> torch.Tensor:
    """Take the shared-space vectors out of what `get_*_features` returned: a tensor, or transformers 5's output object."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output


def _unit(embeds: torch.Tensor, names: Sequence[str], kind: str) -> torch.Tensor:
    bad = (~torch.isfinite(embeds).all(dim=1)) | (embeds == 0).all(dim=1)
    if bad.any():
        first = names[int(bad.nonzero()[0])]
        raise ValueError(
            f"Expected finite, non-zero embeddings, got {int(bad.sum())} bad ones of {len(embeds)}; the first belongs to the "
            f"{kind} {first!r}. Check the model's weights and precision."
        )
    return torch.nn.functional.normalize(embeds, dim=1)


def _require_dual_encoder(model: torch.nn.Module) -> None:
    missing = [name for name in ("get_image_features", "get_text_features") if not hasattr(model, name)]
    if missing:
        raise TypeError(
            f"Expected a dual encoder with get_image_features and get_text_features, got {type(model).__name__} without "
            f"{missing}. Evaluate the dual checkpoint, not one tower."
        )


@torch.no_grad()
def embed_images(
    model: torch.nn.Module,
    processor: Any,
    dataset: Dataset,
    *,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    num_workers: int = 0,
) -> torch.Tensor:
    """Embed the column `image`.

    Args:
        model (`torch.nn.Module`): With `get_image_features`. Evaluated in `eval` mode; its mode is restored.
        processor: The model's processor, or its image processor alone.
        dataset (`datasets.Dataset`): With `image` (`datasets.Image`) and, for messages, `image_id`.
        batch_size (`int`, *optional*, defaults to 64): At most `2 * num_workers + 1` batches are held at a time.
        device (`torch.device` or `str`, *optional*): Where to compute, the model is moved there; where the model is if not given.
        num_workers (`int`, *optional*, defaults to 0): Processes that decode and resize.

    Returns:
        `torch.Tensor` of shape `(I, D)`: float32, L2-normalised, on the CPU, in the dataset's order.

    Raises:
        TypeError: If the model is not a dual encoder.
        ValueError: If the dataset is empty, an image can't be decoded, or an embedding is not finite; the id is named.
    """
    _require_dual_encoder(model)
    if "image" not in dataset.column_names or not isinstance(dataset.features["image"], Image):
        raise ValueError(f"Expected a column 'image' of type datasets.Image, got the columns {dataset.features}.")
    if not len(dataset):
        raise ValueError("Expected at least one image, got an empty dataset.")
    if "image_id" not in dataset.column_names:
        dataset = dataset.add_column("image_id", [f"row {row}" for row in range(len(dataset))])
    rows = dataset.select_columns(["image_id", "image"]).cast_column("image", Image(decode=False))
    reader = PixelReader(getattr(processor, "image_processor", processor))
    device = torch.device(device) if device is not None else model.device
    loader = DataLoader(rows, batch_size, num_workers=num_workers, collate_fn=reader, pin_memory=device.type == "cuda")
    table = None if reader.table is None else reader.table.to(device)
    training = model.training
    model.to(device).eval()
    embeds = []
    try:
        for pixels in tqdm(loader, desc="Embedding images", unit="batch"):
            pixels = pixels.to(device, non_blocking=True)
            pixel_values = pixels if table is None else look_up(pixels, table)
            output = model.get_image_features(pixel_values=pixel_values.to(model.dtype))
            embeds.append(_projected(output).float().cpu())
    finally:
        model.train(training)
    return _unit(torch.cat(embeds), dataset["image_id"], "image")


@torch.no_grad()
def embed_texts(
    model: torch.nn.Module,
    processor: Any,
    texts: Sequence[str],
    *,
    batch_size: int = 256,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Embed texts. They are batched by length, so that a batch is padded to its own longest text only.

    Args:
        model (`torch.nn.Module`): With `get_text_features`. Evaluated in `eval` mode; its mode is restored.
        processor: The model's processor, or its tokenizer alone. Longer texts than the model's positions are cut; EOS stays.
        texts (`Sequence[str]`): At least one; none empty.
        batch_size (`int`, *optional*, defaults to 256): Texts at a time.
        device (`torch.device` or `str`, *optional*): As in [`embed_images`].

    Returns:
        `torch.Tensor` of shape `(C, D)`: float32, L2-normalised, on the CPU, in the order of `texts`.

    Raises:
        TypeError: If the model is not a dual encoder.
        ValueError: If there is no text, one is empty, or an embedding is not finite.
    """
    _require_dual_encoder(model)
    empty = [row for row, text in enumerate(texts) if not text.strip()]
    if empty or not len(texts):
        raise ValueError(f"Expected one or more non-empty texts, got {len(texts)}, of which empty: rows {empty[:10]}.")
    tokenizer = getattr(processor, "tokenizer", processor)
    text_config = getattr(model.config, "text_config", None)
    longest = min(tokenizer.model_max_length, getattr(text_config, "max_position_embeddings", 1 << 30))
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    device = torch.device(device) if device is not None else model.device
    training = model.training
    model.to(device).eval()
    embeds: list[torch.Tensor] = []
    try:
        for start in tqdm(range(0, len(order), batch_size), desc="Embedding texts", unit="batch"):
            batch = [texts[row] for row in order[start : start + batch_size]]
            tokens = tokenizer(batch, padding=True, truncation=True, max_length=longest, return_tensors="pt").to(
                device
            )
            output = model.get_text_features(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
            embeds.append(_projected(output).float().cpu())
    finally:
        model.train(training)
    back = torch.empty(len(order), dtype=torch.long)
    back[torch.tensor(order)] = torch.arange(len(order))
    return _unit(torch.cat(embeds)[back], texts, "text")


def embed_dataset(
    model: torch.nn.Module,
    processor: Any,
    dataset: Dataset,
    *,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    num_workers: int = 0,
) -> DatasetEmbeddings:
    """Embed the columns `image` and `captions`.

    Args:
        model, processor, dataset, batch_size, device, num_workers: As in [`embed_images`]; `captions` holds a list of str an image.

    Returns:
        [`DatasetEmbeddings`]: Captions in the dataset's order, image after image.

    Raises:
        TypeError: If the model is not a dual encoder.
        ValueError: As in [`embed_images`] and [`embed_texts`]; also if an image has no caption, naming it.
    """
    if "captions" not in dataset.column_names:
        raise ValueError(f"Expected a column 'captions' with a list of str an image, got {dataset.column_names}.")
    captions = dataset["captions"][:]
    ids = dataset["image_id"][:] if "image_id" in dataset.column_names else range(len(captions))
    for image_id, own in zip(ids, captions, strict=True):
        if not own or any(not text or not text.strip() for text in own):
            raise ValueError(f"Expected non-empty captions for image_id {image_id!r}, got {own!r}. Remove the image.")
    texts = [text for own in captions for text in own]
    image_of_caption = torch.tensor([row for row, own in enumerate(captions) for _ in own], dtype=torch.long)
    images = embed_images(model, processor, dataset, batch_size=batch_size, device=device, num_workers=num_workers)
    return DatasetEmbeddings(
        images, embed_texts(model, processor, texts, batch_size=4 * batch_size, device=device), image_of_caption
    )
