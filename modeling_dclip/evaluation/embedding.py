"""Embed images, captions and queries with any dual encoder, in bounded memory.

Pixels are those of the given processor, bit for bit ([`~modeling_dclip.data.images.PixelReader`]). Load it with
`backend="pil"` for numbers to publish: PIL and torchvision differ by 1 to 2 grey levels.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from modeling_dclip.data.images import PixelReader, open_image
from modeling_dclip.encoders import DualEncoder, Encoder
from modeling_dclip.encoders.families import count_tokens, counting_cuts, longest_text, projected, tokenize_texts
from modeling_dclip.encoders.fingerprints import fingerprint_text_encoder, fingerprint_tokens
from modeling_dclip.encoders.loading import require_dual_encoder
from modeling_dclip.processing_dclip import as_rgb, cut_long

TEXTS_PER_IMAGE = 4  # a batch holds this many texts for each of its images: a text costs less


class DatasetEmbeddings(NamedTuple):
    """The embeddings of I images and their C captions.

    Attributes:
        image_embeds (`torch.Tensor` of shape `(I, D)`): float32, L2-normalised, on the CPU.
        text_embeds (`torch.Tensor` of shape `(C, D)`): Likewise.
        image_of_caption (`torch.Tensor` of shape `(C,)`): int64; the row in `image_embeds` of each caption's image.
    """

    image_embeds: torch.Tensor
    text_embeds: torch.Tensor
    image_of_caption: torch.Tensor


def _unit(embeds: torch.Tensor, names: Sequence[str], kind: str) -> torch.Tensor:
    bad = (~torch.isfinite(embeds).all(dim=1)) | (embeds == 0).all(dim=1)
    if bad.any():
        first = names[int(bad.nonzero()[0])]
        raise ValueError(
            f"Expected finite, non-zero embeddings, got {int(bad.sum())} bad ones of {len(embeds)}; the first belongs "
            f"to the {kind} {first!r}. Check the model's weights and precision."
        )
    return torch.nn.functional.normalize(embeds, dim=1)


@torch.no_grad()
def embed_images(encoder: Encoder, dataset: Dataset) -> torch.Tensor:
    """Embed the column `image`.

    At most `2 * num_workers + 1` batches are held at a time.

    Args:
        encoder ([`~modeling_dclip.encoders.Encoder`]): Its processor may be an image processor alone.
        dataset (`datasets.Dataset`): With `image` (`datasets.Image`) and, for messages, `image_id`.

    Returns:
        `torch.Tensor` of shape `(I, D)`: float32, L2-normalised, on the CPU, in the dataset's order.

    Raises:
        TypeError: If the model is not a dual encoder.
        ValueError: If the dataset is empty, an image cannot be decoded, or an embedding is not finite. The message
            names the image's id.
    """
    model, processor = encoder.model, encoder.processor
    require_dual_encoder(model)
    if "image" not in dataset.column_names or not isinstance(dataset.features["image"], ImageFeature):
        raise ValueError(f"Expected a column 'image' of type datasets.Image, got the columns {dataset.features}.")
    if not len(dataset):
        raise ValueError("Expected at least one image, got an empty dataset.")
    if "image_id" not in dataset.column_names:
        dataset = dataset.add_column("image_id", [f"row {row}" for row in range(len(dataset))])
    reader = PixelReader(dataset, getattr(processor, "image_processor", processor), cache_mib=0)
    several = len(reader.input_names) > 1
    rows: Any = range(len(dataset))  # a loader takes any sequence
    loader: DataLoader = DataLoader(
        rows,
        encoder.batch_size,
        num_workers=encoder.num_workers,
        pin_memory=encoder.compute_device.type == "cuda",
        collate_fn=reader.decode_inputs if several else reader.decode,
    )
    embeds = []
    with encoder.evaluating() as device:
        for read in tqdm(loader, desc="Embedding images", unit="batch"):
            named = read if several else {"pixel_values": read}
            inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in named.items()}
            inputs["pixel_values"] = reader.normalise(inputs["pixel_values"]).to(model.dtype)
            embeds.append(projected(model.get_image_features(**inputs)).float().cpu())
    return _unit(torch.cat(embeds), dataset["image_id"], "image")


@torch.no_grad()
def embed_texts(encoder: Encoder, texts: Sequence[str], *, batch_size: int | None = None) -> torch.Tensor:
    """Embed texts, tokenized as the model reads them ([`~modeling_dclip.encoders.families.tokenize_texts`]).

    A batch holds texts of similar length.

    Args:
        encoder ([`~modeling_dclip.encoders.Encoder`]): Its processor may be a tokenizer alone. A text longer than the
            model's positions is cut; a warning says how many were.
        texts (`Sequence[str]`): At least one; none empty.
        batch_size (`int`, *optional*): Texts in one forward pass; by default [`TEXTS_PER_IMAGE`] times
            `encoder.batch_size`.

    Returns:
        `torch.Tensor` of shape `(C, D)`: float32, L2-normalised, on the CPU, in the order of `texts`.

    Raises:
        TypeError: If the model is not a dual encoder.
        ValueError: If there is no text, a text is empty, or an embedding is not finite.
    """
    model = encoder.model
    require_dual_encoder(model)
    empty = [row for row, text in enumerate(texts) if not text.strip()]
    if empty or not len(texts):
        raise ValueError(f"Expected one or more non-empty texts, got {len(texts)}, of which empty: rows {empty[:10]}.")
    kept = encoder.kept_texts
    if kept is None:
        return _embed_texts(encoder, texts, batch_size)
    key = fingerprint_text_encoder(model), fingerprint_tokens(encoder.processor, texts)
    if key not in kept:
        embeds = _embed_texts(encoder, texts, batch_size)
        for other in [other for other in kept if other[0] != key[0]]:
            del kept[other]
        kept[key] = embeds
    return kept[key].clone()


def _embed_texts(encoder: Encoder, texts: Sequence[str], batch_size: int | None) -> torch.Tensor:
    model = encoder.model
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    batch_size = batch_size or TEXTS_PER_IMAGE * encoder.batch_size
    embeds: list[torch.Tensor] = []
    with encoder.evaluating() as device, counting_cuts():
        for start in tqdm(range(0, len(order), batch_size), desc="Embedding texts", unit="batch"):
            batch = [texts[row] for row in order[start : start + batch_size]]
            tokens = tokenize_texts(model, encoder.processor, batch)
            output = model.get_text_features(**{name: tensor.to(device) for name, tensor in tokens.items()})
            embeds.append(projected(output).float().cpu())
    back = torch.empty(len(order), dtype=torch.long)
    back[torch.tensor(order)] = torch.arange(len(order))
    return _unit(torch.cat(embeds)[back], texts, "text")


def embed_dataset(encoder: Encoder, dataset: Dataset) -> DatasetEmbeddings:
    """Embed the columns `image` and `captions`.

    Args:
        encoder ([`~modeling_dclip.encoders.Encoder`]): As in [`embed_images`] and [`embed_texts`].
        dataset (`datasets.Dataset`): With `image` (`datasets.Image`), `captions` (a list of str for each image) and,
            for messages, `image_id`.

    Returns:
        [`DatasetEmbeddings`]: Captions in the dataset's order, one image after the other.

    Raises:
        TypeError: If the model is not a dual encoder.
        ValueError: As in [`embed_images`] and [`embed_texts`]; also if an image has no caption or an empty one.
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
    return DatasetEmbeddings(embed_images(encoder, dataset), embed_texts(encoder, texts), image_of_caption)


