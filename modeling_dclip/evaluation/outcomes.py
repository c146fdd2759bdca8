"""What every image scored, beside a results file: with it two files can be compared image by image, and an evaluation goes on.

`X.outcomes.safetensors` lies beside `X.json`. Its tensors are named `KEY/METRIC`, where KEY is the [`record_key`] of the record they belong
to, and are of shape (I, 2): the sum and the count of one image. A record without any is still a record.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from modeling_dclip.data.files import replacing

# Records that agree in these are the same measurement.
_IDENTITY = ("format_version", "revision", "benchmark", "dataset_fingerprint", "seed", "condition", "settings")

Outcomes = dict[str, torch.Tensor]


def record_key(record: Mapping[str, Any]) -> str:
    """Identify a measurement: weights, data, settings and the package's version, not the model's path or the time.

    Args:
        record (`dict`): From [`~modeling_dclip.evaluation.results.make_record`].

    Returns:
        `str`: 16 hexadecimal digits.
    """
    identity = {name: record.get(name) for name in _IDENTITY}
    identity["version"] = record["versions"]["modeling_dclip"]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def outcomes_path(results: str | os.PathLike) -> Path:
    """Where the outcomes of a results file lie: `X.outcomes.safetensors` beside `X.json`."""
    return Path(results).with_suffix(".outcomes.safetensors")


def write_outcomes(results: str | os.PathLike, outcomes: Mapping[str, Outcomes]) -> None:
    """Write outcomes beside a results file, atomically; a file without any is removed.

    Args:
        results (`str` or `os.PathLike`): The results file.
        outcomes (`Mapping[str, dict]`): [`record_key`] -> metric -> tensor of shape (I, 2).
    """
    path = outcomes_path(results)
    tensors = {
        f"{key}/{metric}": values.contiguous()
        for key, by_metric in outcomes.items()
        for metric, values in by_metric.items()
    }
    if not tensors:
        path.unlink(missing_ok=True)
        return
    with replacing(path) as temporary:
        temporary.write_bytes(save(tensors))  # save_file would make it readable by its owner alone


def read_outcomes(results: str | os.PathLike) -> dict[str, Outcomes]:
    """Read what lies beside a results file.

    Args:
        results (`str` or `os.PathLike`): The results file.

    Returns:
        `dict[str, dict]`: [`record_key`] -> metric -> tensor; empty where there is no such file.

    Raises:
        ValueError: If the file is damaged or holds something else; it is named.
    """
    path = outcomes_path(results)
    if not path.is_file():
        return {}
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"Expected outcomes in {path}, got a damaged file ({error}). Remove it and evaluate again."
        ) from error
    outcomes: dict[str, Outcomes] = {}
    for name, values in tensors.items():
        key, _, metric = name.partition("/")
        if not metric or values.ndim != 2 or values.shape[1] != 2:
            raise ValueError(
                f"Expected KEY/METRIC of shape (images, 2) in {path}, got {name!r} of shape {tuple(values.shape)}."
            )
        outcomes.setdefault(key, {})[metric] = values
    return outcomes
