"""The models behind a reinforced dataset: teachers that embed augmented images and captions, and captioners.

| spec of a teacher | what |
|---|---|
| a folder or Hub id | a CLIP or SigLIP of transformers, or a model of this package |
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
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from modeling_dclip.encoders.families import WrongModelError, projected, tokenize_texts
from modeling_dclip.encoders.fingerprints import combine_keys, fingerprint_model, fingerprint_processor
from modeling_dclip.encoders.loading import load_pair
from modeling_dclip.encoders.open_clip import OPEN_CLIP_PREFIX, fingerprint_open_clip
from modeling_dclip.processing_dclip import cut_long

SAMPLED_TOP_P = 0.9  # of captions, where several are wanted


class ReinforcementTeacher(Protocol):
    """A frozen dual encoder with its own preprocessing.

    Attributes:
        name (`str`): Its spec.
        fingerprint (`str`): Equal ones mean equal embeddings.
        width (`int`): D.
        logit_scale (`float`): As trained; a logarithm.
        preprocess (`Callable`): From RGB images to the model's input, `(B, 3, H, W)`, with its own size, crop and
            normalisation. It is sent to the data loader's workers, so it holds no model.
    """

    name: str
    fingerprint: str
    preprocess: Callable[[Sequence[Image.Image]], torch.Tensor]
    width: int
    logit_scale: float

    def encode_images(self, pixel_values: torch.Tensor) -> np.ndarray:
        """`(B, D)` float32, L2-normalised."""

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """`(B, D)` float32, L2-normalised; a text that is too long is cut."""


def _process(image_processor: Any, images: Sequence[Image.Image]) -> torch.Tensor:
    cut = [cut_long(image, image_processor) for image in images]
    return image_processor(images=cut, return_tensors="pt")["pixel_values"]


class _DualEncoderTeacher:
    """A model with its processor: what both kinds of teacher share."""

    fingerprint: str

    def __init__(self, name: str, device: str | torch.device):
        self.name, self.device = name, device
        model, self.processor = load_pair(name)
        if not hasattr(model, "logit_scale"):
            raise WrongModelError(
                f"Expected a dual encoder with a trained logit_scale at {name!r}, got {type(model).__name__}."
            )
        self.model = model.to(device)
        self.preprocess: Callable[[Sequence[Image.Image]], torch.Tensor] = functools.partial(
            _process, self.processor.image_processor
        )
        self.logit_scale = self.model.logit_scale.item()
        self.width = self.encode_texts(["a"]).shape[1]

    def _unit(self, output: Any) -> np.ndarray:
        return F.normalize(projected(output).float(), dim=-1).cpu().numpy()

    @torch.no_grad()
    def encode_images(self, pixel_values: torch.Tensor) -> np.ndarray:
        """`(B, D)` float32, L2-normalised."""
        return self._unit(self.model.get_image_features(pixel_values=pixel_values.to(self.device)))

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """`(B, D)` float32, L2-normalised; a text that is too long is cut, keeping EOS."""
        tokens = tokenize_texts(self.model, self.processor, texts)
        return self._unit(self.model.get_text_features(**{name: ids.to(self.device) for name, ids in tokens.items()}))


class TransformersTeacher(_DualEncoderTeacher):
    """A dual encoder that `AutoModel` loads: CLIP, SigLIP, this package's.

    Args:
        name (`str`): Folder or Hub id, with tokenizer and image processor.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`): Where it runs.

    Raises:
        TypeError: If the model is no dual encoder.
        ValueError: If the model reads more of an image than its pixels, or as in
            [`~modeling_dclip.encoders.loading.load_pair`].
    """

    def __init__(self, name: str, device: str | torch.device = "cpu"):
        super().__init__(name, device)
        read = self.processor.image_processor.model_input_names
        if len(read) > 1:
            raise ValueError(
                f"Expected a teacher that reads pixel_values alone, got one that reads {read} at {name!r}."
            )
        self.fingerprint = combine_keys([fingerprint_model(self.model), fingerprint_processor(self.processor)])


class OpenClipTeacher(_DualEncoderTeacher):
    """A model of the package `open_clip_torch`.

    Args:
        spec (`str`): `NAME:PRETRAINED`.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`): Where it runs.

    Raises:
        ImportError: If the package is not installed.
        ValueError: If the spec has another form, or open_clip does not know the name or the tag.
    """

    def __init__(self, spec: str, device: str | torch.device = "cpu"):
        super().__init__(f"{OPEN_CLIP_PREFIX}{spec}", device)
        self.fingerprint = fingerprint_open_clip(self.model, self.processor)


def build_teacher(spec: str, device: str | torch.device = "cpu") -> ReinforcementTeacher:
    """Load the teacher that a spec names; see the table at the top of this module."""
    if spec.startswith(OPEN_CLIP_PREFIX):
        return OpenClipTeacher(spec.removeprefix(OPEN_CLIP_PREFIX), device)
    return TransformersTeacher(spec, device)


class TransformersCaptioner:
    """A captioner that reads only pixels: BLIP, GIT, or a vision encoder with a text decoder (ViT-GPT2).

    A single caption is decoded greedily. Several captions are sampled, and equal ones are kept once.

    Args:
        name (`str`): Folder or Hub id, with tokenizer and image processor.
        captions (`int`, *optional*, defaults to 1): Captions per image.
        max_new_tokens (`int`, *optional*, defaults to 40): Tokens per caption.
        seed (`int`, *optional*, defaults to 0): Seed of the sampling.
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
        self.model = AutoModelForImageTextToText.from_pretrained(name, trust_remote_code=False).eval().to(device)
        self.tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        self.image_processor = AutoImageProcessor.from_pretrained(name, backend="pil", trust_remote_code=False)
        processor = SimpleNamespace(image_processor=self.image_processor, tokenizer=self.tokenizer)
        settings = json.dumps([captions, max_new_tokens, seed])
        self.fingerprint = combine_keys([fingerprint_model(self.model), fingerprint_processor(processor), settings])

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image], lot: int = 0) -> list[list[str]]:
        """Write captions of images.

        Args:
            images (`Sequence[PIL.Image]`): RGB.
            lot (`int`, *optional*, defaults to 0): The sampling depends on the seed and the lot.

        Returns:
            `list[list[str]]`: For each image 0 to `captions` texts, none of them blank.
        """
        pixel_values = _process(self.image_processor, images).to(self.device)
        how: dict[str, Any] = {"do_sample": False, "num_beams": 1}
        if self.captions > 1:
            how = {"do_sample": True, "top_p": SAMPLED_TOP_P, "top_k": 0, "num_return_sequences": self.captions}
        with torch.random.fork_rng():
            torch.manual_seed(self.seed * 2**32 + lot)
            tokens = self.model.generate(pixel_values=pixel_values, max_new_tokens=self.max_new_tokens, **how)
        texts = [text.strip() for text in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]
        per_image = [texts[start : start + self.captions] for start in range(0, len(texts), self.captions)]
        return [[text for text in dict.fromkeys(row) if text] for row in per_image]
