"""Fine-grained questions out of tables that hold the pictures: parquet files and datasets of the Hub."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from datasets import ClassLabel, Dataset, Image, concatenate_datasets

from modeling_dclip.data.columns import id_texts, put_columns, text_lists, with_images
from modeling_dclip.data.files import load_hub, load_parquet, match_parquet
from modeling_dclip.data.questions.rows import PAIR_FEATURE, QUESTION_FEATURES, answerable
from modeling_dclip.data.rows import FIX_PATHS, first, present_images, require_rows
from modeling_dclip.encoders.fingerprints import hash_bytes, hash_file

PAIR_COLUMNS = ("image_0", "image_1", "caption_0", "caption_1")


def _require(dataset: Dataset, column: str, option: str, name: str) -> str:
    if column not in dataset.column_names:
        raise ValueError(
            f"{name} has no column {column!r}; its columns are {dataset.column_names}. Name the right one with "
            f"',{option}=COLUMN'."
        )
    return column


def _texts(dataset: Dataset, column: str, name: str) -> list[list[str]]:
    """The texts of every row, whether stored as lists or one text a row; empty ones are an error."""
    rows = []
    for row, texts in enumerate(text_lists(dataset, column, name)):
        if not texts or not all(text and text.strip() for text in texts):
            found = texts[0] if texts and len(texts) == 1 else texts
            raise ValueError(f"{name}, row {row}: expected text in the column {column!r}, got {found!r:.80}.")
        rows.append([(text or "").strip() for text in texts])
    return rows


def _images(dataset: Dataset, column: str, name: str) -> Dataset:
    """The column alone, as `image` of type `Image`; files are found as everywhere."""
    images = with_images(dataset.with_format(None).select_columns([column]), column, name)
    return present_images(images, None, name, "raise", FIX_PATHS)[0]


def _picture_keys(images: Dataset, name: str) -> list[str]:
    """A key of each row's encoded picture, so that one that comes in many rows is embedded once."""
    keys = []
    for stored in images.cast_column("image", Image(decode=False))["image"]:
        content = stored["bytes"]
        keys.append(hash_file(stored["path"]) if content is None else hash_bytes(content))
    return keys


def _categories(dataset: Dataset, column: str | None, defaults: Sequence[str], name: str) -> list[str]:
    if column is not None:
        _require(dataset, column, "category", name)
    column = column or next((default for default in defaults if default in dataset.column_names), None)
    if column is None:
        return [""] * len(dataset)
    feature, values = dataset.features[column], dataset.with_format(None)[column][:]
    if isinstance(feature, ClassLabel):
        values = [None if value is None else feature.int2str(value) for value in values]
    for row, value in enumerate(values):
        if not isinstance(value, str | int | None) or isinstance(value, bool):
            raise ValueError(f"{name}, row {row}: expected text in the column {column!r}, got {value!r:.80}.")
    return ["" if value is None else str(value) for value in values]


def _with_columns(images: Dataset, columns: dict[str, list[Any]]) -> Dataset:
    features = {**QUESTION_FEATURES, "pair_id": PAIR_FEATURE}
    return put_columns(images, {name: (values, features[name]) for name, values in columns.items()})


def _pair_rows(dataset: Dataset, category: str | None, name: str) -> Dataset:
    """Winoground's form: rows 0 to N - 1 are the pictures 0, the next N the pictures 1."""
    captions = [[texts[0] for texts in _texts(dataset, f"caption_{side}", name)] for side in (0, 1)]
    ids = id_texts(dataset, "id", name) if "id" in dataset.column_names else list(map(str, range(len(dataset))))
    if repeated := [pair for pair, count in Counter(ids).items() if count > 1]:
        raise ValueError(f"{name}: {len(repeated)} ids come twice, first: {first(repeated)}. Remove one row of each.")
    categories = _categories(dataset, category, ("collapsed_tag", "category"), name)
    images = concatenate_datasets([_images(dataset, f"image_{side}", name) for side in (0, 1)])
    _picture_keys(images, name)  # for its checks
    columns = {
        "image_id": [f"{pair}-{side}" for side in (0, 1) for pair in ids],
        "captions": [[text] for side in (0, 1) for text in captions[side]],
        "negative_captions": [[[text]] for side in (1, 0) for text in captions[side]],
        "categories": [[value] for value in categories * 2],
        "pair_id": ids * 2,
    }
    kept = answerable(ids, captions[0], [[text] for text in captions[1]], name)
    rows = _with_columns(images, columns)
    return rows if len(kept) == len(ids) else rows.select([*kept, *(len(ids) + row for row in kept)])


