"""The checks that the rows of every caption source pass, and stable ids that are equal for one picture in all sources.

A rejected row is counted, and a warning names the first ids. No row is replaced silently.
"""

import ast
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Image, List, Value

from modeling_dclip.data.columns import put_columns
from modeling_dclip.data.files import FileFinder, is_utf8, parse_json, printable
from modeling_dclip.encoders.fingerprints import hash_bytes
from modeling_dclip.progress import count_of

logger = logging.getLogger(__name__)

FIRST_IDS = 5
_MOST_LINES = 20  # of a table that a message names without what is in them
NEGATIVES = "negatives"  # the column of false captions
CAPTION_FEATURES = Features(image_id=Value("string"), image=Image(), captions=List(Value("string")))
MISSING_MODES = ("raise", "skip")
# How programs write a missing value as text: pandas, numpy, spreadsheets, databases.
_NO_CAPTION = {"nan", "NaN", "NAN", "<NA>", "#N/A", "N/A", "null", "NULL", "None", "NaT"}
# A list of texts written as one text, as tables without lists hold it: of JSON or of Python.
_LISTED = re.compile(r"""\[\s*["'].*["']\s*,?\s*\]""", re.DOTALL)
_FLICKR_NAME = re.compile(r"(\d+)_[0-9a-f]{6,}")


def coco_id(value: str | int) -> str:
    """`coco-<number>` from a COCO image id or from any of its file names.

    Raises:
        ValueError: If the value ends in no number.

    Example:
        >>> coco_id("COCO_val2014_000000391895.jpg") == coco_id("000000391895.jpg") == coco_id(391895)
        True
    """
    match = re.search(r"(\d+)$", PureWindowsPath(str(value)).stem)
    if match is None:
        raise ValueError(f"Expected a COCO image id or file name that ends in a number, got {value!r}.")
    return f"coco-{int(match[1])}"


def flickr_id(value: str | int) -> str:
    """`flickr-<photo id>` from the file name of Flickr30k (`<photo id>.jpg`) or Flickr8k (`<photo id>_<secret>.jpg`).

    The secret is dropped because Flickr30k holds pictures of Flickr8k under the bare photo id. Without it, a test
    picture of one set is found in the other. A name of another form keeps its whole stem.

    Example:
        >>> flickr_id("1000268201_693b08cb0e.jpg") == flickr_id("1000268201.jpg")
        True
    """
    stem = PureWindowsPath(str(value)).stem
    match = _FLICKR_NAME.fullmatch(stem)
    return f"flickr-{match[1] if match else stem}"


ID_RULES = {"coco": coco_id, "flickr": flickr_id}


def apply_rule(source: str, value: str, where: str) -> str:
    """The id that a source's rule gives.

    Args:
        source (`str`): A key of `ID_RULES`.
        value (`str`): An id or a file name of the source.
        where (`str`): Where it stands, for messages, e.g. `"'a.parquet', row 3"`.

    Raises:
        ValueError: If it is no id of the source; the message says where.
    """
    try:
        return ID_RULES[source](value)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def first(ids: Iterable[str]) -> str:
    """The first few ids, for a message."""
    return ", ".join(map(printable, list(ids)[:FIRST_IDS]))


def rows_by_lot(names: Sequence[str], seed: int, purpose: str) -> list[int]:
    """Draw rows in an order that depends on seed and name alone, not on a file's order nor on which other rows there
    are.

    Args:
        names (`Sequence[str]`): Of the rows: ids, or keys of their content. Rows of one name stay in their order.
        seed (`int`): Another seed is another order.
        purpose (`str`): What the draw is for. Draws of different purposes are independent.

    Returns:
        `list[int]`: All rows, the first drawn first.
    """
    lots = [hash_bytes(f"{purpose}/{seed}/{name}") for name in names]
    return sorted(range(len(lots)), key=lots.__getitem__)


