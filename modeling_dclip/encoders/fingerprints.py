"""Every content hash of the package: what a model, a processor or a file is, whatever its name, place and time.

All hashes are hexadecimal SHA-256, except [`hash_git_blob`]. [`hash_parts`] is the one that the others are made of.
Caches, records and revisions of earlier runs are found again by these values, so a value never changes;
tests/test_pinned_keys.py holds them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modeling_dclip.encoders import DualEncoder
from modeling_dclip.encoders.families import is_image_side

if TYPE_CHECKING:
    import torch

# Fields of a config that say where a model comes from, not what it computes; left out at every level.
_PROVENANCE = {
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "transformers_version",
    "model_type",
    "processor_class",
}
# The same of a text config; left out at its top level only, as keys of earlier classifiers were made so.
# Fields that models saved before they existed lack: at these values they compute nothing else, so keys stay.
_LATER = {"rotary_scale": 1.0, "rotary_table": False}
_TEXT_PROVENANCE = {"_name_or_path", "architectures", "dtype", "transformers_version"}
_BLOCK = 1 << 20  # bytes of a file read at a time
_PROMPTS_AT_A_TIME = 8192

Part = str | bytes | memoryview | Path


def hash_parts(parts: Iterable[Part]) -> str:
    """Hash the parts one after the other, as if they were joined.

    Args:
        parts (`Iterable`): A text is read as UTF-8, a `Path` as the content of its file, in blocks. Consumed one by
            one, so that a generator holds one part in memory.

    Raises:
        OSError: If a file cannot be read.

    Example:
        >>> hash_parts(["a", b"b"]) == hash_parts(["ab"])
        True
    """
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            for block in _blocks(part):
                digest.update(block)
        else:
            digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            yield block


def hash_bytes(content: str | bytes) -> str:
    """Hash bytes, or a text as UTF-8."""
    return hash_parts([content])


def hash_file(path: str | os.PathLike) -> str:
    """Hash the content of a file, in blocks.

    Raises:
        OSError: If it cannot be read.
    """
    return hash_parts([Path(path)])


def hash_git_blob(path: Path) -> str:
    """The name that git gives the content of a file: hexadecimal SHA-1 of its size and bytes.

    Raises:
        OSError: If it cannot be read.
    """
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    for block in _blocks(path):
        digest.update(block)
    return digest.hexdigest()


def hash_json(value: Any) -> str:
    """Hash a JSON value; the order of an object's fields does not matter.

    Raises:
        TypeError: If JSON cannot hold the value.

    Example:
        >>> hash_json({"a": 1, "b": None}) == hash_json({"b": None, "a": 1})
        True
    """
    return hash_bytes(json.dumps(value, sort_keys=True))


def canonical_json(value: Any) -> str:
    """Settings as one text, whatever the order of their fields. What JSON cannot hold is written as `str` does."""
    return json.dumps(value, sort_keys=True, default=str)


def combine_keys(keys: Sequence[str]) -> str:
    """One key of several, in their order."""
    return hash_bytes("\n".join(keys))


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor of any type and device, in row-major order."""
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _weights(state: Mapping[str, torch.Tensor]) -> Iterator[Part]:
    """Name, shape, type and values of each weight, in the order of the names."""
    for name, tensor in sorted(state.items()):
        yield f"{name} {tuple(tensor.shape)} {tensor.dtype}"
        yield tensor_bytes(tensor)


def _computed(config: Any) -> Any:
    if not isinstance(config, dict):
        return config
    return {
        name: _computed(value)
        for name, value in config.items()
        if name not in _PROVENANCE and not (name in _LATER and value == _LATER[name])
    }


