"""Convert published checkpoints of MambaVision and MobileCLIP to folders of this package's models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modeling_dclip.data.files import check_new_folder, holding, replacing, write_text
from modeling_dclip.encoders.fingerprints import hash_file

# The rest is imported where it is needed: PyTorch and transformers take seconds, for which `--help` need not wait.
if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

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
    "its code under the NVIDIA Source Code License-NC). This applies to this folder and to every model that is "
    "trained from it, and the model's card must say so. It does not apply to weights that you trained from scratch."
)

MOBILECLIP_NOTE = (
    "MobileCLIP's weights are published under a licence of Apple's own (LICENSE_weights beside them). It applies to "
    "this folder and to every model that is trained from it. Read it, and name it in the model's card."
)


def load_published(
    model: PreTrainedModel,
    weights: dict[str, torch.Tensor],
    published_keys: Callable[[str], tuple[str, ...]],
    path: str | Path,
    what: str,
) -> None:
    """Load all weights of a checkpoint into a model.

    Args:
        model (`PreTrainedModel`): Filled in place, in its own dtypes.
        weights (`dict[str, torch.Tensor]`): Under the checkpoint's names.
        published_keys (`Callable[[str], tuple[str, ...]]`): From a key of the model to the checkpoint's keys that make
            it up, with equally many rows each; to an empty tuple for a parameter that stays as it is.
        path (`str` or `Path`): The checkpoint's file, for messages.
        what (`str`): The architecture's name, for messages.

    Raises:
        ValueError: If a key is missing, left over or of another shape.
    """
    import torch

    from modeling_dclip.hub.convert.checkpoints import check_keys

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
    """Convert a MambaVision checkpoint to a folder of a [`DMCLIPVisionModel`].

    Its classifier `head` becomes the projection: `image_embeds` are then the published class scores, and
    `pooler_output` the published features. With `projection_dim` a new projection of that width takes the place of the
    head.

    Args:
        checkpoint (`str` or `Path`): As for [`~modeling_dclip.hub.convert.checkpoints.read_checkpoint`].
        output (`str` or `Path`): A new or empty folder; written whole or not at all.
        config (`str` or `Path`, *optional*): JSON with the published fields `depths`, `dim`, `in_dim`, `num_heads`,
            `window_size`, `mlp_ratio` and `resolution`, such as the `config.json` beside published weights. By default
            heads, windows and resolution, which no shape tells, come from the preset with the weights' shapes.
        projection_dim (`int`, *optional*): Width of a new, untrained projection, initialised with seed 0.

    Returns:
        [`DMCLIPVisionModel`]: In eval mode, float32.

    Raises:
        FileExistsError, FileNotFoundError: If the output is in use, or a file is not there.
        ValueError: If the checkpoint is damaged, of another architecture or of no preset's shapes, or the config is
            incomplete or contradicts the checkpoint.
    """
    import torch

    from modeling_dclip.hub.convert.checkpoints import read_checkpoint
    from modeling_dclip.hub.convert.mambavision import (
        image_processor_for,
        published_mambavision_keys,
        read_mambavision_config,
    )
    from modeling_dclip.modeling_dmclip import DMCLIPVisionModel

    check_new_folder(output)
    weights = read_checkpoint(checkpoint)
    model_config, preset = read_mambavision_config(weights, checkpoint, config)
    name = f"MambaVision-{preset}" if preset else "MambaVision"
    if projection_dim is None and not any(key.startswith("head.") for key in weights):
        raise ValueError(
            f"Expected a head (head.weight, head.bias) in {checkpoint}, got none. Give --projection_dim for a new "
            "projection."
        )
    if projection_dim is not None:
        weights = {key: value for key, value in weights.items() if not key.startswith("head.")}
        model_config.projection_dim = projection_dim
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = DMCLIPVisionModel(model_config).eval()

    def keys(key: str) -> tuple[str, ...]:
        fresh = projection_dim is not None and key.startswith("projection.")
        return () if fresh else published_mambavision_keys(key)

    load_published(model, weights, keys, checkpoint, name)
    width = model_config.projection_dim
    if projection_dim is None:
        head = (
            f"Its head is the projection: `image_embeds` are its {width} outputs, for published weights class scores."
        )
    else:
        head = f"Its head was left out. The projection to {width} numbers is untrained (seed 0)."
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
        use="`preprocessor_config.json` normalises with ImageNet's mean and standard deviation, not with CLIP's.",
    )
    _save(output, readme, model, processor)
    return model


def convert_mobileclip(checkpoint: str | Path, output: str | Path) -> tuple[DMCLIPTextModel, list[str]]:
    """Convert the text tower of a MobileCLIP checkpoint to a folder of a [`DMCLIPTextModel`].

    The image tower, a FastViT, is left out, because DM-CLIP has a MambaVision in its place. So is `logit_scale`.

    Args:
        checkpoint (`str` or `Path`): A file with open_clip's keys or Apple's, as for
            [`~modeling_dclip.hub.convert.checkpoints.read_checkpoint`].
        output (`str` or `Path`): A new or empty folder; written whole or not at all.

    Returns:
        `tuple`: [`DMCLIPTextModel`] in eval mode, float32, and the keys that were left out.

    Raises:
        FileExistsError, FileNotFoundError: If the output is in use, or the file is not there.
        ValueError: If the checkpoint is damaged or of another architecture; keys are named.
    """
    from modeling_dclip.hub.convert.checkpoints import read_checkpoint
    from modeling_dclip.hub.convert.mobileclip import load_text_tower, read_text_config, select_text_tower
    from modeling_dclip.modeling_dmclip_text import DMCLIPTextModel

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
        use="The tokenizer is CLIP's. The checkpoint does not hold it; take it from `openai/clip-vit-base-patch32`.",
    )
    _save(output, readme, model)
    return model, left


def _save(output: str | Path, readme: str, *parts: Any) -> None:
    """Write a folder whole or not at all. It must be new or empty."""
    with holding(output, beside=True), replacing(output) as folder:
        for part in parts:
            part.save_pretrained(folder)
        write_text(folder / "README.md", readme)
