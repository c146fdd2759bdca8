"""A student as the `CLIPModel` it is: readable by every CLIP program, without code of ours.

A ViT student differs from CLIP in its weights alone, so a stock `CLIPModel` holds it bit for bit.
"""

import os

import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
    PreTrainedModel,
)

from modeling_dclip.modeling_dclip import DCLIPModel
from modeling_dclip.processing_dclip import DCLIPProcessor


def has_native_twin(model: PreTrainedModel) -> bool:
    """Whether a `CLIPModel` can hold it: a ViT student with CLIP's own positions."""
    return model.config.model_type == "dclip" and model.config.vision_config.position_embedding_type == "absolute"


def to_native_clip(model: DCLIPModel) -> CLIPModel:
    """Make the `CLIPModel` with a student's weights.

    Args:
        model ([`DCLIPModel`]): With CLIP's own positions.

    Returns:
        `CLIPModel`: In eval mode, float32; its outputs are the student's, bit for bit.

    Raises:
        ValueError: If there is no such twin.
    """
    if not has_native_twin(model):
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
    twin = CLIPModel(config)
    twin.load_state_dict(model.state_dict())
    return twin.eval()


def _native_fields(config, config_class):
    known = config_class().to_dict()
    return {name: value for name, value in config.to_dict().items() if name in known and name != "model_type"}


def to_native_processor(processor: DCLIPProcessor, folder: str | os.PathLike) -> CLIPProcessor:
    """Make the stock processor with a student's settings.

    Args:
        processor ([`DCLIPProcessor`]): The student's.
        folder (`str` or `os.PathLike`): Where the tokenizer's files may be written and read back without what names
            our code.

    Returns:
        `CLIPProcessor`: The same pixels and token ids; it does not cut long texts unless told to.
    """
    settings = processor.image_processor.to_dict()
    ours = ("image_processor_type", "processor_class", "auto_map")
    image_processor = CLIPImageProcessorPil(**{name: value for name, value in settings.items() if name not in ours})
    processor.tokenizer.save_pretrained(folder)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    for name in ("auto_map", "processor_class", "is_local", "local_files_only"):  # ours, and where it was read
        tokenizer.init_kwargs.pop(name, None)
    return CLIPProcessor(image_processor, tokenizer)


@torch.no_grad()
def check_twin(model: DCLIPModel, twin: CLIPModel, batch: dict[str, torch.Tensor]) -> None:
    """Prove that a twin computes what the student does.

    Args:
        model ([`DCLIPModel`]): The student.
        twin (`CLIPModel`): Its twin, as loaded from disk.
        batch (`dict`): `input_ids`, `attention_mask`, `pixel_values`.

    Raises:
        ValueError: If an output is not the same, bit for bit.
    """
    ours, theirs = model(**batch), twin(**batch)
    for name in ("image_embeds", "text_embeds", "logits_per_image", "logits_per_text"):
        if not torch.equal(ours[name], theirs[name]):
            apart = (ours[name].float() - theirs[name].float()).abs().max()
            raise ValueError(
                f"Expected the native twin's {name} to be the student's, got a difference of {apart:.1e}."
            )
