"""The model a spec names, ready to be evaluated, and which weights they are."""

import logging
import string
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModel, AutoProcessor

from modeling_dclip.encoders.families import WrongModelError
from modeling_dclip.encoders.fingerprints import model_revision
from modeling_dclip.encoders.open_clip import OPEN_CLIP, fingerprint_open_clip, load_open_clip

logger = logging.getLogger(__name__)
NAMED = 5  # of keys in a message


def require_dual_encoder(model: torch.nn.Module, where: str = "") -> None:
    """Refuse a model that does not embed images and texts.

    Args:
        model (`torch.nn.Module`): Any.
        where (`str`, *optional*): It came from, for the message.

    Raises:
        WrongModelError: If it has not both methods.
    """
    missing = [name for name in ("get_image_features", "get_text_features") if not hasattr(model, name)]
    if missing:
        raise WrongModelError(
            "Expected a dual encoder such as CLIPModel with get_image_features and "
            f"get_text_features{f' at {where!r}' if where else ''}, got {type(model).__name__} without {missing}. "
            "Name the dual checkpoint, not one tower."
        )


def load_pair(spec: str | Path, *, trust_remote_code: bool = False) -> tuple[torch.nn.Module, Any]:
    """Load a dual encoder in float32 on the CPU, in eval mode, with its processor, of the PIL backend where there is
    one.

    Args:
        spec (`str` or `Path`): A folder, a Hub id, or one of open_clip's.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Run code that comes with the model.

    Returns:
        `tuple`: The model, and a processor with `image_processor` and `tokenizer`.

    Raises:
        FileNotFoundError: If a folder is missing or holds no safetensors.
        ImportError: If open_clip is named and not installed.
        TypeError: If the model is no dual encoder.
        ValueError: If weights are damaged, or missing, so that they would be random; if the processor lacks files or a
            half; as [`load_open_clip`].
    """
    name = str(spec)
    if name.startswith(OPEN_CLIP):
        return load_open_clip(name)
    _check_folder(name)
    options = {"trust_remote_code": trust_remote_code}
    try:
        model, report = AutoModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True, **options)
    except SafetensorError as error:
        raise ValueError(
            f"Expected whole weights in {name!r}, got a damaged file ({error}). Fetch it again."
        ) from error
    require_dual_encoder(model, name)
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"Expected all weights of {type(model).__name__} in {name!r}, got {len(missing)} missing "
            f"({', '.join(missing[:NAMED])}...): they would be random. It is another architecture's checkpoint, or "
            "one tower's."
        )
    processor = _load_processor(name, options)
    check_processor(processor, name)
    if getattr(processor.image_processor, "backend", "pil") != "pil":
        logger.warning(
            "%s has no image processor of the PIL backend: its pixels differ from PIL's by 1-2 grey levels.", name
        )
    return model.eval(), processor


def _check_folder(name: str) -> None:
    folder = Path(name)
    if folder.is_dir():
        if not any(folder.glob("*.safetensors")):
            raise FileNotFoundError(
                f"Expected *.safetensors in {name}, got none. Save the model with `save_pretrained`; pickled weights "
                "are not read."
            )
    elif folder.is_absolute() or len(folder.parts) > 2 or name.startswith("."):  # a Hub id is organisation/name
        raise FileNotFoundError(f"Expected a folder with a model at {name}, got none. Check the path.")


def _load_processor(name: str, options: dict[str, Any]) -> Any:
    try:
        return AutoProcessor.from_pretrained(name, backend="pil", **options)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"Expected the files of a processor in {name!r} (preprocessor_config.json and those of a tokenizer), got: "
            f"{reason} Save them beside the weights."
        ) from error


def check_processor(processor: Any, name: str) -> None:
    """Refuse a processor with a half missing, or with a tokenizer that transformers made up because its files were not
    there.

    Args:
        processor: With `image_processor` and `tokenizer`.
        name (`str`): Where it came from, for the message.

    Raises:
        ValueError: Saying what is missing.
    """
    lacking = [half for half in ("image_processor", "tokenizer") if getattr(processor, half, None) is None]
    if lacking:
        raise ValueError(
            f"Expected a processor with image_processor and tokenizer in {name!r}, got {type(processor).__name__} "
            f"without {lacking}. Save both beside the weights."
        )
    # Where its files are missing, transformers makes up a tokenizer without a vocabulary, and says nothing.
    read = processor.tokenizer(list(string.ascii_lowercase))["input_ids"]
    if len({tuple(ids) for ids in read}) == 1:
        raise ValueError(
            f"Expected a tokenizer that tells letters apart in {name!r}, got a {type(processor.tokenizer).__name__} "
            f"of {len(processor.tokenizer)} tokens that does not. Save the tokenizer's files beside the weights."
        )


def load_dual_encoder(spec: str | Path, *, trust_remote_code: bool = False) -> tuple[torch.nn.Module, Any, str]:
    """Load any CLIP-like model in float32 on the CPU, in eval mode, with the PIL image processor.

    Args:
        spec (`str` or `Path`): A folder or Hub id of a dual encoder of this package or of transformers (CLIP, SigLIP,
            SigLIP 2, ALIGN, AltCLIP, Chinese-CLIP, MetaCLIP 2, ...), or `open_clip:NAME:PRETRAINED`, where PRETRAINED
            is a tag or a file of weights.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Run code that comes with the model.

    Returns:
        `tuple`: The model, with `get_image_features` and `get_text_features`; its processor; and the revision of its
            weights: `sha256:<hex>` of a folder's files or of open_clip's state dict, or `commit:<hash>` of the Hub.

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
