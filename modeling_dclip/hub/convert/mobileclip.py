"""The text tower in MobileCLIP's checkpoints: open_clip's key names and Apple's own.

Source: [MC] MobileCLIP, arXiv 2311.17049, and the key names of its checkpoints; docs/papers.md.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from modeling_dclip.configuration_dmclip import DMCLIPTextConfig
from modeling_dclip.hub.convert.checkpoints import check_keys, shape_of
from modeling_dclip.modeling_dmclip_text import DMCLIPTextModel

HEAD_DIM = 64  # in every published tower: 512 numbers in 8 heads, 768 in 12
LAYOUTS = ("text.", "text_encoder.")  # open_clip's and Apple's: the columns of the tables below
IMAGE_PREFIXES = ("visual.", "image_encoder.")
FASTVIT_PREFIXES = ("visual.trunk.stages.", "image_encoder.model.network.", "image_encoder.model.patch_embed.0.")
TOKENS = ("token_embedding.weight", "embedding_layer.weight")
POSITIONS = ("positional_embedding", "positional_embedding.pos_embed.pos_embed")
PROJECTION = ("text_projection", "projection_layer")
FINAL_NORM = ("ln_final.", "final_layer_norm.")
LAYER = ("transformer.resblocks.", "transformer.")
LAYER_PARTS = {
    "layer_norm1.": ("ln_1.", "pre_norm_mha.0."),
    "self_attn.out_proj.": ("attn.out_proj.", "pre_norm_mha.1.out_proj."),
    "layer_norm2.": ("ln_2.", "pre_norm_ffn.0."),
    "mlp.fc1.": ("mlp.c_fc.", "pre_norm_ffn.1."),
    "mlp.fc2.": ("mlp.c_proj.", "pre_norm_ffn.4."),
}
QKV = ("attn.in_proj_", "pre_norm_mha.1.qkv_proj.")  # one matrix: queries, keys, values


def select_text_tower(
    weights: Mapping[str, torch.Tensor], path: str | Path
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Select the text tower's weights of a dual encoder.

    Args:
        weights (`Mapping[str, torch.Tensor]`): The checkpoint's weights.
        path (`str` or `Path`): The checkpoint's file, for messages.

    Returns:
        `tuple`: The text tower's weights by their own names, and the names of the weights that are left out: the image
            tower's and `logit_scale`.

    Raises:
        ValueError: If there is no text tower, there are other keys, or the image tower is not a FastViT. Only with a
            FastViT is the text tower known to read in both directions.
    """
    layout = next((prefix for prefix in LAYOUTS if any(key.startswith(prefix) for key in weights)), None)
    if layout is None:
        raise ValueError(
            f"Expected a text tower in {path} (keys that start with {' or '.join(LAYOUTS)}), got {len(weights)} keys "
            f"such as {', '.join(list(weights)[:3])}. Is it a MobileCLIP checkpoint?"
        )
    text = {key: value for key, value in weights.items() if key.startswith(layout)}
    images = [key for key in weights if key.startswith(IMAGE_PREFIXES)]
    if images and not any(key.startswith(FASTVIT_PREFIXES) for key in images):
        raise ValueError(
            f"Expected a FastViT image tower in {path} (MobileCLIP S1, S2; MobileCLIP2 S0, S2, S3, S4), got keys such "
            f"as {images[0]}. MobileCLIP-B's text tower is causal, which its weights do not show. DM-CLIP's reads "
            "in both directions."
        )
    others = [key for key in weights if key not in text and key not in images and key != "logit_scale"]
    if others:
        raise ValueError(
            f"Expected a text tower, an image tower and logit_scale in {path}, got {len(others)} left over: "
            f"{', '.join(others[:8])}."
        )
    return text, images + [key for key in weights if key == "logit_scale"]