def fingerprint_weights(settings: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> str:
    """A key of a model's settings, without their provenance, and of its weights' names, shapes, types and values."""
    return hash_parts(chain([canonical_json(_computed(dict(settings)))], _weights(state)))


def fingerprint_model(model: Any) -> str:
    """A key of what a model computes: its config and its weights."""
    return fingerprint_weights(model.config.to_dict(), model.state_dict())


def fingerprint_processor(processor: Any) -> str:
    """A key of what a processor computes: image settings, vocabulary and merges, longest text.

    Args:
        processor: With `image_processor` and `tokenizer`: a fast one, or one over a sentencepiece file.
    """
    tokenizer = processor.tokenizer
    if not hasattr(tokenizer, "backend_tokenizer"):
        return _fingerprint_sentencepiece(processor)
    read = json.loads(tokenizer.backend_tokenizer.to_str())
    read = {name: value for name, value in read.items() if name not in ("truncation", "padding")}  # of the last call
    parts = [_computed(processor.image_processor.to_dict()), read, tokenizer.model_max_length]
    return combine_keys([canonical_json(part) for part in parts])


def _fingerprint_sentencepiece(processor: Any) -> str:
    """The file of such a tokenizer, as SigLIP's, is its vocabulary."""
    tokenizer = processor.tokenizer
    places = ("vocab_file", "name_or_path")
    settings = {name: value for name, value in tokenizer.init_kwargs.items() if name not in places}
    parts = [type(tokenizer).__name__, tokenizer.model_max_length, settings, processor.image_processor.to_dict()]
    return combine_keys([hash_file(tokenizer.vocab_file), *(canonical_json(part) for part in parts)])


def fingerprint_text_encoder(model: DualEncoder) -> str:
    """A key of how a model reads token ids: kind, settings and weights of all that is not its image encoder.

    Args:
        model ([`DualEncoder`]): Any; one without `config` is known by its weights alone.
    """
    config: Any = getattr(model, "config", None)
    settings: Any = str(config)
    if hasattr(getattr(config, "text_config", None), "to_dict"):
        text_settings = config.text_config.to_dict()
        settings = {name: value for name, value in text_settings.items() if name not in _TEXT_PROVENANCE}
    kind = type(getattr(model, "text_model", model)).__qualname__
    state = {name: tensor for name, tensor in model.state_dict().items() if not is_image_side(name)}
    return hash_parts(chain([canonical_json([kind, settings])], _weights(state)))


def fingerprint_tokens(processor: Any, prompts: Sequence[str]) -> str:
    """A key of what a tokenizer makes of prompts: their token ids, whatever kind of tokenizer it is.

    Args:
        processor: With `tokenizer`, or a tokenizer itself.
        prompts (`Sequence[str]`): Any number of texts.
    """
    tokenizer = getattr(processor, "tokenizer", processor)

    def token_ids() -> Iterator[str]:
        for start in range(0, len(prompts), _PROMPTS_AT_A_TIME):
            ids = tokenizer(list(prompts[start : start + _PROMPTS_AT_A_TIME]), truncation=True)["input_ids"]
            yield repr(ids.tolist() if hasattr(ids, "tolist") else ids)

    return hash_parts(token_ids())


def model_revision(name_or_path: str | os.PathLike, model: Any) -> str:
    """Identify the weights of a model.

    Args:
        name_or_path (`str` or `os.PathLike`): What the model was loaded from: a folder or a Hub id.
        model (`torch.nn.Module`): The loaded model.

    Returns:
        `str`: `sha256:<hex>` of the folder's safetensors (names and bytes, in the order of their names), or where
            there are none of its `pytorch_model*.bin`; or `commit:<hash>` of the Hub.

    Raises:
        FileNotFoundError: If a folder holds no weights.
        ValueError: If a model of the Hub carries no commit hash.
    """
    folder = Path(name_or_path)
    if folder.is_dir():
        files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
        if not files:
            raise FileNotFoundError(
                f"Expected *.safetensors or pytorch_model.bin in {folder}, got none. Save the model with "
                "`save_pretrained`."
            )
        named: list[tuple[Part, Part]] = [(f"{file.name}\0", file) for file in files]
        return f"sha256:{hash_parts(chain.from_iterable(named))}"
    commit = getattr(model.config, "_commit_hash", None)
    if not commit:
        raise ValueError(
            f"Expected a commit hash with the model {str(name_or_path)!r}, got none. Load it from the Hub by id."
        )
    return f"commit:{commit}"
