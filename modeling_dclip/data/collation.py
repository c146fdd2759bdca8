"""Turn rows into batches for the three models that train: anchor, teacher, student.

Each class is a map-style dataset whose `__getitems__` returns one collated batch for a list of rows, so a `DataLoader`
needs only [`pass_batch`] as its `collate_fn`. Columns are held as arrays. Images are held as resized uint8 pixels, as
long as they fit into a bound.

The caption of a row is a pure function of seed, epoch and row ([`choose_captions`]). A resumed run, and a run of
several processes, see the captions that an uninterrupted run of one process sees. The epoch lies in memory that the
workers of a `DataLoader` share ([`SharedNumbers`]), so that workers that outlive an epoch draw for the next one too.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import Dataset as TorchDataset
from transformers import PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor

from modeling_dclip.data.columns import (
    Ragged,
    arrow_column,
    check_entries,
    check_finite,
    column_lengths,
    flat_column,
    ragged_column,
)
from modeling_dclip.data.images import PixelReader, random_resized_crop
from modeling_dclip.encoders import DualEncoder
from modeling_dclip.encoders.families import READ_PADDING, longest_text, report_cut
from modeling_dclip.processing_dclip import DCLIPProcessor

MOST_NEGATIVES = 16  # false captions of an image in one step
_NEGATIVES_STREAM = 8  # of the seed


def pass_batch(batch: Any) -> Any:
    """A `collate_fn` that changes nothing, because the datasets here return whole batches."""
    return batch


def _mix(numbers: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: uint64 in, evenly spread uint64 out."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def random_numbers(seed: int, epoch: int, rows: np.ndarray, stream: int = 0) -> np.ndarray:
    """Draw a number in [0, 1) for each row: a pure function of seed, epoch, row and stream.

    Example:
        >>> bool((random_numbers(0, 1, np.arange(3)) == random_numbers(0, 1, np.arange(3))).all())
        True
    """
    with np.errstate(over="ignore"):
        state = np.uint64(0x9E3779B97F4A7C15)
        for part in (seed, stream, epoch):
            state = _mix(np.asarray((int(state) + part) % 2**64, dtype=np.uint64)[None])[0]
        return (
            _mix(np.asarray(rows, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + state) >> np.uint64(11)
        ) * 2.0**-53


def choose_captions(seed: int, epoch: int, rows: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Choose one caption of each row for this epoch.

    Args:
        seed (`int`): Another seed gives another choice.
        epoch (`int`): From 0.
        rows (`np.ndarray` of shape `(B,)`): Rows of the dataset.
        counts (`np.ndarray` of shape `(B,)`): Captions of each row, >= 1.

    Returns:
        `np.ndarray` of shape `(B,)`: Indices, `0 <= index < count`.
    """
    return (random_numbers(seed, epoch, rows) * counts).astype(np.int64)


def read_captions(dataset: Dataset) -> Ragged:
    """Read and check the captions of all rows.

    Raises:
        ValueError: If a row has no caption or a blank one; the message names the first such image and counts them.
    """
    captions = arrow_column(dataset, "captions").to_pylist()
    bad = [row for row, texts in enumerate(captions) if not texts or not all(text and text.strip() for text in texts)]
    if bad:
        raise ValueError(
            f"Image {dataset['image_id'][bad[0]]!r} (row {bad[0]}): expected one or more captions with words, got "
            f"{captions[bad[0]]!r} ({len(bad)} such rows in all). Drop these rows or give them captions."
        )
    lengths = np.array([len(texts) for texts in captions])
    return Ragged.from_lengths(np.array([text for texts in captions for text in texts], dtype=object), lengths)


def tokenize_captions(
    tokenizer: PreTrainedTokenizerBase, captions: Iterable[str], max_length: int | None = None
) -> Ragged:
    """Tokenize captions, with BOS and EOS. A caption that is too long is cut, keeping EOS; a warning counts them.

    Args:
        tokenizer (`CLIPTokenizer`): Any fast tokenizer that puts EOS last.
        captions (`Iterable[str]`): C captions.
        max_length (`int`, *optional*): Tokens kept. Defaults to the tokenizer's `model_max_length`.

    Returns:
        [`Ragged`]: int32 ids of C rows.
    """
    max_length, captions = max_length or tokenizer.model_max_length, list(captions)
    rows = tokenizer(captions, padding=False, truncation=False, verbose=False)["input_ids"]
    too_long = [row for row, ids in enumerate(rows) if len(ids) > max_length]
    for row in too_long:
        rows[row] = [*rows[row][: max_length - 1], rows[row][-1]]
    report_cut([captions[row] for row in too_long], len(rows), max_length, "caption")
    ids = np.fromiter((token for row in rows for token in row), dtype=np.int32)
    return Ragged.from_lengths(ids, np.array([len(row) for row in rows]))


