"""Build the DM-CLIP that will train: from scratch, around pretrained towers, or from a checkpoint.

Source: "Knowledge Distillation from Transformer to Mamba for an efficient CLIP" [M]; "MobileCLIP", arXiv 2311.17049
[MC]; docs/papers.md.
"""

import logging
from dataclasses import fields
from typing import Any, TypeVar

import torch
from transformers import CLIPImageProcessorPil, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import has_file

from modeling_dclip.configuration_dmclip import DMCLIP_PRESETS, DMCLIPConfig, DMCLIPTextConfig, DMCLIPVisionConfig
from modeling_dclip.distillation.arguments import DMCLIPArguments
from modeling_dclip.encoders.loading import check_values, read_config
from modeling_dclip.modeling_dmclip import DMCLIPModel, DMCLIPVisionModel
from modeling_dclip.modeling_dmclip_text import DMCLIPTextModel
from modeling_dclip.processing_dclip import DCLIPProcessor

logger = logging.getLogger(__name__)

Loaded = TypeVar("Loaded", bound=PreTrainedModel)

# The models that a field of the section may name, told by the model_type in their config.
_STARTS = {
    "model": (DMCLIPConfig,),
    "vision_model": (DMCLIPConfig, DMCLIPVisionConfig),
    "text_model": (DMCLIPConfig, DMCLIPTextConfig),
}
_PREPROCESSING = ("preprocessor_config.json", "processor_config.json")
_HEAD = "projection."  # of the image encoder; its other keys are those of its backbone

# Fields of a config that the section has a field of its own for, or that the tokenizer decides.
_SET_ELSEWHERE = {
    "image_size",
    "projection_dim",
    "vocab_size",
    "max_position_embeddings",
    "bos_token_id",
    "eos_token_id",
}


def _check_fields(name: str, given: dict[str, Any], config_class: type) -> None:
    """Refuse unknown fields. A config accepts any name, so a typo in a recipe would go unnoticed."""
    known = {f.name for f in fields(config_class)} - _SET_ELSEWHERE
    unknown = sorted(set(given) - known)
    if unknown:
        raise ValueError(
            f"dmclip.{name}: expected fields of {config_class.__name__} that the section does not set itself, got "
            f"{unknown[0]!r}."
        )


def check_starts(args: DMCLIPArguments) -> None:
    """Check that `model`, `vision_model` and `text_model` name models of the right kind. Only their configs are read.

    Args:
        args ([`DMCLIPArguments`]): The section.

    Raises:
        OSError: If there is no config in a folder or under a Hub id.
        ValueError: If a model is of another kind, or an image encoder's BatchNorms are folded into its weights.
    """
    for name, kinds in _STARTS.items():
        if (path := getattr(args, name)) is None:
            continue
        stored = PreTrainedConfig.get_config_dict(path)[0]
        if stored.get("model_type") not in (expected := [kind.model_type for kind in kinds]):
            raise ValueError(
                f"dmclip.{name}: expected the model_type {' or '.join(expected)} in the config of {path!r}, got "
                f"{stored.get('model_type')!r}. Convert published MambaVision and MobileCLIP checkpoints with "
                "`python -m modeling_dclip.hub.convert`."
            )
        read_config(path)
        if name != "text_model" and DMCLIPVisionConfig.from_pretrained(path).batch_norm_folded:
            raise ValueError(
                f"dmclip.{name}: expected an image encoder with its BatchNorms, got {path!r}, where fuse() folded "
                "them into the weights for inference. Name the model it was made from."
            )


def _vision_config(args: DMCLIPArguments) -> DMCLIPVisionConfig:
    if args.vision_model is not None:
        config = DMCLIPVisionConfig.from_pretrained(args.vision_model)
        return config if args.image_size in (None, config.image_size) else config.for_image_size(args.image_size)
    _check_fields("vision_config", args.vision_config, DMCLIPVisionConfig)
    config = DMCLIPVisionConfig(**{**DMCLIP_PRESETS[args.preset], **args.vision_config, "image_size": args.image_size})
    return config if "window_sizes" in args.vision_config else config.for_image_size(args.image_size)