def open_picture(path: str | Path) -> Image.Image:
    """Read a picture whole, upright, in RGB, as [`~modeling_dclip.data.images.decode_image`] does.

    Raises:
        FileNotFoundError: If there is no such file.
        UnreadableImageError: If it is no picture, or a damaged one.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"Expected a picture at '{path}', got no such file. Check the path.")
    name, advice = f"'{Path(path).name}'", "Give an undamaged JPEG, PNG or WebP file."
    return open_image(path, name, advice=advice)


def count_dropped_tokens(model: DualEncoder, processor: Any, text: str) -> int:
    """Count the tokens of a text that the model does not read because the text is too long.

    Args:
        model (`DualEncoder`): Decides how many tokens are read.
        processor: The model's, with `tokenizer`.
        text (`str`): Any text.

    Returns:
        `int`: 0 or more.
    """
    (length,) = count_tokens(processor.tokenizer, [text])
    return max(0, length - longest_text(model, processor.tokenizer))


@torch.no_grad()
def embed_query(model: DualEncoder, processor: Any, query: str | Image.Image) -> torch.Tensor:
    """Embed one text or one picture.

    Args:
        model (`DualEncoder`): In eval mode, on the device to use.
        processor: The model's, with `image_processor` and `tokenizer`.
        query (`str` or `PIL.Image.Image`): What to look for. A text that is too long is cut; a warning says so. A
            picture of any mode.

    Returns:
        `torch.Tensor` of shape `(1, D)`: float32, L2-normalised, on the CPU.

    Raises:
        ValueError: If the text is empty, or the picture cannot be brought to RGB.
    """
    if isinstance(query, str):
        if not query.strip():
            raise ValueError(
                "Expected a text to look for, got an empty one. Describe in a few words what the picture shows."
            )
        tokens = tokenize_texts(model, processor, [query.strip()])
        output = model.get_text_features(**{name: tensor.to(model.device) for name, tensor in tokens.items()})
    else:
        inputs = processor.image_processor(
            images=[cut_long(as_rgb(query), processor.image_processor)], return_tensors="pt"
        )
        names = getattr(processor.image_processor, "model_input_names", ("pixel_values",))
        output = model.get_image_features(**{name: inputs[name].to(model.device) for name in names})
    return torch.nn.functional.normalize(projected(output).float().cpu(), dim=1)