def standardise_items(
    dataset: Dataset,
    *,
    image: str = "image",
    caption: str = "caption",
    negatives: str | None = None,
    category: str | None = None,
    name: str = "dataset",
) -> Dataset:
    """Bring a table of questions into the one schema; pictures stay where they are, equal ones become one row.

    A table with `image_0`, `image_1`, `caption_0`, `caption_1` is taken for Winoground's form; then only `category` is
    looked at.

    Args:
        dataset (`datasets.Dataset`): One question a row.
        image, caption (`str`, *optional*): Columns of the picture and of the true caption, by default `"image"` and
            `"caption"`.
        negatives (`str`, *optional*): Columns of the false captions, joined by `+`; by default `negative_captions` or
            `negative_caption`.
        category (`str`, *optional*): Column of what a question tests; by default `category` where there is one, of
            Winoground's form `collapsed_tag`.
        name (`str`, *optional*, defaults to `"dataset"`): What messages call it.

    Returns:
        `datasets.Dataset`: The schema of [`~modeling_dclip.data.questions.rows`].

    Raises:
        FileNotFoundError: If the file of a picture given by path is missing.
        ValueError: If a column is missing or of a wrong type, or a row lacks a picture or a text; column or row is
            named.
    """
    require_rows(len(dataset), name, "a question")
    if set(PAIR_COLUMNS) <= set(dataset.column_names):
        return _pair_rows(dataset, category, name)
    _require(dataset, image, "image", name)
    _require(dataset, caption, "caption", name)
    if negatives is None:
        both = ("negative_captions", "negative_caption")
        negatives = next((column for column in both if column in dataset.column_names), "negative_captions")
    wrong: list[list[str]] = [[] for _ in range(len(dataset))]
    for column in negatives.split("+"):
        for row, texts in enumerate(_texts(dataset, _require(dataset, column, "negatives", name), name)):
            wrong[row] += texts
    true = _texts(dataset, caption, name)
    if several := [row for row, texts in enumerate(true) if len(texts) > 1]:
        raise ValueError(
            f"{name}, row {several[0]}: expected one true caption in {caption!r}, got {true[several[0]]!r:.80}."
        )
    categories = _categories(dataset, category, ("category",), name)
    images = _images(dataset, image, name)
    keys = _picture_keys(images, name)
    kept = answerable([f"row {row}" for row in range(len(keys))], [texts[0] for texts in true], wrong, name)
    first_row: dict[str, int] = {}
    members: list[list[int]] = [[] for _ in keys]
    for row in kept:
        members[first_row.setdefault(keys[row], row)].append(row)
    columns = {
        "image_id": [f"row-{row}" for row in range(len(keys))],
        "captions": [[true[i][0] for i in group] for group in members],
        "negative_captions": [[wrong[i] for i in group] for group in members],
        "categories": [[categories[i] for i in group] for group in members],
    }
    rows = _with_columns(images, columns).select_columns(list(QUESTION_FEATURES))
    return rows if len(first_row) == len(rows) else rows.select(sorted(first_row.values()))


def read_item_tables(
    pattern: str,
    *,
    image: str = "image",
    caption: str = "caption",
    negatives: str | None = None,
    category: str | None = None,
) -> Dataset:
    """Read parquet files of questions.

    Args:
        pattern (`str`): A path or glob; `**` goes into subfolders.
        image, caption, negatives, category (`str`, *optional*): As in [`standardise_items`].

    Returns:
        `datasets.Dataset`: As [`standardise_items`] gives it.

    Raises:
        FileNotFoundError: If no file matches.
        ValueError: If a file is not readable as parquet, or as [`standardise_items`] says.
    """
    dataset = load_parquet([path for path, _ in match_parquet(pattern)], pattern)
    columns: dict[str, Any] = {"image": image, "caption": caption, "negatives": negatives, "category": category}
    return standardise_items(dataset, **columns, name=f"'{pattern}'")


def read_item_hub(
    name: str,
    split: str,
    *,
    config: str | None = None,
    image: str = "image",
    caption: str = "caption",
    negatives: str | None = None,
    category: str | None = None,
) -> Dataset:
    """Read a split of a dataset of the Hub, or of a local folder that `datasets.load_dataset` understands.

    Args:
        name (`str`): The dataset's id (`facebook/winoground`, once its terms are accepted) or folder.
        split (`str`): The split.
        config (`str`, *optional*): The dataset's configuration.
        image, caption, negatives, category (`str`, *optional*): As in [`standardise_items`].

    Returns:
        `datasets.Dataset`: As [`standardise_items`] gives it.

    Raises:
        FileNotFoundError: If there is no such dataset.
        ValueError: If there is no such split, or as [`standardise_items`] says.
    """
    columns: dict[str, Any] = {"image": image, "caption": caption, "negatives": negatives, "category": category}
    return standardise_items(load_hub(name, split, config=config), **columns, name=f"{name}-{split}")
