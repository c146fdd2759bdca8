"""Turn published checkpoints of MambaVision and MobileCLIP into folders of this package's models."""

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel

from modeling_dclip.data.files import check_new_folder, replacing, write_text
from modeling_dclip.encoders.fingerprints import hash_file
from modeling_dclip.hub.convert.checkpoints import check_keys, read_checkpoint
from modeling_dclip.hub.convert.mambavision import (
    image_processor_for,
    published_mambavision_keys,
    read_mambavision_config,
)
from modeling_dclip.hub.convert.mobileclip import load_text_tower, read_text_config, select_text_tower
from modeling_dclip.modeling_dmclip import DMCLIPVisionModel
from modeling_dclip.modeling_dmclip_text import DMCLIPTextModel

README = """---
library_name: transformers
license: other
license_name: {license_name}
license_link: {license_link}
pipeline_tag: {pipeline_tag}
tags:
- dm-clip
- {origin}
---

# {title}

Converted from `{file}` (sha256 {digest}) by `python -m modeling_dclip.hub.convert {origin}`. {keys}

**Licence.** {note}

{use}
"""
MAMBAVISION_NOTE = (
    "MambaVision's weights are published for non-commercial use only (CC-BY-NC-SA-4.0 by its package's description, "
    "its code under the NVIDIA Source Code License-NC). That binds this folder and every model that starts from it: "
    "its card must say so. Only weights that were trained from scratch elsewhere are free of it."
)

MOBILECLIP_NOTE = (
    "MobileCLIP's weights are published under a licence of Apple's own (LICENSE_weights beside them). It binds this "
    "folder and every model that starts from it: read it, and name it in the card."
)


