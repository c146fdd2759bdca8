"""The model a spec names, ready to be evaluated, and which weights they are."""

from pathlib import Path
from typing import Any

import torch

from modeling_dclip.data.dual_encoders import load_pair
from modeling_dclip.data.open_clip_models import OPEN_CLIP, fingerprint_open_clip
from modeling_dclip.evaluation.provenance import model_revision


def load_dual_encoder(spec: str | Path, *, trust_remote_code: bool = False) -> tuple[torch.nn.Module, Any, str]:
    """Load any CLIP-like model in float32 on the CPU, in eval mode, with the PIL image processor.

    Args:
        spec (`str` or `Path`): A folder or Hub id of a dual encoder of this package or of transformers (CLIP, SigLIP, SigLIP 2, ALIGN,
            AltCLIP, Chinese-CLIP, MetaCLIP 2, ...), or `open_clip:NAME:PRETRAINED`, where PRETRAINED is a tag or a file of weights.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Run code that comes with the model.

    Returns:
        `tuple`: The model, with `get_image_features` and `get_text_features`; its processor; and the revision of its weights:
            `sha256:<hex>` of a folder's files or of open_clip's state dict, or `commit:<hash>` of the Hub.

    Raises:
        FileNotFoundError: If a folder is missing or holds no safetensors.
        ImportError: If open_clip is named and not installed.
        TypeError: If the model is no dual encoder.
        ValueError: If weights or half of the processor are missing, or open_clip does not know a name.
    """
    model, processor = load_pair(spec, trust_remote_code=trust_remote_code)
    if str(spec).startswith(OPEN_CLIP):
        return model, processor, f"sha256:{fingerprint_open_clip(model)}"
    return model, processor, model_revision(spec, model)
