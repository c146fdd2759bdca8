"""Any CLIP-like model as a pair: a model with `get_image_features` and `get_text_features`, and the processor that feeds it.

A folder or Hub id loads through transformers, `open_clip:...` through [`~modeling_dclip.data.open_clip_models.load_open_clip`].
How a family reads text is said here once, in [`tokenize_texts`].
"""

import logging
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModel, AutoProcessor

from modeling_dclip.data.open_clip_models import OPEN_CLIP, load_open_clip

logger = logging.getLogger(__name__)

# Trained on texts padded to one length, with the padding attended to: less of it, or a mask, would change the embedding.
READ_PADDING = ("siglip", "siglip2")
# Count positions from the padding token's id on, so that as many of them are no places of a text.
COUNT_FROM_PADDING = ("altclip_text_model", "camembert", "roberta", "xlm-roberta")
NAMED = 5  # of keys in a message


def require_dual_encoder(model: torch.nn.Module, where: str = "") -> None:
    """Refuse a model that does not embed images and texts.

    Args:
        model (`torch.nn.Module`): Any.
        where (`str`, *optional*): It came from, for the message.

    Raises:
        TypeError: If it has not both methods.
    """
    missing = [name for name in ("get_image_features", "get_text_features") if not hasattr(model, name)]
    if missing:
        raise TypeError(
            f"Expected a dual encoder such as CLIPModel with get_image_features and get_text_features"
            f"{f' at {where!r}' if where else ''}, got {type(model).__name__} without {missing}. Name the dual checkpoint, not one "
            "tower."
        )


def projected(output: Any) -> torch.Tensor:
    """The shared-space vectors in what `get_*_features` returned: a tensor, or an output object of transformers.

    Returns:
        `torch.Tensor` of shape `(B, D)`: As they are, not normalised.

    Raises:
        TypeError: If there is not one vector a row, as of models that embed every token.
    """
    embeds = output if isinstance(output, torch.Tensor) else output.pooler_output
    if not isinstance(embeds, torch.Tensor) or embeds.ndim != 2:
        got = tuple(embeds.shape) if isinstance(embeds, torch.Tensor) else type(embeds).__name__
        raise TypeError(
            f"Expected one embedding a row, (B, D), from a dual encoder, got {got}. This model has no such space."
        )
    return embeds


def load_pair(spec: str | Path, *, trust_remote_code: bool = False) -> tuple[torch.nn.Module, Any]:
    """Load a dual encoder in float32 on the CPU, in eval mode, with its processor, of the PIL backend where there is one.

    Args:
        spec (`str` or `Path`): A folder, a Hub id, or one of open_clip's.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Run code that comes with the model.

    Returns:
        `tuple`: The model, and a processor with `image_processor` and `tokenizer`.

    Raises:
        FileNotFoundError: If a folder is missing or holds no safetensors.
        ImportError: If open_clip is named and not installed.
        TypeError: If the model is no dual encoder.
        ValueError: If weights are damaged, or missing, so that they would be random; if the processor lacks files or a half; as
            [`load_open_clip`].
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
            f"Expected all weights of {type(model).__name__} in {name!r}, got {len(missing)} missing ({', '.join(missing[:NAMED])}...): "
            "they would be random. It is another architecture's checkpoint, or one tower's."
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
                f"Expected *.safetensors in {name}, got none. Save the model with `save_pretrained`; pickled weights are not read."
            )
    elif folder.is_absolute() or len(folder.parts) > 2 or name.startswith("."):  # a Hub id is organisation/name
        raise FileNotFoundError(f"Expected a folder with a model at {name}, got none. Check the path.")


def _load_processor(name: str, options: dict[str, Any]) -> Any:
    try:
        return AutoProcessor.from_pretrained(name, backend="pil", **options)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"Expected the files of a processor in {name!r} (preprocessor_config.json and those of a tokenizer), got: {reason} Save them "
            "beside the weights."
        ) from error


def check_processor(processor: Any, name: str) -> None:
    """Refuse a processor with a half missing, or with a tokenizer that transformers made up because its files were not there.

    Args:
        processor: With `image_processor` and `tokenizer`.
        name (`str`): Where it came from, for the message.

    Raises:
        ValueError: Saying what is missing.
    """
    lacking = [half for half in ("image_processor", "tokenizer") if getattr(processor, half, None) is None]
    if lacking:
        raise ValueError(
            f"Expected a processor with image_processor and tokenizer in {name!r}, got {type(processor).__name__} without {lacking}. "
            "Save both beside the weights."
        )
    # Where its files are missing, transformers makes up a tokenizer without a vocabulary, and says nothing.
    read = processor.tokenizer(list(string.ascii_lowercase))["input_ids"]
    if len({tuple(ids) for ids in read}) == 1:
        raise ValueError(
            f"Expected a tokenizer that tells letters apart in {name!r}, got a {type(processor.tokenizer).__name__} of "
            f"{len(processor.tokenizer)} tokens that does not. Save the tokenizer's files beside the weights."
        )


def longest_text(model: torch.nn.Module, tokenizer: Any) -> int:
    """Tokens of the longest text that model and tokenizer take, BOS and EOS included."""
    config = getattr(model.config, "text_config", None)
    positions = getattr(config, "max_position_embeddings", 1 << 30)
    if getattr(config, "model_type", None) in COUNT_FROM_PADDING:
        positions -= config.pad_token_id + 1
    return min(tokenizer.model_max_length, positions)


def tokenize_texts(
    model: torch.nn.Module, processor: Any, texts: Sequence[str], *, max_length: int | None = None
) -> dict[str, torch.Tensor]:
    """Texts as the model reads them; one too long is cut, its end token kept, and counted in a warning.

    SigLIP and SigLIP 2 read texts padded to their full length, without a mask, as in training; open_clip pads by itself; every other
    model gets a batch padded to its longest text, and a mask.

    Args:
        model (`torch.nn.Module`): With `config`.
        processor: The model's processor, or its tokenizer alone.
        texts (`Sequence[str]`): B texts.
        max_length (`int`, *optional*): Cut here, if the model takes more, and silently; without effect on models that read one
            length only.

    Returns:
        `dict[str, torch.Tensor]`: What to call `get_text_features` with: `input_ids` `(B, T)` and, where it is read, `attention_mask`;
            on the CPU.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    longest, texts = longest_text(model, tokenizer), list(texts)
    fixed = model.config.model_type in READ_PADDING
    if max_length is not None and not fixed:
        longest = min(longest, max_length)
    options = {"padding": "max_length" if fixed else True, "padding_side": "right", "return_attention_mask": True}
    tokens = tokenizer(texts, truncation=True, max_length=longest, return_tensors="pt", **options)
    if max_length is None and "attention_mask" in tokens:  # open_clip's tokenizer has none, and cuts by itself
        _report_cut(tokenizer, texts, tokens["attention_mask"], longest)
    names = ("input_ids",) if fixed else ("input_ids", "attention_mask")
    return {name: tokens[name] for name in names if name in tokens}


def _report_cut(tokenizer: Any, texts: list[str], mask: torch.Tensor, longest: int) -> None:
    full = (mask.sum(dim=1) >= longest).nonzero()[:, 0].tolist()
    if not full:
        return
    whole = tokenizer([texts[row] for row in full], truncation=False, padding=False, verbose=False)["input_ids"]
    cut = [row for row, ids in zip(full, whole, strict=True) if len(ids) > longest]
    if cut:
        logger.warning(
            "%d of %d texts exceed %d tokens and are cut there, end token kept; first: %r...",
            *(len(cut), len(texts), longest, texts[cut[0]][:60]),
        )
