"""Rows of a caption dataset to samples of a reinforced one: augmented, captioned, embedded by every teacher.

What is done with an image: each of its augmentations is drawn, and replayed at the training size S by
[`~modeling_dclip.data.stored_augmentations.replay_augmentation`]. That gives S x S pixels of 8 bits, the very ones a student will see before
normalisation. Each teacher takes these through its own preprocessing, its resizing, cut and normalisation included.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from tqdm.auto import tqdm

from modeling_dclip.data.collation import pass_batch
from modeling_dclip.data.columns import encoded_images
from modeling_dclip.data.reinforced_samples import open_image, pack_sample, storable_image
from modeling_dclip.data.reinforced_teachers import ReinforcementTeacher, TransformersCaptioner
from modeling_dclip.data.stored_augmentations import (
    AugmentationSettings,
    StoredAugmentation,
    draw_augmentation,
    replay_augmentation,
)

TEXTS_PER_PASS = 256
IMAGES_PER_LOT = 16  # captioned together, whatever batch_size is: a lot decides the captioner's draws
DTYPES = ("float16", "float32")


class _AugmentedImages(TorchDataset):
    """Every augmentation of every image as each teacher reads it, made in the data loader's workers."""

    def __init__(
        self, images: Sequence[bytes], augmentations: list[list[StoredAugmentation]], size: int, preprocess: list
    ):
        self.images, self.augmentations, self.size, self.preprocess = images, augmentations, size, preprocess
        self.each = len(augmentations[0])

    def __len__(self) -> int:
        return len(self.images) * self.each

    def __getitems__(self, items: list[int]) -> list[torch.Tensor]:
        decoded = {row: open_image(self.images[row]) for row in {item // self.each for item in items}}
        augmented = [
            replay_augmentation(
                decoded[item // self.each], self.augmentations[item // self.each][item % self.each], self.size
            )
            for item in items
        ]
        return [preprocess(augmented) for preprocess in self.preprocess]


class ReinforcedRow(NamedTuple):
    """A row with all that its sample holds.

    Args:
        image_id (`str`): The row's.
        image (`tuple[str, bytes]`): Kind and content, as stored.
        captions (`list[str]`): C.
        synthetic_captions (`list[str]`): S, or none.
        augmentations (`list[StoredAugmentation]`): A.
        image_embeds (`np.ndarray` of shape `(A, W)`): Of the augmented images.
        text_embeds (`np.ndarray` of shape `(C + S, W)`): The captions first.
    """

    image_id: str
    image: tuple[str, bytes]
    captions: list[str]
    synthetic_captions: list[str]
    augmentations: list[StoredAugmentation]
    image_embeds: np.ndarray
    text_embeds: np.ndarray

    def pack(self) -> dict[str, bytes]:
        """The members of the sample."""
        return pack_sample(
            self.image,
            self.captions,
            self.synthetic_captions,
            [augmentation.encode() for augmentation in self.augmentations],
            self.image_embeds,
            self.text_embeds,
            {"image_id": self.image_id},
        )

    def require_finite(self) -> None:
        """Refuse embeddings that hold NaN or infinity.

        Raises:
            ValueError: If one does.
        """
        for name in ("image_embeds", "text_embeds"):
            if not np.isfinite(getattr(self, name)).all():
                raise ValueError(
                    f"Image {self.image_id!r}: expected finite {name} from the teachers, got NaN or infinity. Check their weights."
                )


@dataclass
class Reinforcer:
    """Turns rows of a dataset into samples.

    Args:
        dataset (`datasets.Dataset`): With `image_id` and `image`.
        captions (`list[list[str]]`): Of each row.
        synthetic_captions (`list[list[str]]` or None): Of each row, if they are known.
        captioner ([`~modeling_dclip.data.reinforced_teachers.TransformersCaptioner`] or None): Writes them otherwise; without, there are none.
        teachers (`Sequence`): See [`~modeling_dclip.data.reinforced_teachers.ReinforcementTeacher`].
        settings ([`~modeling_dclip.data.stored_augmentations.AugmentationSettings`]): What augmentations are drawn from.
        augmentations (`int`, *optional*, defaults to 30): Of each image.
        seed (`int`, *optional*, defaults to 0): Of the draws.
        dtype (`str`, *optional*, defaults to `"float16"`): Of the embeddings, or `"float32"`.
        batch_size (`int`, *optional*, defaults to 64): Augmented images a forward pass.
        num_workers (`int`, *optional*, defaults to 0): Processes that decode and augment.

    Raises:
        ValueError: If there is no teacher or an argument is out of range.
    """

    dataset: Dataset
    captions: list[list[str]]
    synthetic_captions: list[list[str]] | None
    captioner: TransformersCaptioner | None
    teachers: Sequence[ReinforcementTeacher]
    settings: AugmentationSettings
    augmentations: int = 30
    seed: int = 0
    dtype: Literal["float16", "float32"] = "float16"
    batch_size: int = 64
    num_workers: int = 0

    def __post_init__(self):
        if not self.teachers or min(self.augmentations, self.batch_size) < 1 or self.dtype not in DTYPES:
            raise ValueError(
                f"Expected one or more teachers, augmentations and a batch_size of at least 1, and a dtype of {DTYPES}, got "
                f"{len(self.teachers)}, {self.augmentations}, {self.batch_size} and {self.dtype!r}."
            )

    def samples(self, rows: range, progress: tqdm) -> list[ReinforcedRow]:
        """The samples of rows.

        Args:
            rows (`range`): Of the dataset.
            progress (`tqdm`): Counts augmented images.

        Raises:
            ValueError: If an image cannot be read, the captioner has nothing to say of it, or an embedding is not finite; the message
                names the image.
        """
        part = self.dataset.select(rows)
        image_ids = part["image_id"][:]
        named = enumerate(zip(image_ids, encoded_images(part), strict=True), rows.start)
        images = [_storable(row, image_id, encoded) for row, (image_id, encoded) in named]
        encoded = [content for _, content in images]
        drawn = [self._draw(image_id, content) for image_id, content in zip(image_ids, encoded, strict=True)]
        captions = [self.captions[row] for row in rows]
        if self.synthetic_captions is None:
            synthetic = self._caption(image_ids, encoded, rows)
        else:
            synthetic = [self.synthetic_captions[row] for row in rows]
        image_embeds = self._encode_images(encoded, drawn, progress)
        texts = [[*real, *made] for real, made in zip(captions, synthetic, strict=True)]
        text_embeds = self._encode_texts([text for row in texts for text in row])
        ends = np.cumsum([len(row) for row in texts])
        columns = (image_ids, images, captions, synthetic, drawn, image_embeds, np.split(text_embeds, ends[:-1]))
        samples = [ReinforcedRow(*row) for row in zip(*columns, strict=True)]
        for sample in samples:
            sample.require_finite()
        return samples

    def _draw(self, image_id: str, encoded: bytes) -> list[StoredAugmentation]:
        size = Image.open(io.BytesIO(encoded)).size
        numbers = range(self.augmentations)
        return [draw_augmentation(self.seed, image_id, number, size, self.settings) for number in numbers]

    def _caption(self, image_ids: Sequence[str], images: Sequence[bytes], rows: range) -> list[list[str]]:
        if self.captioner is None:
            return [[] for _ in rows]
        found: list[list[str]] = []
        for start in range(0, len(rows), IMAGES_PER_LOT):
            batch = [open_image(image) for image in images[start : start + IMAGES_PER_LOT]]
            found += self.captioner(batch, lot=rows[start])
        silent = [image_id for image_id, texts in zip(image_ids, found, strict=True) if not texts]
        if silent:
            raise ValueError(
                f"Expected a caption of image {silent[0]!r} from {self.captioner.name!r}, got none with words ({len(silent)} such images in "
                "this shard). Use another captioner or a column."
            )
        return found

    def _encode_images(self, images: list[bytes], drawn: list[list[StoredAugmentation]], progress: tqdm) -> np.ndarray:
        """`(rows, augmentations, W)`."""
        preprocess = [teacher.preprocess for teacher in self.teachers]
        augmented = _AugmentedImages(images, drawn, self.settings.image_size, preprocess)
        loader = DataLoader(augmented, batch_size=self.batch_size, num_workers=self.num_workers, collate_fn=pass_batch)
        embeds = []
        for batch in loader:
            views = zip(self.teachers, batch, strict=True)
            embeds.append(np.concatenate([teacher.encode_images(pixels) for teacher, pixels in views], axis=1))
            progress.update(len(batch[0]))
        return np.concatenate(embeds).astype(self.dtype).reshape(len(images), self.augmentations, -1)

    def _encode_texts(self, texts: list[str]) -> np.ndarray:
        """`(texts, W)`."""
        starts = range(0, len(texts), TEXTS_PER_PASS)
        passes = [texts[start : start + TEXTS_PER_PASS] for start in starts]
        embeds = [[teacher.encode_texts(part) for teacher in self.teachers] for part in passes]
        return np.concatenate([np.concatenate(part, axis=1) for part in embeds]).astype(self.dtype)


def _storable(row: int, image_id: str, encoded: bytes) -> tuple[str, bytes]:
    try:
        kind, encoded = storable_image(encoded)
        open_image(encoded)
    except ValueError as error:
        raise ValueError(f"Image {image_id!r} (row {row}): {error}. Replace the file or drop the row.") from error
    return kind, encoded
