"""What differs between families of dual encoders: how each reads text, what it returns, which weights see images."""

import logging
import re
from collections.abc import Sequence
from typing import Any

import torch

from modeling_dclip.encoders import DualEncoder

logger = logging.getLogger(__name__)


class WrongModelError(TypeError, ValueError):
    """A model of another kind than a command works on.

    It is a `TypeError` by its nature, and a `ValueError` because a user's choice of model is at fault, not the code.
    """


# Trained on texts padded to one length, with attention to the padding: less padding, or a mask, would change the
# embedding.
READ_PADDING = ("siglip", "siglip2")
# Count positions from the padding token's id on, so the first `pad_token_id + 1` positions hold no token.
COUNT_FROM_PADDING = ("altclip_text_model", "camembert", "roberta", "xlm-roberta")
# Weights of CLIP, DCLIP, DM-CLIP (transformers) and open_clip that texts do not pass.
_IMAGE_SIDE = re.compile(r"(model\.)?(vision_model\.|visual_projection\.|visual\.|logit_scale$|logit_bias$)")


def is_image_side(name: str) -> bool:
    """Whether texts do not pass the weight of this name: the image encoder's, the logit scale, the logit bias.

    A name of an unknown family counts as the text side's: a key of the text side may then change without need, but it
    never stays the same where the text side differs.
    """
    return _IMAGE_SIDE.match(name) is not None


def projected(output: Any) -> torch.Tensor:
    """The shared-space embeddings in the result of `get_*_features`: a tensor or an output object of transformers.

    Returns:
        `torch.Tensor` of shape `(B, D)`: Unchanged, not normalised.

    Raises:
        WrongModelError: If there is not one embedding per row, as with models that embed every token.
    """
    embeds = output if isinstance(output, torch.Tensor) else output.pooler_output
    if not isinstance(embeds, torch.Tensor) or embeds.ndim != 2:
        got = tuple(embeds.shape) if isinstance(embeds, torch.Tensor) else type(embeds).__name__
        raise WrongModelError(
            f"Expected one embedding a row, (B, D), from a dual encoder, got {got}. This model has no such space."
        )
    return embeds


def longest_text(model: DualEncoder, tokenizer: Any) -> int:
    """The largest number of tokens that both model and tokenizer accept, BOS and EOS included."""
    config: Any = getattr(model.config, "text_config", None)
    positions = getattr(config, "max_position_embeddings", 1 << 30)
    if getattr(config, "model_type", None) in COUNT_FROM_PADDING:
        positions -= config.pad_token_id + 1
    return min(tokenizer.model_max_length, positions)


def tokenize_texts(
    model: DualEncoder, processor: Any, texts: Sequence[str], *, max_length: int | None = None
) -> dict[str, torch.Tensor]:
    """Tokenize texts as the model's family reads them.

    SigLIP and SigLIP 2 read texts padded to their full length, without a mask, as in training. open_clip pads by
    itself. Every other model gets a batch padded to its longest text, and a mask. A text that is too long is cut, its
    end token kept; a warning counts such texts.

    Args:
        model ([`DualEncoder`]): Any; its `config` says the family.
        processor: The model's processor, or its tokenizer alone.
        texts (`Sequence[str]`): B texts.
        max_length (`int`, *optional*): A smaller limit, applied without a warning. Models that read one length only
            ignore it.

    Returns:
        `dict[str, torch.Tensor]`: Arguments of `get_text_features`, on the CPU: `input_ids` `(B, T)` and, where the
            family reads it, `attention_mask`.
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
