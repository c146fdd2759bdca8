"""Dataset columns as flat arrays, flat arrays as columns, and keys of their content.

A ragged column of N rows is a pair: `values`, the rows' entries one after the other, and `offsets` int64 (N + 1,), row
i being `values[offsets[i] : offsets[i + 1]]`. Arrays come straight out of Arrow: no Python number per entry.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, Features, Image, List, Value, concatenate_datasets
from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from tqdm.auto import tqdm

from modeling_dclip.data.files import plain_array, plain_type, writing
from modeling_dclip.data.images import UnreadableImageError, read_encoded, undecoded_images
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


def _arrow_type(feature: Any) -> pa.DataType:
    """The plain type of a feature's values."""
    return plain_type(Features({"column": feature}).arrow_schema.field(0).type)


def same_values(one: Any, other: Any) -> bool:
    """Whether two features hold values of the same kind, in whatever of Arrow's forms."""
    return _arrow_type(one) == _arrow_type(other)


def is_text(feature: Any) -> bool:
    """Whether a feature is one text in each row, in any of Arrow's forms (pandas 3 writes `large_string`)."""
    return isinstance(feature, Value) and pa.types.is_string(_arrow_type(feature))


def holds_pictures(feature: Any) -> bool:
    """Whether [`with_images`] reads a feature: pictures, their bytes or paths, or objects with `bytes` or `path`."""
    if isinstance(feature, Image):
        return True
    if isinstance(feature, dict):
        known = {"bytes": pa.binary(), "path": pa.string()}
        types = {name: _arrow_type(value) for name, value in feature.items() if name in known}
        return any(types.get(name) == kind for name, kind in known.items()) and all(
            kind in (known[name], pa.null()) for name, kind in types.items()
        )
    return isinstance(feature, Value) and _arrow_type(feature) in (pa.string(), pa.binary())


def with_images(dataset: Dataset, column: str, name: str) -> Dataset:
    """Make a column the column `image`, with pictures that are decoded when they are read.

    Args:
        dataset (`datasets.Dataset`): With the column.
        column (`str`): Pictures of type `Image`, their bytes, their paths, or objects with `bytes`, `path` or both;
            other fields of an object are passed over.
        name (`str`): What messages call the dataset.

    Raises:
        ValueError: If the column is of another type.
    """
    feature = dataset.features[column]
    if not holds_pictures(feature):
        raise ValueError(
            f"Expected pictures (Image, bytes or paths) in the column {column!r} of {name}, got {feature}."
        )
    dataset = dataset if column == "image" else dataset.rename_column(column, "image")
    if isinstance(feature, Value) and feature.dtype not in ("string", "binary"):  # datasets casts not all to Image
        dataset = dataset.cast_column("image", Value(str(_arrow_type(feature))))
    return dataset if isinstance(feature, Image) and feature.decode else dataset.cast_column("image", Image())


def as_text(values: pa.Array, column: str, name: str) -> pa.Array:
    """Bytes, or lists of bytes, read as UTF-8; other values as they are.

    Args:
        values (`pa.Array`): Of a plain type ([`arrow_column`]).
        column, name (`str`): What messages call the column and the dataset.

    Raises:
        ValueError: If bytes are no UTF-8.
    """
    is_list = pa.types.is_list(values.type) or pa.types.is_fixed_size_list(values.type)
    if not pa.types.is_binary(values.type.value_type if is_list else values.type):
        return values
    try:
        return values.cast(pa.list_(pa.string()) if is_list else pa.string())
    except pa.ArrowInvalid as error:
        raise ValueError(f"Expected UTF-8 text in the column {column!r} of {name}, got other bytes.") from error


