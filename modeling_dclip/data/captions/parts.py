"""The parts of a run's images: what a model learns from, what chooses its checkpoint, and what alone is reported.

The *test part* is drawn by the content of the pictures: no seed, no file name and no caption decides it. The rest is
split into training and validation by image id. Identical pictures are in one part, under whatever names they come.

A model keeps the keys of the images that it learned from, or that chose its checkpoint, beside its weights, in
`trained_images.npy`, so that an evaluation on some of them says so.

A run keeps its test part in `RUN_FOLDER/held_out`, and the spec `held_out:RUN_FOLDER` reads it: `held_out.json` says
what it is of, `images` is a saved dataset. Pictures that are files stay where they are; stored bytes are copied.
"""

import io
import logging
import math
import os
import re
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, Image, Value

from modeling_dclip.data.captions.tables import read_disk
from modeling_dclip.data.columns import put_columns, save_columns
from modeling_dclip.data.files import (
    NULLABLE_TEXT,
    printable,
    read_bytes,
    read_json,
    replacing,
    require_field,
    require_folder,
    write_bytes,
    write_json,
)
from modeling_dclip.data.images import MissingImageError, UnreadableImageError, read_encoded, undecoded_images
from modeling_dclip.data.rows import (
    FIRST_IDS,
    MISSING_MODES,
    image_files,
    require_rows,
    rows_by_lot,
    with_paths,
)
from modeling_dclip.encoders.fingerprints import hash_bytes

logger = logging.getLogger(__name__)

HELD_OUT = "held_out"  # the folder of the test part in a run's folder
_IMAGES, _ABOUT = "images", "held_out.json"
_KEY = "image_key"  # the column of the pictures' keys
_STORED = {"bytes": Value("binary"), "path": Value("string")}  # of an `Image`, the files' content would be saved too
_LEVELS = 4  # of folders below the one that holds the test part: arm, seed, stage, checkpoint


def describe_copies(image_ids: Sequence[str], keys: Sequence[str]) -> str:
    """Count the pictures that are byte for byte another one, and name a pair; an empty text if there are none.

    Args:
        image_ids (`Sequence[str]`): Of the rows.
        keys (`Sequence[str]`): Of their pictures: [`~modeling_dclip.data.columns.image_keys`].

    Raises:
        ValueError: If there are more of one than of the other.
    """
    seen: dict[str, str] = {}
    pairs = []
    for image_id, key in zip(image_ids, keys, strict=True):
        if key in seen:
            pairs.append((seen[key], image_id))
        seen.setdefault(key, image_id)
    if not pairs:
        return ""
    one, other = map(printable, pairs[0])
    number = "1 image is an identical copy" if len(pairs) == 1 else f"{len(pairs)} images are identical copies"
    return f"{number} of another, e.g. {other} of {one}; copies stay in one part of a split"


def _cut(order: Sequence[int], keys: Sequence[str] | None, size: int) -> int:
    """Where to cut an order near `size`, so that rows of one key are on one side and no side is empty."""
    if keys is None or not 0 < size < len(order):
        return size

    def parts_copies(at: int) -> bool:
        return 0 < at < len(order) and keys[order[at - 1]] == keys[order[at]]

    below = next(at for at in range(size, -1, -1) if not parts_copies(at))
    return below or next(at for at in range(size, len(order) + 1) if not parts_copies(at))


def _in_order(dataset: Dataset, rows: Sequence[int]) -> Dataset:
    return dataset.select(sorted(rows))


