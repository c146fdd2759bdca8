"""Export a ViT student for open_clip: `create_model_and_transforms("local-dir:FOLDER")` then needs no code of ours."""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.image_utils import PILImageResampling

from modeling_dclip.data.files import write_json
from modeling_dclip.encoders.loading import load_processor
from modeling_dclip.hub.export.onnx import EXPORTED_TOWERS, Deviation, check_outputs
from modeling_dclip.hub.export.readers import (
    OPEN_PICTURE,
    Reader,
    compare_reader,
    describe_readings,
    write_readme,
)
from modeling_dclip.hub.native_clip import require_stock_clip, to_native_processor
from modeling_dclip.modeling_dclip import LEGACY_EOS_TOKEN_ID

INTERPOLATIONS = ("bicubic", "bilinear")
OPEN_CLIP_WEIGHTS, OPEN_CLIP_CONFIG = "open_clip_model.safetensors", "open_clip_config.json"
_USE = f"""
import open_clip
{OPEN_PICTURE.strip()}


folder = "local-dir:FOLDER"  # this one
model, preprocess = open_clip.create_model_from_pretrained(folder)
tokenizer = open_clip.get_tokenizer(folder)
image_embeds = model.encode_image(preprocess(open_picture("photo.jpg"))[None], normalize=True).detach()
text_embeds = model.encode_text(tokenizer(["a photo of a dog"]), normalize=True).detach()  # inner products are cosines
"""
_WHY = {
    "text": "Before its tokenizer, open_clip repairs every text with ftfy (quotes, ligatures, widths, encodings) and "
    "resolves HTML entities; no setting turns that off. The model reads texts as they are. Give both the repaired "
    "text where the two have to agree.",
    "picture": "It leaves out what transparency and EXIF say, makes 16 bits a pixel white, resizes before it converts "
    "to RGB, and rounds the margins of its crop to even numbers. `open_picture` of the README makes up for all but "
    "the margins.",
}
NAMES = {  # of a layer's parts, ours to open_clip's, which has the projections of attention in one matrix
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def to_open_clip_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Rename a student's weights to open_clip's names.

    Args:
        model ([`DCLIPModel`]): A ViT student with CLIP's own positions.

    Returns:
        `dict[str, torch.Tensor]`: Contiguous tensors of the student's dtype.

    Raises:
        ValueError: If open_clip has no such model.
    """
    require_stock_clip(model, "open_clip")
    state, weights = model.state_dict(), {}
    for tower, prefix, config in (
        ("vision_model", "visual.", model.config.vision_config),
        ("text_model", "", model.config.text_config),
    ):
        for layer in range(config.num_hidden_layers):
            ours, theirs = f"{tower}.encoder.layers.{layer}.", f"{prefix}transformer.resblocks.{layer}."
            for kind in ("weight", "bias"):
                inner = [state[f"{ours}self_attn.{name}_proj.{kind}"] for name in "qkv"]
                weights[f"{theirs}attn.in_proj_{kind}"] = torch.cat(inner)
                weights |= {f"{theirs}{new}.{kind}": state[f"{ours}{old}.{kind}"] for old, new in NAMES.items()}
    for old, new in (
        ("vision_model.pre_layrnorm", "visual.ln_pre"),
        ("vision_model.post_layernorm", "visual.ln_post"),
        ("text_model.final_layer_norm", "ln_final"),
    ):
        weights |= {f"{new}.{kind}": state[f"{old}.{kind}"] for kind in ("weight", "bias")}
    weights |= {
        "visual.conv1.weight": state["vision_model.embeddings.patch_embedding.weight"],
        "visual.class_embedding": state["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": state["vision_model.embeddings.position_embedding.weight"],
        "visual.proj": state["visual_projection.weight"].T,
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        "text_projection": state["text_projection.weight"].T,
        "logit_scale": state["logit_scale"],
    }
    return {name: tensor.contiguous().clone() for name, tensor in weights.items()}


def to_open_clip_config(model: PreTrainedModel) -> dict[str, Any]:
    """Describe a student's architecture as open_clip's `model_cfg`.

    Args:
        model ([`DCLIPModel`]): A ViT student with CLIP's own positions.

    Returns:
        `dict[str, Any]`: JSON values.

    Raises:
        ValueError: If open_clip has no such model.
    """
    require_stock_clip(model, "open_clip")
    vision, text = model.config.vision_config, model.config.text_config
    activations = {vision.hidden_act, text.hidden_act}
    if activations not in ({"quick_gelu"}, {"gelu"}):
        raise ValueError(
            f"Expected both towers with quick_gelu or both with gelu, as open_clip has, got {sorted(activations)}."
        )
    heads = vision.num_attention_heads
    legacy = text.eos_token_id == LEGACY_EOS_TOKEN_ID
    return {
        "embed_dim": model.config.projection_dim,
        "quick_gelu": activations == {"quick_gelu"},
        "vision_cfg": {
            "image_size": vision.image_size,
            "layers": vision.num_hidden_layers,
            "width": vision.hidden_size,
            "head_width": vision.hidden_size // heads,
            "patch_size": vision.patch_size,
            "mlp_ratio": vision.intermediate_size / vision.hidden_size,
            "norm_kwargs": {"eps": vision.layer_norm_eps},
        },
        "text_cfg": {
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
            "width": text.hidden_size,
            "heads": text.num_attention_heads,
            "layers": text.num_hidden_layers,
            "mlp_ratio": text.intermediate_size / text.hidden_size,
            "norm_kwargs": {"eps": text.layer_norm_eps},
            "hf_tokenizer_name": ".",  # the tokenizer in the same folder
            **({} if legacy else {"pool_type": "eos", "eos_id": text.eos_token_id}),
        },
    }


def write_open_clip(model: PreTrainedModel, source: str | os.PathLike, folder: Path) -> dict[str, Deviation]:
    """Write weights, architecture, preprocessing and tokenizer for open_clip, and compare its embeddings.

    Args:
        model ([`DCLIPModel`]): A ViT student with CLIP's own positions.
        source (`str` or `os.PathLike`): The model's folder, with tokenizer and preprocessing.
        folder (`Path`): A new folder.

    Returns:
        `dict[str, Deviation]`: The file of weights, and how far its embeddings are from the model's.

    Raises:
        ImportError: If open_clip is not installed. An export that cannot be checked is not written.
        ValueError: If open_clip has no such model or no such preprocessing, or its outputs differ on the same inputs,
            or on plain texts and pictures through its own tokenizer and transform.
    """
    weights, config = to_open_clip_weights(model), to_open_clip_config(model)
    try:
        import open_clip
    except ImportError as error:
        raise ImportError(
            f"Expected open_clip, which checks the export, got {error}. Install it with `pip install open_clip_torch`."
        ) from error
    folder.mkdir(parents=True)
    processor = to_native_processor(load_processor(source))
    images = processor.image_processor
    crop, size = images.crop_size["height"], model.config.vision_config.image_size
    if crop != size or images.size.get("shortest_edge") != size or not images.do_center_crop:
        raise ValueError(
            f"Expected preprocessing at '{source}' that resizes the shorter side to {size} and crops {size}, as "
            f"open_clip's does, got {dict(images.size)} and {crop}."
        )
    interpolation = PILImageResampling(images.resample).name.lower()
    if interpolation not in INTERPOLATIONS:
        raise ValueError(
            f"Expected preprocessing at '{source}' with {' or '.join(INTERPOLATIONS)} interpolation, as open_clip "
            f"has, got {interpolation}."
        )
    preprocessing = {
        "mean": list(images.image_mean),
        "std": list(images.image_std),
        "interpolation": interpolation,
        "resize_mode": "shortest",
    }
    processor.tokenizer.model_max_length = model.config.text_config.max_position_embeddings
    processor.tokenizer.save_pretrained(folder)
    save_file(weights, folder / OPEN_CLIP_WEIGHTS)
    described = {"model_cfg": config, "preprocess_cfg": preprocessing}
    write_json(folder / OPEN_CLIP_CONFIG, described, indent=2)
    theirs, transform = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    theirs.eval()
    _check_weights(model, theirs)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    reader = Reader(
        "open_clip",
        lambda texts: theirs.encode_text(tokenizer(texts)),
        lambda pictures: theirs.encode_image(torch.stack([transform(picture) for picture in pictures])),
        _WHY,
        install="open_clip_torch pillow",
    )
    measured, readings = compare_reader(model, load_processor(source), reader)
    write_readme(folder, _USE, readings, reader)
    return {OPEN_CLIP_WEIGHTS: measured | {"differs": describe_readings(readings, reader)}}


@torch.no_grad()
def _check_weights(model: PreTrainedModel, theirs: Any) -> None:
    """Refuse other outputs on the same ids and pixels."""
    pairs = []
    for name, embed in (("image", theirs.encode_image), ("text", theirs.encode_text)):
        tower = EXPORTED_TOWERS[name](model)
        inputs = tower.sample(3)
        if name == "text":  # open_clip reads whole rows
            missing = model.config.text_config.max_position_embeddings - inputs.shape[1]
            inputs = torch.nn.functional.pad(inputs, (0, missing), value=0)
        pairs.append((embed(inputs).float(), tower(inputs)))
    check_outputs(pairs, "fp32", "open_clip")
