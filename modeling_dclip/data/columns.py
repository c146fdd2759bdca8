"""Dataset columns as flat arrays, flat arrays as columns, and keys of their content.

A ragged column of N rows is a pair: `values`, the rows' entries one after the other, and `offsets` int64 (N + 1,), row
i being `values[offsets[i] : offsets[i + 1]]`. Arrays come straight out of Arrow: no Python number per entry.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from datasets import Dataset, Image, List, Value, concatenate_datasets
from tqdm.auto import tqdm

from modeling_dclip.data.images import read_encoded, undecoded_images
from modeling_dclip.encoders.fingerprints import hash_bytes, hash_parts


def put_columns(dataset: Dataset, columns: Mapping[str, tuple[Any, Any]]) -> Dataset:
    """Add columns, or replace those of the same name, beside what is on disk.

    New columns are added before old ones go: where all added columns have gone and another was cast, datasets 5.2
    cannot add one.

    Args:
        dataset (`datasets.Dataset`): Pictures in it are not copied, unless rows were selected from stored bytes
            before.
        columns (`Mapping[str, tuple]`): Values (list or Arrow array) and feature by name.

    Returns:
        `datasets.Dataset`: The other columns, then these.
    """
    for name, (values, feature) in columns.items():
        dataset = dataset.add_column(f"_new_{name}", values, feature=feature)
    dataset = dataset.remove_columns([name for name in columns if name in dataset.column_names])
    return dataset.rename_columns({f"_new_{name}": name for name in columns})


def is_text(feature: Any) -> bool:
    """Whether a feature is one text in each row, in any of Arrow's forms (pandas 3 writes `large_string`)."""
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string", "string_view")


def with_images(dataset: Dataset, column: str, name: str) -> Dataset:
    """Make a column the column `image`, with pictures that are decoded when they are read.

    Args:
        dataset (`datasets.Dataset`): With the column.
        column (`str`): Pictures of type `Image`, their bytes, their paths, or `{"bytes", "path"}`.
        name (`str`): What messages call the dataset.

    Raises:
        ValueError: If the column is of another type.
    """
    feature = dataset.features[column]
    is_bytes = isinstance(feature, Value) and feature.dtype in ("binary", "large_binary")
    is_struct = isinstance(feature, dict) and set(feature) == {"bytes", "path"}
    if not (isinstance(feature, Image) or is_text(feature) or is_bytes or is_struct):
        raise ValueError(
            f"Expected pictures (Image, bytes or paths) in the column {column!r} of {name}, got {feature}."
        )
    dataset = dataset if column == "image" else dataset.rename_column(column, "image")
    if isinstance(feature, Value) and feature.dtype.startswith("large_"):  # datasets 4 casts no such type to Image
        dataset = dataset.cast_column("image", Value(feature.dtype.removeprefix("large_")))
    return dataset if isinstance(feature, Image) and feature.decode else dataset.cast_column("image", Image())


def dataset_fingerprint(dataset: Dataset) -> str:
    """Hash what was evaluated: every image's stored bytes, its id, captions and label, in order.

    Not the files' names or dates.

    Args:
        dataset (`datasets.Dataset`): With `image` and any of `image_id`, `captions`, `label`.

    Returns:
        `str`: `sha256:<hex>`.

    Raises:
        UnreadableImageError: If an image's file cannot be read; the message names id and row.
    """
    names = [name for name in ("image_id", "captions", "label") if name in dataset.column_names]
    rows = dataset.select_columns(["image", *names]).cast_column("image", Image(decode=False))

    def parts() -> Iterator[str | bytes]:
        for number, row in enumerate(tqdm(rows, desc="Fingerprinting the data", unit="image")):
            yield repr([row[name] for name in names]) + "\0"
            name = f"Image {row['image_id']!r} (row {number})" if "image_id" in row else f"The image of row {number}"
            yield read_encoded(row["image"], name, "Replace the file or drop the row.")

    return f"sha256:{hash_parts(parts())}"


class Ragged(NamedTuple):
    """A ragged column.

    Args:
        values (`np.ndarray` of shape `(sum of lengths, ...)`): The entries of all rows.
        offsets (`np.ndarray` of shape `(N + 1,)`): int64, where each row starts; the last is the number of entries.
    """

    values: np.ndarray
    offsets: np.ndarray

    @classmethod
    def from_lengths(cls, values: np.ndarray, lengths: np.ndarray) -> "Ragged":
        """From the number of entries of each row."""
        return cls(values, np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]))

    @property
    def lengths(self) -> np.ndarray:
        """Entries of each row, int64 `(N,)`."""
        return np.diff(self.offsets)

    def pad(self, rows: np.ndarray, fill: int | float = 0) -> tuple[np.ndarray, np.ndarray]:
        """Rows as one array `(len(rows), longest, ...)` filled up with `fill`, and the mask of what is real, bool."""
        lengths = self.lengths[rows]
        positions = np.arange(max(1, lengths.max(initial=0)))
        mask = positions < lengths[:, None]
        padded = np.full((*mask.shape, *self.values.shape[1:]), fill, dtype=self.values.dtype)
        padded[mask] = self.values[(self.offsets[rows][:, None] + positions)[mask]]
        return padded, mask