def split_off_test(dataset: Dataset, fraction: float, keys: Sequence[str]) -> tuple[Dataset, Dataset]:
    """Draw the test part, by the content of the pictures alone.

    The same pictures have the same test part under other names, with other captions and in another order. Of more
    pictures, nearly the same ones are drawn: a picture changes its part only where the border between the parts moves
    over it.

    Args:
        dataset (`datasets.Dataset`): N rows.
        fraction (`float`): Share of the test part, in (0, 1), taken as the decimal it is written as. Rounded down.
        keys (`Sequence[str]`): N keys of the pictures: [`~modeling_dclip.data.columns.image_keys`]. Rows of one key
            are in one part.

    Returns:
        `tuple[Dataset, Dataset]`: The rest and the test part, each in the order of `dataset`.

    Raises:
        ValueError: If `fraction` is not in (0, 1) or leaves a side empty; the message says what to set.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"Expected a fraction in (0, 1), got {fraction}.")
    number = len(dataset)
    order = rows_by_lot(keys, 0, "test")
    size = _cut(order, keys, math.floor(number * Fraction(str(fraction))))
    if not 0 < size < number:
        part = "the test part" if size == 0 else "what is left to train on"
        least = math.ceil(1000 / number) / 1000 if number else 0
        hint = f"at least {least:g}" if size == 0 else f"at most {1 - least:g}"
        kinds = "" if len(set(keys)) == number else f", {len(set(keys))} of them different,"
        raise ValueError(
            f"test_fraction {fraction} of {number} images{kinds} leaves {part} empty. Set it to {hint}, or give more "
            "images."
        )
    return _in_order(dataset, order[size:]), _in_order(dataset, order[:size])


def split_train_validation(
    dataset: Dataset,
    fraction: float = 0.9,
    seed: int = 0,
    *,
    keys: Sequence[str] | None = None,
    of: int | None = None,
) -> tuple[Dataset, Dataset]:
    """Split by image id, so that the same image lands on the same side whatever the order of rows.

    Args:
        dataset (`datasets.Dataset`): With the column `image_id`.
        fraction (`float`, *optional*, defaults to 0.9): Share for training, in (0, 1), taken as the decimal it is
            written as: 75,000 rows give exactly 67,500 and 7,500. Rounded down.
        seed (`int`, *optional*, defaults to 0): Another seed is another split, independent of the draws of
            [`~modeling_dclip.data.captions.load_mix`].
        keys (`Sequence[str]`, *optional*): Of the rows' pictures. Rows of one key are on one side.
        of (`int`, *optional*): Number of rows that `fraction` is of, where a test part was split off before; by
            default those of `dataset`.

    Returns:
        `tuple[Dataset, Dataset]`: Training and validation rows, each in the order of `dataset`.

    Raises:
        ValueError: If `fraction` is not in (0, 1) or leaves a side empty.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"Expected a fraction in (0, 1), got {fraction}.")
    number = len(dataset) if of is None else of
    order = rows_by_lot(dataset["image_id"][:], seed, "split")
    if keys is not None:  # a copy stands behind the first picture of its key
        copies: dict[str, list[int]] = {}
        for row in order:
            copies.setdefault(keys[row], []).append(row)
        order = [row for rows in copies.values() for row in rows]
    size = _cut(order, keys, min(len(order), math.floor(number * Fraction(str(fraction)))))
    if size in (0, len(dataset)):
        none, hint = ("train", "higher") if size == 0 else ("validate", "lower")
        raise ValueError(
            f"Expected rows on both sides of a split of {number} rows at {fraction}, got none to {none} on. Set "
            f"train_fraction {hint}, or give more images."
        )
    return _in_order(dataset, order[:size]), _in_order(dataset, order[size:])


def write_held_out(folder: Path, dataset: Dataset, keys: Sequence[str], *, of: int, fraction: float) -> None:
    """Keep a test part in the folder `held_out` of a run.

    Args:
        folder (`Path`): The folder `held_out`.
        dataset (`datasets.Dataset`): N rows with `image_id`, `image`, `captions`. Files stay where they are, their
            paths become absolute; stored bytes are copied.
        keys (`Sequence[str]`): N keys of the pictures.
        of (`int`): Number of images that it was drawn from.
        fraction (`float`): The share that was asked for.

    Raises:
        OSError: If it cannot be written.
    """
    paths = {row: os.path.abspath(path) for row, path in image_files(dataset).items() if path is not None}
    kept = put_columns(with_paths(dataset, paths), {_KEY: (list(keys), Value("string"))})
    about = {"run": os.path.abspath(folder.parent), "images": len(dataset), "of": of, "test_fraction": fraction}
    about["mode"] = dataset.features["image"].mode
    with replacing(folder / _IMAGES) as temporary:
        save_columns(kept.cast_column("image", _STORED), temporary)
    write_json(folder / _ABOUT, about)


def _holder(folder: Path) -> Path | None:
    """The folder that holds a test part: this one or one of those above it."""
    places = (folder, *folder.parents[:_LEVELS])
    return next((place for place in places if (place / HELD_OUT / _ABOUT).is_file()), None)


def find_held_out(run_folder: str | os.PathLike) -> Path:
    """The folder `held_out` of a run.

    Args:
        run_folder (`str` or `os.PathLike`): The run's folder, one of an arm's run, or of a stage or checkpoint in it.

    Raises:
        FileNotFoundError: If there is no such folder, or the run has no test part; the message says what to name or
            to set.
    """
    try:
        root = Path(os.path.abspath(require_folder(run_folder, "run folder")))
    except FileNotFoundError as error:
        if (place := _holder(Path(run_folder))) is None:
            raise
        advice = f"{printable(place)} is a run's folder with a test part: write held_out:{printable(place)}."
        raise FileNotFoundError(f"{str(error).removesuffix('Check the path.')}{advice}") from None
    if (place := _holder(root)) is not None:
        return place / HELD_OUT
    raise FileNotFoundError(
        f"The run '{printable(run_folder)}' has no test part. Train with test_fraction above 0, for example "
        "`--train_fraction 0.8 --test_fraction 0.1`, which leaves a tenth for validation."
    )


