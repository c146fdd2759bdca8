"""How families of dual encoders read text, and how wide their shared space is: for teachers and evaluations alike.

It ships with the teacher, and needs no PyTorch.
"""

import string
from typing import Any

from tokenizers import normalizers

# Trained on texts padded to one length, with attention to the padding: less padding, or a mask, would change the
# embedding.
READ_PADDING = ("siglip", "siglip2")
# Embed a text at its end token, which their config names.
READ_AT_END = ("clip", "dclip", "dmclip", "metaclip_2")
# Text of these is lower-cased wherever the tokenizer does not say otherwise: Gemma's, as SigLIP 2 has it, does not.
LOWER_CASED = ("siglip", "siglip2")
# Count positions from the padding token's id on, so the first `pad_token_id + 1` positions hold no token.
COUNT_FROM_PADDING = ("altclip_text_model", "camembert", "roberta", "xlm-roberta")
_LETTERS = string.ascii_lowercase
_CASED_TOKENIZERS = ("GemmaTokenizer", "GemmaTokenizerFast")


def shared_width(config: Any) -> int:
    """The width of a dual encoder's embeddings.

    Args:
        config (`PreTrainedConfig`): Of a dual encoder of transformers or of this package.
    """
    return config.text_config.projection_size if config.model_type in READ_PADDING else config.projection_dim


def longest_positions(text_config: Any) -> int:
    """The largest number of tokens for which a text encoder has places; a very large one where it counts none."""
    positions = getattr(text_config, "max_position_embeddings", 1 << 30)
    if getattr(text_config, "model_type", None) in COUNT_FROM_PADDING:
        positions -= text_config.pad_token_id + 1
    return positions


def prepare_tokenizer(tokenizer: Any, model_type: str | None = None) -> Any:
    """Make a tokenizer read as the model was trained, where transformers leaves undone what the files say.

    Texts are cut and padded on the right. A tokenizer that is declared to lower-case (`do_lower_case`) does so: the
    published files of fixed-size SigLIP 2 declare it beside a `tokenizer.json` that does not. SigLIP 2 reads an end
    token and no start token.

    Args:
        tokenizer: Of transformers; changed in place. A tokenizer of open_clip is left as it is.
        model_type (`str`, *optional*): Of the model's config.

    Returns:
        The same tokenizer.
    """
    if not hasattr(tokenizer, "init_kwargs"):
        return tokenizer
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    gemma = model_type in LOWER_CASED and type(tokenizer).__name__ in _CASED_TOKENIZERS
    if tokenizer.init_kwargs.get("do_lower_case", gemma) and hasattr(tokenizer, "backend_tokenizer"):
        capitals, small = (tokenizer(list(letters))["input_ids"] for letters in (_LETTERS.upper(), _LETTERS))
        if capitals != small:
            backend = tokenizer.backend_tokenizer
            rest = [] if backend.normalizer is None else [backend.normalizer]
            backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *rest])
    if gemma:
        (ids,) = tokenizer(["a"])["input_ids"]
        if ids[0] == tokenizer.bos_token_id or ids[-1] != tokenizer.eos_token_id:
            tokenizer.add_bos_token, tokenizer.add_eos_token = False, True
    return tokenizer