def read_text_config(text: Mapping[str, torch.Tensor], path: str | Path) -> DMCLIPTextConfig:
    """Read the architecture from the shapes.

    Heads have 64 numbers, as in every published tower. The end token is CLIP's, the last id of the vocabulary.

    Args:
        text (`Mapping[str, torch.Tensor]`): As [`select_text_tower`] returns it.
        path (`str` or `Path`): The checkpoint's file, for messages.

    Returns:
        [`DMCLIPTextConfig`]

    Raises:
        ValueError: If a key that the architecture is read from is missing, or the width is not a multiple of 64.
    """
    column = _column(text)
    prefix = LAYOUTS[column]

    def shape(key: str, dimensions: int) -> tuple[int, ...]:
        return shape_of(text, key, dimensions, path)

    vocab_size, width = shape(prefix + TOKENS[column], 2)
    if width % HEAD_DIM:
        raise ValueError(
            f"{prefix + TOKENS[column]!r} in {path}: expected a width that is a multiple of {HEAD_DIM}, got {width}."
        )
    layer = prefix + LAYER[column]
    layers = [int(match[1]) for key in text if (match := re.match(rf"{re.escape(layer)}(\d+)\.", key))]
    if not layers:
        raise ValueError(f"Expected layers ({layer}0 and on) in {path}, got none. Is it a MobileCLIP checkpoint?")
    return DMCLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=shape(f"{layer}0.{LAYER_PARTS['mlp.fc1.'][column]}weight", 2)[0],
        num_hidden_layers=max(layers) + 1,
        num_attention_heads=width // HEAD_DIM,
        max_position_embeddings=shape(prefix + POSITIONS[column], 4 if column else 2)[-2],
        projection_dim=shape(prefix + PROJECTION[column], 2)[1],
        bos_token_id=vocab_size - 2,
        eos_token_id=vocab_size - 1,
    )


def published_text_key(key: str, layout: str) -> str:
    """Name the published weight that one of ours is, or is a third of.

    Args:
        key (`str`): A key of [`DMCLIPTextModel`].
        layout (`str`): `"text."` (open_clip's) or `"text_encoder."` (Apple's).

    Returns:
        `str`

    Example:
        >>> published_text_key("encoder.layers.3.self_attn.k_proj.bias", "text.")
        'text.transformer.resblocks.3.attn.in_proj_bias'
    """
    column = LAYOUTS.index(layout)
    known = {
        "embeddings.token_embedding.weight": TOKENS,
        "embeddings.position_embedding.weight": POSITIONS,
        "projection.weight": PROJECTION,
    }
    if key in known:
        return layout + known[key][column]
    match = re.match(r"encoder\.layers\.(\d+)\.(.*?)(weight|bias)$", key)
    if match is None:
        return layout + FINAL_NORM[column] + key.removeprefix("final_layer_norm.")
    names = QKV if re.fullmatch(r"self_attn\.[qkv]_proj\.", match[2]) else LAYER_PARTS[match[2]]
    return f"{layout}{LAYER[column]}{match[1]}.{names[column]}{match[3]}"


def load_text_tower(model: DMCLIPTextModel, text: Mapping[str, torch.Tensor], path: str | Path) -> None:
    """Load all weights of the text tower into a model.

    Args:
        model ([`DMCLIPTextModel`]): Filled in place.
        text (`Mapping[str, torch.Tensor]`): As [`select_text_tower`] returns it.
        path (`str` or `Path`): The checkpoint's file, for messages.

    Raises:
        ValueError: If a key is missing, left over or of another shape.
    """
    layout = LAYOUTS[_column(text)]
    state = model.state_dict()
    names = {key: published_text_key(key, layout) for key in state}
    expected = {name: _published_shape(key, state[key].shape, layout) for key, name in names.items()}
    check_keys(text, expected, path, "a MobileCLIP text tower")
    for key, name in names.items():
        state[key] = _ours(key, text[name], layout)
    model.load_state_dict(state)


def _column(text: Mapping[str, torch.Tensor]) -> int:
    return next(column for column, prefix in enumerate(LAYOUTS) if next(iter(text)).startswith(prefix))


def _third(key: str) -> int | None:
    match = re.search(r"self_attn\.([qkv])_proj\.", key)
    return "qkv".index(match[1]) if match else None


def _published_shape(key: str, shape: torch.Size, layout: str) -> tuple[int, ...]:
    if _third(key) is not None:
        return (3 * shape[0], *shape[1:])
    if key == "projection.weight":  # published for a product from the right
        return tuple(shape[::-1])
    if key == "embeddings.position_embedding.weight" and layout == LAYOUTS[1]:
        return (1, 1, *shape)
    return tuple(shape)


def _ours(key: str, value: torch.Tensor, layout: str) -> torch.Tensor:
    if (third := _third(key)) is not None:
        return value.chunk(3)[third]
    if key == "projection.weight":
        return value.T
    if key == "embeddings.position_embedding.weight" and layout == LAYOUTS[1]:
        return value[0, 0]
    return value