def _read_about(folder: Path) -> dict[str, Any]:
    path = folder / _ABOUT
    keys = ("run", "images", "of", "test_fraction", "mode")
    about = read_json(path, "description of a test part", keys, advice="Run train.py again with --overwrite true.")
    require_field(about, "run", "The object", path, str)
    require_field(about, "mode", "The object", path, NULLABLE_TEXT)
    for name in ("images", "of"):
        require_field(about, name, "The object", path, int)
    return about


def describe_held_out(run_folder: str | os.PathLike, images: int) -> str:
    """What was read of the test part of a run, in a few words: `15 of the 155 images of the run outputs/mine`.

    Args:
        run_folder (`str` or `os.PathLike`): As for [`find_held_out`].
        images (`int`): How many images were read of it; fewer than it has with `@COUNT` or `missing=skip`.

    Raises:
        FileNotFoundError: As [`find_held_out`].
        ValueError: If its description is damaged.
    """
    folder = find_held_out(run_folder)
    about, here = _read_about(folder), Path(os.path.abspath(run_folder)) == folder.parent
    run = printable(run_folder if here else folder.parent)
    if images != about["images"]:
        return f"{images:,} of the {about['images']:,} test images of the run {run}, kept out of training"
    return f"{images:,} of the {about['of']:,} images of the run {run}, kept out of training"


def read_held_out(run_folder: str, *, missing: str = "raise") -> Dataset:
    """Read the test part of a run of `train.py`, with the captions that the run read.

    The folder may have been moved, alone or together with the pictures. Every picture is compared with the run's.

    Args:
        run_folder (`str`): The folder that `output_dir` named, or one of an arm, a seed or a stage in it.
        missing (`str`, *optional*, defaults to `"raise"`): `"skip"` leaves out pictures that are missing or have
            changed since, and reports them.

    Returns:
        `datasets.Dataset`: `image_id`, `image`, `captions`, and `boxes`, `box_scores` where the data had them.

    Raises:
        FileNotFoundError: If there is no such run, it has no test part, or a picture is missing.
        ValueError: If a picture has changed, what the run kept is damaged, or no picture is left.
    """
    if missing not in MISSING_MODES:
        raise ValueError(f"Expected missing to be one of {MISSING_MODES}, got {missing!r}.")
    folder = find_held_out(run_folder)
    about, dataset = _read_about(folder), read_disk(str(folder / _IMAGES))
    keys = _keys_of(dataset, folder)
    dataset = dataset.remove_columns(_KEY).cast_column("image", Image(mode=about["mode"]))
    dataset = with_paths(dataset, _moved_paths(dataset, about["run"], folder.parent))
    problems = _find_changes(dataset, keys)
    if not problems:
        return dataset
    ids = dataset["image_id"][:]
    shown = ", ".join(f"{printable(ids[row])} ({problems[row]})" for row in list(problems)[:FIRST_IDS])
    message = (
        f"held_out:{printable(run_folder)}: {len(problems)} of {len(ids)} test images are no longer those of the run: "
        f"{shown}"
    )
    if missing == "raise":
        kind = FileNotFoundError if "missing" in problems.values() else ValueError
        raise kind(f"{message}. Put them back, or add ',missing=skip' to leave them out.")
    logger.warning("%s; left out", message)
    kept = [row for row in range(len(ids)) if row not in problems]
    require_rows(len(kept), f"held_out:{printable(run_folder)}")
    return dataset.select(kept)


def read_held_out_keys(run_folder: str | os.PathLike) -> list[str]:
    """The keys of the pictures of a run's test part; the pictures themselves are not read.

    Raises:
        FileNotFoundError: As [`find_held_out`].
        ValueError: If what the run kept is damaged.
    """
    folder = find_held_out(run_folder)
    return _keys_of(read_disk(str(folder / _IMAGES)), folder)


def _keys_of(dataset: Dataset, folder: Path) -> list[str]:
    if _KEY not in dataset.column_names:
        raise ValueError(f"Expected a column {_KEY!r} in '{folder / _IMAGES}', got {dataset.column_names}.")
    return dataset[_KEY][:]


def _moved_paths(dataset: Dataset, old_run: str, run: Path) -> dict[int, str]:
    """Where pictures lie beside the run's folder, as they lay before, of those that are no longer at their path."""
    moved = {}
    for row, path in image_files(dataset).items():
        if path is not None and not os.path.isfile(path):
            other = os.path.normpath(run / os.path.relpath(path, old_run))
            if os.path.isfile(other):
                moved[row] = other
    return moved