def require_unique(image_ids: Sequence[str], source: str) -> None:
    """Refuse repeated image ids.

    Raises:
        ValueError: If an image id comes more than once; the message counts and names them.
    """
    if len(set(image_ids)) == len(image_ids):
        return
    seen: set[str] = set()
    repeated: dict[str, None] = {}
    for image_id in image_ids:
        if image_id in seen:
            repeated[image_id] = None
        seen.add(image_id)
    raise ValueError(
        f"{len(repeated)} image ids come more than once in {source}: {first(repeated)}. "
        "Expected one row an image with all its captions; remove the repeated rows or the overlapping source."
    )


def require_rows(number: int, source: str, what: str = "an image and a caption") -> None:
    """Refuse a dataset left empty.

    Raises:
        ValueError: If `number` is 0.
    """
    if number == 0:
        raise ValueError(f"No row with {what} is left of {source}. Expected at least one.")


def _without_marks(text: str) -> str:
    return text.strip().strip("\ufeff").strip()


def _listed_texts(text: str) -> list[str]:
    """The texts of a list that is written as one text; any other text is a list of itself."""
    if not _LISTED.fullmatch(text.strip()):
        return [text]
    try:
        values = parse_json(text.strip(), "a caption")
    except ValueError:
        try:
            values = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return [text]
    return values if all(isinstance(value, str) for value in values) else [text]


def clean_captions(
    image_ids: Sequence[str], captions: Sequence[Sequence[str | None] | None], source: str
) -> tuple[list[list[str]], list[int]]:
    """Strip captions and leave out empty ones; a row with none left is rejected and reported.

    A caption that is a list of texts, written as one text (`["a dog", "a cat"]`, in JSON's way or in Python's), is
    read as these texts; such images are counted and reported. A byte order mark around a caption is no part of it.

    A caption that is nothing but `nan`, `null` or another of the words that programs write for a missing value counts
    as empty; such captions are counted and reported.

    Returns:
        `tuple`: The captions of every row (maybe empty), and the indices of the rows to keep.
    """
    read = [[one for text in row or () if text for one in _listed_texts(text)] for row in captions]
    given = [[text for text in row or () if text] for row in captions]
    if listed := [i for i, (texts, row) in enumerate(zip(read, given, strict=True)) if texts != row]:
        logger.warning(
            "%s: read captions that are lists, written as one text, of %s, first ids: %s",
            *(source, count_of(len(listed), "image"), first(image_ids[i] for i in listed)),
        )
    stripped = [[text for text in map(_without_marks, row) if text] for row in read]
    cleaned = [[text for text in row if text not in _NO_CAPTION] for row in stripped]
    missing = [i for i, (all_of, kept) in enumerate(zip(stripped, cleaned, strict=True)) if len(all_of) > len(kept)]
    if missing:
        texts = sorted({text for i in missing for text in stripped[i] if text in _NO_CAPTION})
        logger.warning(
            "%s: left out captions that say %s, which stands for a missing value, of %s, first ids: %s",
            *(source, " or ".join(map(repr, texts)), count_of(len(missing), "image")),
            first(image_ids[i] for i in missing),
        )
    keep = [index for index, row in enumerate(cleaned) if row]
    if len(keep) < len(cleaned):
        rejected = [image_id for image_id, row in zip(image_ids, cleaned, strict=True) if not row]
        logger.warning(
            "%s: rejected %s without a caption, first ids: %s",
            *(source, count_of(len(rejected), "image"), first(rejected)),
        )
    return cleaned, keep


def clean_negatives(lists: Sequence[Sequence[str | None] | None]) -> list[list[str]]:
    """Strip false captions and leave out empty ones; an image may have none.

    A text that is a list of texts, as in [`clean_captions`], is read as these.

    Args:
        lists (`Sequence`): False captions of each row.
    """
    read = [[_without_marks(one) for text in row or () if text for one in _listed_texts(text)] for row in lists]
    return [[text for text in row if text and text not in _NO_CAPTION] for row in read]


LEAVE_OUT = "Fix the image folder, or add ',missing=skip' to leave them out."
FIX_PATHS = "Fix the paths or remove the rows."


class Lines(NamedTuple):
    """Where the rows of a table stand in its file.

    Attributes:
        file (`str` or `Path`): The file.
        numbers (`Sequence[int]`): The line of each row, from 1.
    """

    file: str | Path
    numbers: Sequence[int]

    def name(self, row: int) -> str:
        """`FILE:LINE` of a row."""
        return f"{printable(self.file)}:{self.numbers[row]}"


