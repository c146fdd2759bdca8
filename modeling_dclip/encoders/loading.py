"""Load a dual encoder of any family, ready to be evaluated, and say which weights it has.

| function | gives |
|---|---|
| [`load_dual_encoder`] | model, processor and revision, of any family |
| [`load_pair`] | model and processor, of any family |
| [`load_merged`] | a model of this package, its adapters merged |
| [`load_checked`] | a model of a given class, every weight stored |
"""

import logging
import os
import string
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModel, AutoProcessor, PreTrainedModel

from modeling_dclip.encoders import DualEncoder
from modeling_dclip.encoders.families import WrongModelError, check_end_token, prepare_tokenizer
from modeling_dclip.encoders.fingerprints import model_revision
from modeling_dclip.encoders.open_clip import (
    OPEN_CLIP_PREFIX,
    OpenClipDualEncoder,
    fingerprint_open_clip,
    load_open_clip,
)
from modeling_dclip.modeling_dclip import DCLIPModel
from modeling_dclip.modeling_dclip_teacher import DCLIPTeacher
from modeling_dclip.modeling_dmclip import DMCLIPModel
from modeling_dclip.processing_dclip import DCLIPProcessor

logger = logging.getLogger(__name__)

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FOLDER, ADAPTER_WEIGHTS = "adapter", "adapter_model.safetensors"  # where training writes adapters
# By model_type. A stock CLIP is the base that an adapter names, and becomes a DCLIP.
DUAL_ENCODERS = {"dclip": DCLIPModel, "clip": DCLIPModel, "dmclip": DMCLIPModel}
_NAMED = 5  # missing weights in a message


def require_dual_encoder(model: Any, where: str = "") -> None:
    """Refuse a model that does not embed images and texts.

    Args:
        model: Any.
        where (`str`, *optional*): Where it came from, for the message.

    Raises:
        WrongModelError: If one of the two methods is missing.
    """
    missing = [name for name in ("get_image_features", "get_text_features") if not hasattr(model, name)]
    if missing:
        raise WrongModelError(
            "Expected a dual encoder such as CLIPModel with get_image_features and "
            f"get_text_features{f' at {where!r}' if where else ''}, got {type(model).__name__} without {missing}. "
            "Name the dual checkpoint, not one tower."
        )


def check_weights(path: Path) -> None:
    """Check that a file of weights has its full length. Its values are not read.

    Args:
        path (`Path`): A safetensors file.

    Raises:
        ValueError: If it is cut or none.
    """
    try:
        with safe_open(path, "pt"):
            pass
    except SafetensorError as error:
        raise ValueError(f"Expected whole weights in '{path}', got a damaged file ({error}).") from error


def load_checked(model_class: Any, name: str | os.PathLike, **options: Any) -> Any:
    """Load a model of which every weight is stored; transformers would draw a missing one at random, with a warning.

    Args:
        model_class (`type`): With `from_pretrained`: a model or one of transformers' Auto classes.
        name (`str` or `os.PathLike`): Folder or Hub id.
        options: Of `from_pretrained`. `dtype` is float32 unless given.

    Returns:
        `PreTrainedModel`: In eval mode, on the CPU.

    Raises:
        WrongModelError: If a teacher is asked for, and it is none.
        ValueError: If a weight is missing, or the file is damaged.
    """
    if model_class is DCLIPTeacher and (found := AutoConfig.from_pretrained(name).model_type) != "dclip_teacher":
        raise WrongModelError(f"Expected a DCLIP teacher at '{name}', got a model of type {found!r}.")
    try:
        model, report = model_class.from_pretrained(
            name, output_loading_info=True, **({"dtype": torch.float32} | options)
        )
    except OSError as error:
        if Path(name).exists():
            raise
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise OSError(
            f"Expected a model at '{name}', got neither a folder of that name nor a model of the Hub ({reason}). "
            "Check the name."
        ) from error
    except SafetensorError as error:
        raise ValueError(
            f"Expected whole weights at '{name}', got a damaged file ({error}). Fetch it again."
        ) from error
    if missing := sorted(report["missing_keys"]):
        named = ", ".join(missing[:_NAMED]) + (", ..." if len(missing) > _NAMED else "")
        raise ValueError(
            f"Expected all weights of {type(model).__name__} at '{name}', got {len(missing)} missing ({named}): they "
            "would be random. It is another architecture's checkpoint, or one tower's."
        )
    return model.eval()


