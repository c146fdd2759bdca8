"""Say what a number was measured with: the weights, the data, the software, the machine."""

import hashlib
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Image
from tqdm.auto import tqdm

PACKAGES = ("modeling_dclip", "torch", "transformers", "accelerate", "datasets", "numpy", "pillow", "open_clip_torch")
_BLOCK = 1 << 20


def environment() -> tuple[dict[str, str], dict[str, Any]]:
    """Describe the software and the machine.

    Returns:
        `tuple[dict, dict]`: `versions` by package, `python` included; `hardware` with `cpu`, `cpu_count` usable by this process,
        `torch_threads`, `gpus` (names) and `platform`.
    """
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    hardware = {
        "cpu": _cpu_name(),
        "cpu_count": usable,
        "torch_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "platform": platform.platform(),
    }
    return versions, hardware


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _hash_file(path: Path, digest: "hashlib._Hash") -> None:
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)


def model_revision(name_or_path: str | os.PathLike, model: torch.nn.Module) -> str:
    """Identify the weights.

    Args:
        name_or_path (`str` or `os.PathLike`): What the model was loaded from: a folder or a Hub id.
        model (`torch.nn.Module`): The loaded model.

    Returns:
        `str`: `sha256:<hex>` of the folder's safetensors (names and bytes, in the order of their names), or `commit:<hash>` of the Hub.

    Raises:
        FileNotFoundError: If a folder holds no safetensors.
        ValueError: If a model of the Hub carries no commit hash.
    """
    folder = Path(name_or_path)
    if folder.is_dir():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(
                f"Expected *.safetensors in {folder}, got none. Save the model with `save_pretrained`; pickled weights are not read."
            )
        digest = hashlib.sha256()
        for file in files:
            digest.update(file.name.encode() + b"\0")
            _hash_file(file, digest)
        return f"sha256:{digest.hexdigest()}"
    commit = getattr(model.config, "_commit_hash", None)
    if not commit:
        raise ValueError(
            f"Expected a commit hash with the model {str(name_or_path)!r}, got none. Load it from the Hub by id."
        )
    return f"commit:{commit}"


def dataset_fingerprint(dataset: Dataset) -> str:
    """Hash what was evaluated: every image's stored bytes, its id, captions and label, in order. Not the files' names or dates.

    Args:
        dataset (`datasets.Dataset`): With `image` and any of `image_id`, `captions`, `label`.

    Returns:
        `str`: `sha256:<hex>`.
    """
    names = [name for name in ("image_id", "captions", "label") if name in dataset.column_names]
    rows = dataset.select_columns(["image", *names]).cast_column("image", Image(decode=False))
    digest = hashlib.sha256()
    for row in tqdm(rows, desc="Fingerprinting the data", unit="image"):
        digest.update(repr([row[name] for name in names]).encode() + b"\0")
        if row["image"]["bytes"] is not None:
            digest.update(row["image"]["bytes"])
        else:
            _hash_file(Path(row["image"]["path"]), digest)
    return f"sha256:{digest.hexdigest()}"
