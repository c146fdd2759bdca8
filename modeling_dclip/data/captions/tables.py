"""Any `datasets` dataset with pictures and captions in the one schema: parquet files, the Hub, a saved folder."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, load_from_disk

from modeling_dclip.data.columns import (
    holds_pictures,
    id_texts,
    put_columns,
    read_regions,
    same_values,
    text_lists,
    with_images,
    with_plain_regions,
)
from modeling_dclip.data.files import load_hub, load_parquet, match_parquet, require_folder
from modeling_dclip.data.rows import (
    CAPTION_FEATURES,
    ID_RULES,
    NEGATIVES,
    apply_rule,
    clean_captions,
    clean_negatives,
    present_images,
    require_rows,
    require_unique,
)
from modeling_dclip.data.specs import with_options_of

REGION_COLUMNS = ("boxes", "box_scores")


def _require_column(dataset: Dataset, column: str, option: str, name: str) -> None:
    if column not in dataset.column_names:
        raise ValueError(
            f"{name} has no column {column!r}; its columns are {dataset.column_names}. "
            f"Name the right one with ',{option}=COLUMN'."
        )


def _image_ids(dataset: Dataset, column: str | None, source: str | None, name: str) -> list[str]:
    if source is not None and (source not in ID_RULES or column is None):
        raise ValueError(
            f"Expected source to be one of {sorted(ID_RULES)}, with a column of image ids, "
            f"got {source!r} and {column!r}."
        )
    if column is None:
        return [f"{name}-{row}" for row in range(len(dataset))]
    _require_column(dataset, column, "image_id", name)
    values = id_texts(dataset, column, name)
    return values if source is None else [apply_rule(source, v, f"{name}, row {row}") for row, v in enumerate(values)]


def _merge_captions(image_ids: list[str], captions: list[list[str | None] | None]) -> dict[int, list[str | None]]:
    """The captions of all rows of an image, at its first row."""
    first_row: dict[str, int] = {}
    merged: dict[int, list[str | None]] = {}
    for row, (image_id, texts) in enumerate(zip(image_ids, captions, strict=True)):
        merged.setdefault(first_row.setdefault(image_id, row), []).extend(texts or ())
    return merged


def _require_one_picture(table: Dataset, image_ids: list[str], name: str) -> None:
    """Refuse rows of one image id whose pictures or boxes differ: only those of the first row would be kept.

    Pictures are compared by their length in bytes, or by their paths.
    """
    chunks = table.select_columns(["image"]).with_format("arrow")[:]["image"].chunks
    lengths = [length for chunk in chunks for length in pc.binary_length(pc.struct_field(chunk, "bytes")).to_pylist()]
    paths = [path for chunk in chunks for path in pc.struct_field(chunk, "path").to_pylist()]
    regions = read_regions(table, name) if "boxes" in table.column_names else ()
    first_row: dict[str, int] = {}
    for row, image_id in enumerate(image_ids):
        first = first_row.setdefault(image_id, row)
        what = "pictures" if lengths[row] != lengths[first] else ""
        if lengths[row] is None and paths[row] != paths[first]:
            what = "pictures"
        for column in regions:
            one, other = (column.values[column.offsets[i] : column.offsets[i + 1]] for i in (first, row))
            if not np.array_equal(one, other, equal_nan=True):
                what = what or "boxes"
        if what:
            raise ValueError(
                f"{name}: rows {first} and {row} have the image id {image_id!r} and different {what}. Expected rows "
                "of one image to differ in their captions only; name the right column with ',image_id=COLUMN'."
            )


def standardise_columns(
    dataset: Dataset,
    *,
    image: str = "image",
    captions: str = "captions",
    negatives: str | None = None,
    image_id: str | None = None,
    source: str | None = None,
    captions_per_image: int | None = None,
    missing: str = "raise",
    name: str = "dataset",
) -> Dataset:
    """Bring a dataset with pictures and captions into the one schema, without copying the pictures.

    Rows are merged into one, with all their captions, only where the column `image_id` says that they show one image.

    Args:
        dataset (`datasets.Dataset`): Pictures as `Image`, as bytes or as paths; captions as lists of text or one text
            a row.
        image, captions (`str`, *optional*): Column names, by default `"image"` and `"captions"`.
        negatives (`str`, *optional*): Column of false captions, as text or lists of text; a row may have none.
        image_id (`str`, *optional*): Column of the ids, by default `image_id` where there is one; without one, ids are
            `<name>-<row>`.
        source (`str`, *optional*): `"coco"` or `"flickr"`: the ids are COCO numbers or Flickr file names and get the
            form that all readers share, so that test images are recognised. By default ids stay as they are.
        captions_per_image (`int`, *optional*): Keep the first so many captions of each image; by default all.
        missing (`str`, *optional*, defaults to `"raise"`): `"skip"` leaves out rows whose path leads to no file and
            reports them.
        name (`str`, *optional*, defaults to `"dataset"`): What messages call it.

    Returns:
        `datasets.Dataset`: `image_id`, `image`, `captions`, `negatives` if asked for, and `boxes`, `box_scores` where
            it has them.

    Raises:
        FileNotFoundError: If the file of a picture given by path is missing.
        ValueError: If a column is missing (the message names those present) or of a wrong type, an id or a box is
            none, rows of one image differ in picture or boxes (the rows are named), or no row is left.
    """
    _require_column(dataset, image, "image", name)
    _require_column(dataset, captions, "captions", name)
    require_rows(len(dataset), name)
    if image_id is None and "image_id" in dataset.column_names:
        image_id = "image_id"
    ids = _image_ids(dataset, image_id, source, name)
    merged = _merge_captions(ids, text_lists(dataset, captions, name))
    cleaned, kept = clean_captions([ids[row] for row in merged], list(merged.values()), name)
    if captions_per_image is not None and captions_per_image < 1:
        raise ValueError(f"{name}: expected captions_per_image from 1, got {captions_per_image}.")
    captions_at = {row: found[:captions_per_image] for row, found in zip(merged, cleaned, strict=True)}
    texts = {"captions": [captions_at.get(row, []) for row in range(len(ids))]}
    if negatives is not None:
        _require_column(dataset, negatives, NEGATIVES, name)
        false = _merge_captions(ids, text_lists(dataset, negatives, name))
        texts[NEGATIVES] = clean_negatives([false.get(row) for row in range(len(ids))])
    columns = {column: (values, CAPTION_FEATURES["captions"]) for column, values in texts.items()}
    table = put_columns(
        with_plain_regions(dataset.with_format(None), name),
        {"image_id": (ids, CAPTION_FEATURES["image_id"]), **columns},
    )
    regions = [column for column in REGION_COLUMNS if column in table.column_names]
    table = table.select_columns(["image_id", image, *texts, *regions])
    table = with_images(table, image, name)
    if len(merged) < len(ids):
        _require_one_picture(table, ids, name)
    table, present = present_images(table, ids, name, missing)
    firsts = list(merged)
    keep = set(present) & {firsts[i] for i in kept}
    require_rows(len(keep), name)
    return table if len(keep) == len(table) else table.select(sorted(keep))


@with_options_of(standardise_columns, "name")
def read_parquet(pattern: str, **options: Any) -> Dataset:
    """Read parquet files with a column of pictures and one of captions.

    Args:
        pattern (`str`): A path or glob; `**` goes into subfolders.
        options: As in [`standardise_columns`], without `name`. Without ids, rows are called `<folder>/<file>-<row>`.

    Returns:
        `datasets.Dataset`: As [`standardise_columns`] gives it.

    Raises:
        FileNotFoundError: If no file matches.
        ValueError: If a file is not readable as parquet, or as [`standardise_columns`] says.
    """
    files = match_parquet(pattern)
    names = [f"{path.resolve().parent.name}/{path.stem}-{row}" for path, rows in files for row in range(rows)]
    require_rows(len(names), f"'{pattern}'")
    dataset = load_parquet([path for path, _ in files], pattern)
    if options.get("image_id") is None and "image_id" not in dataset.column_names:
        dataset = put_columns(dataset, {"image_id": (names, CAPTION_FEATURES["image_id"])})
        options["image_id"] = "image_id"
    return standardise_columns(dataset, name=f"'{pattern}'", **options)


@with_options_of(standardise_columns, "name")
def read_hub(name: str, split: str, *, config: str | None = None, **options: Any) -> Dataset:
    """Read a split of a dataset of the Hub, or of a local folder that `datasets.load_dataset` understands.

    Args:
        name (`str`): The dataset's id or folder.
        split (`str`): The split, slices such as `train[:100]` excepted (they hold a colon).
        config (`str`, *optional*): The dataset's configuration.
        options: As in [`standardise_columns`], without `name`.

    Returns:
        `datasets.Dataset`: As [`standardise_columns`] gives it.

    Raises:
        FileNotFoundError: If there is no such dataset.
        ValueError: If there is no such split, or as [`standardise_columns`] says.
    """
    return standardise_columns(load_hub(name, split, config=config), name=f"{name}-{split}", **options)


def read_disk(folder: str) -> Dataset:
    """Read a saved dataset that is in the schema already, all its columns kept.

    Args:
        folder (`str`): What `Dataset.save_to_disk` wrote.

    Returns:
        `datasets.Dataset`: The saved dataset.

    Raises:
        FileNotFoundError: If the folder is missing or no saved dataset.
        ValueError: If it is damaged, holds several splits, lacks a column, repeats an image id or is empty.
    """
    try:
        dataset = load_from_disk(str(require_folder(folder, "dataset folder")))
    except FileNotFoundError:
        raise
    except (OSError, pa.ArrowException, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"The dataset folder '{folder}' is damaged ({error}). Write it again.") from error
    if isinstance(dataset, DatasetDict):
        raise ValueError(f"'{folder}' holds the splits {sorted(dataset)}. Name the folder of one of them.")
    for name, feature in CAPTION_FEATURES.items():
        found = dataset.features.get(name)
        if name == "image" and found is not None and holds_pictures(found):
            dataset = with_images(dataset, name, f"'{folder}'")
        elif found is not None and found != feature and same_values(found, feature):
            dataset = dataset.cast_column(name, feature)
    wrong = [name for name, feature in CAPTION_FEATURES.items() if dataset.features.get(name) != feature]
    if wrong:
        raise ValueError(
            f"Expected the column {wrong[0]!r} as {CAPTION_FEATURES[wrong[0]]} in '{folder}', got {dataset.features}. "
            "Bring the dataset into the schema with `standardise_columns`."
        )
    if (texts := dataset.features.get(NEGATIVES)) not in (None, CAPTION_FEATURES["captions"]):
        raise ValueError(f"Expected the column {NEGATIVES!r} of '{folder}' as lists of text, got {texts}.")
    require_rows(len(dataset), f"'{folder}'")
    require_unique(dataset["image_id"][:], f"'{folder}'")
    return with_plain_regions(dataset, f"'{folder}'")
