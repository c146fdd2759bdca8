"""Who speaks in a reinforced dataset: CLIPs that embed augmented images and captions, and captioners that describe images.

| spec of a teacher | what |
|---|---|
| a folder or Hub id | a CLIP of transformers or of this package |
| `open_clip:NAME:PRETRAINED` | one of the package `open_clip_torch`; `PRETRAINED` is a tag or a file of weights |
"""

import functools
import json
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoTokenizer

from modeling_dclip.data.collation import tokenize_captions
from modeling_dclip.data.columns import combine_keys
from modeling_dclip.data.teacher_features import fingerprint_model, fingerprint_processor

OPEN_CLIP = "open_clip:"
SAMPLED_TOP_P = 0.9  # of captions, where several are wanted


class ReinforcementTeacher(Protocol):
    """A frozen dual encoder with its own preprocessing.

    Attributes:
        name (`str`): Its spec.
        fingerprint (`str`): Equal ones mean equal embeddings.
        width (`int`): D.
        logit_scale (`float`): As trained; a logarithm.
        preprocess (`Callable`): From RGB images to what it reads, `(B, 3, H, W)`: its own size, cut and normalisation. Goes to
            the data loader's workers, so it holds no model.
    """

    name: str
    fingerprint: str
    preprocess: Callable[[Sequence[Image.Image]], torch.Tensor]
    width: int
    logit_scale: float

    def encode_images(self, pixel_values: torch.Tensor) -> np.ndarray:
        """`(B, D)` float32, L2-normalised."""

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """`(B, D)` float32, L2-normalised; a text too long is cut."""


def _process(image_processor: Any, images: Sequence[Image.Image]) -> torch.Tensor:
    return image_processor(images=list(images), return_tensors="pt")["pixel_values"]


def _transform(transform: Callable[[Image.Image], torch.Tensor], images: Sequence[Image.Image]) -> torch.Tensor:
    return torch.stack([transform(image) for image in images])


def _unit(embeds: Any) -> np.ndarray:
    embeds = embeds if isinstance(embeds, torch.Tensor) else embeds.pooler_output
    return F.normalize(embeds.float(), dim=-1).cpu().numpy()


class TransformersTeacher:
    """A CLIP that `AutoModel` loads.

    Args:
        name (`str`): Folder or Hub id, with tokenizer and image processor.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`): Where it runs.

    Raises:
        ValueError: If the model is no dual encoder, or of a family that reads text another way.
    """

    def __init__(self, name: str, device: str | torch.device = "cpu"):
        self.name, self.device = name, device
        self.model = AutoModel.from_pretrained(name).eval().to(device)
        if not hasattr(self.model, "get_text_features") or not hasattr(self.model, "logit_scale"):
            raise ValueError(
                f"Expected a dual encoder such as CLIPModel at {name!r}, got {type(self.model).__name__}."
            )
        if self.model.config.model_type in ("siglip", "siglip2"):
            raise ValueError(
                f"{name!r} is a SigLIP, which reads text padded to a fixed length. Name it as {OPEN_CLIP}NAME:PRETRAINED."
            )
        self.tokenizer = AutoTokenizer.from_pretrained(name)
        image_processor = AutoImageProcessor.from_pretrained(name, backend="pil")
        self.preprocess = functools.partial(_process, image_processor)
        processor = SimpleNamespace(image_processor=image_processor, tokenizer=self.tokenizer)
        self.fingerprint = combine_keys([fingerprint_model(self.model), fingerprint_processor(processor)])
        self.logit_scale = self.model.logit_scale.item()
        self.width = self.encode_texts(["a"]).shape[1]

    @torch.no_grad()
    def encode_images(self, pixel_values: torch.Tensor) -> np.ndarray:
        """`(B, D)` float32, L2-normalised."""
        return _unit(self.model.get_image_features(pixel_values=pixel_values.to(self.device)))

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """`(B, D)` float32, L2-normalised; a text too long is cut, keeping EOS, and counted in a warning."""
        longest = min(self.tokenizer.model_max_length, self.model.config.text_config.max_position_embeddings)
        tokens = tokenize_captions(self.tokenizer, texts, longest)
        input_ids, mask = tokens.pad(np.arange(len(texts)), self.tokenizer.pad_token_id)
        inputs = {"input_ids": torch.from_numpy(input_ids).long(), "attention_mask": torch.from_numpy(mask).long()}
        return _unit(self.model.get_text_features(**{name: ids.to(self.device) for name, ids in inputs.items()}))