def text_lists(dataset: Dataset, column: str, name: str) -> list[list[str | None] | None]:
    """The texts of every row as a list, whether stored as lists or one text a row, in any of Arrow's forms.

    Args:
        dataset (`datasets.Dataset`): With the column.
        column (`str`): Text, or lists of text; bytes are read as UTF-8.
        name (`str`): What messages call the dataset.

    Raises:
        ValueError: If the column holds something else, such as numbers, or bytes that are no UTF-8.
    """
    values = arrow_column(dataset, column)
    is_list = pa.types.is_list(values.type) or pa.types.is_fixed_size_list(values.type)
    text = values.type.value_type if is_list else values.type
    if not (pa.types.is_string(text) or pa.types.is_binary(text)):
        raise ValueError(
            f"Expected the column {column!r} of {name} to hold text or lists of text, got {values.type}. Name another "
            "column, or write these values as text."
        )
    rows = as_text(values, column, name).to_pylist()
    return rows if is_list else [[value] for value in rows]


def id_texts(dataset: Dataset, column: str, name: str) -> list[str]:
    """The ids of every row as text: texts as they are, whole numbers in digits.

    Args:
        dataset (`datasets.Dataset`): With the column.
        column (`str`): Text, integers, or floats that are whole (pandas makes them of integers beside a missing
            value).
        name (`str`): What messages call the dataset.

    Raises:
        ValueError: If a row has no id or a float that is not whole, or the column holds something else; the message
            names the row.
    """
    values = arrow_column(dataset, column)
    kind = values.type
    if values.null_count:
        row = values.is_null().index(pa.scalar(True)).as_py()
        raise ValueError(f"{name}: row {row} has no image id in the column {column!r}. Fill it in.")
    if pa.types.is_floating(kind):
        numbers = values.to_numpy(zero_copy_only=False)
        wrong = np.flatnonzero(~(np.isfinite(numbers) & (numbers == np.round(numbers)) & (np.abs(numbers) < 2**53)))
        if len(wrong):
            raise ValueError(
                f"{name}, row {wrong[0]}: expected text or a whole number as the id in the column {column!r}, got "
                f"{numbers[wrong[0]]}."
            )
        values = values.cast(pa.int64())
    elif not (pa.types.is_string(kind) or pa.types.is_integer(kind)):
        raise ValueError(f"Expected text or whole numbers as ids in the column {column!r} of {name}, got {kind}.")
    return [str(value) for value in values.to_pylist()]


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

    def pad(self, rows: np.ndarray, fill: int | float = 0, least: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Rows as one array `(len(rows), longest, ...)` filled up with `fill`, and the mask of what is real, bool.

        Where the longest row has fewer than `least` places, the array has `least`.
        """
        lengths = self.lengths[rows]
        positions = np.arange(lengths.max(initial=least))
        mask = positions < lengths[:, None]
        padded = np.full((*mask.shape, *self.values.shape[1:]), fill, dtype=self.values.dtype)
        padded[mask] = self.values[(self.offsets[rows][:, None] + positions)[mask]]
        return padded, mask


def arrow_column(dataset: Dataset, name: str) -> pa.Array:
    """A column as one Arrow array of a plain type ([`plain_array`]), in the dataset's order of rows.

    Raises:
        ValueError: If there is no such column; the message lists those there are.
    """
    if name not in dataset.column_names:
        raise ValueError(f"Expected a column {name!r}, got {dataset.column_names}.")
    table = dataset.select_columns(name).with_format("arrow")[:]
    chunks = [plain_array(chunk) for chunk in table[name].chunks]
    return pa.concat_arrays(chunks) if chunks else pa.array([], plain_type(table[name].type))


def _flatten(values: pa.Array, name: str) -> np.ndarray:
    width: tuple[int, ...] = ()
    while isinstance(values, (pa.ListArray, pa.FixedSizeListArray)):
        if not isinstance(values, pa.FixedSizeListArray):
            raise ValueError(f"Expected entries of one shape in the column {name!r}, got {values.type}.")
        if values.null_count:  # `flatten` leaves them out, and what follows would move up
            raise ValueError(f"Expected no empty entry in the column {name!r}, got {values.null_count} that are null.")
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
        ValueError: If there is no such column, its entries differ in shape, or one is null.

    Example:
        >>> ragged_column(Dataset.from_dict({"x": [[1, 2], [3]]}), "x").offsets.tolist()
        [0, 2, 3]
    """
    return Ragged.from_lengths(_flatten(arrow_column(dataset, name).flatten(), name), column_lengths(dataset, name))


def column_lengths(dataset: Dataset, name: str) -> np.ndarray:
    """Entries of each row of a column of lists, int64 `(N,)`."""
    lengths = arrow_column(dataset, name).value_lengths().fill_null(0)
    return lengths.to_numpy(zero_copy_only=False).astype(np.int64)


def flat_column(dataset: Dataset, name: str) -> np.ndarray:
    """Read a column with one entry in each row, such as `anchor_embeds`, as an array `(N, ...)`."""
    return _flatten(arrow_column(dataset, name), name)


BOXES_FEATURE = List(List(Value("float32"), length=4))
SCORES_FEATURE = List(Value("float32"))
# Names of a box's fields where it is an object: corners, or a corner and the size.
_CORNERS = (
    ("x1", "y1", "x2", "y2"),
    ("x0", "y0", "x1", "y1"),
    ("xmin", "ymin", "xmax", "ymax"),
    ("x_min", "y_min", "x_max", "y_max"),
    ("left", "top", "right", "bottom"),
)
_SIZES = (("x", "y", "width", "height"), ("x", "y", "w", "h"), ("left", "top", "width", "height"))


def _float32(values: pa.Array) -> np.ndarray:
    with np.errstate(over="ignore"):  # becomes infinity, which is no box
        return values.to_numpy(zero_copy_only=False).astype(np.float32)


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind)