def _shared_folder(paths: Sequence[Path]) -> Path | None:
    """The folder that all files lie below, so that messages name it once; `None` if there is none but the root."""
    if len({path.anchor for path in paths}) > 1 or any(".." in path.parts for path in paths):
        return None
    parents = [path.parent.parts for path in paths]
    shared = Path(*os.path.commonprefix(parents))
    return shared if len(shared.parts) > len(Path(shared.anchor).parts) else None


def locate_images(
    image_ids: Sequence[str],
    paths: Sequence[Path],
    source: str,
    missing: str,
    advice: str = LEAVE_OUT,
    lines: Lines | None = None,
) -> dict[int, Path]:
    """Find the image file of each row, as [`~modeling_dclip.data.files.FileFinder`] finds it.

    Args:
        image_ids (`Sequence[str]`): For messages.
        paths (`Sequence[Path]`): As the source names them.
        source (`str`): For messages.
        missing (`str`): `"raise"`, or `"skip"` to leave out rows whose file is missing and report them.
        advice (`str`, *optional*): What to do about missing files.
        lines ([`Lines`], *optional*): Where each row stands, for messages.

    Returns:
        `dict[int, Path]`: The file on disk by row, in order, of the rows that have one.

    Raises:
        FileNotFoundError: If a file is missing and `missing` is `"raise"`.
        ValueError: If `missing` is neither `"raise"` nor `"skip"`, or two files fit one name.
    """
    if missing not in MISSING_MODES:
        raise ValueError(f"Expected missing to be one of {MISSING_MODES}, got {missing!r}.")
    finder = FileFinder()
    found: dict[int, Path] = {}
    for row, path in enumerate(paths):
        file = finder.find(path)
        if file is not None and is_utf8(file):
            found[row] = file
    absent = [row for row in range(len(paths)) if row not in found]
    if absent:
        examples, root = [], _shared_folder(paths)
        for row in absent[:FIRST_IDS]:
            reason = finder.explain(paths[row])
            place = f"'{printable(paths[row] if root is None else paths[row].relative_to(root))}'" + (
                f": {reason}" if reason else ""
            )
            line = "" if lines is None else f"{lines.name(row)}, "
            examples.append(f"{printable(image_ids[row])} ({line}{place})")
        others = [] if lines is None else [lines.name(row) for row in absent[FIRST_IDS:]]
        message = f"{source}: {len(absent)} of {len(paths)} image files are missing, first: {', '.join(examples)}"
        if others:
            left = len(others) - _MOST_LINES
            message += f"; then {', '.join(others[:_MOST_LINES])}" + (f" and {left} more" if left > 0 else "")
        if root is not None:
            message += f"; looked for in '{printable(root)}'"
        if missing == "raise":
            raise FileNotFoundError(f"{message}. {advice}")
        logger.warning("%s; left out", message)
    respelled = [row for row, file in found.items() if file != paths[row]]
    if respelled:
        row = respelled[0]
        logger.info(
            "%s: %d files are spelled otherwise on disk, first %s for %s",
            *(source, len(respelled), ascii(found[row].name), ascii(paths[row].name)),
        )
    return found