def _find_changes(dataset: Dataset, keys: Sequence[str]) -> dict[int, str]:
    """What happened to the pictures that are not as their keys say, by row."""
    problems = {}
    for row, stored in enumerate(undecoded_images(dataset)):
        try:
            if hash_bytes(read_encoded(stored["image"])) != keys[row]:
                problems[row] = "changed"
        except UnreadableImageError as error:
            problems[row] = "missing" if isinstance(error, MissingImageError) else error.reason
    return problems


# --- what a model learned from ---------------------------------------------------------------------------------------

TRAINED_IMAGES = "trained_images.npy"
_BYTES = 16  # of a picture's SHA-256; two of a billion pictures agree in them once in 10^20


def _as_array(keys: Iterable[str]) -> np.ndarray:
    """The first bytes of keys."""
    digits = "".join(key[: 2 * _BYTES] for key in keys)
    return np.frombuffer(bytes.fromhex(digits), f"S{_BYTES}")


def write_trained_images(folder: Path, keys: Sequence[str], starts: Sequence[str | os.PathLike] = ()) -> None:
    """Keep the keys of the images that had a say in a model beside it, if any is known. No loader needs the file.

    Args:
        folder (`Path`): The model's folder.
        keys (`Sequence[str]`): Of the pictures that it learns from or that choose its checkpoint:
            [`~modeling_dclip.data.columns.image_keys`].
        starts (`Sequence`, *optional*): The models that it starts from or is taught by. What they learned from is
            added, where they are folders that say so.

    Raises:
        OSError: If it cannot be written.
    """
    earlier = [found for start in starts if (found := read_trained_images(start)) is not None]
    if not (keys or earlier):
        return
    every = np.unique(np.concatenate([_as_array(keys), *(one.keys for one in earlier)]))
    content = io.BytesIO()
    np.save(content, every.view(np.uint8).reshape(-1, _BYTES), allow_pickle=False)
    write_bytes(folder / TRAINED_IMAGES, content.getvalue())


class TrainedImages(NamedTuple):
    """The images that a model learned from, or that chose its checkpoint.

    Attributes:
        path (`Path`): The file that says so.
        keys (`np.ndarray` of shape `(N,)`): Of their pictures, sorted.
    """

    path: Path
    keys: np.ndarray

    def count_overlap(self, keys: Sequence[str]) -> int:
        """Count the test images that had a say in the model.

        Args:
            keys (`Sequence[str]`): Of the test images: [`~modeling_dclip.data.columns.image_keys`].
        """
        return int(np.isin(_as_array(keys), self.keys).sum())

    def describe_overlap(self, keys: Sequence[str]) -> str:
        """Say how many of some test images had a say in the model; an empty text if none.

        Args:
            keys (`Sequence[str]`): As in `count_overlap`.
        """
        number = self.count_overlap(keys)
        if not number:
            return ""
        return f"{number:,} of the {len(keys):,} test images trained this model or chose its checkpoint ({self.path})"


_OVERLAP = re.compile(  # records of earlier versions have the second form
    r"([\d,]+) of the ([\d,]+) test images (?:trained this model|(?:was|were) in this model's training data)"
)


def read_overlap(note: str) -> tuple[int, int] | None:
    """Read what [`TrainedImages.describe_overlap`] wrote; `None` if a note says something else.

    Args:
        note (`str`): One of a record's notes.

    Returns:
        `tuple[int, int]`: The number of test images that had a say in the model, and of all.

    Example:
        >>> read_overlap("1,027 of the 2,108 test images trained this model or chose its checkpoint (a/x.npy)")
        (1027, 2108)
    """
    found = _OVERLAP.search(note)
    return None if found is None else (int(found[1].replace(",", "")), int(found[2].replace(",", "")))


def read_trained_images(model: str | os.PathLike) -> TrainedImages | None:
    """Find the images that a model learned from; `None` if its folder does not say, or it is no folder.

    Args:
        model (`str` or `os.PathLike`): A model's folder, or one of its checkpoints or of its adapter. A damaged file
            is passed over with a warning.
    """
    places = (Path(model), Path(model).parent) if Path(model).is_dir() else ()
    path = next((place / TRAINED_IMAGES for place in places if (place / TRAINED_IMAGES).is_file()), None)
    if path is None:
        return None
    try:
        stored = np.load(io.BytesIO(read_bytes(path)), allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        logger.warning("'%s' is damaged (%s): whether images were trained on is not known. Delete it.", path, error)
        return None
    if stored.dtype != np.uint8 or stored.ndim != 2 or stored.shape[1] != _BYTES:
        shape = f"{stored.dtype} of shape {stored.shape}"
        logger.warning("'%s' holds %s, no keys: whether images were trained on is not known. Delete it.", path, shape)
        return None
    return TrainedImages(path, np.ascontiguousarray(stored).view(f"S{_BYTES}").reshape(-1))
