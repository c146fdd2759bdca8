"""Content hashes: what a model, a processor or a file is, whatever its name, place and time."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

# Fields of a config that say where a model comes from, not what it computes.
_PROVENANCE = {
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "transformers_version",
    "model_type",
    "processor_class",
}


def _computed(config: Any) -> Any:
    if not isinstance(config, dict):
        return config
    return {name: _computed(value) for name, value in config.items() if name not in _PROVENANCE}


@torch.no_grad()
def fingerprint_model(model: Any) -> str:
    """A key of what a model computes: its config, and its weights' names, types and values. Hexadecimal SHA-256."""
    key = hashlib.sha256(json.dumps(_computed(model.config.to_dict()), sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        key.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        key.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return key.hexdigest()


def fingerprint_processor(processor: Any) -> str:
    """A key of what a processor computes: image settings, vocabulary and merges, longest text."""
    image_settings = _computed(processor.image_processor.to_dict())
    tokenizer = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    tokenizer = {name: value for name, value in tokenizer.items() if name not in ("truncation", "padding")}  # a call's
    parts = [image_settings, tokenizer, processor.tokenizer.model_max_length]
    return combine_keys([json.dumps(part, sort_keys=True, default=str) for part in parts])


_BLOCK = 1 << 20


def hash_file(path: Path, digest: "hashlib._Hash") -> None:
    """Feed a file's bytes to a digest, in blocks."""
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)


def model_revision(name_or_path: str | os.PathLike, model: torch.nn.Module) -> str:
    """Identify the weights.

    Args:
        name_or_path (`str` or `os.PathLike`): What the model was loaded from: a folder or a Hub id.
        model (`torch.nn.Module`): The loaded model.

    Returns:
        `str`: `sha256:<hex>` of the folder's safetensors (names and bytes, in the order of their names), or
            `commit:<hash>` of the Hub.

    Raises:
        FileNotFoundError: If a folder holds no safetensors.
        ValueError: If a model of the Hub carries no commit hash.
    """
    folder = Path(name_or_path)
    if folder.is_dir():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(
                f"Expected *.safetensors in {folder}, got none. Save the model with `save_pretrained`; pickled "
                "weights are not read."
            )
        digest = hashlib.sha256()
        for file in files:
            digest.update(file.name.encode() + b"\0")
            hash_file(file, digest)
        return f"sha256:{digest.hexdigest()}"
    commit = getattr(model.config, "_commit_hash", None)
    if not commit:
        raise ValueError(
            f"Expected a commit hash with the model {str(name_or_path)!r}, got none. Load it from the Hub by id."
        )
    return f"commit:{commit}"


def combine_keys(keys: Sequence[str]) -> str:
    """One key of several, in their order."""
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()
