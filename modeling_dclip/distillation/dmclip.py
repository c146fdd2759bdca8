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
        `tuple[DMCLIPModel, DCLIPProcessor]`

    Raises:
        ValueError: If a field of a config is unknown, or the pretrained text tower does not fit tokenizer or shared space.
    """
    if args.model is not None:
        config = DMCLIPConfig.from_pretrained(args.model)
        if config.vision_config.image_size != args.image_size:
            config.vision_config = config.vision_config.for_image_size(args.image_size)
        config.freeze_text = args.freeze_text
        model = DMCLIPModel.from_pretrained(args.model, config=config, dtype=torch.float32)
    else:
        text = None
        text_config = _text_config(args, tokenizer)
        if args.text_model is not None:
            text = DMCLIPTextModel.from_pretrained(args.text_model, dtype=torch.float32)
            text_config = text.config
        model = DMCLIPModel(
            DMCLIPConfig(
                text_config=text_config,
                vision_config=_vision_config(args),
                projection_dim=args.projection_dim if text is None else text.config.projection_dim,
                freeze_text=args.freeze_text,
            )
        )
        if text is not None:
            model.text_model.load_state_dict(text.state_dict())
    _check_tokenizer(tokenizer, model.config.text_config)
    side = args.image_size
    size = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    return model, DCLIPProcessor(CLIPImageProcessorPil(**size), tokenizer)


def _check_tokenizer(tokenizer: Any, config: DMCLIPTextConfig) -> None:
    if len(tokenizer) != config.vocab_size or tokenizer.eos_token_id != config.eos_token_id:
        raise ValueError(
            f"Expected a tokenizer of the text tower's {config.vocab_size} tokens that ends with {config.eos_token_id}, got "
            f"{len(tokenizer)} tokens ending with {tokenizer.eos_token_id} ('{tokenizer.name_or_path}'). Name the tower's in dmclip.tokenizer."
        )
