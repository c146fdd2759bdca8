"""What differs between families of dual encoders: how each reads text, what it returns, which weights see images."""

from __future__ import annotations

import logging
import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import TYPE_CHECKING, Any

from modeling_dclip.encoders import DualEncoder
from modeling_dclip.progress import count_of
from modeling_dclip.text_reading import (  # noqa: F401  what does not ship reads them here
    READ_AT_END,
    READ_PADDING,
    longest_positions,
    prepare_tokenizer,
    shared_width,
)

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


class WrongModelError(TypeError, ValueError):
    """A model of another kind than a command works on.

    It is a `TypeError` by its nature, and a `ValueError` because a user's choice of model is at fault, not the code.
    """


# Trained with SigLIP's sigmoid loss, whose scale and bias they hold.
SIGMOID_TRAINED = ("siglip", "siglip2")
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")
_LETTERS = string.ascii_lowercase
# No tokenizer counts so far: transformers' number for one that does not say how much it reads.
_UNSTATED_LENGTH = 10**9
# Weights of CLIP, DCLIP, DM-CLIP (transformers) and open_clip that texts do not pass.
_IMAGE_SIDE = re.compile(r"(model\.)?(vision_model\.|visual_projection\.|visual\.|logit_scale$|logit_bias$)")


def is_image_side(name: str) -> bool:
    """Whether texts do not pass the weight of this name: the image encoder's, the logit scale, the logit bias.

    A name of an unknown family counts as the text side's: a key of the text side may then change without need, but it
    never stays the same where the text side differs.
    """
    return _IMAGE_SIDE.match(name) is not None


def image_modules(model: Any) -> tuple[str, ...]:
    """Prefixes of the names of a dual encoder's weights that images pass and texts do not, without scale and bias.

    Args:
        model ([`DualEncoder`]): Of transformers or of this package.

    Returns:
        `tuple[str, ...]`: Such as `("vision_model.", "visual_projection.")`.
    """
    return tuple(f"{name}." for name, _ in model.named_children() if is_image_side(f"{name}."))


def projected(output: Any) -> torch.Tensor:
    """The shared-space embeddings in the result of `get_*_features`: a tensor or an output object of transformers.

    Returns:
        `torch.Tensor` of shape `(B, D)`: Unchanged, not normalised.

    Raises:
        WrongModelError: If there is not one embedding per row, as with models that embed every token.
    """
    import torch

    embeds = output if isinstance(output, torch.Tensor) else output.pooler_output
    if not isinstance(embeds, torch.Tensor) or embeds.ndim != 2:
        got = tuple(embeds.shape) if isinstance(embeds, torch.Tensor) else type(embeds).__name__
        raise WrongModelError(
            f"Expected one embedding a row, (B, D), from a dual encoder, got {got}. This model has no such space."
        )
    return embeds


def check_end_token(model: DualEncoder, tokenizer: Any, where: str) -> None:
    """Refuse a tokenizer whose texts do not end where the model reads them.

    CLIP and its kin embed a text at the first end token that their config names, or at the highest id where the config
    says 2, CLIP's old convention. Where a text has no such token they read its first place: all texts are then one.

    Args:
        model ([`DualEncoder`]): Any; other families pass.
        tokenizer: The model's.
        where (`str`): Where both came from, for the message.

    Raises:
        ValueError: If the two do not fit.
    """
    if model.config.model_type not in READ_AT_END or not hasattr(tokenizer, "init_kwargs"):
        return
    from modeling_dclip.modeling_dclip import LEGACY_EOS_TOKEN_ID

    end = model.config.text_config.eos_token_id
    highest = end == LEGACY_EOS_TOKEN_ID and model.config.model_type in ("clip", "dclip")
    for ids in tokenizer(["a photo of a dog", *_LETTERS])["input_ids"]:
        if not ids or ids[-1] != (max(ids) if highest else end):
            said = "the highest id of a text" if highest else f"the token {end}"
            raise ValueError(
                f"Expected a tokenizer in {where!r} whose texts end in {said}, where the text encoder reads them, got "
                f"{ids}. Save the tokenizer that the model was trained with, or correct `text_config.eos_token_id`."
            )


