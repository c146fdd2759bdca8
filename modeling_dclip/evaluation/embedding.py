"""Embed the images and captions of a dataset with any dual encoder: bounded memory, named failures.

Pixels are those of the processor given, bit for bit ([`~modeling_dclip.data.images.PixelReader`]); give one loaded
with `backend="pil"` for numbers to publish, as PIL and torchvision differ by 1-2 grey levels.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image, ImageOps
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from modeling_dclip.data.images import PixelReader
from modeling_dclip.encoders.families import longest_text, projected, tokenize_texts
from modeling_dclip.encoders.loading import require_dual_encoder
from modeling_dclip.processing_dclip import lay_over_white


class DatasetEmbeddings(NamedTuple):
    """`image_embeds` (I, D) and `text_embeds` (C, D), float32, L2-normalised, on the CPU;
    `image_of_caption` (C,) int64.
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
        device (`torch.device` or `str`, *optional*): Where to compute, the model is moved there; where the model is if
            not given.
        num_workers (`int`, *optional*, defaults to 0): Processes that decode and resize.

    Returns:
        `torch.Tensor` of shape `(I, D)`: float32, L2-normalised, on the CPU, in the dataset's order.

    Raises:
        TypeError: If the model is not a dual encoder.
        ValueError: If the dataset is empty, an image can't be decoded, or an embedding is not finite; the id is named.
    """
    require_dual_encoder(model)
    if "image" not in dataset.column_names or not isinstance(dataset.features["image"], ImageFeature):
        raise ValueError(f"Expected a column 'image' of type datasets.Image, got the columns {dataset.features}.")
    if not len(dataset):
        raise ValueError("Expected at least one image, got an empty dataset.")
    if "image_id" not in dataset.column_names:
        dataset = dataset.add_column("image_id", [f"row {row}" for row in range(len(dataset))])
    reader = PixelReader(dataset, getattr(processor, "image_processor", processor), cache_mib=0)
    device = torch.device(device) if device is not None else model.device
    several = len(reader.input_names) > 1
    options = {"num_workers": num_workers, "pin_memory": device.type == "cuda"}
    options["collate_fn"] = reader.decode_inputs if several else reader.decode
    loader = DataLoader(range(len(dataset)), batch_size, **options)
    training = model.training
    model.to(device).eval()
    embeds = []
    try:
        for read in tqdm(loader, desc="Embedding images", unit="batch"):
            named = read if several else {"pixel_values": read}
            inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in named.items()}
            inputs["pixel_values"] = reader.normalise(inputs["pixel_values"]).to(model.dtype)
            embeds.append(projected(model.get_image_features(**inputs)).float().cpu())
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
    """Embed texts, tokenized as the model reads them ([`~modeling_dclip.encoders.families.tokenize_texts`]) and
    batched by length.

    Args:
        model (`torch.nn.Module`): With `get_text_features`. Evaluated in `eval` mode; its mode is restored.
        processor: The model's processor, or its tokenizer alone. Longer texts than the model's positions are cut,
            counted in a warning.
        texts (`Sequence[str]`): At least one; none empty.
        batch_size (`int`, *optional*, defaults to 256): Texts at a time.
        device (`torch.device` or `str`, *optional*): As in [`embed_images`].

    Returns:
        `torch.Tensor` of shape `(C, D)`: float32, L2-normalised, on the CPU, in the order of `texts`.

    Raises:
        TypeError: If the model is not a dual encoder.
        ValueError: If there is no text, one is empty, or an embedding is not finite.
    """
    require_dual_encoder(model)
    empty = [row for row, text in enumerate(texts) if not text.strip()]
    if empty or not len(texts):
        raise ValueError(f"Expected one or more non-empty texts, got {len(texts)}, of which empty: rows {empty[:10]}.")
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    device = torch.device(device) if device is not None else model.device
    training = model.training
    model.to(device).eval()
    embeds: list[torch.Tensor] = []
    try:
        for start in tqdm(range(0, len(order), batch_size), desc="Embedding texts", unit="batch"):
            batch = [texts[row] for row in order[start : start + batch_size]]
            tokens = tokenize_texts(model, processor, batch)
            output = model.get_text_features(**{name: tensor.to(device) for name, tensor in tokens.items()})
            embeds.append(projected(output).float().cpu())
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
        model, processor, dataset, batch_size, device, num_workers: As in [`embed_images`]; `captions` holds a list of
            str an image.

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


# One text or one picture as a vector of a dual encoder's space, and what is wrong with it said before that.


def open_picture(path: str | Path) -> Image.Image:
    """Read a picture whole, upright, in RGB, as [`~modeling_dclip.data.images.decode_image`] does.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no picture, or a damaged one.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"Expected a picture at '{path}', got no such file. Check the path.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image.load()
                return lay_over_white(ImageOps.exif_transpose(image))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(
            f"'{Path(path).name}' cannot be read as a picture: {error}. Give an undamaged JPEG, PNG or WebP file."
        ) from error


def count_dropped_tokens(model: torch.nn.Module, processor: Any, text: str) -> int:
    """How many tokens of a text the model does not read, because it is too long;
    0 for open_clip's tokenizers, which do not tell.
    """
    if not hasattr(processor.tokenizer, "backend_tokenizer"):
        return 0
    tokens = processor.tokenizer(text, truncation=False, padding=False, verbose=False)["input_ids"]
    return max(0, len(tokens) - longest_text(model, processor.tokenizer))


@torch.no_grad()
def embed_query(model: torch.nn.Module, processor: Any, query: str | Image.Image) -> torch.Tensor:
    """Embed one text or one picture.

    Args:
        model (`torch.nn.Module`): A dual encoder in eval mode.
        processor: The model's.
        query (`str` or `PIL.Image.Image`): What to look for. A text too long is cut with a warning.

    Returns:
        `torch.Tensor` of shape `(1, D)`: float32, L2-normalised, on the CPU.

    Raises:
        ValueError: If the text is empty.
    """
    if isinstance(query, str):
        if not query.strip():
            raise ValueError(
                "Expected a text to look for, got an empty one. Describe in a few words what the picture shows."
            )
        tokens = tokenize_texts(model, processor, [query.strip()])
        output = model.get_text_features(**{name: tensor.to(model.device) for name, tensor in tokens.items()})
    else:
        inputs = processor.image_processor(images=[lay_over_white(query)], return_tensors="pt")
        names = getattr(processor.image_processor, "model_input_names", ("pixel_values",))
        output = model.get_image_features(**{name: inputs[name].to(model.device) for name in names})
    return torch.nn.functional.normalize(projected(output).float().cpu(), dim=1)