def arrow_column(dataset: Dataset, name: str) -> pa.Array:
    """A column as one Arrow array, in the dataset's order of rows.

    Raises:
        ValueError: If there is no such column; the message lists those there are.
    """
    if name not in dataset.column_names:
        raise ValueError(f"Expected a column {name!r}, got {dataset.column_names}.")
    table = dataset.select_columns(name).with_format("arrow")[:]
    column = table[name].combine_chunks()
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _flatten(values: pa.Array) -> np.ndarray:
    width: tuple[int, ...] = ()
    while isinstance(values, (pa.ListArray, pa.LargeListArray, pa.FixedSizeListArray)):
        if not isinstance(values, pa.FixedSizeListArray):
            raise ValueError(f"Expected entries of one shape, got {values.type}.")
        width = (*width, values.type.list_size)
        values = values.flatten()
    return values.to_numpy(zero_copy_only=False).reshape(-1, *width)


def ragged_column(dataset: Dataset, name: str) -> Ragged:
    """Read a column of lists, such as `boxes` or `teacher_embeds`.

    Args:
        dataset (`datasets.Dataset`): Any format, with or without selected rows.
        name (`str`): A column of lists of numbers, of strings, or of lists of one length.

    Returns:
        [`Ragged`]: Values of shape `(entries, ...)`.

    Raises:
        ValueError: If there is no such column or its entries differ in shape.

    Example:
        >>> ragged_column(Dataset.from_dict({"x": [[1, 2], [3]]}), "x").offsets.tolist()
        [0, 2, 3]
    """
    return Ragged.from_lengths(_flatten(arrow_column(dataset, name).flatten()), column_lengths(dataset, name))


def column_lengths(dataset: Dataset, name: str) -> np.ndarray:
    """Entries of each row of a column of lists, int64 `(N,)`."""
    lengths = arrow_column(dataset, name).value_lengths().fill_null(0)
    return lengths.to_numpy(zero_copy_only=False).astype(np.int64)


def flat_column(dataset: Dataset, name: str) -> np.ndarray:
    """Read a column with one entry in each row, such as `anchor_embeds`, as an array `(N, ...)`."""
    return _flatten(arrow_column(dataset, name))


def with_ragged_embeds(dataset: Dataset, name: str, embeds: Ragged) -> Dataset:
    """Add a column of float16 lists of embeddings `(entries, D)`. It replaces an older one."""
    width = embeds.values.shape[-1]
    entries = pa.FixedSizeListArray.from_arrays(pa.array(embeds.values.astype(np.float16).reshape(-1)), width)
    column = pa.ListArray.from_arrays(pa.array(embeds.offsets.astype(np.int32)), entries)
    return _replace_column(dataset, name, column, List(List(Value("float16"), length=width)))


def with_flat_embeds(dataset: Dataset, name: str, embeds: np.ndarray) -> Dataset:
    """Add a column with one float16 embedding in each row, `(N, D)`. It replaces an older one."""
    width = embeds.shape[-1]
    column = pa.FixedSizeListArray.from_arrays(pa.array(embeds.astype(np.float16).reshape(-1)), width)
    return _replace_column(dataset, name, column, List(Value("float16"), length=width))


def _replace_column(dataset: Dataset, name: str, column: pa.Array, feature: List) -> Dataset:
    if name in dataset.column_names:
        dataset = dataset.remove_columns(name)
    return dataset.add_column(name, column, feature=feature)


def encoded_images(dataset: Dataset) -> Iterator[bytes]:
    """The encoded images, row by row, undecoded.

    Raises:
        UnreadableImageError: If an image file is missing or a row has neither bytes nor a path; the message names its
            id.
    """
    for row in undecoded_images(dataset):
        yield read_encoded(row["image"], f"Image {row['image_id']!r}", "Replace the file or drop the row.")


def image_keys(dataset: Dataset) -> list[str]:
    """Compute a key of each row's encoded image: the hexadecimal SHA-256 of its bytes, not of its file's name.

    Raises:
        UnreadableImageError: If an image file is missing or a row has neither bytes nor a path.
    """
    images = tqdm(encoded_images(dataset), total=len(dataset), desc="Hashing images", unit="image")
    return [hash_bytes(image) for image in images]


