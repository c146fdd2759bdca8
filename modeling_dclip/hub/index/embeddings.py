"""Image embeddings in a folder, keyed by the content of the images, so that no image is embedded twice.

A chunk holds the embeddings of some images with their keys, and the keys of images that could not be read. After a
killed run, or when a folder has grown, only the images that no chunk has are embedded.
"""

import logging
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch.utils.data import DataLoader

from modeling_dclip.data.chunks import Chunk, compute_chunks, read_chunk
from modeling_dclip.data.files import list_folder
from modeling_dclip.data.images import PixelReader
from modeling_dclip.encoders import DualEncoder, Encoder
from modeling_dclip.encoders.families import projected
from modeling_dclip.encoders.fingerprints import canonical_json, combine_keys, fingerprint_model
from modeling_dclip.encoders.open_clip import OpenClipDualEncoder, fingerprint_open_clip

logger = logging.getLogger(__name__)

KEY_BYTES = 32  # of a SHA-256


def fingerprint_encoder(model: DualEncoder, processor: Any) -> str:
    """Key how a model embeds images and texts: its config, its weights and its image settings.

    Args:
        model ([`DualEncoder`]): The model.
        processor: The model's processor.

    Returns:
        `str`: A hexadecimal SHA-256.
    """
    if isinstance(model, OpenClipDualEncoder):  # its config has no `to_dict`
        return fingerprint_open_clip(model, processor)
    images = processor.image_processor
    settings = images.to_dict() if hasattr(images, "to_dict") else re.sub(r" at 0x\w+", "", repr(vars(images)))
    return combine_keys([fingerprint_model(model), canonical_json(settings)])


@torch.no_grad()
def embed_readable(encoder: Encoder, reader: PixelReader, rows: Sequence[int]) -> tuple[np.ndarray, list[bool]]:
    """Embed the rows whose image can be read.

    Args:
        encoder ([`Encoder`]): The dual encoder, in eval mode and on its device, with batch size and workers.
        reader ([`PixelReader`]): Reads the dataset.
        rows (`Sequence[int]`): Rows of the dataset.

    Returns:
        `tuple`: Embeddings `(readable, D)`, float32 and L2-normalised, and for each row whether it was read.

    Raises:
        ValueError: If an embedding is zero or not finite.
    """
    model = encoder.model
    loader: DataLoader = DataLoader(
        list(rows),  # type: ignore[arg-type]  # any sequence is a dataset to torch
        encoder.batch_size,
        collate_fn=partial(_collate, reader),
        num_workers=encoder.num_workers,
        pin_memory=model.device.type == "cuda",
    )
    embeds, readable = [], []
    for inputs, was_read in loader:
        readable += was_read
        if inputs is None:
            continue
        inputs = {name: tensor.to(model.device, non_blocking=True) for name, tensor in inputs.items()}
        inputs["pixel_values"] = reader.normalise(inputs["pixel_values"]).to(model.dtype)
        embeds.append(projected(model.get_image_features(**inputs)).float().cpu())
    found = torch.cat(embeds) if embeds else torch.zeros(0, 0)
    norms = found.norm(dim=1, keepdim=True)
    bad = ~torch.isfinite(norms[:, 0]) | (norms[:, 0] == 0)
    if bad.any():
        row = [row for row, is_read in zip(rows, readable, strict=True) if is_read][int(bad.nonzero()[0])]
        raise ValueError(
            f"Expected finite, non-zero embeddings, got {int(bad.sum())} bad ones of {len(found)}. The first is of "
            f"the image {reader.images.select_columns('image_id')[row]['image_id']!r}. Check the model's weights and "
            "precision."
        )
    return (found / norms).numpy(), readable


def _collate(reader: PixelReader, rows: list[int]) -> tuple[dict[str, torch.Tensor] | None, list[bool]]:
    """The model's inputs for the rows whose image can be read, and for each row whether it can."""
    try:
        return _decode(reader, rows), [True] * len(rows)
    except ValueError:  # also of the image processor; find the damaged images one by one
        parts = [_decode_or_none(reader, row) for row in rows]
    there = [part for part in parts if part is not None]
    merged = {name: torch.cat([part[name] for part in there]) for name in there[0]} if there else None
    return merged, [part is not None for part in parts]


def _decode(reader: PixelReader, rows: list[int]) -> dict[str, torch.Tensor]:
    several = len(reader.input_names) > 1
    return reader.decode_inputs(rows) if several else {"pixel_values": reader.decode(rows)}