def stated_length(tokenizer: Any, where: str) -> int:
    """The number of tokens that a tokenizer says it reads, to make a text encoder of as many places.

    Raises:
        ValueError: If it states none.
    """
    if tokenizer.model_max_length >= _UNSTATED_LENGTH:
        raise ValueError(
            f"Expected the tokenizer at {where!r} to state its longest text, got no model_max_length in "
            "tokenizer_config.json. Set it there, e.g. to 77."
        )
    return int(tokenizer.model_max_length)


def longest_text(model: DualEncoder, tokenizer: Any) -> int:
    """The largest number of tokens that both model and tokenizer accept, BOS and EOS included."""
    return min(tokenizer.model_max_length, longest_positions(getattr(model.config, "text_config", None)))


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

    Raises:
        ValueError: If a text holds half a character, as bytes that are no UTF-8 become on a command line.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    longest, texts = longest_text(model, tokenizer), list(texts)
    halved = next((text for text in texts if _HALF_CHARACTER.search(text)), None)
    if halved is not None:
        raise ValueError(f"Expected texts in UTF-8, got half a character in {halved!a:.80}. Write it again in UTF-8.")
    fixed = model.config.model_type in READ_PADDING
    if max_length is not None and not fixed:
        longest = min(longest, max_length)
    options = {"padding": "max_length" if fixed else True, "padding_side": "right", "return_attention_mask": True}
    tokens = tokenizer(texts, truncation=True, max_length=longest, return_tensors="pt", **options)
    if max_length is None:
        _report_cut(tokenizer, texts, tokens, longest)
    names = ("input_ids",) if fixed else ("input_ids", "attention_mask")
    return {name: tokens[name] for name in names if name in tokens}


def count_tokens(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """How many tokens each text has, with its end token, before any is cut."""
    if hasattr(tokenizer, "count_tokens"):  # open_clip's
        return list(tokenizer.count_tokens(texts))
    return [len(ids) for ids in tokenizer(list(texts), truncation=False, padding=False, verbose=False)["input_ids"]]


def _report_cut(tokenizer: Any, texts: list[str], tokens: Any, longest: int) -> None:
    full = range(len(texts))
    if "attention_mask" in tokens:  # open_clip's tokenizer has none
        full = (tokens["attention_mask"].sum(dim=1) >= longest).nonzero()[:, 0].tolist()
    lengths = count_tokens(tokenizer, [texts[row] for row in full]) if full else []
    cut = [texts[row] for row, length in zip(full, lengths, strict=True) if length > longest]
    report_cut(cut, len(texts), longest, "text")


_Cuts = dict[tuple[int, str], tuple[Counter[str], str]]  # by limit and noun: the numbers, and the first text
_counted_cuts: ContextVar[_Cuts | None] = ContextVar("counted_cuts", default=None)


@contextmanager
def counting_cuts() -> Iterator[None]:
    """Tell the texts that are cut within the block in one line at its end, and not batch by batch.

    A block within a block adds to the outer one.
    """
    if _counted_cuts.get() is not None:
        yield
        return
    found: _Cuts = {}
    token = _counted_cuts.set(found)
    try:
        yield
    finally:
        _counted_cuts.reset(token)
    for (longest, noun), (numbers, first) in found.items():
        if numbers["cut"]:
            tell_cut_once(numbers["cut"], numbers["all"], longest, noun, first)


def report_cut(cut: Sequence[str], count: int, longest: int, noun: str) -> None:
    """Tell that texts were cut, or count them for the block of [`counting_cuts`] that this is in.

    Args:
        cut (`Sequence[str]`): The texts that were cut.
        count (`int`): How many texts were tokenized, with these.
        longest (`int`): Tokens that the model reads.
        noun (`str`): What the texts are, such as `"caption"`.
    """
    if (found := _counted_cuts.get()) is not None:
        numbers, first = found.get((longest, noun), (Counter(), ""))
        numbers.update(cut=len(cut), all=count)
        found[longest, noun] = numbers, first or next(iter(cut), "")
    elif cut:
        tell_cut_once(len(cut), count, longest, noun, cut[0])


@cache  # the anchor, its student and every arm cut the same texts
def tell_cut_once(cut: int, count: int, longest: int, noun: str, first: str) -> None:
    """Log how many texts were cut, unless this process has said just that before; arguments as in [`report_cut`]."""
    logger.warning(
        "Cut %s of %s after %d tokens, end token kept; first: %r...",
        *(f"{cut:,}", count_of(count, noun), longest, first[:60]),
    )