def row_keys(dataset: Dataset, images: Sequence[str] | None = None) -> list[str]:
    """A key of each row's content: encoded image, captions, boxes and scores.

    Args:
        dataset (`datasets.Dataset`): With `image_id`, `image`, `captions`, and where it has them `boxes`,
            `box_scores`.
        images (`Sequence[str]`, *optional*): [`image_keys`], if known.

    Returns:
        `list[str]`: Hexadecimal SHA-256, one a row.

    Raises:
        UnreadableImageError: If an image file is missing or a row has neither bytes nor a path.
    """
    images = image_keys(dataset) if images is None else images
    captions = arrow_column(dataset, "captions").to_pylist()
    regions = [ragged_column(dataset, name) for name in ("boxes", "box_scores") if name in dataset.column_names]
    keys = []
    for row, image in enumerate(images):
        texts = "\0".join(caption or "" for caption in captions[row] or [])
        entries = [column.values[column.offsets[row] : column.offsets[row + 1]].tobytes() for column in regions]
        keys.append(hash_parts([image, texts, *entries]))
    return keys


def attach_columns(dataset: Dataset, columns: Dataset) -> Dataset:
    """Join columns that were stored apart to their rows. Rows that `columns` lacks are left out.

    Args:
        dataset (`datasets.Dataset`): With `image_id`.
        columns (`datasets.Dataset`): With `image_id`, a subsequence of the dataset's, and the columns; they replace
            older ones.

    Returns:
        `datasets.Dataset`: The rows of `columns`.

    Raises:
        ValueError: If `columns` has a row that the dataset lacks, or another order.
    """
    ids, wanted = dataset["image_id"][:], columns["image_id"][:]
    rows, row = [], 0
    for image_id in wanted:
        while row < len(ids) and ids[row] != image_id:
            row += 1
        if row == len(ids):
            raise ValueError(
                f"Expected the stored rows among the dataset's, in order, got {image_id!r} out of place. Make them "
                "again."
            )
        rows.append(row)
        row += 1
    dataset = dataset if len(rows) == len(ids) else dataset.select(rows)
    added = [name for name in columns.column_names if name != "image_id"]
    dataset = dataset.remove_columns([name for name in added if name in dataset.column_names])
    return concatenate_datasets([dataset, columns.select_columns(added)], axis=1)


def concatenate_shared(parts: Sequence[Dataset]) -> Dataset:
    """The rows of several datasets, one after the other, with the columns that all of them have."""
    shared = [name for name in parts[0].column_names if all(name in part.column_names for part in parts)]
    return concatenate_datasets([part.select_columns(shared) for part in parts])


def check_finite(dataset: Dataset, name: str, entries: Ragged) -> None:
    """Refuse an embedding column that holds NaN or infinity.

    Args:
        dataset (`datasets.Dataset`): With `image_id`; for the message.
        name (`str`): The column's name.
        entries ([`Ragged`]): What it holds, `(entries, D)`.

    Raises:
        ValueError: Naming column, row and image of the first bad entry, and how many there are.
    """
    bad = np.flatnonzero(~np.isfinite(entries.values).all(axis=1))
    if len(bad):
        row = int(np.searchsorted(entries.offsets, bad[0], side="right")) - 1
        raise ValueError(
            f"Column {name!r}, row {row} (image {dataset['image_id'][row]!r}), entry {bad[0] - entries.offsets[row]}: "
            f"expected finite numbers, got NaN or infinity ({len(bad)} such entries in all). Delete the targets and "
            "make them again."
        )


def check_entries(columns: dict[str, Ragged], captions_per_row: np.ndarray) -> None:
    """Refuse embedding columns that count captions differently.

    Args:
        columns (`dict`): Embedding columns by name; `teacher_embeds` and `text_embeds` are looked at.
        captions_per_row (`np.ndarray` of shape `(N,)`): Captions of each row.

    Raises:
        ValueError: If a row has not one embedding per caption, or without captions not one of the teacher's and none
            of a text; the message names column and row.
    """
    wanted = {"teacher_embeds": np.maximum(captions_per_row, 1), "text_embeds": captions_per_row}
    for name, expected in wanted.items():
        if name in columns and not np.array_equal(columns[name].lengths, expected):
            row = int(np.flatnonzero(columns[name].lengths != expected)[0])
            raise ValueError(
                f"Column {name!r}, row {row}: expected one embedding per caption ({captions_per_row[row]}; without "
                f"captions one of the teacher's), got {columns[name].lengths[row]}. Make the targets of this dataset "
                "again."
            )
