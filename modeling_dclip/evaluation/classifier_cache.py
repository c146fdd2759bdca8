"""Zero-shot classifiers kept on disk and in memory: 1,000 classes of 80 prompts are read once a text encoder, not once an evaluation.

An entry's key is the content of what made it: the text side's weights and settings, names, templates, and the token ids that the
tokenizer makes of them. Checkpoints that a frozen text encoder have its classifiers in common, whatever became of their image encoders.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from modeling_dclip.data.columns import combine_keys
from modeling_dclip.data.files import replacing

# Parameters of CLIP, DCLIP, DM-CLIP (transformers) and open_clip that texts do not pass. A name not listed counts as the text side's.
_NOT_TEXT = re.compile(r"(model\.)?(vision_model\.|visual_projection\.|visual\.|logit_scale$|logit_bias$)")
_PROVENANCE = {"_name_or_path", "architectures", "dtype", "transformers_version"}  # of a config: not what it computes
_PROMPTS_AT_A_TIME = 8192
_HELD = 64  # classifiers in memory; one of ImageNet takes 2 to 3 MiB


def default_cache_dir() -> Path:
    """`modeling_dclip/classifiers` in the user's cache folder (`XDG_CACHE_HOME`, else `~/.cache`)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "modeling_dclip" / "classifiers"


@torch.no_grad()
def fingerprint_text_encoder(model: torch.nn.Module) -> str:
    """A key of how a model reads token ids: kind, settings and weights of all that is not its image encoder. Hexadecimal SHA-256.

    Args:
        model (`torch.nn.Module`): A dual encoder.
    """
    config = getattr(model, "config", None)
    settings = (
        config.text_config.to_dict() if hasattr(getattr(config, "text_config", None), "to_dict") else str(config)
    )
    if isinstance(settings, dict):
        settings = {name: value for name, value in settings.items() if name not in _PROVENANCE}
    kind = type(getattr(model, "text_model", model)).__qualname__
    digest = hashlib.sha256(json.dumps([kind, settings], sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if not _NOT_TEXT.match(name):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def fingerprint_tokens(processor: Any, prompts: Sequence[str]) -> str:
    """A key of what a tokenizer makes of prompts: their token ids, whatever kind of tokenizer it is. Hexadecimal SHA-256.

    Args:
        processor: With `tokenizer`, or a tokenizer itself.
        prompts (`Sequence[str]`): Any number of texts.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    digest = hashlib.sha256()
    for start in range(0, len(prompts), _PROMPTS_AT_A_TIME):
        ids = tokenizer(list(prompts[start : start + _PROMPTS_AT_A_TIME]), truncation=True)["input_ids"]
        digest.update(repr(ids.tolist() if isinstance(ids, torch.Tensor) else ids).encode())
    return digest.hexdigest()


class ClassifierCache:
    """Classifiers by content, on disk and in memory.

    Files are written whole or not at all, so a killed run leaves no half of one, and several processes may share a folder. Those used
    longest ago are deleted when the folder grows beyond its bound.

    Args:
        folder (`str` or `os.PathLike`, *optional*): Where files are, e.g. [`default_cache_dir`]. Without one, classifiers are kept in
            memory alone.
        limit_mib (`int`, *optional*, defaults to 1024): Bound of the folder in MiB, >= 1.

    Raises:
        ValueError: If `limit_mib` is below 1.
    """

    def __init__(self, folder: str | os.PathLike | None = None, limit_mib: int = 1024):
        if limit_mib < 1:
            raise ValueError(f"Expected limit_mib >= 1, got {limit_mib}. To keep nothing, pass no cache.")
        self.folder = None if folder is None else Path(folder)
        self.limit_mib = limit_mib
        self._held: dict[str, torch.Tensor] = {}

    def get(
        self,
        model: torch.nn.Module,
        processor: Any,
        class_names: Sequence[str],
        templates: Sequence[str],
        build: Callable[[], torch.Tensor],
    ) -> torch.Tensor:
        """The classifier of a model for some classes, built if there is none.

        Args:
            model, processor: As in [`fingerprint_text_encoder`] and [`fingerprint_tokens`].
            class_names, templates (`Sequence[str]`): What it is for; templates with `{}`.
            build (`Callable`): Called without arguments where there is none; gives float32 `(K, D)` on the CPU.

        Returns:
            `torch.Tensor` of shape `(K, D)`: float32, on the CPU. Not to be changed in place.

        Raises:
            ValueError: If a file is damaged.
        """
        prompts = [template.replace("{}", name) for name in class_names for template in templates]
        made_of = json.dumps([list(class_names), list(templates)], ensure_ascii=False)
        key = combine_keys([fingerprint_text_encoder(model), fingerprint_tokens(processor, prompts), made_of])
        classifier = self._held.pop(key, None)
        if classifier is None:
            classifier = self._read(key)
        if classifier is None:
            classifier = build()
            self._write(key, classifier)
        self._held[key] = classifier  # last in the order, so the first to go is the one used longest ago
        while len(self._held) > _HELD:
            del self._held[next(iter(self._held))]
        return classifier

    def clear(self) -> int:
        """Delete all files of the folder and forget what is in memory; returns how many files there were."""
        self._held.clear()
        files = self._files()
        for path in files:
            path.unlink(missing_ok=True)
        return len(files)

    def _files(self) -> list[Path]:
        return [] if self.folder is None else list(self.folder.glob("*.safetensors"))

    def _read(self, key: str) -> torch.Tensor | None:
        if self.folder is None:
            return None
        path = self.folder / f"{key}.safetensors"
        try:
            classifier = load_file(path)["classifier"]
            os.utime(path)  # used just now, for the choice of what to delete
        except FileNotFoundError:  # never there, or deleted by another process
            return None
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"The cached classifier '{path}' is damaged ({error}). Delete the file.") from error
        return classifier

    def _write(self, key: str, classifier: torch.Tensor) -> None:
        if self.folder is None:
            return
        path = self.folder / f"{key}.safetensors"
        with replacing(path) as temporary:
            save_file({"classifier": classifier.contiguous()}, temporary)
        self._shrink(keep=path)

    def _shrink(self, keep: Path) -> None:
        sizes = {}
        for path in self._files():
            try:
                status = path.stat()
            except FileNotFoundError:  # another process deleted it
                continue
            sizes[path] = status.st_mtime_ns, status.st_size
        total = sum(size for _, size in sizes.values())
        for path in sorted(set(sizes) - {keep}, key=lambda path: sizes[path][0]):
            if total <= self.limit_mib * 2**20:
                break
            path.unlink(missing_ok=True)
            total -= sizes[path][1]