def _rows_of_lists(dataset: Dataset, name: str, place: str) -> tuple[pa.Array, np.ndarray]:
    """The entries of a column of lists, one after the other, and where each row's begin, `(N + 1,)`."""
    column = arrow_column(dataset, name)
    if pa.types.is_null(column.type):
        return column[:0], np.zeros(len(column) + 1, np.int64)
    if not (pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type)):
        raise ValueError(f"{place}: expected a list in each row of the column {name!r}, got {column.type}.")
    lengths = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    return column.flatten(), np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def _place(name: str, offsets: np.ndarray, entry: int, place: str) -> str:
    """What messages call an entry of a column of lists."""
    row = int(np.searchsorted(offsets, entry, side="right")) - 1
    return f"{place}, row {row}, entry {entry - offsets[row]} of {name!r}"


def _box_values(entries: pa.Array, offsets: np.ndarray, place: str) -> np.ndarray:
    """Boxes as float32 `(entries, 4)`, x1, y1, x2, y2."""
    if not len(entries):
        return np.zeros((0, 4), np.float32)
    kind = entries.type
    fields = [field.name for field in kind] if pa.types.is_struct(kind) else []
    named = next((names for names in (*_CORNERS, *_SIZES) if set(names) == set(fields)), None)
    is_list = pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind)
    if not (is_list and _is_number(kind.value_type)) and not (
        named is not None and all(_is_number(kind.field(field).type) for field in named)
    ):
        raise ValueError(f"{place}: expected boxes of four numbers in the column 'boxes', got {kind}.")
    wrong = entries.is_null().to_numpy(zero_copy_only=False)
    if is_list:
        wrong |= entries.value_lengths().fill_null(0).to_numpy(zero_copy_only=False) != 4
        parts = [entries.flatten()]
    else:
        parts = [entries.field(field) for field in named or ()]
    if wrong.any() or any(part.null_count for part in parts):
        values = entries.to_pylist()
        lacking = [
            at for at, box in enumerate(values)
            if wrong[at] or None in (box.values() if isinstance(box, dict) else box)
        ]  # fmt: skip
        where = _place("boxes", offsets, lacking[0], place)
        raise ValueError(f"{where}: expected a box of four numbers, got {values[lacking[0]]!r:.80}.")
    if is_list:
        return _float32(parts[0]).reshape(-1, 4)
    boxes = np.stack([_float32(part) for part in parts], axis=1)
    if named in _SIZES:
        boxes[:, 2:] += boxes[:, :2]
    return boxes


