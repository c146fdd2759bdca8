"""Whole weights of a student, and the student as the `CLIPModel` it is: readable by every CLIP program, without code
of ours.

A ViT student differs from CLIP in its weights alone, so a stock `CLIPModel` holds it bit for bit.
"""

import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
    PreTrainedModel,
)

from modeling_dclip.encoders.loading import check_processor
from modeling_dclip.modeling_dclip import DCLIPModel
from modeling_dclip.modeling_dmclip import DMCLIPModel
from modeling_dclip.processing_dclip import DCLIPProcessor

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FOLDER, ADAPTER_WEIGHTS = "adapter", "adapter_model.safetensors"  # where training writes adapters
# By model_type. A stock CLIP is the base that an adapter names, and becomes a DCLIP.
DUAL_ENCODERS = {"dclip": DCLIPModel, "clip": DCLIPModel, "dmclip": DMCLIPModel}


def load_dual_encoder(model: str | os.PathLike) -> PreTrainedModel:
    """Load a dual encoder with whole weights, in float32: who loads what is published chooses a precision.

    PEFT adapters, in the folder or in `adapter/` of one without whole weights, are loaded over the model they name and
    merged into it.

    Args:
        model (`str` or `os.PathLike`): Folder or Hub id.

    Returns:
        [`DCLIPModel`] or [`DMCLIPModel`]: In eval mode, on the CPU.

    Raises:
        ImportError: If there are adapters and `peft` is not installed.
        ValueError: If it is no dual encoder, a weight is missing, or the file is damaged.
    """
    if (adapter := find_adapter(model)) is not None:
        return _merge_adapters(adapter)
    model_type = AutoConfig.from_pretrained(model).model_type
    if model_type not in DUAL_ENCODERS:
        raise ValueError(
            f"Expected a dual encoder ({', '.join(DUAL_ENCODERS)}) at '{model}', got {model_type!r}. Give the folder "
            "that holds both towers."
        )
    return load_whole(DUAL_ENCODERS[model_type], model)


def find_adapter(model: str | os.PathLike) -> Path | None:
    """The folder of an adapter that stands in place of whole weights:
    the model's own, or where training with `merge_adapter: false` put it.
    """
    folder, inner = Path(model), Path(model) / ADAPTER_FOLDER
    if (folder / ADAPTER_CONFIG).is_file():
        return folder
    return inner if (inner / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file() else None


def load_whole(model_class: type[PreTrainedModel], model: str | os.PathLike) -> PreTrainedModel:
    """Load a model of which every weight is there, in float32 and eval mode.

    Args:
        model_class (`type[PreTrainedModel]`): What to load it as.
        model (`str` or `os.PathLike`): Folder or Hub id.

    Returns:
        `PreTrainedModel`: On the CPU.

    Raises:
        ValueError: If a weight is missing, which would be drawn at random, or the file is damaged.
    """
    try:
        loaded, report = model_class.from_pretrained(model, dtype=torch.float32, output_loading_info=True)
    except SafetensorError as error:
        raise ValueError(
            f"Expected whole weights at '{model}', got a damaged file ({error}). Fetch it again."
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"Expected all weights at '{model}', got none for {missing[0]} and {len(missing)} in all.")
    return loaded.eval()


def load_processor(model: str | os.PathLike) -> DCLIPProcessor:
    """Load the processor of a dual encoder.

    Args:
        model (`str` or `os.PathLike`): Folder or Hub id.

    Returns:
        [`DCLIPProcessor`]

    Raises:
        OSError: If the image processor's file is missing.
        ValueError: If the tokenizer's are.
    """
    processor = DCLIPProcessor.from_pretrained(model)
    check_processor(processor, str(model))
    return processor


def _merge_adapters(folder: Path) -> PreTrainedModel:
    try:
        from peft import PeftConfig, PeftModel
    except ImportError as error:
        raise ImportError(
            f"'{folder}' holds adapters: expected peft, got {error}. Install it with `pip install "
            "modeling_dclip[peft]`."
        ) from error
    base = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    if not base:
        raise ValueError(
            f"Expected base_model_name_or_path in {folder / ADAPTER_CONFIG}, got none. Name the model there."
        )
    return PeftModel.from_pretrained(load_dual_encoder(base), str(folder)).merge_and_unload().eval()


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