class SharedNumbers:
    """Whole numbers that a dataset and its copies in the workers of a `DataLoader` have in common.

    A worker gets its copy when it starts, and a persistent worker starts once. What is set here afterwards, every
    worker sees at once. Set an epoch between two epochs only: within one, workers are ahead of what was given.

    Args:
        count (`int`): How many; all are 0.
    """

    def __init__(self, count: int):
        self._values = torch.zeros(count, dtype=torch.int64).share_memory_()

    def get(self, index: int) -> int:
        """A number."""
        return int(self._values[index])

    def set(self, *numbers: int) -> None:
        """All numbers."""
        self._values.copy_(torch.tensor(numbers, dtype=torch.int64))

    def add_one(self, index: int) -> None:
        """Count at a place that only one process counts at, such as a worker's own."""
        self._values[index] += 1

    def total(self) -> int:
        """The sum of all numbers."""
        return int(self._values.sum())


class Batches(TorchDataset):
    """What the three classes share: one collated batch for a list of rows, and the choice of captions by epoch.

    Args:
        captions_per_row (`np.ndarray` of shape `(N,)`): Captions of each row, >= 1.
        seed (`int`): Of the draw of captions.
        rows (`datasets.Dataset`, *optional*): N rows with `image_id`, to name them in messages.
    """

    def __init__(self, captions_per_row: np.ndarray, seed: int, rows: Dataset | None = None):
        has_ids = rows is not None and "image_id" in rows.column_names
        self.rows = rows.select_columns(["image_id"]) if rows is not None and has_ids else None
        self.captions_per_row = captions_per_row
        self.first_caption = np.concatenate([[0], np.cumsum(captions_per_row)])[:-1]
        self.seed = seed
        self._clock = SharedNumbers(1)

    @property
    def epoch(self) -> int:
        """The epoch that captions are drawn for, from 0."""
        return self._clock.get(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw captions for this epoch from now on, in the workers of a `DataLoader` too."""
        self._clock.set(epoch)

    def names(self, rows: Sequence[int]) -> list[str]:
        """The ids of images, or `row N` where there are none."""
        if self.rows is None:
            return [f"row {row}" for row in rows]
        return self.rows[list(rows)]["image_id"]

    def __len__(self) -> int:
        return len(self.captions_per_row)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return self.__getitems__([row])

    def __getitems__(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        indices = np.asarray(rows)
        chosen = choose_captions(self.seed, self.epoch, indices, self.captions_per_row[indices])
        return self.collate(indices, self.first_caption[indices] + chosen)

    def collate(self, rows: np.ndarray, captions: np.ndarray) -> dict[str, torch.Tensor]:
        """The batch of these rows; `captions` indexes the captions of all rows, one after the other."""
        raise NotImplementedError(f"{type(self).__name__} does not define `collate`.")


class AnchorBatches(Batches):
    """Images and token ids, to pretrain a dual encoder.

    Args:
        dataset (`datasets.Dataset`): With `image_id`, `image`, `captions`.
        processor ([`DCLIPProcessor`]): Tokenizer and image processor.
        seed (`int`, *optional*, defaults to 0): Of the draw of captions.
        cache_mib (`int`, *optional*, defaults to 2048): Bound of [`PixelReader`].

    Raises:
        ValueError: If a row has no caption.
    """

    def __init__(self, dataset: Dataset, processor: DCLIPProcessor, *, seed: int = 0, cache_mib: int = 2048):
        captions = read_captions(dataset)
        super().__init__(captions.lengths, seed, dataset)
        self.tokens = tokenize_captions(processor.tokenizer, captions.values)
        self.pad_token_id = processor.tokenizer.pad_token_id
        self.pixels = PixelReader(dataset, processor.image_processor, cache_mib)

    def collate(self, rows: np.ndarray, captions: np.ndarray) -> dict[str, torch.Tensor]:
        """`pixel_values (B, 3, H, W)`, `input_ids (B, T)`, `attention_mask (B, T)`, `image_ids (B,)`."""
        input_ids, mask = self.tokens.pad(captions, self.pad_token_id)
        return {
            "pixel_values": self.pixels.read(rows),
            "input_ids": torch.from_numpy(input_ids).long(),
            "attention_mask": torch.from_numpy(mask).long(),
            "image_ids": torch.from_numpy(rows),
        }


class TeacherBatches(Batches):
    """Pairs of an image's features and one caption's, to train a teacher's block without its CLIP.

    Args:
        features ([`~modeling_dclip.data.teacher_targets.TeacherFeatures`]): Of the training rows.
        seed (`int`, *optional*, defaults to 0): Of the draw of captions.
        rows (`datasets.Dataset`, *optional*): As in [`Batches`].
    """

    def __init__(self, features: Any, seed: int = 0, rows: Dataset | None = None):
        super().__init__(features.text_embeds.lengths, seed, rows)
        self.features = features

    def collate(self, rows: np.ndarray, captions: np.ndarray) -> dict[str, torch.Tensor]:
        """Inputs of [`DCLIPTeacher`] and `image_ids (B,)`."""
        return self.features.batch(rows, captions) | {"image_ids": torch.from_numpy(rows)}


class StudentBatches(Batches):
    """Images with their stored targets, to train an image encoder without text, boxes or teacher.

    A row without captions has one teacher's target and no text embedding. If a dataset has such rows, each batch has a
    `caption_mask`, which is `False` for them, and zeros as their text embeddings.

    Args:
        dataset (`datasets.Dataset`): With `image_id`, `image`, `captions` and the embedding columns asked for.
        image_processor (`CLIPImageProcessorPil`): Of the student.
        columns (`Sequence[str]`): The embedding columns of a batch: any of `teacher_embeds`, `text_embeds`,
            `anchor_embeds`, `negative_embeds`. Of the last, false captions, a row has any number; each epoch draws
            [`MOST_NEGATIVES`] where it has more.
        width (`int`): Of the student's embeddings.
        seed (`int`, *optional*, defaults to 0): Of the draw of captions.
        cache_mib (`int`, *optional*, defaults to 2048): Bound of [`PixelReader`].
        pixels ([`PixelReader`], *optional*): A reader of the same rows, to share its cache between runs.
        min_crop_area (`float`, *optional*, defaults to 1.0): Below 1, images are cropped to a random square of at
            least this share of the area.
        bank (`bool`, *optional*, defaults to `False`): Batches name their captions, and `caption_classes` tells which
            captions of all rows are equal: a number for each, -1 in the place of a row that has none.

    Raises:
        ValueError: If a column is missing, holds NaN, is of another width, or counts captions differently.
    """

    def __init__(
        self,
        dataset: Dataset,
        image_processor: BaseImageProcessor,
        columns: Sequence[str],
        *,
        width: int,
        seed: int = 0,
        cache_mib: int = 2048,
        pixels: PixelReader | None = None,
        min_crop_area: float = 1.0,
        bank: bool = False,
    ):
        if not 0 < min_crop_area <= 1:
            raise ValueError(f"Expected min_crop_area in (0, 1], got {min_crop_area}.")
        self.columns = {name: read_embeds(dataset, name, width) for name in columns}
        captions = column_lengths(dataset, "captions")
        super().__init__(np.maximum(captions, 1), seed, dataset)
        check_entries(self.columns, captions)
        self.caption_mask = None if captions.all() else captions > 0
        if self.caption_mask is not None and "text_embeds" in self.columns:
            values = np.zeros((self.captions_per_row.sum(), width), np.float16)
            values[np.repeat(self.caption_mask, self.captions_per_row)] = self.columns["text_embeds"].values
            self.columns["text_embeds"] = Ragged.from_lengths(values, self.captions_per_row)
        self.pixels = PixelReader(dataset, image_processor, cache_mib) if pixels is None else pixels
        self.min_crop_area = min_crop_area
        self.caption_classes = _classes_of_captions(dataset) if bank else None
        self.negatives = self.columns.pop("negative_embeds", None)

    def collate(self, rows: np.ndarray, captions: np.ndarray) -> dict[str, torch.Tensor]:
        """`pixel_values (B, 3, H, W)`, the embedding columns `(B, D)` float16, `image_ids (B,)`; maybe `caption_mask
        (B,)`, bool, and `caption_ids (B,)`, indices into the captions of all rows; with false captions
        `negative_embeds (B, F, D)` and `negative_mask (B, F)`, the same F in every batch.
        """
        batch = {"pixel_values": self._augment(self.pixels.read(rows), rows), "image_ids": torch.from_numpy(rows)}
        for name, embeds in self.columns.items():
            batch[name] = torch.from_numpy(embeds.values[rows if name == "anchor_embeds" else captions])
        if self.caption_mask is not None:
            batch["caption_mask"] = torch.from_numpy(self.caption_mask[rows])
        if self.caption_classes is not None:
            batch["caption_ids"] = torch.from_numpy(captions)
        if self.negatives is not None:
            batch["negative_embeds"], batch["negative_mask"] = self._draw_negatives(self.negatives, rows)
        return batch

    def _draw_negatives(self, negatives: Ragged, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        lengths = negatives.lengths
        places = min(int(lengths.max(initial=1)), MOST_NEGATIVES)
        embeds = np.zeros((len(rows), places, negatives.values.shape[1]), np.float16)
        mask = np.arange(places) < lengths[rows][:, None]
        for place, row in enumerate(rows):
            entries = np.arange(negatives.offsets[row], negatives.offsets[row + 1])
            if len(entries) > places:
                lots = random_numbers(self.seed, self.epoch, entries, _NEGATIVES_STREAM)
                entries = entries[np.sort(np.argsort(lots, kind="stable")[:places])]
            embeds[place, : len(entries)] = negatives.values[entries]
        return torch.from_numpy(embeds), torch.from_numpy(mask)

    def _augment(self, pixel_values: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
        if self.min_crop_area == 1:
            return pixel_values
        area, x, y = (random_numbers(self.seed, self.epoch, rows, stream) for stream in (1, 2, 3))
        areas = np.exp(area * math.log(self.min_crop_area))  # log-uniform: as many zooms by 2 from 1 as from 1/2
        return random_resized_crop(pixel_values, areas, np.stack([x, y]))


def _classes_of_captions(dataset: Dataset) -> np.ndarray:
    """A number for each caption of all rows, equal for equal words, and -1 for each row without captions."""
    numbers: dict[str, int] = {}
    classes = []
    for texts in arrow_column(dataset, "captions").to_pylist():
        words = [" ".join(text.casefold().split()) for text in texts or ()]
        classes += [numbers.setdefault(text, len(numbers)) for text in words] or [-1]
    return np.array(classes, np.int64)


def read_embeds(dataset: Dataset, name: str, width: int) -> Ragged:
    """Read an embedding column and check it before training.

    Args:
        dataset (`datasets.Dataset`): With `image_id` and the column.
        name (`str`): `teacher_embeds`, `text_embeds` or `negative_embeds` (a list per row), or `anchor_embeds` (one
            per row).
        width (`int`): Of the student's embeddings.

    Returns:
        [`Ragged`]: float16 `(entries, D)`.

    Raises:
        ValueError: If the column is missing, of another width, or holds NaN or infinity.
    """
    if name == "anchor_embeds":
        values = flat_column(dataset, name)
        embeds = Ragged.from_lengths(values, np.ones(len(values), np.int64))
    else:
        embeds = ragged_column(dataset, name)
    if embeds.values.shape[-1] != width:
        raise ValueError(
            f"Column {name!r}: expected the student's width {width}, got {embeds.values.shape[-1]}. Distil from a "
            "teacher around the same CLIP as the student."
        )
    check_finite(dataset, name, embeds)
    return embeds


class TokenizedStudentBatches(StudentBatches):
    """The batches of [`StudentBatches`] with the tokens of the chosen captions, to adapt the text tower too.

    Args:
        dataset (`datasets.Dataset`): As in [`StudentBatches`]; every row has a caption.
        model ([`~modeling_dclip.encoders.DualEncoder`]): The student; its config says how its family reads text.
        processor: Image processor and tokenizer.
        columns, options: As in [`StudentBatches`].

    Raises:
        ValueError: As in [`StudentBatches`], or if a row has no caption.
    """

    def __init__(self, dataset: Dataset, model: DualEncoder, processor: Any, columns: Sequence[str], **options: Any):
        super().__init__(dataset, processor.image_processor, columns, **options)
        longest, tokenizer = longest_text(model, processor.tokenizer), processor.tokenizer
        self.tokens = tokenize_captions(tokenizer, read_captions(dataset).values, longest)
        self.pad_token_id = tokenizer.pad_token_id
        self.length = longest if model.config.model_type in READ_PADDING else None

    def read_tokens(self, captions: np.ndarray) -> dict[str, torch.Tensor]:
        """Captions as the model reads them: `input_ids (B, T)`, and `attention_mask (B, T)` unless it reads padding.

        Args:
            captions (`np.ndarray` of shape `(B,)`): Indices into the captions of all rows.
        """
        padded = self.tokens.pad(captions, self.pad_token_id, self.length or 1)
        input_ids, mask = (torch.from_numpy(part).long() for part in padded)
        return {"input_ids": input_ids} | ({"attention_mask": mask} if self.length is None else {})

    def collate(self, rows: np.ndarray, captions: np.ndarray) -> dict[str, torch.Tensor]:
        """The batch of [`StudentBatches`] with what [`read_tokens`] gives."""
        return super().collate(rows, captions) | self.read_tokens(captions)