def present_images(
    dataset: Dataset, image_ids: Sequence[str] | None, name: str, missing: str, advice: str = LEAVE_OUT
) -> tuple[Dataset, list[int]]:
    """Find the rows whose picture is stored or lies at its path. Chunk by chunk, so that stored bytes stay on disk.

    Args:
        dataset (`datasets.Dataset`): With `image` of type `Image`.
        image_ids (`Sequence[str]`, *optional*): For messages; by default rows are named by their number.
        name (`str`): What messages call the dataset.
        missing, advice (`str`): As in [`locate_images`].

    Returns:
        `tuple[datasets.Dataset, list[int]]`: The dataset, paths spelled as on disk, and the rows that have a picture.

    Raises:
        FileNotFoundError, ValueError: As [`locate_images`]; also if a row has neither bytes nor a path.
    """
    ids = [f"of row {row}" for row in range(len(dataset))] if image_ids is None else image_ids
    files = image_files(dataset)
    if without := [row for row, path in files.items() if path is None]:
        raise ValueError(f"{name}: image {printable(ids[without[0]])} has neither bytes nor a path. Remove the row.")
    named = {row: Path(path) for row, path in files.items() if path is not None}
    rows = list(named)
    located = locate_images([ids[row] for row in rows], list(named.values()), name, missing, advice)
    found = {rows[place]: file for place, file in located.items()}
    respelled = {row: str(file) for row, file in found.items() if file != named[row]}
    kept = [row for row in range(len(dataset)) if row not in named or row in found]
    return with_paths(dataset, respelled), kept


def _image_chunks(dataset: Dataset) -> list[pa.StructArray]:
    return dataset.select_columns(["image"]).with_format("arrow")[:]["image"].chunks if len(dataset) else []


def image_files(dataset: Dataset) -> dict[int, str | None]:
    """The path of each row whose picture is a file, by row; `None` where a row has neither bytes nor a path.

    Chunk by chunk, so that stored bytes stay on disk.

    Args:
        dataset (`datasets.Dataset`): With `image` of type `Image`.
    """
    files: dict[int, str | None] = {}
    start = 0
    for chunk in _image_chunks(dataset):
        no_bytes = pc.is_null(pc.struct_field(chunk, "bytes")).to_numpy(zero_copy_only=False)
        paths = pc.struct_field(chunk, "path")
        files |= {start + i: paths[i].as_py() for i in np.flatnonzero(no_bytes).tolist()}
        start += len(chunk)
    return files


def with_paths(dataset: Dataset, paths: Mapping[int, str]) -> Dataset:
    """Replace the paths of some rows' images; bytes are not copied.

    Args:
        dataset (`datasets.Dataset`): With `image` of type `Image`.
        paths (`Mapping[int, str]`): New paths by row.
    """
    if not paths:
        return dataset
    parts, start = [], 0
    for chunk in _image_chunks(dataset):
        old = pc.struct_field(chunk, "path").to_pylist()
        new = pa.array([paths.get(start + i, path) for i, path in enumerate(old)], pa.string())
        parts.append(pa.StructArray.from_arrays([pc.struct_field(chunk, "bytes"), new], names=["bytes", "path"]))
        start += len(chunk)
    return put_columns(dataset, {"image": (pa.chunked_array(parts), dataset.features["image"])})


def build_rows(
    image_ids: list[str],
    paths: list[Path],
    captions: Sequence[Sequence[str | None]],
    source: str,
    missing: str,
    lines: Lines | None = None,
    negatives: Sequence[Sequence[str | None]] | None = None,
) -> Dataset:
    """Check the rows and make the dataset. Images stay paths until they are read.

    Args:
        image_ids, paths, captions (`list`): Of the rows.
        source, missing, lines: As in [`locate_images`].
        negatives (`Sequence`, *optional*): False captions of the rows; the dataset then has them in a column.

    Raises:
        FileNotFoundError: If an image file is missing and `missing` is `"raise"`.
        ValueError: If an image id is repeated or no row is left.
    """
    require_unique(image_ids, source)
    cleaned, keep = clean_captions(image_ids, captions, source)
    image_ids, paths, captions = [image_ids[i] for i in keep], [paths[i] for i in keep], [cleaned[i] for i in keep]
    lines = None if lines is None else Lines(lines.file, [lines.numbers[i] for i in keep])
    there = locate_images(image_ids, paths, source, missing, lines=lines)
    require_rows(len(there), source)
    columns = {
        "image_id": [image_ids[i] for i in there],
        "image": list(map(str, there.values())),
        "captions": [captions[i] for i in there],
    }
    dataset = Dataset.from_dict(columns, features=CAPTION_FEATURES)
    if negatives is None:
        return dataset
    false = clean_negatives([negatives[keep[i]] for i in there])
    return put_columns(dataset, {NEGATIVES: (false, CAPTION_FEATURES["captions"])})
