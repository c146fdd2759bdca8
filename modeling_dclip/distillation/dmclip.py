"""Make a DM-CLIP about to train: from scratch, around a pretrained text tower, or from a checkpoint.

Source: "Knowledge Distillation from Transformer to Mamba for an efficient CLIP" [M]; "MobileCLIP", arXiv 2311.17049 [MC]; PAPERS.md.
"""

from dataclasses import fields
from typing import Any

import torch
from transformers import CLIPImageProcessorPil

from modeling_dclip.configuration_dmclip import DMCLIP_PRESETS, DMCLIPConfig, DMCLIPTextConfig, DMCLIPVisionConfig
from modeling_dclip.distillation.reinforced_arguments import DMCLIPArguments
from modeling_dclip.modeling_dmclip import DMCLIPModel
from modeling_dclip.modeling_dmclip_text import DMCLIPTextModel
from modeling_dclip.processing_dclip import DCLIPProcessor

# What the section has a field of its own for, or the tokenizer decides.
_SET_ELSEWHERE = {
    "image_size",
    "projection_dim",
    "vocab_size",
    "max_position_embeddings",
    "bos_token_id",
    "eos_token_id",
}


def _check_fields(name: str, given: dict[str, Any], config_class: type) -> None:
    """Configs swallow unknown names, so a typo in a recipe would go unnoticed."""
    known = {f.name for f in fields(config_class)} - _SET_ELSEWHERE
    unknown = sorted(set(given) - known)
    if unknown:
        raise ValueError(
            f"dmclip.{name}: expected fields of {config_class.__name__} that the section does not set itself, got {unknown[0]!r}."
        )


def _vision_config(args: DMCLIPArguments) -> DMCLIPVisionConfig:
    _check_fields("vision_config", args.vision_config, DMCLIPVisionConfig)
    config = DMCLIPVisionConfig(**{**DMCLIP_PRESETS[args.preset], **args.vision_config, "image_size": args.image_size})
    return config if "window_sizes" in args.vision_config else config.for_image_size(args.image_size)


def _text_config(args: DMCLIPArguments, tokenizer: Any) -> dict[str, Any]:
    _check_fields("text_config", args.text_config, DMCLIPTextConfig)
    if args.text_model is not None and args.text_config:
        raise ValueError(
            f"dmclip.text_config: expected nothing beside text_model {args.text_model!r}, which has its own."
        )
    return {
        **args.text_config,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def build_dmclip(args: DMCLIPArguments, tokenizer: Any) -> tuple[DMCLIPModel, DCLIPProcessor]:
    """A DM-CLIP about to train, in float32, and its processor.

    Args:
        args ([`DMCLIPArguments`]): From scratch by `preset`, `vision_config`, `text_config`; with `text_model` around a pretrained text
            tower; with `model` a whole checkpoint. The draw of weights is torch's: seed before.
        tokenizer (`CLIPTokenizer`): Decides vocabulary, special tokens and length of a text tower that is made.

    Returns:
        `tuple[DMCLIPModel, DCLIPProcessor]`: The processor of a checkpoint is its own, at the size it trains at, with this tokenizer.

    Raises:
        ValueError: If a field of a config is unknown, `projection_dim` is not the checkpoint's or the text tower's, or the tokenizer
            does not fit the text tower.
    """
    if args.model is not None:
        model, processor = _load_checkpoint(args, tokenizer)
    else:
        model, processor = (
            _make_model(args, tokenizer),
            DCLIPProcessor(CLIPImageProcessorPil(**_sizes(args.image_size)), tokenizer),
        )
    _check_tokenizer(tokenizer, model.config.text_config)
    return model, processor


def find_image_size(args: DMCLIPArguments) -> int:
    """Pixels a side that a DM-CLIP will train at: those given, else those of the checkpoint."""
    return args.image_size or DMCLIPConfig.from_pretrained(args.model).vision_config.image_size


def _load_checkpoint(args: DMCLIPArguments, tokenizer: Any) -> tuple[DMCLIPModel, DCLIPProcessor]:
    config = DMCLIPConfig.from_pretrained(args.model)
    _check_projection(args, config.projection_dim, f"model {args.model!r}")
    image_processor = DCLIPProcessor.from_pretrained(args.model).image_processor
    if args.image_size not in (None, config.vision_config.image_size):
        config.vision_config = config.vision_config.for_image_size(args.image_size)
        image_processor = CLIPImageProcessorPil.from_dict(image_processor.to_dict() | _sizes(args.image_size))
    config.freeze_text = args.freeze_text
    model = DMCLIPModel.from_pretrained(args.model, config=config, dtype=torch.float32)
    return model, DCLIPProcessor(image_processor, tokenizer)


def _make_model(args: DMCLIPArguments, tokenizer: Any) -> DMCLIPModel:
    text, text_config, projection_dim = None, _text_config(args, tokenizer), args.projection_dim
    if args.text_model is not None:
        text = DMCLIPTextModel.from_pretrained(args.text_model, dtype=torch.float32)
        text_config, projection_dim = text.config, text.config.projection_dim
        _check_projection(args, projection_dim, f"text_model {args.text_model!r}")
    config = DMCLIPConfig(
        text_config=text_config,
        vision_config=_vision_config(args),
        projection_dim=projection_dim,
        freeze_text=args.freeze_text,
    )
    model = DMCLIPModel(config)
    if text is not None:
        model.text_model.load_state_dict(text.state_dict())
    return model


def _sizes(side: int) -> dict[str, dict[str, int]]:
    return {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}


def _check_projection(args: DMCLIPArguments, width: int, whose: str) -> None:
    if args.projection_dim not in (None, width):
        raise ValueError(
            f"dmclip.projection_dim: expected {width}, as {whose} has it, got {args.projection_dim}. Leave it out."
        )


def _check_tokenizer(tokenizer: Any, config: DMCLIPTextConfig) -> None:
    if len(tokenizer) != config.vocab_size or tokenizer.eos_token_id != config.eos_token_id:
        raise ValueError(
            f"Expected a tokenizer of the text tower's {config.vocab_size} tokens that ends with {config.eos_token_id}, got "
            f"{len(tokenizer)} tokens ending with {tokenizer.eos_token_id} ('{tokenizer.name_or_path}'). Name the tower's in dmclip.tokenizer."
        )
