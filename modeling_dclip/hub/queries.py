"""One text or one picture as a vector of a dual encoder's space, and what is wrong with it said before that."""

import warnings
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps

from modeling_dclip.data.dual_encoders import longest_text, projected, tokenize_texts
from modeling_dclip.processing_dclip import lay_over_white


def open_picture(path: str | Path) -> Image.Image:
    """Read a picture whole, upright, in RGB, as [`~modeling_dclip.data.pixels.decode_image`] does.

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
    """How many tokens of a text the model does not read, because it is too long; 0 for open_clip's tokenizers, which do not tell."""
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