def load_published(
    model: PreTrainedModel,
    weights: dict[str, torch.Tensor],
    published_keys: Callable[[str], tuple[str, ...]],
    path: str | Path,
    what: str,
) -> None:
    """Put a checkpoint's weights into a model, all of them.

    Args:
        model (`PreTrainedModel`): Filled in place, in its own dtypes.
        weights (`dict[str, torch.Tensor]`): Under the checkpoint's names.
        published_keys (`Callable[[str], tuple[str, ...]]`): A key of the model to the checkpoint's that make it up,
            which divide its rows evenly; none for a parameter that stays as it is.
        path (`str` or `Path`): Of the checkpoint, for messages.
        what (`str`): The architecture, for messages.

    Raises:
        ValueError: If a key is missing, left over or of another shape.
    """
    state = model.state_dict()
    sources = {key: names for key in state if (names := published_keys(key))}
    expected = {
        name: (state[key].shape[0] // len(names), *state[key].shape[1:]) if len(names) > 1 else state[key].shape
        for key, names in sources.items()
        for name in names
    }
    check_keys(weights, expected, path, what)
    for key, names in sources.items():
        state[key] = torch.cat([weights[name] for name in names]) if len(names) > 1 else weights[names[0]]
    model.load_state_dict(state)


def convert_mambavision(
    checkpoint: str | Path, output: str | Path, config: str | Path | None = None, projection_dim: int | None = None
) -> DMCLIPVisionModel:
    """Make a [`DMCLIPVisionModel`] folder of a MambaVision checkpoint.

    Its classifier `head` becomes the projection: `image_embeds` are then the published class scores, and
    `pooler_output` the published features. With `projection_dim` the head is left out and a fresh projection of that
    width starts there.

    Args:
        checkpoint (`str` or `Path`): See [`~modeling_dclip.hub.convert.checkpoints.read_checkpoint`].
        output (`str` or `Path`): New or empty folder; written whole or not at all.
        config (`str` or `Path`, *optional*): JSON with the published fields `depths`, `dim`, `in_dim`, `num_heads`,
            `window_size`, `mlp_ratio` and `resolution`, such as the `config.json` beside published weights. Without it
            the preset whose shapes the weights have says what no shape tells: heads, windows and resolution.
        projection_dim (`int`, *optional*): Width of a fresh projection, drawn with seed 0.

    Returns:
        [`DMCLIPVisionModel`]: In eval mode, float32.

    Raises:
        FileExistsError, FileNotFoundError: If the output is in use, or a file is not there.
        ValueError: If the checkpoint is damaged, of another architecture or of no preset's shapes, or the config is
            not complete or not the checkpoint's.
    """
    check_new_folder(output)
    weights = read_checkpoint(checkpoint)
    model_config, preset = read_mambavision_config(weights, checkpoint, config)
    name = f"MambaVision-{preset}" if preset else "MambaVision"
    if projection_dim is None and not any(key.startswith("head.") for key in weights):
        raise ValueError(
            f"Expected a head (head.weight, head.bias) in {checkpoint}, got none. Give --projection_dim for a fresh "
            "projection."
        )
    if projection_dim is not None:
        weights = {key: value for key, value in weights.items() if not key.startswith("head.")}
        model_config.projection_dim = projection_dim
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = DMCLIPVisionModel(model_config).eval()

    def keys(key):
        fresh = projection_dim is not None and key.startswith("projection.")
        return () if fresh else published_mambavision_keys(key)

    load_published(model, weights, keys, checkpoint, name)
    width = model_config.projection_dim
    if projection_dim is None:
        head = (
            f"Its head is the projection: `image_embeds` are its {width} outputs, for published weights class scores."
        )
    else:
        head = f"Its head was left out; the projection to {width} is untrained (seed 0)."
    processor = image_processor_for(model_config.image_size, preset)
    readme = README.format(
        license_name="mambavision-non-commercial",
        license_link="https://github.com/NVlabs/MambaVision#licenses",
        pipeline_tag="image-feature-extraction",
        origin="mambavision",
        title=f"{name} as a DM-CLIP image encoder",
        file=Path(checkpoint).name,
        digest=hash_file(checkpoint),
        keys=f"All its {len(weights)} keys{'' if projection_dim is None else ' but the head'} are in it. {head}",
        note=MAMBAVISION_NOTE,
        use="Images are normalised with ImageNet's mean and deviation (`preprocessor_config.json`), not with CLIP's.",
    )
    _save(output, readme, model, processor)
    return model


def convert_mobileclip(checkpoint: str | Path, output: str | Path) -> tuple[DMCLIPTextModel, list[str]]:
    """Make a [`DMCLIPTextModel`] folder of the text tower in a MobileCLIP checkpoint, open_clip's or Apple's.

    The image tower, a FastViT, is not taken: DM-CLIP puts a MambaVision in its place. Neither is `logit_scale`.

    Args:
        checkpoint (`str` or `Path`): See [`~modeling_dclip.hub.convert.checkpoints.read_checkpoint`].
        output (`str` or `Path`): New or empty folder; written whole or not at all.

    Returns:
        `tuple`: [`DMCLIPTextModel`] in eval mode, float32, and the keys that were not taken.

    Raises:
        FileExistsError, FileNotFoundError: If the output is in use, or the file is not there.
        ValueError: If the checkpoint is damaged or of another architecture; keys are named.
    """
    check_new_folder(output)
    text, left = select_text_tower(read_checkpoint(checkpoint), checkpoint)
    model = DMCLIPTextModel(read_text_config(text, checkpoint)).eval()
    load_text_tower(model, text, checkpoint)
    images = sum(key != "logit_scale" for key in left)
    readme = README.format(
        license_name="apple-mobileclip-weights",
        license_link="https://github.com/apple/ml-mobileclip",
        pipeline_tag="feature-extraction",
        origin="mobileclip",
        title="MobileCLIP's text tower as a DM-CLIP text encoder",
        file=Path(checkpoint).name,
        digest=hash_file(checkpoint),
        keys=f"All {len(text)} keys of its text tower are in it; the {images} of its image tower are not.",
        note=MOBILECLIP_NOTE,
        use="The tokenizer is CLIP's, which the checkpoint does not hold: `openai/clip-vit-base-patch32` has it.",
    )
    _save(output, readme, model)
    return model, left


def _save(output: str | Path, readme: str, *parts) -> None:
    """Write a folder whole or not at all; it has to be new or empty."""
    with replacing(output) as folder:
        for part in parts:
            part.save_pretrained(folder)
        write_text(folder / "README.md", readme)