def read_regions(dataset: Dataset, place: str = "The dataset") -> tuple[Ragged, Ragged]:
    """The boxes of all rows and their scores, each list by its own offsets. A row without scores has scores of 1.

    Args:
        dataset (`datasets.Dataset`): With `boxes`, lists of four numbers or of objects with four known fields, and
            maybe `box_scores`.
        place (`str`, *optional*): What messages call it.

    Returns:
        `tuple[Ragged, Ragged]`: float32 `(regions, 4)`, x1, y1, x2, y2, and float32 `(regions,)`. Whether the numbers
            make sense is not looked at.

    Raises:
        ValueError: If an entry is no box or no score, or a row has another number of scores than of boxes; the message
            names the row.
    """
    entries, offsets = _rows_of_lists(dataset, "boxes", place)
    boxes = Ragged(_box_values(entries, offsets, place), offsets)
    scores = np.ones(len(boxes.values), np.float32)
    if "box_scores" not in dataset.column_names:
        return boxes, Ragged(scores, offsets)
    given, score_offsets = _rows_of_lists(dataset, "box_scores", place)
    if len(given) and not _is_number(given.type):
        raise ValueError(f"{place}: expected lists of numbers in the column 'box_scores', got lists of {given.type}.")
    if given.null_count:
        row = given.is_null().index(pa.scalar(True)).as_py()
        raise ValueError(f"{_place('box_scores', score_offsets, row, place)}: expected a number, got None.")
    scored = arrow_column(dataset, "box_scores").is_valid().to_numpy(zero_copy_only=False)
    different = np.flatnonzero(scored & (np.diff(score_offsets) != boxes.lengths))
    if len(different):
        row = different[0]
        raise ValueError(
            f"{place}, row {row}: expected one score for each of {boxes.lengths[row]} boxes, got "
            f"{np.diff(score_offsets)[row]} in 'box_scores'."
        )
    scores[np.repeat(scored, boxes.lengths)] = _float32(given)
    return boxes, Ragged(scores, offsets)


def check_regions(dataset: Dataset, boxes: Ragged, scores: Ragged) -> None:
    """Refuse boxes and scores that are none in an image of any size, before hours are spent on the others.

    Args:
        dataset (`datasets.Dataset`): With `image_id`; for the message.
        boxes, scores ([`Ragged`]): Of [`read_regions`].

    Raises:
        ValueError: If a number is not finite, a box has no area or begins left of or above its image, or a score is
            not in [0, 1]. The message names image, row and box of the first, and counts them. Also if all boxes lie in
            their image's first pixel, as fractions do.
    """
    x1, y1, x2, y2 = boxes.values.T
    problems = (
        (~np.isfinite(boxes.values).all(axis=1), "four finite numbers", boxes.values),
        (~((x1 < x2) & (y1 < y2)), "x1 < x2 and y1 < y2", boxes.values),
        (~((x1 >= 0) & (y1 >= 0)), "a box inside the image", boxes.values),
        (~((scores.values >= 0) & (scores.values <= 1)), "a score in [0, 1]", scores.values),
    )
    if len(boxes.values) and (boxes.values <= 1).all() and (boxes.values >= 0).all():
        row = int(np.searchsorted(boxes.offsets, 0, side="right")) - 1
        raise ValueError(
            f"Expected boxes in pixels, got {len(boxes.values)} boxes within one pixel, first "
            f"{boxes.values[0].tolist()} of image {dataset['image_id'][row]!r} (row {row}): they seem to be fractions "
            "of the image. Multiply them by its size."
        )
    for wrong, expected, given in problems:
        if wrong.any():
            entry = int(wrong.argmax())
            row = int(np.searchsorted(boxes.offsets, entry, side="right")) - 1
            raise ValueError(
                f"Box {entry - boxes.offsets[row]} of image {dataset['image_id'][row]!r} (row {row}): expected "
                f"{expected}, got {given[entry].tolist()} ({wrong.sum()} such in all). Correct or drop it, as the "
                "detector annotations,on_bad_box=skip does."
            )


