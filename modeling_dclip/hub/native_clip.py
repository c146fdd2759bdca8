"""A student as what it is without our code: a stock `CLIPModel`, which other programs are given.

A ViT student differs from CLIP only in its weights, so the outputs are the same, bit for bit.
"""

from typing import Any

import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from modeling_dclip.data.files import temporary_folder
from modeling_dclip.encoders.loading import NATIVE_ENCODERS
from modeling_dclip.processing_dclip import DCLIPProcessor


def is_stock_clip(model: PreTrainedModel) -> bool:
    """Whether a model is a stock CLIP but for its code: a dual ViT student with CLIP's own (absolute) positions."""
    return model.config.model_type == "dclip" and model.config.is_stock_clip


def require_stock_clip(model: PreTrainedModel, reader: str) -> None:
    """Refuse a model that programs for CLIP cannot read without custom code.

    Args:
        model (`PreTrainedModel`): Any model of this package.
        reader (`str`): The program, for the message.

    Raises:
        ValueError: If it is no stock CLIP; the message names the formats that take it.
    """
    if not is_stock_clip(model):
        vision = getattr(model.config, "vision_config", model.config)
        positions = getattr(vision, "position_embedding_type", None)
        kind = f"{model.config.model_type!r}" + (f" with {positions!r} positions" if positions else "")
        on_hub = "without" if model.config.model_type in NATIVE_ENCODERS else "with"
        raise ValueError(
            f"Expected a DCLIP student that is a plain ViT, which {reader} has, got {kind}. The formats onnx and "
            f"torch_export take this model; on the Hub it is read {on_hub} trust_remote_code=True."
        )


def to_native_clip(model: PreTrainedModel) -> CLIPModel:
    """Make a `CLIPModel` of a student's weights.

    Args:
        model ([`DCLIPModel`]): A ViT student with CLIP's own positions.

    Returns:
        `CLIPModel`: Float32, in eval mode. Its outputs are the student's, bit for bit.

    Raises:
        ValueError: If it is no stock CLIP.
    """
    if not is_stock_clip(model):
        raise ValueError(
            f"Expected a ViT student with absolute positions, which CLIPModel has, got {model.config.model_type!r} "
            f"with {getattr(model.config.vision_config, 'position_embedding_type', 'other')!r} positions."
        )
    config = CLIPConfig(
        text_config=_native_fields(model.config.text_config, CLIPTextConfig),
        vision_config=_native_fields(model.config.vision_config, CLIPVisionConfig),
        projection_dim=model.config.projection_dim,
        logit_scale_init_value=model.config.logit_scale_init_value,
        initializer_factor=model.config.initializer_factor,
    )
    native = CLIPModel(config)
    native.load_state_dict(model.state_dict())
    return native.eval()


def _native_fields(config: Any, config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """The fields of a config that its stock class has too."""
    known = config_class().to_dict()
    return {name: value for name, value in config.to_dict().items() if name in known and name != "model_type"}


def to_native_processor(processor: DCLIPProcessor) -> CLIPProcessor:
    """Make the stock processor with a student's settings.

    Args:
        processor ([`DCLIPProcessor`]): The student's processor.

    Returns:
        `CLIPProcessor`: Makes the same pixels and token ids. It truncates long texts only if told to.
    """
    settings = processor.image_processor.to_dict()
    ours = ("image_processor_type", "processor_class", "auto_map")
    image_processor = CLIPImageProcessorPil(**{name: value for name, value in settings.items() if name not in ours})
    with temporary_folder() as folder:  # the tokenizer is read back without what names our code
        processor.tokenizer.save_pretrained(folder)
        tokenizer = CLIPTokenizer.from_pretrained(folder)
    for name in ("auto_map", "processor_class", "is_local", "local_files_only"):  # our code, and where it was read
        tokenizer.init_kwargs.pop(name, None)
    return CLIPProcessor(image_processor, tokenizer)


@torch.no_grad()
def check_native(model: PreTrainedModel, native: CLIPModel, batch: dict[str, torch.Tensor]) -> None:
    """Check that a stock CLIP's outputs are the student's.

    Args:
        model ([`DCLIPModel`]): The student.
        native (`CLIPModel`): The same, as loaded from disk without our code.
        batch (`dict[str, torch.Tensor]`): `input_ids`, `attention_mask` and `pixel_values`.

    Raises:
        ValueError: If an output is not the same, bit for bit.
    """
    ours, theirs = model(**batch), native(**batch)
    for name in ("image_embeds", "text_embeds", "logits_per_image", "logits_per_text"):
        if not torch.equal(ours[name], theirs[name]):
            apart = (ours[name].float() - theirs[name].float()).abs().max()
            raise ValueError(
                f"Expected {name} of the stock CLIP to be the student's, got a difference of {apart:.1e}."
            )