class OpenClipTeacher:
    """A model of the package `open_clip_torch`.

    Args:
        spec (`str`): `NAME:PRETRAINED`.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`): Where it runs.

    Raises:
        ImportError: If the package is not installed.
        ValueError: If the spec has another form.
    """

    def __init__(self, spec: str, device: str | torch.device = "cpu"):
        name, _, pretrained = spec.partition(":")
        if not name or not pretrained:
            raise ValueError(
                f"Expected {OPEN_CLIP}NAME:PRETRAINED, got {OPEN_CLIP}{spec}. A tag or a file names the weights."
            )
        try:
            import open_clip
        except ImportError as error:
            raise ImportError(f"{OPEN_CLIP}{spec} needs the package: pip install open_clip_torch") from error
        self.name, self.device = f"{OPEN_CLIP}{spec}", device
        model, _, transform = open_clip.create_model_and_transforms(name, pretrained=pretrained)
        self.model, self.tokenizer = model.eval().to(device), open_clip.get_tokenizer(name)
        self.preprocess = functools.partial(_transform, transform)  # the one for evaluation
        settings = {"name": name, "transform": repr(transform)}
        described = SimpleNamespace(config=SimpleNamespace(to_dict=lambda: settings), state_dict=self.model.state_dict)
        self.fingerprint = fingerprint_model(described)
        self.logit_scale = self.model.logit_scale.item()
        self.width = self.encode_texts(["a"]).shape[1]

    @torch.no_grad()
    def encode_images(self, pixel_values: torch.Tensor) -> np.ndarray:
        """`(B, D)` float32, L2-normalised."""
        return _unit(self.model.encode_image(pixel_values.to(self.device)))

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """`(B, D)` float32, L2-normalised; a text too long is cut."""
        return _unit(self.model.encode_text(self.tokenizer(list(texts)).to(self.device)))


def build_teacher(spec: str, device: str | torch.device = "cpu") -> ReinforcementTeacher:
    """The teacher a spec names: see the table above."""
    if spec.startswith(OPEN_CLIP):
        return OpenClipTeacher(spec.removeprefix(OPEN_CLIP), device)
    return TransformersTeacher(spec, device)


class TransformersCaptioner:
    """A captioner that writes from pixels alone: BLIP, GIT, or a vision encoder with a text decoder (ViT-GPT2).

    One caption an image is the likeliest, word by word; several are drawn, equal ones kept once.

    Args:
        name (`str`): Folder or Hub id, with tokenizer and image processor.
        captions (`int`, *optional*, defaults to 1): Of an image.
        max_new_tokens (`int`, *optional*, defaults to 40): Of a caption.
        seed (`int`, *optional*, defaults to 0): Of the draws.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`): Where it runs.

    Raises:
        ValueError: If a number is below 1.
    """

    def __init__(
        self,
        name: str,
        *,
        captions: int = 1,
        max_new_tokens: int = 40,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ):
        if captions < 1 or max_new_tokens < 1:
            raise ValueError(f"Expected at least one caption and one token, got {captions} and {max_new_tokens}.")
        self.name, self.captions, self.max_new_tokens, self.seed, self.device = (
            name,
            captions,
            max_new_tokens,
            seed,
            device,
        )
        self.model = AutoModelForImageTextToText.from_pretrained(name).eval().to(device)
        self.tokenizer = AutoTokenizer.from_pretrained(name)
        self.image_processor = AutoImageProcessor.from_pretrained(name, backend="pil")
        processor = SimpleNamespace(image_processor=self.image_processor, tokenizer=self.tokenizer)
        settings = json.dumps([captions, max_new_tokens, seed])
        self.fingerprint = combine_keys([fingerprint_model(self.model), fingerprint_processor(processor), settings])

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image], lot: int = 0) -> list[list[str]]:
        """Captions of each image.

        Args:
            images (`Sequence[PIL.Image]`): RGB.
            lot (`int`, *optional*, defaults to 0): With the seed it decides the draws.

        Returns:
            `list[list[str]]`: With words, of each image none to `captions`.
        """
        pixel_values = _process(self.image_processor, images).to(self.device)
        how = {"do_sample": False, "num_beams": 1}
        if self.captions > 1:
            how = {"do_sample": True, "top_p": SAMPLED_TOP_P, "top_k": 0, "num_return_sequences": self.captions}
        with torch.random.fork_rng():
            torch.manual_seed(self.seed * 2**32 + lot)
            tokens = self.model.generate(pixel_values=pixel_values, max_new_tokens=self.max_new_tokens, **how)
        texts = [text.strip() for text in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]
        per_image = [texts[start : start + self.captions] for start in range(0, len(texts), self.captions)]
        return [[text for text in dict.fromkeys(row) if text] for row in per_image]
