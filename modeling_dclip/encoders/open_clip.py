"""Models of the package open_clip_torch with the interface of a dual encoder of transformers.

Preprocessing is open_clip's own: images go through its transform for inference, texts through its tokenizer, padded to
the length that the model was trained with.

| spec | what |
|---|---|
| `open_clip:NAME:PRETRAINED` | a built-in architecture; `PRETRAINED` is a tag of open_clip or a file of weights |
| `open_clip:hf-hub:ORGANISATION/REPOSITORY` | architecture and weights of a repository on the Hub |
| `open_clip:local-dir:FOLDER` | the same of a folder with `open_clip_config.json` |
"""

import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from pickle import UnpicklingError
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import BatchEncoding, BatchFeature

from modeling_dclip.encoders.fingerprints import fingerprint_weights

OPEN_CLIP_PREFIX = "open_clip:"
HOLD_BOTH = ("hf-hub", "local-dir")  # schemes whose place holds both architecture and weights
_COUNTED = 4096  # tokens of a text that are counted, at most
_FILTERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}  # torchvision's to PIL's
_SUGGESTED = 5  # architectures near one that does not exist


class OpenClipImageProcessor:
    """A transform of open_clip with the interface of an image processor.

    Args:
        transform (`Callable`): From one image to `(3, H, W)`; it converts to RGB itself.
    """

    backend = "open_clip"
    do_convert_rgb = True
    model_input_names = ("pixel_values",)

    # What `modeling_dclip.processing_dclip.cut_long` asks of an image processor.
    do_resize = True
    do_center_crop = False
    size: Any = None
    crop_size: Any = None
    resample: int | None = None

    def __init__(self, transform: Callable[[Image.Image], torch.Tensor]):
        self.transform = transform
        for step in getattr(transform, "transforms", []):
            kind, size = type(step).__name__, getattr(step, "size", None)
            if kind == "Resize" and isinstance(size, int):  # of the shortest edge
                self.size, self.resample = {"shortest_edge": size}, _FILTERS[step.interpolation.value]
            elif kind == "CenterCrop" and size is not None:
                height, width = (size, size) if isinstance(size, int) else size
                self.do_center_crop, self.crop_size = True, {"height": height, "width": width}

    def __call__(
        self, images: Image.Image | Sequence[Image.Image], return_tensors: str = "pt", **kwargs: Any
    ) -> BatchFeature:
        """`pixel_values` `(B, 3, H, W)`."""
        images = [images] if isinstance(images, Image.Image) else images
        return BatchFeature({"pixel_values": torch.stack([self.transform(image) for image in images])})


class OpenClipTokenizer:
    """A tokenizer of open_clip with the interface of one of transformers.

    Args:
        tokenizer (`Callable`): From texts to `(B, T)`, each cut or padded to the model's T.
    """

    def __init__(self, tokenizer: Callable[..., torch.Tensor]):
        self.read = tokenizer  # not `tokenizer`: by that name a processor has one
        self.model_max_length = tokenizer([""]).shape[1]

    def __call__(self, text: str | Sequence[str], return_tensors: str = "pt", **kwargs: Any) -> BatchEncoding:
        """`input_ids` `(B, T)`.

        There is no mask: the model reads every place. Padding and length are not for the caller to say.
        """
        return BatchEncoding({"input_ids": self.read([text] if isinstance(text, str) else list(text))})

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text before it is cut, its end token counted; at most 4,096."""
        if not texts:
            return []
        padding = int(self.read([""])[0, -1])
        inner = getattr(self.read, "tokenizer", None)  # of transformers, where open_clip wraps one
        is_end = int(getattr(inner, "eos_token_id", None) == padding)

        def count(ids: torch.Tensor) -> int:
            # What lies before the padding at the end: within a text, CLIP's padding is an exclamation mark.
            real = (ids != padding).nonzero()
            return min(len(ids), (int(real[-1]) + 1 if len(real) else 0) + is_end)

        lengths = [count(ids) for ids in self.read(list(texts))]
        for row in [row for row, length in enumerate(lengths) if length >= self.model_max_length]:
            lengths[row] = count(self.read([texts[row]], context_length=_COUNTED)[0])
        return lengths


class OpenClipProcessor:
    """Image processor and tokenizer as one processor.

    Args:
        image_processor ([`OpenClipImageProcessor`]): For images.
        tokenizer ([`OpenClipTokenizer`]): For texts.
    """

    def __init__(self, image_processor: OpenClipImageProcessor, tokenizer: OpenClipTokenizer):
        self.image_processor, self.tokenizer = image_processor, tokenizer

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """`pixel_values` of images, `input_ids` of texts."""
        features = BatchFeature({})
        if images is not None:
            features.update(self.image_processor(images))
        if text is not None:
            features.update(self.tokenizer(text))
        return features


class OpenClipDualEncoder(nn.Module):
    """A model of open_clip with the methods of a dual encoder of transformers.

    Args:
        model (`nn.Module`): With `encode_image` and `encode_text`.
        name (`str`): Of the architecture.
        context_length (`int`): Tokens of a text.
    """

    def __init__(self, model: nn.Module, name: str, context_length: int):
        super().__init__()
        self.model = model
        text_config = SimpleNamespace(model_type="open_clip_text", max_position_embeddings=context_length)
        self.config = SimpleNamespace(model_type="open_clip", name=name, text_config=text_config)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return next(self.parameters()).dtype

    @property
    def logit_scale(self) -> torch.Tensor:
        """The trained scale, a logarithm."""
        scale: Any = self.model.logit_scale
        return scale

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(B, D)`; some models return normalised embeddings, some do not."""
        encode: Any = self.model.encode_image
        return encode(pixel_values)

    def get_text_features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """`(B, D)` as above; the mask is ignored, because open_clip reads every place."""
        encode: Any = self.model.encode_text
        return encode(input_ids)