def _end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends a text: CLIP's end token, or the separator of BERT and its kin."""
    token = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    if token is None:
        raise ValueError(
            f"Expected a tokenizer that ends texts with eos_token or sep_token, got {type(tokenizer).__name__} "
            f"('{tokenizer.name_or_path}') without. Set dmclip.tokenizer to another."
        )
    return token


def _text_config(args: DMCLIPArguments, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    _check_fields("text_config", args.text_config, DMCLIPTextConfig)
    if args.text_model is not None and args.text_config:
        raise ValueError(
            f"dmclip.text_config: expected no text_config beside text_model {args.text_model!r}, which has its own."
        )
    return {
        **args.text_config,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.cls_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id,
        "eos_token_id": _end_token(tokenizer),
    }


def build_dmclip(args: DMCLIPArguments, tokenizer: PreTrainedTokenizerBase) -> tuple[DMCLIPModel, DCLIPProcessor]:
    """Build the DM-CLIP that will train, in float32, and its processor.

    Args:
        args ([`DMCLIPArguments`]): From scratch by `preset`, `vision_config`, `text_config`; with `vision_model` or
            `text_model` around a pretrained tower, or both; with `model` a whole checkpoint. New weights are drawn
            from torch's generator: seed it before. A pretrained image encoder keeps its projection if it has the
            wanted width. Otherwise a new one is drawn, and that is logged.
        tokenizer (`CLIPTokenizer`): Decides vocabulary, special tokens and length of a new text tower.

    Returns:
        `tuple[DMCLIPModel, DCLIPProcessor]`: The processor of [`find_image_processor`] with this tokenizer.

    Raises:
        ValueError: If a field of a config is unknown, `projection_dim` is not the checkpoint's or the text tower's,
            a named model is of another kind or lacks weights, or the tokenizer does not fit the text tower.
    """
    check_starts(args)
    model = _make_model(args, tokenizer) if args.model is None else _load_checkpoint(args)
    _check_tokenizer(tokenizer, model.config.text_config)
    return model, DCLIPProcessor(find_image_processor(args), tokenizer)


def find_image_size(args: DMCLIPArguments) -> int:
    """The side in pixels of the images that a DM-CLIP will train on.

    Args:
        args ([`DMCLIPArguments`]): The section.

    Returns:
        `int`: `args.image_size` if it is set, else the size of the checkpoint or the image encoder.
    """
    return args.image_size or DMCLIPVisionConfig.from_pretrained(args.model or args.vision_model).image_size


def find_image_processor(args: DMCLIPArguments) -> CLIPImageProcessorPil:
    """The image processor of a DM-CLIP: that of the checkpoint or the image encoder if it has one, else CLIP's.

    Args:
        args ([`DMCLIPArguments`]): The section.

    Returns:
        `CLIPImageProcessorPil`: For the size of [`find_image_size`].
    """
    source, side = args.model or args.vision_model, find_image_size(args)
    if source is None:
        return CLIPImageProcessorPil(**_sizes(side))
    if not any(has_file(source, name) for name in _PREPROCESSING):
        logger.warning("dmclip: no %s in %r, so images are normalised as for CLIP", _PREPROCESSING[0], source)
        return CLIPImageProcessorPil(**_sizes(side))
    if args.model is not None:
        image_processor = DCLIPProcessor.from_pretrained(args.model).image_processor
    else:
        image_processor = CLIPImageProcessorPil.from_pretrained(args.vision_model)
    if image_processor.crop_size["height"] == image_processor.crop_size["width"] == side:
        return image_processor
    return CLIPImageProcessorPil.from_dict(image_processor.to_dict() | _sizes(side))


def _load_checkpoint(args: DMCLIPArguments) -> DMCLIPModel:
    config = DMCLIPConfig.from_pretrained(args.model)
    _check_projection(args, config.projection_dim, f"model {args.model!r}")
    if args.image_size not in (None, config.vision_config.image_size):
        config.vision_config = config.vision_config.for_image_size(args.image_size)
    config.freeze_text = args.freeze_text
    return _load(DMCLIPModel, args.model, "model", config=config)[0]


def _make_model(args: DMCLIPArguments, tokenizer: PreTrainedTokenizerBase) -> DMCLIPModel:
    text, text_config, vision_config = None, _text_config(args, tokenizer), _vision_config(args)
    projection_dim = args.projection_dim or (vision_config.projection_dim if _is_dual(args.vision_model) else 512)
    if args.text_model is not None:
        text, _ = _load(DMCLIPTextModel, args.text_model, "text_model")
        text_config, projection_dim = text.config, text.config.projection_dim
        _check_projection(args, projection_dim, f"text_model {args.text_model!r}")
    config = DMCLIPConfig(
        text_config=text_config,
        vision_config=vision_config,
        projection_dim=projection_dim,
        freeze_text=args.freeze_text,
    )
    model = DMCLIPModel(config)
    if text is not None:
        model.text_model.load_state_dict(text.state_dict())
    if args.vision_model is not None:
        _take_vision_weights(model.vision_model, args.vision_model)
    return model


def _is_dual(path: str | None) -> bool:
    """Whether a model's image projection leads into a space shared with texts. That of an image encoder alone is often
    a classifier.
    """
    return path is not None and PreTrainedConfig.get_config_dict(path)[0]["model_type"] == DMCLIPConfig.model_type


def _take_vision_weights(vision_model: DMCLIPVisionModel, path: str) -> None:
    """Load the weights of a pretrained image encoder, but keep the drawn projection if the stored one is no match."""
    loaded, lacking = _load(DMCLIPVisionModel, path, "vision_model", may_lack=_HEAD)
    weights, width, stored = loaded.state_dict(), vision_model.config.projection_dim, loaded.config.projection_dim
    if lacking or stored != width:
        found = "none" if lacking else f"one to {stored}"
        logger.info(
            "dmclip: drew a new projection to %d, because %r has %s; all other weights are its", width, path, found
        )
        own = vision_model.state_dict()
        weights |= {name: tensor for name, tensor in own.items() if name.startswith(_HEAD)}
    vision_model.load_state_dict(weights)


def _load(
    model_class: type[Loaded], path: str, name: str, may_lack: str | None = None, config: DMCLIPConfig | None = None
) -> tuple[Loaded, list[str]]:
    """Load a model in float32, with every weight from its folder.

    Only weights whose names start with `may_lack` may be missing; their names are returned beside the model.
    """
    options: dict[str, Any] = {} if config is None else {"config": config}
    loaded: Any = model_class.from_pretrained(  # with output_loading_info a pair
        path, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    model, found = loaded
    lacking = [key for key in sorted(found["missing_keys"]) if may_lack is not None and key.startswith(may_lack)]
    wrong = {
        "missing": sorted(set(found["missing_keys"]) - set(lacking)),
        "left over": sorted(found["unexpected_keys"]),
        "of another shape": sorted(key for key, *_ in found["mismatched_keys"]),
    }
    if told := [f"{len(keys)} {kind}, such as {keys[0]}" for kind, keys in wrong.items() if keys]:
        raise ValueError(
            f"dmclip.{name}: expected in {path!r} the weights that its config describes, got {'; '.join(told)}. The "
            "file is damaged, or the config is another model's."
        )
    check_values(model, path)
    return model, lacking


def _sizes(side: int) -> dict[str, dict[str, int]]:
    return {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}


def _check_projection(args: DMCLIPArguments, width: int, whose: str) -> None:
    if args.projection_dim not in (None, width):
        raise ValueError(
            f"dmclip.projection_dim: expected {width}, as {whose} has it, got {args.projection_dim}. Leave it out."
        )


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: DMCLIPTextConfig) -> None:
    if len(tokenizer) != config.vocab_size or _end_token(tokenizer) != config.eos_token_id:
        raise ValueError(
            f"Expected a tokenizer of the text tower's {config.vocab_size} tokens that ends with "
            f"{config.eos_token_id}, got {len(tokenizer)} tokens ending with {_end_token(tokenizer)} "
            f"('{tokenizer.name_or_path}'). Set dmclip.tokenizer to the tower's."
        )