def with_plain_regions(dataset: Dataset, place: str) -> Dataset:
    """Bring `boxes` and `box_scores` into the schema's types, if there are any. Rows without a list stay without.

    Raises:
        ValueError: As [`read_regions`], or if there are scores without boxes.
    """
    if "boxes" not in dataset.column_names:
        if "box_scores" in dataset.column_names:
            raise ValueError(f"{place} has a column 'box_scores' and no 'boxes'. Drop or rename it.")
        return dataset
    boxes, scores = read_regions(dataset, place)
    columns = {}
    if dataset.features["boxes"] != BOXES_FEATURE:
        values = pa.FixedSizeListArray.from_arrays(pa.array(boxes.values.reshape(-1)), 4)
        columns["boxes"] = (values, BOXES_FEATURE)
    if "box_scores" in dataset.column_names and dataset.features["box_scores"] != SCORES_FEATURE:
        columns["box_scores"] = (pa.array(scores.values), SCORES_FEATURE)
    offsets = pa.array(boxes.offsets.astype(np.int32))
    lists = {
        name: (pa.ListArray.from_arrays(offsets, values, mask=arrow_column(dataset, name).is_null()), feature)
        for name, (values, feature) in columns.items()
    }
    return put_columns(dataset, lists) if lists else dataset


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
    for number, row in enumerate(undecoded_images(dataset)):
        name = f"Image {row['image_id']!r}" if "image_id" in row else f"The image of row {number}"
        yield read_encoded(row["image"], name, "Replace the file or drop the row.")


def image_keys(dataset: Dataset) -> list[str]:
    """Compute a key of each row's encoded image: the hexadecimal SHA-256 of its bytes, not of its file's name.

    Raises:
        UnreadableImageError: If an image file is missing or a row has neither bytes nor a path.
    """
    images = tqdm(encoded_images(dataset), total=len(dataset), desc="Hashing images", unit="image")
    return [hash_bytes(image) for image in images]


def hash_images(dataset: Dataset) -> list[str | None]:
    """Key the encoded image of each row. Under several processes each hashes its share.

    Args:
        dataset (`datasets.Dataset`): With the column `image`.

    Returns:
        `list[str | None]`: A hexadecimal SHA-256 for each row, `None` where there are no bytes to read.
    """
    state = PartialState()
    share = range(state.process_index, len(dataset), state.num_processes)
    rows = undecoded_images(dataset)
    keys: list[str | None] = []
    hidden = not state.is_local_main_process
    for row in tqdm(share, desc="Reading images", unit="image", disable=hidden, leave=False):
        try:
            keys.append(hash_bytes(read_encoded(rows[row]["image"])))
        except UnreadableImageError:
            keys.append(None)
    if state.num_processes == 1:
        return keys
    found: list[str | None] = [None] * len(dataset)
    for row, key in gather_object(list(zip(share, keys, strict=True))):
        found[row] = key
    return found


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


def save_columns(dataset: Dataset, folder: Path) -> None:
    """Save columns as `load_from_disk` reads them, without the bars that datasets draws for the smallest of them.

    Args:
        dataset (`datasets.Dataset`): The columns. Of a column of type `Image`, the content of files is saved too.
        folder (`Path`): Where to. An error names it.

    Raises:
        OSError: If it cannot be written.
    """
    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        with writing(folder):
            dataset.save_to_disk(folder)
    finally:
        if shown:
            enable_progress_bars()


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