def check_open_clip(spec: str) -> tuple[Any, str, str | None]:
    """Say early that open_clip cannot load a spec. No weight is fetched or read.

    Args:
        spec (`str`): See the table at the top of this module.

    Returns:
        `tuple`: The package; its name of the model; its name of the weights, `None` where the first holds both.

    Raises:
        ImportError: If the package is not installed.
        ValueError: If the spec has another form, or open_clip knows no such name or tag.
    """
    name, _, pretrained = spec.removeprefix(OPEN_CLIP_PREFIX).partition(":")
    if not name or not pretrained:
        raise ValueError(f"Expected {OPEN_CLIP_PREFIX}NAME:PRETRAINED, got {spec}. A tag or a file names the weights.")
    try:
        import open_clip
    except ImportError as error:
        raise ImportError(f"{spec} needs the package: pip install open_clip_torch") from error
    if name in HOLD_BOTH:
        return open_clip, f"{name}:{pretrained}", None
    _check_names(open_clip, name, pretrained, spec)
    return open_clip, name, pretrained


def load_open_clip(spec: str) -> tuple[OpenClipDualEncoder, OpenClipProcessor]:
    """Load a model with its weights, in float32 on the CPU, in eval mode.

    Args:
        spec (`str`): See the table at the top of this module.

    Returns:
        `tuple`: The model and its processor.

    Raises:
        ImportError: If the package is not installed.
        FileNotFoundError: If a folder of weights is missing.
        ValueError: If the spec has another form, open_clip knows no such name or tag, or the weights do not load
            whole.
    """
    open_clip, name, pretrained = check_open_clip(spec)
    try:
        model, transform = open_clip.create_model_from_pretrained(name, pretrained=pretrained, precision="fp32")
    except UnpicklingError as error:  # torch's text would have the reader run what the file holds
        raise ValueError(
            f"Expected tensors in the weights of {spec}, got a damaged file, or one that only running its code could "
            "read, which is not done. Save its state dict as safetensors."
        ) from error
    except RuntimeError as error:
        raise ValueError(
            f"Expected whole weights of the architecture {name!r}, got none that load with {spec}: {error}"
        ) from error
    tokenizer = OpenClipTokenizer(open_clip.get_tokenizer(name))
    encoder = OpenClipDualEncoder(model, name, tokenizer.model_max_length).eval()
    return encoder, OpenClipProcessor(OpenClipImageProcessor(transform), tokenizer)


def _check_names(open_clip: Any, name: str, pretrained: str, spec: str) -> None:
    known = open_clip.list_models()
    if name.replace("/", "-") not in known:
        near = difflib.get_close_matches(name, known, _SUGGESTED) or known[:_SUGGESTED]
        raise ValueError(
            f"Expected an architecture that open_clip knows, got {name!r} in {spec}. Near it: {', '.join(near)}; all: "
            "open_clip.list_models()."
        )
    tags = open_clip.list_pretrained_tags_by_model(name.replace("/", "-"))
    if pretrained.lower().replace("-", "_") not in tags and not Path(pretrained).is_file():
        raise ValueError(
            f"Expected a file of weights or one of the tags {tags or 'none'} of {name}, got {pretrained!r} in {spec}."
        )
    # With the other activation open_clip computes other embeddings, and only warns.
    quick = bool((open_clip.get_pretrained_cfg(name.replace("/", "-"), pretrained) or {}).get("quick_gelu"))
    if quick and not open_clip.get_model_config(name.replace("/", "-")).get("quick_gelu"):
        raise ValueError(
            f"Expected {OPEN_CLIP_PREFIX}{name}-quickgelu:{pretrained}, as these weights were trained with QuickGELU, "
            f"got {spec}."
        )


def fingerprint_open_clip(model: OpenClipDualEncoder, processor: OpenClipProcessor | None = None) -> str:
    """A key of the weights alone or, with the processor, of what the pair computes. Hexadecimal SHA-256."""
    settings = {}
    if processor is not None:
        settings = {"name": model.config.name, "transform": repr(processor.image_processor.transform)}
    return fingerprint_weights(settings, model.model.state_dict())
