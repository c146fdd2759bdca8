"""Save a dual encoder's processor so that transformers alone reads texts from the folder as the model was trained."""

import copy
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from modeling_dclip.configuration_dclip_teacher import NATIVE_ENCODERS
from modeling_dclip.encoders.families import READ_PADDING, longest_text, tokenize_texts

_TEXTS = (
    "a dog on a beach",
    "A Dog On THE BEACH",
    "",
    "  a \t dog \n on\r\na beach  ",
    "a dog and " * 60,
    "海滩上的狗",
)


def save_processor(model: Any, processor: Any, folder: Path) -> None:
    """Save a processor beside the weights of its model.

    Where the class of a tokenizer undoes at loading what
    [`~modeling_dclip.text_reading.prepare_tokenizer`] did, as Gemma's does, its parts are saved as they are. A model
    with code of this package needs none of it: its processor prepares the tokenizer itself.

    Args:
        model: The dual encoder; its config says how it reads texts.
        processor: With `tokenizer`.
        folder (`Path`): An existing folder.

    Raises:
        ValueError: If transformers alone reads other tokens from the folder than the model was trained with.
    """
    processor.save_pretrained(folder)
    if model.config.model_type not in NATIVE_ENCODERS:
        return
    padded, longest = model.config.model_type in READ_PADDING, longest_text(model, processor.tokenizer)
    expected = tokenize_texts(model, copy.deepcopy(processor.tokenizer), _TEXTS, max_length=longest)
    options = {"padding": "max_length" if padded else True, "truncation": True, "max_length": longest}
    for attempt in ("as it is", "its parts"):
        if attempt == "its parts" and hasattr(processor.tokenizer, "backend_tokenizer"):
            _keep_parts(processor.tokenizer, padded).save_pretrained(folder)
        read = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)(_TEXTS, return_tensors="pt", **options)
        if read.keys() == expected.keys() and all(torch.equal(read[name], expected[name]) for name in expected):
            return
    raise ValueError(
        f"Expected a tokenizer that transformers alone reads as the model was trained, got a "
        f"{type(processor.tokenizer).__name__} that gives other tokens when it is loaded again."
    )


def _keep_parts(tokenizer: Any, padded: bool) -> PreTrainedTokenizerFast:
    """A tokenizer of no class of its own, with the parts of another."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    options = {"padding_side": "right", "truncation_side": "right", "model_max_length": tokenizer.model_max_length}
    options["model_input_names"] = ["input_ids"] if padded else ["input_ids", "attention_mask"]
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special, **options)
