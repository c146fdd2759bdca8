"""A dual encoder made of two pretrained towers: an image encoder and a text encoder, joined by two new projections.

Source: "LiT: Zero-Shot Transfer with Locked-image text Tuning", arXiv 2111.07991; docs/papers.md.
"""

import os
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import (
    AutoModel,
    PreTrainedModel,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    VisionTextDualEncoderProcessor,
)
from transformers.models.clip.modeling_clip import CLIPOutput

from modeling_dclip.encoders.families import WrongModelError
from modeling_dclip.encoders.loading import load_checked, load_image_processor, load_tokenizer


def load_towers(
    vision_model: str | os.PathLike, text_model: str | os.PathLike, projection_dim: int
) -> tuple[VisionTextDualEncoderModel, VisionTextDualEncoderProcessor]:
    """Join two pretrained towers to a dual encoder. Its two projections are drawn from torch's generator.

    Args:
        vision_model (`str` or `os.PathLike`): Folder or Hub id of an image encoder whose output has a `pooler_output`
            `(B, width)`: a ViT, DINOv2, a model of timm (`timm_wrapper`), ...
        text_model (`str` or `os.PathLike`): Folder or Hub id of a text encoder with such an output: BERT and its kin.
        projection_dim (`int`): Width of the shared space.

    Returns:
        `tuple`: The model in float32 on the CPU, in eval mode, and its processor.

    Raises:
        OSError: If a model is missing.
        WrongModelError: If a tower does not embed an image, or a text, as one vector.
        ValueError: If a weight is missing, which would be random, or files of a processor are missing or damaged.
    """
    image_processor, tokenizer = load_image_processor(vision_model), load_tokenizer(text_model)
    vision, text = load_checked(AutoModel, vision_model), load_checked(AutoModel, text_model)
    pixels = image_processor(images=[Image.new("RGB", (32, 32))], return_tensors="pt")["pixel_values"]
    _require_pooled(vision, {"pixel_values": pixels}, f"an image encoder at '{vision_model}'")
    ids = tokenizer(["a photo of a dog"], return_tensors="pt")["input_ids"]
    _require_pooled(text, {"input_ids": ids}, f"a text encoder at '{text_model}'")
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        vision.config, text.config, projection_dim=projection_dim
    )
    dual = VisionTextDualEncoderModel(config, vision_model=vision, text_model=text)
    return dual.eval(), VisionTextDualEncoderProcessor(image_processor, tokenizer)


@torch.no_grad()
def _require_pooled(tower: PreTrainedModel, example: dict[str, torch.Tensor], what: str) -> None:
    """Run a tower once, and refuse one that gives no vector an input.

    The configurations of timm's models call the vector's width by another name; they get the one that is read.
    """
    (reads,) = example
    if tower.main_input_name != reads:
        raise WrongModelError(
            f"Expected {what}, which reads {reads}, got {type(tower).__name__}, which reads {tower.main_input_name}."
        )
    pooled: Any = getattr(tower(**example), "pooler_output", None)
    if pooled is None or pooled.ndim != 2:
        got = "none" if pooled is None else f"one of shape {tuple(pooled.shape)}"
        raise WrongModelError(
            f"Expected {what} that gives one vector an input, a pooler_output (B, width), got {got} from "
            f"{type(tower).__name__}. Name another."
        )
    if not hasattr(tower.config, "hidden_size"):
        tower.config.hidden_size = pooled.shape[1]
    if tower.config.hidden_size != pooled.shape[1]:
        raise WrongModelError(
            f"Expected {what} that gives vectors of its hidden_size {tower.config.hidden_size}, got "
            f"{pooled.shape[1]} from {type(tower).__name__}. Name another."
        )


class JoinedTowers(nn.Module):
    """A dual encoder of two towers in training.

    A frozen tower stays in eval mode, and what it gave for an input can be handed in instead of the input. Parameters
    are the dual encoder's own, under the same names.

    Args:
        dual (`VisionTextDualEncoderModel`): From [`load_towers`].
        freeze_vision, freeze_text (`bool`): Whether the tower keeps its weights. The projections always train.
    """

    def __init__(self, dual: VisionTextDualEncoderModel, *, freeze_vision: bool, freeze_text: bool):
        super().__init__()
        self.vision_model, self.text_model = dual.vision_model, dual.text_model
        self.visual_projection, self.text_projection = dual.visual_projection, dual.text_projection
        self.logit_scale = dual.logit_scale
        self._dual = (dual,)  # in a tuple: its parameters are registered already
        self._frozen = [
            tower for tower, frozen in ((self.vision_model, freeze_vision), (self.text_model, freeze_text)) if frozen
        ]
        for tower in self._frozen:
            tower.requires_grad_(False)
        self.train(dual.training)

    @property
    def dual(self) -> VisionTextDualEncoderModel:
        """The dual encoder whose parameters these are."""
        return self._dual[0]

    def train(self, mode: bool = True) -> "JoinedTowers":
        """Set the mode of what trains; frozen towers stay in eval mode."""
        super().train(mode)
        for tower in self._frozen:
            tower.eval()
        return self

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """As the dual encoder's own."""
        self.dual.gradient_checkpointing_enable(**options)

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        text_features: torch.Tensor | None = None,
    ) -> CLIPOutput:
        """Embed B images and B texts.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`, *optional*): Images.
            input_ids, attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): Texts.
            image_features (`torch.Tensor` of shape `(B, width)`, *optional*): In place of `pixel_values`: the image
                tower's `pooler_output`.
            text_features (`torch.Tensor` of shape `(B, width)`, *optional*): Likewise, in place of `input_ids`.

        Returns:
            `CLIPOutput`: With `image_embeds` and `text_embeds` `(B, D)`, L2-normalised.
        """
        if image_features is None:
            image_features = self.vision_model(pixel_values=pixel_values).pooler_output
        if text_features is None:
            text_features = self.text_model(input_ids=input_ids, attention_mask=attention_mask).pooler_output
        return CLIPOutput(
            image_embeds=F.normalize(self.visual_projection(image_features), dim=-1),
            text_embeds=F.normalize(self.text_projection(text_features), dim=-1),
        )