def _decode_or_none(reader: PixelReader, row: int) -> dict[str, torch.Tensor] | None:
    try:
        return _decode(reader, [row])
    except ValueError:
        return None


class EmbeddingStore:
    """The chunks of one encoder, in a folder of their own.

    Args:
        folder (`Path`): The folder of the chunks of all encoders.
        encoder (`str`): The key of the encoder, as [`fingerprint_encoder`] returns it.

    Raises:
        ValueError: If a chunk is damaged; the message names the file.
    """

    def __init__(self, folder: Path, encoder: str):
        self.folder, self.encoder = Path(folder) / encoder[:16], encoder
        self.place_of: dict[bytes, tuple[Path, int]] = {}
        self.unreadable: set[bytes] = set()
        for path in list_folder(self.folder, "*.safetensors"):
            self._register(path)

    def _register(self, path: Path) -> None:
        chunk = read_chunk(path)
        sizes = {name: chunk[name].shape for name in ("keys", "unreadable", "image_embeds") if name in chunk}
        if len(sizes) < 3 or sizes["keys"][0] != sizes["image_embeds"][0]:
            raise ValueError(f"Expected keys, unreadable and image_embeds in '{path}', got {sizes}. Delete the file.")
        for place, key in enumerate(chunk["keys"]):
            self.place_of[key.tobytes()] = (path, place)
        self.unreadable |= {key.tobytes() for key in chunk["unreadable"]}

    def add(
        self,
        keys: Sequence[str | None],
        compute: Callable[[Sequence[int]], tuple[np.ndarray, list[bool]]],
        chunk_rows: int,
    ) -> int:
        """Compute the embeddings that no chunk has. Several processes share the work, and then know all chunks.

        Args:
            keys (`Sequence[str | None]`): The key of every row; rows without one are skipped.
            compute (`Callable`): Embeds rows, and says which were read, as [`embed_readable`] does.
            chunk_rows (`int`): Images in one file.

        Returns:
            `int`: The number of different images that are embedded now.
        """
        PartialState().wait_for_everyone()  # every process has read the folder before one writes
        new: dict[str, int] = {}
        for row, key in enumerate(keys):
            if key is not None and not self.knows(key):
                new.setdefault(key, row)
        rows_of, names = list(new.values()), list(new)
        if not names:
            return 0

        def make_chunk(places: range) -> Chunk:
            embeds, readable = compute([rows_of[place] for place in places])
            raw = _as_bytes([names[place] for place in places])
            read = np.array(readable, dtype=bool)
            return {"keys": raw[read], "unreadable": raw[~read], "image_embeds": embeds}

        paths = compute_chunks(
            names,
            make_chunk,
            made_by=self.encoder,
            cache_dir=self.folder,
            chunk_rows=chunk_rows,
            desc="Embedding images",
        )
        for path in paths:
            self._register(path)
        return sum(map(self.has, names))

    def knows(self, key: str) -> bool:
        """Whether a chunk has the image of this key, as an embedding or as one that could not be read."""
        return self.has(key) or bytes.fromhex(key) in self.unreadable

    def has(self, key: str | None) -> bool:
        """Whether a chunk has an embedding of the image of this key."""
        return key is not None and bytes.fromhex(key) in self.place_of

    def read(self, keys: Sequence[str]) -> torch.Tensor:
        """Read embeddings by their keys. Each chunk is read once.

        Args:
            keys (`Sequence[str]`): Keys of images that have an embedding.

        Returns:
            `torch.Tensor` of shape `(len(keys), D)`: float32, L2-normalised.
        """
        wanted: dict[Path, list[tuple[int, int]]] = {}
        for row, key in enumerate(keys):
            path, place = self.place_of[bytes.fromhex(key)]
            wanted.setdefault(path, []).append((row, place))
        embeds: torch.Tensor | None = None
        for path, pairs in wanted.items():
            chunk = torch.from_numpy(read_chunk(path)["image_embeds"])
            embeds = torch.empty(len(keys), chunk.shape[1]) if embeds is None else embeds
            rows, places = zip(*pairs, strict=True)
            embeds[list(rows)] = chunk[list(places)]
        return torch.zeros(0, 0) if embeds is None else embeds


def _as_bytes(keys: Sequence[str]) -> np.ndarray:
    """Hexadecimal keys as uint8 `(len(keys), 32)`."""
    return np.frombuffer(bytes.fromhex("".join(keys)), dtype=np.uint8).reshape(-1, KEY_BYTES)
