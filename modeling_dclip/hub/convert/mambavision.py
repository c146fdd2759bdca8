"""MambaVision's published keys, and how its architecture is read from their shapes.

Source: MambaVision, arXiv 2407.08083, and the key names of its checkpoints; docs/papers.md.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CLIPImageProcessorPil
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from modeling_dclip.configuration_dmclip import DMCLIP_PRESETS, NUM_STAGES, DMCLIPVisionConfig
from modeling_dclip.data.files import read_json
from modeling_dclip.hub.convert.checkpoints import shape_of

CONFIG_FIELDS = {
    "depths": "depths",
    "dim": "hidden_size",
    "in_dim": "stem_dim",
    "num_heads": "num_heads",
    "window_size": "window_sizes",
    "mlp_ratio": "mlp_ratio",
    "resolution": "image_size",
}
SHAPE_FIELDS = ("depths", "hidden_size", "stem_dim", "mlp_ratio")
LAYER_SCALE = 1e-5  # the published initial value; loading replaces it
CROP_FRACTIONS = {"T2": 0.98, "S": 0.93}  # crop over resized image in the published evaluation; 1 for the others
RULES = (
    (re.compile(r"^stem\.conv1\."), ("patch_embed.conv_down.0.",)),
    (re.compile(r"^stem\.norm1\."), ("patch_embed.conv_down.1.",)),
    (re.compile(r"^stem\.conv2\."), ("patch_embed.conv_down.3.",)),
    (re.compile(r"^stem\.norm2\."), ("patch_embed.conv_down.4.",)),
    (re.compile(r"^stages\.(\d)\.downsample\."), (r"levels.\1.downsample.reduction.0.",)),
    (
        re.compile(r"^stages\.(\d)\.(blocks\.\d+)\.mixer\.conv1d\."),
        (r"levels.\1.\2.mixer.conv1d_x.", r"levels.\1.\2.mixer.conv1d_z."),
    ),
    (re.compile(r"^stages\.(\d)\."), (r"levels.\1.",)),
    (re.compile(r"^projection\."), ("head.",)),
)


def published_mambavision_keys(key: str) -> tuple[str, ...]:
    """Name the published weights that make up one of ours.

    Args:
        key (`str`): A key of [`DMCLIPVisionModel`].

    Returns:
        `tuple[str, ...]`: Published names, in the order of their rows.

    Example:
        >>> published_mambavision_keys("stages.2.blocks.0.mixer.conv1d.weight")
        ('levels.2.blocks.0.mixer.conv1d_x.weight', 'levels.2.blocks.0.mixer.conv1d_z.weight')
    """
    for pattern, replacements in RULES:
        if pattern.match(key):
            return tuple(pattern.sub(replacement, key) for replacement in replacements)
    return (key,)


def read_mambavision_config(
    weights: Mapping[str, torch.Tensor], path: str | Path, config_file: str | Path | None = None
) -> tuple[DMCLIPVisionConfig, str | None]:
    """Read the architecture from the weights' shapes, and the rest from a preset or a published config.

    Args:
        weights (`Mapping[str, torch.Tensor]`): Weights by their published names.
        path (`str` or `Path`): The checkpoint's file, for messages.
        config_file (`str` or `Path`, *optional*): JSON with the published fields; other fields are ignored.

    Returns:
        `tuple`: [`DMCLIPVisionConfig`], and the preset's name, `None` if the shapes are those of no preset.

    Raises:
        FileNotFoundError: If the config file is missing.
        ValueError: If a key that the architecture is read from is missing or wrong, no preset has these shapes and
            there is no config, or the config is incomplete or contradicts the shapes.
    """
    fields = _fields_from_shapes(weights, path)
    shapes = {name: fields[name] for name in SHAPE_FIELDS}
    presets = {name: DMCLIPVisionConfig(**preset) for name, preset in DMCLIP_PRESETS.items()}
    preset = next(
        (name for name, known in presets.items() if all(getattr(known, field) == shapes[field] for field in shapes)),
        None,
    )
    if config_file is not None:
        given = _fields_from_file(config_file)
        if wrong := [name for name in SHAPE_FIELDS if given[name] != shapes[name]]:
            published = {ours: name for name, ours in CONFIG_FIELDS.items()}[wrong[0]]
            raise ValueError(
                f"{published!r} in {config_file}: expected {_plain(shapes[wrong[0]])}, as the shapes in {path} "
                f"say, got {_plain(given[wrong[0]])}. Give the config of this checkpoint."
            )
        fields |= given
    elif preset is not None:
        fields |= {name: getattr(presets[preset], name) for name in ("num_heads", "window_sizes", "drop_path_rate")}
    else:
        raise ValueError(
            f"Expected the shapes of a preset ({', '.join(presets)}) in {path}, got {_described(shapes)}. Heads and "
            "windows cannot be read from shapes. Give --config, a JSON file with "
            f"{', '.join(CONFIG_FIELDS)}. If the checkpoint should have the shapes of a preset, it is damaged."
        )
    try:
        return DMCLIPVisionConfig(**fields), preset
    except StrictDataclassError as error:
        raise ValueError(f"Expected a consistent architecture in {config_file or path}, got {error}") from error


def _fields_from_shapes(weights: Mapping[str, torch.Tensor], path: str | Path) -> dict[str, Any]:
    blocks = [re.match(r"levels\.(\d+)\.blocks\.(\d+)\.", key) for key in weights]
    stages = [[int(match[2]) for match in blocks if match and int(match[1]) == stage] for stage in range(NUM_STAGES)]
    if not all(stages):
        raise ValueError(
            f"Expected MambaVision's keys in {path} (levels.0 to levels.{NUM_STAGES - 1}, each with blocks), got "
            f"{len(weights)} keys such as {', '.join(list(weights)[:3])}. Is it a MambaVision checkpoint?"
        )

    def shape(key: str, dimensions: int) -> tuple[int, ...]:
        return shape_of(weights, key, dimensions, path)

    stem_dim, num_channels, _, _ = shape("patch_embed.conv_down.0.weight", 4)
    hidden_size = shape("patch_embed.conv_down.3.weight", 4)[0]
    mlp_dim, width = shape("levels.2.blocks.0.mlp.fc1.weight", 2)
    fields = {
        "depths": tuple(max(stage) + 1 for stage in stages),
        "hidden_size": hidden_size,
        "stem_dim": stem_dim,
        "num_channels": num_channels,
        "mlp_ratio": mlp_dim / width,
        "state_size": shape("levels.2.blocks.0.mixer.A_log", 2)[1],
        "conv_kernel": shape("levels.2.blocks.0.mixer.conv1d_x.weight", 3)[2],
        "layer_scale_init_value": LAYER_SCALE if any(key.endswith(".gamma_1") for key in weights) else None,
        "conv_layer_scale_init_value": LAYER_SCALE if any(key.endswith(".gamma") for key in weights) else None,
    }
    if any(key.startswith("head.") for key in weights):  # a backbone may come without
        fields["projection_dim"] = shape("head.weight", 2)[0]
    return fields


def _fields_from_file(config_file: str | Path) -> dict[str, Any]:
    content = read_json(config_file, "config", advice="Give MambaVision's published config.")
    if not isinstance(content, dict) or (missing := [name for name in CONFIG_FIELDS if name not in content]):
        found = f"no {missing[0]!r}" if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"Expected the fields {', '.join(CONFIG_FIELDS)} in {config_file}, got {found}.")
    fields = {ours: content[name] for name, ours in CONFIG_FIELDS.items()}
    for name, ours in CONFIG_FIELDS.items():
        value = fields[ours]
        entries = value if name in ("depths", "num_heads", "window_size") else [value]
        numbers = (int, float) if name == "mlp_ratio" else int
        if not isinstance(entries, list) or not all(
            isinstance(entry, numbers) and not isinstance(entry, bool) and entry > 0 for entry in entries
        ):
            raise ValueError(f"{name!r} in {config_file}: expected positive numbers, got {value!r}.")
        fields[ours] = tuple(value) if isinstance(value, list) else value
    if isinstance(content.get("drop_path_rate"), (int, float)):
        fields["drop_path_rate"] = content["drop_path_rate"]
    return fields


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _described(shapes: Mapping[str, Any]) -> str:
    published = {ours: name for name, ours in CONFIG_FIELDS.items()}
    return ", ".join(f"{published[name]} {_plain(value)}" for name, value in shapes.items())


def image_processor_for(image_size: int, preset: str | None) -> CLIPImageProcessorPil:
    """Make the published preprocessing: bicubic resize, centre crop, ImageNet's mean and standard deviation.

    Args:
        image_size (`int`): Width and height of the model's input, in pixels.
        preset (`str`, *optional*): The preset's name. T2 and S were published with a margin around the crop.

    Returns:
        `CLIPImageProcessorPil`: Resizes the shorter side, then crops.

    Example:
        >>> image_processor_for(224, "S").size.shortest_edge
        240
    """
    return CLIPImageProcessorPil(
        size={"shortest_edge": int(image_size / CROP_FRACTIONS.get(preset or "", 1.0))},
        crop_size={"height": image_size, "width": image_size},
        image_mean=list(IMAGENET_DEFAULT_MEAN),
        image_std=list(IMAGENET_DEFAULT_STD),
    )