def load_pair(spec: str | Path, *, trust_remote_code: bool = False) -> tuple[DualEncoder, Any]:
    """Load a dual encoder in float32 on the CPU, in eval mode, with its processor.

    The image processor has the PIL backend where there is one.

    Args:
        spec (`str` or `Path`): A folder, a Hub id, or one of open_clip's.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Run code that comes with the model.

    Returns:
        `tuple`: The model, and a processor with `image_processor` and `tokenizer`.

    Raises:
        FileNotFoundError: If a folder is missing or holds no safetensors.
        ImportError: If open_clip is named and not installed.
        WrongModelError: If the model is no dual encoder.
        ValueError: If weights are damaged or missing, if the processor lacks files or one half, if the tokenizer's
            end token is not the text encoder's, or as in [`load_open_clip`].
    """
    name = str(spec)
    if name.startswith(OPEN_CLIP_PREFIX):
        return load_open_clip(name)
    _check_folder(name)
    options = {"trust_remote_code": trust_remote_code}
    model = load_checked(AutoModel, name, **options)
    require_dual_encoder(model, name)
    processor = _load_processor(name, options)
    check_processor(processor, name)
    prepare_tokenizer(processor.tokenizer, model.config.model_type)
    check_end_token(model, processor.tokenizer, name)
    if getattr(processor.image_processor, "backend", "pil") != "pil":
        logger.warning(
            "%s has no image processor of the PIL backend: its pixels differ from PIL's by 1-2 grey levels.", name
        )
    return model, processor


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
    """Refuse a processor that lacks one half, or whose tokenizer transformers made up because its files are missing.

    Args:
        processor: With `image_processor` and `tokenizer`.
        name (`str`): Where it came from, for the message.

    Raises:
        ValueError: If something is missing; the message says what.
    """
    lacking = [half for half in ("image_processor", "tokenizer") if getattr(processor, half, None) is None]
    if lacking:
        raise ValueError(
            f"Expected a processor with image_processor and tokenizer in {name!r}, got {type(processor).__name__} "
            f"without {lacking}. Save both beside the weights."
        )
    # Where the files are missing, transformers makes a tokenizer without a vocabulary, without a warning.
    read = processor.tokenizer(list(string.ascii_lowercase))["input_ids"]
    if len({tuple(ids) for ids in read}) == 1:
        raise ValueError(
            f"Expected a tokenizer that tells letters apart in {name!r}, got a {type(processor.tokenizer).__name__} "
            f"of {len(processor.tokenizer)} tokens that does not. Save the tokenizer's files beside the weights."
        )


def load_dual_encoder(spec: str | Path, *, trust_remote_code: bool = False) -> tuple[DualEncoder, Any, str]:
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
        WrongModelError: If the model is no dual encoder.
        ValueError: If weights or half of the processor are missing, or open_clip does not know a name.
    """
    model, processor = load_pair(spec, trust_remote_code=trust_remote_code)
    if isinstance(model, OpenClipDualEncoder):
        return model, processor, f"sha256:{fingerprint_open_clip(model)}"
    return model, processor, model_revision(spec, model)


def load_merged(model: str | os.PathLike) -> PreTrainedModel:
    """Load a dual encoder of this package in float32, with PEFT adapters merged.

    Adapters in the folder, or in `adapter/` of a folder without whole weights, are loaded over the model that they
    name and merged into it.

    Args:
        model (`str` or `os.PathLike`): Folder or Hub id.

    Returns:
        [`DCLIPModel`] or [`DMCLIPModel`]: In eval mode, on the CPU.

    Raises:
        ImportError: If there are adapters and `peft` is not installed.
        ValueError: If it is no dual encoder, a weight is missing, or the file is damaged.
    """
    if (adapter := find_adapter(model)) is not None:
        return _merge_adapters(adapter)
    model_type = AutoConfig.from_pretrained(model).model_type
    if model_type not in DUAL_ENCODERS:
        raise ValueError(
            f"Expected a dual encoder ({', '.join(DUAL_ENCODERS)}) at '{model}', got {model_type!r}. Give the folder "
            "that holds both towers."
        )
    return load_checked(DUAL_ENCODERS[model_type], model)


def _merge_adapters(folder: Path) -> PreTrainedModel:
    try:
        from peft import PeftConfig, PeftModel
    except ImportError as error:
        raise ImportError(
            f"'{folder}' holds adapters: expected peft, got {error}. Install it with `pip install "
            "modeling_dclip[peft]`."
        ) from error
    base = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    if not base:
        raise ValueError(
            f"Expected base_model_name_or_path in {folder / ADAPTER_CONFIG}, got none. Name the model there."
        )
    return PeftModel.from_pretrained(load_merged(base), str(folder)).merge_and_unload().eval()


def find_adapter(model: str | os.PathLike) -> Path | None:
    """The folder of an adapter that replaces whole weights, if there is one.

    It is the model's own folder, or `adapter/` in it, where training with `merge_adapter: false` writes.
    """
    folder, inner = Path(model), Path(model) / ADAPTER_FOLDER
    if (folder / ADAPTER_CONFIG).is_file():
        return folder
    return inner if (inner / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file() else None


def load_processor(model: str | os.PathLike) -> DCLIPProcessor:
    """Load the processor of a dual encoder.

    Args:
        model (`str` or `os.PathLike`): Folder or Hub id.

    Returns:
        [`DCLIPProcessor`]

    Raises:
        OSError: If the image processor's file is missing.
        ValueError: If the tokenizer's files are missing.
    """
    processor = DCLIPProcessor.from_pretrained(model)
    check_processor(processor, str(model))
    prepare_tokenizer(processor.tokenizer)
    return processor
