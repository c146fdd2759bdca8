"""Read other projects' weights, and compare them with what a model expects."""

import argparse
import os
import pickle
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

WRAPPERS = ("state_dict", "model")
PREFIXES = ("module.", "model.")
_LISTED_KEYS = 8  # of each kind, in a message


def read_checkpoint(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Read the weights of a file. Only tensors and plain values are unpickled, so no code in the file is run.

    Args:
        path (`str` or `os.PathLike`): A `.safetensors` file, or one that `torch.save` wrote: a state dict, or a
            training checkpoint that holds one as `state_dict` or `model`. Prefixes `module.` and `model.` are removed.

    Returns:
        `dict[str, torch.Tensor]`: On the CPU, in the file's dtypes.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, would run code, or holds no weights or values that are not finite.
    """
    path = Path(path)
    if not path.is_file():
        found = "a folder: name a file in it" if path.is_dir() else "nothing there"
        raise FileNotFoundError(f"Expected a checkpoint file at {path}, got {found}.")
    content = _load(path)
    while isinstance(content, Mapping) and (inner := next((name for name in WRAPPERS if name in content), None)):
        if not isinstance(content[inner], Mapping):
            raise ValueError(
                f"Expected a state dict under {inner!r} of {path}, got {type(content[inner]).__name__}. "
                "Save the model's `state_dict()`."
            )
        content = content[inner]
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"Expected a state dict in {path}, got {type(content).__name__} without weights.")
    for key, value in content.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(
                f"Expected a tensor at {key!r} of {path}, got {type(value).__name__}. Is it a checkpoint?"
            )
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"Expected finite weights at {key!r} of {path}, got NaN or infinity.")
    return _strip_prefixes(dict(content), path)


def _load(path: Path) -> object:
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(
                f"Expected whole safetensors in {path} ({path.stat().st_size} bytes), got {error}. Download it again."
            ) from error
    try:
        # Training checkpoints hold their arguments as a Namespace, which only holds values and runs no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"Expected tensors and plain values in {path}, got what only running code could unpickle, or no "
            f"checkpoint at all ({reason}). Load it where it was made, and save its `state_dict()` as safetensors."
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise ValueError(
            f"Expected a file of `torch.save` or .safetensors at {path} ({path.stat().st_size} bytes), got a damaged "
            f"or foreign one ({str(error).splitlines()[0] if str(error) else type(error).__name__}). Download it "
            "again."
        ) from error


def _strip_prefixes(weights: dict[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
    """Remove prefixes that more than half of the keys have; a single renamed key must not keep them."""
    while prefix := next(
        (prefix for prefix in PREFIXES if 2 * sum(key.startswith(prefix) for key in weights) > len(weights)), None
    ):
        stripped = [key.removeprefix(prefix) for key in weights]
        if double := [key for key, count in Counter(stripped).items() if count > 1]:
            raise ValueError(f"Expected the key {double[0]!r} once in {path}, got it with and without {prefix!r}.")
        weights = dict(zip(stripped, weights.values(), strict=True))
    return weights


def shape_of(
    weights: Mapping[str, torch.Tensor], key: str, dimensions: int, path: str | os.PathLike
) -> tuple[int, ...]:
    """Look up the shape of a weight that the architecture is read from.

    Args:
        weights (`Mapping[str, torch.Tensor]`): Read from the checkpoint.
        key (`str`): The weight's name in the checkpoint.
        dimensions (`int`): The number of dimensions that it must have.
        path (`str` or `os.PathLike`): The checkpoint's file, for messages.

    Returns:
        `tuple[int, ...]`: All > 0.

    Raises:
        ValueError: If the key is missing, has another number of dimensions, or is empty.
    """
    if key not in weights:
        raise ValueError(
            f"Expected the key {key!r} in {path}, got none: 1 missing. The architecture is read from its shape."
        )
    found = tuple(weights[key].shape)
    if len(found) != dimensions or 0 in found:
        raise ValueError(f"{key!r} in {path}: expected {dimensions} dimensions, none empty, got the shape {found}.")
    return found


def check_keys(
    weights: Mapping[str, torch.Tensor], expected: Mapping[str, tuple[int, ...]], path: str | os.PathLike, what: str
) -> None:
    """Compare a checkpoint with the keys and shapes that it should have.

    Args:
        weights (`Mapping[str, torch.Tensor]`): Read from the checkpoint.
        expected (`Mapping[str, torch.Size]`): Shapes by the checkpoint's own names.
        path (`str` or `os.PathLike`): The checkpoint's file, for messages.
        what (`str`): The architecture's name, for messages.

    Raises:
        ValueError: If a key is missing, left over or of another shape; the message names the keys.
    """
    shapes = {key: tuple(value.shape) for key, value in weights.items()}
    problems = {
        "missing": [key for key in expected if key not in shapes],
        "left over": [key for key in shapes if key not in expected],
        "of another shape": [
            f"{key} (expected {tuple(shape)}, got {shapes[key]})"
            for key, shape in expected.items()
            if key in shapes and shapes[key] != tuple(shape)
        ],
    }
    if not any(problems.values()):
        return
    parts = []
    for kind, keys in problems.items():
        if keys:
            more = f" and {len(keys) - _LISTED_KEYS} more" if len(keys) > _LISTED_KEYS else ""
            parts.append(f"{len(keys)} {kind}: {', '.join(keys[:_LISTED_KEYS])}{more}")
    raise ValueError(
        f"Expected the {len(expected)} keys of {what} in {path}, got {'; '.join(parts)}. Is it a checkpoint of this "
        "architecture, whole and unchanged?"
    )
